"""Tests of compare: entries (rows), report (tables), render (escapes) and plots.

Most work on run folders written here by hand, with real thresholds and intervals but no trained model."""

import copy
import csv
import functools
import itertools
import json
import os
import re
import shutil
import stat
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import compare
import metrics
from calibration.operating_point import Rule, evaluate
from calibration.wording import show_probabilities
from cohort.who import Asked, age_bands
from common.console import printable
from common.files import FORMAT, write_json
from common.task import Task
from images.split import say_shared
from records import curves
from records.curves import label, panels
from records.run import Run
from report import rows as rows_module
from report.page.build import to_html
from report.render import (
    Bad,
    Best,
    Bullets,
    Code,
    Heading,
    Link,
    Table,
    markdown_text,
    slug,
    to_markdown,
)
from report.rows import Entry
from report.tables import main as tables_module
from report.tables.cohort import groups_on
from report.tables.evidence import map_blocks
from report.tables.method import shared_text
from report.tables.models import MORE, main_rows
from report.tables.pairs import pair_blocks
from report.tables.probabilities import predictive_blocks
from report.view import missing_ensembles, view_of
from tests.fixtures import FLOOR
from tests.shared import (
    HEADER,
    LINK,
    NAMES,
    REPO,
    cli,
    of_one,
    read_json,
    refused,
    succeed,
    tables,
    with_changes,
)
from vit import CONFIGS

NASTY = "a$b_c|d`e<img src=x>*f*](g)\\h\ni\x1bj\udcff"  # matplotlib, markdown, HTML, terminals, UTF-8
ASKED = Asked(age_bands())
RULE = Rule(min_recall=0.9, confidence=0.9, bootstrap=100)
SCRATCH = {"kind": "vit", **CONFIGS["scratch"]}


def noisy_scores(seed, classes=("NORMAL", "PNEUMONIA"), known=True):
    """Scores of a fair model: 60 validation and 48 test images, two a patient, the patients known or not."""
    rng, arrays = np.random.default_rng(seed), {}
    for side, count in (("val", 60), ("test", 48)):
        labels = (np.arange(count) % 4 > 1).astype(np.int64)
        causes = ["bacteria" if i % 3 else "virus" for i in range(count)]
        files = [f"{side}/{classes[k]}/person{i // 2}_{causes[i]}_{i}.jpeg" for i, k in enumerate(labels)]
        patients = [f"person{i // 2}" for i in range(count)] if known else files
        logits = rng.normal(size=(count, 2)).astype(np.float32)
        logits[:, 1] += 2 * labels
        columns = dict(files=np.array(files), patients=np.array(patients), labels=labels, logits=logits)
        arrays |= {f"{side}_{k}": v for k, v in columns.items()}
    return arrays


@functools.cache
def evaluated(seed, classes, rule):
    """What calibrate.py makes of `noisy_scores`."""
    return evaluate(noisy_scores(seed, classes), rule, Task(classes))


def write_run(folder, seed=0, *, scores=None, suffix="", rule=RULE, with_p1=True, **changes):
    """A calibrated run on disk -> Run. `changes` replace keys of results.json."""
    classes = changes.get("data", {}).get("classes", ["NORMAL", "PNEUMONIA"])
    if scores:
        calibration, p1 = evaluate(scores, rule, Task(tuple(classes)))
    else:
        scores = noisy_scores(seed, classes)
        calibration, p1 = copy.deepcopy(evaluated(seed, tuple(classes), rule))
    counts = {
        s: {c: int((scores[f"{s}_labels"] == k).sum()) for k, c in enumerate(classes)}
        for s in ("val", "test")
    }
    sizes = {s: len(scores[f"{s}_labels"]) for s in ("val", "test")}
    split = dict(train=200, **sizes, counts={"train": {c: 100 for c in classes}, **counts})
    split |= dict(shared_patients=0, fingerprint="f", synthetic=False, set="hospital")
    settings = dict(img_size=32, resize="squash", split="patient", split_seed=0, classes=classes)
    history = [dict(train_loss=0.7 - 0.1 * i, val_loss=0.6, val_auroc=0.7 + 0.1 * i) for i in range(3)]
    results = dict(format=FORMAT, model="scratch", model_config=SCRATCH, params=5_000_000, minutes=2.0)
    results |= dict(
        synthetic=False, split=split, data=settings, recipe={"amp": False, "seed": seed}, seed=seed
    )
    results |= dict(history=history, best_epoch=3, mean=[0.5], std=[0.5], finished=True)
    results |= dict(command="python train_scratch.py", device="cpu", versions={"torch": "2.6"})
    results |= {k: {**results.get(k, {}), **v} if k in ("split", "data") else v for k, v in changes.items()}
    run = Run(folder)
    run.folder.mkdir(parents=True, exist_ok=True)
    run.checkpoint.write_bytes(f"weights {folder} {seed}".encode(errors="surrogatepass"))
    run.save_results(results)
    calibration |= dict(format=FORMAT, checkpoint=run.checkpoint_sha256, tta=None)
    calibration["tta"] = {"flip": False} if suffix else None
    columns = {f"{side}_p1": p for side, p in p1.items()} if with_p1 else {}
    run.save_calibration(calibration, {**scores, **columns}, suffix)
    return run


def write_ensemble(folder, members, **changes):
    """An ensemble of runs, as calibrate.py writes it, with scores of its own."""
    about = [{"run": str(m), "checkpoint": m.checkpoint_sha256, "model": m.results["model"]} for m in members]
    config = dict(kind="ensemble", members=[m.results["model_config"] for m in members])
    settings = dict(model="ensemble", model_config=config, members=about, history=[], best_epoch=0)
    return write_run(folder, 99, **{**settings, **changes})


