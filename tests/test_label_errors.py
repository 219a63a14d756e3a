"""audit.py --labels: the confident joint by its definition, made-up classes with known flips, a drawn set
with images in the wrong folder."""

import csv
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from auditing.labels import asked, errors, written
from common.console import InputError
from common.task import Task
from images.subset import Subset
from tests.shared import cli as run_script
from tests.shared import refused, succeed

pytest.importorskip("cleanlab")


def gaussians(seed, count, images, flips, apart=2.5):
    """Features [N, 8] of `count` classes, their labels [N], `flips` of which are wrong, which those are, and
    patients of two images each."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(rng.integers(0, count, images // 2), 2)
    x = rng.normal(size=(images, 8)) + apart * np.eye(8)[truth]
    wrong = rng.choice(images, flips, replace=False)
    y = truth.copy()
    y[wrong] = (truth[wrong] + rng.integers(1, count, flips)) % count
    return x, y, np.isin(np.arange(images), wrong), np.repeat(np.arange(images // 2), 2)


def by_definition(y, p):
    """Sections 3.1 and 3.2 of arXiv:1911.00068, label by label: the confident joint, calibrated to the number
    of labels of each class; of each pair of classes that many labels, by the largest margin. A label that is
    the most probable class stays."""
    count = p.shape[1]
    thresholds = [np.mean([row[k] for row, label in zip(p, y) if label == k]) for k in range(count)]
    joint = np.zeros((count, count))
    for row, label in zip(p, y):
        confident = [k for k in range(count) if row[k] >= thresholds[k]]
        if confident:
            joint[label, max(confident, key=lambda k: row[k])] += 1
    issue = np.zeros(len(y), bool)
    for i in range(count):
        mine = np.flatnonzero(y == i)
        for j in range(count):
            number = int(round(joint[i, j] / joint[i].sum() * len(mine)))
            if i != j and number:
                issue[sorted(mine, key=lambda n: p[n, i] - p[n, j])[:number]] = True
    return issue & (p.argmax(axis=1) != y)


@pytest.mark.parametrize(("count", "seed"), [(2, 0), (2, 1), (3, 2), (4, 3)])
def test_label_errors_are_those_of_the_confident_joint(count, seed):
    x, y, _, patients = gaussians(seed, count, 600, 40, apart=1.8)
    found = errors.find_errors(x, y, patients, count)
    expected = by_definition(y, found.p)
    assert expected.sum() > 20
    # Of more than two classes the package rounds so that each keeps its number of labels: one more or less.
    assert (found.issue != expected).sum() <= count - 2


def test_flipped_labels_are_found():
    for count in (2, 3):
        x, y, wrong, patients = gaussians(0, count, 800, 40, apart=4.0)
        found = errors.find_errors(x, y, patients, count)
        hits = (found.issue & wrong).sum()
        assert hits >= 0.9 * wrong.sum() and hits >= 0.8 * found.issue.sum()
        # Issues come first, and each part by the probability of its label.
        n = found.issue.sum()
        assert found.issue[found.order[:n]].all() and sorted(found.order) == list(range(800))
        for part in (found.order[:n], found.order[n:]):
            assert (np.diff(found.p[part, y[part]]) >= 0).all()


def test_a_label_is_judged_without_its_patient():
    """Features that tell the patient and nothing else: whoever had seen a patient would know the label of the
    other images."""
    rng = np.random.default_rng(0)
    who = np.repeat(np.arange(60), 6)
    y = rng.permutation(np.arange(60) % 3)[who]
    x = np.eye(60)[who] + rng.normal(0, 0.01, (360, 60))
    alone = errors.find_errors(x, y, who, 3)
    seen = errors.find_errors(x, y, np.arange(360), 3)
    assert alone.of_label.mean() < 0.4 and seen.of_label.mean() > 0.8


def test_copies_stay_in_one_fold(tmp_path, monkeypatch, capsys):
    for name, content in {"a.png": b"one" * 999, "b.png": b"one" * 999, "c.png": b"two" * 999}.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(asked, "read_listing", lambda config: SimpleNamespace(root=tmp_path))
    files = ["a.png", "b.png", "c.png"]
    subset = Subset(files, np.array([0, 1, 0]), None, np.arange(3), patients=["p", "q", "c.png"])
    whose = asked.patients_of(subset, None)
    assert whose[0] == whose[1] != whose[2]
    told = capsys.readouterr().err
    assert "bytes of another with other labels, such as a.png and b.png" in told
    assert "patients of 1 of 3 images are unknown" in told


# ---------------------------------------------------------------- what is asked


def test_questions_of_a_table_are_one_a_finding(capsys):
    task = Task(("No Finding", "Mass", "Edema"), "sigmoid")
    targets = np.array([[1, 0, 0], [0, 1, -1], [-1, 1, 0]], np.int8)
    found = asked.questions(task, targets)
    assert [(q.finding, q.positions.tolist(), q.y.tolist()) for q in found] == [
        ("No Finding", [0, 1], [1, 0]),
        ("Mass", [0, 1, 2], [0, 1, 1]),
        ("Edema", [0, 2], [0, 0]),
    ]
    assert [q.classes for q in asked.questions(task, targets, "Mass")] == [("no Mass", "Mass")]
    assert found[0].classes == ("a finding", "No Finding")
    with pytest.raises(InputError, match="Hernia is not one of any finding, No Finding, Mass, Edema"):
        asked.questions(task, targets, "Hernia")
    with pytest.raises(InputError, match="no labels of any finding"):
        asked.questions(task, targets, "any finding")


@pytest.mark.parametrize("classes, name", [(("NORMAL", "SICK"), "SICK"), (("Normal", "A", "B"), "B")])
def test_finding_is_said_to_be_unused_for_classes(classes, name, capsys):
    asked.questions(Task(classes), np.arange(len(classes)), name)
    assert "--finding is not used for labels" in capsys.readouterr().err


def test_questions_of_classes_and_rare_ones(capsys):
    task = Task(("Normal", "A", "B"))
    targets = np.array([0] * 30 + [1] * 9 + [2] * 30 + [-1])
    files = [f"{i}.png" for i in range(70)]
    subset = Subset(files, targets, None, np.arange(70), patients=files)
    (question,) = asked.askable(asked.questions(task, targets), subset, np.array(files))
    assert question.classes == ("Normal", "B") and question.y.tolist() == [0] * 30 + [1] * 30
    assert question.positions.tolist() == [*range(30), *range(39, 69)]
    told = capsys.readouterr().err
    assert "1 of 70 images have no label: left out" in told
    assert "9 images are left out, since 10 patients are needed: A (9 patients)" in told
    # Whole patients count: one patient with 30 images is one.
    with pytest.raises(InputError, match="no question has two classes of 10 patients"):
        one = np.array(["p"] * 30 + files[30:])
        asked.askable(asked.questions(task, targets), subset, one)


def test_list_and_lines_of_a_table(tmp_path):
    """Two findings, written and printed, by hand."""
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    y, issue = np.array([0, 0, 1]), np.array([False, True, True])
    found = errors.Errors(y, p, issue, np.array([1, 2, 0]))
    files = ["=a.png", "b.png", "c.png"]
    subset = Subset(files, None, None, np.arange(3), patients=["p", "p", "c.png"])
    both = [
        (asked.Question(name, (f"no {name}", name), np.arange(3), y), found) for name in ("Mass", "Edema")
    ]
    written.write_list(tmp_path / "list.csv", subset, both)
    rows = list(csv.reader(open(tmp_path / "list.csv", encoding="utf-8")))
    assert rows[0] == ["finding", *written.COLUMNS]
    assert rows[1] == ["Mass", "b.png", "p", "no Mass", "0.2", "Mass", "0.8", "1", "yes"]
    assert rows[2] == ["Mass", "c.png", "", "Mass", "0.3", "no Mass", "0.7", "2", "yes"]
    assert rows[3] == ["Mass", "'=a.png", "p", "no Mass", "0.9", "no Mass", "0.9", "3", "no"]
    assert [row[0] for row in rows[4:]] == ["Edema"] * 3
    # Findings take turns.
    assert [(q.finding, rank) for q, _, rank, _ in written.first_of(both, 3)] == [
        ("Mass", 1),
        ("Edema", 1),
        ("Mass", 2),
    ]
    told = written.lines(subset, both)
    assert told[0].startswith("  Mass: 2 of 3 labels are likely errors (1 of 2 no Mass, 1 of 1 Mass)")
    # AUROC by hand: the sick image is above one of two healthy ones.
    assert told[0].endswith("AUROC out of fold 0.500") and told[2].startswith(
        "more than a tenth is listed of no Mass, Mass, no Edema, Edema: "
    )
    assert told[4].split() == ["1", "0.200", "no", "Mass", "->", "Mass?", "b.png"]


def test_a_list_with_remarks_or_other_labels_is_kept(tmp_path, capsys):
    path, names = tmp_path / "list.csv", ["a.png", "b.png"]
    subset = Subset(names, None, None, np.arange(2), patients=names)

    def write(*names, images=2):
        y = np.arange(images)
        found = errors.Errors(y, np.full((images, 2), 0.5), y > 0, y)
        asked_of = [asked.Question(name, (f"no {name}", name), y, y) for name in names]
        written.write_list(path, subset, [(question, found) for question in asked_of])
        return capsys.readouterr().err, sorted(p.name for p in tmp_path.iterdir())

    assert write("Mass", "Edema") == ("", ["list.csv"])
    assert write("Mass", "Edema") == ("", ["list.csv"])  # the same again
    both = path.read_bytes()
    said, files = write("Mass")
    assert "has 2 labels that are not asked about now" in said and files == ["list-1.csv", "list.csv"]
    assert (tmp_path / "list-1.csv").read_bytes() == both
    said, files = write("Mass", images=1)
    assert "has 1 label that is not asked about now" in said
    assert files == ["list-1.csv", "list-2.csv", "list.csv"]
    # A column of somebody's own, as a spreadsheet writes it: with a byte order mark and other line ends.
    marked = [line + b",no\r\n" for line in path.read_bytes().splitlines()]
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(marked).replace(b"issue,no", b"issue,keep"))
    before = path.read_bytes()
    said, files = write("Mass", images=1)
    assert "the list of before has the column keep: it is kept as" in said and len(files) == 4
    assert (tmp_path / "list-3.csv").read_bytes() == before
    path.write_bytes(b"\xff\xfe?")  # not a text
    assert "list-4.csv" in write("Mass")[0] and (tmp_path / "list-4.csv").read_bytes() == b"\xff\xfe?"


# ---------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def wrong_folder(built_once, synthetic):
    """A run of train_linear.py on the drawn set with four healthy images among the sick -> (its folder,
    names)."""

    def build(folder):
        shutil.copytree(synthetic, folder / "data")
        healthy, sick = folder / "data/train/NORMAL", folder / "data/train/PNEUMONIA"
        moved = sorted(healthy.iterdir())[::9][:4]
        for path in moved:
            path.rename(sick / path.name)
        succeed("train_linear", "--data-dir", folder / "data", "--img-size", 64, cwd=folder)
        return [path.name for path in moved]

    return built_once("wrong_folder", build)


def test_label_errors_from_the_command_line(wrong_folder, tmp_path):
    folder, moved = wrong_folder
    shutil.copytree(folder / "outputs", tmp_path / "outputs")
    argv = ("--run", "outputs/linear", "--data-dir", folder / "data", "--cache-dir", folder / "Data/cache")
    done = succeed("audit", "--labels", *argv, cwd=tmp_path)
    path = tmp_path / "outputs/linear/audit-train-labels.csv"
    rows = list(csv.DictReader(open(path, encoding="utf-8")))
    results = tmp_path / "outputs/linear/results.json"
    assert f'"train": {len(rows)},' in results.read_text()
    issues = [row for row in rows if row["issue"] == "yes"]
    assert [int(row["rank"]) for row in rows] == list(range(1, len(rows) + 1))
    assert rows[: len(issues)] == issues and 0 < len(issues) < len(rows) / 2
    # Of the images in the wrong folder, those that went to validation are not asked about.
    asked_about = [row for row in rows if row["path"].rpartition("/")[2] in moved]
    assert len(asked_about) >= 3 and sum(row["issue"] == "yes" for row in asked_about) >= 2
    assert [row["rank"] for row in asked_about[:2]] == [
        "1",
        "2",
    ]  # the likeliest are
    assert asked_about[0]["label"] == "PNEUMONIA" and asked_about[0]["likely"] == "NORMAL"
    assert all(float(row["probability"]) < 0.5 for row in issues)
    assert f"{len(issues)} of {len(rows)} labels are likely errors" in done.out
    assert "[SYNTHETIC]" in done.out and "Nothing was changed" in done.out
    assert "was trained on these labels" not in done.err  # its features are pixels
    assert (tmp_path / "outputs/linear/audit-train-labels.png").exists()
    assert not (tmp_path / "outputs/linear/audit.json").exists()

    # The same by --only, of the validation images: 14 patients are too few.
    few = run_script("audit", "--only", "labels", "--side", "val", *argv, cwd=tmp_path)
    refused(few, "no question has two classes of 10 patients")
    assert "not asked, since 10 patients of a class are needed: NORMAL (5 patients)" in few.err


def test_refused_label_questions(runs, flags, tmp_path, monkeypatch):
    argv = ("--run", runs.out / "linear", *flags[:4])
    refused(run_script("audit", "--only", "border", "--side", "train", *argv, cwd=tmp_path), "--side train")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cleanlab.filter", None)
        refused(run_script("audit", "--labels", *argv, cwd=tmp_path), "cleanlab", "python -m pip install")


def test_backbones_that_have_learnt_the_labels(runs):
    from records.run import Run

    assert not asked.has_learnt(Run(runs.out / "linear"))
    assert asked.has_learnt(Run(runs.out / "scratch"))
    head = SimpleNamespace(kind="vit", results={"recipe": {"epochs": 0}})
    assert not asked.has_learnt(head)

    def ensemble(*members):
        of = [{"run": str(m.folder), "checkpoint": m.checkpoint_sha256} for m in members]
        return SimpleNamespace(kind="ensemble", results={"members": of})

    linear, scratch = Run(runs.out / "linear"), Run(runs.out / "scratch")
    assert not asked.has_learnt(ensemble(linear, linear))
    assert asked.has_learnt(ensemble(linear, scratch))
    # A member that is not there any more may have learnt them.
    gone = SimpleNamespace(folder=runs.out / "gone", checkpoint_sha256="0" * 64)
    assert asked.has_learnt(ensemble(linear, gone))
