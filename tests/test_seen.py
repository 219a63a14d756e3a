"""Tests of seen: a run that another starts from, or learns from, must not have seen what is held out here."""

import shutil
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

import data
from common.console import InputError
from common.files import FORMAT, sha256, write_json
from data import load_test, load_train_val
from records.run import Run
from training import other_hospitals, seen


def quiet(line):
    pass


def folder_of(root, counts, seed, patients=2, names="{}-{}"):
    """Class folders A and B of noise images, `patients` images a child, under root/part."""
    rng = np.random.default_rng(seed)
    for part, numbers in counts.items():
        for name, count in zip(("Normal", "Sick"), numbers):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (16, 16), dtype=np.uint8)
                stem = f"person{i // patients}_virus_{i}" if name == "Sick" else f"IM-{i // patients:04d}-{i}"
                Image.fromarray(pixels).save(folder / f"{stem}.png")
    return root


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("home"), {"train": (40, 60), "test": (12, 16)}, 0)


@pytest.fixture
def world(home, tmp_path):
    """(make, check): `make(**settings)` writes the results of a run with these data settings; `check(run,
    **settings)` holds it against a training with these."""

    def config(**settings):
        how = dict(data_dir=str(home), classes=("Normal", "Sick"), cache_dir=str(tmp_path / "cache"))
        return data.DataConfig(**{**how, "img_size": 16, **settings})

    def load(settings):
        chosen = config(**settings)
        train, val, split = load_train_val(chosen, quiet)
        _, held_out, also = other_hospitals.join(chosen, train, val, quiet)
        return chosen, (train, val), split | ({"also": also} if also else {}), held_out

    def make(name="mae", kind="mae", more=(), **settings):
        chosen, _, split, _ = load(settings)
        row = {"train_loss": 1.0, "val_loss": 1.0, "val_auroc": 0.5}
        results = dict(model="m", model_config={"kind": kind}, params=1, minutes=1.0, synthetic=False)
        results |= dict(split=split, data=asdict(chosen), recipe={"amp": False}, history=[row], best_epoch=1)
        results |= dict(mean=[0.5], std=[0.5], finished=True, format=FORMAT, **dict(more))
        run = Run(tmp_path / name)
        write_json(run.folder / "results.json", results)
        run.checkpoint.write_bytes(name.encode())
        return run

    def check(run, flag="--init", **settings):
        chosen, sides, split, held_out = load(settings)
        seen.refuse_known(flag, run, chosen, sides, split, held_out)

    def overlap(theirs, here):
        """How many held-out images here the other run was trained or validated on, counted by name."""
        learnt = {f for side in load(theirs)[1] for f in side.files}
        chosen, (_, val), _, _ = load(here)
        return len(learnt & set(val.files)), len(learnt & set(load_test(chosen).files))

    return make, check, overlap


def test_the_same_split_is_no_objection(world):
    make, check, _ = world
    for settings in ({}, {"split": "pooled", "fractions": (0.5, 0.25, 0.25)}, {"split": "image"}):
        check(make(**settings), **settings)
        check(make(**settings), "--teacher", **settings)


@pytest.mark.parametrize("flag", ["--init", "--teacher"])
@pytest.mark.parametrize(
    "theirs, here, words",
    [
        ({"split_seed": 3}, {}, "--split-seed 3, here 0"),
        (
            {"split": "pooled"},
            {"split": "pooled", "fractions": (0.4, 0.3, 0.3)},
            "as usual, here 0.4 0.3 0.3",
        ),
        ({"split": "pooled"}, {}, "--split pooled, here patient"),
        ({"split": "pooled"}, {"split": "pooled", "undersample": True}, "--balance undersample-once False"),
        ({"val_fraction": 0.4}, {}, "60 + 40 images then, 80 + 20 now"),
    ],
)
def test_another_split_is_refused_with_what_differs(world, flag, theirs, here, words):
    make, check, overlap = world
    assert sum(overlap(theirs, here)) > 10
    with pytest.raises(InputError, match="another split") as error:
        check(make(**theirs), flag, **here)
    assert words in str(error.value) and str(error.value).startswith(flag)


def test_other_patients_are_another_split(world, home, tmp_path):
    make, check, overlap = world
    files = sorted(p.relative_to(home).as_posix() for p in home.glob("*/*/*"))
    rows = [f"{f},c{i // 7}" for i, f in enumerate(files)]
    (tmp_path / "p.csv").write_text("\n".join(["path,patient", *rows]))
    theirs = {"patients": str(tmp_path / "p.csv")}
    assert overlap(theirs, {})[0] > 5
    with pytest.raises(InputError, match="--patients .*p.csv, here none"):
        check(make(**theirs))


def test_a_folder_elsewhere_is_known_by_its_pictures(world, home, tmp_path, capsys):
    """A copy is the same; under the same names, shuffled pictures are not; a folder that is gone is said."""
    make, check, _ = world
    copied = shutil.copytree(home, tmp_path / "copy")
    check(make(data_dir=str(copied)))
    files = sorted(copied.glob("train/*/*"))
    for file, place in zip(files, np.random.default_rng(0).permutation(len(files))):
        shutil.copyfile(sorted(home.glob("train/*/*"))[place], file)
    run = make(data_dir=str(copied), cache_dir=str(tmp_path / "other"))
    with pytest.raises(InputError, match="other pictures than those of the same names"):
        check(run, cache_dir=str(tmp_path / "third"))
    shutil.rmtree(copied)
    capsys.readouterr()
    check(run)
    assert f"{copied}, which is not there any more" in capsys.readouterr().err


