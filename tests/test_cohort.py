"""Tests of who took part (cohort/who) and of what the report says of it (report/cohort)."""

from dataclasses import replace

import numpy as np
import pytest

from cohort.groups import console_lines
from cohort.who import Asked, age_bands, columns_of, of_units, summary
from common.console import InputError
from common.task import Task
from images.describe import of_sides
from layouts.listing import Index
from report.render import to_markdown
from report.rows import Entry
from report.tables.cohort import cohort_blocks, flow_rows, group_blocks, groups_on
from tests.shared import cli, refused, succeed, tables
from tests.test_compare import RULE, edit_results, write_run

ASKED = Asked(age_bands())


def scores_of(people=120, images=1, seed=0, **columns):
    """Arrays of a calibrated run, `people` patients a side: every second one is sick, and found but for those
    where sex is F. `columns`: {name: function of the patients' numbers [N]}."""
    rng, arrays = np.random.default_rng(seed), {}
    for side in ("val", "test"):
        whose = np.repeat(np.arange(people), images)
        labels = (whose % 2).astype(np.int64)
        logits = np.zeros((len(whose), 2), np.float32)
        logits[:, 1] = np.where(labels == 1, 2, -2) + rng.normal(size=len(whose)) / 2
        if side == "test":
            logits[(labels == 1) & (whose % 3 == 0), 1] = -3
        arrays |= {
            f"{side}_files": np.array([f"{side}/{i:04}.png" for i in range(len(whose))]),
            f"{side}_patients": np.array([f"{side}{k}" for k in whose]),
            f"{side}_labels": labels,
            f"{side}_logits": logits,
        }
        for name, column in columns.items():
            arrays[f"{side}_cohort_{name}"] = column(whose)
    return arrays


def sexes(whose):
    return np.where(whose % 3 == 0, "F", "M")


def ages(whose):
    return np.where(whose % 10 == 0, np.nan, 0.5 + whose % 60)


def views(whose):
    return np.full(len(whose), "PA")


def machines(whose):
    return np.array([f"maker {k % 40}" for k in whose])


ALL = dict(sex=sexes, age=ages, view=views, machine=machines)


# ---------------------------------------------------------------- a summary


def test_a_summary_counts_people_and_images():
    files = [f"{i}.png" for i in range(7)]
    patients = ["a", "a", "b", "b", "c", "5.png", "6.png"]
    cohort = {
        "study": np.array(["s1", "s2", "s3", "s3", "", "", ""]),
        "age": np.array([41.0, 40.0, 0.25, np.nan, np.nan, 70.0, -3.0]),
        "sex": np.array(["F", "", "F", "M", "M", "", "F"]),
        "view": np.array(["PA", "PA", "AP", "PA", "", "PA", "PA"]),
    }
    assert summary(files, patients, cohort) == {
        "images": 7,
        "patients": 3,
        "unknown_patients": 2,
        "studies": 3,
        "age": [40.0, 0.25, 70.0, 2],  # of a, b and 5.png; unknown of c and 6.png
        "sex": {"F": 2, "M": 1, "contradictory": 1, "unknown": 1},
        "view": {"PA": 5, "AP": 1, "unknown": 1},
    }
    assert summary(files, patients, None) == {"images": 7, "patients": 3, "unknown_patients": 2}
    nothing = {"age": np.full(7, np.nan), "sex": np.full(7, "")}
    assert summary(files, patients, nothing)["age"] == [None, None, None, 5]


def test_many_machines_are_summed_up():
    machine = np.array([f"m{k:02}" for k in range(40)] + ["m00"] * 3)
    found = summary(np.arange(43).astype(str), np.arange(43).astype(str), {"machine": machine})["machine"]
    assert len(found) == 31 and found["m00"] == 4 and found["10 other values"] == 10


def test_training_writes_prevalences_of_known_labels():
    targets = np.array([[1, 0], [0, -1], [-1, -1]], np.int8)
    index = Index(["a", "b", "c"], targets, ["p", "p", "c"], np.ones(3, bool), np.full(3, ""))
    found = of_sides(Task(("x", "y"), "sigmoid"), {"train": index})["train"]
    assert found["findings"] == {"x": [1, 1], "y": [0, 1]} and found["patients"] == 1


def test_a_study_has_the_value_its_images_agree_on():
    numbers = np.array([0, 0, 1, 1, 2, 2])
    cohort = {
        "sex": np.array(["F", "", "F", "M", "", ""]),
        "age": np.array([3.0, 2.5, np.nan, 7.0, np.nan, np.nan]),
    }
    found = of_units(cohort, numbers)
    assert found["sex"].tolist() == ["F", "", ""]
    assert found["age"][:2].tolist() == [2.5, 7.0] and np.isnan(found["age"][2])


