"""Watch whether a threshold keeps its recall, as diagnoses come in.

    python monitor.py --run outputs/pretrained LOG.csv

LOG.csv has a row for each image, in the order in which the truth became known: path, score (predict.py's
p_FINDING), diagnosis (the name of the class or finding, of its absence, or 1 and 0), and perhaps patient and
time (as 2026-11-23, which sorts as text). The first image of each patient counts; without that column, file
names tell the patient, as in training. Prints recall and specificity so far with 95% confidence sequences,
which hold at all times at once, and draws them over time to RUN/monitor/. If recall >= the floor is refuted,
it says when, and the exit code is 3. Where recall is at the floor, that ever happens with a chance of at most
5%, however long one watches (betting.py). --site WHERE takes the thresholds of calibrate.py --site, --tta
those of calibrate.py --tta, for scores of predict.py --tta.
"""

import sys
from typing import NamedTuple

import matplotlib
import numpy as np

import betting
import common
import scaling
from index import patient_id
from run import Run
from tables import clean_patient, numbered, open_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

POINTS = {"rec": "threshold", "mean": "mean", "guar": "guaranteed"}
REFUTED = 3  # exit code


class Log(NamedTuple):
    """One image a patient, in order. sick, called: bool [N]."""

    sick: np.ndarray
    called: np.ndarray
    left_out: int  # further images of patients


def read_log(path, threshold, words):
    """LOG.csv -> Log; `words`: (names of health, names of the finding), in lower case.

    InputError naming the row for anything wrong: no such column, a score that is no probability, an unknown
    diagnosis, an image or a time out of order that comes twice."""
    head, rows = open_table(path)
    missing = [name for name in ("path", "score", "diagnosis") if name not in head]
    if missing:
        raise common.InputError(f"{path} has no column {' and '.join(missing)}; it has {', '.join(head)}")
    at, seen, patients, last = {name: head.index(name) for name in head}, set(), set(), ""
    sick, called, left_out = [], [], 0
    for number, row in numbered(rows):
        cell = {name: row[i].strip() if i < len(row) else "" for name, i in at.items()}
        where = f"{path}, row {number}"
        try:
            score = float(cell["score"])
        except ValueError:
            score = float("nan")
        if not 0 <= score <= 1:
            raise common.InputError(f"{where}: score {cell['score'][:40]!r} is no probability from 0 to 1")
        if cell["path"] in seen or not cell["path"]:
            what = f"{cell['path']} is there twice" if cell["path"] else "path is empty"
            raise common.InputError(f"{where}: {what}: each image is to have one row")
        if cell.get("time", "") < last:
            raise common.InputError(
                f"{where}: time {cell['time'][:40]} is before that of an earlier row: sort the rows by time"
            )
        diagnosis = cell["diagnosis"].lower()
        if diagnosis not in (*words[0], *words[1]):
            known = ", ".join((*words[0], *words[1]))
            raise common.InputError(f"{where}: diagnosis {cell['diagnosis'][:40]!r} is not one of {known}")
        seen.add(cell["path"])
        last = cell.get("time", "")
        patient = clean_patient(cell.get("patient", "")) or patient_id(cell["path"])
        if patient in patients:
            left_out += 1
            continue
        patients.add(patient)
        sick.append(diagnosis in words[1])
        called.append(score >= threshold)
    return Log(np.array(sick, bool), np.array(called, bool), left_out)


