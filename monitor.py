"""Watch whether a threshold keeps its recall, as diagnoses come in.

    python monitor.py --run outputs/pretrained LOG.csv

LOG.csv has a row for each image, in the order in which the truth became known. The CSV of predict.py with a
column diagnosis will do. Columns: path; score, or p_FINDING as predict.py writes it; diagnosis (the name of
the class or finding, or of its absence, or 1 and 0; rows where it is empty wait); perhaps patient, and time
(as 2026-11-23, which sorts as text).

The first image of each patient counts. Without a column patient, file names tell the patient, as in training;
an image with no patient in its name counts as a patient. Prints recall and specificity so far with 95%
confidence sequences, which hold at all times at once, and draws them over time to RUN/monitor/LOG-*.png.

A log of predict.py also has the threshold that decided each row: where it is another than the watched one,
a note counts the rows.

If the data refute a recall at the floor or above, it says when, and the exit code is 3. Where recall is at
the floor, that ever happens with a chance of at most 5%, however long one watches
(monitoring/sequential.py). With few patients it says that they cannot tell yet. --site WHERE takes the
thresholds of calibrate.py --site; --tta takes those of calibrate.py --tta, for scores of predict.py --tta.

Of three answers (calibrate.py --min-specificity) only "negative" is a miss: the unsure are read, so they
count as found. --point in or inguar watches the other promise, the specificity of "positive", on patients
without the finding.
"""

import common.prelude  # noqa: F401  (first: see there)

import re
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from calibration.pooling import columns_of, unit_of
from calibration.triage import answers
from common import scaling
from common.cli import Number, Parser, add_calibrated_run_arguments, check_name
from common.console import InputError, say, start
from common.files import save_figure
from common.task import ANSWERS, effective_rule_in
from monitoring import sequential
from monitoring.log import read_log, say_counts, say_other_thresholds, threshold_columns, truths
from records.run import Run

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

POINTS = {"rec": "threshold", "mean": "mean", "guar": "guaranteed"}
RULE_IN = {"in": "@In", "inguar": "@InGuar"}  # whose promise is a specificity
DECIDED = {"rec": "@Rec", "guar": "@Guar", "in": "@In"}  # points whose threshold predict.py writes
REFUTED = 3  # exit code
POINTS_DRAWN = 1000  # of a curve, at most


class Watched(NamedTuple):
    """The promise that is watched: of `figure`, recall or specificity, at least `floor` at `threshold`, for
    patients `which` ("with" or "without") the finding. `triage`: (@Rec, @In or None), () where there is no
    such calibration."""

    finding: str
    threshold: float
    floor: float
    figure: str = "recall"
    which: str = "with"
    triage: tuple = ()


def draw(path, log, watched, alarm, title):
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
        if name == watched.figure:
            floor = watched.floor
            ax.axhline(floor, color="black", linestyle="--", linewidth=1, label=f"floor {floor:g}")
            if alarm:
                ax.axvline(alarm, color="red", label=f"floor refuted, patient {alarm}")
        ax.legend(fontsize=8, loc="lower right")
    figure.suptitle(title, fontsize=11)
    save_figure(path, figure, 110)


def watched_of(run, args):
    """The Watched that the command line asks for. InputError where there is no such threshold or floor."""
    finding, name = run.task.chosen_finding(args.finding), scaling.calibration_name(args.tta, run)
    if args.site:
        source, where = run.site(args.site, name), f" at {args.site}"
        thresholds = source["findings"][finding]
    else:
        source, where = run.calibration(name), ""
        thresholds = source["findings"][finding]
        # A calibration.json keeps @Guar elsewhere than a site does.
        thresholds = {**thresholds, "guaranteed": thresholds.get("guarantee", {}).get("threshold")}
    if args.point in RULE_IN:
        absent = f"{run} has no threshold {RULE_IN[args.point]} for {finding}{where}"
        return rule_in_watched(absent, finding, thresholds, args)
    threshold, floor = thresholds.get(POINTS[args.point]), args.min_recall or source.get("min_recall")
    if threshold is None:
        raise InputError(f"{run} has no threshold @{args.point.title()} for {finding}{where}")
    if not floor or not 0 < floor < 1:
        raise InputError(f"a recall floor of {floor} cannot be watched: name one below 1 with --min-recall")
    triage = ()
    if "rule_in" in thresholds and args.point == "rec":  # the three answers lie between @Rec and @In
        triage = thresholds["threshold"], thresholds["rule_in"]["threshold"]
    return Watched(finding, threshold, floor, triage=triage)


def rule_in_watched(absent, finding, thresholds, args):
    """The Watched of --point in or inguar: `thresholds` of a finding; `absent`: the error where there is
    none."""
    if args.min_recall:
        raise InputError(f"--min-recall: --point {args.point} watches the specificity of calibrate.py")
    rule_in = thresholds.get("rule_in")
    if not rule_in:
        raise InputError(f"{absent}: calibrate.py --min-specificity chooses it")
    place, lower = rule_in, thresholds["threshold"]
    if args.point == "inguar":
        place, lower = rule_in["guarantee"], thresholds["guaranteed"]
    if place["threshold"] is None:
        raise InputError(f"{absent}: {place['why_not']}")
    threshold, floor = place["threshold"], rule_in["min_specificity"]
    if lower is not None:
        threshold = effective_rule_in(lower, threshold)
    if floor == 1:
        lower_it = "choose one below 1 by calibrate.py --min-specificity"
        raise InputError(f"a specificity of 1 cannot be watched: {lower_it}")
    return Watched(finding, threshold, floor, "specificity", "without")


