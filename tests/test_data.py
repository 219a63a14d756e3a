"""Tests of data."""

import itertools
import json
import math
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import data
from common.console import InputError
from data import load_test, load_train_val, statistics
from images import split
from images.split import say_shared, split_train_val
from images.subset import pixel_fingerprint
from layouts.folders import find_root, list_images
from layouts.listing import patient_id
from models.batches import Batches
from models.inputs import Inputs
from tests.shared import CPU, SHARED, touch


@pytest.mark.parametrize(
    "name, patient",
    [
        ("person1000_bacteria_2931.jpeg", "person1000"),
        ("person1000_virus_1681.jpeg", "person1000"),
        ("person10_virus_35.jpeg", "person10"),
        ("IM-0115-0001.jpeg", "IM-0115"),
        ("IM-0011-0001-0002.jpeg", "IM-0011"),
        ("NORMAL2-IM-0587-0001-0002.jpeg", "NORMAL2-IM-0587"),
        ("NORMAL2-IM-0115-0001.jpeg", "NORMAL2-IM-0115"),
        ("train/NORMAL/IM-0115-0001.jpeg", "IM-0115"),
    ],
)
def test_patient_id(name, patient):
    assert patient_id(name) == patient


def test_any_other_name_is_a_patient_of_its_own():
    """Numbered files are common: 1.png of one class folder is not the child of 1.png of the other."""
    names = [
        "train/NORMAL/1.png",
        "train/PNEUMONIA/1.png",
        "train/NORMAL/2.png",
        "train/NORMAL/a_1.png",
        "train/NORMAL/a_2.png",
        "train/NORMAL/person.png",
        "train/NORMAL/IM.png",
    ]
    assert len({patient_id(n) for n in names}) == len(names)
    files = [f"train/{c}/{i}.png" for c in data.CLASSES for i in range(12)]
    labels = np.arange(24) // 12
    _, plain = split_train_val(files, labels, "image")
    _, val = split_train_val(files, labels, "patient")
    assert np.bincount(labels[val]).tolist() == np.bincount(labels[plain]).tolist()


def test_listing(tmp_path):
    """Three extensions in any case; hidden files and the litter of a Mac's zip are passed over."""
    touch(
        tmp_path,
        "train/NORMAL/b.JPEG",
        "train/NORMAL/a.jpg",
        "train/NORMAL/c.PnG",
        "train/NORMAL/.DS_Store",
        "train/NORMAL/._a.jpg",
        "train/NORMAL/.jpeg",
        "train/NORMAL/notes.txt",
        "train/NORMAL/__MACOSX/._a.jpg",
        "train/PNEUMONIA/x.jpeg",
        "__MACOSX/train/NORMAL/._a.jpg",
        "val/NORMAL/official.jpeg",
    )
    files, labels, *_ = list_images(find_root(tmp_path), "train")
    assert files == [
        "train/NORMAL/a.jpg",
        "train/NORMAL/b.JPEG",
        "train/NORMAL/c.PnG",
        "train/PNEUMONIA/x.jpeg",
    ]
    assert labels.tolist() == [0, 0, 0, 1]
    assert list_images(tmp_path, "train", ("PNEUMONIA", "NORMAL"))[1].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("nested", ["", "chest_xray", "chest_xray/chest_xray"])
def test_nested_folder_of_the_kaggle_zip(tmp_path, nested):
    touch(tmp_path, "__MACOSX/chest_xray/._train", f"{nested}/train/NORMAL/a.jpeg".lstrip("/"))
    assert find_root(tmp_path) == tmp_path / nested


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(InputError, match="(?s)--data-dir.*--download.*--demo"):
        find_root(tmp_path)
    touch(tmp_path, "train/NORMAL/a.jpeg")
    with pytest.raises(InputError, match="PNEUMONIA"):
        list_images(tmp_path, "train")
    touch(tmp_path, "train/PNEUMONIA/.DS_Store")
    with pytest.raises(InputError, match="PNEUMONIA holds no"):
        list_images(tmp_path, "train")


def made_up_listing(seed=0):
    """File names and labels like those of the Kermany set: patients of 1 to 30 images, one class each."""
    rng, files, labels = random.Random(seed), [], []
    for patient in range(120):
        for _ in range(rng.choice([1, 1, 1, 2, 3, 5, 30 if patient == 7 else 4])):
            files.append(
                f"train/PNEUMONIA/person{patient}_{rng.choice(['virus', 'bacteria'])}_{len(files)}.jpeg"
            )
    labels += [1] * len(files)
    for patient in range(80):
        for k in range(rng.choice([1, 1, 2, 3])):
            files.append(f"train/NORMAL/{rng.choice(['', 'NORMAL2-'])}IM-{patient:04d}-{k:04d}.jpeg")
            labels.append(0)
    return files, np.array(labels)


