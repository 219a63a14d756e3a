"""Tests of experiments."""

import shutil

import numpy as np
import pytest
import sklearn.metrics
import torch
from PIL import Image

import common
import data
from tests.shared import SHARED, cli, read_json, refused, succeed


def test_corruptions_keep_shape_and_change_the_image():
    import experiments

    image = data._draw_radiograph(np.random.default_rng(0), sick=True, shifted=False, side=96)
    for name, change in experiments.corruptions().items():
        out = change(image)
        assert out.shape == image.shape and out.dtype == np.uint8, name
        assert 1 < np.abs(out.astype(int) - image).mean() < 80, name


def test_load_nih_takes_clear_lungs_and_pneumonia_like_findings(tmp_path):
    import experiments

    (tmp_path / "images").mkdir()
    listed = {
        "a.png": "No Finding",
        "b.png": "Infiltration|Mass",
        "c.png": "Hernia",
        "d.png": "Pneumonia",
        "gone.png": "Pneumonia",
    }
    for i, name in enumerate(list(listed)[:4]):
        Image.fromarray(np.full((40, 40), 50 * i, np.uint8)).save(tmp_path / "images" / name)
    csv_path = tmp_path / "sample_labels.csv"
    csv_path.write_text(
        "Image Index,Finding Labels,Patient Age\n" + "".join(f"{k},{v},1\n" for k, v in listed.items())
    )
    config = data.DataConfig(str(tmp_path), 32, cache_dir=str(tmp_path / "cache"))
    nih = experiments.load_nih(tmp_path, config)
    assert nih.files == ["images/a.png", "images/b.png", "images/d.png"] and nih.labels.tolist() == [0, 1, 1]
    assert nih.images[nih.rows][:, 0, 0].tolist() == [0, 50, 150]
    for text, message in (
        ("Image Index\na.png\n", "Finding Labels"),
        ("Image Index,Finding Labels\na.png,No Finding\n", "1 images"),
        (None, "No such file"),
    ):
        csv_path.write_text(text) if text else csv_path.unlink()
        with pytest.raises(common.InputError, match=message):
            experiments.load_nih(tmp_path, config)


def test_border_alone_sees_the_border_and_nothing_else(tiny_npz):
    """Noise images whose class is told by the grey of a corner, or of the middle: separated, or at chance (sd
    0.05)."""
    import experiments

    rng = np.random.default_rng(0)
    labels = np.arange(160) % 2
    for place, low, high in (((slice(0, 4),) * 2, 0.98, 1), ((slice(4, 28),) * 2, 0.3, 0.7)):
        images = rng.integers(0, 60, (160, 32, 32), np.uint8)
        images[(slice(None), *place)] += (labels * 150).astype(np.uint8)[:, None, None]
        train = data.Subset([f"{i}.png" for i in range(160)], labels, images, np.arange(160))
        before = images.copy()
        assert low <= experiments.border_alone(train, tiny_npz, torch.device("cpu")) <= high
        assert (images == before).all()


def test_borrowed_borders_come_from_the_class_asked_for():
    """Flat images, NORMAL dark and PNEUMONIA bright: the border shows whose it is, the middle stays."""
    import experiments

    labels = np.array([0, 0, 1, 1, 1])
    images = np.where(labels, 200, 50).astype(np.uint8)[:, None, None] + np.zeros((5, 64, 64), np.uint8)
    for other in (True, False):
        got = experiments.borrowed(images, labels, other)
        assert got.dtype == np.uint8 and (got[:, 16:48, 16:48] == images[:, 16:48, 16:48]).all()
        assert got[:, 0, 0].tolist() == np.where(labels == other, 50, 200).tolist()


def test_stamped_finds_the_template_whatever_its_contrast():
    import experiments

    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (40, 224, 224)).astype(np.uint8)
    template = rng.integers(0, 2, (8, 13)) * 200.0
    for i in range(0, 40, 3):  # brighter or darker, anywhere in the lower right corner
        y, x = rng.integers(197, 216), rng.integers(182, 211)
        images[i, y : y + 8, x : x + 13] = 20 + template * rng.uniform(0.4, 1.1)
    images[1, 20:28, 20:33] = template  # another corner
    subset = data.Subset([""] * 40, np.zeros(40, np.int64), images, np.arange(40))
    hit = experiments.stamped(subset, torch.from_numpy(template.astype(np.float32)))
    assert np.flatnonzero(hit).tolist() == list(range(0, 40, 3))


@pytest.mark.skipif(not (SHARED / "chest_xray").is_dir(), reason="needs the real set")
def test_one_unit_has_no_healthy_child_in_training(tmp_path):
    """The two images of test NORMAL that show the stamp to the eye are among the hits, and train NORMAL has
    none."""
    done = succeed("experiments", "--stamps", SHARED / "chest_xray", cwd=tmp_path)
    rows = {r.split(" | ")[0][2:]: r for r in done.out.splitlines() if r.startswith("| ")}
    assert rows["train"].split(" | ")[1] == "0 of 1073" and rows["validation"].split(" | ")[1] == "0 of 268"
    assert int(rows["test"].split(" | ")[1].split()[0]) >= 2


def test_experiments_prints_signals_and_keeps_them(bench, tmp_path):
    shutil.copytree(bench, tmp_path / "b")
    done = succeed("experiments", "--run", "outputs/linear", cwd=tmp_path / "b")
    header, _, row = [line for line in done.out.splitlines() if line.startswith("|")]
    values = dict(zip(header.split(" | "), row.split(" | ")))
    kept = read_json(tmp_path / "b/outputs/linear/signals.json")["signals"]
    with np.load(bench / "outputs/linear/scores.npz") as file:
        assert kept["val AUROC"] == pytest.approx(
            sklearn.metrics.roc_auc_score(file["val_labels"], file["val_p1"])
        )
    assert float(values["corrupted spec"]) == pytest.approx(kept["corrupted spec"], abs=6e-4)
    assert kept["choice"] == pytest.approx(
        (kept["borrowed AUROC"] + (kept["corrupted spec"] + kept["corrupted recall"]) / 2) / 2
    )
    assert kept["corrupted spec"] == pytest.approx(
        np.mean([v[1] for v in kept["corruptions"].values()]), abs=1e-4
    )
    refused(
        cli("experiments", "--run", "outputs/linear", "--against-test", cwd=tmp_path / "b"), "needs 4 runs"
    )
