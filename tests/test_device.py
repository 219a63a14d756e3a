"""Tests of device."""

import numpy as np
import pytest
import torch

from common import device as device_module
from common.console import InputError
from models import inputs
from records.run import Run
from tests.fixtures import detect_bf16
from tests.shared import CPU, succeed


def test_pick_device():
    assert device_module.pick_device("cpu") == CPU
    assert device_module.pick_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize(
    "name", ["abacus", "meta", "hpu", "privateuseone", "cuda:999", "cpu:1", "CPU", "", "xla"]
)
def test_other_devices_are_refused(name):
    with pytest.raises(InputError, match="--device"):
        device_module.pick_device(name)


@pytest.mark.parametrize(
    "flags, fast", [("fpu avx2", False), ("avx512f avx512_bf16", True), ("amx_bf16 amx_tile", True)]
)
def test_bf16_is_taken_where_the_processor_has_it(flags, fast, monkeypatch):
    monkeypatch.setattr(device_module.sys, "platform", "linux")
    monkeypatch.setattr(device_module.Path, "read_text", lambda *_, **__: f"flags\t\t: {flags}\n")
    assert detect_bf16(CPU) is fast
    monkeypatch.setattr(device_module.sys, "platform", "darwin")
    assert not detect_bf16(CPU) and not detect_bf16(torch.device("mps"))


def test_a_run_in_bf16_from_training_to_test_scores(flags, tmp_path, monkeypatch):
    """Trained and scored in bf16; scored in fp32, as on a machine without it, the same weights differ a
    little."""
    succeed("train_scratch", *flags, "--epochs", 1, "--batch-size", 16, "--amp", cwd=tmp_path)
    run, scores = Run(tmp_path / "outputs/scratch"), []
    assert run.results["recipe"]["amp"] is True
    for fast in (True, False):
        monkeypatch.setattr(inputs, "fast_bf16", lambda device, fast=fast: fast)
        (tmp_path / "outputs/scratch/scores.npz").unlink(missing_ok=True)
        succeed("calibrate", "--bootstrap", 100, cwd=tmp_path)
        scores.append(run.scores()["test_p1"])
    assert 0 < np.abs(scores[0] - scores[1]).max() < 0.02
