"""Which image files there are: folders searched, files recognised by name or by their first bytes, and a
count of whatever is passed over.

A file called .jpg, say, is taken as it is; reading it tells whether it is one. Of any other name the first
bytes decide, so that a DICOM called IM_0001 is found. System files of macOS, Windows and network storage are
passed over without a word, everything else is counted by reason.
"""

import contextlib
import glob
import itertools
import os
import re
import threading
import time
from collections import Counter
from pathlib import Path

from common.console import InputError, say, say_once

EXTENSIONS = (".jpeg", ".jpg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".dcm", ".dicom")
READ = "JPEG, PNG, TIFF, BMP, WebP and DICOM"
SEARCH_NOTE = 10  # seconds between two lines about a search that goes on
HEAD = 200  # bytes that tell what a file is
DICOMDIR = b"1.2.840.10008.1.3.10"  # its class: the table of contents of a disc, which holds no picture
BITMAP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # sizes of a BMP's second header
# The first element of a data set without header: of group 8, its type given or not, its length plausible.
BARE_DICOM = re.compile(
    rb"\x08\0[\0-\x18]\0(?:UL\x04\0|CS[\0-\x10]\0|UI[\0-\x40]\0|DA[\0-\x10]\0|[\0-\x40]\0\0\0)"
)
DEBRIS = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "#recycle", "@recycle", "$recycle.bin"),
    *("system volume information", "lost+found", "#snapshot", "@recently-snapshot", "@tmp"),
}
HIDDEN_DEBRIS = (
    *("._", ".ds_store", ".localized", ".apdisk", ".spotlight-v100", ".fseventsd", ".temporaryitems"),
    *(".appledouble", ".appledb", ".appledesktop", ".documentrevisions-v100", ".trash", ".@__thumb"),
    *(".snapshot", ".nfs", "__macosx"),
)
DEBRIS_ENDS = (":zone.identifier", "@synoeastream", "@synoresource")
MASKS = re.compile(r"(.*[\s_-])?(masks?|(left|right|manual|lung)masks?|segmentations?)|ground[\s_-]?truths?")


def kind_of(head):
    """The first 200 bytes of a file -> "JPEG", "PNG", "TIFF", "BMP", "WEBP", "DICOM", or None: nothing that
    is read."""
    if head[128:132] == b"DICM":
        return None if DICOMDIR in head else "DICOM"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in BITMAP_HEADERS:
        return "BMP"
    if BARE_DICOM.match(head):
        return "DICOM"
    return None


def is_debris(name):
    """Whether a file or folder of this name is the system's own: .DS_Store, Thumbs.db, @eaDir and the
    like."""
    name = name.lower()
    return name in DEBRIS or name.startswith(HIDDEN_DEBRIS) or name.endswith(DEBRIS_ENDS)


def is_passed_over(name):
    """Whether a folder of this name is never looked into: hidden, or the system's own."""
    return name.startswith(".") or is_debris(name)


def subfolders(folder):
    """The names of the folders in a folder that may be looked into, sorted; none if there is no such
    folder."""
    with contextlib.suppress(OSError):
        return sorted(p.name for p in Path(folder).iterdir() if p.is_dir() and not is_passed_over(p.name))
    return []


def extension(name):
    """A file name's extension in lower case, or "without extension"; numbers, as in 1.2.840.1, are none."""
    found = re.search(r"[^.](\.[a-z][a-z0-9_~-]{0,11})$", name.lower())
    return found[1] if found else "without extension"


