"""Run the Dockerfile's RUN and CMD lines without Docker, in a new folder that stands for the image.

    python studies/container.py --folder /tmp/container --torch-index https://download.pytorch.org/whl/cpu

A new virtual environment stands for python:3.12-slim, with the Python that runs this. Only what .dockerignore
lets through is copied. Then a demo is trained there. What this cannot show: the system of the slim image, and
that Docker itself builds it. Installing the requirements takes minutes and several GB. As root, the lines
after USER run as that user."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from common.prelude import ROOT

from tests.container import context, copied, instructions

DEMO = ["train_scratch.py", "--demo", "--epochs", "1", "--max-steps", "2", "--img-size", "32"]


def shell_form(value, environment):
    """The value of an ENV or ARG line -> {name: text}."""
    found = dict(re.findall(r"(\w+)=(\S*)", value))
    return {name: os.path.expandvars(text) for name, text in found.items()} | {
        name: environment[name] for name in found if name in environment
    }


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
            environment |= shell_form(value, {})
        elif word == "ARG":
            environment |= shell_form(value, given)
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
