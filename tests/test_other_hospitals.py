"""Tests of sources: images of other hospitals in training, from names to finished runs."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
from common.console import InputError
from common.task import Task
from data import load, load_train_val
from images import twins
from images.drawn import make_synthetic
from images.split import epoch_order, groups, image_weights
from layouts.folders import list_images
from lungs.show import already_cut
from models.batches import Batches
from models.inputs import Inputs
from records.run import Run
from tests.shared import (
    CPU,
    SHARED,
    cli,
    randomise,
    read_json,
    refused,
    save_dicom,
    small_vit,
    smooth_picture,
    succeed,
    touch,
    toy_subset,
    two_class_gradient,
)
from training import other_hospitals, recipe
from training.evaluate import fit_head, predict
from training.loss import Supervised

INPUTS = Inputs((0.5,), (0.5,), CPU)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Another hospital: 36 + 60 drawn images of its own in elsewhere/train."""
    root = tmp_path_factory.mktemp("also") / "elsewhere"
    make_synthetic(root, train=96, test=8, seed=5)
    return root


def config_of(root, **changes):
    return data.DataConfig(data_dir=str(root), img_size=32, cache_dir=str(root.parent / "cache"), **changes)


# ---------------------------------------------------------------- names and tables


def write(path, *lines):
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def pictures(tmp_path):
    touch(tmp_path / "there", *(f"{name}.png" for name in "abcdef"))
    return tmp_path / "there"


def test_a_table_in_the_words_of_the_classes(pictures, capsys):
    """Of what a row says: one disease, none, or something that the classes do not tell."""
    rows = ("a.png,1,1", "b.png,2,0", "c.png,3,", "d.png,3,-1", "e.png,4,1", "f.png,5,0")
    table = write(pictures / "t.csv", "path,patient,pneumonia", *rows)
    root, index = other_hospitals.read(f"{pictures}:{table}", data.DataConfig())
    assert (root, index.files) == (pictures, ["a.png", "b.png", "e.png", "f.png"])
    assert index.targets.tolist() == [1, 0, 1, 0] and index.targets.dtype == np.int64
    assert index.patients == ["1", "2", "4", "5"] and "2 of 6 images" in capsys.readouterr().err
    assert (
        other_hospitals.read(f"{pictures}:t.csv", data.DataConfig())[1].files == index.files
    )  # beside the images
    three = data.DataConfig(classes=("Normal", "Flu", "TB"))
    rows = ("a.png,1,0,", "b.png,1,0,0", "c.png,0,0,0", "d.png,1,1,0", "e.png,0,0,1", "f.png,0,1,")
    table = write(pictures / "t.csv", "path,flu,tb,normal", *rows)
    found = other_hospitals.read(f"{pictures}:{table}", three)[1]  # c: neither, d: two
    assert (found.files, found.targets.tolist()) == (["a.png", "b.png", "e.png", "f.png"], [1, 1, 0, 2])
    rows = ("a.png,1,0,0", "b.png,0,0,", "c.png,0,0,-1", "d.png,0,,", "e.png,0,0,1", "f.png,0,1,")
    write(pictures / "t.csv", "path,flu,tb,normal", *rows)  # b: nothing is against health
    found = other_hospitals.read(f"{pictures}:{table}", three)[1]
    assert (found.files, found.targets.tolist()) == (["a.png", "b.png", "e.png", "f.png"], [1, 0, 0, 2])
    # --blank is for these tables, where the first hospital has none: d has no tuberculosis, but nor health.
    negative = replace(three, blank="negative")
    found = other_hospitals.read(f"{pictures}:{table}", negative)[1]
    assert (found.files, found.targets.tolist()) == (["a.png", "e.png", "f.png"], [1, 0, 2])
    rows = ("a.png,1,0,0", "b.png,0,0,", "c.png,0,0,-1", "d.png,0,,", "e.png,0,0,1", "f.png,0,1,")
    write(pictures / "t.csv", "path,flu,tb", *(row.rpartition(",")[0] for row in rows))
    assert other_hospitals.read(f"{pictures}:{table}", negative)[1].targets.tolist() == [1, 0, 0, 0, 0, 2]
    rows = ("a.png,1,0,0", "b.png,1,0,0", "c.png,0,0,0", "d.png,1,1,0", "e.png,0,0,1", "f.png,0,1,")
    write(pictures / "t.csv", "path,flu,tb,normal", *rows, "a.png,1,0,1")
    with pytest.raises(InputError, match="row 8: normal is 1 and flu is 1"):
        other_hospitals.read(f"{pictures}:{table}", three)
    write(pictures / "t.tsv", "path;flu;tb", "a.png;1;0", "b.png;0;1", "e.png;0;0")
    assert other_hospitals.read(f"{pictures}:t.tsv", three)[1].targets.tolist() == [1, 2, 0]


