"""Tests of common: files, numbers, flags, and how scripts start and stop."""

import argparse
import ast
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from common import cli as cli_module
from common import prelude
from common.cli import COUNT, Number, Parser, add_flags, check_fields
from common.console import InputError, Interrupted, advice, in_one_line, notes_once, say, start
from common.files import atomic_path, check_output, read_json, sha256, write_json
from tests.shared import REPO, cli, folder_bytes, refused


def test_atomic_path(tmp_path):
    """The old content stays until the new is complete; a failure leaves nothing behind."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as tmp:
        tmp.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert folder_bytes(tmp_path) == {"a.txt": b"old"}
    with atomic_path(path) as tmp:
        tmp.write_text("new")
    assert folder_bytes(tmp_path) == {"a.txt": b"new"}


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": math.nan})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error, code",
    [
        (InputError("bad"), 2),
        (FileNotFoundError(2, "No such file", "x.txt"), 2),
        (PermissionError(13, "Denied", "x"), 2),
        (KeyboardInterrupt(), 130),
        (Interrupted("stopped", signal.SIGTERM), 143),
    ],
)
def test_exit_codes(error, code, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        start(main)
    assert stop.value.code == code and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_bugs_are_not_hidden_as_bad_input():
    def main():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        start(main)


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
def test_only_files_are_replaced(tmp_path, kind):
    """A device at an output path would become a file, a named pipe would hang its reader."""
    path = {"folder": tmp_path / "x", "fifo": tmp_path / "x", "device": "/dev/null"}[kind]
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(InputError, match="not a file"), atomic_path(path) as tmp:
        tmp.write_text("never")
    for reader in (read_json, lambda p: sha256(Path(p))):
        with pytest.raises(InputError, match="not a file"):
            reader(path)


def test_files_behind_links_are_replaced(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "link").symlink_to("a")
    write_json(tmp_path / "link", {})
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a").read_text() == "{}\n"


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "0" * 5000, '{"a": ' * 3000, "{", "[]", "\ud800", '{"a": NaN']
)
def test_damaged_json_is_one_line(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(InputError, match="a.json") as error:
        read_json(path)
    assert "\n" not in str(error.value)


def test_json_of_a_gigabyte_is_not_read(tmp_path):
    path = tmp_path / "a.json"
    path.touch()
    os.truncate(path, 10**9)  # takes no space
    with pytest.raises(InputError, match="larger than"):
        read_json(path)


def test_number():
    """Ends, kinds, and what is no number at all."""
    share = Number(float, 0, 1, above=True)
    assert share("0.5") == 0.5 and share("1") == 1.0
    for text in ("0", "1.01", "nan", "inf", "-inf", "1e400", "x", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=r"\(0, 1\]"):
            share(text)
    count = Number(int, 1, 2**20)
    assert count("7") == 7 and count.contains(2**20)
    for text in ("0", "1.5", "9" * 5000, "1e3"):
        with pytest.raises(argparse.ArgumentTypeError):
            count(text)
    for value in (True, 1.5, "3", None, [1], 10**400, math.nan):
        assert not count.contains(value)
    assert not share.contains(10**400) and not share.contains(math.inf) and share.contains(1)


def test_flags_come_from_fields():
    @dataclass(frozen=True)
    class Settings:
        count: int = cli_module.flag(3, "how many", COUNT, "N")
        mode: str = cli_module.flag("a", "which", ("a", "b"))
        hidden: float = 0.5
        switch: bool = cli_module.flag(True, "whether")

    parser = Parser("doc")
    add_flags(parser, Settings, mode="b")
    args = vars(parser.parse_args(["--count", "5", "--no-switch"]))
    assert args == {"count": 5, "mode": "b", "switch": False}
    with pytest.raises(InputError, match="--count"):
        parser.parse_args(["--count", "0"])
    assert check_fields(Settings()) == []
    assert check_fields(Settings(0, "c", "x", 1)) == ["count", "mode", "hidden", "switch"]


CHATTY = (
    "from common.console import start, tell\n"
    "def main():\n    for i in range(3000): {}('line', i)\n"
    "start(main)"
)


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
    for call in ("print", "tell"):
        code, err = chatty(call, "> /dev/full")
        assert code == 2 and err.count("error: ") == 1 and "Traceback" not in err, err
        code, err = chatty(call, ">&-")
        assert code == 2 and err.startswith("error: standard output is closed"), err
    code, err = chatty("print", "| head -1 > /dev/null; exit ${PIPESTATUS[0]}")
    assert code == 141 and err == ""


def test_long_work_goes_on_without_its_reader():
    """`train_scratch.py ... | head -1` must not end the training."""
    code, err = chatty("tell", "| head -1 > /dev/null; exit ${PIPESTATUS[0]}")
    assert code == 0 and err.count("\n") == 1 and "goes on" in err


def test_results_are_utf8_whatever_the_locale():
    """And a file name that is no valid Unicode is escaped."""
    code = r"from common.console import start; start(lambda: print('\u2192 \udcff'))"
    env = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, env=env, timeout=60)
    assert done.returncode == 0 and done.stdout.split() == ["\u2192".encode(), b"\\udcff"]


# ---------------------------------------------------------------- before main() begins


ROOT_SCRIPTS = sorted(p.stem for p in REPO.glob("*.py") if '__name__ == "__main__"' in p.read_text())


@pytest.mark.parametrize("script", ROOT_SCRIPTS)
def test_scripts_end_with_their_start(script):
    """What a process of one does that a call of its main() does not: nothing but this."""
    *_, last = ast.parse((REPO / f"{script}.py").read_text()).body
    assert ast.unparse(last) == "if __name__ == '__main__':\n    start(main)"


def started(script, *argv, cwd, fakes):
    """Run a script as a user would; `fakes`: {module: code} that stand before the installed packages."""
    for name, code in fakes.items():
        (cwd / f"{name}.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": str(cwd), "PYTHONDONTWRITEBYTECODE": "1"}
    argv = [sys.executable, REPO / f"{script}.py", *argv]
    settings = dict(cwd=cwd, capture_output=True, text=True, env=env, timeout=60)
    if os.name == "posix":  # tests that run in the background hand on that Ctrl-C is ignored
        settings["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.run(argv, **settings)


ABSENT = "raise ModuleNotFoundError('it is not installed', name={0!r})"
STOPPED = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except BaseException as error:  # as compiled modules do
    raise ImportError("it failed to import") from None
"""


