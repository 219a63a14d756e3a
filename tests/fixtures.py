"""Fixtures shared by all test files, and what every test process needs set. Loaded by conftest.py."""

import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(tempfile.gettempdir(), "hypothesis")))

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from matplotlib.figure import Figure
from PIL import Image

from common import device as device_module

# Before another module takes its name: what a test computes must not depend on the processor that it runs on.
detect_bf16, device_module.fast_bf16 = device_module.fast_bf16, lambda device: False

import data
import train_scratch
from common.files import atomic_path
from images.drawn import make_synthetic
from models import map_pictures
from records import curves
from report import figures, rows
from tests.shared import google_arrays, succeed
from vit import CONFIGS

# The scratch arm is small here: what is tested of its runs holds at any size, and 5 million weights are
# 80 MB at every epoch's end. Tests of its true size ask for `shipped_scratch`.
SHIPPED = dict(CONFIGS["scratch"]), rows.ARCHITECTURES["scratch"]
CONFIGS["scratch"] |= dict(embed_dim=64, depth=2, num_heads=4)
rows.ARCHITECTURES["scratch"] = (SHIPPED[1][0], (64, 2, 4, 16))
# And it begins with its labels: the masked epochs of the default would take most of a test's time. Tests of
# the true default ask for `shipped_recipe`.
RECIPES = train_scratch.DEFAULTS.recipes
SHIPPED_RECIPE, RECIPES["default"] = RECIPES["default"], RECIPES["supervised"]

draw_figure = Figure.savefig
NOT_DRAWN = {
    "figures",
    "explain",
    "monitor",
}  # folders for the pictures of compare.py, explain.py, monitor.py


def draw_nothing(self, path, **settings):
    """Figure.savefig, but a picture of a report, a sheet of maps or a monitor's course is one grey pixel: to
    draw it takes seconds, and over a hundred tests would. Those that look at pictures ask for
    `pictures_drawn`."""
    if not NOT_DRAWN & set(Path(path).parts):
        return draw_figure(self, path, **settings)
    Image.new("L", (1, 1)).save(path, format="png")


class Blank:
    """Axes that take whatever is drawn on them, and show nothing."""

    def __getattr__(self, name):
        return self

    def __call__(self, *args, **kwargs):
        return self

    def __iter__(self):
        return iter(())

    def __getitem__(self, place):
        return 0.0


class Unfilled(Figure):
    """A figure of Blank axes."""

    def legend(self, *args, **kwargs):
        pass

    suptitle = legend


def blank_panels(count, width, height, columns=2, names=()):
    columns = min(columns, count)
    return Unfilled(), [Blank()] * columns * -(-count // columns)


draw_all = figures.draw_all


def draw_no_lines(view, folder, stem):
    """`figures.draw_all`, which computes what it draws, but to build the lines takes most of compare.py's
    time: it draws them where pictures are drawn."""
    if Figure.savefig is draw_figure:
        return draw_all(view, folder, stem)
    with pytest.MonkeyPatch.context() as patch:
        for module in (curves, figures):
            patch.setattr(module, "panels", blank_panels)
        return draw_all(view, folder, stem)


draw_maps = map_pictures.draw


def draw_no_maps(path, *about):
    """`map_pictures.draw`, or one grey pixel: see `draw_nothing`."""
    if Figure.savefig is draw_figure or not NOT_DRAWN & set(Path(path).parts):
        return draw_maps(path, *about)
    with atomic_path(path) as tmp:
        draw_nothing(None, tmp)


Figure.savefig, figures.draw_all, map_pictures.draw = draw_nothing, draw_no_lines, draw_no_maps
os.fsync = lambda file: None  # a machine that loses power is not among the tests, and a disk is slow
torch.set_num_threads(1)  # tiny models: more threads only wait for each other
settings.register_profile("ci", database=None, deadline=None, derandomize=True, max_examples=150)
settings.load_profile("ci")


@pytest.fixture(scope="session")
def built_once(tmp_path_factory):
    """`built_once(name, build)`: a folder that `build(folder)` fills in the first of pytest-xdist's workers
    that asks, for all of them to read -> (folder, what `build` returned: what JSON can hold)."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # the workers' own folders lie side by side in it
    (base / "built").mkdir(exist_ok=True)

    def built(name, build):
        folder, returned = base / "built" / name, base / "built" / f"{name}.json"
        with FileLock(f"{folder}.lock"):  # the other workers wait; it ends with the process that holds it
            if not returned.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker whose build failed
                folder.mkdir()
                returned.write_text(json.dumps(build(folder)))
        return folder, json.loads(returned.read_text())

    return built


@pytest.fixture(scope="session")
def own_build(built_once, tmp_path_factory):
    """As `built_once`, but each worker has a copy that its tests may change."""

    def built(name, build):
        folder, returned = built_once(name, build)
        own = tmp_path_factory.mktemp("own") / name
        return Path(shutil.copytree(folder, own)), returned

    return built


@pytest.fixture(scope="session")
def synthetic(built_once):
    """A small synthetic data folder: train 36 + 60, test 15 + 25 images. Read only: tests that change it copy
    it."""
    folder, _ = built_once("data", lambda folder: make_synthetic(folder / "synthetic", train=96, test=40))
    return folder / "synthetic"


@pytest.fixture(scope="session")
def cache(built_once):
    """A cache folder that runs on the unchanged synthetic set share."""
    return built_once("cache", lambda folder: None)[0]


@pytest.fixture(scope="session")
def tiny_npz(built_once):
    """Weights in Google's layout of a very small ViT (width 24, depth 2, heads 3, patch 16, 32 px, 1,000
    classes)."""

    def build(folder):
        np.savez(folder / "tiny.npz", **google_arrays(dim=24, depth=2, patch=16, grid=2, classes=1000))

    return built_once("weights", build)[0] / "tiny.npz"


@pytest.fixture(scope="session")
def flags(synthetic, cache):
    """Data flags for a run of seconds."""
    return ["--data-dir", synthetic, "--cache-dir", cache, "--img-size", 32]


@pytest.fixture
def shipped_scratch(monkeypatch):
    """train_scratch.py's model in its true size; its config."""
    monkeypatch.setitem(CONFIGS, "scratch", SHIPPED[0])
    monkeypatch.setitem(rows.ARCHITECTURES, "scratch", SHIPPED[1])
    return SHIPPED[0]


