"""Fixtures shared by all test files, and what every test process needs set. Loaded by conftest.py."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(tempfile.gettempdir(), "hypothesis")))

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import settings
from matplotlib.figure import Figure
from PIL import Image

from common import device as device_module

# Before another module takes its name: what a test computes must not depend on the processor that it runs on.
detect_bf16, device_module.fast_bf16 = device_module.fast_bf16, lambda device: False

import data
from images.drawn import make_synthetic
from tests.shared import cli, google_arrays, succeed

draw_figure = Figure.savefig


def draw_nothing(self, path, **settings):
    """Figure.savefig, but a picture of the report is one grey pixel: to draw its seven takes five seconds,
    and nearly a hundred tests make a report. Those that look at pictures ask for `pictures_drawn`."""
    if Path(path).parent.name != "figures":
        return draw_figure(self, path, **settings)
    Image.new("L", (1, 1)).save(path, format="png")


Figure.savefig = draw_nothing
torch.set_num_threads(1)  # tiny models: more threads only wait for each other
settings.register_profile("ci", database=None, deadline=None, derandomize=True, max_examples=150)
settings.load_profile("ci")


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory):
    """A small synthetic data folder: train 36 + 60, test 15 + 25 images. Read only: tests that change it copy
    it."""
    root = tmp_path_factory.mktemp("data") / "synthetic"
    make_synthetic(root, train=96, test=40)
    return root


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache folder that runs on the unchanged synthetic set share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_npz(tmp_path_factory):
    """Weights in Google's layout of a very small ViT (width 24, depth 2, heads 3, patch 16, 32 px, 1,000
    classes)."""
    path = tmp_path_factory.mktemp("weights") / "tiny.npz"
    np.savez(path, **google_arrays(dim=24, depth=2, heads=3, patch=16, grid=2, classes=1000))
    return path


@pytest.fixture(scope="session")
def flags(synthetic, cache):
    """Data flags for a run of seconds."""
    return ["--data-dir", synthetic, "--cache-dir", cache, "--img-size", 32]


@pytest.fixture
def pictures_drawn(monkeypatch):
    """The pictures of the report are drawn, as a user has them."""
    monkeypatch.setattr(Figure, "savefig", draw_figure)


@pytest.fixture(scope="session")
def runs(tmp_path_factory, flags, tiny_npz):
    """One run of each kind, calibrated and compared: folder, and what calibrate and compare printed. Read
    only."""
    cwd = tmp_path_factory.mktemp("runs")
    succeed("train_scratch", *flags, "--epochs", 2, "--batch-size", 16, "--no-amp", cwd=cwd)
    succeed("train_pretrained", *flags, "--weights", tiny_npz, "--epochs", 2, "--batch-size", 16, cwd=cwd)
    succeed("train_linear", *flags[:4], "--img-size", 64, cwd=cwd)
    calibrated = succeed("calibrate", "--min-recall", 0.9, cwd=cwd)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", draw_figure)
        compared = succeed("compare", "--csv", "table.csv", cwd=cwd)
    return SimpleNamespace(cwd=cwd, out=cwd / "outputs", calibrated=calibrated, compared=compared)


@pytest.fixture
def own_runs(runs, tmp_path):
    """A copy of `runs` that a test may change."""
    shutil.copytree(runs.out, tmp_path / "outputs")
    return tmp_path


FLOOR = ("--min-recall", 0.9, "--guarantee", 0.9, "--bootstrap", 200)  # 22 patients are enough for these


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A synthetic set with enough patients for a guarantee, and calibrated runs: linear, and scratch with two
    seeds."""
    folder = tmp_path_factory.mktemp("bench")
    make_synthetic(folder / "xray", train=420, test=60)
    common_flags = ("--data-dir", "xray", "--img-size", "32")
    assert cli("train_linear", *common_flags, cwd=folder).code == 0
    assert cli("train_scratch", *common_flags, "--seeds", 0, 1, "--max-steps", 3, cwd=folder).code == 0
    assert cli("calibrate", *FLOOR, cwd=folder).code == 0
    return folder


@pytest.fixture
def small_set(tmp_path):
    """A data folder of its own: 12 + 12 training and 3 + 3 test PNGs, each of one grey value."""
    for split, count in (("train", 12), ("test", 3)):
        for k, name in enumerate(data.CLASSES):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((20, 20), 10 * i + 100 * k, np.uint8)).save(
                    folder / f"{'np'[k]}{i:02d}.png"
                )
    return data.DataConfig(data_dir=str(tmp_path / "set"), img_size=16, cache_dir=str(tmp_path / "cache"))
