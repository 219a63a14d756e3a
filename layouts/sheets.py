"""Tables as programs write them -> a Sheet: column names and columns of text.

Read are UTF-8, UTF-16 and UTF-32 with their mark, else Windows' cp1252 or Latin-1; compressed by gzip, too.
Columns are separated by commas, semicolons or tabs. pandas splits the text; no value is guessed to be a
number or NaN.
"""

import codecs
import contextlib
import csv
import gzip
import io
import os
import re
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from common.console import InputError, say_once
from common.files import check_regular

INVISIBLE = "\ufeff\u200b"  # marks that come with copies from web pages and twice saved tables
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
NAME_COLUMNS = {"path", "image index"}  # one of these names the image in many tables
ZIPPED = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # how the workbooks of spreadsheet programs begin
GZIP = b"\x1f\x8b"
FIRST_ROW = 1 << 20  # characters that hold it
LARGEST = 1 << 30  # bytes of a table, unpacked; the largest public one has 250 MB
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is its beginning
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


# ---------------------------------------------------------------- text and columns


class Sheet:
    """A table. `path`; `head`: its column names; `numbers`: int64 [N], the rows that are not blank, as a
    spreadsheet counts: the first under the names is 2."""

    def __init__(self, path, head, numbers, columns):
        self.path, self.head, self.numbers, self._columns = path, head, numbers, columns
        self._stripped = {}

    def __len__(self):
        return len(self.numbers)

    def find(self, name):
        """The column of this name in any case, or None."""
        return column(self.head, name)

    def text(self, name):
        """The values of a column (its name in any case), without spaces around them: list of N texts; of
        empty ones where there is no such column."""
        name = self.find(name)
        if name is None:
            return [""] * len(self)
        if name not in self._stripped:
            values = self._columns[self.head.index(name)]
            self._stripped[name] = [value.strip() for value in values]
        return self._stripped[name]

    def codes(self, name):
        """(the different texts of a column, int64 [N]: which of them each row has, int64: the first row of
        each, counted from 0)."""
        import pandas

        name = self.find(name)
        if name is None:
            return [""], np.zeros(len(self), dtype=np.int64), np.zeros(1, dtype=np.int64)
        raw_codes, raw = pandas.factorize(self._columns[self.head.index(name)])
        # Spaces are taken off the few different texts; some may be equal without them.
        merged, kinds = pandas.factorize(np.array([text.strip() for text in raw], dtype=object))
        codes = merged[raw_codes]
        first = np.full(len(kinds), len(codes))
        np.minimum.at(first, codes, np.arange(len(codes)))
        return list(kinds), codes, first


