"""What every script shares: one error type, one way to write a file, one way to start and stop."""

import prelude

import argparse
import contextlib
import dataclasses
import difflib
import errno
import hashlib
import json
import os
import re
import shlex
import stat
import sys
import time
from pathlib import Path

import scripts

FORMAT = 1  # of results.json and calibration.json; a reader refuses a higher number
SCALED = 2  # of a calibration.json with Platt scaling, which older versions would leave out in silence
JSON_LIMIT = 64 << 20  # bytes; the largest file a script writes itself is a few MB


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, where, and what to do."""


class Interrupted(KeyboardInterrupt):
    """A run stopped on request after saving its state. `signum` is the signal that asked for it."""

    def __init__(self, message, signum):
        super().__init__(message)
        self.signum = signum


# ---------------------------------------------------------------- files


def check_regular(path):
    """InputError if `path` exists and is not a regular file (symbolic links are followed).

    A FIFO would block its reader for ever, a device has no end, and neither may be replaced by a file.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except ValueError as error:  # a NUL byte in the name
        raise InputError(f"{str(path)!r} is not a usable file name ({error})") from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        raise InputError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file: name a file")


def check_output(flag, path):
    """InputError unless a file can be written where a flag says: no device, no folder, and in a folder that
    is there. A misspelt place is not made."""
    folder = Path(path).parent
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{flag} {path}: {folder} is not a folder: name another place for the output")
    if not folder.exists():
        raise InputError(f"{flag} {path}: there is no folder {folder}: make it first, or name another place")
    check_regular(path)


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; rename it onto `path` on success, delete it on failure.

    The file at `path` is therefore always either absent or complete, whenever the process dies.
    InputError if `path` is a device, a named pipe or a folder. An OSError names `path`.
    """
    path = Path(path)
    check_regular(path)
    if path.is_symlink():
        path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.stem}.*.tmp{path.suffix}"):  # of a process that was killed
        if not _alive(leftover.name.removesuffix(f".tmp{path.suffix}").rpartition(".")[2]):
            leftover.unlink(missing_ok=True)
    tmp = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield tmp
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as error:
        if error.filename is None:  # a full disk, say: without a name it could be anything
            error.filename = str(path)
        raise
    finally:
        tmp.unlink(missing_ok=True)


def _alive(pid):
    """Whether a process of this machine has this number (always, where that cannot be asked)."""
    if os.name != "posix" or not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def write_json(path, value):
    """Write `value` as indented JSON, atomically. NaN and infinity are refused (not valid JSON)."""
    text = json.dumps(value, indent=1, allow_nan=False)
    with atomic_path(path) as tmp:
        tmp.write_text(text + "\n", encoding="utf-8")


def read_json(path):
    """Read a JSON object; InputError naming the file if it is absent, damaged, too large or not an object."""
    check_regular(path)
    try:
        if os.path.getsize(path) > JSON_LIMIT:
            raise InputError(f"{path} is larger than {JSON_LIMIT >> 20} MiB: not a file of this project")
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except RecursionError:
        raise InputError(f"{path} is not readable JSON (nested too deeply)") from None
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def check_format(value, path, newest=FORMAT):
    """InputError if a JSON file's "format" is absent, or newer than `newest`, which this version reads."""
    found = value.get("format")
    if not isinstance(found, int) or isinstance(found, bool):
        raise InputError(f"{path} is damaged: it has no format number")
    if found > newest:
        raise InputError(
            f"{path} has format {found}, this version reads up to {newest}: update these scripts"
        )


