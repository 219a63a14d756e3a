"""A small set of drawn radiographs, for --demo and for tests."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from common.console import InputError, say
from common.task import CLASSES

SYNTHETIC_DIR = "Data/synthetic"
SYNTHETIC_PX = 96  # side of a model's input: small, so that the first command ends soon on any machine


def make_synthetic(root, train=480, test=120, seed=0):
    """Draw a set of radiograph-like JPEGs under `root` (once; a complete set is kept).

    Ribs, two lungs and a heart; the sick get haze and cloudy opacities in the lungs. The test half is darker,
    flatter and framed wider, so that validation and test disagree as they do on real data. Three in eight
    are NORMAL; patients have one to three images.
    """
    root = Path(root)
    settings = {"train": train, "test": test, "seed": seed, "version": 2}
    marker = root / "SYNTHETIC"
    if marker.exists() and marker.read_text() == json.dumps(settings):
        return
    if root.exists() and any(root.iterdir()) and not marker.exists():
        raise InputError(f"{root} exists and was not drawn by --demo: move it away")
    say(f"drawing {train + test} synthetic radiographs in {root}")
    tmp = root.with_name(f".{root.name}.{os.getpid()}.tmp")
    rng = np.random.default_rng(seed)
    try:
        for split, total in (("train", train), ("test", test)):
            for label, name in enumerate(CLASSES):
                folder = tmp / split / name
                folder.mkdir(parents=True)
                count = round(total * (3 / 8, 5 / 8)[label])
                made, patient = 0, 0
                while made < count:
                    patient += 1
                    for k in range(min(int(rng.choice([1, 1, 1, 2, 3])), count - made)):
                        made += 1
                        file = (
                            f"person{patient}_{('bacteria', 'virus')[patient % 2]}_{made}.jpeg"
                            if label
                            else f"IM-{patient:04d}-{k + 1:04d}.jpeg"
                        )
                        pixels = draw_radiograph(rng, sick=bool(label), shifted=split == "test")
                        Image.fromarray(pixels).save(folder / file, quality=90)
        (tmp / "SYNTHETIC").write_text(json.dumps(settings))
        if root.exists():
            shutil.rmtree(root)
        tmp.rename(root)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def draw_radiograph(rng, sick=False, shifted=False, side=256):
    """One drawn chest, uint8 [side, side]; bright = dense, as on a radiograph."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    zoom_mean, contrast_mean, brightness_mean = 1.0, 1.0, 0.0
    if shifted:  # framed wider, flatter and darker
        zoom_mean, contrast_mean, brightness_mean = 1.12, 0.85, -0.07
    zoom = rng.normal(zoom_mean, 0.05)
    x, y = (x - rng.normal(0, 0.04)) * zoom, (y - rng.normal(0, 0.04)) * zoom

    def blob(cx, cy, rx, ry, soft):
        d = np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2)
        return 1 / (1 + np.exp((d - 1) / soft))

    body = blob(0, 0.1, 0.95, 1.3, 0.05)
    lungs = np.maximum(blob(-0.42, 0, 0.3, 0.62, 0.06), blob(0.42, 0, 0.28, 0.6, 0.06))
    wave = np.cos(2 * np.pi * (5.5 * (y - 0.35 * x**2) + rng.uniform()))
    image = 0.62 * body - 0.4 * lungs + 0.07 * lungs * np.clip(wave, 0, 1) ** 2
    image += 0.3 * blob(0, 0, 0.09, 1.2, 0.2) + 0.28 * blob(0.16, 0.3, 0.3, 0.3, 0.08)
    if sick:
        image += rng.uniform(0.0, 0.13) * lungs  # haze over both lungs
        for _ in range(rng.integers(1, 4)):
            cx = rng.choice([-1, 1]) * rng.uniform(0.3, 0.5)
            cloud = blob(cx, rng.uniform(-0.3, 0.4), rng.uniform(0.15, 0.3), rng.uniform(0.15, 0.35), 0.35)
            image += rng.uniform(0.1, 0.3) * cloud * lungs
    coarse = Image.fromarray(rng.normal(0, 1, (16, 16)).astype(np.float32))
    image += 0.02 * np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
    contrast, brightness = rng.normal(contrast_mean, 0.06), rng.normal(brightness_mean, 0.04)
    image = (image - 0.4) * contrast + 0.4 + brightness
    image += rng.normal(0, 0.02, image.shape)
    return (image.clip(0, 1) * 255).astype(np.uint8)
