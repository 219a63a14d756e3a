"""The scripts of this folder: which flags each has, and which one makes a run."""

import difflib
import importlib
import re
import sys
from pathlib import Path

from common import Parser

TRAINING = {  # script: where it writes its run unless --out says otherwise
    "train_scratch": "scratch",
    "train_pretrained": "pretrained",
    "train_linear": "linear",
    "train_cnn": "cnn",
    "train_hybrid": "hybrid",
    "pretrain_mae": "mae",
    "train_lungs": "lungs",
}
ALL = (*TRAINING, "calibrate", "predict", "explain", "monitor", "compare")


class _Built(Exception):
    """Carries a parser out of the main() that built it."""


def flags_of(script):
    """The flags of a script, those of its parser: set of str. Its main() goes as far as the command line, no
    further. Empty where the script cannot be imported, because a package is missing."""

    def stop(parser, *args, **kwargs):
        raise _Built(parser)

    usual, argv = Parser.parse_args, sys.argv
    Parser.parse_args, sys.argv = stop, [f"{script}.py"]
    try:
        importlib.import_module(script).main()
    except _Built as built:
        return set(built.args[0]._option_string_actions)
    except ImportError:
        return set()
    finally:
        Parser.parse_args, sys.argv = usual, argv
    raise RuntimeError(f"{script}.py reads no command line")


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
    texts = (path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py"))
    return any(re.search(pattern, text, re.MULTILINE) for text in texts)


def making(folder):
    """The command that makes a run in `folder`: by the script whose usual folder has the nearest name."""
    name, usual = Path(folder).name, {out: script for script, out in TRAINING.items()}
    stem = re.sub(r"(-demo)?(-seed\d+)?$", "", name)
    nearest = difflib.get_close_matches(stem, usual, 1, cutoff=0.5) or [o for o in usual if o in stem]
    script = usual[nearest[0] if nearest else "scratch"]
    if Path(folder) == Path("outputs", usual_folder(script)):
        return f"python {script}.py"
    return f"python {script}.py --out {folder}"


def usual_folder(script):
    """The last part of the folder that a training script writes to."""
    return TRAINING[script]
