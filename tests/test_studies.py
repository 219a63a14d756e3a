"""Tests of studies/: signals of runs, and the looks at the Kermany set."""

import csv
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import torch
from PIL import Image
from scipy.stats import binom

import data
from common.console import InputError
from common.files import sha256, write_json
from images.drawn import draw_radiograph, make_synthetic
from images.subset import Subset
from records.run import Run
from studies import errors, kermany, lung_masks, signals, unit
from studies.nih import load_nih
from tests.shared import REPO, SHARED, cli, of_one, read_json, refused, succeed

EXPERIMENTS = "studies.experiments"


def test_corruptions_keep_shape_and_change_the_image():
    image = draw_radiograph(np.random.default_rng(0), sick=True, shifted=False, side=96)
    for name, change in signals.corruptions().items():
        out = change(image)
        assert out.shape == image.shape and out.dtype == np.uint8, name
        assert 1 < np.abs(out.astype(int) - image).mean() < 80, name


def test_sharpness_is_taken_over_and_large_shapes_are_kept():
    rng = np.random.default_rng(0)
    image, donor = (draw_radiograph(rng, sick=sick, shifted=sick, side=64) for sick in (False, True))
    made = unit.sharpened_like(image, donor)

    def amplitude(x):
        return np.abs(np.fft.fftshift(np.fft.fft2(x)))

    (of_made, ring), (of_donor, _), (of_image, _) = (
        unit.radial_mean(amplitude(x)) for x in (made, donor, image)
    )
    whole = slice(3, 32)  # rings that lie in the image with both their halves
    assert ring[32, 32] == 0 and ring[32, 40] == ring[24, 32] == 8
    assert np.allclose(of_made[whole], of_donor[whole], rtol=1e-2)
    assert not np.allclose(of_image[whole], of_donor[whole], rtol=0.2)
    assert np.allclose(amplitude(made)[ring < 3], amplitude(image)[ring < 3])
    assert np.allclose(unit.sharpened_like(image, image), image)


def test_false_alarms_of_a_block_are_told_apart(tmp_path):
    data_dir = tmp_path / "set"
    make_synthetic(data_dir, train=48, test=12, seed=1)
    files = sorted((data_dir / "test/NORMAL").iterdir())
    for number, path in zip((194, 195, 256, 257), files):
        path.rename(path.with_name(f"NORMAL2-IM-0{number}-0001.jpeg"))
    flags = ("--data-dir", data_dir, "--img-size", 32, "--cache-dir", tmp_path / "cache")
    succeed("train_linear", *flags, cwd=tmp_path)
    succeed("calibrate", "--bootstrap", 100, "--min-recall", 0.8, cwd=tmp_path)
    rows = succeed("studies.unit", "--transplant", cwd=tmp_path).out.splitlines()
    scores = Run(tmp_path / "outputs/linear").scores()
    healthy = scores["test_files"][scores["test_labels"] == 0]
    assert unit.in_block(healthy).sum() == 2
    cells = rows[2].split(" | ")
    assert cells[1].endswith(" of 2") and cells[2].endswith(f" of {len(healthy) - 2}")
    table = [row.strip("| ").split(" | ") for row in rows if row.startswith("| the block")]
    assert float(table[0][2]) == int(cells[1].split()[0]) / 2  # unchanged, they are called as calibrated
    assert len([row for row in rows if row.startswith("| healthy validation")]) == 3
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "outputs/linear", other)
    names = dict(np.load(other / "scores.npz"))
    names["test_files"] = np.array([f"test/{k}.jpeg" for k in range(len(names["test_files"]))])
    Run(other).save_calibration(read_json(other / "calibration.json"), names)
    refused(cli("studies.unit", "--run", other, cwd=tmp_path), "official test images")


