"""Tests of the page: its figures against Python's in a real browser, pictures of errors, the reading list."""

import csv
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from common.files import write_json
from common.proportions import wilson_interval
from metrics import predictive_values
from records.run import Run
from report.answers.threshold import floor_verdict
from report.page import gallery as gallery_module
from report.page.build import FOLDER, Panel, to_html
from report.page.gallery import MISSED, errors, gallery
from report.page.numbers import Store, panel
from report.render import Heading
from report.rows import Entry
from tests.shared import cli, succeed
from tests.test_compare import ASKED, Loads, noisy_scores, write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "</script><img src=x onerror=\"document.title='hit'\">\u2028"


# ---------------------------------------------------------------- figures, in a browser


def dumped(path):
    """The page at `path` after its script has run, as text."""
    argv = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path.parent}/profile"]
    argv += ["--disable-background-networking", "--dump-dom", f"file://{path}"]
    return subprocess.run(argv, capture_output=True, timeout=120, check=True).stdout.decode()


def uneven_scores():
    """Two images of some patients and one of others, scores that tie, and a side where all sick are found."""
    arrays = noisy_scores(3)
    for side in ("val", "test"):
        count = len(arrays[f"{side}_labels"])
        arrays[f"{side}_patients"] = np.array([f"p{max(i // 3, i - 30)}" for i in range(count)])
        arrays[f"{side}_logits"] = np.round(arrays[f"{side}_logits"], 1)
    arrays["test_logits"][arrays["test_labels"] == 1, 1] = 4.0
    return arrays


def interval_by_hand(hits, patients, level):
    """Wilson's interval of n / D images, as numbers.py defines D, patient by patient."""
    n, share = len(hits), sum(hits) / len(hits)
    people = sorted(set(patients))
    of = {g: [h for h, p in zip(hits, patients) if p == g] for g in people}
    design = sum(len(of[g]) ** 2 for g in people) / n
    if 0 < share < 1:
        residuals = [sum(of[g]) - share * len(of[g]) for g in people]
        variance = len(people) / (len(people) - 1) * sum(r * r for r in residuals) / n**2
        design = max(1.0, variance / (share * (1 - share) / (n - 1)))
    effective = max(1.0, n / design)
    return wilson_interval(share * effective, effective, level)


