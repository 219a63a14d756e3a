"""Tests of the folder that a training script writes to: nothing in it is lost unasked."""

from types import SimpleNamespace

import pytest

from common.console import InputError
from common.files import write_json
from records.run import Run
from tests.shared import cli, refused, succeed
from training.earlier.folder import refuse_new, refuse_source

AMONG = ("--device", "cpu", "--no-amp", "--max-steps", 2, "--epochs", 1, "--masked-epochs", 1)


def test_a_finished_run_without_last_pth_is_never_trained_anew(tmp_path, flags):
    """compare.py --list says that last.pth may be deleted; --resume then changes nothing."""
    flags = (*flags, *AMONG)
    folder = tmp_path / "outputs/scratch"
    succeed("train_scratch", *flags, cwd=tmp_path)
    (folder / "last.pth").unlink()
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    refused(cli("train_scratch", *flags, "--resume", cwd=tmp_path), "finished", "last.pth is gone")
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
    # Of several seeds that one stays, and the others are trained.
    folder.rename(tmp_path / "outputs/s-seed0")
    several = (*flags, "--seeds", 0, 1, "--out", "outputs/s", "--resume")
    assert "left as they are" in succeed("train_scratch", *several, cwd=tmp_path).err
    assert (tmp_path / "outputs/s-seed0/checkpoint.pth").read_bytes() == before["checkpoint.pth"]
    assert Run(tmp_path / "outputs/s-seed1").results["finished"]
    both = cli("train_scratch", *flags, "--resume", "--overwrite", "--out", "outputs/s-seed0", cwd=tmp_path)
    refused(both, "last.pth is gone", "--overwrite then replaces nothing")


def test_a_run_that_another_command_begins_meanwhile_is_kept(tmp_path):
    run = Run(tmp_path / "run")
    plan = SimpleNamespace(run=run, begun=run.begun)
    refuse_new(plan)
    write_json(run.folder / "results.json", {})
    with pytest.raises(InputError, match="begun by another command meanwhile"):
        refuse_new(plan)
    refuse_new(SimpleNamespace(run=run, begun=True))  # it was there from the start, and --overwrite was given


@pytest.mark.parametrize(
    "flag, given", [("init", "r"), ("init", "r/masked"), ("teacher", "r"), ("weights", "r/checkpoint.pth")]
)
def test_the_run_that_a_flag_reads_is_not_written_to(tmp_path, monkeypatch, flag, given):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "r/results.json", {"finished": True})
    (tmp_path / "r/masked").mkdir()
    (tmp_path / "link").symlink_to("r")
    for out in ("r", "link", "./r/", tmp_path / "r"):
        with pytest.raises(InputError, match=f"--{flag} reads"):
            refuse_source(Run(out), SimpleNamespace(**{flag: given}))
    refuse_source(Run("other"), SimpleNamespace(**{flag: given}))


@pytest.mark.parametrize("flag", ["--init", "--out", "--teacher", "--data-dir"])
def test_an_empty_value_is_no_default(tmp_path, flag):
    refused(cli("train_scratch", flag, "", "--demo", cwd=tmp_path), f"{flag} is empty")
