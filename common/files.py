"""One way to read and write files: whole or not at all, JSON with a format number, checksums."""

import contextlib
import fnmatch
import hashlib
import json
import os
import stat
import tempfile
from pathlib import Path

from common.console import InputError

FORMAT = 1  # of results.json and most other files; a reader refuses a higher number
CALIBRATION = 3  # of calibration.json; records/schema.py reads those of lower numbers
OF_RUNS = ("results.json", "checkpoint.pth", "last.pth", "scores*.npz", "calibration*.json", "track.json")
OF_RUNS += ("predictions*.csv", "reference*.npz", "audit*")  # files of a run folder
JSON_LIMIT = 64 << 20  # bytes; the largest file a script writes itself is a few MB


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
    """InputError unless a file can be written where a flag says: no device, no folder, no file of a run, no
    image or other file that is not text (but a model.onnx), and in a folder that is there. A misspelt place
    is not made."""
    folder = Path(path).parent
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{flag} {path}: {folder} is not a folder: name another place for the output")
    if not folder.exists():
        raise InputError(f"{flag} {path}: there is no folder {folder}: make it first, or name another place")
    check_regular(path)
    name = Path(path).name
    if Path(path).exists() and not name.lower().endswith(".onnx"):
        with open(path, "rb") as file:
            if b"\0" in file.read(1024):  # no text has it, and the beginning of every image does
                raise InputError(f"{flag} {path} is there already and is no text: name another place")
    if (folder / "results.json").exists() and any(fnmatch.fnmatch(name, pattern) for pattern in OF_RUNS):
        raise InputError(f"{flag} {path} is a file of the run {folder}: name another place for the output")


def check_folder(flag, folder):
    """InputError, naming the flag, if a folder cannot be made or written to; none is left behind."""
    new = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{flag} {folder} cannot be written to: {error.strerror}") from None
    finally:
        for p in new:
            if p.exists():
                p.rmdir()


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


def remove(folder, patterns, itself=False):
    """Delete the files of a folder that match one of `patterns`; `itself`: the folder too, if it is empty
    then."""
    for pattern in patterns:
        for path in list(folder.glob(pattern)):
            path.unlink(missing_ok=True)
    if itself:
        with contextlib.suppress(OSError):  # not empty, or not there
            folder.rmdir()


def write_json(path, value):
    """Write `value` as indented JSON, atomically. NaN and infinity are refused (not valid JSON)."""
    text = json.dumps(value, indent=1, allow_nan=False)
    with atomic_path(path) as tmp:
        tmp.write_text(text + "\n", encoding="utf-8")


def save_figure(path, figure, dpi):
    """Write a matplotlib figure as a picture, atomically, and let go of it."""
    from matplotlib import pyplot as plt  # slow to import

    with atomic_path(path) as tmp:
        figure.savefig(tmp, dpi=dpi)
    plt.close(figure)


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


def bytes_in(folder):
    """The size of all files under a folder; links count as nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(Path(place, name)).st_size
            except OSError:  # gone while we looked
                continue
    return total
