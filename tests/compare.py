"""Tests of compare."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import data
import metrics
from tests.shared import HEADER, LINK, NAMES, cli, read_json, refused, succeed, tables


@pytest.mark.parametrize(
    "damage", ["calibration cut", "scores cut", "calibration of a newer format", "calibration without test"]
)
def test_compare_of_damaged_files(own_runs, damage):
    out = own_runs / "outputs" / "scratch"
    path = out / ("scores.npz" if damage == "scores cut" else "calibration.json")
    if damage.endswith("cut"):
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "calibration without test":
        path.write_text(json.dumps({k: v for k, v in read_json(path).items() if k != "test"}))
    else:
        path.write_text(json.dumps({**read_json(path), "format": 99}))
    refused(cli("compare", cwd=own_runs), "scratch")


def test_compare_table(runs):
    """A row for every run @Rec and @0.5, each figure that of calibration.json; then validation beside test."""
    [[_, *rows]] = [t for t in tables(runs.compared.out) if t[0] == HEADER]
    [[head, *shift]] = [t for t in tables(runs.compared.out) if {"Recall val", "Recall test"} <= set(t[0])]
    assert len(rows) == 6
    for name, word in NAMES.items():
        results, result = (
            read_json(runs.out, name, "results.json"),
            read_json(runs.out, name, "calibration.json"),
        )
        for point, mark in (("at_rec", "@Rec"), ("at_0.5", "@0.5")):
            [row] = [r for r in rows if r[0].endswith(mark) and word in r[0]]
            assert "[SYNTHETIC]" in row[0]
            c = result["test"][point]
            assert float(row[1]) == pytest.approx(results["params"] / 1e6, abs=0.006)
            assert float(row[2]) == pytest.approx(results["minutes"], abs=0.051)
            expected = [c[k] for k in ("acc", "precision", "recall", "specificity", "f1", "auroc")]
            assert [float(v) for v in row[3:9]] == pytest.approx(expected, abs=5.1e-4)
            assert float(row[9]) == pytest.approx(c["thr"], abs=5.1e-5)
        [row] = [dict(zip(head, r)) for r in shift if word in r[0] and "@Guar" not in r[0]]
        for title, key in (("Recall", "recall"), ("Spec", "specificity"), ("AUROC", "auroc")):
            for split in ("val", "test"):  # an interval may follow the figure
                found = float(row[f"{title} {split}"].split()[0])
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

    with open(runs.cwd / "table.csv", newline="") as f:
        header, *rows = csv.reader(f)
    [table] = [t for t in tables(runs.compared.out) if t[0] == HEADER]
    assert header == ["Data", *HEADER] and [row[1:] for row in rows] == table[1:]


def test_compare_separates_test_sets(own_runs, tmp_path):
    """Runs on other test images get a table of their own, and plots of their own."""
    data.make_synthetic(tmp_path / "other", train=48, test=16, seed=3)
    succeed(
        "train_linear",
        "--data-dir",
        tmp_path / "other",
        "--img-size",
        32,
        "--out",
        "outputs/second",
        cwd=own_runs,
    )
    succeed("calibrate", "--run", "outputs/second", cwd=own_runs)
    done = succeed("compare", cwd=own_runs)
    assert sorted(len(t) - 1 for t in tables(done.out) if t[0] == HEADER) == [2, 6]
    links = re.findall(LINK, done.out)
    one = succeed("compare", "--run", "outputs/linear", cwd=own_runs)
    assert (
        len(set(links)) == len(links) == 2 * len(re.findall(LINK, one.out)) + 1
    )  # no curves of a linear model
    assert all((own_runs / link).exists() for link in links)


def test_a_seed_trained_twice_counts_once(bench, tmp_path):
    shutil.copytree(bench / "outputs", tmp_path / "outputs")
    shutil.copytree(bench / "outputs/scratch-seed0", tmp_path / "outputs/scratch")
    done = cli("compare", cwd=tmp_path)
    assert done.code == 0 and "mean ± sd of 2 seeds" in done.out and "of 3 seeds" not in done.out


def test_report_has_every_section_and_html_stands_alone(bench):
    done = cli("compare", "--html", "report.html", "--csv", "t.csv", cwd=bench)
    assert done.code == 0, done.err
    text = done.out
    for heading in (
        "What the threshold promises",
        "95% intervals",
        "Which model is better",
        "Are the probabilities right",
        "Subgroups",
        "How this was evaluated",
        "mean ± sd of 2 seeds",
        "ensemble of 2 seeds",
        "@Guar",
        "SYNTHETIC",
    ):
        assert heading in text, heading
    with (
        np.load(bench / "outputs/scratch-seed0/scores.npz") as a,
        np.load(bench / "outputs/scratch-seed1/scores.npz") as b,
    ):
        y, aurocs = a["test_labels"], [metrics.roc_auc_score(s["test_labels"], s["test_p1"]) for s in (a, b)]
        both = metrics.roc_auc_score(y, (a["test_p1"] + b["test_p1"]) / 2)
    mean_row = next(line for line in text.splitlines() if "mean ± sd of 2 seeds @Rec" in line)
    assert f"{np.mean(aurocs):.3f} ± {np.std(aurocs, ddof=1):.3f}" in mean_row
    assert f"| {both:.3f} |" in next(line for line in text.splitlines() if "ensemble of 2 seeds @Rec" in line)
    page = (bench / "report.html").read_text()
    assert (
        "http" not in page.replace("http-equiv", "")
        and page.count("data:image/png;base64,") == 6
        and "SYNTHETIC" in page
    )
    assert (bench / "t.csv").read_text().splitlines()[0].startswith("Data,Model,Params (M)")
