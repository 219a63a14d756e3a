"""Tests of copies: the same file on two sides, and the same picture saved anew."""

import io
import itertools
import shutil

import numpy as np
import pytest
import scipy.fft
from PIL import Image

import data
from cohort.who import Asked, age_bands
from common.console import InputError
from common.task import CLASSES, Task
from data import load_train_val, read_listing
from images import split, twins
from images.drawn import draw_radiograph
from images.subset import Subset
from layouts.folders import read_folders
from layouts.listing import Index, patient_id
from report.render import to_markdown
from report.rows import load_entries
from report.tables import main as tables
from report.view import view_of
from tests.shared import SHARED, cli, read_json, smooth_picture, succeed
from training import other_hospitals

SIDES = ("train", "val", "test")


def subset_of(images, names=None):
    names = names or [f"{i}.png" for i in range(len(images))]
    return Subset(names, np.zeros(len(images), int), np.stack(images), np.arange(len(images)))


# ---------------------------------------------------------------- the same bytes


def test_contents_against_brute_force(tmp_path):
    """Files that differ in the middle, at the ends, in length, or not at all; empty, absent and no files."""
    rng, long = np.random.default_rng(0), 3 * twins.BLOCK
    body = bytearray(rng.integers(0, 256, long, dtype=np.uint8).tobytes())
    contents = [b"", b"", b"a", b"a", b"b", bytes(body), bytes(body), bytes(body[:-1])]
    for place in (0, long // 2, long - 1):
        changed = bytearray(body)
        changed[place] ^= 1
        contents += [bytes(changed)] * (2 if place == 0 else 1)
    contents += [bytes(rng.integers(0, 2, 3, dtype=np.uint8)) for _ in range(30)]
    names = [f"{i}.png" for i in range(len(contents))]
    for name, content in zip(names, contents):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "5.png")
    names += ["absent", "folder", "link.png"]
    contents += [None, None, contents[5]]
    found = twins.contents(tmp_path, names)
    for i, j in itertools.combinations(range(len(names)), 2):
        same = bool(contents[i]) and contents[i] == contents[j]
        assert (found[i] >= 0 and found[i] == found[j]) == same, (names[i], names[j])
    alone = [i for i, c in enumerate(contents) if not c or contents.count(c) == 1]
    assert (found[alone] == -1).all() and found.dtype == np.int64
    (tmp_path / "2.png").write_bytes(b"c")  # a set that changes is read again
    assert twins.contents(tmp_path, names)[2] == -1


def test_joined_against_a_closure():
    rng = np.random.default_rng(0)
    for _ in range(50):
        patients = [f"p{k}" for k in rng.integers(0, 12, 20)]
        content = rng.integers(-1, 8, 20)
        group = {name: {name} for name in patients}
        for i, j in itertools.product(range(20), repeat=2):
            if content[i] >= 0 and content[i] == content[j]:
                one = group[patients[i]] | group[patients[j]]
                for name in one:
                    group[name] = one
        assert twins.joined(patients, content) == [min(group[name]) for name in patients]


def toy_index(content, patients=None):
    """40 images of two classes, one a patient unless said."""
    files = [f"train/{'AB'[i % 2]}/{i:02d}.png" for i in range(len(content))]
    side = np.full(len(content), "train", dtype="U5")
    targets, known = np.arange(len(content)) % 2, np.ones(len(content), bool)
    return Index(files, targets, patients or files, known, side, np.array(content))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_cut_by_patient_keeps_copies_together(kind):
    """Chains of patients that share files are on one side; by image they are not; where no copy was apart,
    the cut is the one of old."""
    rng, task = np.random.default_rng(0), Task(("A", "B"), kind)
    apart, kept = 0, 0
    for seed in range(30):
        content = np.full(40, -1)
        content[rng.permutation(40)[:8]] = np.repeat(np.arange(4), 2)
        index = toy_index(content)
        if kind == "sigmoid":
            targets = np.eye(2, dtype=np.int8)[index.targets]
            index = index._replace(targets=targets)
        plain = split.cut(index._replace(content=None), task, True, 0.25, seed)
        rest, part = split.cut(index, task, True, 0.25, seed)
        assert sorted([*rest, *part]) == list(range(40)) and abs(len(part) - 10) <= 2
        inside = np.isin(np.arange(40), part)
        for k in range(4):
            assert len(set(inside[content == k])) == 1
        was = np.isin(np.arange(40), plain[1])
        if all(len(set(was[content == k])) == 1 for k in range(4)):
            kept += 1
            assert np.array_equal(part, plain[1])
        else:
            apart += 1
        by_image = split.cut(index, task, False, 0.25, seed)
        expected = split.cut(index._replace(content=None), task, False, 0.25, seed)
        assert np.array_equal(by_image[1], expected[1])
    assert apart > 3 and kept > 0


