"""Score new radiographs with a calibrated run: probability and decision for each file.

    python predict.py PATHS... --run outputs/pretrained > predictions.csv

PATHS are files, folders (searched recursively) or quoted globs: JPEG, PNG, TIFF, BMP, WebP and DICOM, of 8
bits or more, grey or colour. In folders, files are recognised by name, or else by content; a line on stderr
counts what is passed over.

Stdout, or -o FILE, is CSV, or JSON lines with --jsonl: path, p_pneumonia, decision@0.5, decision@Rec (with
--site also decision@Guar), threshold@Rec, typicality, note; of a run calibrated with --min-specificity also
triage (negative, unsure or positive) and threshold@In. Several findings have p_FINDING,
decision@Rec_FINDING (yes or no, empty without a threshold) and threshold@Rec_FINDING each; several classes
also top_class, the most probable one. Of a run calibrated --by study, study, study_p_..., study_decision...
and study_threshold... replace the decisions on images, and rows come last. --sort score puts the most
suspicious first. --threshold X decides at X, in columns decision@hand and threshold@hand. Numbers have six
digits, or as many as it takes for score >= threshold to be the decision. Python: docs/PYTHON.md.
Preprocessing, precision, scaling and thresholds come from the run's calibration, so the test folder gives
calibrate.py's scores. A line on stderr says where scores are no probabilities (a run trained with class
weights).

`typicality` is the share of validation images at least as odd. `note` says when it is 0.01 or less, or when
brightness, contrast, colour or size is unlike the training images. A file that cannot be read gets a note in
its row, and the exit code is 2; the others are scored. DICOM files of a view that the run was not trained on
(lateral, say) get a note and no score; --views all scores them. Memory does not grow with the number of
files.

Stderr ends with the count of notes by kind, a verdict on all images together, and what to do next. The
verdict: like validation, like validation at another share of sick people, or others (calibration/shift.py).
--summary writes it to a file, --keep to the run, for compare.py. --html writes a reading list with pictures.

    python predict.py --export model.onnx --run outputs/pretrained

writes an ONNX file instead (needs onnx, onnxscript and onnxruntime), checked against PyTorch. Not a medical
device.
"""

import common.prelude  # noqa: F401  (first: see there)

from calibration import shift
from common import scaling
from common.cli import COUNT, Parser, add_calibrated_run_arguments, check_name
from common.console import InputError, say, start
from common.device import add_device_argument
from common.files import check_output, write_json
from images.find import Search, find_files
from layouts.choices import VIEWS
from prediction.output import (
    counting,
    most_suspicious_first,
    opened,
    read_thresholds,
    sort_column,
    triage_text,
    write_rows,
)
from prediction.scorer import Scorer
from records.onnx import export
from report.page.worklist import Worklist
from report.render import write_text


def parse():
    """Checked command line."""
    parser = Parser(__doc__)
    parser.add_argument("paths", nargs="*", metavar="PATHS", help="images to score: files, folders or globs")
    add_calibrated_run_arguments(parser)
    parser.add_argument("--tta", action="store_true", help="average over views, as calibrate.py --tta did")
    parser.add_argument("-o", "--out", metavar="FILE", help="write the rows to this file instead of stdout")
    parser.add_argument("--jsonl", action="store_true", help="write JSON lines instead of CSV")
    parser.add_argument(
        "--sort",
        metavar="score",
        help="most suspicious first, after the last file; of several findings also --sort FINDING",
    )
    parser.add_argument(
        "--threshold",
        action="append",
        metavar="X",
        help="decide at X, by hand, instead of at the run's @Rec; of several findings FINDING=X, repeated",
    )
    parser.add_argument(
        "--html", metavar="PATH", help="write a reading list too: a page with pictures, most suspicious first"
    )
    parser.add_argument(
        "--export", default=None, metavar="FILE.onnx", help="write an ONNX model instead of scoring"
    )
    parser.add_argument(
        "--summary", metavar="FILE.json", help="write the verdict on all images together to this file"
    )
    parser.add_argument(
        "--keep", metavar="NAME", help="keep that verdict in the run under this name, for compare.py"
    )
    parser.add_argument(
        "--views",
        choices=VIEWS,
        help="score only these, where a DICOM header tells the view (default: those of the training)",
    )
    parser.add_argument(
        "--patients",
        metavar="CSV",
        help="table path,patient: which images belong together, where thresholds are by patient",
    )
    parser.add_argument("--batch-size", type=COUNT, default=64, metavar="N", help="images a step")
    add_device_argument(parser)
    args = parser.parse_args()
    check_name("--keep", args.keep)
    check_name("--site", args.site)
    for flag in ("--summary", "--export", "--out", "--html"):
        if path := getattr(args, flag[2:]):
            check_output(flag, path)
    if bool(args.paths) == bool(args.export):  # both, or neither
        raise InputError("give either PATHS to score or --export FILE.onnx")
    refuse_contradictions(args)
    args.threshold = read_thresholds(args.threshold)
    return args


def refuse_contradictions(args):
    """InputError for flags that have no meaning together."""
    for flag in ("--threshold", "--sort", "--out", "--html"):
        if getattr(args, flag[2:]) and args.export:
            raise InputError(f"{flag} is for scoring, --export writes a model: leave one of them out")
    if args.threshold and args.site:
        raise InputError(f"--threshold replaces the thresholds of --site {args.site}: leave one of them out")
    if args.threshold and args.keep:
        raise InputError(
            "--keep is for a report on the run's own thresholds: leave --threshold out, or write the verdict "
            "with --summary"
        )