def edit_results(run, change):
    results = read_json(run.folder, "results.json")
    change(results)
    run.save_results(results)


# ---------------------------------------------------------------- rows


def test_architectures_are_those_of_vit(shipped_scratch):
    keys = ("embed_dim", "depth", "num_heads", "patch_size")
    assert {k: shape for k, (_, shape) in rows_module.ARCHITECTURES.items()} == {
        name: tuple(config[k] for k in keys) for name, config in CONFIGS.items()
    }


@pytest.mark.parametrize(
    "model, shape, name",
    [
        ("scratch", (256, 6, 8, 16), "ViT scratch"),
        ("scratch", (128, 4, 4, 8), "ViT scratch 128x4, patch 8"),
        ("ti16", (192, 12, 3, 16), "ViT-Ti/16"),
        ("b16", (768, 12, 12, 16), "ViT-B/16"),
        ("b16", (384, 12, 6, 32), "ViT 384x12, patch 32"),  # what old versions called b16
        ("b16", (384, 12, 6, 16), "ViT-S/16"),
        ("vit-d384-l12-h6-p32", (384, 12, 6, 32), "ViT 384x12, patch 32"),
        ("my-model", (384, 12, 6, 32), "my-model"),
    ],
)
def test_architecture_is_named_by_what_it_is(model, shape, name, shipped_scratch):
    config = {"kind": "vit", **dict(zip(rows_module.SIZES, shape))}
    assert rows_module.architecture(model, config) == name


def test_architecture_of_other_kinds_and_damage():
    wide = {**SCRATCH, "mlp_ratio": 3}
    assert rows_module.architecture("scratch", wide) == "ViT scratch 64x2, patch 16, MLP ratio 3"
    assert (
        rows_module.architecture("linear", {"kind": "linear", "side": 48}) == "Logistic regression 48x48 px"
    )
    for config in ({"kind": "linear", "side": "x"}, {"kind": "vit", "embed_dim": [1]}, {"kind": "vit"}):
        assert rows_module.architecture("b16", config) == "b16"


@pytest.mark.parametrize("applied", [False, True])
def test_scores_that_were_not_saved_are_computed(tmp_path, applied):
    rule = Rule(min_recall=0.9, bootstrap=100, temperature=applied)
    kept, computed = (
        Entry(write_run(tmp_path / name, rule=rule, with_p1=with_p1))
        for name, with_p1 in (("kept", True), ("computed", False))
    )
    temperature = kept.calibration["temperature"]
    for side in ("val", "test"):
        a, b = (entry.column("PNEUMONIA", side) for entry in (kept, computed))
        np.testing.assert_allclose(b.scores, a.scores, rtol=1e-12)
        logits = noisy_scores(0)[f"{side}_logits"][np.argsort(noisy_scores(0)[f"{side}_files"])].astype(float)
        odds = np.exp((logits[:, 1] - logits[:, 0]) / temperature)
        np.testing.assert_allclose(a.probabilities, odds / (1 + odds), rtol=1e-12)
        assert np.allclose(a.scores, a.probabilities, rtol=1e-12) == applied
    val, row = kept.column("PNEUMONIA", "val"), kept.row("PNEUMONIA", "val", "at_rec")
    assert ((val.scores >= row["thr"]) & (val.truth == 1)).sum() == row["tp"]
    assert row["thr"] == kept.calibrated["PNEUMONIA"]["threshold"]


def test_order_of_the_images_does_not_matter(tmp_path):
    """The same images in another order are the same test set, and are compared image by image."""
    scores, order = noisy_scores(0), np.random.default_rng(1).permutation(48)
    mixed = {k: v[order] if k.startswith("test") else v for k, v in scores.items()}
    a, b = Entry(write_run(tmp_path / "a")), Entry(write_run(tmp_path / "b", scores=mixed))
    assert a.group == b.group and np.array_equal(a.columns["test"].scores, b.columns["test"].scores)
    [*_, table] = pair_blocks([a, b])
    assert table.rows[0][1].startswith("+0.000 [+0.000, +0.000], p = 1")


DAMAGE = {
    "no classes": lambda r: r["data"].pop("classes"),
    "classes are numbers": lambda r: r["data"].update(classes=[0, 1]),
    "one class": lambda r: r["data"].update(classes=["NORMAL"]),
    "three classes": lambda r: r["data"].update(classes=["a", "b", "c"]),
    "an image size in words": lambda r: r["data"].update(img_size="large"),
    "no shared_patients": lambda r: r["split"].pop("shared_patients"),
    "a list as init": lambda r: r.update(init=[]),
    "a list as weights": lambda r: r.update(weights=[]),
    "strings as members": lambda r: r.update(members=["a", "b"]),
    "a list as seed": lambda r: r.update(seed=[1]),
    "a list as versions": lambda r: r.update(versions=[]),
    "a number as command": lambda r: r.update(command=7),
    "a list as kind": lambda r: r.update(model_config={"kind": ["vit"]}),
    "strings as history": lambda r: r.update(history=["epoch 1"]),
    "masked pretraining": lambda r: r["model_config"].update(kind="mae"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_compare_of_damaged_results(tmp_path, damage):
    run = write_run(tmp_path / "outputs/broken")
    edit_results(run, DAMAGE[damage])
    refused(cli("compare", "--run", "outputs/broken", cwd=tmp_path), "broken")
    assert not (tmp_path / "outputs/figures").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"test_p1": np.full(48, np.nan)},
        {"test_p1": np.full(48, 2.0)},
        {"test_p1": np.full(47, 0.5)},
        {"test_p1": np.full((48, 2), 0.5)},
        {"test_p1": np.full(48, "0.5")},
        {"test_labels": np.ones(48, np.int64)},
        {"val_labels": np.full(60, 7)},
        {"test_logits": np.zeros((48, 3), np.float32)},
    ],
    ids=["NaN", "above 1", "too short", "two columns", "text", "one class", "unknown class", "three logits"],
)
def test_compare_of_damaged_scores(tmp_path, change):
    run = write_run(tmp_path / "outputs/broken")
    run.save_calibration(run.calibration(), {**run.scores(), **change})
    refused(cli("compare", cwd=tmp_path), "broken", "calibrate.py again")