def test_errors_of_several_runs_are_counted_and_drawn(tmp_path):
    rng = np.random.default_rng(0)
    wrong, kinds = rng.random((3, 50)) < 0.4, np.repeat(["a", "b"], 25)
    for row, part in zip(errors.tally(wrong, kinds).splitlines()[2:], (wrong[:, :25], wrong[:, 25:])):
        often = [sum(column) for column in part.T]
        counts = [f"{sum(often) / 3:.1f}", often.count(3), often.count(1) + often.count(2)]
        assert row.strip("| ").split(" | ")[1:] == ["25", *map(str, counts)]

    data_dir, out = tmp_path / "set", tmp_path / "outputs"
    make_synthetic(data_dir, train=48, test=12, seed=1)
    for side in (32, 64):
        flags = ("--data-dir", data_dir, "--img-size", side, "--cache-dir", tmp_path / "cache")
        succeed("train_linear", *flags, "--out", out / f"of-{side}", cwd=tmp_path)
    succeed("calibrate", "--bootstrap", 100, "--min-recall", 0.8, "--temperature", cwd=tmp_path)
    refused(cli("studies.errors", "--sheet", "errors.txt", cwd=tmp_path), "name a .png or .jpg")
    refused(cli("studies.errors", "--run", "nowhere", cwd=tmp_path), "nowhere/results.json")
    printed = succeed("studies.errors", "--sheet", "errors.png", cwd=tmp_path).out
    listed = " ".join(line for line in printed.splitlines() if "of all: " in line or "by all: " in line)
    runs = [Run(out / f"of-{side}") for side in (32, 64)]
    scores, wrong = runs[0].scores(), []
    for run in runs:
        sick = run.scores()["test_p1"] >= of_one(run.calibration())["threshold"]  # at the applied temperature
        wrong.append(sick != (scores["test_labels"] == 1))
    for file, always in zip(scores["test_files"], wrong[0] & wrong[1]):
        assert (Path(file).stem in listed) == always
    assert (tmp_path / "errors.png").exists() == (wrong[0] & wrong[1]).any()
    names = dict(np.load(out / "of-64/scores.npz"))
    names["test_files"] = names["test_files"][::-1]
    runs[1].save_calibration(read_json(out / "of-64/calibration.json"), names)
    refused(cli("studies.errors", cwd=tmp_path), "other test images")


def test_load_nih_takes_clear_lungs_and_pneumonia_like_findings(tmp_path):
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
    nih = load_nih(tmp_path, config)
    assert nih.files == ["images/a.png", "images/b.png", "images/d.png"] and nih.targets.tolist() == [0, 1, 1]
    assert nih.images[nih.rows][:, 0, 0].tolist() == [0, 50, 150]
    for text, message in (
        ("Image Index\na.png\n", "Finding Labels"),
        ("Image Index,Finding Labels\na.png,No Finding\n", "holds 1 without a finding and 0 with"),
        (None, "No such file"),
    ):
        csv_path.write_text(text) if text else csv_path.unlink()
        with pytest.raises(InputError, match=message):
            load_nih(tmp_path, config)


def test_border_alone_sees_the_border_and_nothing_else(tiny_npz):
    """Noise images whose class is told by the grey of a corner, or of the middle: separated, or at chance (sd
    0.05)."""
    rng = np.random.default_rng(0)
    labels = np.arange(160) % 2
    for place, low, high in (((slice(0, 4),) * 2, 0.98, 1), ((slice(4, 28),) * 2, 0.3, 0.7)):
        images = rng.integers(0, 60, (160, 32, 32), np.uint8)
        images[(slice(None), *place)] += (labels * 150).astype(np.uint8)[:, None, None]
        train = Subset([f"{i}.png" for i in range(160)], labels, images, np.arange(160))
        before = images.copy()
        assert low <= kermany.border_alone(train, tiny_npz, torch.device("cpu")) <= high
        assert (images == before).all()


def test_borrowed_borders_come_from_the_class_asked_for():
    """Flat images, NORMAL dark and PNEUMONIA bright: the border shows whose it is, the middle stays."""
    labels = np.array([0, 0, 1, 1, 1])
    images = np.where(labels, 200, 50).astype(np.uint8)[:, None, None] + np.zeros((5, 64, 64), np.uint8)
    for other in (True, False):
        got = signals.borrow_borders(images, labels, other)
        assert got.dtype == np.uint8 and (got[:, 16:48, 16:48] == images[:, 16:48, 16:48]).all()
        assert got[:, 0, 0].tolist() == np.where(labels == other, 50, 200).tolist()