def draw(path, log, floor, alarm, title):
    """Write a picture of recall and specificity over time, with confidence sequences."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    sides = (("recall", log.sick, log.called), ("specificity", ~log.sick, ~log.called))
    for ax, (name, chosen, right) in zip(axes, sides):
        outcomes = right[chosen]
        ax.set(
            xlabel=f"patients {'with' if name == 'recall' else 'without'} the finding",
            ylabel=name,
            ylim=(0, 1.02),
        )
        ax.grid(alpha=0.3)
        if not len(outcomes):
            continue
        count = np.arange(1, len(outcomes) + 1)
        band = betting.confidence_sequence(outcomes)
        ax.fill_between(
            count, band[:, 0], band[:, 1], alpha=0.25, step="mid", label="95% confidence sequence"
        )
        ax.plot(count, np.cumsum(outcomes) / count, label=f"{name} so far")
        if name == "recall":
            ax.axhline(floor, color="black", linestyle="--", linewidth=1, label=f"floor {floor:g}")
            if alarm:
                ax.axvline(alarm, color="red", label=f"floor refuted, patient {alarm}")
        ax.legend(fontsize=8, loc="lower right")
    figure.suptitle(title, fontsize=11)
    with common.atomic_path(path) as tmp:
        figure.savefig(tmp, dpi=110)
    plt.close(figure)


def threshold_of(run, args):
    """(threshold, recall floor) of the operating point that is watched. InputError where there is none."""
    if len(run.task.findings) > 1 and args.finding is None:
        raise common.InputError(f"--finding: which of {', '.join(run.task.findings)}?")
    finding = args.finding or run.task.findings[0]
    if finding not in run.task.findings:
        raise common.InputError(f"--finding {finding} is not one of {', '.join(run.task.findings)}")
    name = "tta" if args.tta else ""
    if args.site:
        source = run.site(args.site, name)
        found = source["findings"][finding]
    else:
        source = run.calibration(name)
        found = run.findings(source)[finding]
        found = {**found, "guaranteed": found.get("guarantee", {}).get("threshold")}
    threshold, floor = found.get(POINTS[args.point]), args.min_recall or source.get("min_recall")
    if threshold is None:
        where = f" at {args.site}" if args.site else ""
        raise common.InputError(f"{run} has no threshold @{args.point.title()} for {finding}{where}")
    if not floor or not 0 < floor < 1:
        raise common.InputError(
            f"a recall floor of {floor} cannot be watched: name one below 1 with --min-recall"
        )
    return finding, threshold, floor


def parse():
    """Checked command line."""
    parser = common.Parser(__doc__)
    parser.add_argument("log", metavar="LOG.csv", help="path,score,diagnosis and perhaps patient,time")
    parser.add_argument("--run", default="outputs/pretrained", metavar="DIR", help="a calibrated run folder")
    parser.add_argument("--site", metavar="WHERE", help="thresholds of calibrate.py --site")
    parser.add_argument("--tta", action="store_true", help="the scores are those of predict.py --tta")
    parser.add_argument("--point", choices=tuple(POINTS), default="rec", help="which threshold is in use")
    parser.add_argument("--finding", metavar="NAME", help="which of several findings")
    between = common.Number(float, 0, 1, above=True, below=True)
    parser.add_argument(
        "--min-recall", type=between, metavar="X", help="the floor (default: that of calibrate.py)"
    )
    args = parser.parse_args()
    common.check_name("--site", args.site)
    return args


def main():
    args = parse()
    run = Run(args.run)
    finding, threshold, floor = threshold_of(run, args)
    calibration = run.calibration("tta" if args.tta else "")
    if scaling.applied(calibration):
        common.say(
            f"note: this threshold is for scores after {scaling.fitted(calibration)}: scores that predict.py "
            "gave before calibrate.py applied it must not be in the log"
        )
    classes = [name.lower() for name in run.task.classes]
    health = [f"no {finding.lower()}", "0", *(classes[:1] if run.task.kind == "softmax" else [])]
    log = read_log(args.log, threshold, (tuple(health), (finding.lower(), "1")))
    hits, right = log.called[log.sick], ~log.called[~log.sick]
    alarm = betting.refuted_at(hits, floor)
    where, views = f" at {args.site}" if args.site else "", " with TTA" if args.tta else ""
    title = f"{run.folder.resolve().name}{where}{views}: threshold {threshold:.4f}"
    path = run.folder / "monitor" / f"{args.site or 'validation'}{'-tta' if args.tta else ''}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, log, floor, alarm, title)
    print(f"{title}; {len(log.sick)} patients, {log.left_out} further images left out")
    for name, outcomes in (("recall", hits), ("specificity", right)):
        if len(outcomes):
            low, high = betting.confidence_sequence(outcomes)[-1]
            of = "with" if name == "recall" else "without"
            counted = f"of {len(outcomes)} patients {of} {finding}"
            print(f"  {name:12}{outcomes.mean():.3f} [{low:.3f}, {high:.3f}] {counted}")
    print(f"wrote {path}", flush=True)
    if alarm:
        common.say(
            f"ALARM: recall >= {floor:g} was refuted at patient {alarm} with {finding}: stop relying "
            "on this threshold, and choose another with calibrate.py --site"
        )
        sys.exit(REFUTED)
    common.say(f"recall >= {floor:g} is not refuted so far")


if __name__ == "__main__":
    common.start(main)
