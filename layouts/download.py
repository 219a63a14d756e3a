"""The download of a set from Kaggle, with the steps by hand where it does not get through."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

from common.console import InputError, Pace, in_one_line, progress, say
from common.files import bytes_in
from images.find import EXTENSIONS
from layouts.download_account import advice, in_words, places, status_of, status_of_text
from layouts.folders import find_root

KAGGLE = "paultimothymooney/chest-xray-pneumonia"
VIEW = "https://www.kaggle.com/api/v1/datasets/view/"  # what Kaggle says of a set, to anybody if it is public
GB = 1e9


def download(data_dir, name=KAGGLE):
    """Fetch the Kaggle set OWNER/NAME into `data_dir`: kagglehub, then the kaggle command; InputError with
    what Kaggle answered, the accounts looked for, and the steps by hand if neither gets through.

    Says how much is fetched, and how far it is. The set appears in `data_dir` when it is complete. Nothing is
    done when that already has a train/ folder or a table."""
    # The address of a set's page is often pasted.
    name = re.sub(r"^(https?://)?(www\.)?kaggle\.com/(datasets/)?", "", name).partition("?")[0].rstrip("/")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"--download {name}: a Kaggle set is named OWNER/NAME, such as {KAGGLE}")
    target = Path(data_dir)
    if any(target.glob("*.csv")) or any(target.glob("train")) or root_or_all(target) != target:
        say(f"note: {target} already holds a set, so nothing is downloaded")
        return
    ways = {"kagglehub": find_spec("kagglehub") is not None, "kaggle": shutil.which("kaggle") is not None}
    size = size_of(name) if any(ways.values()) else None
    tries, answers = [], []
    for way, fetch in (("kagglehub", by_kagglehub), ("kaggle", by_command)):
        if not ways[way]:
            tries.append(f"{way}: not installed (pip install {way})")
            continue
        status, fault = fetch(name, target, size)
        if not fault:
            return
        tries.append(f"{way}: {fault}")
        answers.append(status)
    raise InputError(not_through(name, target, tries, answers))


def not_through(name, target, tries, answers):
    """Why no download got through, and what to do, as text."""
    lines = [f"the download of {name} did not get through:", *(f"  {text}" for text in tries)]
    if answers:
        found = places()
        lines.append("Accounts looked for; the first that is there counts:")
        lines += [f"  {place.name}: {place.says}" for place in found]
        lines += filter(None, dict.fromkeys(advice(status, found, name) for status in answers))
    return "\n".join(
        [
            *lines,
            "By hand:",
            f"  1. open https://www.kaggle.com/datasets/{name} in a browser and download the zip",
            f"  2. unzip it so that {target}/train and {target}/test hold the class folders, or, for a",
            f"     table of findings, {target}/images and the CSV file",
            "  3. run the same command again without --download",
        ]
    )


# ---------------------------------------------------------------- how much


def size_of(name):
    """Say how many bytes Kaggle sends for a set -> their number; None, with a note, where it does not say."""
    try:
        with urllib.request.urlopen(VIEW + name, timeout=10) as answer:
            size = json.load(answer)["totalBytes"]
        if not isinstance(size, int) or size <= 0:
            raise ValueError(f"{size!r} bytes")
    except Exception as error:  # the download itself will tell what is wrong
        status = status_of(error)
        why = "Kaggle does not say" if status is None else in_words(status)
        say(f"downloading {name}; its size is not known ({why})")
        return None
    say(f"downloading {name}: {in_bytes(size)}")
    return size


def in_bytes(count):
    """A number of bytes as text: "2.46 GB", "812 MB"."""
    return f"{count / GB:.2f} GB" if count >= GB else f"{count / 1e6:.0f} MB"


def say_fetched(folder, target):
    """Say what was downloaded: files, images among them, bytes."""
    files = files_in(folder)
    images = sum(path.suffix.lower() in EXTENSIONS for path in files)
    size = in_bytes(sum(path.stat().st_size for path in files))
    say(f"downloaded into {target}: {len(files)} files, {images} of them images, {size}")


def files_in(folder):
    """All files under a folder, through links to folders, too."""
    return [Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names]


# ---------------------------------------------------------------- two ways


def by_kagglehub(name, target, size):
    """Fetch a set by kagglehub, which shows its own progress, and copy it from its cache -> (status, fault),
    "" where all is well."""
    try:
        import kagglehub

        source = root_or_all(Path(kagglehub.dataset_download(name)))
    except Exception as error:  # of its own kind for each fault; the other way is tried
        return failed(status_of(error), str(error))
    files = files_in(source)
    check_room(target, sum(path.stat().st_size for path in files))
    # Some sets hold themselves a second time, and all of it would be copied.
    with beside(target) as part:
        for path in progress(files, len(files), f"copying to {target}", "files"):
            place = part / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, place)
        say_fetched(part, target)
        move_in(part, target)
    return None, ""


def by_command(name, target, size):
    """Fetch a set by the kaggle command -> (status, fault), as `by_kagglehub`."""
    if size:
        check_room(target, 2 * size)  # the zip and what is in it
    with beside(target) as part, tempfile.TemporaryFile() as out:
        command = ["kaggle", "datasets", "download", "-d", name, "-p", str(part), "--unzip", "--quiet"]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            watch(process, part, size)
        finally:
            process.kill()  # where this ends before it does
            process.wait()
        if process.returncode:
            out.seek(0)
            text = out.read().decode("utf-8", "replace")
            return failed(status_of_text(text), text)
        found = root_or_all(part)
        if not files_in(found):
            return None, "it ended without an error, but left no file"
        say_fetched(found, target)
        move_in(found, target)
    return None, ""


def watch(process, folder, size, every=1.0):
    """Wait for a process that downloads into a folder, and say how far it is."""
    if size is None:
        pace = Pace()
        for done in megabytes(process, folder, every):
            pace.count(done, "MB downloaded")
        return
    total = size // 1_000_000

    def steps():
        before = 0
        for done in megabytes(process, folder, every):
            now = max(before, min(done, total))  # what is unzipped comes on top
            yield now - before
            before = now

    for _ in progress(steps(), total, "download", "MB", size=int):
        pass


def megabytes(process, folder, every):
    """How many MB a folder holds, every so many seconds until a process ends."""
    while process.poll() is None:
        time.sleep(every)
        yield bytes_in(folder) // 1_000_000


def failed(status, text):
    """(status, fault) of a download that failed, with the end of what was said about it."""
    said = in_one_line(text)
    return status, said if status is None else f"{in_words(status)} ({said})"


# ---------------------------------------------------------------- into its place


@contextlib.contextmanager
def beside(target):
    """A new folder inside `target`, on the same disk, that is gone afterwards: an interrupted download must
    not look like a set."""
    existed = target.exists()
    target.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".download-", dir=target))
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if not existed and not any(target.iterdir()):
            target.rmdir()


def move_in(source, target):
    """Move what a folder holds into `target`; by train/ or a table a set is known, so these come last."""
    entries = sorted(source.iterdir(), key=lambda path: (path.name == "train", path.suffix == ".csv"))
    if taken := [path.name for path in entries if (target / path.name).exists()]:
        raise InputError(
            f"{target} already holds {', '.join(taken[:5])}: name an empty folder with --data-dir"
        )
    for path in entries:
        os.replace(path, target / path.name)


def check_room(target, needed):
    """InputError if the disk of a folder has less than `needed` bytes free."""
    there = next(folder for folder in (target.absolute(), *target.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise InputError(
            f"{target} needs {in_bytes(needed)}, and its disk has {in_bytes(free)} free: name another place "
            "with --data-dir"
        )


def root_or_all(folder):
    """The folder inside a download that holds train/, or all of it if there is none (or several)."""
    try:
        return find_root(folder)
    except InputError:
        return folder
