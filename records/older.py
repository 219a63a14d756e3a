"""Calibrations of older versions, brought into the present form where a run is read. No torch, no files.

Format 3 of calibration.json has {finding: what is said of it} under "findings", however many there are, and
figures over all of them under "summary". Formats 1 and 2 (2: with Platt scaling) had that for several
findings alone; what they say of an only finding stands among the settings.
"""

from common.files import CALIBRATION
from common.proportions import curves_of
from records.schema import FINDING, wrong_finding

OF_ONE = (*FINDING, "gap", "changed")  # what an older calibration of one finding says of it


def in_present_form(calibration, task):
    """A calibration.json of any format that this version reads, in the present one; not changed itself.

    What is damaged stays so, for `schema.wrong_calibration` to find."""
    present = {"jointly": None, **calibration, "format": CALIBRATION}
    if calibration["format"] == CALIBRATION or "findings" in calibration:
        return present
    of_finding = {name: present.pop(name) for name in OF_ONE if name in present}
    if not wrong_finding(of_finding):
        of_finding["curves"] = {side: curves_of(of_finding[side]["at_0.5"]) for side in ("val", "test")}
        averaged = {"findings": [task.findings[0]]}
        present["summary"] = {side: averaged | curves for side, curves in of_finding["curves"].items()}
    return present | {"findings": {task.findings[0]: of_finding}}
