"""Tests of lock: a run that a live process trains is left alone, and what a dead one left binds nobody."""

import os
import signal
import subprocess
import sys

import pytest

from common.console import InputError
from common.files import FORMAT, write_json
from records import lock
from records.run import Run, find_runs
from tests.shared import REPO, cli, refused, succeed
from training import plan

HOLDER = """
import sys, time
from records import lock
with lock.held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""
SHORT = ("--epochs", 1, "--max-steps", 1, "--batch-size", 16)


def write_results(folder, **changes):
    """The results.json of a run that was begun."""
    counts = {part: {"NORMAL": 1, "PNEUMONIA": 1} for part in ("train", "val", "test")}
    split = dict(train=1, val=1, test=1, counts=counts, fingerprint="f", set="s")
    row = {"train_loss": 1.0, "val_loss": 1.0, "val_auroc": 0.5}
    results = dict(model="m", model_config={"kind": "vit"}, params=1, minutes=1.0, synthetic=False)
    results |= dict(split=split, data={"classes": ["NORMAL", "PNEUMONIA"]}, recipe={"amp": False})
    results |= dict(mean=[0.5], std=[0.5], history=[row], best_epoch=1, finished=True, format=FORMAT)
    write_json(folder / "results.json", {**results, **changes})
    return Run(folder)


@pytest.fixture
def holding(tmp_path):
    """A process that holds the lock of outputs/busy; killed in the end, if it still lives."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, "outputs/busy"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_run_that_is_being_trained_is_left_alone(holding, flags, tmp_path, capsys):
    """Every command says which process; once it was killed, its lock is stale and they go on."""
    busy, words = tmp_path / "outputs/busy", ("is being trained by process", holding.pid)
    train = ("train_scratch", *flags, *SHORT, "--out", "outputs/busy")
    for more in ((), ("--overwrite",)):
        refused(cli(*train, *more, cwd=tmp_path), *words, "--out")
    refused(cli("predict", "x.png", "--run", "outputs/busy", cwd=tmp_path), *words)
    write_results(busy, finished=False, best_epoch=0, history=[])
    (busy / "last.pth").write_bytes(b"")
    for more in ((), ("--overwrite",), ("--resume",)):
        done = cli(*train, *more, cwd=tmp_path)
        refused(done, *words, "--out")
        assert "interrupted" not in done.err
    refused(cli("train_linear", *flags, "--out", "outputs/busy", cwd=tmp_path), *words)
    refused(cli("calibrate", "--run", "outputs/busy", cwd=tmp_path), *words)
    refused(cli("compare", "--run", "outputs/busy", cwd=tmp_path), *words)
    refused(cli("explain", "--run", "outputs/busy", cwd=tmp_path), *words)
    both = ("--ensemble", "outputs/busy", "outputs/done", "--out", "outputs/both")
    refused(cli("calibrate", *both, cwd=tmp_path), *words)
    write_results(tmp_path / "outputs/done")
    write_results(busy)  # it writes this before it ends
    capsys.readouterr()
    assert [str(run) for run in find_runs(tmp_path / "outputs")] == [str(tmp_path / "outputs/done")]
    err = capsys.readouterr().err
    assert f"busy is being trained by process {holding.pid}, passed over" in err and err.count("note") == 1
    holding.send_signal(signal.SIGKILL)
    holding.wait()
    assert (busy / lock.NAME).exists() and lock.holder(busy) is None
    assert len(find_runs(tmp_path / "outputs")) == 2
    refused(cli(*train, cwd=tmp_path), "already holds a finished run")
    succeed(*train, "--overwrite", cwd=tmp_path)
    assert not (busy / lock.NAME).exists()


def test_a_lock_ends_with_its_block(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.05)
    folder = tmp_path / "a/b/run"
    for error in (None, KeyboardInterrupt, InputError):
        try:
            with lock.held(folder):
                assert lock.holder(folder) == f"process {os.getpid()}"
                with pytest.raises(InputError, match=f"trained by process {os.getpid()}"), lock.held(folder):
                    pass
                assert lock.holder(folder)  # still
                if error:
                    raise error
        except (KeyboardInterrupt, InputError):
            pass
        assert lock.holder(folder) is None and not (tmp_path / "a").exists()  # nothing was put into it
    (folder / "kept").mkdir(parents=True)
    with lock.held(folder):
        (folder / lock.NAME).write_text("77 elsewhere")
        assert lock.holder(folder) == "process 77 on elsewhere"
        (folder / lock.NAME).write_text("")
        assert lock.holder(folder) == "another process"
    assert [p.name for p in folder.iterdir()] == ["kept"]
    (folder / lock.NAME).write_text(f"{os.getpid()} x")  # a live process that holds nothing: an old number
    assert lock.holder(folder) is None


def test_a_script_holds_the_lock_while_it_works(flags, tmp_path, monkeypatch):
    """From before the images are read until the end, also of a run that fails."""
    seen, real = [], plan.load_train_val

    def load(*args):
        seen.append(lock.holder(tmp_path / "run"))
        if len(seen) == 2:
            raise InputError("no more")
        return real(*args)

    monkeypatch.setattr(plan, "load_train_val", load)
    argv = ("train_scratch", *flags, *SHORT, "--out", "run")
    succeed(*argv, cwd=tmp_path)
    refused(cli(*argv, "--overwrite", cwd=tmp_path), "no more")
    assert seen == [f"process {os.getpid()}"] * 2 and not (tmp_path / "run" / lock.NAME).exists()


def test_an_interrupted_run_without_a_checkpoint_is_to_be_resumed(tmp_path):
    """Where there is something to go on from; where there is not, it is to be trained again."""
    begun = dict(finished=False, best_epoch=0, history=[])
    run = write_results(tmp_path / "outputs/run", **begun)
    for saved, words in (
        (True, ("continue it with", "--resume")),
        (False, ("start it again", "--overwrite")),
    ):
        (run.folder / "last.pth").write_bytes(b"") if saved else (run.folder / "last.pth").unlink()
        for script in ("calibrate", "predict", "explain"):
            more = ("x.png",) if script == "predict" else ()
            refused(cli(script, *more, "--run", "outputs/run", cwd=tmp_path), *words)
        done = cli("train_scratch", "--out", "outputs/run", cwd=tmp_path)
        refused(done, "already holds an interrupted run", "--overwrite")
        assert ("--resume" in done.err) == saved
    write_results(run.folder)
    refused(cli("predict", "x.png", "--run", "outputs/run", cwd=tmp_path), "copy the file back")