def test_stamped_finds_the_template_whatever_its_contrast():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (40, 224, 224)).astype(np.uint8)
    template = rng.integers(0, 2, (8, 13)) * 200.0
    for i in range(0, 40, 3):  # brighter or darker, anywhere in the lower right corner
        y, x = rng.integers(197, 216), rng.integers(182, 211)
        images[i, y : y + 8, x : x + 13] = 20 + template * rng.uniform(0.4, 1.1)
    images[1, 20:28, 20:33] = template  # another corner
    subset = Subset([""] * 40, np.zeros(40, np.int64), images, np.arange(40))
    hit = kermany.stamped(subset, torch.from_numpy(template.astype(np.float32)))
    assert np.flatnonzero(hit).tolist() == list(range(0, 40, 3))


@pytest.mark.skipif(not (SHARED / "chest_xray").is_dir(), reason="needs the real set")
def test_one_unit_has_no_healthy_child_in_training(tmp_path):
    """The two images of test NORMAL that show the stamp to the eye are among the hits, and train NORMAL has
    none."""
    done = succeed("studies.kermany", "--stamps", SHARED / "chest_xray", cwd=tmp_path)
    rows = {r.split(" | ")[0][2:]: r for r in done.out.splitlines() if r.startswith("| ")}
    assert rows["train"].split(" | ")[1] == "0 of 1073" and rows["validation"].split(" | ")[1] == "0 of 268"
    assert int(rows["test"].split(" | ")[1].split()[0]) >= 2


def folder_of_nih(root, levels):
    """A folder of NIH ChestX-ray14 with two images of each group, of the given grey levels."""
    (root / "images").mkdir(parents=True)
    with open(root / "sample_labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Image Index", "Finding Labels"])
        for i, level in enumerate(levels):
            rows.writerow([f"{i}.png", "Pneumonia|Mass" if i % 2 else "No Finding"])
            Image.fromarray(np.full((40, 40), level, np.uint8)).save(root / "images" / f"{i}.png")
    return root


@pytest.fixture
def own_bench(bench, tmp_path):
    """A copy of `bench` that a test may change."""
    return shutil.copytree(bench, tmp_path / "bench")


def table_row(out):
    """{column: value} of a table of one run."""
    header, _, row = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    return dict(zip(header, row))


def test_signals_are_printed_and_kept(own_bench):
    done = succeed(EXPERIMENTS, "--run", "outputs/linear", cwd=own_bench)
    values, kept = table_row(done.out), read_json(own_bench, "outputs/linear/signals.json")
    figures = kept["validation"]["figures"]
    assert kept.keys() == {"validation"} and "NIH AUROC" not in values
    with np.load(own_bench / "outputs/linear/scores.npz") as file:
        y, p = file["val_labels"], file["val_p1"]
    assert figures["val AUROC"] == pytest.approx(sklearn.metrics.roc_auc_score(y, p))
    assert float(values["corrupted spec"]) == pytest.approx(figures["corrupted spec"], abs=6e-4)
    mean = (figures["corrupted spec"] + figures["corrupted recall"]) / 2
    assert figures["choice"] == pytest.approx((figures["borrowed AUROC"] + mean) / 2)
    for i, name in enumerate(("AUROC", "spec", "recall")):
        rows = [row[i] for row in figures["corruptions"].values()]
        assert figures[f"corrupted {name}"] == pytest.approx(np.mean(rows), abs=1e-4)
    refused(cli(EXPERIMENTS, "--run", "outputs/linear", "--against-test", cwd=own_bench), "needs 4 runs")


def test_signals_of_another_nih_folder_are_its_own(own_bench, tmp_path):
    """The same weights, the same names, other pixels or other labels: AUROC 1 in one folder, 0 in its mirror
    image."""
    good, bad = (folder_of_nih(tmp_path / n, v) for n, v in (("a", [0, 90, 10, 99]), ("b", [90, 0, 99, 10])))
    found = []
    for folder in (good, bad, good):
        done = succeed(EXPERIMENTS, "--run", "outputs/linear", "--nih", folder, cwd=own_bench)
        found.append(float(table_row(done.out)["NIH AUROC"]))
    assert sorted(found[:2]) == [0, 1] and found[2] == found[0]
    listed = good / "sample_labels.csv"
    text = listed.read_text()
    swapped = (
        text.replace("No Finding", "?").replace("Pneumonia|Mass", "No Finding").replace("?", "Infiltration")
    )
    listed.write_text(swapped)
    done = succeed(EXPERIMENTS, "--run", "outputs/linear", "--nih", good, cwd=own_bench)
    assert float(table_row(done.out)["NIH AUROC"]) == 1 - found[0]


