"""Which image a name in a table means. Only names are compared; no file is opened."""

import re
import unicodedata
from bisect import bisect_left
from operator import itemgetter
from pathlib import Path

from common.console import InputError, say
from images.find import extension

LAST_CHARACTER = chr(0x10FFFF)  # in the order of text, no file name goes beyond it


class Listed:
    """Finds the images that the names in a table mean.

    `files`: {name in a table: path relative to `root`}. A name that is none of these is understood where only
    one image can be meant: an absolute path, or one from another folder, by its ending; a name of a file in a
    folder below; upper case for lower, an accent as a character of its own; a name without its extension.
    Nothing outside `root` is ever found. `by_id`: the names are none of files, but ids, so that nothing need
    be said of it.
    """

    def __init__(self, path, root, files, by_id=False):
        self.path, self.files, self.by_id = path, files, by_id
        self.roots = [Path(root).as_posix(), Path(root).resolve().as_posix()]
        self.claimed = {}  # {file: the name that means it}
        self.examples, self.guessed = [], 0
        self._by_end = None

    def clean(self, name):
        """A name with forward slashes, relative to `root` if it lies there."""
        if name in self.files:
            return name
        name = re.sub(r"/{2,}", "/", name.replace("\\", "/"))
        name = re.sub(r"^(\./)+", "", name)
        if name in self.files:
            return name
        below = [name.removeprefix(f"{root}/") for root in self.roots if name.startswith(f"{root}/")]
        return below[0] if below else name

    def find(self, name, number):
        """The file that a clean name in row `number` means; None if there is none. InputError if several
        could be meant, or if another name means it too."""
        file = self.files.get(name)
        if file is None:
            possible = self._possible(name)
            if len(possible) > 1:
                some = " or ".join(sorted(possible)[:3])
                raise InputError(
                    f"{self.path}, row {number}: {name} could be {some}: write the path relative to "
                    f"{self.roots[0]}"
                )
            if not possible:
                return None
            file = possible.pop()
            self.guessed += 1
            self.examples = self.examples or [name, file]
        other = self.claimed.setdefault(file, name)
        if other != name:
            raise InputError(
                f"{self.path}, row {number}: {name} and, in an earlier row, {other} could both be {file}: "
                f"write the paths relative to {self.roots[0]}"
            )
        return file

    def _possible(self, name):
        """The files that a name which is not one of `files` could mean: set, of the nearest kind that has
        any."""
        *folders, last = folded(name).split("/")
        if not last or ".." in folders:
            return set()
        if self._by_end is None:
            self._by_end = sorted(self._endings())
        written = name.rpartition("/")[2]
        near = self._near(folders, last)
        same = {file for _, end, file in near if end == written}
        any_case = {file for _, end, file in near if folded(end) == last}
        return same or any_case or {file for _, _, file in near}

    def _near(self, folders, last):
        """The entries of `_endings` with this last part whose folders end with `folders`, or end them.

        By bisection: a set may hold 20,000 files called view1_frontal.jpg, and miss as many."""
        path = backwards(folders, last)
        near = self._between(path, path + LAST_CHARACTER)
        for outer in range(1, len(folders) + 1):
            path = backwards(folders[outer:], last)
            near += self._between(path, path + "\0")
        return near

    def _between(self, low, high):
        """The entries of `_endings` whose path backwards is at least `low` and below `high`."""
        start, stop = (bisect_left(self._by_end, bound, key=itemgetter(0)) for bound in (low, high))
        return self._by_end[start:stop]

    def _endings(self):
        """(its path in lower case, backwards; the last part; file) of each image, by its last part with and
        without the extension."""
        for name, file in self.files.items():
            end = name.rpartition("/")[2]
            folders = folded(name).split("/")[:-1]
            stem = end if extension(end) == "without extension" else Path(end).stem
            for key in {folded(end), folded(stem)}:
                yield backwards(folders, key), end, file

    def say_guessed(self):
        """A note on the names that were understood by their ending, if there were any."""
        if self.guessed and not self.by_id:
            name, file = self.examples
            say(
                f"note: {self.path}: {self.guessed} names are no paths in the data folder; {name} is read "
                f"as {file}"
            )


def folded(name):
    """A name in lower case, its accents written in one way: file systems and spreadsheets differ in it."""
    return unicodedata.normalize("NFC", name).casefold()


def backwards(folders, last):
    """A path with its last part first, each part closed by a slash: those that end alike begin alike."""
    return "/".join([last, *reversed(folders)]) + "/"