def shared_images(files, train, val):
    ids = {patient_id(files[i]) for i in train}
    return sum(patient_id(files[i]) in ids for i in val)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_patient_split_has_the_counts_of_the_plain_split(seed):
    files, labels = made_up_listing(seed)
    train, val = split_train_val(files, labels, "patient", 0.2, seed)
    plain_train, plain_val = split_train_val(files, labels, "image", 0.2, seed)
    assert sorted([*train, *val]) == list(range(len(files))) == sorted([*plain_train, *plain_val])
    assert np.bincount(labels[val]).tolist() == np.bincount(labels[plain_val]).tolist()
    assert len(val) == math.ceil(0.2 * len(files))
    assert shared_images(files, train, val) == 0 < shared_images(files, plain_train, plain_val)


def test_image_split_is_scikit_learns(synthetic):
    files, labels, *_ = list_images(synthetic, "train")
    train, val = split_train_val(files, labels, "image", 0.2, 3)
    expected = sklearn.model_selection.train_test_split(
        np.arange(96), test_size=0.2, stratify=labels, random_state=3
    )
    assert set(train) == set(expected[0]) and set(val) == set(expected[1])


@pytest.mark.parametrize("mode", ["patient", "image"])
def test_split_depends_on_names_and_seed_alone(mode):
    files, labels = made_up_listing()

    def names(order, seed):
        train, val = split_train_val([files[i] for i in order], labels[order], mode, 0.2, seed)
        return frozenset(files[order[i]] for i in train), frozenset(files[order[i]] for i in val)

    order = np.arange(len(files))
    shuffled = np.random.default_rng(1).permutation(order)
    assert names(order, 0) == names(shuffled, 0) == names(order[::-1], 0)
    assert len({names(order, seed) for seed in range(5)}) == 5


def test_patient_with_both_classes_stays_whole():
    files = [f"train/X/person{p}_virus_{k}.jpeg" for p in range(40) for k in range(3)]
    labels = np.array([(p + (k == 2)) % 2 if p % 5 == 0 else p % 2 for p in range(40) for k in range(3)])
    train, val = split_train_val(files, labels)
    assert shared_images(files, train, val) == 0 and len(train) + len(val) == 120
    assert (
        np.abs(np.bincount(labels[val]) - [12, 12]).max() <= 1
    )  # sizes 1, 2 and 3: the count can nearly be met


@given(sizes=st.lists(st.integers(1, 12), max_size=9), target=st.integers(0, 60))
def test_nearest_subset_against_brute_force(sizes, target):
    chosen = split._nearest_subset(sizes, target)
    assert len(set(chosen)) == len(chosen)
    found = sum(sizes[i] for i in chosen)
    sums = [sum(c) for n in range(len(sizes) + 1) for c in itertools.combinations(sizes, n)]
    assert abs(found - target) == min(abs(s - target) for s in sums)


@given(
    sizes=st.tuples(*[st.lists(st.sampled_from([1, 2, 3, 7]), min_size=2, max_size=7)] * 2),
    seed=st.integers(0, 99),
)
def test_patient_split_against_brute_force(sizes, seed):
    """Per class, the nearest count to the plain split's that whole patients can give."""
    files, labels = [], []
    for label, patients in enumerate(sizes):
        for p, size in enumerate(patients):
            files += [
                f"{'train/NORMAL/IM-' if label == 0 else 'train/PNEUMONIA/person'}{p:02d}"
                f"{'-' if label == 0 else '_virus_'}{k:04d}.jpeg"
                for k in range(size)
            ]
            labels += [label] * size
    labels = np.array(labels)
    assume(np.bincount(labels).min() >= 5)
    _, plain = split_train_val(files, labels, "image", 0.2, seed)
    best, possible = [], True
    for label, patients in enumerate(sizes):
        target = (labels[plain] == label).sum()
        sums = {sum(c) for n in range(len(patients) + 1) for c in itertools.combinations(patients, n)}
        best.append(min(abs(s - target) for s in sums))
        nearest = {s for s in sums if abs(s - target) == best[-1]}
        possible &= not nearest & {0, sum(patients)}
    try:
        train, val = split_train_val(files, labels, "patient", 0.2, seed)
    except InputError:
        assert not possible
        return
    assert shared_images(files, train, val) == 0 and len(train) + len(val) == len(files)
    for label in range(2):
        assert abs((labels[val] == label).sum() - (labels[plain] == label).sum()) == best[label]


def test_split_errors():
    with pytest.raises(InputError):
        split_train_val(["a.png", "b.png", "c.png"], [0, 1, 1])
    with pytest.raises(InputError, match="patients"):  # ten images of one patient cannot be on both sides
        split_train_val(
            [f"person1_virus_{i}.jpeg" for i in range(10)] + [f"x{i}.jpeg" for i in range(10)],
            [1] * 10 + [0] * 10,
        )


