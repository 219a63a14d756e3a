"""The documents: links lead somewhere, commands parse, and each document keeps its size.

docs/notebook/ is a record: its links are checked, its old commands are not.
"""

import argparse
import csv
import importlib
import re
import shlex
import sys
from functools import cache

import pytest

from common.console import InputError
from studies import pictures
from tests.shared import REPO

DOCUMENTS = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").rglob("*.md"))]
LIVING = [path for path in DOCUMENTS if "notebook" not in path.parts]
BYTES = {"RUNBOOK": 18_000, "RESULTS": 20_000, "EXPERIMENTS": 10_000, "BENCHMARK": 5_000}
LINES = {"README.md": (120, 120), "CONTRIBUTING.md": (40, 120)}  # lines, characters of a line

FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]*|\.\.\.|\$\w+")  # DIR, N, ...: what the reader fills in; $lr


# ---------------------------------------------------------------- links


def without_code(text):
    """A document's text with code blanked out, so that lines keep their numbers."""
    text = FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    return INLINE.sub(lambda match: "\n" * match[0].count("\n"), text)


def anchors(path):
    """The anchors that GitHub gives a document's headings: set of str. A second one of a name gets -1."""
    found, counts = set(), {}
    for heading in re.findall(
        r"^#{1,6} +(.*?) *$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE
    ):
        label = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)  # of a link only its text counts
        slug = re.sub(r"[^\w\- ]", "", label.lower()).replace(" ", "-")
        count = counts.setdefault(slug, 0)
        counts[slug] += 1
        found.add(f"{slug}-{count}" if count else slug)
    return found


def dead_links(path):
    """["line: target"] of the relative links of a document that lead nowhere."""
    dead, text = [], without_code(path.read_text(encoding="utf-8"))
    for match in LINK.finditer(text):
        if re.match(r"[a-z]+:", match[1]):  # https://, mailto:
            continue
        file, _, anchor = match[1].partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(f"{text.count(chr(10), 0, match.start()) + 1}: {match[1]}")
    return dead


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    assert dead_links(path) == []


def test_dead_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# One `two`: three\n\n## Same\n\n## Same\n\n```\n# no heading\n```\n")
    page.write_text(
        "# Top\n\n[a](other.md) [b](other.md#one-two-three) [c](other.md#same-1) [d](#top) [e](https://x.org/#y)\n"
        "`[code](nowhere.md)`\n\n```\n[code](nowhere.md)\n```\n\n"
        "[f](nowhere.md) ![g](nowhere.png)\n[h](other.md#same-2) [i](other.md#no-heading) [j](#other)\n"
    )
    expected = [
        "10: nowhere.md",
        "10: nowhere.png",
        "11: other.md#same-2",
        "11: other.md#no-heading",
        "11: #other",
    ]
    assert dead_links(page) == expected


# ---------------------------------------------------------------- commands


class Built(Exception):
    """Carries a parser out of the main() that built it."""


@cache
def parser_of(script):
    """The parser of a script (path from the root), whose main() goes no further than to its command line. It
    accepts a placeholder for every value."""

    def stop(parser, *args, **kwargs):
        raise Built(parser)

    usual, argv = argparse.ArgumentParser.parse_args, sys.argv
    argparse.ArgumentParser.parse_args, sys.argv = stop, [script]
    try:
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).main()
    except Built as built:
        parser = built.args[0]
    finally:
        argparse.ArgumentParser.parse_args, sys.argv = usual, argv
    for action in parser._actions:
        action.type = reader(action.type or str, action.choices)
        action.choices = None
    return parser


def reader(convert, choices):
    """What argparse calls for a value: `convert`, then one of `choices`, but a placeholder as it is."""

    def read(text):
        if PLACEHOLDER.fullmatch(text):
            return text
        value = convert(text)
        if choices is not None and value not in choices:
            raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(map(str, choices))}")
        return value

    return read


