"""What every script shares: one error type, one way to write a file, one way to start and stop."""

import argparse
import contextlib
import hashlib
import json
import os
import shlex
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

# What reading a damaged .npz may raise.
DAMAGED = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


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
    for left in path.parent.glob(f".{path.stem}.*.tmp{path.suffix}"):
        if not _alive(left.name.removesuffix(f".tmp{path.suffix}").rpartition(".")[2]):
            left.unlink(missing_ok=True)  # of a process that was killed
    tmp = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield tmp
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
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
    except OSError:
        pass
    return True


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
    if not path.exists():
        raise InputError(f"{path} does not exist: train a model first, or name the folder of one with --run")
    results = read_json(path)
    check_format(results, path)
    number = (int, float)
    kinds = {
        "model": str,
        "model_config": dict,
        "params": int,
        "minutes": number,
        "synthetic": bool,
        "split": dict,
        "data": dict,
        "history": list,
        "best_epoch": int,
        "recipe": dict,
        "mean": list,
        "std": list,
        "finished": bool,
    }
    wrong = [k for k, kind in kinds.items() if not isinstance(results.get(k), kind)]
    if not wrong:
        split, epochs = results["split"], results["history"]
        wrong += [
            f"split.{k}" for k in ("train", "val", "test", "counts", "fingerprint", "set") if k not in split
        ]
        wrong += [] if "amp" in results["recipe"] else ["recipe.amp"]
        wrong += [
            k
            for k in ("mean", "std")
            if len(results[k]) not in (1, 3)
            or len(results["mean"]) != len(results["std"])
            or not all(isinstance(v, number) for v in results[k])
        ]
        wrong += (
            []
            if results["best_epoch"] <= len(epochs) and (epochs or not results["finished"])
            else ["best_epoch"]
        )
        needed = {"train_loss", "val_loss"} | (
            {"val_auroc"} if results["model_config"].get("kind") != "mae" else set()
        )
        wrong += ["history"] * any(not isinstance(h, dict) or not needed <= h.keys() for h in epochs)
    if wrong:
        raise InputError(
            f"{path} is damaged or was not written by a training script: missing or wrong {', '.join(wrong)}"
        )
    return results


def check_format(value, path):
    """InputError if a JSON file's "format" is absent, or newer than this version reads."""
    found = value.get("format")
    if not isinstance(found, int):
        raise InputError(f"{path} is damaged: it has no format number")
    if found > FORMAT:
        raise InputError(
            f"{path} has format {found}, this version reads up to {FORMAT}: update these scripts"
        )


def read_calibration(run, suffix=""):
    """calibration{suffix}.json of a run; InputError if absent, newer, damaged, or made for another checkpoint."""
    path = Path(run, f"calibration{suffix}.json")
    if not path.exists():
        raise InputError(
            f"{run} is not calibrated: run python calibrate.py{' --tta' if suffix else ''} first"
        )
    calibration = read_json(path)
    check_format(calibration, path)
    rows = (
        [calibration.get(s, {}).get(p, {}) for s in ("val", "test") for p in ("at_0.5", "at_rec")]
        if all(isinstance(calibration.get(s), dict) for s in ("val", "test"))
        else [{}]
    )
    numbers = [calibration.get(k) for k in ("threshold", "temperature", "min_recall", "bootstrap")]
    if (
        not all(isinstance(v, (int, float)) for v in numbers)
        or not 0 <= numbers[0] <= 1
        or not numbers[1] > 0
        or not all(
            {"interval", "at_prevalence", "thr", "recall", "specificity"} <= row.keys() for row in rows
        )
        or not {"guarantee", "probability", "temperature_applied", "checkpoint"} <= calibration.keys()
    ):
        raise InputError(f"{path} is damaged: run calibrate.py again")
    checkpoint = Path(run, "checkpoint.pth")
    if not checkpoint.exists() or sha256(checkpoint) != calibration["checkpoint"]:
        raise InputError(f"{path} was made for another checkpoint than {checkpoint}: run calibrate.py again")
    return calibration


def find_runs(runs_dir, chosen=None):
    """Run folders: those named in `chosen`, else every finished run directly under `runs_dir`, sorted.

    Unfinished runs are passed over with a note, unless chosen. InputError if there is none.
    """
    if chosen:
        return list(dict.fromkeys(Path(os.path.normpath(run)) for run in chosen))
    runs = []
    for path in sorted(Path(runs_dir).glob("*/results.json")):
        results = read_results(path.parent)
        if results["model_config"].get("kind") == "mae":
            continue  # it has no classes, so no score
        if results["finished"]:
            runs.append(path.parent)
        else:
            say(
                f"note: {path.parent} is not finished, passed over (name it with --run to use it all the same)"
            )
    if not runs:
        raise InputError(
            f"no finished runs under {runs_dir}: train one first, "
            "for instance python train_scratch.py --epochs 15"
        )
    return runs


def sha256(data):
    """Hex SHA-256 of a file's bytes (Path) or of a value's canonical JSON (anything else)."""
    if isinstance(data, Path):
        with open(data, "rb") as f:
            return (
                hashlib.file_digest(f, "sha256").hexdigest()
                if sys.version_info >= (3, 11)
                else hashlib.sha256(f.read()).hexdigest()
            )
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def load_tensors(path):
    """torch.load restricted to tensors and plain Python values: code in a pickle is refused, not run."""
    import pickle

    import torch  # here, not above: scripts that only read JSON need no torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the very thing that is refused below
            value = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: train the model again, or copy the file back") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        unsafe = "weights_only" in str(error) or "Unsupported" in str(error)
        why = (
            "it holds something other than tensors, perhaps code, and was refused"
            if unsafe
            else "it is damaged; train again, or copy the file back"
        )
        raise InputError(f"{path} cannot be loaded: {why}") from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{path} holds a {type(value).__name__} that is not a state dict")
    return value


def command_line():
    """The command as typed, quoted for a shell, for results.json and resume messages."""
    number = os.environ.get("WORLD_SIZE", "1")
    runner = ["python"] if number == "1" else ["torchrun", "--nproc_per_node", number]
    return shlex.join([*runner, os.path.basename(sys.argv[0]), *sys.argv[1:]])


def parser(doc, **kwargs):
    """An ArgumentParser whose --help is the script's docstring followed by flags with defaults."""

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            if action.default is None or "default:" in (action.help or ""):
                return action.help
            return super()._get_help_string(action)

    return argparse.ArgumentParser(description=doc, formatter_class=Formatter, **kwargs)


def say(message):
    """One line on stderr: progress and notes (stdout is kept for results); of torchrun's processes the first one's."""
    if os.environ.get("RANK", "0") == "0" or str(message).startswith("error: "):
        print(message, file=sys.stderr, flush=True)


def start(main):
    """Run a script's `main()` and exit: 0 success, 2 bad input (one line, no traceback),
    130 on Ctrl-C, 143 on SIGTERM."""
    code = 0
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        say("error: " + " ".join(str(error).split("\n")) if "\n  " not in str(error) else f"error: {error}")
        code = 2
    except BrokenPipeError:  # `compare.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.filename is None:  # not about a path: a bug, so let it be seen
            raise
        say(f"error: {error.filename}: {error.strerror}")
        code = 2
    except KeyboardInterrupt as stop:
        say(str(stop) or "interrupted")
        code = 128 + getattr(stop, "signum", 2)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # DistributedDataParallel keeps gloo's threads for the life of the process. One that frees a tensor while the
        # interpreter is being torn down aborts it, now and then, so under torchrun there is no tearing down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)