def test_panel_by_hand():
    found = {"NIH AUROC": 0.7, "corrupted spec": 0.5, "corrupted recall": 0.9, "borrowed AUROC": 0.89}
    assert signals.panel(found) == {"panel": pytest.approx(0.7), "veto": "yes"}
    better = signals.panel({**found, "borrowed AUROC": 0.9, "NIH AUROC": 0.9})
    assert better == {"panel": pytest.approx(0.8), "veto": "no"}


def test_signals_are_computed_again_only_when_needed(own_bench, tmp_path, monkeypatch):
    """Counted by calls: the same again, other pixels, other corruptions, other weights, a damaged file."""
    calls = []

    def counted(name):
        compute = getattr(signals, name)
        return lambda *args: calls.append(name) or compute(*args)

    for name in ("validation_figures", "nih_figures"):
        monkeypatch.setattr(signals, name, counted(name))
    run, nih = own_bench / "outputs/linear", folder_of_nih(tmp_path / "nih", [0, 90, 10, 99])

    def computed(*more):
        calls.clear()
        succeed(EXPERIMENTS, "--run", "outputs/linear", *more, cwd=own_bench)
        return list(calls)

    both = ["validation_figures", "nih_figures"]
    assert computed("--nih", nih) == both and computed("--nih", nih) == computed() == []
    Image.fromarray(np.full((40, 40), 50, np.uint8)).save(nih / "images" / "0.png")
    assert computed("--nih", nih) == ["nih_figures"]
    monkeypatch.setattr(signals, "VERSION", signals.VERSION + 1)
    assert computed("--nih", nih) == both
    weights = torch.load(run / "checkpoint.pth", weights_only=True)
    torch.save({name: value / 2 for name, value in weights.items()}, run / "checkpoint.pth")
    assert computed("--nih", nih) == both
    kept = (run / "signals.json").read_text()
    for damaged in (
        kept[:-9],
        "[1]",
        kept.replace("0.", '"0.', 1).replace(",", '",', 1),
        '{"validation": 3}',
    ):
        (run / "signals.json").write_text(damaged)
        assert "validation_figures" in computed()
        assert read_json(run, "signals.json")["validation"] == json.loads(kept)["validation"]


def test_signals_of_files_of_older_versions_are_computed_again(own_bench):
    """They name the checkpoint alone."""
    run = own_bench / "outputs/linear"
    old = {"checkpoint": sha256(run / "checkpoint.pth"), "signals": {"val AUROC": 0.123}}
    write_json(run / "signals.json", old)
    done = succeed(EXPERIMENTS, "--run", "outputs/linear", cwd=own_bench)
    assert table_row(done.out)["val AUROC"] != "0.123"
    assert read_json(run, "signals.json").keys() == {"validation"}


def test_signals_against_test_by_hand(own_bench):
    """Four runs: the rank correlation of four figures, by the formula with squared rank differences."""
    outputs = own_bench / "outputs"
    shutil.copytree(outputs / "linear", outputs / "linear2")
    rng, auroc, corrupted = np.random.default_rng(0), [], []
    for run in sorted(outputs.iterdir()):
        weights = torch.load(run / "checkpoint.pth", weights_only=True)
        for value in weights.values():
            value += torch.from_numpy(rng.normal(0, 0.02, value.shape)).to(value.dtype)
        torch.save(weights, run / "checkpoint.pth")
        calibration = read_json(run, "calibration.json")
        auroc.append(round(float(rng.uniform(0.5, 1)), 4))
        of_one(calibration)["test"]["at_rec"]["auroc"] = auroc[-1]
        calibration["checkpoint"] = sha256(run / "checkpoint.pth")
        write_json(run / "calibration.json", calibration)
    done = succeed(EXPERIMENTS, "--against-test", cwd=own_bench)
    for run in sorted(outputs.iterdir()):
        corrupted.append(read_json(run, "signals.json")["validation"]["figures"]["corrupted AUROC"])
    assert len(set(corrupted)) == len(set(auroc)) == 4
    d = np.argsort(np.argsort(corrupted)) - np.argsort(np.argsort(auroc))
    rho = 1 - 6 * (d**2).sum() / (4 * 15)
    assert f"| corrupted AUROC | {rho:+.2f} |" in done.out


