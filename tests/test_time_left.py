"""Tests of what long work says of the time that remains, by a clock that the tests move."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from calibration import intervals, operating_point
from common import console
from common.console import Pace, TimeLeft, in_minutes
from tests.shared import succeed
from training import loop as loop_module

STEP, END = 30.0, 600.0  # seconds of a step and of a validation, by the tests' clock


class Clock:
    """Stands in for the module `time`: time passes only when `pass_time` says so."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def perf_counter(self):
        return self.now

    def pass_time(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    monkeypatch.setattr(loop_module, "time", clock)
    return clock


def seconds_of(text):
    """ "1 h 40 min" -> 6000."""
    hours = re.search(r"(\d+) h", text)
    minutes = re.search(r"([\d.]+) min", text)
    return 3600 * int(hours[1] if hours else 0) + 60 * float(minutes[1])


def test_times_in_words():
    found = [in_minutes(seconds) for seconds in (0, 138, 599, 720, 3599, 3600, 6000, 86400)]
    assert found == [
        "0.0 min",
        "2.3 min",
        "10.0 min",
        "12 min",
        "1 h 0 min",
        "1 h 0 min",
        "1 h 40 min",
        "24 h 0 min",
    ]


def test_training_says_what_remains_of_all_epochs_and_seeds(flags, tmp_path, clock, monkeypatch):
    """Against the simulated end of each run and of the command. The first epoch knows no validation yet."""
    told, ends, real = [], [], loop_module.predict_together
    real_step, real_epochs = loop_module.Loop._add_gradient, loop_module.Loop._epochs

    def step(self, *arguments):
        clock.pass_time(STEP)
        real_step(self, *arguments)

    def validate(*arguments):
        clock.pass_time(END)
        return real(*arguments)

    def say(message):
        told.append((clock.now, str(message)))

    monkeypatch.setattr(loop_module.Loop, "_add_gradient", step)
    monkeypatch.setattr(loop_module, "predict_together", validate)

    def epochs(self, *arguments):
        real_epochs(self, *arguments)
        ends.append(clock.now)

    monkeypatch.setattr(loop_module.Loop, "_epochs", epochs)
    monkeypatch.setattr(console, "say", say)
    argv = ("--epochs", 3, "--seeds", 0, 1, "--batch-size", 8)
    succeed("train_scratch", *flags, *argv, cwd=tmp_path)
    lines = [(now, text) for now, text in told if text.startswith("epoch ")]
    of_seed = {
        end: [line for line in lines if start < line[0] <= end] for start, end in zip([0, ends[0]], ends)
    }
    for number, (end, own) in enumerate(of_seed.items()):
        assert {text[:9] for _, text in own} == {"epoch 1/3", "epoch 2/3", "epoch 3/3"}
        for now, text in own:
            unknown = 3 * END if text.startswith("epoch 1") else 0  # validations of this run
            assert text.endswith(", without validation") == bool(unknown)
            left = re.search(r": (at most )?([^:]*) left", text)
            assert seconds_of(left[2]) == pytest.approx(end - now - unknown, abs=31)
            whole = re.search(r"left, (.*) for all 2 seeds", text)
            assert bool(whole) == (number == 0)
            if whole:
                assert seconds_of(whole[1]) == pytest.approx(ends[-1] - now - 2 * unknown, abs=31)


def test_a_stage_that_ends_says_nothing_of_what_follows(clock):
    """A frozen stem for 2 epochs of 4: the steps after it take another time."""
    left = TimeLeft(10, 40, seeds=3, following=2, may_end=True)
    left.begin_stage(2)
    left.begin()
    for _ in range(5):
        clock.pass_time(60)
        left.end_step()
    assert left.text(300, 0) == "at most 15 min left of this stage, without validation"
    clock.pass_time(600)
    left.end_epoch()
    assert left.text(0, 1) == "at most 10 min left of this stage"
    left.begin_stage(None)
    left.begin()
    clock.pass_time(120)
    left.end_step()
    assert left.text(18 * 60, 2) == ("at most 38 min left, 3 h 18 min for all 3 seeds, without validation")


def test_a_run_cut_short_by_steps_counts_those_alone(clock):
    """25 steps in epochs of 10: 3 validations, the last epoch of 5 steps; what comes before the epochs counts
    for the seeds that follow."""
    left = TimeLeft(10, 25, seeds=2, following=1, around=(1200, 0))
    left.begin()
    clock.pass_time(60)
    left.end_step()
    clock.pass_time(120)
    left.end_epoch()
    # This run: 9 + 15 steps and 3 validations; the other: 20 minutes, 25 steps and 3 validations.
    assert left.text(9 * 60, 0) == "30 min left, 1 h 21 min for all 2 seeds"


def test_a_bar_shows_the_whole_too(clock, monkeypatch):
    shown = []
    bar = SimpleNamespace(
        set_postfix_str=lambda text, refresh: shown.append(text), update=clock.pass_time, close=lambda: None
    )
    monkeypatch.setattr(console.sys, "stderr", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setitem(console.sys.modules, "tqdm", SimpleNamespace(tqdm=lambda **settings: bar))
    for _ in console.progress(
        range(3), 3, "epoch 1/2", status=lambda: "loss 0.5", left=lambda rest: f"{rest:.0f} s"
    ):
        clock.pass_time(9)
    assert shown == ["loss 0.5, 18 s", "loss 0.5, 10 s", "loss 0.5, 0 s"]


def test_a_long_bootstrap_says_how_far_it_is(monkeypatch, capsys):
    """Draws are counted as they come; the intervals are those of a silent one."""
    rng = np.random.default_rng(0)
    y, p = np.arange(40) % 2, rng.random(40)
    side = operating_point.Side(y, p, p, p, np.arange(40), np.ones(40, bool))
    rule = operating_point.Rule(bootstrap=50)
    quiet, _ = operating_point.summarize(side, side.patients, {"at_0.5": 0.5}, rule)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(operating_point, "LONG", 1000)
    monkeypatch.setattr(intervals, "BLOCK", 400)
    monkeypatch.setattr(console, "Pace", lambda: Pace(every=-1))
    told, _ = operating_point.summarize(side, side.patients, {"at_0.5": 0.5}, rule)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in lines] == [f" {done} of 50 draws" for done in (10, 20, 30, 40, 50)]
    assert told == quiet
