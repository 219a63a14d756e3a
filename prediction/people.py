"""Whose images predict.py looks at: patients and studies of its files, told as calibrate.py tells them. No
torch."""

from pathlib import Path

import numpy as np

from layouts import headers
from layouts.listing import patient_id, patient_in_folder


def people_of(files, key):
    """(patients, studies) of scorer.Files, lists [N]: by DICOM headers, mended as those of a data set are, or
    else by file names. A patient who is not known stands under the name of the file, a study as "".

    key: of the run's cache folder, under which ids were made names."""
    names = [file.name for file in files]
    found = {kind: np.array([file.told[kind] for file in files], dtype=str) for kind in ("patient", "study")}
    headers.mend(found, names, key, "DICOM headers of these images")
    patients = [told or named for told, named in zip(found["patient"].tolist(), told_by_names(names))]
    return patients, found["study"].tolist()


def told_by_names(names):
    """patient_id of each file name, with its folder where the id is found in several."""
    ids, folders = [patient_id(name) for name in names], {}
    for name, who in zip(names, ids):
        folders.setdefault(who, set()).add(Path(name).parent)
    return [patient_in_folder(name) if len(folders[who]) > 1 else who for name, who in zip(names, ids)]