def simple_commands(line):
    """The commands of a shell line, as lists of words: comments and redirections are left out."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    commands, skip = [[]], False
    for word in words:
        if set(word) <= set("&|;()"):
            commands.append([])
        elif set(word) <= set("<>"):
            skip = True  # the file that follows is the shell's
        elif skip:
            skip = False
        else:
            commands[-1].append(word)
    return commands


def script_call(words):
    """(script, arguments) of `python X.py ...` or `torchrun ... X.py ...`; None for any other command."""
    while words and (
        re.fullmatch(r"\w+=.*", words[0]) or words[0] == "!"
    ):  # OMP_NUM_THREADS=1, a notebook's !
        words = words[1:]
    if not words or words[0].lstrip("!") not in ("python", "python3", "torchrun"):
        return None
    places = [number for number, word in enumerate(words) if word.endswith(".py")]
    if words[1:2] == ["-m"] or not places:
        return None
    if PLACEHOLDER.fullmatch(words[places[0]].removesuffix(".py")):  # python SCRIPT.py: any of them
        return None
    return words[places[0]], words[places[0] + 1 :]


def wrong_call(script, arguments):
    """What is wrong with a command line; None where it parses, as it is or without its ... (`DIR ...`)."""
    if not (REPO / script).is_file():
        return "there is no such script"
    for words in ([word for word in arguments if word != "..."], arguments):
        try:
            argparse.ArgumentParser.parse_args(parser_of(script), words)
            return None
        except InputError as error:
            problem = str(error)
    return problem


def snippets(text):
    """[(line, code)]: every line of a code block, continuations joined, and every piece of inline code."""
    found = []
    for block in FENCE.finditer(text):
        first = text.count("\n", 0, block.start(1)) + 1
        code = re.sub(r"\\\n\s*", lambda match: " " * len(match[0]), block[1])
        found += [(first, line) for line in code.split("\n")]
    blank = FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    for inline in INLINE.finditer(blank):
        found.append((blank.count("\n", 0, inline.start()) + 1, " ".join(inline[1].split())))
    return found


def wrong_commands(text):
    """["line: command: what is wrong"] of a document's commands that do not parse, and of the flags after a
    script's name alone (`calibrate.py --site`) that it does not have."""
    wrong = []
    for line, code in snippets(text):
        code = code.replace("\\|", "|")  # as a table has to write it
        named = re.match(r"(\w+\.py) (--[a-z][\w-]*)", code)
        if (
            named
            and (REPO / named[1]).is_file()
            and named[2] not in parser_of(named[1])._option_string_actions
        ):
            wrong.append(f"{line}: {code}: {named[1]} has no {named[2]}")
        if not re.search(r"\b(python3?|torchrun) .*\w\.py\b", code.split("#")[0]):
            continue
        for words in simple_commands(code):
            call = script_call(words)
            problem = wrong_call(*call) if call else None
            if problem:
                wrong.append(f"{line}: {' '.join(words)}: {problem}")
    return wrong


@pytest.mark.parametrize("path", LIVING, ids=lambda path: path.name)
def test_commands_parse(path):
    assert wrong_commands(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text, word",
    [
        ("```bash\npython train_scratch.py --epoch 15\n```", "--epoch"),
        ("```bash\npython compare.py > x.md && python calibrate.py --min-recal 1\n```", "--min-recal"),
        ("```bash\npython train_scratch.py \\\n  --seeds a b\n```", "--seeds"),
        ("```bash\n!python train_scratch.py --augmentation ...\n```", "--augmentation"),
        ("```bash\ntorchrun --nproc_per_node 2 train_scratch.py --split paper\n```", "--split"),
        ("| `python compare.py --html \\| head` | x |", "--html"),
        ("Type `python train_lungs.py` or\n`python monitor.py --run\nDIR`.", "--masks"),
        ("`python trains.py --epochs 15`", "no such script"),
        ("`calibrate.py --sites` chooses", "--sites"),
        ("`OMP_NUM_THREADS=1 python studies/sites.py --nowhere`", "--nowhere"),
    ],
)
def test_wrong_commands_are_found(text, word):
    assert word in "\n".join(wrong_commands(text))