def test_tables_that_do_not_answer(pictures):
    for head, rows, message in (
        ("path,edema", ("a.png,1", "b.png,0"), "needs a column for PNEUMONIA.*it has edema"),
        ("path,PNEUMONIA", ("a.png,1", "b.png,1"), "no image is NORMAL"),
        ("path,PNEUMONIA", ("a.png,0", "b.png,"), "no image is PNEUMONIA"),
        ("path,PNEUMONIA", ("a.png,2", "b.png,"), "row 2: PNEUMONIA is '2'"),
    ):
        table = write(pictures / "t.csv", head, *rows)
        with pytest.raises(InputError, match=message):
            other_hospitals.read(f"{pictures}:{table}", data.DataConfig())
    with pytest.raises(InputError, match="no folder nowhere"):
        other_hospitals.read("nowhere", data.DataConfig())
    with pytest.raises(InputError, match="no such file"):
        other_hospitals.read(f"{pictures}:absent.csv", data.DataConfig())
    with pytest.raises(InputError, match="its table of findings"):
        other_hospitals.read(str(pictures), data.DataConfig(labels="x.csv", classes=("Edema",)))


def test_findings_that_another_table_does_not_ask_are_unknown(pictures, capsys):
    table = write(pictures / "t.csv", "path,patient,mass,Other", "a.png,1,1,0", "b.png,2,0,1")
    config = data.DataConfig(labels="x.csv", classes=("Edema", "Mass"))
    index = other_hospitals.read(f"{pictures}:{table}", config)[1]
    assert index.targets.tolist() == [[-1, 1], [-1, 0]] and "does not ask Edema" in capsys.readouterr().err
    with pytest.raises(InputError, match="none of the findings Edema, Hernia"):
        other_hospitals.read(f"{pictures}:{table}", replace(config, classes=("Edema", "Hernia")))


def test_folders(elsewhere):
    with_train, plain = (
        other_hospitals.read(str(p), config_of(elsewhere)) for p in (elsewhere, elsewhere / "train")
    )
    assert len(with_train[1].files) == 96 and sorted(with_train[1].files) == sorted(plain[1].files)
    assert with_train[0] == elsewhere and plain[0] == elsewhere.resolve()
    with pytest.raises(InputError, match="does not exist"):
        other_hospitals.read(str(elsewhere.parent), config_of(elsewhere))


@pytest.fixture
def mixed_clinic(tmp_path):
    """Class folders of six files: two JPEG, two DICOM, one in a folder, a DICOM without extension."""
    for k, name in enumerate(("NORMAL", "PNEUMONIA")):
        folder = tmp_path / "clinic" / name
        (folder / "more").mkdir(parents=True)
        for i in range(2):
            Image.fromarray(smooth_picture(40, 40, 10 * k + i)).save(folder / f"{i}.jpeg")
            save_dicom(folder / f"{i}.dcm", smooth_picture(40, 40, 10 * k + 2 + i))
        Image.fromarray(smooth_picture(40, 40, 10 * k + 4)).save(folder / "more/a.webp", lossless=True)
        save_dicom(folder / "IM_0001", smooth_picture(40, 40, 10 * k + 5))
        (folder / "notes.txt").write_text("nothing")
    return tmp_path / "clinic"


