"""Tables as programs write them -> column names and rows of text, and which image a name in a table means.

Read are UTF-8, UTF-16 and UTF-32 with their mark, else Latin-1. Columns are separated by commas, semicolons
or tabs.
"""

import codecs
import csv
import io
import re
from pathlib import Path

from common.console import InputError, say, say_once
from common.files import check_regular

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
NAME_COLUMNS = {"path", "image index"}  # one of these names the image in every table that is read
ZIPPED = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # how the workbooks of spreadsheet programs begin
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is its beginning
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


# ---------------------------------------------------------------- text and columns


def open_table(path):
    """(column names, rows) of a table, read whole. A row is a list of str, an empty list where it is blank.

    The separator is the one that `sep=;` in a first line names, as spreadsheet programs write it; else the
    one of SEPARATORS by which the first line has a column of NAME_COLUMNS, or else the most columns.
    InputError if the file cannot be read, is no table, or names a column twice."""
    text = _text(path)
    try:
        text, separator = _separator(text)
        # Not by lines: str.splitlines would also break at U+0085 and others.
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        head = [name.strip() for name in next(reader, [])]
        while head and not head[-1]:
            head.pop()  # a value there has come from another column
        rows = [row if any(map(str.strip, row)) else [] for row in reader]
    except csv.Error as error:
        raise InputError(f"{path} is not a readable CSV file ({error})") from None
    word = SEPARATORS.get(separator, repr(separator))
    if separator != ",":
        say_once(f"note: {path} is separated by {word}")
    twice = {name for name in head if name and head.count(name) > 1}
    if twice:
        raise InputError(f"{path} names the column {', '.join(sorted(twice))} twice")
    for number, row in numbered(rows):
        if len(row) > len(head) and any(row[len(head) :]) or len(row) < len(head) and len(row) < 2:
            raise InputError(
                f"{path}, row {number}: {len(row)} values for {len(head)} columns, separated by {word}; "
                f"{columns(head)}"
            )
    if not any(rows):
        raise InputError(f"{path} has no rows")
    return head, rows


def _text(path):
    """The text of a file. InputError if it cannot be read, or holds none."""
    check_regular(path)
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    if raw.startswith(ZIPPED):
        raise InputError(f"{path} is a workbook of a spreadsheet program, no text: save it as CSV (UTF-8)")
    encoding = next((name for mark, name in MARKS if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        if encoding != "utf-8":
            raise InputError(f"{path} begins as {encoding.upper()}, but is damaged: save it anew") from None
        say_once(f"note: {path} is not UTF-8; read as Latin-1")
        text = raw.decode("latin-1")
    if "\0" in text:
        raise InputError(
            f"{path} holds zero bytes: it is no text, or UTF-16 without its mark: save it as UTF-8"
        )
    return text


def _separator(text):
    """(the text without a first line `sep=;`, the separator of its columns)."""
    if told := re.match(r'"?sep=(.)"?\s*?(\r\n|\r|\n)', text, re.IGNORECASE):
        return text[told.end() :], told[1]

    def columns_by(separator):
        first = next(csv.reader(io.StringIO(text, newline=""), delimiter=separator), [])
        return [name.strip().lower() for name in first]

    heads = {separator: columns_by(separator) for separator in SEPARATORS}
    return text, max(heads, key=lambda s: (not NAME_COLUMNS.isdisjoint(heads[s]), len(heads[s])))


def numbered(rows):
    """(number, row) of those that are not blank, as a spreadsheet counts: the first under the names is 2."""
    return ((number, row) for number, row in enumerate(rows, 2) if row)


def value(row, at):
    """The value of a row in column number `at`, without spaces around it; "" where the row is too short."""
    return row[at].strip() if at < len(row) else ""


def column(head, name):
    """The column of this name in any case, or None."""
    return next((found for found in head if found.lower() == name.lower()), None)


def columns(head):
    """What columns a table has, as text."""
    named = [name for name in head if name]
    more = f" and {len(named) - 20} more" if len(named) > 20 else ""
    return f"it has {', '.join(named[:20]) or 'no column'}{more}"


# ---------------------------------------------------------------- which image a name means


class Listed:
    """Finds the images that the names in a table mean.

    `files`: {name in a table: path relative to `root`}. A name that is none of these is understood where only
    one image can be meant: an absolute path, or one from another folder, by its ending; a name of a file in a
    folder below; upper case for lower; a name without its extension. Nothing outside `root` is ever found.
    """

    def __init__(self, path, root, files):
        self.path, self.files = path, files
        self.roots = [Path(root).as_posix(), Path(root).resolve().as_posix()]
        self.claimed = {}  # {file: the name that means it}
        self.examples, self.guessed = [], 0
        self._by_end = None

    def clean(self, name):
        """A name with forward slashes, relative to `root` if it lies there."""
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
        *folders, last = name.casefold().split("/")
        if not last or ".." in folders:
            return set()
        if self._by_end is None:
            self._by_end = self._endings()
        written = name.rpartition("/")[2]
        near = [c for c in self._by_end.get(last, ()) if _one_ends_other(folders, c[0])]
        same = {file for _, end, file in near if end == written}
        any_case = {file for _, end, file in near if end.casefold() == last}
        return same or any_case or {file for _, _, file in near}

    def _endings(self):
        """{last part of a path, with and without its extension, in lower case: [(its folders, in lower case;
        the last part; file)]}."""
        found = {}
        for name, file in self.files.items():
            end = name.rpartition("/")[2]
            entry = name.casefold().split("/")[:-1], end, file
            for key in {end.casefold(), Path(end).stem.casefold()}:
                found.setdefault(key, []).append(entry)
        return found

    def say_guessed(self):
        """A note on the names that were understood by their ending, if there were any."""
        if self.guessed:
            name, file = self.examples
            say(
                f"note: {self.path}: {self.guessed} names are no paths in the data folder; {name} is read "
                f"as {file}"
            )


def _one_ends_other(a, b):
    """Whether one of two lists is the end of the other, or one is empty."""
    n = min(len(a), len(b))
    return a[len(a) - n :] == b[len(b) - n :]
