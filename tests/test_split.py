"""Tests of who trains, validates and tests, and of what makes up an epoch."""

import itertools

import numpy as np
import pytest
from PIL import Image

import data
from common import console
from common.console import InputError
from common.files import sha256
from data import load_test, load_train_val, read_listing
from images.split import BALANCES, cut, cut_test, epoch_order, split_patients, split_train_val, undersampled
from layouts.folders import list_images
from tests.shared import SHARED

SIDES = ("train", "val", "test")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Folders train (60 + 100 images) and test (20 + 30): children of two images each, numbered from 1 in
    both parts; val with 10 + 10."""
    root, rng = tmp_path_factory.mktemp("pool"), np.random.default_rng(0)
    for part, counts in (("train", (60, 100)), ("test", (20, 30)), ("val", (10, 10))):
        for name, count in zip(("NORMAL", "PNEUMONIA"), counts):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                stem = f"person{i // 2}_virus_{i}" if name == "PNEUMONIA" else f"IM-{i // 2:04d}-{i:04d}"
                pixels = rng.integers(0, 255, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{stem}.png")
    return root


def load(pool, tmp_path, **settings):
    """{side: Subset}, info of the split, and what was printed of it."""
    lines = []
    config = data.DataConfig(str(pool), 8, cache_dir=str(tmp_path / "cache"), **settings)
    train, val, info = load_train_val(config, lines.append)
    return {"train": train, "val": val, "test": load_test(config)}, info, lines[0]


def classes(subset):
    return np.bincount(subset.targets, minlength=2).tolist()


def test_pooled_by_patient(pool, tmp_path):
    sides, info, line = load(pool, tmp_path, split="pooled")
    assert [classes(sides[s]) for s in SIDES] == [[48, 78], [16, 26], [16, 26]]  # 60, 20, 20% of 80 + 130
    assert info["test_from"] == "pooled and cut anew" and "test pooled and cut anew" in line
    files = [set(sides[s].files) for s in SIDES]
    assert len(set.union(*files)) == 210 and all(not a & b for a, b in itertools.combinations(files, 2))
    assert all({f.split("/")[0] for f in names} == {"train", "test"} for names in files)
    patients = [set(sides[s].patients) for s in SIDES]
    assert all(not a & b for a, b in itertools.combinations(patients, 2))
    assert {"train/person1", "test/person1"} <= set.union(*patients)  # not the same child
    assert info["shared_patients"] == info["shared_patients_test"] == 0


def test_pooled_by_image(pool, tmp_path):
    sides, info, line = load(pool, tmp_path, split="pooled-image", fractions=(0.5, 0.25, 0.25))
    assert [len(sides[s]) for s in SIDES] == [104, 53, 53]  # scikit-learn rounds parts up
    seen = set(sides["train"].patients)
    assert info["shared_patients"] == sum(p in seen for p in sides["val"].patients) > 5
    seen |= set(sides["val"].patients)
    assert info["shared_patients_test"] == sum(p in seen for p in sides["test"].patients) > 5
    assert f"{info['shared_patients_test']} test images with train or validation" in line


def test_pooled_and_undersampled(pool, tmp_path):
    sides, info, _ = load(pool, tmp_path, split="pooled-image", undersample=True)
    flow = dict(info["flow"])
    assert flow["undersampled"] == flow["readable"] < flow["found"]
    assert [classes(sides[s]) for s in SIDES] == [[48, 48], [16, 16], [16, 16]]
    assert info["counts"]["test"] == {"NORMAL": 16, "PNEUMONIA": 16}


def test_published_parts(pool, tmp_path):
    sides, info, line = load(pool, tmp_path, split="published")
    assert [classes(sides[s]) for s in SIDES] == [[60, 100], [10, 10], [20, 30]]
    assert {f.split("/")[0] for f in sides["val"].files} == {"val"} and info["test_from"] == "published"
    assert info["shared_patients"] == 20 and "20 validation images share a patient with train" in line
    plain, info, line = load(pool, tmp_path)
    assert [len(plain[s]) for s in SIDES] == [128, 32, 50] and info["shared_patients"] == 0
    assert not any(f.startswith("val/") for s in SIDES for f in plain[s].files)
    assert ", test " not in line and "shared_patients_test" not in info


def test_a_validation_folder_that_is_not_used_is_counted(pool, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "_said", set())  # other tests read the same folder
    ways = {"patient": "; --split published validates on it\n", "pooled": "\n"}
    for split, way in ways.items():
        load(pool, tmp_path, split=split)
        said = f"note: {pool}/val is not used by --split {split} (20 images){way}"
        assert capsys.readouterr().err.count(said) == 1
    load(pool, tmp_path, split="published")
    assert "is not used" not in capsys.readouterr().err


def test_a_test_part_is_cut_off(pool, tmp_path):
    alone = tmp_path / "alone"
    (alone / "train").parent.mkdir()
    (alone / "train").symlink_to(pool / "train")
    sides, info, line = load(alone, tmp_path)
    assert [len(sides[s]) for s in SIDES] == [102, 26, 32] and info["test_from"] == "cut off"
    assert "test cut off" in line
    patients = [set(sides[s].patients) for s in SIDES]
    assert all(not a & b for a, b in itertools.combinations(patients, 2))
    (alone / "val").symlink_to(pool / "val")  # a published validation part stays whole
    sides, _, _ = load(alone, tmp_path, split="published")
    assert [len(sides[s]) for s in SIDES] == [128, 20, 32]


def test_patients_of_a_table_decide(pool, tmp_path):
    """--patients replaces what the file names say: here every ten images are one child's."""
    files = sorted(p.relative_to(pool).as_posix() for p in pool.glob("train/*/*"))
    (tmp_path / "p.csv").write_text(
        "path,patient\n" + "\n".join(f"{f},c{i // 10}" for i, f in enumerate(files))
    )
    sides, info, _ = load(pool, tmp_path, patients=str(tmp_path / "p.csv"))
    assert not set(sides["train"].patients) & set(sides["val"].patients) and len(sides["val"]) == 30
    assert set(sides["val"].patients) < {f"c{i}" for i in range(16)} and info["unknown_patients"] == 0


