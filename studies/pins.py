"""Does this version say of old run folders what an older one says, and does it train the same weights?

    python studies/pins.py --old ../today --new . --out /tmp/pins
    python studies/pins.py --old ../today --new . --out /tmp/pins --only scratch monitor --keep

Draws small images, trains a run of every kind with the OLD checkout, about 30 steps each, and lets OLD and NEW
calibrate, score, explain, watch and tabulate copies of it. Then NEW trains the same runs from the same seed.
Only command lines are used, so the modules of a checkout may lie anywhere.

Prints one markdown table: a row a kind (every number and text in its JSON, CSV and NPZ files, the pixels of its
pictures, what the scripts printed), a row "30 steps" a kind (every tensor of checkpoint.pth and the history), the
options that NEW no longer has, and what NEW says of folders that used one of the deleted options. Exit code 1 if
anything differs. What OLD made stays in OUT/old and is used again, as long as OLD and the commands are the same;
OUT/new is removed at the end, unless --keep is given. Both sides must run on the same processor.

Two processes at a time, one thread each. On two slow CPU cores without AVX512-BF16: TIME.
"""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

SCRIPTS = (
    "train_scratch train_pretrained train_cnn train_hybrid train_linear pretrain_mae train_lungs calibrate compare "
    "predict explain monitor"
).split()
# What differs between two calls of one version, or names a place; the key of kept scores is a hash of such things.
IGNORED = set(
    "date time seconds minutes head_seconds duration version versions path command commit git device run key".split()
)
SIDE = 64  # px of a drawn image; models see 32
TRAIN = "--img-size 32 --batch-size 16 --seed 1 --cache-dir cache --device cpu"
TWO, TABLE, THREE = (
    "--data-dir ../images/two",
    "--data-dir ../images/table --labels labels.csv",
    "--data-dir ../images/three",
)
HELD_OUT = "--fractions 0.6 0.2 0.2"
CALIBRATE = "calibrate --run {run} --min-recall 0.8 --bootstrap 100 --cache-dir cache --device cpu"
PREDICT = "predict ../images/two/test --run {run} --keep batch --device cpu"
EXPLAIN = "explain --run {run} --tests 6 --cache-dir cache --device cpu"
USUAL = (CALIBRATE, PREDICT)


class Kind(NamedTuple):
    """A run: its training command ("": none of its own), what is done with it then, and the kind that it is a
    copy of, or needs first.

    pictured: explain.py is part of it; reread: NEW also scores with what OLD calibrated; deleted: it uses an
    option that a newer version may have deleted."""

    train: str = ""
    then: tuple = USUAL
    copy_of: str = ""
    needs: tuple = ()
    reread: bool = False
    deleted: bool = False


SCRATCH = f"train_scratch {TWO} {TRAIN} --epochs 3"
MORE = "--loss focal --mixup 0.2 --cutmix 0.2 --randaugment 2,9 --balance undersample --watch accuracy"
KINDS = {
    "scratch": Kind(SCRATCH, (*USUAL, EXPLAIN), reread=True),
    "pretrained": Kind(
        f"train_pretrained {TWO} {TRAIN} --epochs 3 --freeze-epochs 2 --weights ../images/tiny.npz --lr 1e-3",
        (*USUAL, EXPLAIN),
    ),
    "cnn": Kind(
        f"train_cnn {TWO} {TRAIN} --epochs 3 --freeze-epochs 2 --model resnet10t --lr 1e-3 --ema 0.9",
        (*USUAL, EXPLAIN),
    ),
    "hybrid": Kind(
        f"train_hybrid {TWO} {TRAIN} --epochs 3 --frozen-epochs 1 --weights ../images/tiny.pth --d-model 32 "
        "--seg-weight 0.5 --attention-weight 0.1 --lungs ../images/masks.npz",
        USUAL,
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
        f"train_scratch {TABLE} {HELD_OUT} {TRAIN} --epochs 3",
        (f"{CALIBRATE} --jointly --temperature platt", PREDICT, f"{EXPLAIN} --finding Square"),
        reread=True,
    ),
    "classes": Kind(f"train_scratch {THREE} {TRAIN} --epochs 4 {MORE}", (CALIBRATE, PREDICT, EXPLAIN)),
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
            "calibrate --run {run} --site ../images/clinic --name clinic --report --min-recall 0.8 --cache-dir cache "
            "--device cpu",
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
    "--teacher-features": Kind(
        f"{SCRATCH} --teacher trained/pretrained --teacher-features 0.5",
        needs=("pretrained",),
        reread=True,
        deleted=True,
    ),
    "--normalise standard": Kind(f"{SCRATCH} --normalise standard", reread=True, deleted=True),
    "--normalise equalise": Kind(f"{SCRATCH} --normalise equalise", reread=True, deleted=True),
}


