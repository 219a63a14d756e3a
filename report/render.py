"""Blocks of a report as markdown and HTML, and the one place where text is escaped. No torch, no drawing.

A block is a Heading, Paragraph, Table or Image. What it shows is plain text (str), Code, or a tuple of these;
it is escaped here and nowhere else, so names may hold anything.
"""

import base64
import html
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


class Heading(NamedTuple):
    level: int
    text: object


class Paragraph(NamedTuple):
    text: object


class Table(NamedTuple):
    """`prose`: the cells are text to read, not figures."""

    head: list
    rows: list
    prose: bool = False


class Image(NamedTuple):
    path: Path
    caption: str


def inline(value, plain, code):
    """A cell or paragraph -> text, each part through `plain` or `code`."""
    text = ""
    for part in value if isinstance(value, tuple) else (value,):
        escape = code if isinstance(part, Code) else plain
        text += escape(printable(part))
    return text


def markdown_text(value):
    """Text for a paragraph or table cell of markdown: no character in it is markup."""

    def plain(text):
        # An underscore inside a word is no markup, and most names have some.
        text = re.sub(r"[\\`*|$~&]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text).replace("](", "]\\(")
        return text.replace("<", "&lt;")

    def code(text):
        # A fence of more backticks than the text has in a row.
        longest = max((len(run) for run in re.findall("`+", text)), default=0)
        fence = "`" * (longest + 1)
        room = " " if longest else ""
        return fence + room + text.replace("|", "\\|") + room + fence

    return inline(value, plain, code)


def link(path, folder):
    """A path as seen from a folder, with slashes; the whole path where they lie on two drives of Windows."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        return Path(os.path.abspath(path)).as_posix()


def to_markdown(blocks, folder="."):
    """Blocks -> markdown text; pictures are linked relative to the folder that it will lie in."""
    out = []
    for block in blocks:
        if isinstance(block, Table):
            rule = ["---"] + ["---" if block.prose else "---:"] * (len(block.head) - 1)
            lines = [[markdown_text(cell) for cell in line] for line in (block.head, *block.rows)]
            out.append("\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])))
        elif isinstance(block, Image):
            out.append(f"![{markdown_text(block.caption)}]({quote(os.fsencode(link(block.path, folder)))})")
        else:
            mark = "#" * block.level + " " if isinstance(block, Heading) else ""
            out.append(mark + markdown_text(block.text))
    return "\n\n".join(out)


STYLE = """
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:72rem;padding:1rem;color:#111;background:#fff}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;margin:.5rem 0}
th,td{border-bottom:1px solid #ccc;padding:.25rem .6rem;text-align:right;white-space:nowrap}
td:first-child,th:first-child,.text td,.text th{text-align:left}.text td{white-space:normal}
tr:hover{background:#f4f6f8}
img{max-width:100%;height:auto}figure{margin:1rem 0}figcaption{color:#555;font-size:.85rem}
.warn{background:#fff3cd;border:1px solid #c90;padding:.5rem 1rem}
@media print{body{max-width:none;font-size:10px}table{font-size:7px}
th,td{white-space:normal;padding:.1rem .2rem}
figure,table{break-inside:avoid}}"""


def html_text(value):
    return inline(value, html.escape, lambda text: f"<code>{html.escape(text)}</code>")


def html_block(block):
    """One block -> HTML; a picture is embedded."""
    if isinstance(block, Table):
        head = "".join(f"<th>{html_text(cell)}</th>" for cell in block.head)
        rows = ["".join(f"<td>{html_text(cell)}</td>" for cell in row) for row in block.rows]
        body = "".join(f"<tr>{row}</tr>\n" for row in rows)
        style = "text" if block.prose else "figures"
        table = f'<table class="{style}"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>'
        return f'<div class="wide">{table}</div>'
    if isinstance(block, Image):
        data, caption = base64.b64encode(Path(block.path).read_bytes()).decode(), html_text(block.caption)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    tag = f"h{block.level}" if isinstance(block, Heading) else "p"
    return f"<{tag}>{html_text(block.text)}</{tag}>"


def to_html(blocks, synthetic):
    """Blocks -> one self-contained page: pictures embedded, nothing fetched."""
    head = '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{TITLE}</title><style>{STYLE}</style></head><body>"
    if synthetic:
        head += '<p class="warn">Parts of this page come from SYNTHETIC drawings, not from patients.</p>'
    head += "\n"
    return head + "\n".join(map(html_block, blocks)) + "\n</body></html>\n"


def write_text(path, text):
    """Write UTF-8 text atomically."""
    with atomic_path(path) as tmp:
        tmp.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