def test_the_kermany_split_is_the_one_of_old():
    """Image by image, as split_train_val alone cuts it; its 30 groups of copies are on one side."""
    root = SHARED / "chest_xray"
    if not root.exists():
        pytest.skip("../shared is absent")
    config = data.DataConfig(str(root))
    listing = read_listing(config)
    index, others, test = listing.index, listing.others, listing.test
    train, val = split.cut(index.take(others), config.task, True, 0.2, 0)
    assert (len(train), len(val), len(test)) == (4172, 1044, 624)
    old = read_folders(root, CLASSES, ["train"])
    expected = split.split_train_val(old.files, old.targets, "patient", 0.2, 0, old.patients)
    names = index.take(others).files
    assert [names[i] for i in val] == [old.files[i] for i in expected[1]]
    numbers, counts = np.unique(index.content[index.content >= 0], return_counts=True)
    assert len(numbers) == 30 and counts.sum() == 62
    content = {s: index.content[i] for s, i in zip(SIDES, (others[train], others[val], test))}
    assert twins.count(content) == {"val_train": 0, "test_train": 0, "test_val": 0}


def test_counts_by_hand(capsys):
    content = {
        "train": np.array([0, 1, 1, -1]),
        "val": np.array([1, 2, -1]),
        "test": np.array([0, 0, 2, 1, -1]),
    }
    counts = twins.count(content)
    assert counts == {"val_train": 1, "test_train": 3, "test_val": 2}
    files = {side: [f"{side}{i}" for i in range(len(c))] for side, c in content.items()}
    twins.warn(files, content, counts)
    err = capsys.readouterr().err
    assert "1 validation images are copies, byte for byte, of training images, 3 test images are" in err
    assert "val0 and train1; test0 and train0; test2 and val1" in err
    twins.warn(files, content, dict.fromkeys(counts, 0))
    twins.warn_of_labels(["a", "b", "c", "d"], np.array([0, 0, 1, -1]), [1, 1, 0, 0])
    assert capsys.readouterr().err == ""
    twins.warn_of_labels(["a", "b", "c", "d"], np.array([0, 0, 1, 1]), [[1, 0], [1, 1], [0, 0], [0, 0]])
    assert "1 files have the bytes of another with other labels, such as a and b" in capsys.readouterr().err


# ---------------------------------------------------------------- the same picture


def plain_hash(image):
    """The definition: exact means over 32 x 32 equal boxes, scipy's 2-D transform, against the median."""
    side = len(image)
    fine = np.kron(image.astype(float), np.ones((32, 32)))  # every box is made of whole pixels now
    small = fine.reshape(32, side, 32, side).mean(axis=(1, 3))
    low = scipy.fft.dctn(small, norm="ortho")[:16, :16].ravel()[1:]
    return low - np.median(low)


@pytest.mark.parametrize("side", [96, 40, 32, 20])
def test_hashes_against_scipy(side):
    images = [smooth_picture(side, side, seed) for seed in range(8)]
    images += [
        np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8) for seed in range(4)
    ]
    found = twins.hashes(subset_of(images))
    assert found.shape == (12, 255) and found.dtype == np.int8
    for bits, image in zip(found, images):
        low = plain_hash(image)
        clear = np.abs(low) > 0.01  # grey levels; the median itself is nearest to the edge
        assert clear.sum() > 240 and np.array_equal(bits[clear] > 0, low[clear] > 0)
    flat = twins.hashes(subset_of([np.full((side, side), 90, np.uint8)] * 2))
    assert (flat == 0).all() and not twins.alike(subset_of([images[0] * 0] * 2), subset_of([images[0] * 0]))


def test_nearest_against_all_pairs(monkeypatch):
    rng = np.random.default_rng(0)
    here, there = (rng.choice(np.array([-1, 1], np.int8), (n, 255)) for n in (2100, 8300))
    there[8250, :] = here[2090]
    there[8250, :28] *= -1
    position, bits = twins.nearest(here, there)
    some = [0, 1, 2047, 2048, 2090, 2099]
    different = (here[some][:, None, :] != there[None]).sum(axis=2)
    assert np.array_equal(bits[some], different.min(axis=1))
    assert np.array_equal(different[np.arange(6), position[some]], different.min(axis=1))
    assert (position[2090], bits[2090]) == (8250, 28)


