"""Files as flat dictionaries of leaves, {where: number, text or array}, and how far apart two of them are."""

import csv
import hashlib
import io
import json
import math
import os

import numpy as np
import torch
from PIL import Image

from common.task import Task
from records import schema

# What differs between two calls of one version, or names a place. The key of kept scores is a hash of those.
# The hash of a checkpoint depends on the name of a temporary file, which torch.save writes into it.
IGNORED = set(
    "date time seconds minutes head_seconds duration version versions path command commit git device run key "
    "checkpoint".split()
)


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


def in_present_form(calibration, results):
    """A calibration.json as this version reads it, whichever version wrote it: its form has changed, its
    figures may not."""
    settings = json.loads(results.read_text())["data"]
    task = Task(tuple(settings["classes"]), "sigmoid" if settings.get("labels") else "softmax")
    return schema.in_present_form(calibration, task)


def of_file(path, name):
    """The leaves of one file; none of a kind of file that is not compared."""
    if path.suffix == ".json":
        value = json.loads(path.read_text())
        if path.name.startswith("calibration"):
            value = in_present_form(value, path.with_name("results.json"))
        return flat(value, name)
    if path.suffix == ".csv":
        return of_table(path.read_text(), name)
    if path.suffix == ".png":
        with Image.open(path) as image:
            return {f"{name} pixels": hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {f"{name} {key}": arrays[key] for key in arrays.files if key not in IGNORED}
    return {}


def of_checkpoint(path):
    """Every tensor of a state dict, and its dtype."""
    leaves = {}
    for key, tensor in torch.load(path, map_location="cpu", weights_only=True).items():
        leaves[f"{path.name} {key}"] = tensor.double().numpy()  # exact, and numpy knows no bfloat16
        leaves[f"{path.name} {key} dtype"] = str(tensor.dtype)
    return leaves


def of_folder(folder):
    """The leaves of all files below it, but for those that training left there."""
    leaves = {}
    for path in sorted(folder.rglob("*")):
        if path.name != "results.json":
            leaves |= of_file(path, str(path.relative_to(folder)))
    return leaves


def apart(old, new):
    """(how far apart two leaves are: 0 where they are the same, inf where they cannot be compared; how many
    values the first one holds)."""
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
            first.append(f"{path}: {excerpts(old[path], new[path])}")
    others = f" (and {len(first) - 1} more)" if len(first) > 1 else ""
    return values, largest, first[0] + others if first else "same"


def excerpts(old, new):
    """OLD's leaf -> NEW's, for a cell of a table; two texts from a little before where they part."""
    start = 0
    if isinstance(old, str) and isinstance(new, str):
        start = max(0, len(os.path.commonprefix([old, new])) - 20)
    return f"{short(old, start)} -> {short(new, start)}"


def short(value, start):
    """At most 60 characters of a leaf, without what would end a cell."""
    text = f"array {value.shape}" if isinstance(value, np.ndarray) and value.size > 1 else str(value)
    return text[start:][:60].replace("|", "/")