@pytest.mark.parametrize("values", [np.arange(3), np.array(["F", "M"]), np.full((3, 1), "F")])
def test_damaged_columns_are_refused(values):
    arrays = {"val_files": np.array(["a", "b", "c"]), "val_cohort_sex": values}
    with pytest.raises(InputError, match="val_cohort_sex"):
        columns_of(arrays, "val")


# ---------------------------------------------------------------- the report


def test_the_report_opens_with_who_took_part(tmp_path):
    """The numbers are those of `scores_of`, by hand; training's are what was recorded."""
    recorded = {"images": 9, "patients": 7, "unknown_patients": 1, "findings": {"PNEUMONIA": [3, 6]}}
    recorded |= {"age": [5.0, 1.0, 80.0, 2], "sex": {"F": 4, "unknown": 4}, "studies": 8}
    run = write_run(tmp_path / "a", scores=scores_of(**ALL), split={"cohort": {"train": recorded}})
    _, table, text, flow = cohort_blocks([Entry(run)])
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["Images"] == ["9", "120", "120"] and rows["Studies"] == ["8", "-", "-"]
    assert rows["Patients"] == ["7; unknown: 1 images", "120", "120"]
    middle = np.median([0.5 + k % 60 for k in range(120) if k % 10])
    assert (
        rows["Age in years: median (range)"]
        == ["5 (1 to 80); unknown: 2"] + [f"{middle:.3g} (1.5 to 59.5); unknown: 12"] * 2
    )
    assert rows["Sex (patients)"] == ["F 4, unknown 4", *["M 80, F 40"] * 2]
    assert rows["View (images)"][1:] == ["PA 120"] * 2
    assert rows["With PNEUMONIA"] == ["3 of 9 (33.3%)", *["60 of 120 (50.0%)"] * 2]
    assert "earlier version" not in text.text and "was not recorded" in flow.text


def test_a_set_that_tells_nothing_says_so_in_one_line(tmp_path):
    run = write_run(tmp_path / "outputs/a", scores=scores_of())
    entry = Entry(run)
    assert group_blocks([entry], ASKED) == []
    text = succeed("compare", cwd=tmp_path).out
    assert text.count("tells nothing of its patients") == 1 and "Groups of patients" not in text
    assert "An earlier version trained" in text
    assert ["Images", "200", "120", "120"] in [table[1] for table in tables(text)]


def test_the_flow_says_where_images_were_left_out(tmp_path):
    flow = [["listed", 100], ["found", 90], ["view", 80], ["labelled", 80], ["readable", 79]]
    flow += [["train", 40], ["val", 10], ["test", 20]]
    rows = flow_rows(flow)
    assert [row[2] for row in rows] == ["-", "10", "10", "0", "1", "-", "-", "-", "-"]
    assert rows[-1][:2] == ["on no side", "9"]
    run = write_run(tmp_path / "outputs/a", scores=scores_of(), split={"flow": flow})
    assert "From what is listed to the images used" in succeed("compare", cwd=tmp_path).out
    for damaged in ("ten", [["listed"]], [["listed", -1]], [[3, 3]], [["listed", "3"]]):
        edit_results(run, lambda results: results["split"].update(flow=damaged))
        refused(cli("compare", cwd=tmp_path), "split.flow")


@pytest.mark.parametrize(
    "cohort",
    [
        [],
        {"val": {}},
        {"train": {"images": 3}},
        {"train": {"images": 3, "patients": 1, "unknown_patients": 0, "findings": {"x": [1]}}},
        {"train": {"images": 3, "patients": 1, "unknown_patients": 0, "findings": {}, "sex": {"F": "3"}}},
        {"train": {"images": 3, "patients": 1, "unknown_patients": 0, "findings": {}, "age": [3, 2]}},
    ],
)
def test_a_damaged_cohort_is_refused(tmp_path, cohort):
    write_run(tmp_path / "outputs/a", scores=scores_of(), split={"cohort": cohort})
    refused(cli("compare", cwd=tmp_path), "split.cohort")


# ---------------------------------------------------------------- groups in the report


def test_a_broken_group_is_found_and_named(tmp_path):
    run = write_run(tmp_path / "outputs/a", scores=scores_of(300, **ALL))
    found, notes = groups_on(Entry(run), "PNEUMONIA", "test", ASKED)
    names = [" ".join(group) for group in found["groups"]]
    assert names[:2] == ["sex F", "sex M"] and names[-1] == "view PA"
    assert "age 0-1" not in names and "age unknown: 30 patients, in no group of it" in notes
    assert "machine: fewer than 10 patients, so no group" in "; ".join(notes)
    women, men = found["figures"]["recall @Rec"][:2]
    assert women["value"] == 0 and women["broken"] and women["adjusted"] < 0.01
    assert men["value"] > 0.8 and not men["broken"] and men["gap"] == -women["gap"]
    everybody = found["figures"]["recall @Rec"][-1]
    assert "adjusted" not in everybody and everybody["rest"] == 0
    done = succeed("compare", "--html", "r.html", cwd=tmp_path)
    assert "recall @Rec of sex F is 0.000, floor 0.9" in done.out and "BROKEN" in done.out
    [table] = [t for t in tables(done.out) if t[0][0] == "Group" and t[0][-2].startswith("specificity")][:1]
    assert table[1][0] == "sex F" and table[1][1] == "50 / 50"


