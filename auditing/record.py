"""audit.json in a run folder: what audit.py found of a model, side by side. No torch.

    {"format": 1, "version": 1, "checkpoint": SHA-256 of it, "sides": {"val": {...}, "test": {...}}}

A side is there if it was audited. It holds

    "finding"    what was asked
    "images", "patients"   how many were looked at; "of_images": how many the side has
    "lines"      [{"key": one of KEYS, "verdict": one of VERDICTS, "text": sentence, "images": how many were
                 looked at for it, "threshold": at which it judged, if at one}], in the order of KEYS; a
                 section that was never run has no line; older versions kept neither images nor threshold
    "shortcut"   {"verdict", "text"}: what border, lungs and features say together
    "figures"    {key: the figures behind the line}, JSON
    "others"     {finding: the same, without "others"} of further findings that were asked for

What each verdict rests on is in docs/AUDIT.md.
"""

from common.console import InputError, say_once
from common.files import FORMAT, check_format, read_json, write_json
from records.schema import NATURAL, mismatches

VERSION = 1
KEYS = ("border", "lungs", "features", "corruptions", "clusters")
TITLES = {
    "border": "Border",
    "lungs": "Lungs",
    "features": "Other signals",
    "corruptions": "Changed images",
    "clusters": "False alarms",
}
VERDICTS = ("kept", "open", "broken")
NAME = "audit.json"

SIDE = {
    "finding": str,
    "images": NATURAL,
    "of_images": NATURAL,
    "patients": NATURAL,
    "lines": [{"key": str, "verdict": str, "text": str}],
    "shortcut": {"verdict": str, "text": str},
    "figures": dict,
}


def audit_of(run):
    """The content of audit.json of a Run (see above), or None.

    None if the run was not audited, and, with a line on stderr, if the audit is of another checkpoint, since
    a model that was trained again is not the one that was audited. InputError if the file is damaged or of a
    newer version."""
    path = run.folder / NAME
    if not path.exists():
        return None
    audit = read_json(path)
    check_format(audit, path)
    if wrong := wrong_audit(audit):
        raise InputError(f"{path} is damaged ({', '.join(wrong)[:200]}): delete it and run audit.py again")
    if audit["checkpoint"] != run.checkpoint_sha256:
        say_once(f"note: {path} is of another checkpoint, so it is left out: run python audit.py --run {run}")
        return None
    for found in audit["sides"].values():
        for each in (found, *found["others"].values()):
            _forget_other_thresholds(run, each)
    return audit


def _forget_other_thresholds(run, found):
    """Take the sections out of what an audit found of a finding that judged another threshold than today's
    @Rec, and say so."""
    calibration = run.calibration() if "" in run.calibrated() else {"findings": {}}
    today = calibration["findings"].get(found["finding"], {}).get("threshold")
    stale = []
    for line in found["lines"]:
        at = line.get("threshold", found["figures"].get(line["key"], {}).get("threshold"))
        if isinstance(at, float) and at != today:
            stale.append(line)
    if not stale:
        return
    names = ", ".join(TITLES[line["key"]] for line in stale)
    say_once(
        f"note: the audit of {run} judged another threshold than today's @Rec of {found['finding']}: {names} "
        f"left out; run python audit.py --run {run}"
    )
    found["lines"] = [line for line in found["lines"] if line not in stale]


def wrong_audit(audit):
    """Names of what is missing or wrong in an audit.json."""
    wrong = mismatches(audit, {"version": NATURAL, "checkpoint": str, "sides": dict})
    if wrong:
        return wrong
    for side, found in audit["sides"].items():
        wrong += mismatches(found, SIDE | {"others": dict}, side)
    if wrong or set(audit["sides"]) - {"val", "test"}:
        return wrong or ["sides"]
    for side, found in audit["sides"].items():
        for each in (found, *found["others"].values()):
            wrong += _wrong_lines(each, side)
    return wrong


def _wrong_lines(found, side):
    """Names of what is wrong in the lines of a side."""
    if wrong := mismatches(found, SIDE, side):
        return wrong
    keys = [line["key"] for line in found["lines"]]
    verdicts = [line["verdict"] for line in (*found["lines"], found["shortcut"])]
    if set(keys) - set(KEYS) or set(verdicts) - set(VERDICTS):
        return [f"{side}.lines"]
    return []


def kept_of(audit, side, finding):
    """What an audit (or None) holds of a finding on a side; None if nothing."""
    found = (audit or {"sides": {}})["sides"].get(side)
    if found is None:
        return None
    if found["finding"] == finding:
        return found
    return found["others"].get(finding)


def save_side(run, side, found, first):
    """Write what was found of a side into audit.json; the other side and other findings stay.

    `found`: see above, without "others". `first`: the finding that a report shows, where it was audited; else
    it is the one audited last."""
    audit = audit_of(run) or {"sides": {}}
    earlier = audit["sides"].get(side)
    others = {}
    if earlier is not None:
        others = earlier.pop("others") | {earlier["finding"]: earlier}
        others.pop(found["finding"], None)
    shown = found
    if first in others:
        others[found["finding"]] = found
        shown = others.pop(first)
    sides = audit["sides"] | {side: shown | {"others": others}}
    value = {"format": FORMAT, "version": VERSION, "checkpoint": run.checkpoint_sha256, "sides": sides}
    write_json(run.folder / NAME, value)