def figures_by_hand(column, threshold, prevalence):
    """{figure: [value, lo, hi]} of a Column at a threshold; predictive values by the union bound."""
    found, wide = {}, {}
    for name, label in (("recall", 1), ("specificity", 0)):
        inside = column.truth == label
        hits = [bool((p >= threshold) == label) for p in column.scores[inside]]
        patients = column.patients[inside].tolist()
        found[name] = [sum(hits) / len(hits), *interval_by_hand(hits, patients, 0.95)]
        wide[name] = interval_by_hand(hits, patients, 0.975)
    ends = [(found["recall"][0], found["specificity"][0]), *zip(wide["recall"], wide["specificity"])]
    for k, name in enumerate(("ppv", "npv")):
        found[name] = [predictive_values(*end, prevalence)[k] for end in ends]
    alarms = [1000 * (1 - prevalence) * (1 - s) for s in found["specificity"]]
    found["alarms"] = [alarms[0], alarms[2], alarms[1]]
    return found


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_figures_of_the_page_are_those_of_python(tmp_path):
    """At marks, at scores, between them and at the ends; and names in it do nothing."""
    entries = [Entry(write_run(tmp_path / "a", scores=uneven_scores()))]
    data = {"classes": ["ok", HOSTILE]}
    entries.append(Entry(write_run(tmp_path / "b", 1, data=data, model=HOSTILE)))
    store = Store()
    page = to_html([Heading(1, HOSTILE), Heading(3, "By hand"), Panel(*panel(entries, store))], False, store)
    prevalence, asked = 0.07, []
    for m, e in enumerate(entries):
        for side in ("val", "test"):
            column = e.column(e.findings[0], side)
            thresholds = [e.calibrated[e.findings[0]]["threshold"], *column.scores[:7].tolist()]
            asked += [(m, side, t) for t in [*thresholds, 0.0, 0.123, 0.5, 0.987, 1.0]]
    script = f"""<script>
    const out = {json.dumps(asked)}.map(([m, side, t]) => {{
      const figures = figuresAt(sideOf(DATA.sets[0].models[m].findings[0].sides[side]), t);
      const rest = atPrevalence(figures, {prevalence});
      const rows = [figures.recall, figures.specificity, rest.ppv, rest.npv, rest.alarms];
      return rows.map((f) => [f.value, f.lo, f.hi]);
    }});
    document.body.append(element("pre", {{ id: "out" }}, JSON.stringify(out)));
    const part = (role) => document.querySelector(`[data-role="${{role}}"]`);
    const set = (role, value, event) => {{
      part(role).value = value;
      part(role).dispatchEvent(new Event(event));
      return part("state").textContent;
    }};
    const said = [set("model", "1", "change"), set("threshold", "0.25", "input")];
    said.push(set("threshold", "", "input"), set("threshold", "1.5", "input"), set("slider", "0", "input"));
    part("marks").querySelector("button").click();
    said.push(part("state").textContent);
    document.body.append(element("pre", {{ id: "said" }}, JSON.stringify(said)));
    </script></body>"""
    path = tmp_path / "page.html"
    # The policy forbids this script, as it should: without it alone is the script a part of the page.
    policy = re.search('<meta http-equiv="Content-Security-Policy"[^>]*>', page)[0]
    path.write_text(page.replace(policy, "").replace("</body>", script), "utf-8", "backslashreplace")
    dom = dumped(path)
    got = json.loads(html.unescape(re.search('<pre id="out">(.*?)</pre>', dom)[1]))
    for (m, side, threshold), rows in zip(asked, got, strict=True):
        column = entries[m].column(entries[m].findings[0], side)
        for (name, wanted), row in zip(figures_by_hand(column, threshold, prevalence).items(), rows):
            shown = [np.nan if value is None else value for value in row]
            np.testing.assert_allclose(shown, wanted, 1e-9, 1e-12, err_msg=f"{name} {side} {threshold}")
    # The controls: another model, a number, two that are none, the slider in its middle, and back to @Rec.
    first, typed, empty, beyond, slid, snapped = json.loads(
        html.unescape(re.search('<pre id="said">(.*?)</pre>', dom)[1])
    )
    at_rec = entries[1].row(entries[1].findings[0], "test", "at_rec")
    assert f"test recall {at_rec['recall']:.3f}, specificity {at_rec['specificity']:.3f}" in first == snapped
    assert typed.startswith("Threshold 0.25,") and typed == empty == beyond
    assert abs(float(slid.split(",")[0].removeprefix("Threshold ")) - 0.5) < 0.01
    cells = dict(re.findall(r'<td data-figure="Recall" data-side="(\w+)">([\d.]+) ', dom))
    rows = {side: entries[1].row(entries[1].findings[0], side, "at_rec") for side in ("val", "test")}
    assert cells == {side: f"{row['recall']:.3f}" for side, row in rows.items()}
    assert "<title>Recall-first" in dom and dom.count("<img") == 0


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_the_policy_lets_the_own_script_run_and_no_other(tmp_path):
    store = Store()
    block = Panel(*panel([Entry(write_run(tmp_path / "a"))], store))
    page = to_html([Heading(1, "data"), block], False, store)
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", "<script>document.title = 'hit'</script></body>"), "utf-8")
    dom = dumped(path)
    assert '<td data-figure="PPV"' in dom and "<title>hit" not in dom


