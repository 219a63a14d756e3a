"""Reading the Dockerfile and .dockerignore as Docker does, as far as ours go. For tests/test_container.py and
studies/container.py."""

import fnmatch
import re
import shutil
from pathlib import PurePosixPath


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
