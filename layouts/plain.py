"""What the cells of a plain table say of an image: a column a finding, 1, 0, -1 or empty. No files."""

import re

from common.console import InputError, advice
from common.task import is_device, is_healthy
from layouts.nih import NIH_FINDINGS, same_key
from layouts.sheets import columns, value

CHEXPERT_DISEASES = (
    *("Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation"),
    *("Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture"),
)
LABELS = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": -1, "-1.0": -1, "": -1}


# ---------------------------------------------------------------- plain


def read_plain(path, head, findings):
    """A function (row, its number) -> labels of the plain layout, a tuple of 1, 0 and -1.

    A row that says both healthy and sick is an InputError, whichever of its findings are asked. Sick is a 1
    in a column that is asked, or has the name of a disease of NIH's or CheXpert's: others, such as one that
    says whether the picture is frontal, may be no findings."""
    if absent := [name for name in findings if name not in head]:
        raise InputError(f"{path} has no column {', '.join(absent)}; {columns(head)}")
    asked = [(name, head.index(name)) for name in findings]
    refuse_both = _contradictions(path, head, findings)

    def read(row, number):
        labels = []
        for name, at in asked:
            text = value(row, at)
            if text not in LABELS:
                comma = ". A decimal comma is not read" if re.fullmatch(r"-?\d+,\d+", text) else ""
                raise InputError(
                    f"{path}, row {number}: {name} is {text[:40]!r}, not 1, 0, -1 or empty{comma}"
                    + advice("--findings", ". If it is no finding, name those that are with --findings A,B,C")
                )
            labels.append(LABELS[text])
        refuse_both(row, number)
        return tuple(labels)

    return read


def _contradictions(path, head, findings):
    """A function (row, its number) that raises an InputError where the row says healthy and sick."""
    diseases = {same_key(name) for name in (*NIH_FINDINGS, *CHEXPERT_DISEASES, *findings)}
    healthy = [at for at, name in enumerate(head) if is_healthy(name)]
    sick = [
        at
        for at, name in enumerate(head)
        if same_key(name) in diseases and at not in healthy and not is_device(name)
    ]

    def refuse(row, number):
        well = [head[at] for at in healthy if LABELS.get(value(row, at)) == 1]
        if not well:
            return
        against = [f"{head[at]} is 1" for at in sick if LABELS.get(value(row, at)) == 1]
        against += [f"{head[at]} is 0" for at in healthy if LABELS.get(value(row, at)) == 0]
        if against:
            raise InputError(
                f"{path}, row {number}: {well[0]} is 1 and {against[0]}, a contradiction: correct the row, "
                "or leave what is not known empty"
            )

    return refuse
