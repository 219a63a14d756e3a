"""Tests of studies/time_to_quality.py."""

import numpy as np

from studies import time_to_quality as study
from tests.shared import read_json, succeed
from vit import build_vit

HISTORY = [(60.0, 0.9), (30.0, 0.96), (30.0, 0.94), (60.0, 0.98)]


def test_minutes_until_a_target_by_hand():
    """The first epoch that reaches it counts whole, and all before it."""
    assert study.minutes_until(HISTORY, 0.9) == 1.0
    assert study.minutes_until(HISTORY, 0.95) == 1.5
    assert study.minutes_until(HISTORY, 0.975) == 3.0
    assert study.minutes_until(HISTORY, 0.99) is None
    assert study.cell([1.0, 2.0]) == "1.5 (1.0 to 2.0)"
    assert study.cell([None, 2.0, 4.0]) == "3.0 (2.0 to 4.0), 2 of 3 seeds"
    assert study.cell([None, None]) == "never"


def test_the_plain_model_has_our_size():
    """torchvision's ViT and ours have the same number of parameters."""
    sizes = [dict(img_size=32), dict(img_size=64)]
    for size in sizes:
        config = study.data.DataConfig(**size)
        task = study.Task(None, None, config, study.Inputs((0.5,), (0.5,), "cpu"), None, "scratch")
        ours = build_vit("scratch", **size)
        counts = [sum(p.numel() for p in model.parameters()) for model in (ours, study.plain_model(task))]
        assert counts[0] == counts[1]


def test_time_to_quality_on_the_drawn_set(flags, tmp_path):
    """One epoch of each way: the table has their rows, and the file every epoch."""
    done = succeed("studies.time_to_quality", *flags, "--epochs", 1, "--seeds", 0, "--no-amp", cwd=tmp_path)
    written = read_json(tmp_path, "time_to_quality.json")
    assert [(t["way"], t["seed"]) for t in written["trainings"]] == [(way, 0) for way in study.WAYS]
    assert "drawn images" in done.out
    rows = {line.split(" | ")[0].strip("| "): line for line in done.out.splitlines() if line.startswith("| ")}
    for training in written["trainings"]:
        ((seconds, quality),) = training["history"]
        assert seconds > 0 and 0 <= quality <= 1
        assert f"{np.round(quality, 4):.4f}" in rows[training["way"]]
