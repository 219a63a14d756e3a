"""Tests of pooling: one score for all images of a study or patient, from its definition to the report."""

import csv
import json
import shutil

import numpy as np
import pytest

from calibration import pooling, wording
from calibration.operating_point import Rule, evaluate
from calibration.pooling import grouped, units_of
from common.console import InputError
from common.task import Task
from metrics import choose_threshold_with_guarantee, counts_at_threshold
from report.rows import load_entries
from tests.shared import cli, of_one, read_json, refused, succeed


def several(count, seed, most=4, findings=1):
    """Images of `count` studies, one to `most` images each, mixed: files, patients, studies [N], scores
    and truth [N, F]; a patient has one or two studies."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(count), rng.integers(1, most + 1, count))
    owner = rng.permutation(owner)
    files = np.array([f"{i:04d}.dcm" for i in range(len(owner))])
    patients, studies = np.array([f"p{s // 2}" for s in owner]), np.array([f"s{s}" for s in owner])
    scores = rng.integers(1, 30, (len(owner), findings)) / 30  # coarse, so that ties happen
    return files, patients, studies, scores, rng.integers(-1, 2, (len(owner), findings))


def by_hand(names, scores, truth, how):
    """{name: (score, truth)} of one finding, in plain Python."""
    found = {}
    for name in dict.fromkeys(names):
        mine = [i for i, other in enumerate(names) if other == name]
        labels = [truth[i] for i in mine]
        values = [scores[i] for i in mine]
        label = 1 if 1 in labels else 0 if 0 in labels else -1
        found[name] = (max(values) if how == "max" else sum(values) / len(values), label)
    return found


@pytest.mark.parametrize("how", ["max", "mean"])
@pytest.mark.parametrize("by", ["study", "patient"])
def test_pooled_against_a_dictionary(by, how):
    files, patients, studies, scores, truth = several(40, 1, findings=3)
    names = (studies if by == "study" else patients).tolist()
    units = grouped(files, patients, studies, by, how)
    pooled, labels = units.scores(scores), units.truth(truth)
    for k in range(3):
        expected = by_hand(names, scores[:, k].tolist(), truth[:, k].tolist(), how)
        assert np.allclose(pooled[:, k], [score for score, _ in expected.values()], rtol=1e-12)
        assert labels[:, k].tolist() == [label for _, label in expected.values()]
    assert [names[i] for i in units.first] == list(expected)
    assert units.of_images(labels[:, 2]).tolist() == [expected[name][1] for name in names]
    assert (units.alone, units.shared) == (0, 0)
    both = []
    for k in range(3):
        kinds = {name: {t for n, t in zip(names, truth[:, k]) if n == name} for name in names}
        both.append(sum({0, 1} <= kind for kind in kinds.values()))
    assert units.differing(truth).tolist() == both


def test_by_image_nothing_changes():
    files, patients, studies, scores, truth = several(9, 2)
    units = grouped(files, patients, studies)
    assert units.scores(scores) is scores and units.truth(truth) is truth
    assert units.whose.tolist() == patients.tolist() and len(units) == len(files)


def test_images_without_study_or_patient_stand_alone():
    files = np.array(["a", "b", "c", "d", "e"])
    studies = np.array(["1", "", "1", "", "2"])
    patients = np.array(["p", "p", "p", "d", "e"])  # of d and e it is not known
    units = grouped(files, patients, studies, "study")
    assert units.numbers.tolist() == [0, 1, 0, 2, 3] and units.alone == 2
    units = grouped(files, patients, studies, "patient")
    assert units.numbers.tolist() == [0, 0, 0, 1, 2] and units.alone == 2


def test_a_study_of_two_patients_is_two():
    files = np.array(list("abcdef"))
    studies = np.array(["1", "1", "1", "2", "2", "2"])
    patients = np.array(["p", "q", "p", "r", "e", "r"])  # of e it is not known: its study tells
    units = grouped(files, patients, studies, "study")
    assert units.numbers.tolist() == [0, 1, 0, 2, 2, 2]
    assert (units.shared, units.alone) == (1, 0)


def test_nothing_known_is_an_error():
    files = np.array(["a", "b"])
    for studies in (None, np.array(["", ""])):
        with pytest.raises(InputError, match="StudyInstanceUID"):
            grouped(files, np.array(["p", "q"]), studies, "study")
    with pytest.raises(InputError, match="--patients"):
        grouped(files, files, np.array(["1", "1"]), "patient")
    with pytest.raises(InputError, match="3 val images, but 2 studies"):
        units_of(
            {"val_files": np.array(list("abc")), "val_patients": files, "val_cohort_study": files}, "val"
        )


def two_sides(seed, studies=120):
    """Arrays as in scores.npz of two classes, and {side: (score, truth, patient) of every study by hand}."""
    arrays, expected = {}, {}
    for number, side in enumerate(("val", "test")):
        files, patients, names, scores, truth = several(studies, seed + number)
        truth = np.abs(truth[:, 0])
        odds = np.log(scores[:, 0] / (1 - scores[:, 0])) + truth
        arrays |= {f"{side}_files": files, f"{side}_patients": patients, f"{side}_cohort_study": names}
        arrays |= {f"{side}_labels": truth, f"{side}_logits": np.stack([np.zeros(len(odds)), odds], 1)}
        pooled = by_hand(names.tolist(), odds.tolist(), truth.tolist(), "max")
        owner = dict(zip(names.tolist(), patients.tolist()))
        expected[side] = [(*pooled[name], owner[name]) for name in pooled]
    return arrays, expected


def test_figures_by_study_are_those_of_one_image_a_study():
    """The same as if every study were one image with its highest score."""
    arrays, expected = two_sides(3)
    one = {}
    for side, rows in expected.items():
        odds, truth, patients = (np.array(values) for values in zip(*rows))
        one |= {f"{side}_labels": truth, f"{side}_patients": patients}
        one[f"{side}_logits"] = np.stack([np.zeros(len(odds)), odds], 1)
    rule = dict(min_recall=0.9, confidence=0.9, bootstrap=100)
    found, p1 = evaluate(arrays, Rule(**rule, by="study"))
    plain, _ = evaluate(one, Rule(**rule))
    assert len(p1["val"]) == len(arrays["val_files"])
    assert (found["by"], found["pool"]) == ("study", "max")
    ours, theirs = of_one(found), of_one(plain)
    for key in ("threshold", "gap", "guarantee", "val", "test", "curves"):
        assert ours[key] == theirs[key], key
    assert ours["probability"]["val"]["before"] == theirs["probability"]["val"]["before"]
    assert found["summary"] == plain["summary"]


def test_several_classes_by_study():
    """The most probable class of the mean; a study of two classes has none."""
    logits = np.log(np.array([[0.5, 0.4, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.1, 0.6, 0.3]] * 12))
    studies = np.array([f"s{i // 4}{'aab'[min(i % 4, 2)]}" for i in range(48)])
    labels = np.array([1, 1, 2, 0] * 12)
    arrays = {}
    for side in ("val", "test"):
        arrays |= {f"{side}_files": np.array([f"{i}" for i in range(48)]), f"{side}_labels": labels}
        arrays |= {f"{side}_logits": logits, f"{side}_cohort_study": studies, f"{side}_patients": studies}
    # Images 0 and 1 are one study of class 1, 2 and 3 one of the classes 2 and 0.
    rule = Rule(bootstrap=100, by="study", pool="mean")
    labels[26:28] = 2  # some studies of class 2 ...
    labels[30:32] = labels[34:36] = labels[38:40] = labels[42:44] = labels[46:48] = 0  # ... and of none
    found, _ = evaluate(arrays, rule, Task(("normal", "one", "two")))
    assert found["summary"]["test"]["several_classes"] == 6
    # (0.5, 0.4), (0.1, 0.8) -> class 1 of 12; (0.2, 0.2, 0.6), (0.1, 0.6, 0.3) -> 0.45 for class 2 of 6
    assert found["summary"]["test"]["confusion"] == [[0, 0, 5], [0, 12, 0], [0, 0, 1]]


def test_guarantee_by_study_holds():
    """In at most 10% of draws (and 3 standard errors) the true recall of studies is below the floor; by the
    thresholds of images it would be another one."""
    rng, floor, confidence, draws = np.random.default_rng(5), 0.9, 0.9, 150

    def draw(count):
        """Sick studies: the highest of one to four images that share the severity of their study."""
        sizes = rng.integers(1, 5, count)
        study = np.repeat(np.arange(count), sizes)
        odds = np.repeat(rng.normal(1, 1, count), sizes) + rng.normal(0, 0.7, len(study))
        files = study.astype(str) + "-" + np.arange(len(study)).astype(str)
        units = grouped(files, study.astype(str), study.astype(str), "study")
        return units.scores(1 / (1 + np.exp(-odds)))

    everybody, broken = draw(20_000), 0
    for _ in range(draws):
        sick, well = draw(60), 0.3 * rng.random(30)
        y, p = np.repeat([1, 0], [60, 30]), np.concatenate([sick, well])
        threshold = choose_threshold_with_guarantee(y, p, floor, confidence, np.arange(90))[0]
        broken += (everybody >= threshold).mean() < floor
    chance = 1 - confidence
    assert broken / draws <= chance + 3 * (chance * (1 - chance) / draws) ** 0.5


# ---------------------------------------------------------------- through the command lines


def test_calibrate_by_patient(own_runs):
    folder = own_runs / "outputs" / "linear"
    flags = ("--run", folder, "--min-recall", 0.9, "--bootstrap", 200)
    done = succeed("calibrate", *flags, "--by", "patient", cwd=own_runs)
    calibration = read_json(folder, "calibration.json")
    assert (calibration["by"], calibration["pool"]) == ("patient", "max")
    arrays = np.load(folder / "scores.npz")
    found = of_one(calibration)
    for side in ("val", "test"):
        truth, scores = arrays[f"{side}_labels"].tolist(), arrays[f"{side}_p1"].tolist()
        expected = by_hand(arrays[f"{side}_patients"].tolist(), scores, truth, "max")
        p, y = np.array(list(expected.values())).T
        row = found[side]["at_rec"]
        counts = counts_at_threshold(y.astype(int), p, found["threshold"])
        assert counts == {key: row[key] for key in ("tp", "fp", "tn", "fn")}
    assert "patients with it" in done.out and "by patient (max)" in done.out
    images = len(arrays["val_files"])
    assert f"validation: {images} images are {len(set(arrays['val_patients'].tolist()))} patients" in done.out
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[-5:] == ["truth", "score", "patient_truth", "patient_score", "patient_decision@Rec"]
    of_patient = {}
    for row in rows:
        of_patient.setdefault((row["side"], row["patient"]), set()).add(row["patient_decision@Rec"])
    assert all(len(decisions) == 1 for decisions in of_patient.values())


def test_a_verdict_by_patient_counts_the_patients_of_the_table(own_runs, synthetic, tmp_path):
    """40 images of two people, as the table says, are two patients: too few for a verdict."""
    succeed("calibrate", "--run", "outputs/linear", "--by", "patient", "--bootstrap", 100, cwd=own_runs)
    images, rows = sorted((synthetic / "test").rglob("*.jpeg"))[:40], ["path,patient"]
    for i, image in enumerate(images):
        (tmp_path / "scans").mkdir(exist_ok=True)
        shutil.copy(image, tmp_path / f"scans/scan{i:03}.jpeg")
        rows.append(f"scan{i:03}.jpeg,{'AB'[i % 2]}")
    (tmp_path / "who.csv").write_text("\n".join(rows))
    argv = ("predict", tmp_path / "scans", "--run", "outputs/linear", "--summary", tmp_path / "s.json")
    done = succeed(*argv, "--patients", tmp_path / "who.csv", cwd=own_runs)
    assert "40 images are 2 patients" in done.err and "one image of each patient" in done.err
    assert read_json(tmp_path / "s.json")["patients"] == 2
    assert read_json(tmp_path / "s.json")["verdict"] == "few"
    succeed(*argv, cwd=own_runs)
    assert read_json(tmp_path / "s.json")["patients"] == 40
    # As in training, a table that lists one image of a patient names the others, too.
    for i in (1, 2, 3):
        shutil.copy(images[i], tmp_path / f"scans/person7_virus_{i}.jpeg")
    (tmp_path / "who.csv").write_text("path,patient\nperson7_virus_1.jpeg,A")
    done = succeed(*argv, "--patients", tmp_path / "who.csv", cwd=own_runs)
    assert "43 images are 41 patients" in done.err


def test_by_study_needs_studies(own_runs):
    run = ("--run", "outputs/linear")
    refused(cli("calibrate", *run, "--by", "study", cwd=own_runs), "StudyInstanceUID", "--by patient")
    refused(cli("calibrate", *run, "--pool", "mean", cwd=own_runs), "--by study")


def test_damaged_unit_is_found(own_runs):
    path = own_runs / "outputs" / "linear" / "calibration.json"
    calibration = json.loads(path.read_text())
    path.write_text(json.dumps(calibration | {"by": "hospital"}))
    refused(cli("compare", "--run", path.parent, cwd=own_runs), "calibration.json is damaged (by)")


def test_words_of_units():
    calibration = {"by": "study", "pool": "mean"}
    assert (
        pooling.title_of(calibration) == ", by study (mean)" and pooling.plural_of(calibration) == "studies"
    )
    assert pooling.title_of({}) == "" and pooling.plural_of({}) == "images"


def test_report_by_patient(own_runs):
    """The report pools as calibrate.py did; runs of different units are in sections of their own."""
    flags = ("--min-recall", 0.9, "--bootstrap", 100, "--by", "patient")
    succeed("calibrate", *flags, "--run", "outputs/linear", "outputs/scratch", cwd=own_runs)
    groups = load_entries(own_runs / "outputs")
    by_unit = {entries[0].unit: [e.run.folder.name for e in entries] for entries in groups}
    assert by_unit == {"patients": ["linear", "scratch"], "images": ["pretrained"]}
    linear = groups[[e[0].unit for e in groups].index("patients")][0]
    column = linear.column("PNEUMONIA", "test")
    row = linear.row("PNEUMONIA", "test", "at_rec")
    counts = counts_at_threshold(column.truth, column.scores, row["thr"])
    assert counts == {key: row[key] for key in ("tp", "fp", "tn", "fn")}
    assert column.patients_known and len(set(column.patients.tolist())) == len(column.patients)
    assert linear.name == "Logistic regression 32x32 px [SYNTHETIC], by patient (max)"
    report = succeed("compare", cwd=own_runs).out
    assert "by patient (max)" in report and f"Test: {len(column.truth)} patients (" in report


def test_a_study_has_the_patient_that_any_of_its_images_names():
    """Two studies of each of thirty patients, whose first images name nobody: thirty patients, not sixty."""
    files = np.array([f"{s}-{i}" for s in range(60) for i in range(2)])
    studies = np.array([f"s{s}" for s in range(60) for _ in range(2)])
    patients = np.array([files[2 * s + i] if i == 0 else f"p{s // 2}" for s in range(60) for i in range(2)])
    units = grouped(files, patients, studies, "study")
    assert len(units) == 60 and len(set(units.whose.tolist())) == 30
    y, p = np.ones(61, int), np.linspace(0.1, 0.9, 61)
    y[60] = 0
    with pytest.raises(InputError, match="30 independent positives"):
        choose_threshold_with_guarantee(y, p, 0.95, 0.95, np.append(units.whose, "healthy"))


def test_patients_of_several_classes_are_counted_on_the_console(capsys):
    figure = {"value": 0.7, "lo": 0.6, "hi": 0.8}
    wording.show_summary("test", {"accuracy": figure, "several_classes": 32, "findings": ["a", "b"]})
    assert "without the 32 whose images are of several classes" in capsys.readouterr().out
    wording.show_summary("test", {"accuracy": figure, "several_classes": 0, "findings": ["a", "b"]})
    assert "without" not in capsys.readouterr().out
