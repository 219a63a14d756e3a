"""Train, calibrate and tabulate the runs of the large tables, one after the other.

    python studies/matrix.py lungs --data-dir DIR --weights-dir W --nih NIH_DIR --out outputs/matrix
    python studies/matrix.py arms accuracy --dry-run

What is finished is skipped, what was stopped goes on. The parts:

- lungs: each arm with each --input (docs/RESULTS.md, What a model sees);
- arms: the default and the paper recipe of each arm that has weights; and CNNs from random weights for two
  epochs, which shows that they run and nothing else;
- five: the same recipes on five classes in published parts (--data-dir is that set's);
- accuracy: the candidates of docs/notebook/20-accuracy-the-rule.md. By its rule they are not scored on the
  test images: there is no calibration, and the signals include the corruptions (give --nih for the panel);
- scratch: the candidates of docs/notebook/37-scratch-the-rule.md, not scored on the test images either;
- pretrained: those of docs/notebook/39-what-was-left.md, likewise (scratch-masked-strong-taught needs one).

--dry-run prints the commands and runs nothing; --only PATTERN takes rows by their names, --seeds 0 of their
seeds that one alone; what follows -- goes to every training script (`-- --max-steps 5`). On one GPU this
takes minutes, on two CPU cores days.
"""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from common.cli import Parser
from common.console import InputError, say, start
from common.proportions import reported_interval
from records.run import Run
from studies.signals import panel, read_figures

SCRIPTS = Path(__file__).resolve().parents[1]
LOOKS = ("full", "crop", "masked", "masked-crop", "outside")
TI, DINO = "ViT-Ti_16-224.npz", "dinov2_vits14.safetensors"
LABELS = "--recipe supervised"  # the scratch arm's default when these parts were run
LITE = "tf_efficientnet_lite0.safetensors"
PROBE = "--freeze-epochs 100 --epochs 0"
TEACHER = "--teacher {out}/ti16-"
RANDOM = (
    "resnet50 densenet121 regnety_004 regnety_006 convnextv2_tiny convnextv2_base tf_efficientnetv2_s "
    "tf_efficientnetv2_m tf_efficientnetv2_l"
).split()


class Row(NamedTuple):
    """A run: its name, the training script, its flags as text ({out} and {nih} stand for those folders), the
    file of weights, or "", and the seeds.

    scored: whether calibrate.py reads the test images for it."""

    name: str
    script: str
    flags: str = ""
    weights: str = ""
    seeds: tuple = (0,)
    scored: bool = True


def lungs():
    """Every arm with every --input; three seeds where the recipe is a candidate for the default."""
    rows = []
    for look in LOOKS:
        seeds = (0,) if look == "outside" else (0, 1, 2)
        for name, weights in (("ti16", TI), ("dinov2", DINO)):
            rows.append(Row(f"{name}-probe-{look}", "train_pretrained", f"--input {look} {PROBE}", weights))
            rows.append(Row(f"{name}-{look}", "train_pretrained", f"--input {look}", weights, seeds))
        rows.append(Row(f"scratch-{look}", "train_scratch", f"--input {look} {LABELS}", "", seeds))
    return rows


def arms():
    """The default and the paper recipe of each arm; the hybrid and its stem with three seeds."""
    rows = []
    for recipe in ("default", "paper"):
        flags, seeds = f"--recipe {recipe}", (0, 1, 2) if recipe == "default" else (0,)
        rows.append(Row(f"ti16-{recipe}", "train_pretrained", flags, TI, seeds))
        rows.append(Row(f"hybrid-{recipe}", "train_hybrid", flags, TI, seeds))
        rows.append(Row(f"dinov2-{recipe}", "train_pretrained", flags, DINO))
        rows.append(Row(f"lite0-{recipe}", "train_cnn", f"--model tf_efficientnet_lite0 {flags}", LITE))
    # the stem as the hybrid trains it: the same rates, epochs, sampling and loss
    stem = "--freeze-epochs 30 --epochs 3 --lr 6e-5 --schedule plateau --balance both --label-smoothing 0.1"
    rows.append(Row("stem-as-hybrid", "train_pretrained", stem, TI, (0, 1, 2)))
    short = "--img-size 64 --freeze-epochs 1 --epochs 2"
    return rows + [Row(f"random-{m}", "train_cnn", f"--model {m} {short}") for m in RANDOM]


def five():
    """The arms with weights on five classes, and the scratch arm; one seed."""
    scratch = Row("five-scratch-default", "train_scratch", f"--split published {LABELS}")
    return [scratch] + [
        row._replace(name=f"five-{row.name}", flags=f"{row.flags} --split published", seeds=(0,))
        for row in arms()
        if row.weights and row.name != "stem-as-hybrid"
    ]


