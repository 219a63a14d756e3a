"""What do images of other hospitals in training change, there and at home?

    python studies/adapt.py --nih NIH_DIR --rsna RSNA_DIR --tables Data/adapt

writes tables for --also: half of the patients of each hospital to learn from, the other half held out, drawn
once. NIH: studies/nih.py says which images count as pneumonia. RSNA: the columns path, patient, group
(normal, abnormal_no_opacity, lung_opacity) and pneumonia.

    python train_pretrained.py --also NIH_DIR:Data/adapt/nih_learn.csv --balance sources --out outputs/nih
    python calibrate.py --run outputs/nih
    python studies/adapt.py --nih NIH_DIR --rsna RSNA_DIR --tables Data/adapt --run outputs/nih ...

The last command prints a row of a markdown table for each calibrated run: AUROC, recall and specificity of
the official test set at the threshold chosen on validation, and on the held-out patients: NIH the same; RSNA
the AUROC of opacity against normal and against abnormal without opacity. All with 95% intervals by patient.
"""

import csv
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from calibration import site
from calibration.intervals import intervals_at_threshold
from calibration.site import halves
from common.cli import Parser
from common.console import start
from common.device import add_device_argument, pick_device
from common.files import atomic_path
from data import load
from layouts.sheets import open_sheet
from metrics import summarize_at_threshold
from records.run import Run
from studies.nih import list_nih
from training import other_hospitals

GROUPS = ("normal", "abnormal_no_opacity", "lung_opacity")
COLUMNS = ("path", "patient", "group", "PNEUMONIA")


def write_tables(folder, name, rows):
    """Write NAME_learn.csv and NAME_held.csv, for --also: half of the patients each; `rows`: as COLUMNS."""
    paths, patients, _, sick = zip(*rows)
    sides = halves(np.array(patients), np.array(sick, dtype=int))
    for side, positions in zip(("learn", "held"), sides):
        path = folder / f"{name}_{side}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as tmp, open(tmp, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *(rows[i] for i in positions)])
        print(f"{path}: {len(positions)} images, {sum(int(sick[i]) for i in positions)} with pneumonia")


def nih_rows(folder):
    files, targets, patients = list_nih(folder)
    return [(f, p, "sick" if t else "normal", int(t)) for f, t, p in zip(files, targets, patients)]


def rsna_rows(folder):
    sheet = open_sheet(Path(folder, "labels.csv"))
    return list(zip(*map(sheet.text, ("path", "patient", "group", "pneumonia"))))


def held_out(run, place, table, device):
    """(truth [N], scores [N], patients [N], groups [N], the run's threshold) on the held-out half of a
    hospital."""
    root, index = other_hospitals.read(f"{place}:{table}", run.config)
    subset = load(run.config, root, index, "held-out")[0]
    _, (truth, scores, shipped), _ = site.scored(run, subset, device, None, 64)
    sheet = open_sheet(table)
    group = dict(zip(sheet.text("path"), sheet.text("group")))
    groups = np.array([group[f] for f in subset.files])
    return (
        truth[:, 0].astype(int),
        scores[:, 0],
        np.array(subset.patients),
        groups,
        next(iter(shipped.values())),
    )


def cell(row, spans, name, method):
    return f"{row[name]:.3f} [{spans[name][method][0]:.3f}, {spans[name][method][1]:.3f}]"


def figures(y, p, patients, threshold):
    """AUROC, recall and specificity with intervals, as text."""
    row, spans = summarize_at_threshold(y, p, threshold), intervals_at_threshold(y, p, threshold, patients)
    return [cell(row, spans, name, "bootstrap") for name in ("auroc", "recall", "specificity")]


def main():
    parser = Parser(__doc__)
    parser.add_argument("--nih", required=True, metavar="DIR", help="images/ and sample_labels.csv of NIH")
    parser.add_argument("--rsna", metavar="DIR", help="lungs of RSNA: images/ and labels.csv")
    parser.add_argument("--tables", default="Data/adapt", metavar="DIR", help="where the tables are")
    parser.add_argument("--run", nargs="+", metavar="DIR", help="calibrated run folders of two classes")
    add_device_argument(parser)
    args = parser.parse_args()
    folder, device = Path(args.tables), pick_device(args.device)
    if not args.run:
        write_tables(folder, "nih", nih_rows(args.nih))
        if args.rsna:
            write_tables(folder, "rsna", rsna_rows(args.rsna))
        return
    names = ["test AUROC", "recall @Rec", "specificity", "NIH AUROC", "recall @Rec", "specificity"]
    names += ["RSNA: opacity against normal", "against abnormal"] if args.rsna else []
    print(f"| run | {' | '.join(names)} |\n| --- |{' ---: |' * len(names)}")
    for run in map(Run, args.run):
        row = run.calibration()["findings"][run.task.findings[0]]["test"]["at_rec"]
        cells = [cell(row, row["interval"], k, "bootstrap") for k in ("auroc", "recall", "specificity")]
        y, p, patients, _, threshold = held_out(run, args.nih, folder / "nih_held.csv", device)
        cells += figures(y, p, patients, threshold)
        if args.rsna and run.config.input != "full":
            y, p, patients, groups, threshold = held_out(run, args.rsna, folder / "rsna_held.csv", device)
            for other in GROUPS[:2]:
                some = np.isin(groups, (other, GROUPS[2]))
                cells += figures(y[some], p[some], patients[some], threshold)[:1]
        elif args.rsna:  # lungs alone mean nothing to a model of whole images
            cells += ["-", "-"]
        print(f"| {run} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    start(main)