def test_every_reading_of_a_folder_finds_every_kind_of_file(mixed_clinic, capsys):
    """--also, --also-unlabelled and --site: all twelve, with the pixels of their pictures."""
    config = config_of(mixed_clinic)
    root, labelled = other_hospitals.read(str(mixed_clinic), config)
    site = other_hospitals.load_site(config, str(mixed_clinic))
    folder, unlabelled = other_hospitals.read_unlabelled(str(mixed_clinic), config)
    assert len(labelled.files) == len(unlabelled.files) == len(site) == 12
    assert labelled.targets.tolist() == site.targets.tolist() == [0] * 6 + [1] * 6
    said = "passed over: 2 .txt; recognised by content, not by name: 2 without extension"
    notes = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert notes == [f"note: {mixed_clinic}: {said}"]  # once, though three readings say so
    loaded = load(config, folder, unlabelled, "also")[0]
    wanted = {"more/a.webp": 4, "IM_0001": 5, "0.dcm": 2, "1.dcm": 3}
    for file, image in zip(loaded.files, loaded.pixels()):
        name, k = file.split("/", 1)[1], int(file.startswith("PNEUMONIA"))
        if name in wanted:
            picture = Image.fromarray(smooth_picture(40, 40, 10 * k + wanted[name]))
            expected = picture.resize((32, 32), Image.Resampling.BILINEAR)
            assert np.array_equal(image, expected), file


def test_a_folder_without_images_says_what_is_there(tmp_path):
    touch(tmp_path / "empty", "a.heic", "b.csv")
    with pytest.raises(InputError, match="--also-unlabelled .*WebP and DICOM.*there is: 1 .csv, 1 .heic"):
        other_hospitals.read_unlabelled(str(tmp_path / "empty"), config_of(tmp_path))


def test_cases_of_dicom_and_of_dropped_formats():
    folder = SHARED / "cases"
    if not folder.exists():
        pytest.skip("../shared is absent")
    for root, part, counts in (
        ("dicom_in_training_and_site/train_mixed", "train", [16, 16]),
        ("dicom_in_training_and_site", "site", [16, 16]),
        ("dropped_formats_and_subfolders", "train", [24, 24]),
    ):
        index = list_images(folder / root, part)
        assert np.bincount(index.targets).tolist() == counts


def test_names_of_sources(tmp_path):
    for name in ("a/x", "b/x", "c/y"):
        (tmp_path / name).mkdir(parents=True)
    here = [str(tmp_path / name) for name in ("a/x", "b/x", "c/y")]
    found = other_hospitals.names(here)
    assert found[2] == "y" and len(set(found)) == 3 and found[0].endswith("a/x")
    with pytest.raises(InputError, match="twice"):
        other_hospitals.names(here + [here[0] + "/../x"])


# ---------------------------------------------------------------- one set out of several


def test_joined_arrays_are_read_like_one():
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 256, (n, 3, 4)).astype(np.uint8) for n in (5, 1, 7)]
    joined, whole = other_hospitals.Joined(parts), np.concatenate(parts)
    assert len(joined) == 13 and all(np.array_equal(joined[i], whole[i]) for i in range(13))
    for rows in (rng.permutation(13), [12, 0, 12], np.array([], dtype=np.int64)):
        found = joined[rows]
        assert np.array_equal(found, whole[np.asarray(rows, dtype=int)]) and found.dtype == np.uint8