def test_studies_run_as_scripts_from_anywhere(tmp_path):
    """One that needs no torch, as a process; each has the line by which it finds the project."""
    argv = [sys.executable, REPO / "studies" / "pictures.py", "--no-such-flag"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "error: unrecognized arguments: --no-such-flag" in done.stderr
    line = "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"
    scripts = [p for p in (REPO / "studies").glob("*.py") if '__name__ == "__main__"' in p.read_text()]
    without = {p.name for p in scripts if f"\n{line}" not in p.read_text()}
    assert without <= {"paint.py"} and len(scripts) > 20  # these need no such line
    done = cli("studies.experiments", "--runs-dir", "nowhere", cwd=tmp_path)
    refused(done, "no finished runs under nowhere")
    refused(cli("studies.kermany", cwd=tmp_path), "--stamps --border is required")


def test_overlap_of_masks_and_their_shapes():
    rng = np.random.default_rng(0)
    found, truth = rng.random((2, 5, 12, 12)) > 0.5
    dice, iou = lung_masks.overlaps(found, truth)
    for a, b, d, i in zip(found, truth, dice, iou):
        pairs = list(zip(a.ravel(), b.ravel()))
        both, either = sum(x and y for x, y in pairs), sum(x or y for x, y in pairs)
        assert i == pytest.approx(both / either) and d == pytest.approx(2 * i / (1 + i))
    ring = np.zeros((1, 40, 40), bool)
    ring[0, 5:30, 5:30] = True
    ring[0, 10:20, 10:30] = False
    hull = lung_masks.convex(ring)
    assert hull[0, 5:30, 5:30].all() and not hull[0, :4].any()
    grown = lung_masks.dilated(ring)
    assert (grown & ring == ring).all() and grown[0, 3, 15] and not grown[0, 2, 15]
    assert [kermany.group(f) for f in ("a/person1_virus_2.jpeg", "b/IM-1.jpeg", "NORMAL2-IM-3.jpeg")] == [
        "virus",
        "NORMAL, IM-",
        "NORMAL, NORMAL2-",
    ]


# ---------------------------------------------------------------- another hospital


def table_rows(text):
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"][
        2:
    ]


def test_typicality_study_on_the_drawn_set(own_bench, monkeypatch):
    from studies import typicality

    monkeypatch.setattr(typicality, "SIZES", (20,))
    argv = ("studies.typicality", "--run", "outputs/linear", "--draws", 5, "--corrupted", 20)
    rows = table_rows(succeed(*argv, cwd=own_bench).out)
    assert [r[0] for r in rows[:3]] == ["validation", "validation, 10% sick", "official test"]
    assert len(rows) == 3 + len(signals.corruptions())
    assert all(0 <= float(r[1].rstrip("%")) <= 100 for r in rows)
    assert (
        float(rows[0][2].split()[0]) <= 0.4 < float(rows[2][2].split()[0])
    )  # its test set is another machine's


def test_distances_see_a_source_that_lies_elsewhere(capsys):
    from studies import typicality

    rng = np.random.default_rng(0)
    files = [f"train/NORMAL/IM-{i:04d}-0001.jpeg" for i in range(80)]
    files += [f"train/NORMAL/NORMAL2-IM-{i:04d}-0001.jpeg" for i in range(80)]
    files += [f"train/PNEUMONIA/person{i}_virus_1.jpeg" for i in range(80)]
    features = rng.normal(size=(240, 5))
    features[80:160] += 6  # NORMAL2 lies far from the others
    typicality.compare_distances(features, np.repeat([0, 0, 1], 80), files)
    rows = table_rows(capsys.readouterr().out)
    assert len(rows) == len(typicality.DISTANCES)
    for row in rows:
        cells = [[float(x.strip("[],")) for x in cell.split()] for cell in row[1:4]]
        assert all(low <= auroc <= high for auroc, low, high in cells)
        assert cells[1][1] > 0.99 and abs(cells[2][0] - 0.5) < 0.2  # elsewhere; like the others
        assert float(row[4]) == pytest.approx(np.mean([c[0] for c in cells]), abs=1e-3)


def test_sites_study_by_hand(own_bench, monkeypatch):
    from studies import sites

    monkeypatch.setattr(sites, "SIZES", (25,))
    argv = ("studies.sites", "--run", "outputs/linear", "--draws", 20)
    rows = {r[2]: r for r in table_rows(succeed(*argv, cwd=own_bench).out)}
    assert rows["as shipped"][3] == "1.00" and rows["@Guar"][3] == "0.00" and rows["@Guar"][4] == "-"
    assert float(rows["@Rec"][4].split()[0]) > 0.1