def test_right_commands_pass():
    text = (
        "```bash\npython train_scratch.py --epochs N --split SPLIT --seeds 0 1 2 ...  # it's a comment --x\n"
        "python train_scratch.py --data-dir ...\n"
        "OMP_NUM_THREADS=1 python predict.py FOLDER > scores.csv | tee --no-such-flag\n"
        "python -m pip install --upgrade pip\n```\n`pytest --nothing`, `python SCRIPT.py --x`, "
        "`python data.py --statistics DIR`"
    )
    assert wrong_commands(text) == []


# ---------------------------------------------------------------- sizes and figures


@pytest.mark.parametrize("name", LINES)
def test_front_documents_are_short(name):
    most, widest = LINES[name]
    lines = (REPO / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= most
    assert [number for number, line in enumerate(lines, 1) if len(line) > widest] == []


@pytest.mark.parametrize("name", BYTES)
def test_documents_keep_their_size(name):
    assert (REPO / f"docs/{name}.md").stat().st_size <= BYTES[name]


def test_readme_has_the_four_commands_and_the_demo_early():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    for command in (
        "python train_scratch.py --epochs 15",
        "python calibrate.py --min-recall 0.95",
        "python compare.py > results.md",
        "pytest test_all.py",
    ):
        assert command in text
    assert "--demo" in "\n".join(text.splitlines()[:20])


def test_every_table_is_listed_and_rectangular():
    listed = (REPO / "docs/tables/README.md").read_text(encoding="utf-8")
    for path in sorted((REPO / "docs/tables").glob("*.csv")):
        assert f"]({path.name})" in listed, f"docs/tables/README.md does not list {path.name}"
        with open(path, newline="", encoding="utf-8") as file:
            assert len({len(row) for row in csv.reader(file)}) == 1, path.name


def test_the_front_picture_shows_figures_of_the_results():
    """Each of its rows is a row of RESULTS.md, Validation beside test."""
    text = (REPO / "docs/RESULTS.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")
    ]
    with open(REPO / "docs/tables/front_picture.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name = row["source"].split(": ", 1)[1]
            cells = [cell.split(" ")[0] for cell in next(cells for cells in rows if cells[0] == name)]
            shown = [
                row[f"{figure}_{side}"]
                for figure in ("recall", "specificity")
                for side in ("validation", "test")
            ]
            assert cells[1:5] == shown, name


# ---------------------------------------------------------------- studies/pictures.py

HEADER = "model,recall_validation,recall_test,specificity_validation,specificity_test\n"


def test_pictures_show_per_cents_of_the_table(tmp_path):
    from matplotlib import pyplot as plt

    (tmp_path / "a.csv").write_text(HEADER + "one,0.95,0.99,0.75,0.5\ntwo,1,0.25,1,0\n")
    models = pictures.read_sides(tmp_path / "a.csv")
    figure = pictures.draw_validation_and_test(models, plt)
    widths = [[bar.get_width() for bars in panel.containers for bar in bars] for panel in figure.axes]
    plt.close(figure)
    assert widths[0] == pytest.approx([95, 100, 99, 25])  # validation of both models, then test
    assert widths[1] == pytest.approx([25, 0, 50, 100])


@pytest.mark.parametrize(
    "row", ["one,0.95,0.99,0.75,1.5", "one,95,99,75,50", "one,0.95,0.99,0.75,", "one,0.95"]
)
def test_pictures_refuse_what_is_no_share(tmp_path, row):
    (tmp_path / "a.csv").write_text(HEADER + row + "\n")
    with pytest.raises(InputError, match="a.csv"):
        pictures.read_sides(tmp_path / "a.csv")


def test_pictures_read_intervals(tmp_path):
    rows = [(arm, look, "0.5 [0.25, 0.75]") for arm in pictures.ARMS for look in pictures.INPUTS]
    path = tmp_path / "a.csv"

    def write(rows):
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("arm", "--input", "test specificity"), *rows])

    write(rows)
    assert set(pictures.read_specificity(path).values()) == {(0.5, 0.25, 0.75)}
    write(rows[1:])
    with pytest.raises(InputError, match="no row for"):
        pictures.read_specificity(path)
    write([(*rows[0][:2], "0.5"), *rows[1:]])
    with pytest.raises(InputError, match="no figure with an interval"):
        pictures.read_specificity(path)