def open_sheet(path):
    """The Sheet of a table, read whole. InputError if the file cannot be read, is no table, or names a column
    twice."""
    check_regular(path)
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    return _open_sheet(str(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=6)  # the same table is opened several times in a command
def _open_sheet(path, size, changed):
    """`open_sheet` of a file of this size and time of change."""
    text = _text(path)
    text, separator = _separator(text)
    if not separator.isascii():
        raise InputError(f"{path} is separated by {separator!r}, which is not read: save it with commas")
    try:
        first = next(csv.reader(io.StringIO(text[:FIRST_ROW], newline=""), delimiter=separator), [])
    except (csv.Error, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a readable CSV file ({error})") from None
    head = _names(first)
    while head and not head[-1]:
        head.pop()  # a value there has come from another column
    word = SEPARATORS.get(separator, repr(separator))
    if separator != ",":
        say_once(f"note: {path} is separated by {word}")
    twice = {name for name in head if name and head.count(name) > 1}
    if twice:
        raise InputError(f"{path} names the column {', '.join(sorted(twice))} twice")
    if not head:
        raise InputError(f"{path} has no rows")
    values = _values(path, text, separator, max(len(first), 1))
    kept = np.flatnonzero(_not_blank(values))
    _check_widths(path, text, separator, head, values, kept)
    if not len(kept):
        raise InputError(f"{path} has no rows")
    return Sheet(path, head, kept + 2, [values[at][kept] for at in range(len(head))])


def _values(path, text, separator, width):
    """The cells under the first row: a list of object arrays [N] of text, one a column: `width` or more of
    them where rows are wider than the first one."""
    import pandas

    about = dict(sep=separator, header=None, dtype=object, keep_default_na=False, na_filter=False)
    about |= dict(skip_blank_lines=False, index_col=False, engine="c", low_memory=False)
    try:
        try:
            frame = pandas.read_csv(io.StringIO(text), names=range(width), **about)
        except pandas.errors.ParserError as error:
            if "Expected" not in str(error):
                raise
            wider = range(width + 50)  # a row is wider than the first; what stands there is shown
            frame = pandas.read_csv(io.StringIO(text), names=wider, **about)
    except (ValueError, TypeError, OverflowError) as error:  # pandas' own errors among them
        reason = " ".join(str(error).split()).removeprefix("Error tokenizing data. C error: ")
        if quoted := re.search(r"EOF inside string starting at row (\d+)", reason):
            row = int(quoted[1]) + 1
            raise InputError(f"{path}, row {row}: a quotation mark opens there and none closes it") from None
        raise InputError(f"{path} is not a readable CSV file ({reason})") from None
    return [frame[at].to_numpy(dtype=object)[1:] for at in frame.columns]


def _not_blank(values):
    """bool [N]: rows in which not all cells are empty."""
    found = np.zeros(len(values[0]), dtype=bool)
    for cells in values:
        rest = np.flatnonzero(~found)
        if not len(rest):
            break
        found[rest] = [bool(cell.strip()) for cell in cells[rest]]
    return found


def _check_widths(path, text, separator, head, values, kept):
    """InputError naming a row that has values beyond the columns, or one value only."""
    word = SEPARATORS.get(separator, repr(separator))
    for cells in values[len(head) :]:
        for row in kept:
            if cells[row].strip():
                count = max(at for at, column in enumerate(values, 1) if column[row])
                _refuse_width(path, row + 2, count, head, word)
    if len(head) < 2 or not len(kept):
        return
    # pandas fills short rows up: only the text tells a short row from one with empty cells.
    candidates, short = set(kept[values[len(head) - 1][kept] == ""].tolist()), 0
    if not candidates:
        return
    try:
        for number, row in enumerate(csv.reader(io.StringIO(text, newline=""), delimiter=separator), -1):
            if number not in candidates or len(row) >= len(head):
                continue
            cut = number == kept[-1] and not text.endswith(("\n", "\r"))  # as by a broken download
            if len(row) < 2 or cut:
                _refuse_width(path, number + 2, len(row), head, word)
            short += 1
    except csv.Error as error:
        raise InputError(f"{path} is not a readable CSV file ({error})") from None
    if short:
        say_once(f"note: {path}: {short} rows end before the last column: what they lack counts as empty")


def _refuse_width(path, number, count, head, word):
    raise InputError(
        f"{path}, row {number}: {count} values for {len(head)} columns, separated by {word}; {columns(head)}"
    )


def head_of(path):
    """The column names of a table, of which only the beginning is read; [] where that is no text."""
    try:
        with open(path, "rb") as file:
            raw = file.read(1 << 16)
        if raw.startswith(GZIP):
            raw = zlib.decompressobj(31).decompress(raw, 1 << 16)
        encoding = next((name for mark, name in MARKS if raw.startswith(mark)), "")
        if encoding:
            text = raw.decode(encoding, errors="ignore")
        else:
            text, _ = _unmarked(raw, whole=False)
        text, separator = _separator(text)
        first = next(csv.reader(io.StringIO(text, newline=""), delimiter=separator), [])
    except (OSError, csv.Error, zlib.error, TypeError, ValueError):
        return []
    return _names(first)


def _names(first):
    """The names of columns that the first row of a table holds, list of text."""
    return [name.strip().strip(INVISIBLE).strip() for name in first]


def sheet_beside(path, needed):
    """The Sheet of the table beside `path` that has the columns `needed`, or None. Of several, the first
    whose name begins as that of `path`, or else the first; a note says which."""
    fit = []
    for other in sorted(Path(path).parent.iterdir()):
        is_table = other.name.lower().endswith((".csv", ".csv.gz")) and other.is_file()
        if is_table and other != Path(path) and set(needed) <= set(head_of(other)):
            fit.append(other)
    begins = re.match("[A-Za-z]*", Path(path).name)[0]
    fit.sort(key=lambda other: not other.name.startswith(begins))
    if len(fit) > 1:
        others = ", ".join(other.name for other in fit[1:4])
        say_once(f"note: {path}: of {fit[0].name} and {others} beside it, {fit[0].name} is read")
    return open_sheet(fit[0]) if fit else None


def _text(path):
    """The text of a file. InputError if it cannot be read, or holds none."""
    try:
        raw = Path(path).read_bytes()
        if raw.startswith(GZIP):
            with gzip.open(io.BytesIO(raw)) as file:
                raw = file.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason})") from None
    if len(raw) > LARGEST:
        raise InputError(f"{path} holds more than {LARGEST >> 20} MiB: no table of labels is so large")
    if raw.startswith(ZIPPED):
        raise InputError(f"{path} is a workbook of a spreadsheet program, no text: save it as CSV (UTF-8)")
    encoding = next((name for mark, name in MARKS if raw.startswith(mark)), "")
    if encoding:
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError:
            raise InputError(f"{path} begins as {encoding.upper()}, but is damaged: save it anew") from None
    else:
        text, encoding = _unmarked(raw)
        if encoding != "UTF-8":
            say_once(f"note: {path} is not UTF-8; read as {encoding}")
    if "\0" in text:
        raise InputError(
            f"{path} holds zero bytes: it is no text, or UTF-16 without its mark: save it as UTF-8"
        )
    return text


