"""The story of docs/ANOTHER_HOSPITAL.md, told on NIH images (studies/nih.py says which).

    python studies/story.py --run outputs/crop-seed0 --nih NIH_DIR --out Data/story

Draws 300 images, of which 200 are labelled, and leaves the others for later; runs that page's commands on a
copy of the run, and prints what they say.
"""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from common.cli import COUNT, Parser
from common.console import InputError, start
from common.files import atomic_path
from records.run import Run
from studies.nih import list_nih

SCRIPTS = Path(__file__).resolve().parents[1]


def lay_out(nih, folder, tried, labelled):
    """THEIRS/ (the first `tried` images, in random order), LATER/ (the others) and labels.csv in `folder`;
    returns {name of a later image: (diagnosis, patient)}."""
    files, targets, patients = list_nih(nih)
    order = np.random.default_rng(0).permutation(len(files))
    later, rows = {}, [("path", "patient", "PNEUMONIA")]
    for place in ("THEIRS", "LATER"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    for number, i in enumerate(order):
        place, name = "THEIRS" if number < tried else "LATER", Path(files[i]).name
        shutil.copy(Path(nih, files[i]), folder / place / name)
        if number < labelled:
            rows.append((name, patients[i], targets[i]))
        if number >= tried:
            later[name] = targets[i], patients[i]
    write(folder / "labels.csv", rows)
    return later


def write(path, rows):
    with atomic_path(path) as tmp, open(tmp, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def call(script, *flags, to=None):
    """Run a script and print what it says; its output goes to the file `to`, if one is named."""
    flags = list(map(str, flags))
    print(f"\n$ python {script}.py {' '.join(flags)}" + (f" > {to}" if to else ""), flush=True)
    done = subprocess.run([sys.executable, SCRIPTS / f"{script}.py", *flags], capture_output=True, text=True)
    if to:
        to.write_text(done.stdout)
    print((("" if to else done.stdout) + done.stderr).rstrip(), flush=True)
    if done.returncode not in (0, 3):
        raise InputError(f"{script}.py ended with exit code {done.returncode}, see above")
    print(f"exit code {done.returncode}")


def main():
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, metavar="DIR", help="a calibrated run folder of two classes")
    parser.add_argument("--nih", required=True, metavar="DIR", help="images/ and sample_labels.csv of NIH")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for all of it")
    parser.add_argument("--tried", type=COUNT, default=300, metavar="N", help="images tried first")
    parser.add_argument("--labelled", type=COUNT, default=200, metavar="N", help="of these, labelled")
    parser.add_argument("--less", default="0.94", metavar="R", help="the lower floor asked for at last")
    args = parser.parse_args()
    folder = Path(args.out)
    if folder.exists():
        raise InputError(f"--out {folder} is there already: name a new folder")
    later = lay_out(args.nih, folder, args.tried, args.labelled)
    copy = folder / "outputs" / Path(args.run).name
    shutil.copytree(Run(args.run).folder, copy)
    run = ("--run", copy)
    site = ("--site", folder / "THEIRS", "--labels", folder / "labels.csv", "--name", "clinic")
    call("predict", folder / "THEIRS", *run, to=folder / "scores.csv")
    call("calibrate", *run, *site, "--report")
    call("calibrate", *run, *site, "--min-recall", args.less)
    call("predict", folder / "LATER", *run, "--site", "clinic", to=folder / "later.csv")
    with open(folder / "later.csv", newline="", encoding="utf-8") as file:
        rows = [(r["path"], r["p_pneumonia"], *later[Path(r["path"]).name]) for r in csv.DictReader(file)]
    write(folder / "LOG.csv", [("path", "score", "diagnosis", "patient"), *rows])
    call("monitor", *run, "--site", "clinic", "--point", "guar", folder / "LOG.csv")
    call("monitor", *run, folder / "LOG.csv")  # with the threshold as shipped


if __name__ == "__main__":
    start(main)