def test_patients_unknown(tmp_path):
    """Where file names do not tell patients, no sentence of the report claims to know them."""
    unknown = noisy_scores(0, known=False)
    for name, split in (("old", {}), ("new", {"unknown_patients": 260})):
        entry = Entry(write_run(tmp_path / name, scores=unknown, split=split))
        text = to_markdown(tables_module.section(view_of([entry], ASKED)))
        assert shared_text(entry) == say_shared({**entry.results["split"], "unknown_patients": 260})
        assert "patients unknown, so images of one patient may be on both sides" in text
        assert "single images (patients unknown)" in text and "unknown validation, unknown test" in text
        assert "whole patients" not in text and "0 validation images share" not in text


@pytest.mark.parametrize("unknown", [None, 0, 5, 260])
def test_shared_patients_are_told_as_in_training(tmp_path, unknown):
    split = {"shared_patients": 3} | ({} if unknown is None else {"unknown_patients": unknown})
    entry = Entry(write_run(tmp_path / "r", split=split))
    assert shared_text(entry) == say_shared(entry.results["split"])


# ---------------------------------------------------------------- which rows belong together


def test_seeds_ensembles_and_who_stands_for_whom(tmp_path):
    runs = [write_run(tmp_path / "outputs" / f"scratch-seed{i}", i) for i in range(3)]
    write_run(tmp_path / "outputs/again", 2)  # seed 2 once more: counts once
    [group] = rows_module.load_entries(tmp_path / "outputs")
    [family] = rows_module.families(group)
    assert sorted(e.results["seed"] for e in family) == [0, 1, 2]
    [(name, count, command)] = missing_ensembles(group)
    assert name.startswith("ViT scratch") and count == 3 and rows_module.without_members(group) == group
    assert command.startswith("python calibrate.py --ensemble ") and "-ensemble" in command.split("--out ")[1]

    shutil.rmtree(tmp_path / "outputs/again")
    part = write_ensemble(tmp_path / "outputs/part", runs[:2])
    [group] = rows_module.load_entries(tmp_path / "outputs")
    assert [e.run.folder.name for e in rows_module.without_members(group)] == ["part", "scratch-seed2"]
    assert len(missing_ensembles(group)) == 1  # no ensemble holds all three
    shutil.rmtree(part.folder)

    write_ensemble(tmp_path / "outputs/all", runs)
    [group] = rows_module.load_entries(tmp_path / "outputs")
    assert [e.name for e in rows_module.without_members(group)] == ["ViT scratch, ensemble of 3 (all)"]
    assert not missing_ensembles(group) and len(rows_module.families(group)) == 1
    text = to_markdown(tables_module.section(view_of(group, ASKED)))
    marks, main, behind, shift = tables(text)[:4]
    assert marks[0] == ["Mark", "ViT scratch, ensemble of 3 (all)"] and len(marks) - 1 == 8
    assert [row[0] for row in main[1:]] == ["ViT scratch, ensemble of 3 (all)"]
    assert [row[0] for row in behind[1:]] == ["ViT scratch, 3 seeds"] + [
        f"ViT scratch (scratch-seed{i})" for i in range(3)
    ]
    assert all("ensemble of 3" in row[0] for row in shift[1:])
    assert "--ensemble" not in text and "Which model is better" not in text


def test_an_ensemble_does_not_stand_for_augmented_members(tmp_path):
    """Scores with test-time augmentation are rows of their own; so is what replaces them."""
    runs = [write_run(tmp_path / f"outputs/s-seed{i}", i) for i in range(2)]
    for i in range(2):
        write_run(tmp_path / f"outputs/s-seed{i}", i, suffix="tta")
    write_ensemble(tmp_path / "outputs/s-ensemble", runs)
    [group] = rows_module.load_entries(tmp_path / "outputs")
    assert [(e.run.folder.name, e.suffix) for e in rows_module.without_members(group)] == [
        ("s-ensemble", ""),
        ("s-seed0", "tta"),
        ("s-seed1", "tta"),
    ]
    [(_, _, command)] = missing_ensembles(group)
    assert command.endswith(" --tta")


@pytest.mark.parametrize("change", [{"split": {"fingerprint": "g"}}, {"recipe": {"amp": False, "lr": 1.0}}])
def test_runs_that_differ_in_more_than_the_seed_are_no_family(tmp_path, change):
    write_run(tmp_path / "a-seed0", 0)
    write_run(tmp_path / "a-seed1", 1, **change)
    [group] = rows_module.load_entries(tmp_path)
    assert missing_ensembles(group) == []


