"""Tests of betting and monitor: closed forms against integration, promises by simulation."""

import csv
import io
import json
from pathlib import Path

import mpmath
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import binom

import monitor
from common.task import Task
from monitoring import log as log_module
from monitoring import sequential
from tests.shared import cli, of_one, read_json, refused, succeed


def test_capital_is_the_average_likelihood_ratio():
    """Against numerical integration."""
    for hits, misses, floor in ((0, 0, 0.95), (3, 2, 0.95), (40, 9, 0.9), (5, 0, 0.2), (200, 1, 0.95)):
        low = max(0.0, floor - sequential.WIDTH)
        ratio = lambda r: (r / floor) ** hits * ((1 - r) / (1 - floor)) ** misses  # noqa: B023, E731
        expected = quad(ratio, low, floor)[0] / (floor - low)
        assert sequential.log_capital(hits, misses, floor) == pytest.approx(np.log(expected), abs=1e-6)


def log_average_ratio(hits, misses, floor):
    """Log of the average likelihood ratio, to 30 digits: what is integrated has its maximum 1 at `top`."""
    with mpmath.workdps(30):
        low, floor = max(mpmath.mpf(0), mpmath.mpf(floor) - mpmath.mpf("0.25")), mpmath.mpf(floor)
        count = hits + misses
        top = min(max(mpmath.mpf(hits) / max(count, 1), low), floor)

        def log_likelihood(r):
            return (hits * mpmath.log(r) if hits else 0) + (misses * mpmath.log(1 - r) if misses else 0)

        # Nine pieces around the maximum: in units of its width inside, of the slope at an end.
        slope = abs(hits / top - misses / (1 - top)) if top else mpmath.mpf(misses)
        width = 1 / (slope + mpmath.sqrt(count / (top * (1 - top)) if top else 1))
        edges = {low, top, floor}
        for units in (3, 12, 50, 250):
            edges |= {max(low, top - units * width), min(floor, top + units * width)}
        pieces = sorted(edges)
        total = mpmath.quad(lambda r: mpmath.exp(log_likelihood(r) - log_likelihood(top)), pieces)
        beyond = log_likelihood(top) - hits * mpmath.log(floor) - misses * mpmath.log(1 - floor)
        return float(mpmath.log(total / (floor - low)) + beyond)


@pytest.mark.parametrize("floor", [0.2, 0.8, 0.95, 0.999])
def test_capital_to_a_million_patients(floor):
    """All found, all missed, and shares just above and below the floor and the gambler's interval."""
    for count in (1, 300, 4000, 10**6):
        shares = (1, 1 - 1e-4, floor + 3e-4, floor, floor - 0.01, 0.6, 0.01, 0)
        hits = np.array([round(count * min(1, share)) for share in shares])
        expected = [log_average_ratio(int(h), int(count - h), floor) for h in hits]
        found = sequential.log_capital(hits, count - hits, floor)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-7), count


def test_a_perfect_recall_is_never_refuted():
    """The capital goes to 0; posterior masses below 1e-300 were taken for 1e-300."""
    assert sequential.refuted_at(np.ones(4000, int), 0.8) is None
    assert sequential.refuted_at(np.ones(10**6, bool), 0.95) is None
    counts = np.array([10, 10**3, 13_685, 10**5, 10**6])
    for floor in (0.2, 0.8, 0.95, 0.999):
        capital = sequential.log_capital(counts, 0 * counts, floor)
        assert (np.diff(capital) < 0).all() and capital[-1] < -10
    one_in_a_thousand = np.arange(10**5) % 1000 > 0  # recall 0.999, far above the floor
    assert sequential.refuted_at(one_in_a_thousand, 0.95) is None
    assert sequential.refuted_at(np.zeros(10**5, bool), 0.95) == 3  # three misses at 0.05 each are too odd