def test_a_row_of_the_sites_study():
    from studies import sites

    values = [(recall, 0.5) for recall in np.linspace(0.9, 1, 41)]  # 20 of 41 lie below 0.95
    below, recall, specificity = sites.row(values, 0.95 - 1e-9)
    assert below == "0.488 [0.34, 0.64]"  # by a calculator, Wilson's formula
    assert recall == "0.950 [0.90, 1.00]" and specificity == "0.500 [0.50, 0.50]"
    assert sites.row([], 0.95) == ["-"] * 3


def test_draws_of_a_site_use_the_other_images():
    from calibration.operating_point import Rule
    from studies import sites

    rng = np.random.default_rng(0)
    y, patients = np.repeat([0, 1], 60), np.arange(120).astype(str)
    p = np.clip(0.5 + 0.4 * (y - 0.5) + rng.normal(0, 0.2, 120), 0, 1)
    found = sites.draws(y, p, patients, 0.5, Rule(), 40, 30)
    recall, specificity = np.mean(found["shipped"], axis=0)
    assert recall == pytest.approx((p[y == 1] >= 0.5).mean(), abs=0.03)
    assert specificity == pytest.approx((p[y == 0] < 0.5).mean(), abs=0.03)
    assert found["guaranteed"] == [] and len(found["threshold"]) == 30


def test_borrowed_thresholds_lie_at_or_below_the_guaranteed_one():
    """The greatest of the list that does, so a list fixed beforehand saves no local patient."""
    from calibration.operating_point import Rule
    from metrics import choose_threshold_with_guarantee
    from studies import sites

    for seed in range(30):
        rng = np.random.default_rng(seed)
        y, p, patients = np.repeat([0, 1], 100), rng.random(200), np.arange(200).astype(str)
        candidates = np.sort(rng.random(20) ** 3)
        guaranteed = choose_threshold_with_guarantee(y, p, groups=patients)[0]
        found = sites.borrowed(candidates, p[y == 1], patients[y == 1], Rule())
        below = candidates[candidates <= guaranteed]
        assert found == (below[-1] if len(below) else None)
    assert sites.borrowed(candidates, p[150:], patients[150:], Rule()) is None  # 50 patients cannot promise


def test_promises_are_kept_in_simulation(monkeypatch, capsys):
    from studies import promises

    monkeypatch.setattr("calibration.shares.DRAWS", 99)
    for name, few in (("BATCHES", (20,)), ("LOCAL", (40, 100)), ("RECALLS", (0.95, 0.8)), ("SICK", 400)):
        monkeypatch.setattr(promises, name, few)
    promises.notice(20)
    promises.promise(200)
    promises.watch(100)
    rows = [r for r in table_rows(capsys.readouterr().out) if r[0][:1].isdigit()]
    (n, alarms), *local = rows[:7]
    assert n == "20" and float(alarms.split()[0]) <= binom.ppf(0.9999, 20, 0.05) / 20
    found = {(r[0], r[1]): r[2:] for r in local}
    assert float(found["100", "@Guar"][0].split()[0]) <= binom.ppf(0.9999, 200, 0.05) / 200
    assert found["40", "@Guar"] == ["-", "-"] and float(found["100", "@Mean"][1]) > 0.94
    assert 0.3 < float(found["100", "@Rec"][0].split()[0]) < 0.7
    floor, low = rows[7:]
    assert float(floor[1].split()[0]) <= binom.ppf(0.9999, 100, 0.05) / 100
    assert low[1].startswith("1.000") and 10 < float(low[2]) < 40


