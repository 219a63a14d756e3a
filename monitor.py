"""Watch whether a threshold keeps its recall, as diagnoses come in.

    python monitor.py --run outputs/pretrained LOG.csv

LOG.csv has a row for each image, in the order in which the truth became known: path, score (or p_FINDING, as
predict.py writes it: its CSV with a column diagnosis will do), diagnosis (the name of the class or finding,
of its absence, or 1 and 0; rows where it is empty wait), and perhaps patient and time (as 2026-11-23, which
sorts as text). The first image of each patient counts; without that column, file names tell the patient, as
in training, and an image whose name tells none counts as a patient. Prints recall and specificity so far with
95% confidence sequences, which hold at all times at once, and draws them over time to RUN/monitor/LOG-*.png.
If recall >= the floor is refuted, it says when, and the exit code is 3. Where recall is at the floor, that
ever happens with a chance of at most 5%, however long one watches (calibration/sequential.py). With few
patients it says that they cannot tell yet. --site WHERE takes the thresholds of calibrate.py --site, --tta
those of calibrate.py --tta, for scores of predict.py --tta.
"""

import common.prelude  # noqa: F401  (first: see there)

import itertools
import re
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from calibration import sequential
from common import scaling
from common.cli import Number, Parser, check_name
from common.console import InputError, say, start
from common.files import atomic_path
from layouts.listing import patient_id
from layouts.patients import clean_patient
from layouts.sheets import numbered, open_table
from records.run import Run

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

POINTS = {"rec": "threshold", "mean": "mean", "guar": "guaranteed"}
REFUTED = 3  # exit code
POINTS_DRAWN = 1000  # of a curve, at most


class Log(NamedTuple):
    """One image a patient, in order. sick, called: bool [N]."""

    sick: np.ndarray
    called: np.ndarray
    images: int  # that were looked at
    left_out: int  # further images of patients
    unnamed: int  # images that count as a patient each, because nothing tells whose they are
    waiting: int  # rows without a diagnosis
    unscored: int  # rows of files that predict.py could not read
    score: str  # the column that the scores are from
    named: bool  # whether there is a column patient


class Row(NamedTuple):
    """A row of the log, checked. score: None where predict.py could not read the file; sick: None where there
    is no diagnosis yet; patient: "" where nothing tells."""

    path: str
    score: float | None
    sick: bool | None
    patient: str
    time: str


def truths(task, finding):
    """What a diagnosis may say -> (words for the absence of a finding, for its presence), in lower case."""
    absent, present = [f"no {finding}", "0"], [finding, "1"]
    if task.kind == "softmax" and finding in task.classes:
        absent += [name for name in task.classes if name != finding]
    elif task.kind == "softmax":  # any disease
        absent.append(task.classes[0])
        present += task.classes[1:]
    return tuple([word.lower() for word in words] for words in (absent, present))


def check_row(cell, score, words, where):
    """{column: text} -> Row; `score`: the column of the scores. InputError for a value that is wrong."""
    try:
        value = float(cell[score])
    except ValueError:
        value = float("nan")
    if not cell[score] and score != "score":
        value = None
    elif not 0 <= value <= 1:
        raise InputError(f"{where}: {score} {cell[score][:40]!r} is no probability from 0 to 1")
    if not cell["path"]:
        raise InputError(f"{where}: path is empty: each image is to have one row")
    diagnosis, (absent, present) = cell["diagnosis"].lower(), words
    if diagnosis and diagnosis not in (*absent, *present):
        known = ", ".join((*absent, *present))
        raise InputError(f"{where}: diagnosis {cell['diagnosis'][:40]!r} is not one of {known}")
    sick = diagnosis in present if diagnosis else None
    patient = clean_patient(cell.get("patient", ""))
    if not patient and patient_id(cell["path"]) != cell["path"]:
        patient = patient_id(cell["path"])
    return Row(cell["path"], value, sick, patient, cell.get("time", ""))


def check_columns(path, head, score):
    """InputError if a log with these columns lacks one; `score`: that of the scores."""
    missing = [name for name in ("path", score, "diagnosis") if name not in head]
    if not missing:
        return
    if score in missing and score != "score":
        missing[missing.index(score)] = f"{score} (nor score)"
    raise InputError(f"{path} has no column {' and '.join(missing)}; it has {', '.join(head)}")


