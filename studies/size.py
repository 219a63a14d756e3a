"""How listing, cache, start and bootstrap behave at the size of the full NIH ChestX-ray14 set.

    python studies/size.py Data_Entry_2017.csv --work DIR

Writes a 16 px image for every row of the table into DIR (once), then prints seconds and peak memory of each
step, and of the bootstrap of 15 findings on 25,596 images with made-up scores.
"""

import io
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

import data
from calibration.operating_point import Rule, evaluate
from common.cli import Parser
from common.console import say, start
from common.task import Task
from data import IMG_SIZE, load_train_val, read_listing
from images.split import cut
from images.subset import input_range
from layouts import tables
from layouts.sheets import open_sheet
from studies.benchmark import peak_resident


def draw(table, work, per_folder=10_000):
    """An image for every row of the NIH table under work/images_*/images, and the two lists; once."""
    sheet = open_sheet(table)
    rows = list(zip(sheet.text("Image Index"), sheet.text("Patient ID")))
    if (work / "test_list.txt").exists():
        return len(rows)
    rng, pictures = np.random.default_rng(0), []
    for _ in range(50):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (16, 16), dtype=np.uint8)).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    for i, (name, _) in enumerate(rows):
        folder = work / f"images_{i // per_folder:03d}/images"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(pictures[i % 50])
    patients = sorted({patient for _, patient in rows})
    tested = set(rng.permutation(patients)[: len(patients) * 23 // 100])
    for file, inside in (("train_val_list.txt", False), ("test_list.txt", True)):
        names = [name for name, patient in rows if (patient in tested) == inside]
        (work / file).write_text("\n".join(names))
    return len(rows)


def made_up(count, patients, rng):
    """Labels, logits and patients of `count` images with 15 findings, No Finding among them."""
    share = np.r_[0.4, np.linspace(0.005, 0.2, 14)]
    labels = (rng.random((count, 15)) < share).astype(np.int8)
    logits = (rng.normal(0, 1, labels.shape) + 1.5 * labels - 2).astype(np.float32)
    return labels, logits, np.array([f"p{i}" for i in rng.integers(0, patients, count)])


def main():
    parser = Parser(__doc__)
    parser.add_argument("table", metavar="CSV", help="the NIH table")
    parser.add_argument("--work", required=True, metavar="DIR", help="folder for images and cache")
    parser.add_argument("--img-size", type=IMG_SIZE, default=32, metavar="PX", help="side of the cache")
    args = parser.parse_args()
    work, last = Path(args.work), (time.perf_counter(), time.process_time())

    def lap(step):
        """Print what a step took since the one before."""
        nonlocal last
        now = time.perf_counter(), time.process_time()
        wall, cpu = (b - a for a, b in zip(last, now))
        print(
            f"{step}: {wall:.1f} s ({cpu:.1f} s of CPU), peak {peak_resident('self') or 0:.0f} MiB",
            flush=True,
        )
        last = now

    lap(f"drawing {draw(args.table, work)} images")
    classes = tables.table_findings(args.table)
    settings = dict(labels=args.table, classes=classes, cache_dir=str(work / "cache"))
    config = data.DataConfig(str(work), args.img_size, **settings)
    listing = read_listing(config)
    cut(listing.index.take(listing.others), config.task, True, config.val_share, 0)
    lap("listing and splitting")
    load_train_val(config, say)
    lap("a start without a cache")
    train, _, _ = load_train_val(config, say)
    input_range(train)
    lap("a start with the cache there")
    rng, scores = np.random.default_rng(0), {}
    for side, images, patients in (("val", 2000, 700), ("test", 25_596, 2797)):
        parts = zip(("labels", "logits", "patients"), made_up(images, patients, rng))
        scores |= {f"{side}_{name}": values for name, values in parts}
    last = time.perf_counter(), time.process_time()
    evaluate(scores, Rule(), Task(("No Finding", *map(str, range(14))), "sigmoid"))
    lap("bootstrap of 15 findings x 25,596 images")


if __name__ == "__main__":
    start(main)
