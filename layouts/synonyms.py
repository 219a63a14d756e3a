"""Which names of findings mean the same over data sets.

A name is only here where the sets' own definitions agree: NIH's Nodule and Mass are not VinDr's Nodule/Mass,
and CheXpert's Lung Lesion is neither. Spelling (case, spaces, underscores, dashes) never matters.
"""

import re

from common.task import is_device, is_healthy

SAME = (
    ("Pleural Effusion", "Effusion"),
    ("Pleural Thickening", "Pleural"),  # the latter is ChestMNIST's
    ("Nodule/Mass", "Nodule or mass"),
    ("Lung Opacity", "Airspace opacity"),
    ("Pulmonary Fibrosis", "Fibrosis"),
    ("Edema", "Pulmonary Edema", "Oedema"),
    ("Mass", "Pulmonary Mass"),
    ("Infiltration", "Infiltrates"),
    ("Atelectasis", "Atelectases"),
    ("ILD", "Interstitial lung disease"),
    ("COVID-19", "COVID 19", "COVID19"),
    ("Tuberculosis", "TB"),
)


def same_key(name):
    """What the spellings of a name have in common: "Pleural Thickening", "pleural_thickening"."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


_MEANING = {same_key(name): names[0] for names in SAME for name in names}


def meaning(name):
    """A text that is equal for names of the same finding."""
    if is_healthy(name):
        return "no finding"
    if is_device(name):
        return "support devices"
    key = same_key(name)
    return same_key(_MEANING.get(key, key))


def same_finding(a, b):
    """Whether two names mean the same finding."""
    return meaning(a) == meaning(b)


def matched(wanted, there):
    """{name: the one of the names `there` that means it} for those of `wanted` that it has; the same
    spelling goes before another."""
    found = {}
    for name in wanted:
        spelt = [other for other in there if same_key(other) == same_key(name)]
        alike = [other for other in there if same_finding(other, name)]
        if spelt or alike:
            found[name] = (spelt or alike)[0]
    return found