def sha256(data):
    """Hex SHA-256 of a file's bytes (Path) or of a value's canonical JSON (anything else)."""
    if not isinstance(data, Path):
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    check_regular(data)
    digest = hashlib.sha256()
    with open(data, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """--help is the script's docstring and the flags with their defaults. A wrong command line is an
    InputError; flags must be written out, because an abbreviated one could be taken for another."""

    def __init__(self, doc, **kwargs):
        super().__init__(description=doc, formatter_class=_Formatter, allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        parsed = super().parse_args(args, namespace)
        if _script["runs"]:
            _script["flags"] = frozenset(self._option_string_actions)
        return parsed

    def error(self, message):
        wrong = re.findall(r"(?:^|\s)(--[\w-]+)", message) if message.startswith("unrecognized") else []
        hints = "".join(f"{hint} " for hint in map(self._hint, dict.fromkeys(wrong)) if hint)
        raise InputError(f"{message} ({hints}see python {self.prog} --help)")

    def _hint(self, wrong):
        """What to say of a flag that this script does not have: who has it, or what it may be meant to be."""
        if owners := scripts.having(wrong, self.prog):
            return f"{wrong} is a flag of {', '.join(owners)};"
        close = difflib.get_close_matches(wrong, self._option_string_actions, 1)
        return f"did you mean {close[0]}?" if close else ""


_script = {"runs": False, "flags": None}  # whether `start` runs a main(), and the flags of its command line


def has_flag(flag):
    """Whether the script that runs has a flag; True where none runs, as in a notebook."""
    return _script["flags"] is None or flag in _script["flags"]


def advice(flag, text):
    """`text`, which advises `flag`, where the script that runs has that flag; else ""."""
    return text if has_flag(flag) else ""


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        if action.default is None or "default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Number:
    """An argparse type: a finite int or float between `low` and `high`, the ends included unless
    `above`/`below`.

    Number(int, 1, 100), Number(float, 0, 1, above=True): 0 < x <= 1. Also callable on values already parsed.
    """

    def __init__(self, kind, low, high, above=False, below=False):
        self.kind, self.low, self.high, self.above, self.below = kind, low, high, above, below
        self.__name__ = kind.__name__

    def contains(self, value):
        """Whether a value (of any type) is a number in the range."""
        numeric = int if self.kind is int else (int, float)
        if not isinstance(value, numeric) or isinstance(value, bool) or value != value:
            return False
        return (value > self.low if self.above else value >= self.low) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self):
        return f"{'(' if self.above else '['}{self.low:g}, {self.high:g}{')' if self.below else ']'}"

    def __call__(self, text):
        try:
            value = self.kind(text)
        except (ValueError, OverflowError):
            value = None
        if value is None or not self.contains(value):
            kind = "a whole number" if self.kind is int else "a number"
            hint = "; separate several by spaces" if "," in str(text) else ""
            raise argparse.ArgumentTypeError(f"{str(text)[:40]!r} is not {kind} in {self}{hint}")
        return value


COUNT = Number(int, 1, 2**20)  # batch sizes, epochs and the like
SEED = Number(int, 0, 2**63 - 1)


def flag(default, help, kind=None, metavar=None):
    """A dataclass field that is a command-line flag too. `kind`: a Number, a tuple of choices, or None for
    text or, where the default is a bool, a switch."""
    about = {"help": help, "kind": kind, "metavar": metavar}
    return dataclasses.field(default=default, metadata=about)


def check_name(flag, name):
    """InputError unless a name given by a flag, if any, can be part of a file name."""
    if name is not None and not re.fullmatch(r"[\w-][\w. -]{0,59}", name):
        raise InputError(f"{flag} {name[:60]!r}: give a name of letters, digits, dots and dashes")


def add_flags(group, cls, leave_out=(), **defaults):
    """A flag for every `flag` field of a dataclass but those in `leave_out`; `defaults` replace the fields'
    own."""
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata or field.name in leave_out:
            continue
        name, kind = f"--{field.name.replace('_', '-')}", field.metadata["kind"]
        about = {"default": defaults.get(field.name, field.default), "help": field.metadata["help"]}
        if isinstance(field.default, bool):
            group.add_argument(name, action=argparse.BooleanOptionalAction, **about)
        elif isinstance(kind, tuple):
            group.add_argument(name, choices=kind, **about)
        else:
            group.add_argument(name, type=kind or str, metavar=field.metadata["metavar"], **about)


def check_fields(value):
    """Names of the fields of a dataclass instance whose type, choice or range is wrong."""
    wrong = []
    for field in dataclasses.fields(value):
        found, kind = getattr(value, field.name), field.metadata.get("kind")
        if isinstance(kind, Number):
            good = kind.contains(found) or found is None and field.default is None
        elif isinstance(kind, tuple):
            good = found in kind if isinstance(found, str) else False
        else:
            like = (int, float) if isinstance(field.default, float) else type(field.default)
            good = isinstance(found, like) and "\0" not in str(found)
        wrong += [] if good else [field.name]
    return wrong


class Pace:
    """Says every half minute how far a long job is and what remains, where no progress bar can be drawn."""

    def __init__(self, every=30):
        self.every, self.begin, self.last = every, time.monotonic(), time.monotonic()

    def step(self, done, total, text):
        """`done` of `total` units are done; `text` says what of."""
        now = time.monotonic()
        if now - self.last > self.every and done:
            self.last = now
            say(f"{text}: {(total - done) * (now - self.begin) / done / 60:.1f} min left")

    def count(self, done, what):
        """The same where the total is not known."""
        now = time.monotonic()
        if now - self.last > self.every:
            self.last = now
            say(f"{done} {what}, {done / (now - self.begin):.1f} a second")


def command_line():
    """The command as typed, quoted for a shell, for results.json and resume messages."""
    number = os.environ.get("WORLD_SIZE", "1")
    runner = ["python"] if number == "1" else ["torchrun", "--nproc_per_node", number]
    return shlex.join([*runner, os.path.basename(sys.argv[0]), *sys.argv[1:]])


# ---------------------------------------------------------------- output, start and stop

_lost_output = []  # the error that ended standard output, if any
_said = set()  # what say_once has said in this command


_already_said = None  # within notes_once: what was said


@contextlib.contextmanager
def notes_once():
    """Meanwhile `say` says each text once: for scripts that do the same for several runs."""
    global _already_said
    _already_said = set()
    try:
        yield
    finally:
        _already_said = None


def say(message):
    """One line on stderr. Under torchrun only the first process speaks, except of errors."""
    if sys.stderr is None:
        return
    if _already_said is not None:
        if message in _already_said:
            return
        _already_said.add(message)
    if os.environ.get("RANK", "0") == "0" or str(message).startswith("error: "):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody is listening
            print(message, file=sys.stderr, flush=True)


def say_once(message):
    """`say`, but the same line only once in a command."""
    if message not in _said:
        _said.add(message)
        say(message)


def tell(line):
    """Print a line about long work. If standard output is gone, the work goes on and a note says so, once."""
    try:
        print(line, flush=True)
    except OSError as error:
        _discard_output(error)
        say(f"note: standard output cannot be written ({error.strerror}); the work goes on without it")


def _discard_output(error):
    """Point standard output at nothing, so that later prints, and Python's own last flush, cannot fail."""
    _lost_output.append(error)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _prepare_output():
    """Results are UTF-8 everywhere; names that are not valid Unicode are escaped. InputError if stdout is
    closed."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
        raise InputError("standard output is closed: redirect it to a file, or to /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def start(main):
    """Run a script's `main()` and exit: 0 success, 2 bad input (one line, no traceback), 130 on Ctrl-C, 143
    on SIGTERM, 141 when the reader of standard output went away before the end."""
    code = 0
    _lost_output.clear()
    _script.update(runs=True, flags=None)
    _said.clear()
    try:
        with prelude.interruptible():
            _prepare_output()
            main()
            sys.stdout.flush()
    except ModuleNotFoundError as error:
        if (text := prelude.missing(error)) is None:
            raise
        say(f"error: {text}")
        code = 2
    except InputError as error:
        say(f"error: {_one_line(error)}")
        code = 2
    except BrokenPipeError as error:  # `compare.py | head`
        _discard_output(error)
        code = 141
    except OSError as error:
        if error.filename is not None:
            say(f"error: {_one_line(error.filename)}: {error.strerror}")
        elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF, errno.EFBIG):
            _discard_output(error)
        else:  # not about a file: a bug, so let it be seen
            raise
        code = 2
    except KeyboardInterrupt as stop:
        say(str(stop) or "interrupted")
        code = 128 + getattr(stop, "signum", 2)
    finally:
        _script.update(runs=False, flags=None)
    if _lost_output and not isinstance(_lost_output[0], BrokenPipeError):
        say(f"error: standard output cannot be written ({_lost_output[0].strerror})")
        code = code or 2
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # DistributedDataParallel keeps gloo's threads for the life of the process. One that frees a tensor
        # while the interpreter is torn down aborts it, now and then, so under torchrun nothing is torn down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _one_line(error):
    """An error as one line; lists that are indented by two spaces keep their lines."""
    text = str(error)
    return text if "\n  " in text else " ".join(text.split("\n"))
