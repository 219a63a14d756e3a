"""Which process is training in a run folder: a lock with its number, which ends with the process.

The kernel holds the lock (flock), so what a killed process leaves behind binds nobody, and no other process
that gets its number is taken for it. Windows has no such locks: there nothing is locked, and nothing found.
"""

import os
import platform
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from common.console import InputError, say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = "training.lock"
PATIENCE = 1.0  # seconds; another command that only looks has the lock for an instant


def holder(folder):
    """The live process that trains in a run folder, as text: "process 12", with the machine where it is
    another one; None if there is none."""
    if fcntl is None:
        return None
    try:
        with open(Path(str(folder), NAME), encoding="utf-8") as file:
            return None if _lock(file, fcntl.LOCK_SH) else _named(file)
    except OSError:  # no such file, or not where files can be locked
        return None


def _lock(file, kind):
    """Try to lock an open file; whether that succeeded. OSError where files cannot be locked."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _named(file):
    """Who wrote a lock file, as text."""
    file.seek(0)
    number, _, machine = file.read(300).strip().partition(" ")
    if not number.isdecimal():
        return "another process"
    if machine == platform.node():
        return f"process {number}"
    return f"process {number} on {machine}"


def refuse_held(folder, advice):
    """InputError if a live process trains in a run folder."""
    if who := holder(folder):
        raise InputError(f"{folder} is being trained by {who}: {advice}")


@contextmanager
def held(folder):
    """Hold the lock of a run folder, which is made if need be, and removed if nothing was put into it.
    InputError if another process holds it."""
    if fcntl is None:
        yield
        return
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = _acquire(folder)
    try:
        yield
    finally:
        (folder / NAME).unlink(missing_ok=True)  # before it is let go, so that it is this one
        file.close()
        for path in made:
            with suppress(OSError):  # not empty: the run is there
                path.rmdir()


def _acquire(folder):
    """The open and locked lock file of a folder, with this process's number in it."""
    path, end = folder / NAME, time.monotonic() + PATIENCE
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            free = _lock(file, fcntl.LOCK_EX)
        except OSError as error:
            say(f"note: {path} cannot be locked ({error.strerror}): others do not see that a run is trained")
            return file
        if free and _is_at(file, path):
            file.truncate(0)
            file.write(f"{os.getpid()} {platform.node()}\n")
            file.flush()
            return file
        who = None if free else _named(file)
        file.close()
        if who and time.monotonic() > end:
            raise InputError(f"{folder} is being trained by {who}: wait until it has ended")
        time.sleep(0.02)


def _is_at(file, path):
    """Whether an open file is still the one at `path`: the process that held it may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
