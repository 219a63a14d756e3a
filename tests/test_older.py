"""Tests of older calibrations: what earlier versions wrote of one finding, read in the present form."""

import copy
import json

import pytest

from calibration import scores as scores_module
from common.files import CALIBRATION, write_json
from common.task import Task
from records.run import Run
from records.schema import in_present_form, wrong_calibration
from tests.shared import cli, of_one, read_json, refused, succeed, tables

FIGURES = ("acc", "precision", "recall", "specificity", "f1", "auroc", "auprc")
SETTINGS = {
    "min_recall": 0.9,
    "temperature": 1.25,
    "temperature_applied": False,
    "bootstrap": 200,
    "checkpoint": "c0ffee",
    "synthetic": False,
    "tta": None,
    "alike": {},
    "command": "python calibrate.py",
}


def point(thr, auroc, auprc):
    """Figures at a threshold, as formats 1 and 2 have them: `auroc`, `auprc` (value, lo, hi)."""
    row = {"tp": 9, "fp": 2, "tn": 8, "fn": 1, "thr": thr, **dict.fromkeys(FIGURES, 0.85)}
    row |= {"auroc": auroc[0], "auprc": auprc[0]}
    row["interval"] = {name: {"bootstrap": [0.75, 0.95]} for name in FIGURES}
    row["interval"]["auroc"] = {"bootstrap": list(auroc[1:]), "delong": [0.5, 1.0]}
    row["interval"]["auprc"] = {"bootstrap": list(auprc[1:])}
    row["at_prevalence"] = {"prevalence": 0.1, "ppv": 0.3, "npv": 0.99}
    return row


def as_older_versions_wrote():
    """calibration.json of one finding, format 1, by hand: all that is said of it beside the settings. Every
    draw of test has the same AUPRC, so the number of patients gives its interval."""
    quality = {"ece": 0.1, "brier": 0.2, "nll": 0.5, "bins": [{"n": 20, "score": 0.4, "positives": 0.5}]}
    points = {
        "val": {"at_0.5": 0.5, "at_rec": 0.25, "at_guaranteed": 0.125},
        "test": {"at_0.5": 0.5, "at_rec": 0.25, "at_guaranteed": 0.125},
    }
    curves = {
        "val": ((0.93, 0.88, 0.97), (0.91, 0.82, 0.96)),
        "test": ((0.89, 0.81, 0.94), (1.0, 1.0, 1.0)),
    }
    old = {**SETTINGS, "format": 1, "threshold": 0.25, "gap": 0.01}
    for side, thresholds in points.items():
        old[side] = {name: point(thr, *curves[side]) for name, thr in thresholds.items()}
    for row in old["test"].values():
        row["interval"]["auprc"]["patients"] = [0.7, 1.0]
    old["guarantee"] = {"confidence": 0.95, "threshold": 0.125, "gap": 0.02, "positive_patients": 60}
    for side in ("val", "test"):
        old["guarantee"][side] = {"at_guaranteed": old[side]["at_guaranteed"]}
    old["probability"] = {side: {"before": quality, "after": quality} for side in ("val", "test")}
    return old


@pytest.mark.parametrize("platt", [False, True])
def test_a_calibration_of_one_finding_is_read_in_the_present_form(platt):
    """Every value stays; what it says of the finding stands under its name, and the figures over all findings
    are those of this one."""
    task, old = Task(("Edema",), "sigmoid"), as_older_versions_wrote()
    if platt:  # format 2, with what scaling changed
        old |= {"format": 2, "platt": {"Edema": {"slope": 0.5, "bias": -1.0}}}
        old["changed"] = {side: {"at_0.5": 3, "at_rec": 0} for side in ("val", "test")}
    before = copy.deepcopy(old)
    found = in_present_form(old, task)
    assert old == before and found["format"] == CALIBRATION
    assert wrong_calibration(found, task) == []
    assert {k: found[k] for k in SETTINGS} == SETTINGS and found["jointly"] is None
    assert found.get("platt") == old.get("platt") and list(found["findings"]) == ["Edema"]
    edema = of_one(found)
    for name in ("threshold", "gap", "val", "test", "guarantee", "probability", "changed"):
        assert edema.get(name) == old.get(name), name
    curves = {
        "val": {
            "auroc": {"value": 0.93, "lo": 0.88, "hi": 0.97},
            "auprc": {"value": 0.91, "lo": 0.82, "hi": 0.96},
        },
        "test": {
            "auroc": {"value": 0.89, "lo": 0.81, "hi": 0.94},
            "auprc": {"value": 1.0, "lo": 0.7, "hi": 1.0},
        },
    }
    assert edema["curves"] == curves
    for side in ("val", "test"):
        assert found["summary"][side] == {"findings": ["Edema"], **curves[side]}
    assert in_present_form(found, task) == found  # the present form stays as it is


def test_older_calibrations_of_several_findings_and_damaged_ones():
    """Several findings had the present form already; what is damaged is found by name, in either."""
    several = Task(("Edema", "Mass"), "sigmoid")
    kept = {**SETTINGS, "format": 1, "findings": {"Edema": {}, "Mass": {}}, "summary": {}}
    assert in_present_form(kept, several) == {**kept, "format": CALIBRATION, "jointly": None}
    one = Task(("Edema",), "sigmoid")
    for name in ("threshold", "val", "probability", "guarantee"):
        damaged = {k: v for k, v in as_older_versions_wrote().items() if k != name}
        wrong = wrong_calibration(in_present_form(damaged, one), one)
        assert any(w.startswith(f"Edema.{name}") for w in wrong), (name, wrong)
    lost = {**as_older_versions_wrote(), "format": CALIBRATION}  # no older version wrote this
    assert "findings" in wrong_calibration(in_present_form(lost, one), one)


def older(calibration):
    """The present calibration of one finding as formats 1 and 2 had it."""
    found = {k: v for k, v in of_one(calibration).items() if k != "curves"}
    settings = {k: v for k, v in calibration.items() if k not in ("findings", "summary", "jointly")}
    return {**settings, **found, "format": 2 if "platt" in calibration else 1}


def test_every_script_takes_an_older_calibration(own_runs, monkeypatch):
    """The same predictions, report and watch as of the present one; scores are not computed again."""
    folder = own_runs / "outputs/linear"
    path, log = folder / "calibration.json", own_runs / "log.csv"
    present = read_json(path)
    log.write_text(f"path,score,diagnosis\na.png,{of_one(present)['threshold']},PNEUMONIA\n")
    images = read_json(folder, "results.json")["data"]["data_dir"]
    commands = [
        ("predict", images, "--run", folder),
        ("compare", "--run", folder),
        ("monitor", "--run", folder, log),
    ]
    expected = [succeed(*argv, cwd=own_runs) for argv in commands]
    write_json(path, older(present))
    assert Run(folder).calibration() == present
    for argv, done in zip(commands, expected):
        again = succeed(*argv, cwd=own_runs)
        assert (again.out, again.err) == (done.out, done.err), argv[0]
    assert len(tables(expected[1].out)) > 5
    monkeypatch.setattr(scores_module, "predict", lambda *a, **k: pytest.fail("scored again"))
    succeed("calibrate", "--run", folder, "--min-recall", 0.9, cwd=own_runs)
    assert {**read_json(path), "command": None} == {**present, "command": None}
    path.write_text(json.dumps({**present, "format": CALIBRATION + 1}))
    refused(cli("compare", "--run", folder, cwd=own_runs), f"format {CALIBRATION + 1}", "update")
