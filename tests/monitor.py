"""Tests of betting and monitor: closed forms against integration, promises by simulation."""

import json

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import binom

import betting
from tests.shared import cli, succeed


def test_capital_is_the_average_likelihood_ratio():
    """Against numerical integration."""
    for hits, misses, floor in ((0, 0, 0.95), (3, 2, 0.95), (40, 9, 0.9), (5, 0, 0.2), (200, 1, 0.95)):
        low = max(0.0, floor - betting.WIDTH)
        ratio = lambda r: (r / floor) ** hits * ((1 - r) / (1 - floor)) ** misses  # noqa: B023, E731
        expected = quad(ratio, low, floor)[0] / (floor - low)
        assert betting.log_capital(hits, misses, floor) == pytest.approx(np.log(expected), abs=1e-6)


@pytest.mark.parametrize("recall", [0.95, 0.97, 1.0])
def test_false_alarms_for_ever(recall):
    """At the floor or above it, at most 5% of 400 hospitals are ever alarmed in 1,500 sick patients."""
    rng = np.random.default_rng(0)
    alarms = sum(betting.refuted_at(rng.random(1500) < recall, 0.95) is not None for _ in range(400))
    assert alarms <= binom.ppf(0.999, 400, betting.ALPHA)
    assert recall == 0.95 or alarms <= 4


def test_falling_recall_is_noticed_the_sooner_the_lower_it_is():
    rng, delays = np.random.default_rng(0), []
    for recall in (0.9, 0.85, 0.8):
        found = [betting.refuted_at(rng.random(2000) < recall, 0.95) for _ in range(100)]
        assert None not in found
        delays.append(np.median(found))
    assert delays[0] > delays[1] > delays[2] and delays[0] < 400 and delays[2] < 60


def test_refuted_is_the_first_time_the_capital_is_enough():
    outcomes = [1, 1, 0, 0, 0, 0, 1, 1, 1]
    n = betting.refuted_at(outcomes, 0.95)
    assert betting.log_capital(2, n - 2, 0.95) >= np.log(20) > betting.log_capital(2, n - 3, 0.95)
    assert betting.refuted_at([1] * 50, 0.95) is None and betting.refuted_at([], 0.95) is None


@pytest.mark.parametrize("chance", [0.6, 0.95])
def test_confidence_sequences_hold_at_all_times(chance):
    rng, missed = np.random.default_rng(1), 0
    for _ in range(200):
        band = betting.confidence_sequence(rng.random(300) < chance)
        missed += not ((band[:, 0] <= chance) & (chance <= band[:, 1])).all()
    assert missed <= binom.ppf(0.999, 200, betting.ALPHA)
    assert band[-1, 1] - band[-1, 0] < 0.2


def test_confidence_sequence_by_hand():
    """A chance is left out once Beta(1/2, 1/2)'s average likelihood is 20 times its own."""
    outcomes = [1, 0, 1, 1, 1, 1, 1, 1]
    low, high = betting.confidence_sequence(outcomes, grid=400)[-1]
    average = quad(lambda r: r**6.5 * (1 - r) ** 0.5 / np.pi, 0, 1)[0]
    for m in (low + 0.006, high - 0.006, low - 0.006, high + 0.006):
        refuted = not 0 < m < 1 or average / (m**7 * (1 - m)) >= 20
        assert refuted == (not low < m < high)


# ---------------------------------------------------------------- the script


def log_of(path, rows, head="path,score,diagnosis"):
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


def test_monitor_counts_patients_and_raises_the_alarm(own_runs, tmp_path):
    thr = json.loads((own_runs / "outputs/linear/calibration.json").read_text())["threshold"]
    above, below = f"{min(1, thr + 1e-9)}", f"{max(0, thr - 1e-6)}"
    rows = [f"a{i}.png,{above},PNEUMONIA,p{i // 2},2026-01-{i + 1:02d}" for i in range(20)]
    rows += [f"b{i}.png,{below},normal,q{i},2026-02-01" for i in range(30)]
    head = "path,score,diagnosis,patient,time"
    argv = ("monitor", "--run", "outputs/linear", "--min-recall", 0.95)
    done = succeed(*argv, log_of(tmp_path / "log.csv", rows, head), cwd=own_runs)
    assert "recall      1.000" in done.out and "of 10 patients with PNEUMONIA" in done.out
    assert "of 30 patients without PNEUMONIA" in done.out and "10 further images" in done.out
    assert "not refuted so far" in done.err
    assert (own_runs / "outputs/linear/monitor/validation.png").stat().st_size > 10_000
    named = [f"x/person{i // 2}_virus_{i}.jpeg,{above},1" for i in range(6)]
    done = succeed(*argv, log_of(tmp_path / "names.csv", named), cwd=own_runs)
    assert "of 3 patients with PNEUMONIA" in done.out  # as the file names tell
    rows += [f"c{i}.png,{below},1,r{i},2026-03-01" for i in range(8)]
    done = cli(*argv, log_of(tmp_path / "log.csv", rows, head), cwd=own_runs)
    assert done.code == 3 and "ALARM: recall >= 0.95 was refuted at patient" in done.err
    number = int(done.err.split("at patient ")[1].split()[0])
    assert number == betting.refuted_at([1] * 10 + [0] * 8, 0.95)


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
    plain = json.loads((folder / "calibration.json").read_text())["threshold"]
    argv = ("monitor", "--run", "outputs/linear", "--min-recall", 0.95)
    log = log_of(tmp_path / "log.csv", [f"a{i}.png,{plain},PNEUMONIA" for i in range(2)])
    done = cli(*argv, "--tta", log, cwd=own_runs)
    assert done.code == 2 and "run python calibrate.py --tta first" in done.err
    succeed("calibrate", "--run", "outputs/linear", "--tta", "--bootstrap", 100, cwd=own_runs)
    changed = json.loads((folder / "calibration-tta.json").read_text())
    changed["threshold"] = min(1, plain + 1e-6)  # so that the two cannot be mistaken for one another
    (folder / "calibration-tta.json").write_text(json.dumps(changed))
    assert "recall      1.000" in succeed(*argv, log, cwd=own_runs).out
    done = succeed(*argv, "--tta", log, cwd=own_runs)
    assert "linear with TTA" in done.out and "recall      0.000" in done.out
    assert (folder / "monitor/validation-tta.png").exists() and (folder / "monitor/validation.png").exists()
