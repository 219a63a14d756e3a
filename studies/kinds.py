"""The kinds of run that studies/pins.py holds two versions against each other on.

Commands are written as SCRIPT FLAG... and called in OUT/old or OUT/new-NAME. {run} is the run's copy there,
{log} is what predict.py printed, with diagnoses."""

from typing import NamedTuple

TRAIN = "--img-size 32 --batch-size 16 --seed 1 --cache-dir cache --device cpu"
TWO, THREE = "--data-dir ../images/two", "--data-dir ../images/three"
TABLE = "--data-dir ../images/table --labels labels.csv --fractions 0.6 0.2 0.2"
CALIBRATE = "calibrate --run {run} --min-recall 0.8 --bootstrap 100 --cache-dir cache --device cpu"
PREDICT = "predict ../images/two/test --run {run} --keep batch --device cpu"
EXPLAIN = "explain --run {run} --tests 4 --cache-dir cache --device cpu"
USUAL = (CALIBRATE, PREDICT)


class Kind(NamedTuple):
    """A run: its training command ("": none of its own), what is done with it then, and the kind that it is a
    copy of, or needs first.

    reread: NEW also scores with what OLD calibrated; deleted: it uses an option that a newer version may have
    deleted."""

    train: str = ""
    then: tuple = USUAL
    copy_of: str = ""
    needs: tuple = ()
    reread: bool = False
    deleted: bool = False


LABELS = "--recipe paper --patch-drop 0.5 --ema 0.99"  # older versions have no masked epochs first
SCRATCH = f"train_scratch {TWO} {TRAIN} {LABELS} --epochs 3"
MORE = "--loss focal --mixup 0.2 --cutmix 0.2 --randaugment 2,9 --balance undersample --watch accuracy"
KINDS = {
    "scratch": Kind(SCRATCH, (*USUAL, EXPLAIN), reread=True),
    "pretrained": Kind(
        f"train_pretrained {TWO} {TRAIN} --epochs 3 --freeze-epochs 2 --weights ../images/tiny.npz --lr 1e-3"
    ),
    "cnn": Kind(
        f"train_cnn {TWO} {TRAIN} --epochs 3 --freeze-epochs 2 --model resnet10t --lr 1e-3 --ema 0.9",
        (*USUAL, EXPLAIN),
    ),
    "hybrid": Kind(
        f"train_hybrid {TWO} {TRAIN} --epochs 3 --frozen-epochs 1 --weights ../images/tiny.pth --d-model 32 "
        "--seg-weight 0.5 --attention-weight 0.1",
        (*USUAL, EXPLAIN),
    ),
    "linear": Kind(f"train_linear {TWO} --img-size 32 --cache-dir cache"),
    "mae": Kind(f"pretrain_mae {TWO} {TRAIN} --epochs 3 --also-unlabelled ../images/clinic", ()),
    "init": Kind(f"{SCRATCH} --init trained/mae", needs=("mae",)),
    "lungs": Kind(f"train_lungs {TWO} {TRAIN} --epochs 3 --masks ../images/masks.npz", ()),
    "only lungs": Kind(
        f"{SCRATCH} --input masked-crop --lungs trained/lungs/lung_unet.safetensors",
        (*USUAL, EXPLAIN),
        needs=("lungs",),
    ),
    "taught, two hospitals": Kind(
        f"{SCRATCH} --teacher trained/pretrained --also ../images/clinic --balance sources",
        needs=("pretrained",),
    ),
    "findings": Kind(
        f"train_scratch {TABLE} {TRAIN} {LABELS} --epochs 3",
        (f"{CALIBRATE} --jointly --temperature platt", PREDICT, f"{EXPLAIN} --finding Square"),
        reread=True,
    ),
    "classes": Kind(f"train_scratch {THREE} {TRAIN} {LABELS} --epochs 4 {MORE}"),
    "ensemble": Kind(
        "",
        (
            "calibrate --ensemble runs/scratch runs/pretrained --out {run} --overwrite --min-recall 0.8 "
            "--bootstrap 100 --temperature --cache-dir cache --device cpu",
            PREDICT,
        ),
        needs=("scratch", "pretrained"),
    ),
    "site": Kind(
        "",
        (
            CALIBRATE,
            "calibrate --run {run} --site ../images/clinic --name clinic --report --min-recall 0.8 "
            "--cache-dir cache --device cpu",
            "predict ../images/clinic --run {run} --site clinic --device cpu",
            "monitor --run {run} --site clinic --point guar {log}",
        ),
        copy_of="scratch",
    ),
    "monitor": Kind("", (*USUAL, "monitor --run {run} {log}"), copy_of="scratch"),
    "TTA": Kind(
        "",
        (f"{CALIBRATE} --tta-flip", f"{PREDICT} --tta", "monitor --run {run} --tta {log}"),
        copy_of="pretrained",
        reread=True,
    ),
    "teacher-features": Kind(
        f"{SCRATCH} --teacher trained/pretrained --teacher-features 0.5",
        needs=("pretrained",),
        reread=True,
        deleted=True,
    ),
    "normalise standard": Kind(f"{SCRATCH} --normalise standard", reread=True, deleted=True),
    "normalise equalise": Kind(f"{SCRATCH} --normalise equalise", reread=True, deleted=True),
}


def needed(name):
    """The kinds that are made before this one."""
    kind = KINDS[name]
    return [*kind.needs, *([kind.copy_of] if kind.copy_of else [])]


def with_needs(names):
    """These kinds and those that they need, in the order of KINDS."""
    every = {need for name in names for need in needed(name)} | set(names)
    return [name for name in KINDS if name in every]
