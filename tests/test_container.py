"""Tests of the Dockerfile, without Docker: what would be copied is copied to an empty folder and used there.

studies/container.py executes its RUN and CMD lines in full."""

import ast
import json
import subprocess
import sys

import pytest

from common.scripts import ALL
from studies.container import context, copied, instructions, left_out
from tests.shared import REPO

LINES = instructions(REPO / "Dockerfile")


def value_of_line(word):
    """What follows the only instruction of a name."""
    (value,) = [value for name, value in LINES if name == word]
    return value


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A folder that holds what the COPY lines copy, and the two folders that are made."""
    folder = tmp_path_factory.mktemp("image") / "app"
    folder.mkdir()
    for name, value in LINES:
        if name == "COPY":
            copied(value, context(REPO), REPO, folder)
    return folder


def test_dockerignore_patterns():
    """Cases from Docker's documentation of the file."""
    patterns = ["*", "!*.py", "!common", "conftest.py", "**/__pycache__"]
    kept = ["predict.py", "common/cli.py", "common/deep/file.jinja"]
    gone = ["Data/a.png", "conftest.py", "tests/test_a.py", "common/__pycache__/cli.pyc", "weights/x.npz"]
    assert [left_out(patterns, path) for path in kept + gone] == [False] * 3 + [True] * 5


def test_container_is_no_place_for_data(image):
    """No image, no weights but the small U-Net, no run; and not root."""
    kinds = {path.suffix for path in image.rglob("*") if path.is_file()}
    assert kinds <= {".py", ".txt", ".jinja", ".html", ".css", ".js", ".safetensors", ""}
    assert [path.name for path in image.rglob("*.safetensors")] == ["lung_unet.safetensors"]
    assert not {"tests", "studies", "docs", "Data", "outputs"} & {path.name for path in image.iterdir()}
    names = [name for name, _ in LINES]
    user, group = value_of_line("USER").split(":")
    assert (
        int(user)
        and int(group)
        and names.index("USER") > max(number for number, name in enumerate(names) if name == "RUN")
    )
    assert set(json.loads(value_of_line("VOLUME"))) == {"/app/Data", "/app/weights", "/app/outputs"}


def test_container_holds_every_module(image):
    """Every file of the library that git knows is in it, with what lies next to the code."""
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folders = {path.parent.name for path in REPO.glob("*/__init__.py")} - {"tests", "studies"}
    files = [path for path in listed.stdout.split("\n") if path.split("/")[0] in folders]
    assert len(files) > 100 and [path for path in files if not (image / path).exists()] == []


START = """
import contextlib, io, runpy, sys
scripts = sys.argv[1:]
for name in scripts:
    sys.argv = [f"{name}.py", "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path(f"{name}.py", run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
    print(name, code, out.getvalue().startswith(f"usage: {name}"))
print([sys.modules[name].__file__ for name in ("common", "data", "vit", "metrics")])
"""


def test_every_script_starts_in_the_container(image):
    """--help of every script, from the copied files alone, in one process: starting torch takes seconds."""
    entry, default = json.loads(value_of_line("ENTRYPOINT")), json.loads(value_of_line("CMD"))
    assert entry == ["python"] and default[0].removesuffix(".py") in ALL
    done = subprocess.run([sys.executable, "-c", START, *ALL], cwd=image, capture_output=True, text=True)
    *started, used = done.stdout.splitlines()
    assert started == [f"{name} 0 True" for name in ALL], done.stderr
    assert all(path.startswith(str(image)) for path in ast.literal_eval(used))


def test_run_lines_of_the_container(image):
    """The RUN line that needs no network, as the shell executes it; the other one installs requirements.txt
    alone."""
    install, prepare = [value for name, value in LINES if name == "RUN"]
    asked = install.replace("pip install", "echo", 1)
    for url, extra in (("", ""), ("https://x.org/cpu", "--extra-index-url https://x.org/cpu ")):
        done = subprocess.run(["sh", "-c", asked], env={"TORCH_INDEX": url}, capture_output=True, text=True)
        assert done.stdout == f"--no-cache-dir {extra}-r requirements.txt\n"
    subprocess.run(["sh", "-c", prepare], cwd=image, check=True)
    for folder in ("Data", "weights", "outputs"):
        assert (image / folder).stat().st_mode & 0o777 == 0o777