def test_one_recipe_whose_paths_are_spelled_differently_is_one_family(tmp_path):
    """A folder and a file have many names; what is in them tells models apart."""
    weights = {"sha256": "w", "source": "timm"}
    for seed, place in enumerate(("kx", "./kx", "/kaggle/input/kx")):
        paths = {k: f"{place}/{k}" for k in ("data_dir", "patients", "lungs", "cache_dir")}
        paths |= {"also": [f"{place}2"], "verify_cache": seed > 0}
        more = dict(weights={"path": f"{place}/w.npz", **weights}, split={"also": {"kx2": {"train": 9}}})
        write_run(tmp_path / f"a-seed{seed}", seed, data=paths, **more)
    [group] = rows_module.load_entries(tmp_path)
    assert [len(family) for family in rows_module.families(group)] == [3]
    [standing] = view_of(group, ASKED).standings
    assert [len(c.entries) for c in standing.candidates] == [3]
    [(_, count, _)] = missing_ensembles(group)
    assert count == 3
    for place in ("t.csv", "./t.csv"):
        group[0].results["data"]["labels"] = place
        assert group[0]._family() == group[0].family


@pytest.mark.parametrize(
    "change",
    [
        {"split": {"set": "hospital, contrast stretched"}},
        {"split": {"also": {"elsewhere": {"train": 9}}}},
        {"data": {"lungs_sha256": "other masks"}},
        {"weights": {"path": "w.npz", "sha256": "other"}},
        {"teacher": {"run": "t", "model": "b16", "minutes": 1.0, "checkpoint": "c"}},
        {"init": {"run": "mae", "minutes": 1.0, "checkpoint": "c"}},
    ],
)
def test_runs_of_other_files_are_no_family(tmp_path, change):
    same = {"weights": {"path": "w.npz", "sha256": "w"}}
    write_run(tmp_path / "a-seed0", 0, **same)
    write_run(tmp_path / "a-seed1", 1, **{**same, **change})
    [group] = rows_module.load_entries(tmp_path)
    assert rows_module.families(group) == []


def test_mixed_ensemble_and_folders_of_one_name(tmp_path):
    a = write_run(tmp_path / "x/scratch")
    b = write_run(tmp_path / "y/scratch", 1, model="ti16", model_config={**SCRATCH, "embed_dim": 192})
    write_ensemble(tmp_path / "x/both", [a, b])
    write_run(tmp_path / "z/scratch", 2)
    [group] = rows_module.load_entries(
        None, [tmp_path / f for f in ("x/scratch", "y/scratch", "z/scratch", "x/both")]
    )
    assert [e.name for e in group] == [
        f"ViT scratch in {tmp_path / 'x'}",
        "ViT 192x2, patch 16",
        f"ViT scratch in {tmp_path / 'z'}",
        "Ensemble of 2 models (both)",
    ]


def test_time_includes_masked_pretraining(tmp_path):
    entry = Entry(write_run(tmp_path / "scratch", init={"run": "mae", "checkpoint": "c", "minutes": 1.5}))
    assert entry.name == "ViT scratch, masked pretraining" and entry.minutes == 3.5
    assert main_rows([entry])[0][3] == "3.5" and entry.run.results["minutes"] == 2.0


# ---------------------------------------------------------------- tables


def test_classes_are_those_of_the_run(tmp_path):
    """Nothing in the report is called NORMAL or PNEUMONIA unless the run's classes are."""
    made = {"data": {"classes": ["clear", "effusion"]}}
    rows = [Entry(write_run(tmp_path / f"run{i}", i, **made)) for i in range(2)]
    blocks = tables_module.section(view_of(rows, ASKED))
    for text in (to_markdown(blocks), to_html(blocks, False)):
        assert "48 images (24 clear, 24 effusion)" in text and "effusion: validation" in text
        assert not re.search("PNEUMONIA|[Pp]neumonia|NORMAL", text)


def test_predictive_values_share_one_prevalence(tmp_path):
    """Columns are headed by one prevalence, also where runs were calibrated with different ones."""
    a = Entry(write_run(tmp_path / "a"))
    b = Entry(write_run(tmp_path / "b", rule=Rule(min_recall=0.9, bootstrap=100, prevalence=0.3)))
    _, table = predictive_blocks([a, b])
    assert table.head[3:] == ["PPV at 10%", "NPV at 10%"] and table.rows[0][1:] == table.rows[1][1:]


def test_a_rare_finding_is_not_shown_as_0_percent(tmp_path, capsys):
    """In the report and by calibrate.py."""
    run = write_run(tmp_path / "a", rule=Rule(min_recall=0.9, bootstrap=100, prevalence=0.001))
    text, table = predictive_blocks([Entry(run)])
    assert "assume a prevalence of 0.1%, with" in text.text and table.head[3:] == [
        "PPV at 0.1%",
        "NPV at 0.1%",
    ]
    show_probabilities(of_one(run.calibration()), run.calibration())
    assert "if 0.1% of the patients were sick, @Rec on test: PPV " in capsys.readouterr().out


def test_causes_are_groups_where_names_tell_them(tmp_path):
    scores = noisy_scores(0)
    entry = Entry(write_run(tmp_path / "a", scores=scores))
    test, threshold = entry.column("PNEUMONIA", "test"), entry.calibrated["PNEUMONIA"]["threshold"]
    inside = (test.truth == 1) & np.array(["virus" in f for f in test.files])
    found, _ = groups_on(entry, "PNEUMONIA", "test", ASKED)
    assert found["groups"] == [["cause", "bacteria"], ["cause", "virus"]]
    recall = found["figures"]["recall @Rec"][1]
    if "value" in recall:
        assert recall["value"] == pytest.approx((test.scores >= threshold)[inside].mean())
    scores["test_files"] = np.array([f"test/{i}.png" for i in range(48)])
    assert (
        groups_on(Entry(write_run(tmp_path / "b", scores=scores)), "PNEUMONIA", "test", ASKED)[0]["groups"]
        == []
    )


