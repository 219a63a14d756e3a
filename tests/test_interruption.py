"""Tests of interruption."""

import os
import re
import shutil
import signal
import time

import pytest

from tests.shared import (
    LINK,
    REPO,
    Forked,
    cli,
    load_pth,
    popen,
    read_json,
    refused,
    same_tensors,
    strip_time,
    succeed,
)
from training import plan

LONG = ["--epochs", 4, "--batch-size", 4, "--patience", 9, "--no-amp", "--device", "cpu"]


@pytest.fixture(scope="module")
def uninterrupted(built_once, flags, tiny_npz):
    """The same run as those interrupted below, left alone: (arguments, run folder)."""
    argv = [*flags, *LONG, "--weights", tiny_npz, "--drop-path", 0.2, "--out", "run"]
    cwd, _ = built_once("uninterrupted", lambda cwd: succeed("train_pretrained", *argv, cwd=cwd).code)
    return argv, cwd / "run"


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_interrupted_process_resumes_bit_for_bit(uninterrupted, tmp_path, signum, code):
    """SIGTERM, and the scratch arm: test_several.py, in this process. Ctrl-C of every script while it still
    imports: test_common.py."""
    script, (argv, reference) = "train_pretrained", uninterrupted
    process = Forked(script, *argv, cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("epoch 1/4"):
            time.sleep(0.02)  # into the second epoch
            process.send_signal(signum)
            break
    process.communicate(timeout=60)
    err, run = (tmp_path / "stderr.txt").read_text(), tmp_path / "run"
    assert process.returncode == code, err
    assert "Traceback" not in err
    state = load_pth(run, "last.pth")["state"]
    assert 1 <= state["epoch"] < 4 and len(state["history"]) == state["epoch"]
    if signum != signal.SIGKILL:
        assert state["step"] > 0
        command = err.strip().splitlines()[-1].strip()
        assert command == " ".join(["python", f"{script}.py", *map(str, argv), "--resume"])
    refused(cli(script, *argv, cwd=tmp_path), "interrupted run", "--resume")
    succeed(script, *argv, "--resume", cwd=tmp_path)
    assert same_tensors(load_pth(run, "checkpoint.pth"), load_pth(reference, "checkpoint.pth"))
    found, expected = read_json(run, "results.json"), read_json(reference, "results.json")
    assert strip_time(found["history"]) == strip_time(expected["history"]) and len(found["history"]) == 4
    assert found["best_epoch"] == expected["best_epoch"] and found["finished"]


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_while_the_head_is_trained_says_that_nothing_is_saved(
    signum, code, flags, tiny_npz, tmp_path, monkeypatch
):
    monkeypatch.setattr(plan, "fit_head", lambda *args, **kwargs: os.kill(os.getpid(), signum))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        done = cli("train_pretrained", *flags, "--weights", tiny_npz, cwd=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.code == code and "nothing is saved yet" in done.err
    assert not (tmp_path / "outputs").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(flags, tmp_path):
    (tmp_path / "file").write_text("")
    done = cli("train_scratch", *flags, "--out", "file/run", cwd=tmp_path)
    refused(done, "--out file/run cannot be written to")
    assert done.out == "" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_calibrate_and_compare_as_processes(runs, tmp_path, monkeypatch):
    """Calibrate, compare > results.md, from another folder, with real exit codes and streams; compare.py is
    started where there is no torch, which it does not need."""
    shutil.copytree(runs.out / "scratch", tmp_path / "outputs/scratch")
    (tmp_path / "outputs/scratch/calibration.json").unlink()
    (tmp_path / "no/torch").mkdir(parents=True)
    (tmp_path / "no/torch/__init__.py").write_text("raise ImportError('blocked')\n")
    calibrated = Forked("calibrate", "--bootstrap", 100, cwd=tmp_path)
    calibrated.communicate(timeout=120)
    assert calibrated.returncode == 0, (tmp_path / "stderr.txt").read_text()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "no"))
    process = popen(REPO / "compare.py", cwd=tmp_path)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, (tmp_path / "stderr.txt").read_text()
    # A process knows the arm in the size in which it is shipped: this one is smaller.
    assert out.startswith("# ") and "| ViT scratch 64x2, patch 16 [SYNTHETIC] @Rec |" in out
    drawn = list((tmp_path / "outputs/figures").glob("synthetic-*.png"))
    assert len(re.findall(LINK, out)) == len(drawn) == 7
