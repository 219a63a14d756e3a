"""Run the Dockerfile's RUN and CMD lines without Docker, in a new folder that stands for the image.

    python studies/container.py --folder /tmp/container --torch-index https://download.pytorch.org/whl/cpu

A new virtual environment stands for python:3.12-slim, with the Python that runs this. Only what .dockerignore
lets through is copied. Then a demo is trained there. What this cannot show: the system of the slim image, and
that Docker itself builds it. Installing the requirements takes minutes and several GB. As root, the lines
after USER run as that user."""

import argparse
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from common.prelude import ROOT

DEMO = ["train_scratch.py", "--demo", "--epochs", "1", "--max-steps", "2", "--img-size", "32"]


# ---------------------------------------------------------------- reading both files as Docker does


def instructions(path):
    """[(instruction, what follows it)] of a Dockerfile: comments are left out, continued lines joined."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def left_out(patterns, path):
    """Whether .dockerignore leaves out a file: the last pattern that fits the path or a folder above it
    decides. `path`: relative, with /."""
    places = [path, *(str(parent) for parent in PurePosixPath(path).parents if parent.name)]
    out = False
    for pattern in patterns:
        sign, pattern = pattern.startswith("!"), pattern.removeprefix("!")
        if any(fits(pattern, place) for place in places):
            out = not sign
    return out


def fits(pattern, path):
    """Whether a pattern fits a whole path; * stops at a /, **/ is any number of folders."""
    if pattern.startswith("**/"):
        parts = path.split("/")
        return any(fits(pattern[3:], "/".join(parts[first:])) for first in range(len(parts)))
    pattern, parts = pattern.split("/"), path.split("/")
    return len(pattern) == len(parts) and all(map(fnmatch.fnmatchcase, parts, pattern))


def context(root):
    """The files that Docker gets to see: relative paths with /, sorted."""
    lines = (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    named = {pattern.removeprefix("!").split("/")[0] for pattern in patterns if pattern.startswith("!")}
    seen = []
    for place in root.iterdir():  # the folders of data may hold a million files, so none is entered unasked
        if any(fnmatch.fnmatchcase(place.name, name) for name in named):
            seen += [file for file in [place, *place.rglob("*")] if file.is_file()]
    relative = sorted(file.relative_to(root).as_posix() for file in seen)
    return [path for path in relative if not left_out(patterns, path)]


def copied(value, seen, root, folder):
    """Do a COPY line with these words from the files `seen` of `root` to `folder` -> the files written,
    relative; ValueError for a source that is not there."""
    *sources, _ = value.split()
    files = []
    for source in sources:
        found = [path for path in seen if source == "." or path == source or path.startswith(f"{source}/")]
        if not found:
            raise ValueError(f"COPY {value}: there is no {source} that .dockerignore lets through")
        files += found
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, folder / path)
    return files


# ---------------------------------------------------------------- doing what they say


def assigned(value, given):
    """What an ENV or ARG line assigns: {name: text}; `given`: {name: text} that wins."""
    found = dict(re.findall(r"(\w+)=(\S*)", value))
    return {name: given.get(name, text) for name, text in found.items()}


def run(command, folder, environment, user):
    """Run a command, a list, in a folder, as the user (number, group) or as whoever runs this."""
    print("+", " ".join(command), flush=True)
    who = {}
    if user and os.getuid() == 0:
        who = dict(user=user[0], group=user[1], extra_groups=[])
    subprocess.run(command, cwd=folder, env=environment, check=True, **who)


def build(folder, given):
    """Do what each line of the Dockerfile says, in `folder`; `given`: {name: value} of --build-arg -> (what
    CMD starts, the environment, the user)."""
    app, python = folder / "app", folder / "python"
    venv.create(python, with_pip=True)
    app.mkdir()
    environment = {"PATH": f"{python / 'bin'}:/usr/bin:/bin"}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    user, entry, default = None, [], []
    for word, value in instructions(ROOT / "Dockerfile"):
        if word == "ENV":
            environment |= assigned(value, {})
        elif word == "ARG":
            environment |= assigned(value, given)
        elif word == "COPY":
            copied(value, context(ROOT), ROOT, app)
        elif word == "RUN":
            run(["/bin/sh", "-c", value], app, environment, user)
        elif word == "USER":
            user = tuple(map(int, value.split(":")))
        elif word == "ENTRYPOINT":
            entry = json.loads(value)
        elif word == "CMD":
            default = json.loads(value)
    return (entry, default), environment, user


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", metavar="DIR", help="where to build, and leave it (default: a temporary one)"
    )
    parser.add_argument("--torch-index", default="", metavar="URL", help="as --build-arg TORCH_INDEX=URL")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.chmod(temporary, 0o755)  # as USER enters it
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        (entry, default), environment, user = build(folder, {"TORCH_INDEX": args.torch_index})
        run(entry + default, folder / "app", environment, user)
        run(entry + DEMO, folder / "app", environment, user)
        print(sorted(path.name for path in (folder / "app" / "outputs").glob("*/*")))


if __name__ == "__main__":
    main()