def read_log(path, threshold, words, column="score"):
    """LOG.csv -> Log; `words`: see `truths`; `column`: how predict.py calls the scores, used where no column
    is called score.

    InputError naming the row for anything wrong: no such column, a score that is no probability, an unknown
    diagnosis, an image or a time out of order that comes twice."""
    head, rows = open_table(path)
    score = "score" if "score" in head else column
    check_columns(path, head, score)
    images, patients, last = set(), set(), ""
    sick, called, counts = [], [], dict.fromkeys(("images", "left_out", "unnamed", "waiting", "unscored"), 0)
    for number, values in numbered(rows):
        padded = itertools.chain(map(str.strip, values), itertools.repeat(""))  # a row may be short
        where = f"{path}, row {number}"
        row = check_row(dict(zip(head, padded)), score, words, where)
        # The sequential test counts patients in the order of their diagnoses, each image once.
        if row.path in images:
            raise InputError(f"{where}: {row.path} is there twice: each image is to have one row")
        if row.time < last:
            raise InputError(
                f"{where}: time {row.time[:40]} is before that of an earlier row: sort the rows by time"
            )
        images.add(row.path)
        last = row.time
        if row.score is None:
            counts["unscored"] += 1
            continue
        if row.sick is None:
            counts["waiting"] += 1
            continue
        counts["images"] += 1
        counts["unnamed"] += not row.patient
        # Images of one patient are no independent draws, so the first one counts.
        patient = row.patient or row.path
        if patient in patients:
            counts["left_out"] += 1
            continue
        patients.add(patient)
        sick.append(row.sick)
        called.append(row.score >= threshold)
    outcomes = np.array(sick, bool), np.array(called, bool)
    return Log(*outcomes, **counts, score=score, named="patient" in head)


def say_counts(path, log):
    """Notes on rows that do not count, and on images that count as patients."""
    if log.unscored:
        say(f"note: passed over, without a score (unreadable files?): {log.unscored} rows of {path}")
    if log.waiting:
        say(f"note: passed over, without a diagnosis yet: {log.waiting} rows of {path}")
    if log.unnamed:
        why = "the column patient is empty there" if log.named else f"{path} has no column patient"
        say(
            f"note: {log.unnamed} of {log.images} images count as a patient each: {why}, and their names "
            "tell no patient. If some are of the same patient, name it in a column patient"
        )


def draw(path, log, floor, alarm, title):
    """Write a picture of recall and specificity over time, with confidence sequences."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    hits, rightly_cleared = log.called[log.sick], ~log.called[~log.sick]
    panels = (("recall", "with", hits), ("specificity", "without", rightly_cleared))
    for ax, (name, which, outcomes) in zip(axes, panels):
        ax.set(xlabel=f"patients {which} the finding", ylabel=name, ylim=(0, 1.02))
        ax.grid(alpha=0.3)
        if not len(outcomes):
            continue
        # Of a long log evenly spread patients are drawn: a picture has no room for more.
        drawn = np.linspace(1, len(outcomes), min(len(outcomes), POINTS_DRAWN))
        count = np.unique(drawn.round().astype(int))
        right = np.cumsum(outcomes)[count - 1]
        low, high = sequential.confidence_interval(right, count - right).T
        ax.fill_between(count, low, high, alpha=0.25, step="mid", label="95% confidence sequence")
        ax.plot(count, right / count, label=f"{name} so far")
        if name == "recall":
            ax.axhline(floor, color="black", linestyle="--", linewidth=1, label=f"floor {floor:g}")
            if alarm:
                ax.axvline(alarm, color="red", label=f"floor refuted, patient {alarm}")
        ax.legend(fontsize=8, loc="lower right")
    figure.suptitle(title, fontsize=11)
    with atomic_path(path) as tmp:
        figure.savefig(tmp, dpi=110)
    plt.close(figure)


def threshold_of(run, args):
    """(finding, threshold, recall floor) of the operating point that is watched. InputError where there is
    none."""
    finding, name = run.task.chosen_finding(args.finding), scaling.calibration_name(args.tta)
    if args.site:
        source = run.site(args.site, name)
        thresholds = source["findings"][finding]
    else:
        source = run.calibration(name)
        thresholds = source["findings"][finding]
        # A calibration.json keeps @Guar elsewhere than a site does.
        thresholds = {**thresholds, "guaranteed": thresholds.get("guarantee", {}).get("threshold")}
    threshold, floor = thresholds.get(POINTS[args.point]), args.min_recall or source.get("min_recall")
    if threshold is None:
        where = f" at {args.site}" if args.site else ""
        raise InputError(f"{run} has no threshold @{args.point.title()} for {finding}{where}")
    if not floor or not 0 < floor < 1:
        raise InputError(f"a recall floor of {floor} cannot be watched: name one below 1 with --min-recall")
    return finding, threshold, floor


def parse():
    """Checked command line."""
    parser = Parser(__doc__)
    parser.add_argument(
        "log", metavar="LOG.csv", help="table path,score,diagnosis, perhaps with patient,time"
    )
    parser.add_argument("--run", default="outputs/pretrained", metavar="DIR", help="a calibrated run folder")
    parser.add_argument(
        "--site",
        metavar="WHERE",
        help="use the thresholds that calibrate.py --site made for WHERE (default: the run's)",
    )
    parser.add_argument("--tta", action="store_true", help="the scores are of predict.py --tta")
    parser.add_argument(
        "--point",
        choices=tuple(POINTS),
        default="rec",
        help="threshold in use: recall-first, of the mean, or guaranteed",
    )
    parser.add_argument(
        "--finding", metavar="NAME", help="finding to watch, of several (default: the only one)"
    )
    between = Number(float, 0, 1, above=True, below=True)
    parser.add_argument(
        "--min-recall",
        type=between,
        metavar="X",
        help="recall floor to watch, in (0, 1) (default: that of calibrate.py)",
    )
    args = parser.parse_args()
    check_name("--site", args.site)
    return args


def title_of(run, args, threshold):
    """What is watched, as the title of the picture and the first printed line."""
    title = run.folder.resolve().name
    if args.site:
        title += f" at {args.site}"
    if args.tta:
        title += " with TTA"
    return f"{title}: threshold {threshold:.4f}"


def picture_name(args, task, finding):
    """File name of the picture: the log's, then what tells this look at it from others."""
    words = [Path(args.log).stem[:50], args.site or "validation", *task.told_apart(finding)]
    if args.point != "rec":
        words.append(args.point)
    if args.tta:
        words.append("tta")
    return re.sub(r"[^\w. -]+", "-", "-".join(words)) + ".png"