def test_adapt_study_on_drawn_hospitals(synthetic, cache, tmp_path):
    """Tables for --also, whole patients on one side, then a row for a run."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for place in ("nih/images", "rsna/images"):
        (tmp_path / place).mkdir(parents=True)
        for i in range(48):
            pixels = rng.integers(60 + 40 * (i % 3 == 0), 200, (40, 40)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / place / f"{i:02d}.png")
    lines = ["Image Index,Finding Labels,Patient ID"]
    lines += [f"{i:02d}.png,{'Pneumonia' if i % 3 == 0 else 'No Finding'},{i // 2}" for i in range(48)]
    (tmp_path / "nih/sample_labels.csv").write_text("\n".join(lines))
    groups = ("lung_opacity", "normal", "abnormal_no_opacity")
    lines = [f"images/{i:02d}.png,{i},{groups[i % 3]},{int(i % 3 == 0)}" for i in range(48)]
    (tmp_path / "rsna/labels.csv").write_text("\n".join(["path,patient,group,pneumonia", *lines]))
    there = ("--nih", tmp_path / "nih", "--rsna", tmp_path / "rsna", "--tables", tmp_path / "tables")
    done = succeed("studies.adapt", *there, cwd=tmp_path)
    assert "nih_learn.csv: " in done.out and "8 with pneumonia" in done.out
    sides = [(tmp_path / f"tables/nih_{s}.csv").read_text().splitlines()[1:] for s in ("learn", "held")]
    ours, theirs = ({line.split(",")[1] for line in side} for side in sides)
    assert len(sides[0]) + len(sides[1]) == 48 and not ours & theirs
    argv = ("--data-dir", synthetic, "--cache-dir", cache, "--img-size", 32, "--out", "run")
    also = [f"{tmp_path}/{name}:{tmp_path}/tables/{name}_learn.csv" for name in ("nih", "rsna")]
    succeed("train_linear", *argv, "--input", "crop", "--also", *also, cwd=tmp_path)
    succeed("calibrate", "--run", tmp_path / "run", "--bootstrap", 200, cwd=tmp_path)
    rows = table_rows(succeed("studies.adapt", *there, "--run", tmp_path / "run", cwd=tmp_path).out)
    assert len(rows) == 1 and len(rows[0]) == 9 and all(0 <= float(c.split()[0]) <= 1 for c in rows[0][1:])


def test_speed_of_the_arms_is_printed(tmp_path):
    argv = (
        "studies.arms",
        "--arms",
        "regnety_004",
        "two-lung hybrid on Ti/16",
        "--batch-size",
        2,
        "--repeats",
        1,
    )
    rows = table_rows(succeed(*argv, cwd=tmp_path).out)
    assert [r[0] for r in rows] == ["regnety_004", "two-lung hybrid on Ti/16"]
    for row in rows:
        assert all(float(row[i]) > 0 for i in (1, 2, 4, 5))
        assert float(row[3].split()[0]) == pytest.approx(float(row[1]) / float(row[2]), rel=0.2)


def test_the_story_of_another_hospital(own_bench, tmp_path, monkeypatch):
    """The commands of docs/ANOTHER_HOSPITAL.md, one after the other, on a drawn hospital."""
    from studies import story

    def run(argv, **how):  # in this process, which is faster
        done = cli(Path(argv[1]).stem, *argv[2:], cwd=own_bench)
        return SimpleNamespace(returncode=done.code, stdout=done.out, stderr=done.err)

    monkeypatch.setattr(story.subprocess, "run", run)
    (tmp_path / "nih/images").mkdir(parents=True)
    lines = ["Image Index,Finding Labels,Patient ID"]
    for i, path in enumerate(sorted((own_bench / "xray/test").rglob("*.jpeg"))):
        shutil.copy(path, tmp_path / f"nih/images/{i:02d}.jpeg")
        lines.append(f"{i:02d}.jpeg,{'Pneumonia' if 'PNEUMONIA' in str(path) else 'No Finding'},{i}")
    (tmp_path / "nih/sample_labels.csv").write_text("\n".join(lines))
    argv = ("studies.story", "--run", "outputs/linear", "--nih", tmp_path / "nih", "--out", tmp_path / "told")
    done = succeed(*argv, "--tried", 45, "--labelled", 40, "--less", 0.8, cwd=own_bench)
    assert done.out.count("exit code") == 6 and "patients" in done.out.split("$ python")[1]
    assert "no @Guar: needs 59 patients" in done.out and "@Guar" in done.out.split("--min-recall")[-1]
    log = list(csv.DictReader(open(tmp_path / "told/LOG.csv")))
    assert len(log) == 15 and {r["diagnosis"] for r in log} == {"0", "1"}
    refused(cli(*argv, cwd=own_bench), "told is there already")


def test_every_row_of_the_matrix_is_a_command_its_script_takes(monkeypatch, capsys, tmp_path):
    """Flags are parsed by the scripts' own parsers; nothing is trained."""
    from studies import matrix
    from training import plan

    class Parsed(Exception):
        pass

    def stop(device):
        raise Parsed

    monkeypatch.setattr(plan, "join_processes", stop)  # what comes after parsing
    argv = ["matrix.py", *matrix.PARTS, "--nih", "N"]
    monkeypatch.setattr(sys, "argv", argv)
    args = matrix.parse()
    rows = [row for part in args.parts for row in matrix.PARTS[part]()]
    assert all(r.scored for r in matrix.lungs() + matrix.arms() + matrix.five())
    # Candidates are chosen among without the test set.
    assert not any(r.scored for r in matrix.accuracy() + matrix.scratch() + matrix.pretrained())
    folders = {}
    for row in rows:
        for folder, (train, *others) in matrix.commands(row, args):
            assert folders.setdefault(folder, train) == train  # a folder, one recipe
            assert len(others) == 1 + row.scored - (row.script == "pretrain_mae")
            assert any("calibrate.py" in step for step in others) == row.scored
            monkeypatch.setattr(sys, "argv", train)
            with pytest.raises(Parsed):
                importlib.import_module(row.script).main()
    assert len(folders) > 60


