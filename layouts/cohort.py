"""Age, sex and view as tables and DICOM headers write them -> the forms of listing.COHORT."""

import re

import numpy as np

from common.console import say_once
from layouts.listing import COHORT

DAYS = {"Y": 365.25, "M": 365.25 / 12, "W": 7, "D": 1}  # of the units of DICOM ages
OLDEST = 120  # years; what is above is a mistake of typing
SEXES = {"f": "F", "female": "F", "m": "M", "male": "M"}
MOST_VALUES = 50  # different values of a column that is kept for subgroups
LONGEST = 60  # characters of such a value


def years(text):
    """An age in years: "57", "57.0", "077Y", "003M", "012W", "90+". NaN where it cannot be one."""
    match = re.fullmatch(r"(\d{1,4}(?:\.\d+)?)\s*([YMWD]?)\+?", text.strip().upper())
    if not match:
        return np.nan
    age = float(match[1])
    if match[2]:
        age = age * DAYS[match[2]] / DAYS["Y"]
    return age if age <= OLDEST else np.nan


def sex(text):
    """F, M, or "" for anything else."""
    return SEXES.get(text.strip().lower(), "")


def view(text):
    """PA, AP, lateral, "other" for a view that is known and none of these (oblique, say), or "", also for
    several views at once."""
    text = re.sub(r"\b([PA])\.\s*([AP])\b", r"\1\2", text.upper())  # "Thorax p.a."
    single = re.split(r"[\W_]+", text)
    words = "".join(single)  # "Frontal PA", "postero-anterior"
    words = words.removeprefix("FRONTAL").removesuffix("VIEW").removesuffix("FRONTAL")
    if words in ("", "FRONT", "UNK", "UNKNOWN", "NONE", "NAN"):
        return ""
    found = []
    if words == "PA" or "PA" in single or words.startswith(("POSTEROANT", "POSTERIORANT")):
        found.append("PA")
    if words == "AP" or "AP" in single or words.startswith(("ANTEROPOST", "ANTERIORPOST")):
        found.append("AP")
    sideways = "LATERAL" in words.replace("BILATERAL", "")
    if words in ("L", "LL", "RL", "LLAT", "RLAT") or "LAT" in single or sideways:
        found.append("lateral")
    if len(found) > 1:
        return ""
    return found[0] if found else "other"


def _each(texts, read, kind):
    """`read` of every text [N], called once for each different one: array [N] of this kind."""
    known = {text: read(text) for text in set(texts)}
    return np.array([known[text] for text in texts], dtype=kind)


def ages(texts, where):
    """Texts [N] -> float64 [N]. A note counts what is no age, `where` names the table."""
    found = _each(texts, years, np.float64)
    _say_unread(where, "ages", texts, np.isnan(found))
    return found


def sexes(texts, where):
    """Texts [N] -> F, M or "" [N]. A note counts what is neither."""
    found = _each(texts, sex, "U1")
    _say_unread(where, "sexes", texts, found == "")
    return found


def views(texts, where):
    """Texts [N] -> PA, AP, lateral, other or "" [N]. A note counts the others."""
    found = _each(texts, view, "U7")
    others = [text for text, kind in zip(texts, found) if kind == "other" and text != "other"]
    if others:
        some = ", ".join(dict.fromkeys(others[:1000]))[:60]
        say_once(f"note: {where}: {len(others)} views are neither PA nor AP nor lateral ({some}): other")
    return found


def _say_unread(where, what, texts, unread):
    """A note on texts that are not empty and could not be read."""
    wrong = [text for text, bad in zip(texts, unread) if bad and text.strip()]
    if wrong:
        some = ", ".join(dict.fromkeys(wrong[:1000]))[:60]
        say_once(f"note: {where}: {len(wrong)} {what} are not understood ({some}): unknown")


def further_columns(sheet, used):
    """{column: text [N]} of the columns of a Sheet, but those `used`, with 2 to MOST_VALUES different values:
    groups that figures can be given for. Columns of long texts are left out."""
    left_out = {name.lower() for name in (*used, *COHORT) if name}
    found = {}
    for name in sheet.head:
        if not name or name.lower() in left_out:
            continue
        values = sheet.text(name)
        kinds = set(values)
        if 1 < len(kinds) <= MOST_VALUES and max(map(len, kinds)) <= LONGEST:
            found[name] = np.array(values, dtype=str)
    return found