def map_report(run, **changes):
    span = {"mean": -0.1, "lo": -0.2, "hi": 0.05}
    tests = {f"{k}_minus_random": span for k in ("deletion", "insertion")}
    tests |= {"lung_share": span, "border_share": span, "lung_area": 0.4, "border_area": 0.19}
    tests["randomised"] = [{"rank_correlation": 0.5}, {"rank_correlation": 0.1}]
    about = {"checkpoint": run.checkpoint_sha256, "split": "val", "target": "NORMAL"}
    (run.folder / "explain").mkdir(exist_ok=True)
    write_json(run.folder / "explain/explain.json", {**about, "rollout": tests, **changes})


def test_tests_of_maps(tmp_path, capsys):
    run = write_run(tmp_path / "outputs/scratch")
    map_report(run)
    heading, text, table = map_blocks([Entry(run)])
    assert "validation images rightly called NORMAL" in text.text
    assert table.rows == [
        ["ViT scratch, attention rollout", *["-0.100 [-0.200, +0.050]"] * 2]
        + ["-0.10 [-0.20, 0.05] of 0.40", "-0.10 [-0.20, 0.05] of 0.19", "0.50", "0.10"]
    ]
    map_report(run, checkpoint="another")
    assert map_blocks([Entry(run)]) == [] and "another checkpoint" in capsys.readouterr().err
    for damage in ({"rollout": []}, {"gradcam": {}}, {"rollout": 3}):
        map_report(run, **damage)
        refused(cli("compare", cwd=tmp_path), "scratch", "explain.py again")


# ---------------------------------------------------------------- rendering and escapes


def test_markdown_escapes():
    assert markdown_text("a|b\nc*d*`e`<f>](g) \\") == "a\\|b c\\*d\\*\\`e\\`&lt;f>]\\(g) \\\\"
    assert markdown_text("$x$ ~a~ &amp; _a_b_") == "\\$x\\$ \\~a\\~ \\&amp; \\_a_b\\_"
    assert markdown_text(("run ", Code("a`b|c <d>"), ".")) == "run `` a`b|c <d> ``."
    assert printable("a\udcff\x1b[0m\r\nbü→") == "a\\udcff\\x1b[0m bü→"
    block = Table(["Item", "Answer"], [["x|y", "z"]], prose=True)
    assert to_markdown([block]) == "| Item | Answer |\n| --- | --- |\n| x\\|y | z |"
    block = Table(["Item"], [[Code("x|y")]], prose=True)  # a table cannot hold a bare bar, a command can
    assert to_markdown([block]) == "| Item |\n| --- |\n| `x\\|y` |"


def test_blocks_of_a_report():
    """Best, Bad, links, bullets and groups of columns, in markdown and in HTML."""
    table = Table(
        ["Model", "Recall", "Recall", "Time"],
        [["a", Best("0.9"), (Bad("0.8"), " [0.7, 0.85]"), "1"]],
        groups=(("", 1), ("@Rec", 1), ("@0.5", 1), ("", 1)),
    )
    assert to_markdown([table]).splitlines() == [
        "| Model | Recall @Rec | Recall @0.5 | Time |",
        "| --- | ---: | ---: | ---: |",
        "| a | **0.9** | **0.8 ✗** [0.7, 0.85] | 1 |",
    ]
    page = to_html([table], False)
    assert re.search('<th colspan="1" [^>]*>@Rec</th>', page)
    assert "<b>0.9</b>" in page and ">0.8 ✗</b> [0.7" in page
    # Two test sets have headings of the same text: a link leads to that of its own set.
    link, lost = Link("see [it]", "#are-they-right"), Link("top", "#results")
    blocks = [
        Heading(1, "Results"),
        *[Heading(2, "Set"), Bullets([(link, "."), lost]), Heading(3, "Are they right?")] * 2,
    ]
    text = to_markdown(blocks)
    assert re.findall(r"\]\((.*?)\)", text) == [
        "#are-they-right",
        "#results",
        "#are-they-right-1",
        "#results",
    ]
    assert "- [see \\[it\\]](#are" in text
    page = Loads(to_html(blocks, False))
    expected = ["results", "set", "are-they-right", "set-1", "are-they-right-1"]
    assert [name for name in page.ids if name in expected] == expected
    links = ["#are-they-right", "#results", "#are-they-right-1", "#results"]
    assert page.links[-4:] == links and {link[1:] for link in page.links} <= set(page.ids)
    assert not page.found


@pytest.mark.parametrize(
    "text, anchor",
    [
        ("In short", "in-short"),
        ("Other images: are they like validation?", "other-images-are-they-like-validation"),
        ("@Rec 0.5, a_b - c", "rec-05-a_b---c"),
        ("Über 95% (of 3)", "über-95-of-3"),
    ],
)
def test_slugs_are_those_of_github(text, anchor):
    assert slug(text) == anchor


def test_printable_is_one_line_of_valid_unicode():
    text = printable("".join(map(chr, range(0x3000))) + "\udc80\ud800\U0010ffff")
    text.encode("utf-8")
    assert text.splitlines() == [text] and "\\udc80\\ud800" in text and "ü" in text and "\x1b" not in text