def count_of_notes(count, notes, typicality):
    """How many of `count` files have a note, and how many notes of each kind, as text. `typicality`: whether
    odd images can be told at all."""
    kinds = {
        "unreadable": "unreadable",
        "view": "of a view that is not scored",
        "odd": f"odd (typicality {shift.ODD:g} or less)",
        "unlike": "of a brightness, contrast, colour or size unlike the training images",
        "lungs": "without lungs, though the model needs them",
    }
    # Kinds that do not occur are not listed; that one could not be looked for is.
    counts = [f"{notes[kind]} {text}" for kind, text in kinds.items() if notes.get(kind)]
    if not typicality:
        counts.append("how many are odd cannot be told")
    text = f"{count} files, {notes['noted']} with a note"
    if counts:
        text += f": {', '.join(counts)}"
    return text


def advice(verdict, run, site):
    """What to do next, as text; empty if nothing."""
    if verdict["verdict"] in ("shifted", "share"):
        if site:  # its thresholds were chosen for such images, so nothing need be labelled again
            return (
                f"next: the thresholds of {site} hold while patients stay like those labelled there; "
                "python monitor.py watches that as diagnoses come in"
            )
        sure = "to be sure, " if verdict["verdict"] == "share" else ""
        return (
            f"next: {sure}label some of these images; "
            f"python calibrate.py --run {run} --site DIR --name WHERE chooses thresholds on them"
        )
    if verdict["verdict"] == "few" and verdict["patients"]:
        return f"next: score {shift.LEAST} patients or more together"
    return ""


def report(scorer, args, counts):
    """Say the verdict on all images together and what to do next, and write it where --summary and --keep ask
    for it -> what was said, as lines."""
    run, verdict = scorer.run, scorer.verdict()
    if verdict is None:
        say(line := no_verdict(scorer))
        if args.summary or args.keep:
            raise InputError(f"--summary, --keep: {run} has nothing to hold images against")
        return [line]
    lines = list(filter(None, [shift.sentence(verdict), advice(verdict, run, args.site)]))
    if scorer.unit != "image" and verdict["patients"]:
        lines.insert(1, f"that is of one image of each patient; the rows decide by {scorer.unit}")
    for line in lines:
        say(line)
    # compare.py leaves out what another checkpoint or threshold has said, so these are kept.
    origin = {"run": str(run), "checkpoint": run.checkpoint_sha256, "paths": args.paths[:20]}
    origin |= {"site": args.site, "called_at": scorer.called_at}
    if scorer.by_hand:
        origin["thresholds_by_hand"] = scorer.by_hand
    summary = {**origin, **counts, **verdict}
    if args.summary:
        write_json(args.summary, summary)
    if args.keep:
        run.save_batch(args.keep, summary)
    return lines


def no_verdict(scorer):
    """What an older calibration lacks for a verdict, and how to get it, as text."""
    flag = scaling.tta_flag(scorer.calibration, scorer.run)
    lacking = "typicality and a verdict on all images together"
    if scorer.reference is not None:
        lacking = "a verdict on all images together, which needs the true labels of validation"
    return (
        f"note: {scorer.run} was calibrated by an older version: run python calibrate.py "
        f"--run {scorer.run}{flag} for {lacking}"
    )


def main():
    args = parse()
    choices = {"tta": args.tta, "site": args.site, "views": args.views, "threshold": args.threshold}
    scorer = Scorer(args.run, args.device, **choices)
    if args.export:
        return export(scorer, args.export)
    column = args.sort and sort_column(scorer, args.sort)
    # A row is written as soon as it is known: there may be more files than fit into memory. By study or
    # patient, or sorted, that is after the last file.
    with opened(args.out) as (stream, not_input):
        search = Search(not_input)
        rows = scorer.rows(find_files(args.paths, search), args.batch_size)
        rows = scorer.finished(rows, args.patients)
        if args.html:
            worklist = Worklist(scorer)
            rows = worklist.watch(rows)
        if column:
            rows = most_suspicious_first(rows, scorer, column)
        triaged = {}
        count = write_rows(counting(rows, scorer, triaged), scorer, stream, args.jsonl)
        if not count:
            raise InputError(f"no image files in {', '.join(args.paths)}: {search.nothing()}")

    # What was passed over, what was odd, and the verdict come last, where they are seen.
    search.tell(", ".join(args.paths[:3]))
    reference, unreadable = scorer.reference, scorer.notes["unreadable"]
    typicality = reference is not None and len(reference.distances) >= shift.ODD_NEEDS
    lines = [count_of_notes(count, scorer.notes, typicality)]
    if triaged:
        lines.append(triage_text(triaged))
    for line in lines:
        say(line)
    lines = report(scorer, args, {"images": count, "unreadable": unreadable}) + lines
    if args.html:
        write_text(args.html, worklist.page(lines))
        say(f"reading list: {args.html}")
    if unreadable:
        raise InputError(f"{unreadable} of {count} files could not be read; their rows say why")


if __name__ == "__main__":
    start(main)
