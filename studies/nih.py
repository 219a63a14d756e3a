"""Images of another hospital, from a part of NIH ChestX-ray14 (Wang et al. 2017, arXiv:1705.02315)."""

import csv
from pathlib import Path

import numpy as np

from common.console import InputError
from common.files import check_regular
from images.cache import load_images
from images.subset import Subset
from lungs import masks as lung_masks

PNEUMONIA_LIKE = {"Pneumonia", "Consolidation", "Infiltration"}


def list_nih(folder):
    """(files, targets int64, patients) of the images in `folder`/images whose only finding in
    `folder`/sample_labels.csv is "No Finding" (target 0) and of those with one of PNEUMONIA_LIKE (target 1).

    Listed images that are not there are passed over. InputError if the list cannot be read, or if either
    group is empty."""
    path, found = Path(folder, "sample_labels.csv"), ([], [])
    check_regular(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                findings, name = set((row["Finding Labels"] or "").split("|")), f"images/{row['Image Index']}"
                sick = bool(findings & PNEUMONIA_LIKE)
                if (sick or findings == {"No Finding"}) and Path(folder, name).is_file():
                    found[sick].append((name, row.get("Patient ID") or name))
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise InputError(
            f"--nih: {path} is not a readable list of NIH findings ({type(error).__name__}: {error})"
        ) from None
    if not found[0] or not found[1]:
        raise InputError(
            f"--nih: of the images listed in {path}, {folder}/images holds {len(found[0])} without a finding "
            f"and {len(found[1])} with pneumonia, consolidation or infiltration; both groups are needed"
        )
    files, patients = zip(*found[0], *found[1])
    return list(files), np.repeat([0, 1], [len(found[0]), len(found[1])]), list(patients)


def load_nih(folder, config):
    """The images of `list_nih`, prepared as the DataConfig `config` says: a Subset."""
    files, targets, patients = list_nih(folder)
    found = load_images(
        folder,
        files,
        size=config.img_size,
        resize=config.resize,
        cache_dir=config.cache_dir,
        skip_bad=config.skip_bad,
        name="images",
    )
    rows, masks = found.rows, None
    if config.needs_lungs:
        what = f"images in {folder}"
        masks = lung_masks.load_masks(config.lungs, found, files, what, config.lungs_sha256)
    about = dict(patients=[patients[r] for r in rows], masks=masks)
    return Subset([files[r] for r in rows], targets[rows], found.images, rows, **about)
