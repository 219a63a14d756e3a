"""Turn calibrated runs into one report: markdown tables and plots.

    python compare.py --out results.md

Reads every calibrated run under outputs/ (or --run DIR ...) as calibrate.py and explain.py left it, and
answers first: which model, which threshold, can I trust it? docs/REPORT.md explains it. --list shows which
runs there are, finished or not, and which files may be deleted. --out
writes the markdown to a file; without it, standard output is the markdown alone. Plots go to
outputs/figures/; --html writes the report as one page that needs no other file, --csv the main table. Runs
on different test sets get sections of their own. Runs that differ only in the seed also get a row with their
mean and standard deviation. Needs no torch and takes seconds.
"""

import common.prelude  # noqa: F401  (first: see there)

import itertools
import os
import re
from argparse import BooleanOptionalAction
from pathlib import Path

from cohort import who
from common.cli import Number, Parser
from common.console import InputError, say, start
from common.files import check_output
from records.run import Run
from report.card import model_card
from report.figures import draw_all
from report.folders import list_runs
from report.page.build import interactive, to_html
from report.page.numbers import Store
from report.render import TITLE, Heading, to_markdown, write_text
from report.rows import load_entries
from report.tables import main as tables
from report.tables.method import called_differently
from report.tables.models import in_order_of, write_csv
from report.view import only_top, view_of


def parse():
    """Checked command line, `figures` filled in. InputError if something could not be written there."""
    parser = Parser(__doc__)
    parser.add_argument("--run", nargs="+", metavar="DIR", help="run folders (default: all under --runs-dir)")
    parser.add_argument("--runs-dir", default="outputs", metavar="DIR", help="where the run folders lie")
    parser.add_argument("--figures", metavar="DIR", help="folder for the plots (default: RUNS_DIR/figures)")
    parser.add_argument(
        "--out", metavar="PATH", help="write the markdown there, in UTF-8 (default: standard output)"
    )
    parser.add_argument(
        "--sort",
        metavar="COLUMN",
        help='order of the models, as "Recall @Rec" (default: the chosen ones, then by validation)',
    )
    parser.add_argument(
        "--top", type=Number(int, 1, 100_000), metavar="N", help="show the first N models alone"
    )
    parser.add_argument(
        "--card", metavar="DIR", help="print a model card of this run, with room for what only people know"
    )
    parser.add_argument("--list", action="store_true", help="list the run folders, and what may be deleted")
    who.add_arguments(parser)
    parser.add_argument("--csv", metavar="PATH", help="write the main table as CSV too")
    parser.add_argument("--html", metavar="PATH", help="write the report as one self-contained page too")
    parser.add_argument(
        "--gallery",
        action=BooleanOptionalAction,
        default=True,
        help="--html: show the images that models are wrong about; the page then holds patients' pictures",
    )
    args = parser.parse_args()
    # What cannot be written is said before the work, not after it.
    given = args.figures is not None
    args.figures = Path(args.figures or Path(args.runs_dir, "figures"))
    for flag, path in (("--out", args.out), ("--csv", args.csv), ("--html", args.html)):
        if path:
            check_output(flag, path)
    paths = [os.path.realpath(path) for path in (args.out, args.csv, args.html) if path]
    if len(set(paths)) < len(paths):
        raise InputError("--out, --csv and --html name the same file: give each its own")
    check_figures(args.figures, given)
    return args


def check_figures(folder, given):
    """InputError if the plots' folder is something else, or is `given` in a folder that is not there."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is not a folder: name another place for the output")
    if given and not folder.exists():
        check_output("--figures", folder)


def file_stem(name, used):
    """A file name for the plots of a data set: letters, digits, dots and dashes, and not yet in `used`."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:60] or "data"
    used[stem.lower()] = used.get(stem.lower(), 0) + 1
    return stem if used[stem.lower()] == 1 else f"{stem}-{used[stem.lower()]}"


def print_card(args):
    """The model card of --card, on standard output or where --out says. InputError for flags of a report."""
    for flag in ("run", "html", "csv", "sort", "top", "list"):
        if getattr(args, flag):
            raise InputError(f"--card is a page on one run, --{flag} is for reports: leave one of them out")
    card = model_card(Run(args.card), who.Asked(args.age_bands, args.subgroups))
    if args.out:
        write_text(args.out, card + "\n")
        say(f"model card: {args.out}")
    else:
        print(card)


def print_list(args):
    """The runs of --list. InputError for flags of a report."""
    for flag in ("out", "html", "csv", "sort", "top"):
        if getattr(args, flag):
            raise InputError(
                f"--list prints which runs there are, --{flag} is for reports: leave one of them out"
            )
    print(list_runs(args.runs_dir, args.run))


def wanted(views, args):
    """Views as --sort and --top ask for them. InputError: no such column."""
    if args.sort:
        views = in_order_of(views, args.sort)
    if args.top:
        views = [only_top(view, args.top) for view in views]
    return views


def main():
    args = parse()
    if args.card:
        print_card(args)
        return
    if args.list:
        print_list(args)
        return
    groups, used, count = load_entries(args.runs_dir, args.run), {}, 0
    synthetic = any(entry.synthetic for entry in itertools.chain(*groups))
    # One section a test set: figures on different images are not to be compared.
    blocks, asked = [Heading(1, TITLE)], who.Asked(args.age_bands, args.subgroups)
    page, store = [Heading(1, TITLE)], Store()
    columns = {name for entries in groups for entry in entries for name in entry.cohort["test"]}
    who.check_columns(asked, columns, "the data of these runs")
    views = wanted([view_of(entries, asked) for entries in groups], args)
    for view in views:
        if differently := called_differently(view.entries):
            say(f"note: {differently}")
        pictures = draw_all(view, args.figures, file_stem(view.entries[0].set, used))
        of_set = tables.section(view, pictures)
        blocks += of_set
        count += len(pictures)
        if args.html:
            page += interactive(of_set, view, store, args.gallery)
    if args.csv:
        write_csv(args.csv, groups)
    if args.html:
        write_text(args.html, to_html(page, synthetic, store))
    if args.out:
        write_text(args.out, to_markdown(blocks, Path(args.out).parent) + "\n")
    else:
        print(to_markdown(blocks), flush=True)  # the reader may close the pipe: the other files are written
    places = [path for path in (args.html, args.out) if path]
    say(f"report: {' and '.join(places) or 'on standard output (--html PATH writes a page)'}")
    say(f"pictures: {count} in {args.figures}")
    if args.csv:
        say(f"table: {args.csv}")


if __name__ == "__main__":
    start(main)
