"""Tests of common."""

import math
import signal

import pytest

import common
from common import InputError
from tests.shared import folder_bytes


def test_atomic_path(tmp_path):
    """The old content stays until the new is complete; a failure leaves nothing behind."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), common.atomic_path(path) as tmp:
        tmp.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert folder_bytes(tmp_path) == {"a.txt": b"old"}
    with common.atomic_path(path) as tmp:
        tmp.write_text("new")
    assert folder_bytes(tmp_path) == {"a.txt": b"new"}


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError):
        common.write_json(tmp_path / "a.json", {"x": math.nan})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error, code",
    [
        (InputError("bad"), 2),
        (FileNotFoundError(2, "No such file", "x.txt"), 2),
        (PermissionError(13, "Denied", "x"), 2),
        (KeyboardInterrupt(), 130),
        (common.Interrupted("stopped", signal.SIGTERM), 143),
    ],
)
def test_exit_codes(error, code, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        common.start(main)
    assert stop.value.code == code and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_bugs_are_not_hidden_as_bad_input():
    def main():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        common.start(main)