def parse():
    """Checked command line."""
    parser = Parser(__doc__)
    parser.add_argument(
        "log", metavar="LOG.csv", help="table path,score,diagnosis, perhaps with patient,time"
    )
    add_calibrated_run_arguments(parser)
    parser.add_argument("--tta", action="store_true", help="the scores are of predict.py --tta")
    parser.add_argument(
        "--point",
        choices=(*POINTS, *RULE_IN),
        default="rec",
        help="threshold in use: recall-first, of the mean, or guaranteed; in, inguar: watch the specificity "
        "of @In or @InGuar",
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


def say_verdict(alarm, patients, watched):
    """The last line: refuted (exit code 3), not refuted, or too few patients to tell."""
    figure, floor, who = watched.figure, watched.floor, f"{watched.which} {watched.finding}"
    if not patients:
        say(f"note: no patient {who} has been seen, so {figure} >= {floor:g} was not watched")
        return
    if alarm:
        say(
            f"ALARM: {figure} >= {floor:g} was refuted at patient {alarm} {who}: stop relying on this "
            "threshold, and choose another with calibrate.py --site"
        )
        sys.exit(REFUTED)
    say(f"{figure} >= {floor:g} is not refuted so far")
    # "Not refuted" may only mean "too few": so what could be noticed by now is said.
    lower = floor - 0.05 if floor > 0.1 else floor / 2
    usual = sequential.noticed_after(lower, floor)
    if usual is None or patients < usual:
        after = "more than 100,000" if usual is None else f"about {usual}"
        text = f"{lower:.3f}".removesuffix("0")
        say(
            f"note: {patients} patients {who} cannot tell yet: a {figure} of {text} would be noticed after "
            f"{after} of them (in half of all cases)"
        )


def triage_lines(log, triage):
    """Who had which answer so far, as lines; none without three answers. `triage`: (@Rec, @In or None)."""
    if not triage:
        return []
    given, counts = answers(log.scores, *triage), []
    for name, members in (("sick", log.sick), ("healthy", ~log.sick)):
        counted = np.bincount(given[members], minlength=len(ANSWERS))
        counts.append(f"{name} " + ", ".join(f"{n} {word}" for n, word in zip(counted, ANSWERS)))
    return [
        f"  triage      {'; '.join(counts)} patients",
        "  the unsure are read, so for recall they count as found; --point in watches the specificity of "
        "positive",
    ]


def main():
    args = parse()
    run = Run(args.run)
    args.tta = scaling.asked_views(args.tta, run)
    watched = watched_of(run, args)
    finding, threshold = watched.finding, watched.threshold
    calibration = run.calibration(scaling.calibration_name(args.tta, run))
    if scaling.applied(calibration):
        say(
            f"note: this threshold is for scores after {scaling.fitted(calibration)}: scores that predict.py "
            "gave before calibrate.py applied it must not be in the log"
        )
    column, unit = run.task.score_columns[finding], unit_of(calibration)
    if unit != "image":
        (column,) = columns_of(unit, [column])
        say(f"note: this threshold is for scores of a {unit}, as predict.py gives them under {column}")
    log = read_log(args.log, threshold, truths(run.task, finding), column, unit)
    say_counts(args.log, log)
    columns = threshold_columns(run.task, finding, DECIDED.get(args.point), unit)
    say_other_thresholds(args.log, columns, threshold)

    # One floor is tested: the other figure is shown, and nothing is promised of it.
    hits, rightly_cleared = log.called[log.sick], ~log.called[~log.sick]
    outcomes_watched = hits if watched.figure == "recall" else rightly_cleared
    alarm = sequential.refuted_at(outcomes_watched, watched.floor)
    title = title_of(run, args, threshold)
    path = run.folder / "monitor" / picture_name(args, run.task, finding)
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, log, watched, alarm, title)

    print(f"{title}, of the column {log.score}")
    print(f"  {len(log.sick)} patients, {log.left_out} further images left out")
    for name, which, outcomes in (("recall", "with", hits), ("specificity", "without", rightly_cleared)):
        if len(outcomes):
            low, high = sequential.confidence_interval([outcomes.sum()], [(~outcomes).sum()])[0]
            counted = f"of {len(outcomes)} patients {which} {finding}"
            print(f"  {name:12}{outcomes.mean():.3f} [{low:.3f}, {high:.3f}] {counted}")
    for line in triage_lines(log, watched.triage):
        print(line)
    print(f"wrote {path}", flush=True)
    say_verdict(alarm, len(outcomes_watched), watched)


if __name__ == "__main__":
    start(main)