# ---------------------------------------------------------------- images and weights


def chest(rng, disc, square):
    """(a drawn chest, float [SIDE, SIDE] in 0 to 1; its lungs, bool): a bright disc in the left lung, a square in
    the right one, or neither. The marks vary in strength, so that no model is perfect."""
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    x, y = x - rng.normal(0, 0.05), y - rng.normal(0, 0.05)
    lungs = np.minimum(((x + 0.42) / 0.3) ** 2, ((x - 0.42) / 0.3) ** 2) + (y / 0.65) ** 2 < 1
    grey = 0.6 - 0.35 * lungs + rng.normal(0, 0.06, lungs.shape)
    grey += disc * rng.uniform(0, 0.35) * ((x + 0.42) ** 2 + (y - 0.1) ** 2 < 0.04)
    grey += square * rng.uniform(0, 0.35) * ((abs(x - 0.42) < 0.18) & (abs(y + 0.1) < 0.18))
    return grey.clip(0, 1), lungs


def save(path, grey, bits=8):
    """A PNG of 8 or 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {8: np.uint8, 16: np.uint16}[bits]
    Image.fromarray((grey * np.iinfo(kind).max).astype(kind)).save(path)


def draw_classes(root, rng, classes, counts, bits=8):
    """{split: count} images of each {class: (disc, square)}, named as Kermany's, one to three of a patient ->
    ([name], [lungs])."""
    names, lungs = [], []
    for split, count in counts.items():
        for label, marks in classes.items():
            for i in range(count):
                patient = i - i % int(rng.integers(1, 4))
                name = f"person{patient}_bacteria_{i}.png"
                if label == "NORMAL":
                    name = f"IM-{patient:04d}-{i:04d}.png"
                grey, mask = chest(rng, *marks)
                names.append(str(Path(split, label, name)))
                lungs.append(mask)
                save(root / names[-1], grey, bits)
    return names, lungs


def draw_table(root, rng, count=150):
    """Images with any of two findings, some unknown, and labels.csv."""
    rows = ["path,patient,No Finding,Disc,Square"]
    for i in range(count):
        disc, square = rng.random(2) < 0.45
        save(root / f"images/{i:03d}.png", chest(rng, disc, square)[0])
        asked = "" if i % 9 == 0 else int(square)
        rows.append(f"images/{i:03d}.png,{i // 2},{int(not (disc or square))},{int(disc)},{asked}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")


def timm_vit(rng, width=64, depth=2, patch=8, grid=4):
    """Random weights of a small ViT under timm's names, float32."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid * grid, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for i in range(depth):
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            shapes |= {f"blocks.{i}.{name}.weight": (rows, columns), f"blocks.{i}.{name}.bias": (rows,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (width,), f"blocks.{i}.{name}.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"head.weight": (2, width), "head.bias": (2,)}
    state = {}
    for name, shape in shapes.items():
        scale = 0.1 if len(shape) < 2 else math.prod(shape[1:]) ** -0.5
        centre = 1 if re.search(r"norm\d?\.weight", name) else 0
        state[name] = torch.from_numpy(rng.normal(centre, scale, shape).astype(np.float32))
    return state


def google_vit(rng, width=32, depth=2, heads=2, patch=8, grid=4):
    """The same under Google's names, as an .npz holds them."""
    shapes = {
        "cls": (1, 1, width),
        "Transformer/posembed_input/pos_embedding": (1, 1 + grid * grid, width),
        "embedding/kernel": (patch, patch, 3, width),
        "embedding/bias": (width,),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (width, 2),
        "head/bias": (2,),
    }
    each = width // heads
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}/{norm}/scale": (width,), f"{block}/{norm}/bias": (width,)}
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            shapes |= {
                f"{attention}/{part}/kernel": (width, heads, each),
                f"{attention}/{part}/bias": (heads, each),
            }
        shapes |= {f"{attention}/out/kernel": (heads, each, width), f"{attention}/out/bias": (width,)}
        for part, ins, outs in (("Dense_0", width, 4 * width), ("Dense_1", 4 * width, width)):
            shapes |= {
                f"{block}/MlpBlock_3/{part}/kernel": (ins, outs),
                f"{block}/MlpBlock_3/{part}/bias": (outs,),
            }
    return {
        name: rng.normal(float(name.endswith("scale")), 0.15, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def draw(root):
    """Everything that is trained on or scored, under `root`, the same in every call."""
    if (root / "drawn").exists():
        return
    shutil.rmtree(root, ignore_errors=True)
    rng = np.random.default_rng(0)
    two = {"NORMAL": (False, False), "PNEUMONIA": (True, False)}
    names, lungs = draw_classes(root / "two", rng, two, {"train": 100, "test": 30})
    masks = np.packbits(np.stack(lungs), axis=-1)
    np.savez(root / "masks.npz", masks=masks, names=np.array(names))
    draw_classes(root / "clinic", rng, two, {"": 40}, bits=16)
    three = {"NORMAL": (False, False), "DISC": (True, False), "SQUARE": (False, True)}
    draw_classes(root / "three", rng, three, {"train": 50, "test": 15})
    draw_table(root / "table", rng)
    np.savez(root / "tiny.npz", **google_vit(rng))
    torch.save(timm_vit(rng), root / "tiny.pth")
    (root / "drawn").write_text("")


# ---------------------------------------------------------------- commands


class Side(NamedTuple):
    """A checkout, and the folder that its commands are called in: trained/, runs/ and what was printed, done/."""

    checkout: Path
    folder: Path


def slug(name):
    """The name of a kind's folder."""
    return re.sub(r"\W+", "-", name).strip("-")


def identity(checkout):
    """The commit of a checkout, with a mark if it was changed since; its path where git knows none."""
    git = ["git", "-C", str(checkout)]
    found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if found.returncode:
        return str(checkout)
    changed = subprocess.run([*git, "diff", "HEAD"], capture_output=True).stdout
    return f"{found.stdout.strip()} {hashlib.sha256(changed).hexdigest()[:8] if changed else ''}".strip()


def call(side, record, words):
    """Carry out SCRIPT FLAG... of this side's checkout; exit code and stderr go to done/RECORD.json, stdout beside
    it -> {words, code, out, err}."""
    script, *flags = words
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    argv = [sys.executable, str(side.checkout / f"{script}.py"), *flags]
    done = subprocess.run(argv, cwd=side.folder, env=environment, capture_output=True, text=True)
    found = {"words": words, "code": done.returncode, "out": done.stdout, "err": done.stderr}
    path = side.folder / "done" / f"{record}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1))
    return found


def write_log(side, name, printed):
    """What predict.py printed as a log for monitor.py: with the diagnosis that the folder of each image tells ->
    its path from the side's folder."""
    rows = list(csv.DictReader(io.StringIO(printed)))
    path = Path("logs", f"{slug(name)}.csv")
    (side.folder / "logs").mkdir(exist_ok=True)
    with open(side.folder / path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "diagnosis"])
        writer.writeheader()
        writer.writerows({**row, "diagnosis": Path(row["path"]).parent.name} for row in rows)
    return str(path)


def carry_out(side, name, old, strict):
    """Train a kind, copy what OLD trained, and do with the copy what the kind asks. strict: a command that fails
    ends the study."""
    kind, place, printed = KINDS[name], slug(name), ""
    print(f"{side.folder.name}: {name}", file=sys.stderr, flush=True)
    for part in ("trained", "runs", "done"):
        shutil.rmtree(side.folder / part / place, ignore_errors=True)
    todo = [(f"{place}/{i}", command) for i, command in enumerate(kind.then, 1)]
    if kind.train and not (kind.deleted and side != old):
        todo.insert(0, (f"{place}/0", f"{kind.train} --out trained/{place}"))
    if kind.reread and side != old:
        predict = next(command for command in kind.then if command.startswith("predict"))
        command = predict.replace("--keep batch ", "").replace("{run}", f"../old/runs/{place}")
        todo.append((f"{place}/reread", command))
    for record, command in todo:
        source = old.folder / "trained" / slug(kind.copy_of or name)
        copy = side.folder / "runs" / place
        if not record.endswith("/0") and source.exists() and not copy.exists():
            shutil.copytree(source, copy)
        log = write_log(side, name, printed) if "{log}" in command and printed else "none.csv"
        words = [word.format(run=f"runs/{place}", log=log) for word in command.split()]
        found = call(side, record, words)
        if strict and found["code"] not in (0, 3):  # 3: monitor.py refuted a floor
            raise SystemExit(f"OLD fails: {' '.join(words)}\n{found['err']}")
        if words[0] == "predict":
            printed = found["out"]


def plan(name, version):
    """What the folders of a kind depend on, as text: if it is still the same, they need not be made again."""
    kind = KINDS[name]
    return json.dumps([version, *kind, *(plan(need, version) for need in needed(name))])


def needed(name):
    """The kinds that are made before this one."""
    kind = KINDS[name]
    return [*kind.needs, *([kind.copy_of] if kind.copy_of else [])]


def make(side, names, old, version=None):
    """`carry_out` for these kinds, two at a time, first those that need no other one. version: OLD's; what it has
    made already is kept."""
    for wave in (False, True):
        todo = [name for name in names if bool(needed(name)) == wave]
        if version:
            todo = [name for name in todo if not is_made(side, name, version)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda name: carry_out(side, name, old, bool(version)), todo))
        for name in todo if version else ():
            (side.folder / "done" / slug(name) / "plan").write_text(plan(name, version))


def is_made(side, name, version):
    """Whether this side has finished a kind in an earlier call."""
    path = side.folder / "done" / slug(name) / "plan"
    return path.exists() and path.read_text() == plan(name, version)


# ---------------------------------------------------------------- what is compared


def flat(value, path):
    """The leaves of what JSON holds, {path: number, text or None}, without what is IGNORED."""
    if isinstance(value, dict):
        items = [(key, part) for key, part in value.items() if key not in IGNORED]
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return {path: value}
    leaves = {}
    for key, part in items:
        leaves |= flat(part, f"{path}.{key}")
    return leaves


def of_table(text, path):
    """The cells of a CSV, as numbers where they are some."""
    leaves = {}
    for i, row in enumerate(csv.reader(io.StringIO(text))):
        for j, cell in enumerate(row):
            try:
                leaves[f"{path} row {i} column {j}"] = float(cell)
            except ValueError:
                leaves[f"{path} row {i} column {j}"] = cell
    return leaves


def of_file(path, name):
    """The leaves of one file; none of a kind of file that is not compared."""
    if path.suffix == ".json":
        return flat(json.loads(path.read_text()), name)
    if path.suffix == ".csv":
        return of_table(path.read_text(), name)
    if path.suffix == ".png":
        with Image.open(path) as image:
            return {f"{name} pixels": hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {f"{name} {key}": arrays[key] for key in arrays.files if key not in IGNORED}
    return {}


def of_folder(folder):
    """The leaves of all files below it, but for those that training left there."""
    leaves = {}
    for path in sorted(folder.rglob("*")):
        if path.name != "results.json":
            leaves |= of_file(path, str(path.relative_to(folder)))
    return leaves


def of_record(found, name):
    """The leaves of a carried out command: its exit code, and what it printed."""
    leaves = {f"{name} exit code": found["code"]}
    script = found["words"][0]
    if script == "predict":
        return leaves | of_table(found["out"], f"{name} printed")
    if script in ("monitor", "compare"):
        return leaves | {f"{name} line {i}": line for i, line in enumerate(found["out"].splitlines(), 1)}
    return leaves


def records(side, name):
    """{its place in the chain: a carried out command} of a kind."""
    paths = sorted((side.folder / "done" / slug(name)).glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def of_kind(side, name):
    """The leaves of all that was done with the copy of a run."""
    leaves, commands = of_folder(side.folder / "runs" / slug(name)), records(side, name)
    commands.pop("0", None)
    if KINDS[name].reread and "reread" not in commands:  # OLD: what it printed itself
        commands["reread"] = next(found for found in commands.values() if found["words"][0] == "predict")
    for place, found in commands.items():
        which = f"{found['words'][0]}.py"
        leaves |= of_record(
            found, f"{which} on OLD's calibration" if place == "reread" else f"{place} {which}"
        )
    return leaves


def apart(old, new):
    """(how far apart two leaves are: 0 where they are the same, inf where they cannot be compared; how many values
    the first one holds)"""
    old, new = np.asarray(old), np.asarray(new)
    numbers = old.dtype.kind in "biuf" and new.dtype.kind in "biuf"
    if old.shape != new.shape:
        return math.inf, old.size
    if not numbers:
        return (0 if np.array_equal(old, new) else math.inf), old.size
    old, new = old.astype(np.float64), new.astype(np.float64)
    same = (old == new) | (np.isnan(old) & np.isnan(new))
    distances = np.where(same, 0, np.abs(old - new))
    return float(np.nan_to_num(distances, nan=math.inf).max(initial=0)), old.size


def compared(old, new):
    """Two dictionaries of leaves -> (values, largest difference, "same" or the first path that differs)."""
    values, largest, first = 0, 0.0, []
    for path in [*old, *(path for path in new if path not in old)]:
        if path not in old or path not in new:
            side = "OLD" if path in old else "NEW"
            first.append(f"{path}: only in {side}")
            largest = math.inf
            continue
        distance, size = apart(old[path], new[path])
        values, largest = values + size, max(largest, distance)
        if distance:
            first.append(f"{path}: {short(old[path])} -> {short(new[path])}")
    others = f" (and {len(first) - 1} more)" if len(first) > 1 else ""
    return values, largest, first[0] + others if first else "same"


def short(value):
    """A leaf in a cell of a table."""
    text = f"array {value.shape}" if isinstance(value, np.ndarray) and value.size > 1 else str(value)
    return text.replace("|", "/")[:60]


def of_training(side, name):
    """The leaves of a trained run: every tensor of its checkpoint, the history and what was chosen by it."""
    folder = side.folder / "trained" / slug(name)
    if not (folder / "results.json").exists():
        return {"trained": False}
    results = json.loads((folder / "results.json").read_text())
    kept = {key: results.get(key) for key in ("history", "best_epoch", "split", "mean", "std", "finished")}
    state = torch.load(folder / "checkpoint.pth", map_location="cpu", weights_only=True)
    leaves = {"trained": True, **flat(kept, "results.json")}
    return leaves | {f"checkpoint.pth {key}": tensor.double().numpy() for key, tensor in state.items()}


def refusal(side, name):
    """How NEW declines folders that used a deleted option: "refused: ..." where every command ended with exit code
    2 and one line on stderr that names a version; None if any of them went well; otherwise what is wrong with it."""
    wrong, said = [], ""
    for place, found in records(side, name).items():
        if found["code"] == 0:
            return None
        lines = found["err"].strip().splitlines()
        if found["code"] != 2 or len(lines) != 1 or "Traceback" in found["err"]:
            wrong.append(
                f"{place} {found['words'][0]}.py: exit code {found['code']}, {len(lines)} lines on stderr"
            )
        said = lines[-1] if lines else ""
    if not wrong and not re.search(r"version|commit|\b[0-9a-f]{7,40}\b", said):
        wrong.append(f"names no version: {said}")
    return wrong[0] if wrong else f"refused: {said}"


def options(side):
    """{SCRIPT.py --flag, or SCRIPT.py --flag value for those of a list} of all scripts, from their --help."""
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda script: call(side, f"help/{script}", [script, "--help"]), SCRIPTS))
    names = set()
    for script, done in zip(SCRIPTS, found):
        text = re.sub(r"\s+", " ", done["out"])
        names |= {f"{script}.py {flag}" for flag in re.findall(r"^  (--[\w-]+)", done["out"], re.MULTILINE)}
        for flag, choices in re.findall(r"(--[\w-]+) \{([^}]*)\}", text):
            names |= {f"{script}.py {flag} {choice}" for choice in choices.split(",")}
    return names


def reports(old, new, names):
    """The leaves of compare.py on OLD's runs and on NEW's, and of NEW's compare.py on OLD's runs."""
    runs = [
        f"runs/{slug(n)}" for n in names if KINDS[n].then and not KINDS[n].copy_of and not KINDS[n].deleted
    ]
    found = []
    for side, where in ((old, ""), (new, ""), (new, "../old/")):
        words = [
            "compare",
            "--figures",
            "figures",
            "--csv",
            "report.csv",
            "--run",
            *(where + run for run in runs),
        ]
        shutil.rmtree(side.folder / "figures", ignore_errors=True)
        leaves = of_record(call(side, f"compare{len(found)}", words), "compare.py")
        if (side.folder / "report.csv").exists():
            leaves |= of_file(side.folder / "report.csv", "report.csv")
        found.append(leaves | of_folder(side.folder / "figures"))
    return found


# ---------------------------------------------------------------- the table


def what(name):
    """What was done with a kind, in words."""
    steps = [command.split()[0] for command in KINDS[name].then]
    return ", ".join([*steps, *(["predict on OLD's calibration"] if KINDS[name].reread else [])])


def rows(old, new, names):
    """[(kind, compared, values, largest difference, result)]"""
    for name in names:
        if KINDS[name].then:
            said = refusal(new, name) if KINDS[name].deleted else None
            yield (
                name,
                what(name),
                *((0, 0.0, said) if said else compared(of_kind(old, name), of_kind(new, name))),
            )
    reported, again, reread = reports(old, new, names)
    yield "all", "compare", *compared(reported, again)
    yield "all", "compare on OLD's calibrations", *compared(reported, reread)
    for name in names:
        if KINDS[name].train and not KINDS[name].deleted:
            leaves = of_training(old, name), of_training(new, name)
            yield f"30 steps: {name}", "checkpoint.pth, history", *compared(*leaves)


def with_needs(names):
    """These kinds and those that they need, in the order of KINDS."""
    every = {need for name in names for need in needed(name)} | set(names)
    return [name for name in KINDS if name in every]


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", required=True, type=Path, metavar="CHECKOUT", help="makes the run folders")
    parser.add_argument(
        "--new", required=True, type=Path, metavar="CHECKOUT", help="must say the same of them"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where everything is made")
    parser.add_argument("--only", nargs="+", choices=tuple(KINDS), default=list(KINDS), metavar="KIND")
    parser.add_argument("--keep", action="store_true", help="keep FOLDER/new")
    args = parser.parse_args()
    for flag in ("old", "new"):
        if not (getattr(args, flag) / "calibrate.py").exists():
            parser.error(f"--{flag} {getattr(args, flag)} holds no calibrate.py: name a checkout")
    return args


def main():
    args, began = parse(), time.time()
    names = with_needs(args.only)
    old, new = Side(args.old.resolve(), args.out / "old"), Side(args.new.resolve(), args.out / "new")
    shutil.rmtree(new.folder, ignore_errors=True)
    for side in (old, new):
        side.folder.mkdir(parents=True, exist_ok=True)
    draw(args.out / "images")
    make(old, names, old, version=identity(old.checkout))
    make(new, names, old)
    print(f"OLD {identity(old.checkout)}, NEW {identity(new.checkout)}\n")
    print("| kind | compared | values | largest difference | result |\n| --- | --- | --- | --- | --- |")
    failed = False
    for kind, steps, values, largest, result in rows(old, new, names):
        failed |= result != "same" and not result.startswith("refused: ")
        print(f"| {kind} | {steps} | {values:,} | {largest:.3g} | {result} |", flush=True)
    before, after = options(old), options(new)
    print(f"\nNo longer options: {', '.join(sorted(before - after)) or 'none'}")
    print(f"New options: {', '.join(sorted(after - before)) or 'none'}")
    print(f"{(time.time() - began) / 60:.1f} minutes", file=sys.stderr)
    if not args.keep:
        shutil.rmtree(new.folder)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