@pytest.mark.parametrize("script", ROOT_SCRIPTS)
def test_a_missing_package_is_one_line(script, tmp_path):
    """As with the system's Python, where nothing was activated; the first one that is missed is named."""
    fakes = {name: ABSENT.format(name) for name in ("numpy", "torch")}
    done = started(script, cwd=tmp_path, fakes=fakes)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    text = rf"error: (numpy|torch) is not installed for this Python \({re.escape(sys.executable)}\); activate"
    assert re.match(text, done.stderr)
    assert "-m pip install -r requirements.txt" in done.stderr


def test_a_missing_torch_is_one_line_and_a_missing_part_of_ours_is_a_bug(tmp_path):
    done = started("train_scratch", cwd=tmp_path, fakes={"torch": ABSENT.format("torch")})
    assert done.returncode == 2 and done.stderr.startswith("error: torch is not installed for this Python")
    done = started("compare", cwd=tmp_path, fakes={"numpy": ABSENT.format("entries")})
    assert done.returncode == 1 and "Traceback" in done.stderr
    for name, package in (("sklearn.metrics", "scikit-learn"), ("PIL", "pillow"), ("torch", "torch")):
        assert f"{package} is not" in prelude.missing(ModuleNotFoundError("x", name=name))
    assert prelude.missing(ImportError("broken", name="torch")) is None


def test_a_package_missed_within_main_is_one_line(capsys):
    def main():
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    with pytest.raises(SystemExit) as stop:
        start(main)
    assert stop.value.code == 2 and "torch is not installed" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="sends itself a signal")
@pytest.mark.parametrize("script", ROOT_SCRIPTS)
def test_ctrl_c_while_a_script_imports(script, tmp_path):
    """One line, although the library that is being imported swallows the interruption."""
    done = started(script, cwd=tmp_path, fakes={"numpy": STOPPED, "torch": STOPPED})
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "")