def accuracy():
    """The candidates for the defaults, with three seeds each; chosen among before the test set is read."""
    three, looks = (0, 1, 2), ("masked-crop", "full")
    zoom = "--augment strong,scale=0.6,translate=0.2"
    boxes = "--augment strong,scale=0,translate=0,crop=0.08"
    rows = [Row(f"ti16-{look}", "train_pretrained", f"--input {look}", TI, three) for look in looks]
    for look in looks:
        see = f"--input {look}"
        rows += [
            Row(f"ti16-{look}-smooth", "train_pretrained", f"{see} --label-smoothing 0.2", TI, three),
            Row(f"ti16-{look}-zoom", "train_pretrained", f"{see} {zoom}", TI, three),
            Row(f"ti16-{look}-boxes", "train_pretrained", f"{see} {boxes}", TI, three),
            Row(f"dinov2-{look}", "train_pretrained", see, DINO, three),
            Row(f"dinov2-{look}-decay", "train_pretrained", f"{see} --layer-decay 0.65", DINO, three),
            Row(f"dinov2-{look}-mean", "train_pretrained", f"{see} --readout cls+mean", DINO, three),
            Row(
                f"dinov2-{look}-views",
                "train_pretrained",
                f"{see} {PROBE} --readout cls+mean --probe-views 8 --augment strong",
                DINO,
                three,
            ),
            Row(f"hybrid-{look}", "train_hybrid", see, TI, three),
            Row(f"scratch-{look}", "train_scratch", f"{see} {LABELS}", "", three),
            Row(
                f"scratch-{look}-taught", "train_scratch", f"{see} {LABELS} {TEACHER}{look}-seed0", "", three
            ),
            Row(
                f"scratch-{look}-taught-nih",
                "train_scratch",
                f"{see} {LABELS} {TEACHER}{look}-seed0 --also-unlabelled {{nih}}",
                "",
                three,
            ),
            Row(f"mae-{look}-nih", "pretrain_mae", f"{see} --epochs 30 --also-unlabelled {{nih}}"),
            Row(
                f"scratch-{look}-mae-nih",
                "train_scratch",
                f"{see} {LABELS} --epochs 10 --init {{out}}/mae-{look}-nih",
                "",
                three,
            ),
        ]
    rows.append(
        Row("dinov2-masked-crop-336", "train_pretrained", "--input masked-crop --img-size 336", DINO, three)
    )
    return [row._replace(scored=False) for row in rows]


def scratch():
    """The candidates for the first command, and its former default, scratch-full, beside them."""
    three = (0, 1, 2)
    muon, masked, strong = "--optimiser muon", "--masked-epochs 25", "--augment strong,frame=0.5,tone=0.5"
    former = [row for row in accuracy() if row.name == "scratch-full"]
    variants = {
        "scratch-masked-strong": f"{muon} {masked} {strong}",
        "scratch-masked-strong-short": f"{muon} --masked-epochs 12 {strong}",
        "scratch-masked-strong-smooth": f"{muon} {masked} {strong} --label-smoothing 0.2",
        "scratch-masked-strong-batch16": f"{muon} {masked} {strong} --batch-size 16",
        "scratch-masked-strong-taught": f"{muon} {masked} {strong} --teacher {{out}}/dinov2-full-seed0",
        "scratch-masked-strong-long": f"{muon} {masked} {strong} --epochs 30",
        "scratch-muon": muon,
        "scratch-masked-first": f"{muon} {masked}",
    }
    return former + [
        Row(name, "train_scratch", f"--epochs 15 {LABELS} {flags}", "", three, scored=False)
        for name, flags in variants.items()
    ]


def pretrained():
    """The members of the ensemble, as they are and with Muon at low rates."""
    three = (0, 1, 2)
    rows = []
    for name, look, weights, rates in (
        ("ti16-masked-crop", "masked-crop", TI, {"": "", "-muon": "1.5e-5", "-muon-low": "5e-6"}),
        ("dinov2-full", "full", DINO, {"": "", "-muon": "1.5e-5"}),
    ):
        for ending, rate in rates.items():
            flags = f"--input {look}" + (f" --optimiser muon --lr {rate}" if rate else "")
            rows.append(Row(name + ending, "train_pretrained", flags, weights, three, scored=False))
    return rows


PARTS = {
    "lungs": lungs,
    "arms": arms,
    "five": five,
    "accuracy": accuracy,
    "scratch": scratch,
    "pretrained": pretrained,
}


