"""Tests of common: files, numbers, flags, and how scripts start and stop."""

import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest

import common
from common import InputError
from tests.shared import REPO, folder_bytes


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


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
def test_only_files_are_replaced(tmp_path, kind):
    """A device at an output path would become a file, a named pipe would hang its reader."""
    path = {"folder": tmp_path / "x", "fifo": tmp_path / "x", "device": "/dev/null"}[kind]
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(InputError, match="not a file"), common.atomic_path(path) as tmp:
        tmp.write_text("never")
    for reader in (common.read_json, lambda p: common.sha256(common.Path(p))):
        with pytest.raises(InputError, match="not a file"):
            reader(path)


def test_files_behind_links_are_replaced(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "link").symlink_to("a")
    common.write_json(tmp_path / "link", {})
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a").read_text() == "{}\n"


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "0" * 5000, '{"a": ' * 3000, "{", "[]", "\ud800", '{"a": NaN']
)
def test_damaged_json_is_one_line(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(InputError, match="a.json") as error:
        common.read_json(path)
    assert "\n" not in str(error.value)


def test_json_of_a_gigabyte_is_not_read(tmp_path):
    path = tmp_path / "a.json"
    path.touch()
    os.truncate(path, 10**9)  # takes no space
    with pytest.raises(InputError, match="larger than"):
        common.read_json(path)


def test_number():
    """Ends, kinds, and what is no number at all."""
    share = common.Number(float, 0, 1, above=True)
    assert share("0.5") == 0.5 and share("1") == 1.0
    for text in ("0", "1.01", "nan", "inf", "-inf", "1e400", "x", ""):
        with pytest.raises(common.argparse.ArgumentTypeError, match=r"\(0, 1\]"):
            share(text)
    count = common.Number(int, 1, 2**20)
    assert count("7") == 7 and count.contains(2**20)
    for text in ("0", "1.5", "9" * 5000, "1e3"):
        with pytest.raises(common.argparse.ArgumentTypeError):
            count(text)
    for value in (True, 1.5, "3", None, [1], 10**400, math.nan):
        assert not count.contains(value)
    assert not share.contains(10**400) and not share.contains(math.inf) and share.contains(1)


def test_flags_come_from_fields():
    @dataclass(frozen=True)
    class Settings:
        count: int = common.flag(3, "how many", common.COUNT, "N")
        mode: str = common.flag("a", "which", ("a", "b"))
        hidden: float = 0.5
        switch: bool = common.flag(True, "whether")

    parser = common.Parser("doc")
    common.add_flags(parser, Settings, mode="b")
    args = vars(parser.parse_args(["--count", "5", "--no-switch"]))
    assert args == {"count": 5, "mode": "b", "switch": False}
    with pytest.raises(InputError, match="--count"):
        parser.parse_args(["--count", "0"])
    assert common.check_fields(Settings()) == []
    assert common.check_fields(Settings(0, "c", "x", 1)) == ["count", "mode", "hidden", "switch"]


CHATTY = "import common\ndef main():\n    for i in range(3000): {}('line', i)\ncommon.start(main)"


def chatty(call, redirect):
    """A script that prints a lot, its output redirected by a shell -> (exit code, stderr)."""
    # 300 kB do not fit into a pipe: however late the reader ends, the writer is still at it.
    code = CHATTY.format(call).replace("('line', i)", "(f'line {i:095}')")
    command = f'"{sys.executable}" -c "{code}" {redirect}'
    done = subprocess.run(["bash", "-c", command], cwd=REPO, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written():
    """Full or closed: one line and exit code 2. A reader that goes away ends a report: no success."""
    for call in ("print", "common.tell"):
        code, err = chatty(call, "> /dev/full")
        assert code == 2 and err.count("error: ") == 1 and "Traceback" not in err, err
        code, err = chatty(call, ">&-")
        assert code == 2 and err.startswith("error: standard output is closed"), err
    code, err = chatty("print", "| head -1 > /dev/null; exit ${PIPESTATUS[0]}")
    assert code == 141 and err == ""


def test_long_work_goes_on_without_its_reader():
    """`train_scratch.py ... | head -1` must not end the training."""
    code, err = chatty("common.tell", "| head -1 > /dev/null; exit ${PIPESTATUS[0]}")
    assert code == 0 and err.count("\n") == 1 and "goes on" in err


def test_results_are_utf8_whatever_the_locale():
    """And a file name that is no valid Unicode is escaped."""
    code = r"import common; common.start(lambda: print('\u2192 \udcff'))"
    env = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, env=env, timeout=60)
    assert done.returncode == 0 and done.stdout.split() == ["\u2192".encode(), b"\\udcff"]


def test_notes_are_said_once_where_that_is_asked(capsys):
    with common.notes_once():
        for text in ("a", "b", "a"):
            common.say(text)
    common.say("a")
    assert capsys.readouterr().err.split() == ["a", "b", "a"]
