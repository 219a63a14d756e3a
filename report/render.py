"""Blocks of a report as markdown, and the one place where text of it is escaped. report/page/ makes a page of
them. No torch, no drawing.

A block is a Heading, Paragraph, Bullets, Table or Image. What it shows is plain text (str), Code, Best, Bad,
a Link, or a tuple of these; it is escaped here and nowhere else, so names may hold anything.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from common.console import printable
from common.files import atomic_path

TITLE = "Recall-first chest X-ray screening: results"


class Code(str):
    """Text to be shown as it would be typed."""


class Best(str):
    """The best value of a column."""


class Bad(str):
    """A figure that breaks a floor, or a verdict like that. It is marked by a sign as well as by its look."""


def marked(verdict):
    """A verdict to show: a broken one is marked."""
    return Bad(verdict) if verdict == "broken" else verdict


class Link(NamedTuple):
    """Text that leads to "#slug" of a Heading of the same test set (`slug`), or of the whole report."""

    text: str
    target: str


class Heading(NamedTuple):
    level: int
    text: object


class Paragraph(NamedTuple):
    text: object


class Bullets(NamedTuple):
    items: list


class Table(NamedTuple):
    """`prose`: the cells are text to read, not figures. `groups`: ((text, span), ...) over all columns, ""
    where a column stands alone; () where none are grouped."""

    head: list
    rows: list
    prose: bool = False
    groups: tuple = ()


class Image(NamedTuple):
    path: Path
    caption: str


# ---------------------------------------------------------------- links


def slug(text):
    """The anchor that GitHub gives a heading of this text."""
    text = re.sub(r"[^\w\- ]", "", plain_text(text).lower())
    return text.strip().replace(" ", "-")


def plain_text(value):
    """What a cell or paragraph says, without its looks."""
    return "".join(part.text if isinstance(part, Link) else printable(part) for part in parts_of(value))


def anchors(blocks):
    """{position: anchor} of the Headings among blocks: of equal slugs the second gets -1, as on GitHub."""
    found, used = {}, {}
    for position, block in enumerate(blocks):
        if isinstance(block, Heading):
            name = slug(block.text)
            count = used.get(name, 0)
            used[name] = count + 1
            found[position] = f"{name}-{count}" if count else name
    return found


def destinations(blocks):
    """A {"#slug": "#anchor"} for each block: the Headings that a Link in it can lead to. Those of its own
    test set (from one Heading of level 2 to the next) come before others of the same text."""
    named, whole, of_set, maps = anchors(blocks), {}, {}, []
    for position, anchor in named.items():
        whole.setdefault(f"#{slug(blocks[position].text)}", f"#{anchor}")
    for position, block in enumerate(blocks):
        if not maps or (isinstance(block, Heading) and block.level <= 2):
            of_set = dict(whole)  # filled below, block by block, and shared by the blocks of the set
            seen = set()
        if position in named and (key := f"#{slug(block.text)}") not in seen:
            of_set[key] = f"#{named[position]}"
            seen.add(key)
        maps.append(of_set)
    return maps


# ---------------------------------------------------------------- markdown


def parts_of(value):
    """The parts of a cell or paragraph."""
    return value if type(value) is tuple else (value,)


def escaped(text):
    """Markdown that shows text as it is: no character in it is markup."""
    # An underscore inside a word is no markup, and most names have some.
    text = re.sub(r"[\\`*|$~&]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text).replace("](", "]\\(")
    return text.replace("<", "&lt;")


def fenced(text):
    """Text as code, in a fence of more backticks than it has in a row."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    room = " " if longest else ""
    return fence + room + text + room + fence


def markdown_text(value, leads=None):
    """Text for a paragraph or table cell of markdown. `leads`: see `destinations`."""
    return "".join(markdown_part(part, leads or {}) for part in parts_of(value))


def markdown_part(part, leads):
    """One part of a paragraph or cell as markdown."""
    if isinstance(part, Link):
        text, target = escaped(printable(part.text)), leads.get(part.target)
        if target is None:  # a section that this report does not have
            return text
        # A bracket in the text would end it.
        text = re.sub(r"[\[\]]", r"\\\g<0>", text)
        return f"[{text}]({quote(target, safe='#-_')})"
    text = printable(part)
    if isinstance(part, Code):
        return fenced(text)
    if isinstance(part, Best):
        return f"**{escaped(text)}**"
    if isinstance(part, Bad):
        return f"**{escaped(text)} ✗**"
    return escaped(text)


def full_head(table):
    """The names of a Table's columns with those of their groups, for formats that have one line of heads."""
    names = [text for text, span in table.groups for _ in range(span)] or [""] * len(table.head)
    return [f"{head} {name}" if name else head for head, name in zip(table.head, names)]


def link(path, folder):
    """A path as seen from a folder, with slashes; the whole path where they lie on two drives of Windows."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        return Path(os.path.abspath(path)).as_posix()


def to_markdown(blocks, folder="."):
    """Blocks -> markdown text; pictures are linked relative to the folder that it will lie in."""
    out = []
    for block, leads in zip(blocks, destinations(blocks)):
        if isinstance(block, Table):
            out.append(markdown_table(block, leads))
        elif isinstance(block, Image):
            out.append(f"![{markdown_text(block.caption)}]({quote(os.fsencode(link(block.path, folder)))})")
        elif isinstance(block, Bullets):
            out.append("\n".join(f"- {markdown_text(item, leads)}" for item in block.items))
        else:
            mark = "#" * block.level + " " if isinstance(block, Heading) else ""
            out.append(mark + markdown_text(block.text, leads))
    return "\n\n".join(out)


def markdown_table(table, leads):
    """A Table as markdown: figures are aligned to the right, names and prose to the left."""
    rule = ["---"] + ["---" if table.prose else "---:"] * (len(table.head) - 1)
    lines = [[markdown_text(cell, leads) for cell in line] for line in (full_head(table), *table.rows)]
    lines = [[re.sub(r"(?<!\\)\|", r"\|", cell) for cell in line] for line in lines]  # those of code
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def write_text(path, text):
    """Write UTF-8 text atomically."""
    with atomic_path(path) as tmp:
        tmp.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