class Loads(HTMLParser):
    """Everything in a page that a browser would load or run, but its own script, which is allowed."""

    def __init__(self, page):
        super().__init__()
        self.found, self.pictures, self.photographs, self.links, self.ids = [], 0, 0, [], []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        about = dict(attrs)
        self.text = ""
        if tag == "script" and (about.get("type") == "application/json" or not attrs):
            pass  # data, or embedded: see handle_endtag
        elif tag in ("script", "link", "iframe", "object", "embed", "base", "form"):
            self.found.append(tag)
        for name, value in attrs:
            self.ids += [value] if name == "id" else []
            if name == "src" and (value or "").startswith("data:image/png;base64,"):
                self.pictures += 1
            elif name == "src" and (value or "").startswith("data:image/jpeg;base64,"):
                self.photographs += 1
            elif name == "href" and tag == "a" and (value or "").startswith("#"):
                self.links.append(value)
            elif name in ("src", "href", "srcset", "action", "data") or name.startswith("on"):
                self.found.append(f"{name}={value}")
            elif name == "style" or (name == "http-equiv" and value != "Content-Security-Policy"):
                self.found.append(name)
        if "http-equiv" in about and not about["content"].startswith("default-src 'none'; img-src data:;"):
            self.found.append("policy")

    def handle_data(self, text):
        self.text += text

    def handle_endtag(self, tag):
        if tag == "style":
            self.found += re.findall(r"url\(.*|@import.*", self.text)
        elif tag == "script" and self.text != SCRIPT and not isinstance(as_json(self.text), dict):
            self.found.append("script")
        self.text = ""


SCRIPT = (REPO / "report/page/page.js").read_text("utf-8")