def test_groups_of_studies_and_of_other_columns(tmp_path):
    """By patient, two images each; --subgroups, and bands of one's own."""
    columns = dict(ALL, ward=lambda whose: np.where(whose % 4 < 2, "north", ""))
    write_run(tmp_path / "outputs/a", scores=scores_of(80, images=2, **columns))
    done = succeed("compare", "--subgroups", "ward, sex", "--age-bands", "0-18,18+", cwd=tmp_path)
    groups = {row[0]: row[1] for table in tables(done.out) if table[0][0] == "Group" for row in table[1:]}
    assert set(groups) == {"sex F", "sex M", "age 0-18", "age 18+", "view PA", "ward north"}
    assert groups["ward north"] == "20 / 20" and "ward unknown: 40 patients" in done.out


def test_groups_of_a_run_that_decides_by_patient(tmp_path):
    """Two images a patient; those of every fourth disagree on the view, so that it is of no view."""
    rule = replace(RULE, by="patient")

    def view(whose):
        return np.where(np.arange(len(whose)) % 8 < 7, "PA", "AP")

    scores = scores_of(80, images=2, sex=sexes, view=view)
    entry = Entry(write_run(tmp_path / "a", scores=scores, rule=rule))
    assert entry.unit == "patients" and entry.people["test"]["images"] == 160
    assert len(entry.cohort["test"]["sex"]) == 80
    found, notes = groups_on(entry, "PNEUMONIA", "test", ASKED)
    assert found["groups"] == [["sex", "F"], ["sex", "M"], ["view", "PA"]]
    assert found["patients"][2] == [20, 40] and notes == ["view unknown: 20 patients, in no group of it"]


def test_groups_of_a_site_on_the_console():
    arrays = scores_of(120, **ALL)
    scores = 1 / (1 + np.exp(-arrays["test_logits"][:, 1:].astype(float)))
    images = arrays["test_labels"][:, None], scores, arrays["test_patients"]
    found = {"threshold": 0.5, "guarantee": {"threshold": None}}
    calibration = {"min_recall": 0.9, "findings": {"x": found}}
    sex = {"sex": arrays["test_cohort_sex"]}
    title, head, women, men, *others = console_lines("run at clinic", (*images, sex), calibration, ASKED)
    assert title == "run at clinic: groups of patients, as shipped: x"
    assert head.split()[:3] == ["Group", "Patients", "with"] and len(head) == len(women) == len(men)
    assert women.startswith("  sex F ") and "0.000 [0.000, " in women and "BROKEN" in women
    assert men.startswith("  sex M ") and "BROKEN" not in men
    assert "  warning: recall @Rec of sex F is 0.000, floor 0.9" in others
    assert not [line for line in others if "sex M" in line]  # the same gap, from the other side
    [line] = console_lines("run at clinic", (*images, None), calibration, ASKED)
    assert "no age, sex, view or machine is known" in line


def test_groups_need_a_report_of_a_site(tmp_path):
    refused(cli("calibrate", "--subgroups", "ward", cwd=tmp_path), "--site DIR --report")
    refused(cli("calibrate", "--age-bands", "0-18,18+", cwd=tmp_path), "--site DIR --report")


def test_wrong_groups_are_refused(tmp_path):
    write_run(tmp_path / "outputs/a", scores=scores_of(sex=sexes, ward=machines))
    refused(cli("compare", "--subgroups", "wrad", cwd=tmp_path), "wrad", "sex, ward")
    refused(cli("compare", "--age-bands", "0-18,17+", cwd=tmp_path), "--age-bands", "overlap")
    write_run(tmp_path / "none/a", scores=scores_of())
    refused(cli("compare", "--runs-dir", "none", "--subgroups", "sex", cwd=tmp_path), "there are: none")


def test_hostile_values_are_escaped(tmp_path):
    odd = "a|b<img src=x>`\n"
    scores = scores_of(sex=sexes, machine=lambda whose: np.where(whose % 2 < 2, odd, ""))
    text = to_markdown(group_blocks([Entry(write_run(tmp_path / "a", scores=scores))], ASKED))
    assert "<img" not in text and all(
        len(row) == len(t[0]) for t in tables(text.replace("\\|", "")) for row in t
    )