@pytest.mark.parametrize("split", ["patient", "image", "pooled", "pooled-image"])
def test_splits_do_not_depend_on_the_order_of_files(pool, split):
    config = data.DataConfig(str(pool), 8, split=split)
    listing = read_listing(config)
    index, others, test = listing.index, listing.others, listing.test
    shuffled = np.random.default_rng(0).permutation(len(index.files))
    again = cut_test(index.take(shuffled), config)
    for found, expected in zip(again[:2], (others, test)):
        names = {index.files[shuffled[i]] for i in found}
        assert names == {index.files[i] for i in expected}


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """A table of 120 images in NIH's layout, three a patient, and published lists: the last 10 of 40 patients
    are for test; 000.png is in neither."""
    root, rng = tmp_path_factory.mktemp("listed"), np.random.default_rng(0)
    (root / "images").mkdir()
    rows = ["Image Index,Finding Labels,Patient ID"]
    for i in range(120):
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(root / f"images/{i:03d}.png")
        rows.append(f"{i:03d}.png,{('Mass|Edema', 'No Finding', 'Mass')[i % 3]},{i // 3}")
    (root / "t.csv").write_text("\n".join(rows))
    for name, numbers in (("train_val", range(1, 90)), ("test", range(90, 120))):
        (root / f"{name}_list.txt").write_text("".join(f"{i:03d}.png\n" for i in numbers))
    return root


def load_table(listed, tmp_path, **settings):
    classes = ("No Finding", "Edema", "Mass")
    return load(listed, tmp_path, labels=str(listed / "t.csv"), classes=classes, **settings)