def test_other_hospitals_that_were_seen_are_not_held_out(world, home, tmp_path, capsys):
    """Learnt whole, a fifth of a hospital cannot be held out of it; learnt but for that fifth, it can."""
    make, check, _ = world
    clinic = str(folder_of(tmp_path / "clinic", {"train": (20, 20)}, 1))
    whole, part = make("whole", also_unlabelled=(clinic,)), make("part", also=(clinic,))
    check(whole)  # nothing of it is held out here
    check(part)
    check(part, also=(clinic,))
    with pytest.raises(InputError, match="8 of its images, .* are held out of clinic here"):
        check(whole, also=(clinic,))
    pupil = make("pupil", "vit", {"init": about(whole)}.items())
    with pytest.raises(InputError, match="whole, from which it was made, also learnt from"):
        check(pupil, "--teacher", also=(clinic,))
    later = shutil.copytree(home, tmp_path / "later")  # its test part gets a picture that was learnt
    learnt = make("learnt", also_unlabelled=(clinic,), data_dir=str(later))
    check(learnt, data_dir=str(later))
    shutil.copyfile(next((tmp_path / "clinic/train/Sick").iterdir()), later / "test/Normal/new.png")
    with pytest.raises(InputError, match="1 of its images, .* are test images here"):
        check(learnt, data_dir=str(later))
    shutil.rmtree(whole.folder)
    check(pupil, "--teacher", also=(clinic,))
    assert "is not there any more" in capsys.readouterr().err


def about(run):
    return {"run": str(run), "checkpoint": run.checkpoint_sha256, "minutes": 1.0}


def test_a_run_made_from_one_that_saw_them_is_refused(world):
    make, check, _ = world
    make_from = make("encoder", split_seed=5)
    with pytest.raises(InputError, match="encoder, from which it was made, was trained on another split"):
        check(make("taught", "vit", {"init": about(make_from)}.items()), "--teacher")


def test_the_run_whose_checkpoint_is_given_as_weights(home, tmp_path, world, capsys):
    """With the same split, or of quite other images, it may be used; not where it learnt what is held out
    here. A run that began with it has learnt that, too."""
    make, check, overlap = world
    check(make(), "--weights")
    other = folder_of(tmp_path / "other", {"train": (30, 30), "test": (4, 4)}, 7)
    check(make("elsewhere", data_dir=str(other)), "--weights")
    seeds = {"split_seed": 3}
    parent = make("parent", **seeds)
    with pytest.raises(
        InputError, match=f"--weights .*{overlap(seeds, {})[0]} images.*validation images here"
    ):
        check(parent, "--weights")
    swapped = shutil.copytree(other, tmp_path / "swapped")
    shutil.copyfile(next((home / "test/Sick").iterdir()), swapped / "train/Sick/new.png")
    with pytest.raises(InputError, match="learnt from 1 images, .*test images here"):
        check(make("tested", data_dir=str(swapped)), "--weights")
    weights = {"path": str(parent.checkpoint), "sha256": parent.checkpoint_sha256}
    assert seen.run_of_weights(weights).folder == parent.folder
    assert seen.run_of_weights(weights | {"sha256": "0"}) is None and seen.run_of_weights({}) is None
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "results.json").write_text('{"accuracy": 0.9}')
    shutil.copyfile(parent.checkpoint, foreign / "checkpoint.pth")
    assert seen.run_of_weights(weights | {"path": str(foreign / "checkpoint.pth")}) is None
    assert "saw images held out here is not known" in capsys.readouterr().err
    gone = {"path": str(tmp_path / "gone/checkpoint.pth"), "sha256": "0", "scaling": "results.json"}
    check(make("orphan", "vit", {"weights": gone}.items()), "--teacher")
    assert "gone, from which it was made, is not there any more" in capsys.readouterr().err
    child = make("child", "vit", {"weights": weights}.items())
    with pytest.raises(InputError, match="parent, from which it was made, was trained on another split"):
        check(child, "--teacher")


def test_a_table_asked_for_other_findings_is_the_same_split(home, tmp_path, world):
    """Proved by the checksum; labels that have changed since prove nothing."""
    make, check, _ = world
    files = sorted(p.relative_to(home).as_posix() for p in home.glob("train/*/*"))
    rng = np.random.default_rng(0)
    rows = [f"{f},c{i // 3},{a},{b}" for (i, f), a, b in zip(enumerate(files), *rng.integers(0, 2, (2, 100)))]
    table = tmp_path / "t.csv"
    table.write_text("\n".join(["path,patient,Edema,Mass", *rows]))
    settings = dict(labels=str(table))
    run = make(classes=("Edema", "Mass"), **settings)
    check(run, classes=("Mass",), **settings)
    with pytest.raises(InputError, match="--split-seed 0, here 1"):
        check(run, classes=("Mass",), split_seed=1, **settings)
    kept = run.results["split"]["fingerprint"]
    assert kept != sha256([])
    table.write_text(table.read_text().replace(rows[0], rows[0][:-1] + str(1 - int(rows[0][-1]))))
    with pytest.raises(InputError, match="another split"):
        check(run, classes=("Edema",), **settings)