class Search:
    """A search of folders for image files, which counts what it passes over.

    `by_content`: {extension: images that their name does not tell}; `passed`: {reason: files or folders}.
    Both grow as `walk` advances. `used`: paths of files that are no input of the search, a table say."""

    def __init__(self, used=()):
        self.by_content, self.passed = Counter(), Counter()
        self.used = {os.path.realpath(path) for path in used}

    def walk(self, top):
        """Yield the image files under a folder, sorted by name, those of a folder before those of its
        folders. Anything that is no folder is yielded as it is.

        Links to folders are followed, but none to a place that was searched already or that holds `top`."""
        if not os.path.isdir(top):
            yield top
            return
        home, searched, last = os.path.realpath(top), set(), time.monotonic()
        waiting = [os.fspath(top)]
        while waiting:
            folder = waiting.pop()
            place = os.path.realpath(folder)
            if place in searched or (place != home and home.startswith(os.path.join(place, ""))):
                self.passed["folders linked again"] += 1
                continue
            searched.add(place)
            if time.monotonic() - last > SEARCH_NOTE:
                last = time.monotonic()
                say(f"still looking for images, now in {folder}")
            try:
                with os.scandir(folder) as entries:
                    entries = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                say(f"note: the folder {folder} cannot be read ({error.strerror}), passed over")
                self.passed["folders that cannot be read"] += 1
                continue
            inner = []
            for entry in entries:
                if _is(entry.is_dir):
                    inner += [entry.path] if self._enters(entry.name) else []
                elif self._takes(entry):
                    yield entry.path
                    last = time.monotonic()
            waiting += reversed(inner)

    def _enters(self, name):
        """Whether a folder of this name is searched; counts it if not."""
        if is_debris(name):
            return False
        if name.startswith("."):
            self.passed["hidden folders"] += 1
            return False
        if MASKS.fullmatch(name.lower()):
            self.passed["folders of masks"] += 1
            return False
        return True

    def _takes(self, entry):
        """Whether a directory entry is an image file; counts it. A broken link with an image's name is one:
        reading it gives the reason."""
        name = entry.name
        if is_debris(name):
            return False
        if self.used and os.path.realpath(entry.path) in self.used:
            return False
        if name.startswith("."):
            self.passed["hidden"] += 1
            return False
        what, known = extension(name), name.lower().endswith(EXTENSIONS)
        if not _is(entry.is_file):
            broken = not os.path.exists(entry.path)
            if broken and known:
                return True
            reason = "broken links" if broken else "no regular files"
            self.passed[reason] += 1
            return False
        if known:
            return True
        try:
            with open(entry.path, "rb") as file:
                head = file.read(HEAD)
        except OSError:
            self.passed["that cannot be opened"] += 1
            return False
        if kind_of(head):
            self.by_content[what] += 1
            return True
        reason = "DICOMDIR" if DICOMDIR in head else what
        self.passed[reason] += 1
        return False

    def add(self, other):
        """Count what another Search counted, too."""
        for name in ("by_content", "passed"):
            getattr(self, name).update(getattr(other, name))

    def pass_over(self, count, reason):
        """Count files that were passed over elsewhere."""
        if count:
            self.passed[reason] += count

    def summary(self):
        """What was passed over, and what only content told, as text; "" if there is neither."""
        parts = []
        if self.passed:
            parts.append(f"passed over: {_listed(self.passed)}")
        if self.by_content:
            parts.append(f"recognised by content, not by name: {_listed(self.by_content)}")
        return "; ".join(parts)

    def tell(self, where):
        """One line on stderr about the search of `where`, if there is anything to say; not twice a
        command."""
        if text := self.summary():
            say_once(f"note: {where}: {text}")

    def nothing(self):
        """What to say where no image was found: what is read, and what is there."""
        there = _listed(self.passed) or "nothing"
        return f"files are read that are {READ} ({' '.join(EXTENSIONS)}, or of any name); there is: {there}"


def _is(question):
    """The answer of os.DirEntry.is_dir or is_file; False where the system cannot tell."""
    try:
        return question()
    except OSError:
        return False


def _listed(counts):
    """ "14 .gif, 3 without extension": a Counter as text, the greatest first."""
    return ", ".join(
        f"{n} {what}" for what, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )


# ---------------------------------------------------------------- files, folders and globs


def find_files(paths, search):
    """Files, folders and globs -> iterator over the names of image files; folders by `search`, a Search.

    Folders are searched as the iterator advances. A file that is named or matched by a glob is yielded
    whatever its name. InputError, before the first file, for a path that does not exist and matches nothing.
    """
    expanded = []
    for path in paths:
        found = [path] if os.path.exists(path) else _expand(path)
        if not found:
            raise InputError(f"{path} is not a file, not a folder, and as a glob matches nothing")
        expanded += found
    return itertools.chain.from_iterable(map(search.walk, expanded))


def _expand(pattern):
    """What a glob matches, sorted, less what lies in a matched folder, which is searched anyway (`**` matches
    both)."""
    found, done = [], threading.Event()

    def report():  # in a thread, because a search may go on for long without any match
        while not done.wait(SEARCH_NOTE):
            say(f"still looking for {pattern}: {len(found)} found so far")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        for path in glob.iglob(pattern, recursive=True):
            found.append(path)
        folders = {Path(path) for path in found if os.path.isdir(path)}
    finally:
        done.set()
        thread.join()
    return sorted(path for path in found if folders.isdisjoint(Path(path).parents))