def say_verdict(alarm, patients, finding, floor):
    """The last line: refuted (exit code 3), not refuted, or too few patients to tell."""
    if alarm:
        say(
            f"ALARM: recall >= {floor:g} was refuted at patient {alarm} with {finding}: stop relying "
            "on this threshold, and choose another with calibrate.py --site"
        )
        sys.exit(REFUTED)
    say(f"recall >= {floor:g} is not refuted so far")
    lower = floor - 0.05 if floor > 0.1 else floor / 2
    usual = sequential.noticed_after(lower, floor)
    if usual is None or patients < usual:
        after = "more than 100,000" if usual is None else f"about {usual}"
        text = f"{lower:.3f}".removesuffix("0")
        say(
            f"note: {patients} patients with {finding} cannot tell yet: a recall of {text} would be noticed "
            f"after {after} of them (in half of all cases)"
        )


def main():
    args = parse()
    run = Run(args.run)
    finding, threshold, floor = threshold_of(run, args)
    calibration = run.calibration(scaling.calibration_name(args.tta))
    if scaling.applied(calibration):
        say(
            f"note: this threshold is for scores after {scaling.fitted(calibration)}: scores that predict.py "
            "gave before calibrate.py applied it must not be in the log"
        )
    log = read_log(args.log, threshold, truths(run.task, finding), run.task.score_columns[finding])
    say_counts(args.log, log)

    # Only the floor of the recall is tested: specificity is shown, and nothing is promised of it.
    hits, rightly_cleared = log.called[log.sick], ~log.called[~log.sick]
    alarm = sequential.refuted_at(hits, floor)
    title = title_of(run, args, threshold)
    path = run.folder / "monitor" / picture_name(args, run.task, finding)
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, log, floor, alarm, title)

    print(f"{title}, of the column {log.score}")
    print(f"  {len(log.sick)} patients, {log.left_out} further images left out")
    for name, which, outcomes in (("recall", "with", hits), ("specificity", "without", rightly_cleared)):
        if len(outcomes):
            low, high = sequential.confidence_interval([outcomes.sum()], [(~outcomes).sum()])[0]
            counted = f"of {len(outcomes)} patients {which} {finding}"
            print(f"  {name:12}{outcomes.mean():.3f} [{low:.3f}, {high:.3f}] {counted}")
    print(f"wrote {path}", flush=True)
    say_verdict(alarm, len(hits), finding, floor)


if __name__ == "__main__":
    start(main)