@pytest.fixture
def shipped_recipe(monkeypatch):
    """train_scratch.py's default recipe as users have it."""
    monkeypatch.setitem(RECIPES, "default", SHIPPED_RECIPE)
    return SHIPPED_RECIPE


@pytest.fixture
def pictures_drawn(monkeypatch):
    """All pictures are drawn, as a user has them."""
    monkeypatch.setattr(Figure, "savefig", draw_figure)


@pytest.fixture
def graph_as_it_is(monkeypatch):
    """torch leaves the graph of an ONNX file as it is: its optimiser takes a time that grows with the square
    of the nodes. It is at work on the smaller graphs of test_predict.py, test_cnn.py and test_several.py."""
    export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **settings: export(*a, **settings, optimize=False))


@pytest.fixture(scope="session")
def runs(built_once, flags, tiny_npz):
    """One run of each kind, calibrated and compared: folder, and what calibrate and compare printed. Read
    only."""

    def build(cwd):
        succeed("train_scratch", *flags, "--epochs", 2, "--batch-size", 16, "--no-amp", cwd=cwd)
        succeed("train_pretrained", *flags, "--weights", tiny_npz, "--epochs", 2, "--batch-size", 16, cwd=cwd)
        succeed("train_linear", *flags[:4], "--img-size", 64, cwd=cwd)
        printed = {"calibrated": vars(succeed("calibrate", "--min-recall", 0.9, cwd=cwd))}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "savefig", draw_figure)
            printed["compared"] = vars(succeed("compare", "--csv", "table.csv", cwd=cwd))
        return printed

    cwd, printed = built_once("runs", build)
    printed = {name: SimpleNamespace(**done) for name, done in printed.items()}
    return SimpleNamespace(cwd=cwd, out=cwd / "outputs", **printed)


@pytest.fixture
def own_runs(runs, tmp_path):
    """A copy of `runs` that a test may change."""
    shutil.copytree(runs.out, tmp_path / "outputs")
    return tmp_path


FLOOR = ("--min-recall", 0.9, "--guarantee", 0.9, "--bootstrap", 100)  # 22 patients are enough for these


@pytest.fixture(scope="session")
def bench(own_build):
    """A synthetic set with enough patients for a guarantee, and calibrated runs: linear, and scratch with two
    seeds."""

    def build(folder):
        make_synthetic(folder / "xray", train=420, test=60)
        common_flags = ("--data-dir", "xray", "--img-size", "32")
        succeed("train_linear", *common_flags, cwd=folder)
        succeed("train_scratch", *common_flags, "--seeds", 0, 1, "--max-steps", 3, cwd=folder)
        succeed("calibrate", *FLOOR, cwd=folder)

    return own_build("bench", build)[0]


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