def luminance(colour):
    """Relative luminance of "#rrggbb", WCAG 2.1."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_text_has_the_contrast_of_wcag_aa():
    style = (FOLDER / "style.css").read_text()
    schemes = re.findall(r":root \{(.*?)\}", style, re.S)
    light = dict(re.findall(r"--([\w-]+): (#\w+)", schemes[0]))
    dark = light | dict(re.findall(r"--([\w-]+): (#\w+)", schemes[1]))
    assert len(light) == 13
    for colours in (light, dark):
        pairs = [
            (text, ground)
            for text in ("text", "quiet", "link", "bad", "good", "sick")
            for ground in ("ground", "raised")
        ]
        for text, ground in [*pairs, ("text", "warn-ground")]:
            a, b = sorted(map(luminance, (colours[text], colours[ground])))
            assert (b + 0.05) / (a + 0.05) >= 4.5, (text, ground)


def test_every_mark_is_a_threshold_of_the_calibration(tmp_path):
    entry, store = Entry(write_run(tmp_path / "a")), Store()
    entry.calibrated["PNEUMONIA"]["rule_in"] = {"threshold": 0.99}
    found = entry.calibrated["PNEUMONIA"]
    data, notes = panel([entry, entry], store)
    marks = dict(data["models"][0]["findings"][0]["marks"])
    assert marks["@Rec"] == found["threshold"] and marks["@0.5"] == 0.5 and notes == []
    assert marks.get("@Guar") == found["guarantee"]["threshold"]
    verdicts = data["models"][0]["findings"][0]["verdicts"]
    row = entry.row("PNEUMONIA", "test", "at_rec")
    assert [marks["@Rec"], floor_verdict(entry, "PNEUMONIA", row)] in verdicts
    # The same arrays are held once.
    assert data["models"][0]["findings"] == data["models"][1]["findings"] and len(store.texts) == 6


def test_scores_beyond_the_limit_are_left_out_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr("report.page.numbers.MOST", 150)
    entries = [Entry(write_run(tmp_path / str(i), i)) for i in range(2)]
    data, notes = panel(entries, Store())
    assert len(data["models"]) == 1 and "1 pairs of model and finding are not" in notes[0]


# ---------------------------------------------------------------- errors to look at


def write_pictures(root, entry, left_out=0):
    """An image file for every image of an Entry, but `left_out` of each side."""
    for side in ("val", "test"):
        for file in entry.columns[side].files[left_out:]:
            path = root / str(file)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (30, 20), 90).save(path)
    (root / "train").mkdir(exist_ok=True)


def wrong_by_hand(run):
    """{(side, file, kind)} of a run at @Rec, from its files."""
    arrays, found = run.scores(), set()
    (calibrated,) = run.calibration()["findings"].values()
    for side in ("val", "test"):
        columns = zip(*(arrays[f"{side}_{k}"].tolist() for k in ("files", "labels", "p1")))
        for file, label, score in columns:
            if label == 1 and score < calibrated["threshold"]:
                found.add((side, file, "false negative"))
            elif label == 0 and score >= calibrated["threshold"]:
                found.add((side, file, "false positive"))
    return found


def test_gallery_shows_every_error_and_who_makes_it(tmp_path):
    data = {"data_dir": str(tmp_path / "set")}
    entries = [Entry(write_run(tmp_path / f"run{i}", i, data=data)) for i in range(2)]
    write_pictures(tmp_path / "set", entries[0])
    # A map that explain.py drew of a false negative.
    missed = errors(entries[1], 0, "test")[MISSED][0]
    file = str(entries[1].columns["test"].files[missed])
    folder = entries[1].run.explained_folder("test")
    folder.mkdir(parents=True)
    Image.new("RGB", (300, 100)).save(folder / file.split("/")[-1].replace("jpeg", "png"))
    write_json(folder / "explain.json", {"checkpoint": entries[1].calibration["checkpoint"]})
    shown = gallery(entries, ASKED)
    wanted = [wrong_by_hand(entry.run) for entry in entries]
    assert {(c.side, c.file, c.kind) for c in shown.cards} == wanted[0] | wanted[1]
    for card in shown.cards:
        key = card.side, card.file, card.kind
        assert [number for number, *_ in card.calls] == [i for i in range(2) if key in wanted[i]]
        for _, _, distance in card.calls:
            assert (distance < 0) == (card.kind == MISSED)
        assert card.picture.startswith("data:image/jpeg;base64,")
        assert bool(card.maps) == (key == ("test", file, MISSED))
    kinds = [card.kind for card in shown.cards]
    assert kinds == sorted(kinds) and sum(shown.counts.values()) == sum(map(len, wanted))
    assert not +shown.left_out and shown.held == len(shown.cards) and shown.absent == 0


def test_gallery_counts_what_it_leaves_out(tmp_path, monkeypatch):
    entry = Entry(write_run(tmp_path / "run", data={"data_dir": str(tmp_path / "set")}))
    write_pictures(tmp_path / "set", entry, left_out=20)
    monkeypatch.setattr(gallery_module, "FALSE_POSITIVES", 1)
    monkeypatch.setattr(gallery_module, "MOST", 8)
    shown, wanted = gallery([entry], ASKED), wrong_by_hand(entry.run)
    for kind in ("false negative", "false positive"):
        cards = [card for card in shown.cards if card.kind == kind]
        assert len(cards) + shown.left_out[kind] == sum(k == kind for *_, k in wanted) == shown.counts[kind]
    assert len(shown.cards) <= 8
    absent = {card.path for card in shown.cards if not card.path.exists()}
    assert shown.absent == len(absent) > 0 and shown.held == len(shown.cards) - shown.absent


def test_page_says_how_many_pictures_it_holds(tmp_path):
    for i in range(2):
        write_run(tmp_path / f"outputs/run{i}", i, data={"data_dir": str(tmp_path / "set")})
    write_pictures(tmp_path / "set", Entry(Run(tmp_path / "outputs/run0")))
    succeed("compare", "--html", "with.html", cwd=tmp_path)
    succeed("compare", "--html", "without.html", "--no-gallery", cwd=tmp_path)
    texts = [(tmp_path / name).read_text("utf-8") for name in ("with.html", "without.html")]
    pages = [Loads(text) for text in texts]
    assert [page.found for page in pages] == [[], []]
    assert f"This page holds {pages[0].photographs} pictures of patients" in texts[0]
    assert pages[0].photographs > 20 and ">Errors to look at<" in texts[0]
    assert pages[1].photographs == 0 and "This page holds no pictures of patients" in texts[1]
    assert ">Errors to look at<" not in texts[1] and "Threshold by hand" in texts[1]
    # Every link of the contents has its heading.
    assert {link[1:] for link in pages[0].links} <= set(pages[0].ids)


# ---------------------------------------------------------------- the reading list


def test_reading_list_is_in_the_order_of_suspicion(runs, synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr("report.page.worklist.PICTURES", 5)
    images = shutil.copytree(synthetic / "test", tmp_path / "images")
    first = next(images.rglob("*.jpeg"), None) or next(images.rglob("*.png"))
    shutil.copy(first, images / "<img src=x onerror=alert(1)>.png")
    (images / "broken.png").write_bytes(b"no picture")
    argv = ("images", "--run", runs.out / "scratch", "--html", "list.html", "-o", "rows.csv")
    done = cli("predict", *argv, cwd=tmp_path)
    assert done.code == 2 and "reading list: list.html" in done.err
    text = (tmp_path / "list.html").read_text("utf-8")
    page = Loads(text)
    assert page.found == [] and page.photographs == 5
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["p_pneumonia"]]
    wanted = sorted((float(row["p_pneumonia"]) for row in rows), reverse=True)
    listed = [html.unescape(name) for name in re.findall(r"<b>\d+</b> (.*?)\n", text)]
    scores = {row["path"]: float(row["p_pneumonia"]) for row in rows}
    assert [scores[name] for name in listed] == wanted and len(set(listed)) == len(rows)
    called = sum(row["decision@Rec"] == "PNEUMONIA" for row in rows)
    assert f"Scored: {len(rows)} files, of which {called} are called" in text
    assert "broken.png</code>: unreadable" in text and "SYNTHETIC" in text
    # What predict.py says of all images together stands on top: the count of notes, and the verdict after it.
    said = done.err.splitlines()
    notes = next(i for i, line in enumerate(said) if " with a note" in line)
    above = html.unescape(text[: text.index("<table")])
    assert said[notes] in above and said[notes + 1] in above


def test_reading_list_holds_the_most_suspicious_only(runs, synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr("report.page.worklist.ROWS", 7)
    argv = (synthetic / "test", "--run", runs.out / "linear", "--html", "list.html")
    done = succeed("predict", *argv, cwd=tmp_path)
    by_name = {row["path"]: float(row["p_pneumonia"]) for row in csv.DictReader(done.out.splitlines())}
    scores = sorted(by_name.values(), reverse=True)
    text = (tmp_path / "list.html").read_text("utf-8")
    listed = [html.unescape(name) for name in re.findall(r"<b>\d+</b> (.*?)\n", text)]
    assert [by_name[name] for name in listed] == scores[:7]
    assert f"The {len(scores) - 7} least suspicious are not listed here" in text
