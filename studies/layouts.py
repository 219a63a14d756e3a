"""Counts per finding of our layouts against torchxrayvision's dataset classes, on the same tables.

    python studies/layouts.py TABLES

TABLES: the folder torchxrayvision/data of its package, which holds the public tables. Prints a line a finding
of CheXpert, RSNA, VinDr-CXR, Google's four findings and PadChest: positive, negative and unknown, ours and
theirs. No image is read: every image that a table lists counts as there.

    python studies/layouts.py TABLES --empty-files DIR

makes CheXpert's files in DIR instead, all empty, and prints how long the set takes to list and to split: all
of it, and with nine of ten files gone.
"""

import argparse
import gzip
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from common.cli import Parser
from common.console import InputError, start
from data import DataConfig, read_listing
from images.split import cut_validation, split_patients
from layouts import tables
from layouts.choices import Choices, select
from layouts.sheets import open_sheet
from layouts.synonyms import matched

FRONTAL = ["PA", "AP"]


class EveryImage(dict):
    """Images under a folder as tables.read wants them: whatever a table lists is there, under that name."""

    def __contains__(self, name):
        return True

    def get(self, name, default=None):
        return name


def read(path, choices, root):
    """(Index of the images of a used view, number of these) of a table, all of its findings."""
    with mock.patch.object(tables, "_images", lambda *about: EveryImage()):
        findings = tables.find_layout(path).findings(path)
        reading = tables.read(path, root, findings, choices)
    index, flow = select(reading, choices)
    return findings, index, flow[2][1]


def counts(labels, total):
    """(positive, negative, unknown) of a column of 1, 0 and anything else, of `total` images."""
    positive, negative = int((labels == 1).sum()), int((labels == 0).sum())
    return positive, negative, total - positive - negative


def compare(title, path, theirs, choices, root):
    """Print the counts of every finding that both have; returns the number that differ."""
    findings, index, total = read(path, choices, root)
    differ = 0
    for name, other in matched(theirs.pathologies, findings).items():
        ours = counts(index.targets[:, findings.index(other)], total)
        found = counts(theirs.labels[:, list(theirs.pathologies).index(name)], len(theirs.labels))
        differ += ours != found
        print(f"{title:9} {other:27} {ours} {'=' if ours == found else '!='} {found}")
    print(f"{title:9} {total} images, {differ} findings differ")
    return differ


def compare_padchest(path, theirs, root):
    """As `compare`, of the images that both use. torchxrayvision looks for a name within the text of the
    whole list, so a finding of theirs is any label of ours that has it in its name."""
    findings, index, _ = read(path, Choices(views="PA"), root)
    row = {file.rpartition("/")[2]: at for at, file in enumerate(index.files)}
    both = [at for at, image in enumerate(theirs.csv["ImageID"]) if image in row]
    ours = index.targets[[row[theirs.csv["ImageID"].iloc[at]] for at in both]]
    differ = 0
    for k, name in enumerate(theirs.pathologies):
        columns = [j for j, finding in enumerate(findings) if name.lower() in finding]
        if name not in ("Pneumonia", "Cardiomegaly", "Atelectasis", "Emphysema", "Scoliosis", "Pneumothorax"):
            continue  # the others have a mapping of several names
        mine, found = int((ours[:, columns] == 1).any(axis=1).sum()), int(theirs.labels[both, k].sum())
        differ += mine != found
        print(f"padchest  {name:27} {mine} {'=' if mine == found else '!='} {found}")
    print(f"padchest  {len(both)} images of both (theirs: {len(theirs.labels)}), {differ} findings differ")


def time_chexpert(table, root):
    """Print how long CheXpert's set takes to list and split, of empty files in the folder `root`."""
    root.mkdir(parents=True, exist_ok=True)
    with gzip.open(table) as file:
        (root / "train.csv").write_bytes(file.read())
    files = [
        name.removeprefix("CheXpert-v1.0-small/") for name in open_sheet(root / "train.csv").text("Path")
    ]
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    config = DataConfig.from_args(argparse.Namespace(data_dir=str(root), labels="train.csv", findings=None))
    for gone in (False, True):
        for name in files if gone else ():
            if zlib.crc32(name.encode()) % 10:
                (root / name).unlink()
        clock, processor = time.perf_counter(), time.process_time()
        listing = read_listing(config)
        train, val = cut_validation(listing.index.take(listing.others), config)
        clock, processor = time.perf_counter() - clock, time.process_time() - processor
        print(
            f"{len(files)} rows, {len(train)} + {len(val)} + {len(listing.test)} images in train, val and "
            f"test: {clock:.1f} s, {processor:.1f} s of CPU",
            flush=True,
        )


def main():
    parser = Parser(__doc__)
    parser.add_argument("tables", metavar="TABLES", help="the folder torchxrayvision/data")
    parser.add_argument("--empty-files", metavar="DIR", help="an empty folder: time CheXpert's listing there")
    args = parser.parse_args()
    folder = Path(args.tables)
    if args.empty_files:
        time_chexpert(folder / "chexpert_train.csv.gz", Path(args.empty_files))
        return
    try:
        from torchxrayvision import datasets as xrv
    except ImportError:
        raise InputError("this study needs the package torchxrayvision") from None
    chexpert = folder / "chexpert_train.csv.gz"
    begin = time.process_time()
    _, index, _ = read(chexpert, Choices(), folder)
    split_patients(index.patients, 0.2)
    print(
        f"chexpert: {len(index.files)} frontal images read and split in {time.process_time() - begin:.1f} s "
        "of CPU"
    )
    theirs = xrv.CheX_Dataset(str(folder), str(chexpert), views=FRONTAL, unique_patients=False)
    compare("chexpert", chexpert, theirs, Choices(blank="ignore", uncertain="ignore"), folder)
    with tempfile.TemporaryDirectory() as work:
        with zipfile.ZipFile(folder / "kaggle_stage_2_train_labels.csv.zip") as archive:
            archive.extractall(work)
        labels = next(Path(work).glob("*.csv"))
        headers = folder / "kaggle_stage_2_train_images_dicom_headers.csv.gz"
        Path(work, headers.name).write_bytes(headers.read_bytes())
        compare("rsna", labels, xrv.RSNA_Pneumonia_Dataset(str(folder), views=FRONTAL), Choices(), Path(work))
    vindr = folder / "vinbigdata-train.csv.gz"
    compare("vindr", vindr, xrv.VinDr_Dataset(str(folder)), Choices(readers="any"), folder)
    google = folder / "google2019_nih-chest-xray-labels.csv.gz"
    theirs = xrv.NIH_Google_Dataset(str(folder), views=FRONTAL, unique_patients=False)
    compare("google", google, theirs, Choices(), folder)
    padchest = folder / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"
    theirs = xrv.PC_Dataset(str(folder), views=["PA"], unique_patients=False)
    compare_padchest(padchest, theirs, folder)


if __name__ == "__main__":
    start(main)