def test_real_split():
    root = SHARED / "chest_xray"
    if not root.is_dir():
        pytest.skip("no real data here")
    files, labels, *_ = list_images(root, "train")
    assert (len(files), len(list_images(root, "test")[0])) == (5216, 624)
    ids = [{patient_id(f) for f, y in zip(files, labels) if y == k} for k in (0, 1)]
    assert [len(i) for i in ids] == [1211, 1635] and not ids[0] & ids[1]
    for seed in (0, 1):
        train, val = split_train_val(files, labels, "patient", 0.2, seed)
        assert (len(train), len(val)) == (4172, 1044)
        assert np.bincount(labels[train]).tolist() == [1073, 3099]
        assert shared_images(files, train, val) == 0
        train, val = split_train_val(files, labels, "image", 0.2, seed)
        assert np.bincount(labels[train]).tolist() == [1073, 3099]
        assert 0.39 <= shared_images(files, train, val) / 1044 <= 0.62


def test_load_train_val(small_set, capsys):
    train, val, info = load_train_val(small_set)
    assert (info["train"], info["val"], info["test"]) == (19, 5, 6) == (len(train), len(val), info["test"])
    assert info["synthetic"] is False and info["shared_patients"] == 0 and info["set"] == "set"
    assert sum(info["counts"]["val"].values()) == 5 and info["counts"]["test"] == {
        "NORMAL": 3,
        "PNEUMONIA": 3,
    }
    assert "(train, val, test) = (19, 5, 6)" in capsys.readouterr().out
    test = load_test(small_set)
    assert test.targets.tolist() == [0, 0, 0, 1, 1, 1]
    x, y, _ = Batches(test, Inputs((0.5,), (0.5,), CPU)).get(torch.tensor([5, 0, 1]))
    assert x.dtype == torch.float32 and x.shape == (3, 1, 16, 16) and y.tolist() == [1, 0, 0]
    assert x[:, 0, 3, 3].tolist() == pytest.approx([120 / 255, 0, 10 / 255])
    again = load_train_val(small_set)[2]
    assert again["fingerprint"] == info["fingerprint"]
    Path(small_set.data_dir, "train/NORMAL/n00.png").rename(Path(small_set.data_dir, "train/NORMAL/q00.png"))
    assert load_train_val(small_set)[2]["fingerprint"] != info["fingerprint"]


def test_pixel_fingerprint_sees_names_labels_pixels_and_order(small_set):
    test = load_test(small_set)
    base = pixel_fingerprint(test)
    assert pixel_fingerprint(test.take(np.arange(6))) == base
    others = [test.take(np.arange(5)), test.take(np.array([1, 0, 2, 3, 4, 5]))]
    for field in ("files", "labels", "images"):
        changed = test.take(np.arange(6))
        if field == "files":
            changed.files[0] = "other"
        elif field == "labels":
            changed.targets[0] = 1
        else:
            changed.images = np.array(changed.images)
            changed.images[3, 0, 0] ^= 1
        others.append(changed)
    assert len({base, *map(pixel_fingerprint, others)}) == 6


@pytest.mark.parametrize(
    "names, unknown", [(["a", "b", "c"], 3), (["IM-0001-0001", "b", "person1_virus_2"], 1)]
)
def test_names_that_tell_no_patient_are_counted(tmp_path, names, unknown):
    touch(tmp_path, *(f"train/{c}/{n}.png" for c in data.CLASSES for n in names))
    index = list_images(tmp_path, "train")
    assert index.unknown == 2 * unknown and len(index.files) == len(index.patients) == 2 * len(names)


def test_unknown_patients_are_said(small_set, capsys):
    """Images without a patient in their name make a patient split an image split: that must not read "0
    shared"."""
    _, _, info = load_train_val(small_set)
    assert info["unknown_patients"] == 24
    out = capsys.readouterr().out
    assert "patients unknown" in out and "share a patient" not in out
    some = {"train": 20, "val": 4, "shared_patients": 1, "unknown_patients": 2}
    assert (
        say_shared(some) == "1 validation images share a patient with train (patients unknown for 2 images)"
    )
    del some["unknown_patients"]  # of an earlier version
    assert say_shared(some) == "1 validation images share a patient with train"


@pytest.mark.parametrize(
    "key, value",
    [
        ("img_size", 5000),
        ("img_size", -1),
        ("img_size", True),
        ("split_seed", 2**40),
        ("split", "hospital"),
        ("resize", ["squash"]),
        ("normalise", "equalise"),
        ("data_dir", "a\0b"),
        ("cache_dir", 3),
        ("classes", "NORMAL"),
        ("classes", [1, 2]),
        ("classes", None),
        ("skip_bad", "no"),
        ("wings", 2),
    ],
)
def test_damaged_settings_are_one_line(key, value):
    good = json.loads(json.dumps(asdict(data.DataConfig())))
    assert data.DataConfig.from_json(good) == data.DataConfig()
    with pytest.raises(InputError) as error:
        data.DataConfig.from_json({**good, key: value})
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- statistics


def test_statistics_are_those_of_the_training_pixels(small_set):
    train, _, _ = load_train_val(small_set)
    shown = Inputs((0.0,), (1.0,), CPU)
    pixels = shown.grey(train.pixels()).double()
    expected = (float(pixels.mean()), float(pixels.std(correction=0)))
    assert statistics(train, shown) == pytest.approx(expected, abs=1e-7)
