"""The first import of every script: how it ends while its other imports run.

Importing torch takes seconds, and main() begins only after them. In that time Ctrl-C ends the process with
one line, and so does a required package that is not there. Where no script of this folder is run, but a test
or a notebook, nothing changes. Needs the standard library alone.
"""

import contextlib
import os
import re
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the folder of the scripts
REQUIREMENTS = ROOT / "requirements.txt"
MODULES = {"scikit-learn": "sklearn", "scikit-image": "skimage", "pillow": "PIL"}  # where names differ


def missing(error):
    """What to say of an ImportError if a package of requirements.txt is not installed; else None."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines() if REQUIREMENTS.exists() else []
    names = [match[0] for line in lines if (match := re.match(r"[\w.-]+", line))]
    packages = {MODULES.get(name.lower(), name): name for name in names}
    package = packages.get((error.name or "").partition(".")[0])
    if package is None or not isinstance(error, ModuleNotFoundError):
        return None
    return (
        f"{package} is not installed for this Python ({sys.executable}); activate the environment that has "
        r"it (source .venv/bin/activate, on Windows .venv\Scripts\activate), or install all that is needed: "
        "python -m pip install -r requirements.txt"
    )


def _leave(signum, frame):
    """Ctrl-C outside main(). An exception could be swallowed by a half-imported library; this cannot."""
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(128 + signum)


def _say_missing(kind, error, trace):
    """What happens to an exception that nobody caught: one line for a package that is missing."""
    text = missing(error) if isinstance(error, ImportError) else None
    if text is None:
        return sys.__excepthook__(kind, error, trace)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"error: {text}", file=sys.stderr, flush=True)
    os._exit(2)


@contextlib.contextmanager
def interruptible():
    """Within the block Ctrl-C raises KeyboardInterrupt as usual; outside it a script ends at once."""
    ours = signal.getsignal(signal.SIGINT) is _leave
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, _leave)


def begin():
    """Prepare the process, if it runs a script of this folder."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None or Path(script).resolve().parent != ROOT:
        return
    sys.excepthook = _say_missing
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in a background job it is ignored
        signal.signal(signal.SIGINT, _leave)


begin()