def test_published_lists_are_followed(listed, tmp_path):
    """Their test images stay the test part, by whichever way validation is cut off the others."""
    for split, shared in (("patient", 0), ("published", 0), ("image", 1)):
        sides, info, _ = load_table(listed, tmp_path, split=split, fractions=(0.5, 0.25, 0.25))
        names = {s: {int(f[-7:-4]) for f in sides[s].files} for s in SIDES}
        assert names["test"] == set(range(90, 120)) and names["train"] | names["val"] == set(range(1, 90))
        assert not names["train"] & names["val"] and info["test_from"] == "published"
        assert abs(len(names["val"]) - 89 / 3) <= 1.5 and info["shared_patients_test"] == 0
        patients = {s: {i // 3 for i in names[s]} for s in SIDES}
        assert min(1, len(patients["train"] & patients["val"])) == min(1, info["shared_patients"]) == shared
        positives = [sum(i % 3 != 1 for i in names[s]) for s in SIDES]
        assert [info["counts"][s]["Mass"] for s in SIDES] == positives
        assert info["unknown_patients"] == 0


def test_a_pooled_table(listed, tmp_path):
    """The lists are not asked; the usual parts are 60, 20 and 20%; seeds differ, and so do fingerprints."""
    sides, info, line = load_table(listed, tmp_path, split="pooled")
    assert [len(sides[s]) for s in SIDES] == [72, 24, 24] and "test pooled and cut anew" in line
    patients = [{int(f[-7:-4]) // 3 for f in sides[s].files} for s in SIDES]
    assert all(not a & b for a, b in itertools.combinations(patients, 2))
    assert set.union(*patients) == set(range(40)) and info["shared_patients_test"] == 0
    other, again = (
        load_table(listed, tmp_path, split="pooled", split_seed=seed)[1]["fingerprint"] for seed in (1, 0)
    )
    assert other != info["fingerprint"] == again


def test_a_table_is_split_alike_in_any_order(listed, tmp_path):
    lines = (listed / "t.csv").read_text().split("\n")
    shuffled = [lines[1 + i] for i in np.random.default_rng(0).permutation(120)]
    (tmp_path / "t.csv").write_text("\n".join([lines[0], *shuffled]))
    for split in ("patient", "image", "pooled", "pooled-image"):
        found = []
        for path in (listed / "t.csv", tmp_path / "t.csv"):
            classes = ("No Finding", "Edema", "Mass")
            config = data.DataConfig(str(listed), 8, labels=str(path), classes=classes, split=split)
            listing = read_listing(config)
            index, others, test = listing.index, listing.others, listing.test
            rest = index.take(others)
            by_patient = not split.endswith("image")
            parts = cut(rest, config.task, by_patient, config.val_share, 0)
            found.append([{rest.files[i] for i in part} for part in parts])
            found[-1].append({index.files[i] for i in test})
        assert found[0] == found[1], split


def test_split_patients_against_brute_force():
    """Whole patients, as near to the fraction as the shuffled order of patients allows."""
    rng = np.random.default_rng(1)
    for seed in range(20):
        patients = [f"p{i}" for i in rng.integers(0, 8, size=30)]
        rest, part = split_patients(patients, 0.3, seed)
        assert sorted([*rest, *part]) == list(range(30))
        assert not {patients[i] for i in rest} & {patients[i] for i in part}
        assert abs(len(part) - 9) <= max(patients.count(p) for p in patients) / 2 + 0.5
        order = np.random.default_rng(seed).permutation(len(set(patients)))
        names = [sorted(set(patients))[i] for i in order]
        for fraction in (0.3, 0.99):
            tries = [sum(p in names[:n] for p in patients) for n in range(1, len(names))]
            found = len(split_patients(patients, fraction, seed)[1])
            assert abs(found - 30 * fraction) == min(abs(n - 30 * fraction) for n in tries)
        other = rng.permutation(30)
        again = split_patients([patients[i] for i in other], 0.3, seed)[1]
        assert {patients[i] for i in part} == {patients[other[i]] for i in again}
    with pytest.raises(InputError, match="two patients or more, the images are of 1"):
        split_patients(["p"] * 5, 0.3)
    with pytest.raises(InputError, match="the images are of 0"):
        split_patients([], 0.3)


# ---------------------------------------------------------------- patients with images of several classes


def test_patients_of_one_class_each_are_split_as_ever():
    """Checksums of validation made by the version before patients of several classes were drawn by share."""
    rng, files, labels = np.random.default_rng(5), [], []
    for k, (count, stem) in enumerate(
        (
            (120, "IM-{:04d}-{:04d}.jpeg"),
            (200, "person{}_virus_{}.jpeg"),
            (40, "NORMAL2-IM-{:04d}-{:04d}.jpeg"),
        )
    ):
        for patient in range(count):
            for _ in range(int(min(30, rng.geometric(0.4)))):
                files.append(f"train/{k}/" + stem.format(patient, len(files)))
                labels.append(k)
    assert len(files) == 903
    for seed, start in ((0, "c803f02c692a3396"), (3, "d4cb8b1220cb9721")):
        _, val = split_train_val(files, labels, "patient", 0.2, seed)
        assert len(val) == 181 and sha256(sorted(files[i] for i in val)).startswith(start)


@pytest.mark.skipif(not (SHARED / "chest_xray/train").is_dir(), reason="no real data here")
def test_the_split_of_the_real_set_is_as_ever():
    """Image by image: checksums of validation made by the version before."""
    index = list_images(SHARED / "chest_xray", "train")
    for fraction, seed, count, start in (
        (0.2, 0, 1044, "9d0f0764b90dfddd"),
        (0.2, 1, 1044, "ec608bc33b2595f1"),
        (0.25, 3, 1304, "0d7ee5a50ff81529"),
    ):
        train, val = split_train_val(index.files, index.targets, "patient", fraction, seed)
        assert (len(train), len(val)) == (5216 - count, count)
        assert sha256(sorted(index.files[i] for i in val)).startswith(start)


def drawn_patients(rng, count, mixed):
    """(files, labels, patients) of patients with 1 to 30 images of three classes; of a share `mixed` of them
    the images are of two classes."""
    labels, patients = [], []
    for patient in range(count):
        size = int(min(30, 1 + rng.geometric(0.25)))
        kinds = rng.choice(3, 2 if rng.random() < mixed else 1, replace=False)
        labels += [*kinds, *rng.choice(kinds, size)][: max(size, len(kinds))]
        patients += [f"p{patient}"] * max(size, len(kinds))
    return [f"{i:05d}.png" for i in range(len(labels))], np.array(labels, dtype=np.int64), patients


def test_patients_of_several_classes_validate_at_validations_share():
    """12% of 400 patients: they are as frequent on either side, every one of them has validation's chance,
    whatever its size, and the counts of the classes stay those of a stratified split."""
    files, labels, patients = drawn_patients(np.random.default_rng(0), 400, 0.12)
    whose = {p: {k for q, k in zip(patients, labels) if q == p} for p in set(patients)}
    mixed = sorted(p for p in whose if len(whose[p]) > 1)
    size = np.array([patients.count(p) for p in mixed])
    seeds, hits = 60, np.zeros(len(mixed))
    for seed in range(seeds):
        train, val = split_train_val(files, labels, "patient", 0.2, seed, patients)
        sides = [{patients[i] for i in part} for part in (train, val)]
        assert not sides[0] & sides[1] and len(train) + len(val) == len(files)
        assert np.abs(np.bincount(labels[val]) - 0.2 * np.bincount(labels)).max() <= 1
        assert abs(len(sides[1] & set(mixed)) - 0.2 * len(mixed)) <= 1
        hits += [p in sides[1] for p in mixed]
    assert len(mixed) > 40 and (size > 5).sum() > 10
    error = np.sqrt(0.16 / seeds)  # of the share of one patient
    assert np.abs(hits / seeds - 0.2).max() < 4 * error
    assert abs((hits / seeds)[size > 6].mean() - 0.2) < 3 * error / np.sqrt((size > 5).sum())


def test_small_sets_of_mixed_patients_against_all_partitions():
    """3 to 8 patients with images of any classes: whole patients; the counts are at most an image from the
    best of all partitions; refused only where no partition has every class on both sides."""
    tried = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        kinds, people = int(rng.integers(2, 4)), int(rng.integers(3, 9))
        patients = np.repeat(np.arange(people), rng.integers(1, 5, people))
        labels = rng.integers(kinds, size=len(patients))
        if np.bincount(labels, minlength=kinds).min() < 4:  # a stratified split of images has one of each
            continue
        counts = np.array([np.bincount(labels[patients == p], minlength=kinds) for p in range(people)])
        chosen = [s for n in range(people) for s in itertools.combinations(range(people), n)]
        partitions = [counts[list(s)].sum(0) for s in chosen]
        partitions = [v for v in partitions if v.min() > 0 and (counts.sum(0) - v).min() > 0]
        files, wanted = [f"{i:02d}" for i in range(len(labels))], 0.25 * np.bincount(labels)
        try:
            _, val = split_train_val(files, labels, "patient", 0.25, seed, patients.astype(str).tolist())
        except InputError:
            assert not partitions, seed
            continue
        found = np.bincount(labels[val], minlength=kinds)
        assert not set(patients[val]) & set(np.delete(patients, val))
        best = min(np.abs(v - wanted).sum() for v in partitions)
        assert np.abs(found - wanted).sum() <= best + 2, seed  # `wanted` itself is rounded
        tried += 1
    assert tried > 50


def test_a_split_of_mixed_patients_does_not_depend_on_the_order():
    files, labels, patients = drawn_patients(np.random.default_rng(1), 60, 0.5)
    _, val = split_train_val(files, labels, "patient", 0.2, 0, patients)
    other = np.random.default_rng(2).permutation(len(files))
    moved = [[values[i] for i in other] for values in (files, labels, patients)]
    _, again = split_train_val(moved[0], moved[1], "patient", 0.2, 0, moved[2])
    assert {files[i] for i in val} == {moved[0][i] for i in again}


# ---------------------------------------------------------------- an epoch

TARGETS = np.repeat([0, 1, 2], [5, 20, 50])


@pytest.mark.parametrize("balance", BALANCES)
def test_epoch_order(balance):
    origin = np.zeros(75, int)
    orders = [epoch_order(3, epoch, TARGETS, balance, origin) for epoch in range(400)]
    counts = np.array([np.bincount(TARGETS[order], minlength=3) for order in orders])
    assert np.array_equal(orders[7], epoch_order(3, 7, TARGETS, balance, origin))
    assert not np.array_equal(orders[0], orders[1]) and orders[0].dtype == np.int64
    assert not np.array_equal(orders[0], epoch_order(4, 0, TARGETS, balance, origin))
    if balance in ("weights", "none", "sources"):
        assert all(sorted(order) == list(range(75)) for order in orders)
    elif balance in ("sampler", "both", "sources-sampler"):
        assert all(len(order) == 75 for order in orders)
        assert np.abs(counts.mean(axis=0) - 25).max() < 4 * np.sqrt(75 * 2 / 9 / 400)  # 4 standard errors
        drawn = np.bincount(np.concatenate(orders), minlength=75)
        assert drawn[:5].min() > 5 * drawn[25:].min()  # with replacement: rare images come more often
    else:
        assert (counts == 5).all() and all(len(set(order)) == 15 for order in orders)
        chosen = {frozenset(order.tolist()) for order in orders}
        assert len(chosen) == 1 if balance == "undersample-once" else len(chosen) > 390


def test_undersampled():
    found = undersampled(TARGETS, 0)
    assert np.bincount(TARGETS[found]).tolist() == [5, 5, 5] and (np.diff(found) > 0).all()
    assert not np.array_equal(found, undersampled(TARGETS, 1))


def test_what_cannot_be_learnt_is_told_by_the_labels_of_training(listed, tmp_path, capsys):
    """Uncertain labels count as --uncertain says, blank ones as --blank does; unknown ones are none."""
    rows = ["path,patient,A,B,C,D"]
    for i in range(40):  # A: present or uncertain; B: present or blank; C: absent or uncertain; D: any
        other = i // 2 % 2
        rows.append(f"images/{i:03d}.png,{i // 2},{1 - 2 * other},{['1', ''][other]},{-other},{other}")
    (tmp_path / "t.csv").write_text("\n".join(rows))

    def said(**settings):
        capsys.readouterr()
        config = dict(labels=str(tmp_path / "t.csv"), layout="plain", classes=tuple("ABCD"))
        load(listed, tmp_path, **config, **settings)
        return [line for line in capsys.readouterr().err.splitlines() if "can be learnt" in line]

    has, without = "note: no training image has ", "note: no training image is without "
    end, blank = ", so nothing can be learnt about it", "; --blank negative takes blank labels for absent"
    assert said() == [f"{has}C{end}", f"{without}A, B{end}{blank}"]
    assert said(blank="negative") == [f"{has}C{end}", f"{without}A{end}"]
    assert said(uncertain="A=negative,C=positive") == [f"{without}B{end}{blank}"]


@pytest.mark.parametrize(
    "count, split, message",
    [
        (
            1,
            "patient",
            "no test part can be cut off: the class TB has one image only, and both sides need one",
        ),
        (1, "pooled-image", "no test part can be cut off: the class TB has one image only"),
        (8, "patient", "by patient: the class TB, of 1 patients, .* on both sides: use --split image$"),
        (8, "pooled", "would not be on both sides: use --split pooled-image$"),
        (-2, "patient", "the class TB, of 1 patients, would not be on both sides$"),
    ],
)
def test_a_small_class_is_named(tmp_path, count, split, message):
    """The class, the part that cannot be cut, and another split only where there are images for it. Eight
    and minus two: images of one child, else each of its own."""
    names = [f"train/NORMAL/n{i:02d}.png" for i in range(20)]
    one = count == 8 or count < 0
    names += [f"train/TB/{f'person1_{i}' if one else f't{i}'}.png" for i in range(abs(count))]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), len(name), np.uint8)).save(tmp_path / name)
    config = data.DataConfig(
        str(tmp_path), 8, classes=("NORMAL", "TB"), split=split, cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(InputError, match=message):
        load_train_val(config, str)


def test_a_part_smaller_than_the_classes_is_refused():
    with pytest.raises(InputError, match="it would have 1 images, and 9 would be left, too few for the 2 cl"):
        split_train_val([f"{i}.png" for i in range(10)], [0, 1] * 5, "image", 0.1)
    with pytest.raises(
        InputError, match="no validation part can be cut off: class number 1 .* one image only"
    ):
        split_train_val([f"{i}.png" for i in range(10)], [0] * 9 + [1], "image", 0.2)


def test_classes_that_a_side_lacks_are_said(tmp_path, capsys):
    names = [f"train/NORMAL/n{i:02d}.png" for i in range(20)] + [f"train/TB/t{i}.png" for i in range(3)]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / name)
    load(tmp_path, tmp_path, classes=("NORMAL", "TB"), split="image")
    assert "note: no validation image is TB: no figure there tells of it" in capsys.readouterr().err