def test_nothing_changes_where_no_script_runs():
    assert sys.excepthook is not prelude._say_missing
    assert signal.getsignal(signal.SIGINT) is not prelude._leave


# ---------------------------------------------------------------- where output goes


def test_output_goes_to_folders_that_are_there(tmp_path):
    check_output("--csv", tmp_path / "a.csv")
    (tmp_path / "file").write_text("")
    for path, words in (
        (tmp_path / "nope" / "x.html", "no folder"),
        (tmp_path / "file" / "x", "is not a folder"),
    ):
        with pytest.raises(InputError, match=f"--html .*{words}"):
            check_output("--html", path)
    with pytest.raises(InputError, match="not a file"):
        check_output("--html", tmp_path)
    assert folder_bytes(tmp_path) == {"file": b""} and not (tmp_path / "nope").exists()


def test_output_replaces_no_image_and_no_file_of_a_run(tmp_path):
    """What a shell makes of `-o *.png`, and a typing error."""
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "old.csv").write_text("path,score")
    (tmp_path / "model.onnx").write_bytes(bytes(8))
    check_output("--out", tmp_path / "old.csv")
    check_output("--export", tmp_path / "model.onnx")
    with pytest.raises(InputError, match="--out .*x.png is there already and is no text"):
        check_output("--out", tmp_path / "x.png")
    (tmp_path / "results.json").write_text("{}")
    check_output("--csv", tmp_path / "figures.csv")
    for name in ("results.json", "checkpoint.pth", "predictions-tta.csv", "calibration.json"):
        with pytest.raises(InputError, match=f"--csv .*{name} is a file of the run"):
            check_output("--csv", tmp_path / name)


@pytest.mark.parametrize(
    "argv",
    [("compare", "--csv"), ("compare", "--html"), ("compare", "--figures")]
    + [("predict", "x", "--summary"), ("predict", "x", "--out"), ("predict", "--export")],
)
def test_no_script_makes_a_folder_for_a_file(argv, tmp_path):
    place = tmp_path / "nope" / "x"
    refused(cli(*argv, place, cwd=tmp_path), argv[-1], "no folder", place.parent)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- advice


def test_only_flags_of_the_script_are_advised(capsys):
    """In a script without the flag the advice is left out; where no script runs it is given."""

    def main(*flags):
        parser = Parser("doc")
        for flag in flags:
            parser.add_argument(flag)
        parser.parse_args([])
        raise InputError("broken" + advice("--skip-bad", ", or --skip-bad"))

    for flags, text in ((("--skip-bad",), "broken, or --skip-bad"), (("--run",), "broken")):
        with pytest.raises(SystemExit):
            start(lambda flags=flags: main(*flags))
        assert capsys.readouterr().err == f"error: {text}\n"
    assert advice("--skip-bad", "x") == "x"


def test_notes_are_said_once_where_that_is_asked(capsys):
    with notes_once():
        for text in ("a", "b", "a"):
            say(text)
    say("a")
    assert capsys.readouterr().err.split() == ["a", "b", "a"]


def test_a_flag_with_a_list_given_twice_takes_both_lists():
    parser = Parser("doc")
    group = parser.add_argument_group("group")
    group.add_argument("--run", nargs="+", default=["all"])
    group.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--out")
    for _ in range(2):  # nothing is left over from an earlier command line
        args = parser.parse_args("--run a b --out 1 --seeds 3 --run c --out 2".split())
        assert (args.run, args.seeds, args.out) == (["a", "b", "c"], [3], "2")
    assert parser.parse_args([]).run == ["all"] and parser.parse_args(["--run", "d"]).run == ["d"]


def test_a_long_error_in_one_line_keeps_both_ends():
    assert in_one_line("a\n  b  c") == "a b c"
    assert in_one_line(ValueError("x" * 300)) == "x" * 300
    text = in_one_line("begin " + "y" * 900 + " Connection\nrefused")
    assert len(text) <= 300 and text.startswith("begin yy") and text.endswith("yy Connection refused")
    assert " ... " in text
