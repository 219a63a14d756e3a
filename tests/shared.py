"""Helpers that several test files share."""

import copy
import csv
import importlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
import torch
from PIL import Image

from common.console import start
from common.task import Task
from images.subset import Subset
from records import onnx
from training import recipe
from training.loss import Supervised
from training.step import Gradient
from vit import VisionTransformer

REPO = Path(__file__).resolve().parent.parent


SHARED = REPO.parent / "shared"


SCRIPTS = ("train_scratch", "train_pretrained", "train_linear", "calibrate", "compare", "predict")


CPU = torch.device("cpu")
WRITES_ONNX = pytest.mark.skipif(not onnx.exports(), reason="torch writes our models from 2.8 on")


def cli(script, *argv, cwd):
    """Run a script's main() in this process, as its command line would -> (code, out, err)."""
    main = importlib.import_module(script).main
    out, err, code = io.StringIO(), io.StringIO(), 0
    old = os.getcwd(), sys.argv
    os.chdir(cwd)
    sys.argv = [f"{script}.py", *map(str, argv)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            start(main)
    except SystemExit as stop:
        code = stop.code
    finally:
        os.chdir(old[0])
        sys.argv = old[1]
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def succeed(script, *argv, cwd):
    """`cli` that must exit with 0."""
    done = cli(script, *argv, cwd=cwd)
    assert done.code == 0, done.err
    return done


def refused(done, *words):
    """Exit code 2 and one error message that contains `words`."""
    assert done.code == 2, done.err
    assert done.err.count("error: ") == 1 and "Traceback" not in done.err
    for word in words:
        assert str(word) in done.err


def popen(*argv, cwd):
    """A real process of this interpreter, stdout piped, stderr in cwd/stderr.txt."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    with open(Path(cwd, "stderr.txt"), "w") as err:
        return subprocess.Popen(
            [sys.executable, *map(str, argv)], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=err, text=True
        )


class Forked:
    """A process as of `popen` that has imported everything already, which takes seconds: a fork of this one
    that runs the script's main(). `about`: of its environment."""

    def __init__(self, script, *argv, cwd, about=()):
        main = importlib.import_module(script).main
        read, write = os.pipe()
        arguments = main, script, argv, cwd, write, about
        self.process = multiprocessing.get_context("fork").Process(target=as_script, args=arguments)
        self.process.start()
        os.close(write)
        self.stdout, self.returncode = os.fdopen(read), None

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def communicate(self, timeout):
        out = self.stdout.read()
        self.process.join(timeout)
        self.stdout.close()
        self.returncode = self.process.exitcode
        return out, None


def as_script(main, script, argv, cwd, write, about=()):
    """Ends this process as the script's would."""
    os.environ |= dict(about)
    os.chdir(cwd)
    sys.argv, code = [f"{script}.py", *map(str, argv)], 0
    sys.stdout, sys.stderr = os.fdopen(write, "w", buffering=1), open("stderr.txt", "w", buffering=1)
    try:
        start(main)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def read_json(*parts):
    return json.loads(Path(*parts).read_text())


def load_pth(*parts):
    return torch.load(Path(*parts), weights_only=True)


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def strip_time(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def small_vit(**changes):
    """A ViT of a few thousand parameters for 16 px images, in eval mode."""
    torch.manual_seed(0)
    settings = dict(
        img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3, drop_rate=0.0, drop_path_rate=0.0
    )
    return VisionTransformer(**{**settings, **changes}).eval()


def randomise(model, seed=0):
    """Give every parameter values that matter (a fresh model's biases are 0 and its attention is flat)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim < 2 else p[0].numel() ** -0.5))
    return model


def google_arrays(dim=12, depth=2, heads=3, patch=4, grid=2, classes=2, hidden=None, seed=0):
    """Random arrays in the layout of Google's checkpoints, all distinct, with outputs of order 1."""
    rng = np.random.default_rng(seed)
    hidden = hidden or 4 * dim

    def draw(*shape, scale=1.0, centre=0.0):
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale) + np.float32(centre)

    w = {
        "cls": draw(1, 1, dim),
        "Transformer/posembed_input/pos_embedding": draw(1, 1 + grid * grid, dim),
        "embedding/kernel": draw(patch, patch, 3, dim, scale=(3 * patch * patch) ** -0.5),
        "embedding/bias": draw(dim),
        "Transformer/encoder_norm/scale": draw(dim, scale=0.2, centre=1),
        "Transformer/encoder_norm/bias": draw(dim),
        "head/kernel": draw(dim, classes, scale=dim**-0.5),
        "head/bias": draw(classes),
    }
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}/"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            w[f"{block}{norm}/scale"] = draw(dim, scale=0.2, centre=1)
            w[f"{block}{norm}/bias"] = draw(dim, scale=0.2)
        attention = f"{block}MultiHeadDotProductAttention_1/"
        for part in ("query", "key", "value"):
            w[f"{attention}{part}/kernel"] = draw(dim, heads, dim // heads, scale=dim**-0.5)
            w[f"{attention}{part}/bias"] = draw(heads, dim // heads, scale=0.2)
        w[f"{attention}out/kernel"] = draw(heads, dim // heads, dim, scale=dim**-0.5)
        w[f"{attention}out/bias"] = draw(dim, scale=0.2)
        w[f"{block}MlpBlock_3/Dense_0/kernel"] = draw(dim, hidden, scale=dim**-0.5)
        w[f"{block}MlpBlock_3/Dense_0/bias"] = draw(hidden, scale=0.2)
        w[f"{block}MlpBlock_3/Dense_1/kernel"] = draw(hidden, dim, scale=hidden**-0.5)
        w[f"{block}MlpBlock_3/Dense_1/bias"] = draw(dim, scale=0.2)
    return w


def vit_for(arrays_settings=None, **changes):
    """A fresh model for `google_arrays()` of the given settings."""
    s = {**dict(dim=12, depth=2, heads=3, patch=4, grid=2, classes=2), **(arrays_settings or {})}
    torch.manual_seed(5)
    return VisionTransformer(
        **{
            **dict(
                img_size=s["grid"] * s["patch"],
                patch_size=s["patch"],
                embed_dim=s["dim"],
                depth=s["depth"],
                num_heads=s["heads"],
                num_classes=s["classes"],
            ),
            **changes,
        }
    ).eval()


class Evil:
    """Unpickling it would create a file: whoever loads it carelessly runs somebody else's code."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def save_dicom(path, pixels, bits=8, photometric="MONOCHROME2", change=None, **tags):
    """Write a DICOM image; `tags` replace what it says, `change` edits the data set last."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.Rows, file.Columns = pixels.shape[:2]
    file.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    file.PixelRepresentation, file.PhotometricInterpretation = 0, photometric
    file.BitsAllocated, file.BitsStored, file.HighBit = 8 * pixels.itemsize, bits, bits - 1
    file.PixelData = pixels.tobytes()
    for key, value in tags.items():
        setattr(file, key, value)
    if change:
        change(file)
    file.save_as(path, enforce_file_format=True)


def touch(root, *names):
    for name in names:
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def smooth_picture(height, width, seed=0):
    """A smooth random grey picture, uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.uniform(0, 255, (12, 12)).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 255).astype(np.uint8)


def picture_batch(count=4, side=32):
    images = np.stack([smooth_picture(side, side, seed) for seed in range(count)])
    return torch.from_numpy(images)[:, None].float() / 255


def toy_subset(count, seed, side=16):
    """Noise images; those of class 1 are brighter."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = (rng.uniform(0, 180, (count, side, side)) + 25 * labels[:, None, None]).astype(np.uint8)
    return Subset([f"{i}.png" for i in range(count)], labels, images, np.arange(count))


def two_class_gradient(inputs, accumulate=1, change=lambda x: x, **fields):
    """A Gradient of two classes; `change`: the augmentation, `fields`: of the Recipe."""
    settings = replace(recipe.Recipe(), accumulate=accumulate, **fields)
    return Gradient(Supervised(Task()), settings, inputs, change)


def copy_set(synthetic, tmp_path):
    return Path(shutil.copytree(synthetic, tmp_path / "set"))


def tables(markdown):
    """The tables of a markdown text, each a list of rows of cells, the rule under the header left out."""
    out, last = [], False
    for line in markdown.splitlines():
        if line.startswith("|"):
            if not last:
                out.append([])
            if not re.fullmatch(r"[|\s:-]+", line):
                out[-1].append([cell.strip() for cell in line.strip().strip("|").split("|")])
        last = line.startswith("|")
    return out


def predict_rows(folder, *argv, code=0):
    """Rows of predict.py's CSV."""
    done = cli("predict", *argv, cwd=folder)
    assert done.code == code, done.err
    columns = "path,p_pneumonia,decision@0.5,decision@Rec,threshold@Rec,typicality,note"
    assert done.out.splitlines()[0] == columns
    return list(csv.DictReader(io.StringIO(done.out)))


def six_digits(values):
    """Numbers as predict.py writes them: six digits, and above 0.999 four of what is missing to 1."""
    places = [math.ceil(-math.log10(1 - value)) + 3 if 0.999 < value < 1 else 0 for value in values]
    return [round(float(v), n) if n else float(f"{v:.6g}") for v, n in zip(values, places)]


def file_list(folder, run):
    with np.load(folder / run / "scores.npz") as file:
        return file["test_files"].tolist()


def tiny_vit(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = VisionTransformer(
        **{**dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3), **kwargs}
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


NONE = dict(rotate=0, translate=0, scale=0, brightness=0, contrast=0, hflip=0)


def folder_bytes(root):
    return {
        p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(Path(root).rglob("*")) if p.is_file()
    }


def tempered(logits, temperature):
    """P(class 1) of softmax(logits / temperature), logits [N, 2] -> float64 [N]."""
    z = np.asarray(logits, dtype=np.float64)
    return scipy.special.expit((z[:, 1] - z[:, 0]) / temperature)


def brute_force_threshold(y, p, min_recall):
    """Every distinct score as threshold, in exact fractions: (precision, recall, threshold), the largest
    wins."""
    candidates = []
    for threshold in set(p):
        called = [a >= threshold for a in p]
        tp = sum(c and t for c, t in zip(called, y))
        recall, precision = Fraction(tp, sum(y)), Fraction(tp, sum(called))
        if float(recall) >= min_recall:
            candidates.append((precision, recall, threshold))
    precision, recall, threshold = max(candidates)
    return threshold, float(recall), float(precision)


def middle_below(threshold, scores):
    """Halfway in logits from a score to the next lower one, or half a unit below it, in plain Python."""

    def logit(p):
        return math.log(p) - math.log1p(-p)

    lower = [float(p) for p in scores if p < threshold]
    middle = (logit(threshold) + logit(max(lower))) / 2 if lower else logit(threshold) - 0.5
    return 1 / (1 + math.exp(-middle))


def full_decode(path, size):
    """Plain PIL at full resolution."""
    with Image.open(path) as image:
        return np.asarray(image.convert("L").resize((size, size), Image.Resampling.BILINEAR)).astype(float)


NAMES = {"scratch": "ViT scratch", "pretrained": "pretrained", "linear": "Logistic regression 32x32 px"}


HEADER = ["Model", "Params (M)", "Time (min)", "Acc", "Prec", "Recall", "Spec", "F1", "AUROC", "Thr"]


LINK = r"!\[.*?\]\(([^()\s]+)\)"


def of_one(calibration):
    """What a calibration says of its only finding."""
    (found,) = calibration["findings"].values()
    return found


def with_changes(calibration, changes):
    """A calibration of one finding, some of it replaced (... deletes): settings, or what is said of it."""
    calibration = copy.deepcopy(calibration)
    for key, value in changes.items():
        place = of_one(calibration) if key in of_one(calibration) else calibration
        if value is ...:
            del place[key]
        else:
            place[key] = value
    return calibration