def commands(row, args):
    """(run folder, [training command, calibration, signals]) of each seed of a Row; nothing for one that
    needs --nih where there is none."""
    if row.name.endswith("-nih") and not args.nih:  # it sees those images, or begins from a run that did
        say(f"note: {row.name} is left out: it needs --nih")
        return
    flags = shlex.split(row.flags.format(out=args.out, nih=args.nih))
    for seed in (s for s in row.seeds if args.seeds is None or s in args.seeds):
        folder = Path(args.out, row.name if len(row.seeds) == 1 else f"{row.name}-seed{seed}")
        train = [f"{row.script}.py", "--data-dir", args.data_dir, *flags]
        train += ["--weights", str(Path(args.weights_dir, row.weights))] if row.weights else []
        train += ["--seed", str(seed), "--out", str(folder), *args.more]
        steps = [train] + ([["calibrate.py", "--run", str(folder)]] if row.scored else [])
        if row.script != "pretrain_mae" and (args.nih or not row.scored):
            how = ["--nih", args.nih] if args.nih else []
            how += [] if args.corruptions or not row.scored else ["--no-corruptions"]
            steps.append(["studies/experiments.py", "--run", str(folder), *how])
        yield folder, steps


def carry_out(folder, steps):
    """Run what is not done yet; returns whether all of it went well."""
    train, *others = steps
    state = Run(folder)
    begun = state.begun or state.masked.begun
    todo = [] if state.begun and state.results["finished"] else [train + ["--resume"] * begun]
    todo += [s for s in others if not ("calibrate.py" in s and not todo and "" in state.calibrated())]
    for command in todo:
        print(f"$ python {shlex.join(command)}", file=sys.stderr, flush=True)
        with open(folder.parent / f"{folder.name}.log", "a", encoding="utf-8") as log:
            argv = [sys.executable, SCRIPTS / command[0], *command[1:]]
            code = subprocess.run(argv, stdout=log, stderr=subprocess.STDOUT).returncode
        if code:
            say(f"note: exit code {code}, see {log.name}; the next row follows")
            return False
    return True


COLUMNS = (
    "run | val AUROC | test AUROC | test recall | specificity | accuracy | NIH AUROC | borrowed AUROC | panel"
    " | min"
)


def line(folder):
    """A run as a row of a markdown table; test figures, if any, at the recall-first threshold."""
    run, found = Run(folder), read_figures(folder)
    found |= panel(found) if {"NIH AUROC", "corrupted spec"} <= found.keys() else {}
    results, test = run.results, [""] * 4
    auroc = results["history"][results["best_epoch"] - 1].get("val_auroc")  # none of an autoencoder
    cells = [folder.name, "" if auroc is None else f"{auroc:.3f}"]
    if "" in run.calibrated():
        first = next(iter(run.calibration()["findings"].values()))["test"]["at_rec"]
        names = ("auroc", "recall", "specificity")
        test = ["{:.3f} [{:.3f}, {:.3f}]".format(first[k], *reported_interval(first, k)) for k in names]
        test.append(f"{first['acc']:.3f}")
    more = [f"{found[k]:.3f}" if k in found else "" for k in ("NIH AUROC", "borrowed AUROC", "panel")]
    more[2] += " (veto)" if found.get("veto") == "yes" else ""
    return f"| {' | '.join([*cells, *test, *more])} | {results['minutes']:.1f} |"


def parse():
    """The command line; what follows -- is left as a list in `more`."""
    parser = Parser(__doc__)
    parser.add_argument("parts", nargs="+", choices=tuple(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--data-dir", default="Data/chest_xray", metavar="DIR", help="the images")
    parser.add_argument("--weights-dir", default="weights", metavar="DIR", help="where the weights lie")
    parser.add_argument("--nih", metavar="DIR", help="another hospital, for studies/experiments.py")
    parser.add_argument(
        "--corruptions", action=argparse.BooleanOptionalAction, default=False, help="there, too"
    )
    parser.add_argument("--out", default="outputs/matrix", metavar="DIR", help="where the run folders go")
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="a regular expression for names of rows"
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="of the rows' seeds, these alone")
    parser.add_argument("--dry-run", action="store_true", help="print the commands alone")
    mine, more = sys.argv[1:], []
    if "--" in mine:
        mine, more = mine[: mine.index("--")], mine[mine.index("--") + 1 :]
    args = parser.parse_args(mine)
    args.more = more
    try:
        re.compile(args.only)
    except re.error as error:
        raise InputError(f"--only {args.only}: no regular expression ({error})") from None
    return args


def main():
    args = parse()
    rows = {}
    for row in (row for part in args.parts for row in PARTS[part]()):
        if re.search(args.only, row.name):
            rows.setdefault(row.name, row)  # of two parts with the same row the first is meant
    chosen = [step for row in rows.values() for step in commands(row, args)]
    if not chosen:
        raise InputError(f"no row of {', '.join(args.parts)} is left by --only, --seeds and --nih")
    done = []
    for folder, steps in chosen:
        if args.dry_run:
            print("\n".join(f"python {shlex.join(step)}" for step in steps))
            continue
        folder.parent.mkdir(parents=True, exist_ok=True)
        done += [folder] if carry_out(folder, steps) else []
    if done:
        print(f"| {COLUMNS} |\n| --- |{' ---: |' * COLUMNS.count('|')}")
        print("\n".join(map(line, done)))


if __name__ == "__main__":
    start(main)