def test_refuted_only_after_a_miss_as_when_looked_at_after_every_outcome():
    rng = np.random.default_rng(3)
    for recall in (0.7, 0.85, 0.9, 0.95):
        outcomes = rng.random(800) < recall
        hits = np.cumsum(outcomes)
        every = sequential.log_capital(hits, np.arange(1, 801) - hits, 0.95) >= np.log(20)
        first = int(np.argmax(every)) + 1 if every.any() else None
        assert sequential.refuted_at(outcomes, 0.95) == first


@pytest.mark.parametrize("floor, chance", [(0.95, 0.9), (0.9, 0.8), (0.5, 0.3)])
def test_noticed_after_is_the_median_of_simulated_hospitals(floor, chance):
    """The share refuted by then, of 600 hospitals, is a half, give or take what 600 draws allow."""
    usual, rng = sequential.noticed_after(chance, floor), np.random.default_rng(7)
    found = [sequential.refuted_at(rng.random(usual) < chance, floor) for _ in range(600)]
    assert binom.ppf(0.001, 600, 0.5) <= sum(f is not None for f in found)
    earlier = sum(f is not None and f < usual - usual // 4 for f in found)
    assert earlier < binom.ppf(0.001, 600, 0.5)
    assert sequential.noticed_after(chance, floor, most=usual - 1) is None


@pytest.mark.parametrize("recall", [0.95, 0.97, 1.0])
def test_false_alarms_for_ever(recall):
    """At the floor or above it, at most 5% of 400 hospitals are ever alarmed in 1,500 sick patients."""
    rng = np.random.default_rng(0)
    alarms = sum(sequential.refuted_at(rng.random(1500) < recall, 0.95) is not None for _ in range(400))
    assert alarms <= binom.ppf(0.999, 400, sequential.ALPHA)
    assert recall == 0.95 or alarms <= 4


def test_falling_recall_is_noticed_the_sooner_the_lower_it_is():
    rng, delays = np.random.default_rng(0), []
    for recall in (0.9, 0.85, 0.8):
        found = [sequential.refuted_at(rng.random(2000) < recall, 0.95) for _ in range(100)]
        assert None not in found
        delays.append(np.median(found))
    assert delays[0] > delays[1] > delays[2] and delays[0] < 400 and delays[2] < 60


def test_refuted_is_the_first_time_the_capital_is_enough():
    outcomes = [1, 1, 0, 0, 0, 0, 1, 1, 1]
    n = sequential.refuted_at(outcomes, 0.95)
    assert sequential.log_capital(2, n - 2, 0.95) >= np.log(20) > sequential.log_capital(2, n - 3, 0.95)
    assert sequential.refuted_at([1] * 50, 0.95) is None and sequential.refuted_at([], 0.95) is None


def confidence_sequence(outcomes):
    """sequential.confidence_interval after each of n outcomes: [n, 2]."""
    hits = np.cumsum(outcomes)
    return sequential.confidence_interval(hits, np.arange(1, len(hits) + 1) - hits)


@pytest.mark.parametrize("chance", [0.6, 0.95])
def test_confidence_sequences_hold_at_all_times(chance):
    rng, missed = np.random.default_rng(1), 0
    for _ in range(200):
        band = confidence_sequence(rng.random(300) < chance)
        missed += not ((band[:, 0] <= chance) & (chance <= band[:, 1])).all()
    assert missed <= binom.ppf(0.999, 200, sequential.ALPHA)
    assert band[-1, 1] - band[-1, 0] < 0.2


def test_confidence_sequence_by_hand():
    """A chance is left out once Beta(1/2, 1/2)'s average likelihood is 20 times its own."""
    outcomes = [1, 0, 1, 1, 1, 1, 1, 1]
    low, high = confidence_sequence(outcomes)[-1]
    average = quad(lambda r: r**6.5 * (1 - r) ** 0.5 / np.pi, 0, 1)[0]
    for m in (low + 1e-6, high - 1e-6, low - 1e-6, high + 1e-6):
        refuted = not 0 < m < 1 or average / (m**7 * (1 - m)) >= 20
        assert refuted == (not low < m < high)


@pytest.mark.parametrize("count", [1, 20_000, 10**6])
def test_confidence_sequences_at_both_ends(count):
    """All found: m is left out once the average of r^n is 20 m^n. The 20,000 gave NaN. All missed: the mirror
    image. One miss: against mpmath's root."""
    with mpmath.workdps(40):
        n, ends = mpmath.mpf(count), []
        average = mpmath.beta(n + mpmath.mpf(1) / 2, mpmath.mpf(1) / 2) / mpmath.pi
        lowest = (average / 20) ** (1 / n)
        one = mpmath.log(mpmath.beta(n + mpmath.mpf(1) / 2, mpmath.mpf(3) / 2) / mpmath.pi / 20)
        if count > 1:
            ends = [
                mpmath.findroot(
                    lambda m: n * mpmath.log(m) + mpmath.log(1 - m) - one, start, solver="anderson"
                )
                for start in ((1 - 30 / n, 1 - 1 / n), (1 - mpmath.mpf("0.9") / n, 1 - mpmath.mpf(10) ** -12))
            ]
    found = sequential.confidence_interval([count, 0, count], [0, count, 1])
    assert found[0] == pytest.approx([float(lowest), 1], abs=1e-12) and found[0][1] == 1
    assert found[1] == pytest.approx([0, 1 - float(lowest)], abs=1e-12) and found[1][0] == 0
    assert not ends or found[2] == pytest.approx([float(end) for end in ends], abs=1e-12)
    assert confidence_sequence(np.ones(min(count, 20_000), int))[-1][1] == 1


# ---------------------------------------------------------------- the script


def log_of(path, rows, head="path,score,diagnosis"):
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


def test_monitor_counts_patients_and_raises_the_alarm(own_runs, tmp_path, pictures_drawn):
    thr = of_one(read_json(own_runs, "outputs/linear/calibration.json"))["threshold"]
    above, below = f"{min(1, thr + 1e-9)}", f"{max(0, thr - 1e-6)}"
    rows = [f"a{i}.png,{above},PNEUMONIA,p{i // 2},2026-01-{i + 1:02d}" for i in range(20)]
    rows += [f"b{i}.png,{below},normal,q{i},2026-02-01" for i in range(30)]
    head = "path,score,diagnosis,patient,time"
    argv = ("monitor", "--run", "outputs/linear", "--min-recall", 0.95)
    done = succeed(*argv, log_of(tmp_path / "log.csv", rows, head), cwd=own_runs)
    assert "recall      1.000" in done.out and "of 10 patients with PNEUMONIA" in done.out
    assert "of 30 patients without PNEUMONIA" in done.out and "10 further images" in done.out
    assert "not refuted so far" in done.err
    renamed = [row.replace(",PNEUMONIA,", ",1.0,").replace(",normal,", ",0.0,") for row in rows]
    again = succeed(
        *argv, log_of(tmp_path / "log.csv", renamed, "Path,SCORE,Diagnosis,Patient,Time"), cwd=own_runs
    )
    assert again.out == done.out and again.err == done.err
    assert "cannot tell yet" in done.err and "count as a patient each" not in done.err
    assert (own_runs / "outputs/linear/monitor/log-validation.png").stat().st_size > 10_000
    named = [f"x/person{i // 2}_virus_{i}.jpeg,{above},1" for i in range(6)]
    done = succeed(*argv, log_of(tmp_path / "names.csv", named), cwd=own_runs)
    assert "of 3 patients with PNEUMONIA" in done.out  # as the file names tell
    assert "count as a patient each" not in done.err
    drawn = sorted(path.name for path in (own_runs / "outputs/linear/monitor").iterdir())
    assert drawn == ["log-validation.png", "names-validation.png"]  # each log has a picture of its own
    rows += [f"c{i}.png,{below},1,r{i},2026-03-01" for i in range(8)]
    done = cli(*argv, log_of(tmp_path / "log.csv", rows, head), cwd=own_runs)
    assert done.code == 3 and "ALARM: recall >= 0.95 was refuted at patient" in done.err
    number = int(done.err.split("at patient ")[1].split()[0])
    assert number == sequential.refuted_at([1] * 10 + [0] * 8, 0.95)


@pytest.mark.parametrize(
    "rows, head, words",
    [
        (["a,0.5,NORMAL"], "path,score,truth", ["no column diagnosis"]),
        (["a,0.5,NORMAL", "b,nan,NORMAL"], None, ["row 3", "'nan' is no probability"]),
        (["a,1.5,NORMAL"], None, ["row 2", "no probability"]),
        (["a,,NORMAL"], None, ["row 2", "no probability"]),
        (["a,0.5,EDEMA"], None, ["row 2", "'EDEMA' is not one of", "pneumonia"]),
        (["a,0.5,NORMAL", "a,0.6,NORMAL"], None, ["row 3", "a is there twice"]),
        ([",0.5,NORMAL"], None, ["row 2", "path is empty"]),
        (["a,0.5,1,2026-02-01", "b,0.5,1,2026-01-01"], "path,score,diagnosis,time", ["row 3", "sort"]),
        (["a,0.5,1,2026-02-01", "b,0.5,1,2026-01-01"], "Path,Score,Diagnosis,Time", ["row 3", "sort"]),
        (["a,0.5,1,8.68687E+37"], "path,score,diagnosis,patient", ["row 2", "8.68687E+37", "rounded"]),
    ],
)
def test_wrong_logs(own_runs, tmp_path, rows, head, words):
    log = log_of(tmp_path / "log.csv", rows, head or "path,score,diagnosis")
    done = cli("monitor", "--run", "outputs/linear", log, cwd=own_runs)
    assert done.code == 2 and all(word in done.err for word in words) and "Traceback" not in done.err


def test_monitor_needs_a_threshold(own_runs, tmp_path):
    log = log_of(tmp_path / "log.csv", ["a,0.5,NORMAL"])
    argv = ("monitor", "--run", "outputs/linear", log)
    for more, word in (
        (("--site", "x"), "no thresholds for the site 'x'"),
        (("--point", "mean"), "no threshold @Mean"),
        (("--finding", "EDEMA"), "--finding EDEMA is not one of PNEUMONIA"),
        (("--min-recall", 1), "--min-recall"),
    ):
        done = cli(*argv, *more, cwd=own_runs)
        assert done.code == 2 and word in done.err
    assert cli("monitor", "--run", "outputs/linear", tmp_path / "no.csv", cwd=own_runs).code == 2


def test_monitor_takes_the_thresholds_of_augmented_views(own_runs, tmp_path):
    folder = own_runs / "outputs/linear"
    plain = of_one(read_json(folder, "calibration.json"))["threshold"]
    argv = ("monitor", "--run", "outputs/linear", "--min-recall", 0.95)
    log = log_of(tmp_path / "log.csv", [f"a{i}.png,{plain},PNEUMONIA" for i in range(2)])
    done = cli(*argv, "--tta", log, cwd=own_runs)
    assert done.code == 2 and "run python calibrate.py --tta first" in done.err
    succeed("calibrate", "--run", "outputs/linear", "--tta", "--bootstrap", 100, cwd=own_runs)
    changed = read_json(folder, "calibration-tta.json")
    of_one(changed)["threshold"] = min(1, plain + 1e-6)  # so that the two cannot be mistaken for one another
    (folder / "calibration-tta.json").write_text(json.dumps(changed))
    assert "recall      1.000" in succeed(*argv, log, cwd=own_runs).out
    done = succeed(*argv, "--tta", log, cwd=own_runs)
    assert "linear with TTA" in done.out and "recall      0.000" in done.out
    assert (folder / "monitor/log-validation-tta.png").exists()
    assert (folder / "monitor/log-validation.png").exists()


def test_images_that_count_as_patients_are_counted(own_runs, tmp_path, monkeypatch):
    """Three alike images a patient are no three patients: without a column that tells, it is said."""
    monkeypatch.setattr(monitor, "draw", lambda *about: None)
    argv = ("monitor", "--run", "outputs/linear")
    rows = [f"clinic/{i}.png,1.0,1" for i in range(6)] + ["x/person1_virus_2.jpeg,1.0,1"]
    done = succeed(*argv, log_of(tmp_path / "log.csv", rows), cwd=own_runs)
    assert "note: 6 of 7 images count as a patient each" in done.err and "has no column patient" in done.err
    rows = [f"{i}.png,1.0,1,{'' if i < 2 else 'p'}" for i in range(7)]
    done = succeed(*argv, log_of(tmp_path / "log.csv", rows, "path,score,diagnosis,patient"), cwd=own_runs)
    assert "note: 2 of 7 images count as a patient each: the column patient is empty there" in done.err
    assert "of 3 patients with PNEUMONIA" in done.out and "4 further images left out" in done.out


def test_a_monitor_that_cannot_tell_yet_says_so(own_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "draw", lambda *about: None)
    argv = ("monitor", "--run", "outputs/linear", "--min-recall", 0.95)
    usual = sequential.noticed_after(0.9, 0.95)
    for patients in (60, usual - 1, usual):
        rows = [f"person{i}_virus_1.jpeg,1.0,1" for i in range(patients)]
        done = succeed(*argv, log_of(tmp_path / "log.csv", rows), cwd=own_runs)
        text = f"note: {patients} patients with PNEUMONIA cannot tell yet: a recall of 0.90 would be noticed"
        assert (text in done.err) == (patients < usual) and "not refuted so far" in done.err
        assert (f"after about {usual} of them" in done.err) == (patients < usual)


def test_monitor_reads_what_predict_writes(own_runs, synthetic, tmp_path):
    """With a column diagnosis beside it: the score is p_pneumonia, an unreadable file and one whose diagnosis
    is not known yet are passed over."""
    (tmp_path / "bad.png").write_text("no image")
    folder = synthetic / "test"
    written = cli("predict", folder, "bad.png", "--run", "outputs/linear", cwd=own_runs).out
    rows = list(csv.DictReader(io.StringIO(written)))
    truth = [Path(row["path"]).parent.name if row["path"] != "bad.png" else "1" for row in rows]
    waits = next(i for i, row in enumerate(rows) if "IM-" in row["path"])
    truth[waits] = ""
    with open(tmp_path / "clinic march.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "diagnosis"])
        writer.writeheader()
        writer.writerows({**row, "diagnosis": word} for row, word in zip(rows, truth))
    done = succeed("monitor", "--run", "outputs/linear", tmp_path / "clinic march.csv", cwd=own_runs)
    sick = {}  # the first image of each sick patient
    for row, word in zip(rows, truth):
        if word == "PNEUMONIA":
            sick.setdefault(Path(row["path"]).name.split("_")[0], row["decision@Rec"] == "PNEUMONIA")
    assert f"recall      {np.mean(list(sick.values())):.3f} " in done.out
    assert f"of {len(sick)} patients with PNEUMONIA" in done.out and "column p_pneumonia" in done.out
    assert "passed over, without a diagnosis yet: 1 rows" in done.err
    assert "passed over, without a score (unreadable files?): 1 rows" in done.err
    assert (own_runs / "outputs/linear/monitor/clinic march-validation.png").exists()
    log = log_of(tmp_path / "x.csv", ["a,1"], "path,x")
    done = cli("monitor", "--run", "outputs/linear", log, cwd=own_runs)
    refused(done, "no column p_pneumonia (nor score) and diagnosis; it has path, x")


def test_of_several_findings_the_column_is_that_of_the_finding(tmp_path):
    """Each finding has its column and its words; of several classes all others are its absence."""
    task = Task(("Normal", "COVID", "Viral Pneumonia"))
    assert task.column_words == ["any_disease", "covid", "viral_pneumonia"]
    assert log_module.truths(task, "COVID") == (
        ["no covid", "0", "0.0", "normal", "viral pneumonia"],
        ["covid", "1", "1.0"],
    )
    absent, present = log_module.truths(task, "any disease")
    assert absent == ["no any disease", "0", "0.0", "normal"]
    assert present == ["any disease", "1", "1.0", "covid", "viral pneumonia"]
    several = Task(("Edema", "edema"), "sigmoid")
    assert several.column_words == ["Edema", "edema"]  # no two columns of one name
    log = log_of(
        tmp_path / "a.csv",
        ["a,0.9,0.1,Normal", "b,0.1,0.9,COVID", "c,0.9,0.2,Viral Pneumonia"],
        "path,p_any_disease,p_covid,diagnosis",
    )
    found = log_module.read_log(log, 0.5, log_module.truths(task, "COVID"), "p_covid")
    assert found.sick.tolist() == [False, True, False] == found.called.tolist() and found.score == "p_covid"
    found = log_module.read_log(log, 0.5, log_module.truths(task, "any disease"), "p_any_disease")
    assert found.sick.tolist() == [False, True, True] and found.called.tolist() == [True, False, True]


def test_rows_that_were_decided_at_another_threshold_are_counted(own_runs, tmp_path, monkeypatch):
    """By hand or at a site: the log says at which threshold, and monitor.py watches the run's own."""
    monkeypatch.setattr(monitor, "draw", lambda *about: None)
    at = of_one(read_json(own_runs, "outputs/linear/calibration.json"))["threshold"]
    argv, head = ("monitor", "--run", "outputs/linear"), "path,score,diagnosis,threshold"
    logs = {
        "@hand": (["a,1,1,0.97", "b,1,1,0.97", "c,1,0,0.8"], "3 of 3 rows", "(0.97, 0.8)"),
        "@Rec": (["a,1,1,0.97", f"b,1,1,{at!r}", "c,1,0,"], "1 of 2 rows", "(0.97)"),
        "@hand,threshold@rec": ([f"a,1,1,,{at!r}", "b,1,1,0.97,"], "1 of 2 rows", "(0.97)"),
    }
    for columns, (rows, counted, values) in logs.items():
        done = succeed(*argv, log_of(tmp_path / "log.csv", rows, head + columns), cwd=own_runs)
        text = f"note: {counted} were decided at another threshold {values}: what is watched is {at:.6g}"
        assert done.err.count(text) == 1, done.err
    for columns, rows in (("@Rec", [f"a,1,1,{at!r}"]), ("@0.5", ["a,1,1,0.5"]), ("@Guar", ["a,1,1,0.1"])):
        done = succeed(*argv, log_of(tmp_path / "log.csv", rows, head + columns), cwd=own_runs)
        assert "another threshold" not in done.err
    log = log_of(tmp_path / "log.csv", ["a,1,1,high"], head + "@hand")
    refused(cli(*argv, log, cwd=own_runs), "row 2: threshold@hand 'high' is no number")


def test_threshold_columns_are_those_of_predict():
    """Of each finding and point, by image and by study, as task.Decision names them."""
    for classes in (("NORMAL", "PNEUMONIA"), ("Normal", "COVID", "Viral Pneumonia")):
        task = Task(classes)
        for decision in task.decisions(dict.fromkeys(task.findings, 0.3), 0.2 if task.alone else None):
            finding, point = decision.finding, decision.point
            assert log_module.threshold_columns(task, finding, point)[0] == decision.threshold_column
            by_study = log_module.threshold_columns(task, finding, point, "study")
            assert by_study[0] == f"study_{decision.threshold_column}"
    triage = task.triage({name: {"threshold": 0.3, "rule_in": {"threshold": 0.6}} for name in task.findings})
    found = [log_module.threshold_columns(task, t.finding, "@In")[0] for t in triage]
    assert found == [t.threshold_column for t in triage]
    assert log_module.threshold_columns(task, "COVID", None) == ["threshold@hand_covid"]


def test_without_a_sick_patient_no_recall_was_watched(own_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "draw", lambda *about: None)
    log = log_of(tmp_path / "log.csv", ["a,0.1,NORMAL", "b,0.2,NORMAL"])
    done = succeed("monitor", "--run", "outputs/linear", "--min-recall", 0.95, log, cwd=own_runs)
    said = "note: no patient with PNEUMONIA has been seen, so recall >= 0.95 was not watched"
    assert said in done.err and "not refuted" not in done.err and "cannot tell yet" not in done.err
