"""What every script shares: one error type, one way to write a file, one way to start and stop."""
import argparse
import contextlib
import hashlib
import json
import os
import shlex
import sys
import time
import zipfile
import zlib
from pathlib import Path


# What reading a damaged .npz may raise.
DAMAGED = (OSError, ValueError, EOFError, KeyError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, where, and what to do."""


class Interrupted(KeyboardInterrupt):
    """A run stopped on request after saving its state. `signum` is the signal that asked for it."""

    def __init__(self, message, signum):
        super().__init__(message)
        self.signum = signum


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; rename it onto `path` on success, delete it on failure.

    The file at `path` is therefore always either absent or complete, whenever the process dies.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.stem}.*.tmp{path.suffix}"):  # of a process that was killed
        if left.stat().st_mtime < time.time() - 3600:
            left.unlink(missing_ok=True)
    tmp = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield tmp
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path, value):
    """Write `value` as indented JSON, atomically. NaN and infinity are refused (not valid JSON)."""
    text = json.dumps(value, indent=1, allow_nan=False)
    with atomic_path(path) as tmp:
        tmp.write_text(text + "\n", encoding="utf-8")


def read_json(path):
    """Read a JSON object; InputError naming the file if it is absent, damaged or not an object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


FORMAT = 1  # of results.json and calibration.json; a reader refuses a higher number


def read_results(run):
    """results.json of a run folder; InputError if absent, damaged, incomplete, or of a newer format."""
    path = Path(run, "results.json")
    results = read_json(path)
    if not isinstance(results.get("format"), int) or results["format"] > FORMAT:
        raise InputError(f"{path} has format {results.get('format')}, this version reads up to {FORMAT}: "
                         "update these scripts")
    needed = ("model", "model_config", "params", "minutes", "synthetic", "split", "data", "history", "best_epoch",
              "recipe", "mean", "std", "finished")
    missing = [k for k in needed if k not in results]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}: it was not written by a training script")
    return results


def find_runs(runs_dir, chosen=None):
    """Run folders: those named in `chosen`, else every finished run directly under `runs_dir`, sorted.

    Unfinished runs are passed over with a note, unless chosen. InputError if there is none.
    """
    if chosen:
        return [Path(run) for run in chosen]
    runs = []
    for path in sorted(Path(runs_dir).glob("*/results.json")):
        if read_results(path.parent)["finished"]:
            runs.append(path.parent)
        else:
            say(f"note: {path.parent} is not finished, passed over (name it with --run to use it all the same)")
    if not runs:
        raise InputError(f"no finished runs under {runs_dir}: train one first, "
                         "for instance python train_scratch.py --epochs 15")
    return runs


def sha256(data):
    """Hex SHA-256 of a file's bytes (Path) or of a value's canonical JSON (anything else)."""
    if isinstance(data, Path):
        with open(data, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest() if sys.version_info >= (3, 11) \
                else hashlib.sha256(f.read()).hexdigest()
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def load_tensors(path):
    """torch.load restricted to tensors and plain Python values: code in a pickle is refused, not run."""
    import pickle

    import torch  # here, not above: scripts that only read JSON need no torch
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        unsafe = "weights_only" in str(error) or "Unsupported" in str(error)
        why = "it holds something other than tensors, perhaps code, and was refused" if unsafe else "it is damaged"
        raise InputError(f"{path} cannot be loaded: {why}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not a state dict")
    return value


def command_line():
    """The command as typed, quoted for a shell, for results.json and resume messages."""
    return shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]])


def parser(doc, **kwargs):
    """An ArgumentParser whose --help is the script's docstring followed by flags with defaults."""
    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass
    return argparse.ArgumentParser(description=doc, formatter_class=Formatter, **kwargs)


def say(message):
    """One line on stderr: progress and notes (stdout is kept for results)."""
    print(message, file=sys.stderr, flush=True)


def start(main):
    """Run a script's `main()` and exit: 0 success, 2 bad input (one line, no traceback),
    130 on Ctrl-C, 143 on SIGTERM."""
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        say("error: " + " ".join(str(error).split("\n")) if "\n  " not in str(error) else f"error: {error}")
        sys.exit(2)
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        if error.filename is None:  # not a path the user gave: a bug, so let it be seen
            raise
        say(f"error: {error.filename}: {error.strerror}")
        sys.exit(2)
    except BrokenPipeError:  # `compare.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as stop:
        say(str(stop) or "interrupted")
        sys.exit(128 + getattr(stop, "signum", 2))