def test_matrix_trains_what_is_not_there_and_skips_what_is(own_bench, tiny_npz, monkeypatch):
    from studies import matrix

    calls = []

    def run(argv, **how):  # in this process, which is faster
        calls.append(Path(argv[1]).stem)
        script = argv[1].relative_to(matrix.SCRIPTS).with_suffix("").as_posix().replace("/", ".")
        done = cli(script, *argv[2:], cwd=own_bench)
        return SimpleNamespace(returncode=done.code)

    monkeypatch.setattr(matrix.subprocess, "run", run)
    monkeypatch.setattr(matrix, "TI", tiny_npz.name)
    argv = ("studies.matrix", "lungs", "--data-dir", "xray", "--weights-dir", tiny_npz.parent, "--out", "m")
    argv += ("--only", "ti16-probe-full")
    more = ("--", "--img-size", 32, "--freeze-epochs", 1)
    rows = table_rows(succeed(*argv, *more, cwd=own_bench).out)
    assert [r[0] for r in rows] == ["ti16-probe-full"] and calls == ["train_pretrained", "calibrate"]
    assert 0 <= float(rows[0][2].split()[0]) <= 1
    again = table_rows(succeed(*argv, *more, cwd=own_bench).out)
    assert again == rows and len(calls) == 2
    done = succeed(*argv[:-1], "ti16-probe-(crop|full)", "--", "--img-size", 7, cwd=own_bench)
    assert "exit code 2" in done.err and len(table_rows(done.out)) == 1 and calls[2:] == ["train_pretrained"]


def test_matrix_goes_on_with_a_run_stopped_in_its_masked_epochs(tmp_path, monkeypatch):
    from studies import matrix

    calls = []

    def run(argv, **how):
        calls.append(argv)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(matrix.subprocess, "run", run)
    for name in ("stopped/masked", "new"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "stopped" / "masked" / "results.json").write_text("{}")
    for name in ("stopped", "new"):
        matrix.carry_out(tmp_path / name, [["train_scratch.py"]])
    assert ["--resume" in argv for argv in calls] == [True, False]


def test_matrix_without_rows_is_refused(tmp_path):
    argv = ("studies.matrix", "accuracy", "--dry-run")
    refused(cli(*argv, "--only", "(", cwd=tmp_path), "--only (", "no regular expression")
    for flags in (("--only", "nosuchrow"), ("--seeds", 7), ("--only", "mae-nih")):
        refused(cli(*argv, *flags, cwd=tmp_path), "no row of accuracy is left")


@pytest.mark.parametrize(
    "flags, seeds", [((), "012"), (("--seeds", "0"), "0"), (("--seeds", "2", "1"), "12")]
)
def test_matrix_takes_some_of_a_rows_seeds(flags, seeds, tmp_path):
    argv = ("studies.matrix", "arms", "--dry-run", "--only", "^stem", *flags)
    commands = succeed(*argv, cwd=tmp_path).out.splitlines()
    trained = [c for c in commands if "train_pretrained" in c]
    assert [c.rsplit("-seed", 1)[1] for c in trained] == list(seeds)