def test_concatenated_subsets():
    subsets = [toy_subset(n, n) for n in (10, 6, 4)]
    for number, subset in enumerate(subsets):
        subset.sources = np.full(len(subset), number)
        subset.levels = np.full((len(subset), 2), number / 4)
    taken = [subsets[0].take([7, 1, 3]), subsets[1], subsets[2].take([2])]
    joined = other_hospitals.concatenated(taken)
    assert np.array_equal(joined.pixels(), np.concatenate([s.pixels() for s in taken]))
    assert joined.targets.tolist() == [1, 1, 1, *[0, 1] * 3, 0] and joined.files[:2] == ["7.png", "1.png"]
    assert joined.sources.tolist() == [0] * 3 + [1] * 6 + [2]
    assert (joined.levels[:, 1] * 4 == joined.sources).all()
    some = joined.take([8, 0, 9])
    assert np.array_equal(some.pixels(), joined.pixels()[[8, 0, 9]]) and some.sources.tolist() == [1, 0, 2]
    got = Batches(joined, INPUTS).get(torch.tensor([9, 4]))
    assert np.array_equal((got.x[:, 0] * 255).round().numpy(), joined.pixels([9, 4]))


def test_same_files(tmp_path):
    for name, text in (("a/1", "same"), ("a/2", "sane"), ("a/3", "longer"), ("b/9", "same"), ("b/8", "x")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert twins.same_files(tmp_path / "a", ["1", "2", "3"], tmp_path / "b", ["9", "8"]) == ["1"]


# ---------------------------------------------------------------- each class of each source alike

TARGETS, ORIGIN = np.array([0] * 6 + [1] * 14 + [0] * 3 + [1]), np.repeat([0, 2], [20, 4])


def test_groups_and_weights():
    group = groups(TARGETS, ORIGIN)
    assert len(set(group)) == 4 and len({(g, t, s) for g, t, s in zip(group, TARGETS, ORIGIN)}) == 4
    weights = image_weights(TARGETS, ORIGIN, "sources")
    assert np.allclose(np.bincount(group, weights), 24 / 4) and weights.mean() == pytest.approx(1)
    assert (image_weights(TARGETS, ORIGIN, "weights") == 1).all()
    findings = np.zeros((24, 3), np.int8)
    assert np.array_equal(groups(findings, ORIGIN) == groups(findings, ORIGIN)[0], ORIGIN == 0)
    assert np.allclose(np.bincount(ORIGIN, image_weights(findings, ORIGIN, "sources")), [12, 0, 12])


def test_sampler_of_sources():
    orders = np.concatenate([epoch_order(0, e, TARGETS, "sources-sampler", ORIGIN) for e in range(300)])
    counts = np.bincount(groups(TARGETS, ORIGIN)[orders])
    assert len(orders) == 24 * 300 and np.abs(counts / 1800 - 1).max() < 4 * np.sqrt(3 / 7200)


def weighted_mean(model, x, y, group):
    """The mean over groups of the mean loss of each."""
    losses = F.cross_entropy(model(x), y, reduction="none")
    return torch.stack([losses[group == g].mean() for g in np.unique(group)]).mean()


def test_the_loss_is_the_mean_over_groups(tmp_path):
    """Of a batch of all images, against the closed form, value and gradient."""
    subset = toy_subset(24, 0)
    subset.targets, subset.sources = TARGETS, ORIGIN
    model = randomise(small_vit(in_chans=1))
    plain = randomise(small_vit(in_chans=1))
    batches = Batches(subset, INPUTS, "sources")
    found = two_class_gradient(INPUTS, accumulate=3).add(model.eval(), batches, torch.arange(24))
    x = (torch.from_numpy(subset.images)[:, None].float() / 255 - 0.5) / 0.5
    wanted = weighted_mean(plain.eval(), x, torch.from_numpy(TARGETS), groups(TARGETS, ORIGIN))
    wanted.backward()
    assert float(found) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for (name, a), b in zip(model.named_parameters(), plain.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name


def test_the_head_is_trained_with_the_same_weights():
    """One step of the head on all images, against AdamW on the mean over groups."""
    subset = toy_subset(24, 0)
    subset.targets, subset.sources = TARGETS, ORIGIN
    settings = replace(recipe.Recipe(), batch_size=24, balance="sources", weight_decay=0.0)
    model, plain = randomise(small_vit(in_chans=1)), randomise(small_vit(in_chans=1)).eval()
    stage = recipe.Stage("head", 1, 1e-2)
    fit_head(model, subset, stage, objective=Supervised(Task()), recipe=settings, inputs=INPUTS)
    optimizer = torch.optim.AdamW(plain.head.parameters(), lr=1e-2, weight_decay=0.0)
    x = (torch.from_numpy(subset.images)[:, None].float() / 255 - 0.5) / 0.5
    weighted_mean(plain, x, torch.from_numpy(TARGETS), groups(TARGETS, ORIGIN)).backward()
    optimizer.step()
    assert torch.allclose(model.head.weight, plain.head.weight, atol=1e-6)


# ---------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory, synthetic, cache, tiny_npz, elsewhere):
    """A run with images of elsewhere, calibrated."""
    cwd = tmp_path_factory.mktemp("trained")
    flags = ("--data-dir", synthetic, "--cache-dir", cache, "--img-size", 32, "--batch-size", 16)
    argv = (*flags, "--weights", tiny_npz, "--epochs", 2, "--freeze-epochs", 2, "--also", elsewhere)
    done = succeed("train_pretrained", *argv, "--balance", "sources", cwd=cwd)
    succeed("calibrate", "--bootstrap", 100, "--min-recall", 0.9, cwd=cwd)
    return cwd, done, argv


def test_other_hospitals_join_training_alone(trained, runs):
    """Validation and test are those of the run without; held-out patients of the other are told apart."""
    cwd, done, _ = trained
    results, plain = (
        read_json(cwd / "outputs/pretrained/results.json"),
        read_json(runs.out / "pretrained/results.json"),
    )
    also = results["split"].pop("also")["elsewhere"]
    assert {k: v for k, v in results["split"].items()} == plain["split"]
    assert also["train"] + also["val"] == 96 and 12 <= also["val"] <= 26
    assert "also elsewhere: train" in done.out and ", elsewhere AUROC 0." in done.out
    row = results["history"][-1]["others"]["elsewhere"]
    assert 0 <= row["held_out_auroc"] <= 1 and 0 <= row["held_out_accuracy"] <= 1
    a, b = (Run(folder).scores() for folder in (cwd / "outputs/pretrained", runs.out / "pretrained"))
    assert all(np.array_equal(a[k], b[k]) for k in ("val_files", "test_files", "val_labels"))


def test_the_report_says_who_else_was_trained_on(trained):
    done = succeed("compare", cwd=trained[0])
    also = read_json(trained[0] / "outputs/pretrained/results.json")["split"]["also"]["elsewhere"]
    assert "pretrained, also on elsewhere" in done.out
    assert f"| Other hospitals in training | {also['train']} images of elsewhere |" in done.out


def test_the_printed_figure_is_that_of_the_held_out_patients(trained):
    run = Run(trained[0] / "outputs/pretrained")
    train, val, _ = load_train_val(run.config, lambda line: None)
    joined, held_out, about = other_hospitals.join(run.config, train, val, lambda line: None)
    there = held_out["elsewhere"]
    assert (
        len(joined) == len(train) + about["elsewhere"]["train"] and (joined.sources[: len(train)] == 0).all()
    )
    assert not set(there.patients) & set(joined.patients)
    logits = predict(run.model(), there, Inputs.of_run(run.results, CPU)).numpy()
    best = run.results["history"][run.results["best_epoch"] - 1]["others"]["elsewhere"]
    found = Supervised(run.task).watch(there.targets, torch.from_numpy(logits), "held_out")
    assert found == pytest.approx(best, abs=1e-4)


def test_resumed_with_other_sources(trained, elsewhere, tmp_path):
    cwd, _, argv = trained
    shutil.copytree(cwd / "outputs", tmp_path / "outputs")
    again = cli("train_pretrained", *argv, "--balance", "sources", "--resume", cwd=tmp_path)
    assert again.code == 0 and "and stays as it is" in again.err
    without = cli("train_pretrained", *argv[:-2], "--resume", cwd=tmp_path)
    refused(without, "settings differ", "data.also")


def test_a_site_that_was_trained_on_promises_nothing(trained, elsewhere):
    argv = ("calibrate", "--site", elsewhere / "train", "--name", "x")
    refused(cli(*argv, cwd=trained[0]), "are among those", "trained")


def test_images_that_are_known_already_are_refused(flags, synthetic, tiny_npz, tmp_path):
    argv = ("train_pretrained", *flags, "--weights", tiny_npz, "--epochs", 1)
    refused(cli(*argv, "--also", synthetic, cwd=tmp_path), "are validation images", "know the answers")
    refused(cli(*argv, "--also", synthetic / "test", cwd=tmp_path), "are test images", "know the answers")
    refused(cli(*argv, "--also", tmp_path, cwd=tmp_path), "NORMAL does not exist")
    refused(cli(*argv, "--also", "nowhere", cwd=tmp_path), "no folder nowhere")
    refused(cli(*argv, "--balance", "sources", cwd=tmp_path), "--balance sources", "--also DIR")
    assert not (tmp_path / "outputs").exists()


def test_every_script_takes_other_hospitals(flags, elsewhere, synthetic, tmp_path):
    done = succeed("train_linear", *flags[:4], "--img-size", 32, "--also", elsewhere, cwd=tmp_path)
    assert "also elsewhere" in done.out
    row = read_json(tmp_path / "outputs/linear/results.json")["history"][0]
    assert 0 <= row["others"]["elsewhere"]["held_out_auroc"] <= 1
    short = ("--epochs", 1, "--max-steps", 2, "--batch-size", 16)
    done = succeed("pretrain_mae", *flags, *short, "--also-unlabelled", elsewhere, cwd=tmp_path)
    about = read_json(tmp_path / "outputs/mae/results.json")["split"]["also"]["elsewhere"]
    assert about["train"] == 104 and "104 without labels" in done.out
    done = cli("pretrain_mae", *flags, *short, "--also-unlabelled", synthetic, "--overwrite", cwd=tmp_path)
    refused(done, "are validation images")
    refused(cli("train_linear", *flags, "--also-unlabelled", elsewhere, cwd=tmp_path), "--also-unlabelled")


# ---------------------------------------------------------------- images that are lungs alone


def test_lungs_on_black_are_their_own_mask():
    """What is lit is the lungs, but for small markers; the U-Net takes such black for air."""
    y, x = np.mgrid[:64, :64]
    left, right = (((x - c) / 9) ** 2 + ((y - 30) / 18) ** 2 < 1 for c in (18, 46))
    image = np.where(left | right, 120, 0).astype(np.uint8)
    image[58:61, 30:33] = 200  # a marker
    assert np.array_equal(already_cut(image), left | right)
    tapered = np.where((x > 4) & (y < 58) & (2 * x < y), 120, 0)
    for other in (image + 40, tapered, np.zeros_like(image), np.full_like(image, 90)):
        area = (other > 16).mean()
        found = already_cut(other.astype(np.uint8))
        assert (found is None) == (not 0.05 < area < 0.45)
    framed = image.copy()
    framed[:, :3] = framed[:, -3:] = 90  # lit up to the edge: a whole chest
    assert already_cut(framed) is None
    bordered = np.zeros((64, 64), np.uint8)
    bordered[10:50, 12:52] = np.random.default_rng(0).integers(20, 255, (40, 40))  # a whole chest on black
    assert 0.05 < (bordered > 16).mean() < 0.45 and already_cut(bordered) is None