def _unmarked(raw, whole=True):
    """(the text of bytes without a mark, its encoding): UTF-8, or else cp1252, as Windows writes it; or else
    Latin-1, in which all bytes mean something. `whole`: that they do not end within a character."""
    for encoding in ("UTF-8", "cp1252"):
        with contextlib.suppress(UnicodeDecodeError):
            return codecs.getincrementaldecoder(encoding)().decode(raw, whole), encoding
    return raw.decode("latin-1"), "Latin-1"


def _separator(text):
    """(the text without a first line `sep=;`, the separator of its columns): the one that `sep=;` in a first
    line names, as spreadsheet programs write it; else the one of SEPARATORS by which the first line has a
    column of NAME_COLUMNS, or else the most columns."""
    if told := re.match(r'"?sep=(.)"?\s*?(\r\n|\r|\n)', text, re.IGNORECASE):
        return text[told.end() :], told[1]

    beginning = text[:FIRST_ROW]

    def columns_by(separator):
        first = next(csv.reader(io.StringIO(beginning, newline=""), delimiter=separator), [])
        return [name.strip().lower() for name in first]

    try:
        heads = {separator: columns_by(separator) for separator in SEPARATORS}
    except csv.Error:  # a line longer than any table's
        return text, ","
    return text, max(heads, key=lambda s: (not NAME_COLUMNS.isdisjoint(heads[s]), len(heads[s])))


def column(head, name):
    """The column of this name, or else of this name in another case, or None."""
    if name in head:
        return name
    return next((found for found in head if found.lower() == name.lower()), None)


def columns(head):
    """What columns a table has, as text."""
    named = [name for name in head if name]
    more = f" and {len(named) - 20} more" if len(named) > 20 else ""
    return f"it has {', '.join(named[:20]) or 'no column'}{more}"