def as_json(text):
    """What a JSON text holds; None if it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def test_the_check_of_pages_can_fail():
    for bad in (
        "<script>1</script>",
        "<link rel=stylesheet>",
        '<img src="http://x/y.png">',
        "<style>a{b:url(c)}</style>",
        "<a href=x>",
    ):
        assert Loads(bad).found, bad
    assert Loads('<p>http://x url(y) src=</p><img src="data:image/png;base64,http">').found == []


def test_nasty_names(tmp_path, pictures_drawn):
    """Names that mean something to matplotlib, markdown, HTML or a file system are shown as text."""
    folder = NASTY.replace("/", "")
    for i in range(2):
        split = {"set": f"../{NASTY}"}
        about = {"command": f"python {NASTY}", "model": f"_{NASTY}"}
        data_settings = {"classes": ["_$ok$", NASTY]}
        scores = noisy_scores(i, ("ok", "ill"))
        path = tmp_path / "outputs" / f"{folder}-seed{i}"
        write_run(path, i, split=split, data=data_settings, scores=scores, **about)
    done = succeed("compare", "--html", "r.html", "--csv", "t.csv", cwd=tmp_path)
    done.out.encode("utf-8")
    for text in (done.out, (tmp_path / "r.html").read_text("utf-8"), (tmp_path / "t.csv").read_text("utf-8")):
        assert "\\udcff" in text and "\x1b" not in text and "\udcff" not in text
    loads = Loads((tmp_path / "r.html").read_text("utf-8"))
    assert loads.found == [] and loads.pictures == 7
    shapes = [{len(row) for row in table} for table in tables(done.out.replace("\\|", ""))]
    assert all(len(shape) == 1 for shape in shapes) and len(shapes) == 16
    plain = re.sub("(`+).*?\\1", "", done.out)  # outside code
    plain = re.sub(r"(?<!\\)\*\*(.+?)(?<!\\)\*\*", r"\1", plain)  # the report's own marks
    assert "<" not in plain.replace("&lt;", "") and not re.search(r"(?<!\\)\*", plain)
    links = re.findall(LINK, done.out)
    assert len(links) == 7 and all(re.fullmatch(r"outputs/figures/[\w.-]+\.png", link) for link in links)
    assert {p.name for p in (tmp_path / "outputs/figures").iterdir()} == {os.path.basename(k) for k in links}
    assert not [p for p in tmp_path.iterdir() if p.name not in ("outputs", "r.html", "t.csv")]
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        assert {len(row) for row in csv.reader(file)} == {1 + len(HEADER) + len(MORE)}


@pytest.mark.parametrize(
    "text", ["$", "a$b", "$a_{b$", "a \\$ b", "_hidden", "$\\frac{$", "x" * 300, "^_$\\"]
)
def test_labels_are_drawn_as_they_are(text):
    figure, (ax,) = panels(1, 3, 3)
    ax.plot([0, 1], label=label(text))
    ax.set_title(label(text))
    ax.legend()
    figure.canvas.draw()  # a formula that cannot be parsed raises here
    for shown in (ax.title, ax.get_legend().get_texts()[0]):
        preprocessed, is_formula = shown._preprocess_math(shown.get_text())
        assert is_formula is False and preprocessed.replace("\n", "").strip() == text
    curves.plt.close(figure)
    assert all(len(line) <= 81 for line in label(text).splitlines())


def test_file_stems():
    used = {}
    names = ["chest_xray", "a b/c", "..", "", "Chest_Xray", "a?b_c" * 40, "ü$"]
    stems = [compare.file_stem(name, used) for name in names]
    assert stems[:5] == ["chest_xray", "a-b-c", "data", "data-2", "Chest_Xray-2"]
    assert len({s.lower() for s in stems}) == len(stems) and max(map(len, stems)) <= 60


# ---------------------------------------------------------------- the script


def test_compare_says_where_everything_is(tmp_path):
    write_run(tmp_path / "outputs/scratch")
    (tmp_path / "site").mkdir()
    done = succeed("compare", "--html", "site/r.html", "--csv", "t.csv", "--figures", "pics", cwd=tmp_path)
    assert done.err.splitlines()[-3:] == ["report: site/r.html", "pictures: 7 in pics", "table: t.csv"]
    assert (tmp_path / "site/r.html").exists() and len(list((tmp_path / "pics").iterdir())) == 7


def test_the_report_as_a_file(tmp_path):
    """--out writes what standard output would hold, in UTF-8; links start from the folder of the file."""
    write_run(tmp_path / "outputs/scratch")
    (tmp_path / "site").mkdir()
    printed = succeed("compare", cwd=tmp_path).out
    for place, way in (("r.md", ""), ("site/r.md", "../")):
        done = succeed("compare", "--out", place, cwd=tmp_path)
        assert done.out == "" and f"report: {place}" in done.err
        text = (tmp_path / place).read_bytes().decode("utf-8")
        assert text == printed.replace("](outputs/", f"]({way}outputs/") and "≥" not in text
        links = re.findall(LINK, text)
        assert len(links) == 7 and all((tmp_path / place).parent.joinpath(link).exists() for link in links)


@pytest.mark.parametrize("flag", ["--out", "--html", "--csv", "--figures"])
@pytest.mark.parametrize("target", ["device", "fifo", "folder", "under a file"])
def test_outputs_are_checked_before_drawing(tmp_path, flag, target):
    write_run(tmp_path / "outputs/scratch")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    path = {"device": "/dev/null", "under a file": "file/below"}.get(target, target)
    if (flag, target) == ("--figures", "folder"):
        path = "file"
    refused(cli("compare", flag, path, cwd=tmp_path), path.split("/b")[0])
    assert not (tmp_path / "outputs/figures").exists() and (tmp_path / "file").read_text() == "mine"
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and stat.S_ISFIFO(os.stat(tmp_path / "fifo").st_mode)


def test_compare_leaves_out_what_is_not_calibrated(tmp_path, capsys):
    write_run(tmp_path / "outputs/scratch")
    waiting = write_run(tmp_path / "outputs/waiting")
    (waiting.folder / "calibration.json").unlink()
    [[entry]] = rows_module.load_entries(tmp_path / "outputs")
    assert entry.run.folder.name == "scratch"
    assert re.search("not calibrated, so left out: .*waiting", capsys.readouterr().err)
    refused(
        cli("compare", "--run", "outputs/scratch", "outputs/waiting", cwd=tmp_path),
        "not calibrated",
        "waiting",
    )


def test_compare_separates_test_sets(tmp_path):
    """Runs on other test images, or other labels for them, get tables and plots of their own."""
    scores = noisy_scores(0)
    relabelled = {**scores, "test_labels": 1 - scores["test_labels"]}
    renamed = {**scores, "test_files": np.char.add(scores["test_files"], ".png")}
    for name, found in (("a", scores), ("b", scores), ("c", relabelled), ("d", renamed)):
        write_run(tmp_path / "outputs" / name, scores=found)
    groups = rows_module.load_entries(tmp_path / "outputs")
    assert [[e.run.folder.name for e in group] for group in groups] == [["a", "b"], ["c"], ["d"]]
    done = succeed("compare", "--run", "outputs/a", "outputs/c", cwd=tmp_path)
    assert [len(t) - 1 for t in tables(done.out) if "Recall @0.5" in t[0]] == [1, 1]
    links = re.findall(LINK, done.out)
    assert len(set(links)) == len(links) == 2 * 7 and all((tmp_path / link).exists() for link in links)


def test_sets_of_several_names_that_are_compared_are_told(tmp_path):
    """Names and labels alone tell test sets apart: where the sets are called differently, it is said."""
    for name in ("kx", "other"):
        write_run(tmp_path / "outputs" / name, split={"set": name})
    done = succeed("compare", "--csv", "t.csv", cwd=tmp_path)
    text = "ompared as the same images by names and labels, though the sets are called kx and other"
    assert f"note: c{text}" in done.err and f"C{text}." in done.out
    with open(tmp_path / "t.csv", newline="") as file:
        assert [(row["Data"], row["Run"]) for row in csv.DictReader(file)] == [
            ("kx", "outputs/kx"),
            ("other", "outputs/other"),
        ] * 2
    done = succeed("compare", "--run", "outputs/kx", cwd=tmp_path)
    assert "called" not in done.err and "by names and labels" not in done.out


# ---------------------------------------------------------------- from images to the report


@pytest.mark.parametrize(
    "damage", ["calibration cut", "scores cut", "calibration of a newer format", "calibration without test"]
)
def test_compare_of_damaged_files(own_runs, damage):
    out = own_runs / "outputs" / "scratch"
    path = out / ("scores.npz" if damage == "scores cut" else "calibration.json")
    if damage.endswith("cut"):
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "calibration without test":
        path.write_text(json.dumps(with_changes(read_json(path), {"test": ...})))
    else:
        path.write_text(json.dumps({**read_json(path), "format": 99}))
    refused(cli("compare", cwd=own_runs), "scratch")


def test_compare_table(runs):
    """A row for every run @Rec and @0.5, the figures of calibration.json; then validation beside test."""
    [[names, *rows]] = [t for t in tables(runs.compared.out) if "Recall @0.5" in t[0]]
    [[head, *shift]] = [t for t in tables(runs.compared.out) if {"Recall val", "Recall test"} <= set(t[0])]
    assert len(rows) == 3
    keys = {"Acc": "acc", "Prec": "precision", "Recall": "recall", "Spec": "specificity", "F1": "f1"}
    for name, word in NAMES.items():
        results, result = (
            read_json(runs.out, name, "results.json"),
            of_one(read_json(runs.out, name, "calibration.json")),
        )
        [row] = [dict(zip(names, r)) for r in rows if word in r[0]]
        assert "[SYNTHETIC]" in row["Model"]
        assert float(row["Params (M)"]) == pytest.approx(results["params"] / 1e6, abs=0.006)
        assert float(row["Time (min)"]) == pytest.approx(results["minutes"], abs=0.051)
        assert float(row["Thr @Rec"]) == pytest.approx(result["threshold"], abs=5.1e-5)
        for side in ("val", "test"):
            found = float(row[f"AUROC {side}"].strip("*"))
            assert found == pytest.approx(result[side]["at_rec"]["auroc"], abs=5.1e-4)
        for (point, mark), (title, key) in itertools.product(
            (("at_rec", "@Rec"), ("at_0.5", "@0.5")), keys.items()
        ):
            shown = re.search(r"[\d.]+", row[f"{title} {mark}"])[0]
            assert float(shown) == pytest.approx(result["test"][point][key], abs=5.1e-4)
        [row] = [dict(zip(head, r)) for r in shift if word in r[0] and "@Guar" not in r[0]]
        for title, key in (("Recall", "recall"), ("Spec", "specificity"), ("AUROC", "auroc")):
            for split in ("val", "test"):  # an interval may follow the figure
                found = float(row[f"{title} {split}"].split()[0].strip("*"))
                assert found == pytest.approx(result[split]["at_rec"][key], abs=5.1e-4)


def test_compare_prints_markdown_only(runs):
    out = runs.compared.out
    assert out.startswith("# ") and "SYNTHETIC" in out
    assert "40 images (15 NORMAL, 25 PNEUMONIA)" in out and "recall >= 0.9" in out
    for line in filter(None, out.splitlines()):
        assert line[0] in "#|" or re.fullmatch(LINK, line) or (line[-1] in ".:" and len(line.split()) > 5), (
            line
        )


def test_compare_plots(runs):
    """Every linked picture is there, opens, and is not blank; the training curve is not that of the
    histogram."""
    links = re.findall(LINK, runs.compared.out)
    assert len(links) >= 5 and len(set(links)) == len(links)
    seen = set()
    for link in links:
        with Image.open(runs.cwd / link) as image:
            image.load()
            pixels = np.asarray(image.convert("L"))
        assert min(pixels.shape) > 300 and pixels.std() > 5 and (pixels < 128).mean() > 0.002, link
        seen.add(pixels.tobytes())
    assert len(seen) == len(links)
    found = {p.resolve() for p in (runs.out / "figures").iterdir()}
    assert found == {(runs.cwd / link).resolve() for link in links}


def test_compare_csv(runs):
    """A row a run and operating point; the columns of older versions come first."""
    with open(runs.cwd / "table.csv", newline="") as f:
        header, *rows = csv.reader(f)
    assert header == ["Data", *HEADER, *MORE] and len(rows) == 6
    for row in (dict(zip(header, row)) for row in rows):
        result = of_one(read_json(runs.cwd, row["Run"], "calibration.json"))
        point = {"@Rec": "at_rec", "@0.5": "at_0.5"}[row["Point"]]
        assert row["Model"].endswith(row["Point"]) and row["Finding"] == "PNEUMONIA"
        figures = [
            result["test"][point][k] for k in ("acc", "precision", "recall", "specificity", "f1", "auroc")
        ]
        shown = [float(row[k]) for k in ("Acc", "Prec", "Recall", "Spec", "F1", "AUROC")]
        assert shown == pytest.approx(figures, abs=5.1e-4)
        assert float(row["Spec val"]) == pytest.approx(result["val"][point]["specificity"], abs=5.1e-5)


def test_a_seed_trained_twice_counts_once(bench, tmp_path):
    shutil.copytree(bench / "outputs", tmp_path / "outputs")
    shutil.copytree(bench / "outputs/scratch-seed0", tmp_path / "outputs/scratch")
    done = cli("compare", cwd=tmp_path)
    assert done.code == 0 and ", 2 seeds |" in done.out and "3 seeds" not in done.out
    assert re.search(
        r"- outputs/scratch\S*: recipe and seed are those of .*, so it is counted once", done.out
    )


def test_report_has_every_section_and_html_stands_alone(bench, tmp_path):
    """With the mean of the seeds, and their ensemble made by the command that the report names."""
    shutil.copytree(bench / "outputs", tmp_path / "outputs")
    [hint] = re.findall("run `python (calibrate.py --ensemble .*?)`", succeed("compare", cwd=tmp_path).out)
    place = ["--data-dir", bench / "xray", "--cache-dir", bench / "Data/cache", *FLOOR]
    succeed("calibrate", *hint.split()[1:], *place, cwd=tmp_path)
    done = succeed("compare", "--html", "report.html", "--csv", "t.csv", cwd=tmp_path)
    text = done.out
    for heading in (
        "What the threshold promises",
        "95% intervals",
        "Which model is better",
        "Are the probabilities right",
        "Groups of patients",
        "How this was evaluated",
        ", 2 seeds |",
        "ensemble of 2",
        "@Guar",
        "SYNTHETIC",
    ):
        assert heading in text, heading
    a, b = (Run(tmp_path / f"outputs/scratch-seed{i}").scores() for i in range(2))
    y, aurocs = a["test_labels"], [metrics.roc_auc_score(s["test_labels"], s["test_p1"]) for s in (a, b)]
    both = metrics.roc_auc_score(y, (a["test_p1"] + b["test_p1"]) / 2)
    mean_row = next(line for line in text.splitlines() if ", 2 seeds |" in line)
    assert f"{np.mean(aurocs):.3f} ± {np.std(aurocs, ddof=1):.3f}" in mean_row
    main = next(table for table in tables(text) if "Recall @0.5" in table[0])
    [row] = [line for line in main if "ensemble of 2" in line[0]]
    assert row[main[0].index("AUROC test")].strip("*") == f"{both:.3f}"
    page = Loads((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.found == [] and page.pictures == len(re.findall(LINK, text)) == 6
    assert (tmp_path / "t.csv").read_text("utf-8").splitlines()[0].startswith("Data,Model,Params (M)")