def saved_anew(image):
    """The ways in which a picture comes back: other quality, size, brightness."""
    size = image.shape[0]

    def jpeg(quality):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        return np.asarray(Image.open(buffer))

    def through(side):
        small = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
        return np.asarray(small.resize((size, size), Image.Resampling.BILINEAR))

    brighter = (image * 0.9 + 20).clip(0, 255).astype(np.uint8)
    return [jpeg(90), jpeg(30), through(size // 2), through(size * 2), brighter]


def test_pictures_saved_anew_are_found():
    """Drawn chests, each in five forms, are found; chests of other children are not."""
    rng = np.random.default_rng(0)
    chests = [draw_radiograph(rng, i % 2 == 1, side=160) for i in range(24)]
    known, other = subset_of(chests[:12]), subset_of(chests[12:])
    for i, forms in enumerate(map(saved_anew, chests[:12])):
        assert twins.alike(subset_of(forms), known) == [(f"{k}.png", f"{i}.png") for k in range(5)]
    assert twins.alike(other, known) == [] and twins.alike(known.take([]), other) == []


def real(*paths):
    images = [
        np.asarray(Image.open(p).convert("L").resize((224, 224), Image.Resampling.BILINEAR)) for p in paths
    ]
    return subset_of(images, [p.stem for p in paths])


def test_real_pictures_saved_anew():
    """Of the Kermany images that another set saved anew, every one is found; the nearest two children are
    not taken for one."""
    theirs, ours = SHARED / "five_class", SHARED / "chest_xray"
    if not theirs.exists() or not ours.exists():
        pytest.skip("../shared is absent")
    places = {p.stem: p for p in sorted(ours.glob("*/PNEUMONIA/*.jpeg"))[::7]}
    again = [p for p in sorted(theirs.glob("*/*Pneumonia/*")) if p.stem in places]
    others = sorted(theirs.glob("test/Tuberculosis/*"))[:40] + sorted(theirs.glob("test/COVID-19/*"))[:40]
    known = real(*places.values())
    pairs = twins.alike(real(*again, *others), known)
    assert len(again) > 100 and pairs == [(p.stem, p.stem) for p in again]
    near = ("IM-0571-0001", "NORMAL2-IM-1094-0001-0002")
    one, two = (real(ours / f"train/NORMAL/{name}.jpeg") for name in near)
    assert twins.alike(one, two) == [] and twins.nearest(*map(twins.hashes, (one, two)))[1] == 36


# ---------------------------------------------------------------- from the command line


def write_set(root, seed=0, train=20, test=10, side=32):
    """Noise, brighter in PNEUMONIA: root/{train,test}/CLASS/NAME.png, a child an image."""
    rng = np.random.default_rng(seed)
    for part, count in (("train", train), ("test", test)):
        for k, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                stem = f"person{i}_virus_{i}" if k else f"IM-{i:04d}-0001"
                picture = rng.uniform(0, 160, (side, side)) + 90 * k
                Image.fromarray(picture.astype(np.uint8)).save(folder / f"{stem}.png")
    return root


def report_of(folder):
    """The report of compare.py without its pictures, which take most of its time."""
    (entries,) = load_entries(folder / "outputs")
    return to_markdown(tables.section(view_of(entries, Asked(age_bands()))))


def test_copies_are_said_from_training_to_the_report(tmp_path):
    """Three test files are training or validation files, two more were saved anew; a test image that is none
    does not disturb training, which decodes no test image."""
    root = write_set(tmp_path / "set")
    sick = root / "train/PNEUMONIA"
    for i in range(3):
        shutil.copy(sick / f"person{i}_virus_{i}.png", root / f"test/PNEUMONIA/person{900 + i}_virus_1.png")
    for i in (7, 8):
        with Image.open(sick / f"person{i}_virus_{i}.png") as image:
            image.save(root / f"test/PNEUMONIA/person{800 + i}_virus_1.jpeg", quality=95)
    (root / "test/NORMAL/broken.png").write_bytes(b"no image")
    argv = ("--data-dir", "set", "--img-size", 32, "--cache-dir", "cache")
    done = succeed("train_linear", *argv, cwd=tmp_path)
    info = read_json(tmp_path / "outputs/linear/results.json")["split"]
    copies = info["copies"]
    assert copies["test_train"] + copies["test_val"] == 3 and copies["val_train"] == 0
    assert "byte for byte, of training images" in done.out and "byte for byte, of training" in done.err
    assert "such as test/PNEUMONIA/person90" in done.err and info["alike"] == {"val_train": 0}
    assert "no validation image looks like a training image" in done.out
    (root / "test/NORMAL/broken.png").unlink()
    done = succeed("calibrate", "--bootstrap", 100, cwd=tmp_path)
    alike = read_json(tmp_path / "outputs/linear/calibration.json")["alike"]
    assert alike["test_train"] + alike["test_val"] == 5 and alike["val_train"] == 0
    assert "test images look like" in done.err
    text = report_of(tmp_path)
    assert "FLATTERED" in text and "byte for byte, of training images" in text
    assert f"{alike['test_train']} test images look like training images" in text


def test_patients_who_share_a_file_on_one_side_are_counted(tmp_path, capsys):
    root = write_set(tmp_path / "set")
    config = data.DataConfig(str(root), 32, cache_dir=str(tmp_path / "cache"))
    load_train_val(config, str)
    assert "at most" not in capsys.readouterr().err
    first, second = sorted((root / "test/PNEUMONIA").iterdir())[:2]
    for number, path in ((998, first), (999, second), (997, second)):
        shutil.copy(path, root / f"test/PNEUMONIA/person{number}_virus_1.png")
    load_train_val(config, str)
    people = len({patient_id(path.name) for path in (root / "test").rglob("*.png")})
    said = f"{people} test patients are {people - 3} at most, as some share a file, byte for byte"
    assert said in capsys.readouterr().err


def test_a_pooled_split_keeps_copies_together(tmp_path):
    """Some test files are training files: published, all are said; pooled by patient, none is apart."""
    root = write_set(tmp_path / "set", seed=2)
    for path in sorted(root.glob("train/*/*"))[::4]:
        other = path.name.replace("person", "person9").replace("IM-", "IM-9")
        shutil.copy(path, root / "test" / path.parent.name / other)
    counts = {}
    for how in ("patient", "pooled", "pooled-image"):
        config = data.DataConfig(str(root), 32, cache_dir=str(tmp_path / "cache"), split=how)
        counts[how] = load_train_val(config, str)[2]["copies"]
    assert counts["patient"]["test_train"] + counts["patient"]["test_val"] == 10
    assert set(counts["pooled"].values()) == {0} and sum(counts["pooled-image"].values()) > 0


def test_copies_among_hospitals_are_said(tmp_path, capsys):
    """--also: images that train already, and pictures that look like validation's; --site: like those."""
    root = write_set(tmp_path / "set", seed=3)
    config = data.DataConfig(str(root), 32, cache_dir=str(tmp_path / "cache"))
    train, val, _ = load_train_val(config, str)
    for name, files in (
        ("one", train.files[:2] + train.files[-2:]),
        ("two", train.files[:3] + train.files[-1:]),
    ):
        write_set(tmp_path / name, seed=len(name) + ord(name[0]), train=5, test=1)
        shutil.rmtree(tmp_path / name / "test")
        for i, file in enumerate(files):
            shutil.copy(root / file, tmp_path / name / "/".join(file.split("/")[:2]) / f"copy{i}.png")
    with Image.open(root / val.files[0]) as image:
        image.save(tmp_path / "two/train/NORMAL/anew.jpeg", quality=95)
    both = data.DataConfig(
        str(root), 32, cache_dir=str(tmp_path / "cache"), also=(str(tmp_path / "one"), str(tmp_path / "two"))
    )
    capsys.readouterr()
    other_hospitals.join(both, train, val, str)
    err = capsys.readouterr().err
    assert f"also one: 4 of its images are images of {root} that train already" in err
    assert f"also two: 4 of its images are images of {root} that train already" in err
    assert "also two: 3 of its images are images of one that train already" in err
    assert "also two: 1 of its images look like validation images" in err
    assert f"train/NORMAL/anew.jpeg and {val.files[0]}" in err
    with Image.open(root / val.files[0]) as image:
        image.save(tmp_path / "two/train/NORMAL/anew.png")
    with pytest.raises(InputError, match="1 of its images, train/NORMAL/anew.png .* are validation images"):
        other_hospitals.join(both, train, val, str)


def test_runs_without_copies_and_a_site_with_some(tmp_path):
    """That nothing is on two sides is said; then a site holds a training picture, saved anew or as it is."""
    root = write_set(tmp_path / "set", seed=1)
    write_set(tmp_path / "clinic", seed=5, train=8, test=1)
    done = succeed("train_linear", "--data-dir", "set", "--img-size", 32, cwd=tmp_path)
    assert "no file is on two sides; no validation image looks like a training image" in done.out
    assert "copies" not in done.err
    succeed("calibrate", "--bootstrap", 100, cwd=tmp_path)
    text = report_of(tmp_path)
    assert "no file is on two sides; no picture looks the same on two sides" in text
    assert "FLATTERED" not in text
    assert "not looked for" in twins.say_copies({"train": 1, "val": 1, "shared_patients": 0})  # older runs
    with Image.open(root / "train/NORMAL/IM-0000-0001.png") as image:
        image.save(tmp_path / "clinic/train/NORMAL/anew.jpeg", quality=95)
    argv = ("--run", "outputs/linear", "--site", "clinic/train", "--name", "clinic")
    done = succeed("calibrate", *argv, cwd=tmp_path)
    assert "1 images look like images that outputs/linear was trained or validated on" in done.err
    shutil.copy(root / "train/NORMAL/IM-0000-0001.png", tmp_path / "clinic/train/NORMAL/copy.png")
    done = cli("calibrate", *argv, cwd=tmp_path)
    assert done.code == 2 and "are among those" in done.err
