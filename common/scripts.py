"""The scripts at the root: which flags each has, and which one makes a run."""

from common.prelude import ROOT

import argparse
import difflib
import importlib
import itertools
import os
import re
import shlex
import sys
from pathlib import Path

TRAINING = {  # script: where it writes its run unless --out says otherwise
    "train_scratch": "scratch",
    "train_pretrained": "pretrained",
    "train_linear": "linear",
    "train_cnn": "cnn",
    "train_hybrid": "hybrid",
    "pretrain_mae": "mae",
    "train_lungs": "lungs",
}
ROOMS = ("common", "images", "layouts", "models", "training")  # where flags are made, besides the scripts
LAST_VERSION = "the version of commit 82507f6"  # that has these flags and reads runs which used them
GONE = ("--normalise", "--teacher-features")
LISTED = 8  # runs in a message
ALL = (*TRAINING, "calibrate", "predict", "explain", "monitor", "audit", "compare")


class _Built(Exception):
    """Carries a parser out of the main() that built it."""


def parser_of(script):
    """The parser of a script: its main() goes as far as the command line, no further. None where the script
    cannot be imported, because a package is missing."""

    def stop(parser, *args, **kwargs):
        raise _Built(parser)

    usual, argv = argparse.ArgumentParser.parse_args, sys.argv
    argparse.ArgumentParser.parse_args, sys.argv = stop, [f"{script}.py"]
    try:
        importlib.import_module(script).main()
    except _Built as built:
        return built.args[0]
    except ImportError:
        return None
    finally:
        argparse.ArgumentParser.parse_args, sys.argv = usual, argv
    raise RuntimeError(f"{script}.py reads no command line")


def flags_of(script):
    """The flags of a script: set of str, empty where it cannot be imported."""
    parser = parser_of(script)
    return set(parser._option_string_actions) if parser else set()


def having(flag, besides=""):
    """The scripts, but the file `besides`, that have a flag: list of file names."""
    if not _occurs(flag):  # then no script need be imported, which takes seconds
        return []
    others = [script for script in ALL if f"{script}.py" != besides]
    return [f"{script}.py" for script in others if flag in flags_of(script)]


def _occurs(flag):
    """Whether the code names a flag at all, as such or as the field of a dataclass."""
    name = flag.removeprefix("--").removeprefix("no-")
    pattern = rf'"--{re.escape(name)}"|^ +{re.escape(name.replace("-", "_"))}: \w+ = flag\('
    files = itertools.chain(ROOT.glob("*.py"), *(ROOT.glob(f"{room}/*.py") for room in ROOMS))
    texts = (path.read_text(encoding="utf-8") for path in files)
    return any(re.search(pattern, text, re.MULTILINE) for text in texts)


def making(folder, script=None):
    """The command that makes a run in `folder`: by `script`, or the one whose usual folder has the nearest
    name."""
    if script is None:
        stem = re.sub(r"(-demo)?(-seed\d+)?$", "", Path(folder).name)
        if stem.startswith("ens"):
            return f"python calibrate.py --ensemble RUN RUN --out {shlex.quote(str(folder))}"
        # What has no classes, and so no scores, is meant only where the name says so.
        others = [out for out in ("mae", "lungs") if out not in stem]
        script_of = {out: script for script, out in TRAINING.items() if out not in others}
        nearest = difflib.get_close_matches(stem, script_of, 1, cutoff=0.5)
        # A name such as scratch-of-monday is near to none, but holds one; the rest is taken for scratch.
        nearest += [out for out in script_of if out in stem]
        script = script_of[[*nearest, "scratch"][0]]
    if Path(folder) == Path("outputs", TRAINING[script]):
        return f"python {script}.py"
    return f"python {script}.py --out {shlex.quote(str(folder))}"


def there_is(folder, script=None):
    """What to do where `folder` holds no run, as the end of a sentence: the runs that are there, beside it,
    in it and under outputs/, those of the nearest names first; and the command that makes one."""
    runs = []
    for place in dict.fromkeys(Path(os.path.normpath(place)) for place in (folder.parent, folder, "outputs")):
        runs += [path.parent for path in sorted(place.glob("*/results.json"))]
    names = [str(run) for run in dict.fromkeys(runs)]
    # The nearest names first, and not all of them where there are many.
    likeness = {name: difflib.SequenceMatcher(None, Path(name).name, folder.name).ratio() for name in names}
    names.sort(key=lambda name: -likeness[name])
    listed = ", ".join(names[:LISTED])
    if len(names) > LISTED:
        listed += f" and {len(names) - LISTED} more"
    there = f"the runs that are there: {listed}" if names else "there is no run yet"
    return f"; {there}; {making(folder, script)} makes one here"
