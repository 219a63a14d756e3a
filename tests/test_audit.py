"""audit.py: made-up models that read a known part of made-up images, simulations with a known truth, closed
forms."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from sklearn.metrics import roc_auc_score

import audit as script
from auditing import changes, clusters, figures, record, rules, signals
from auditing.reader import Reader, project_out
from auditing.side import Side, side_of, some_patients
from common.console import InputError
from common.task import Task
from images.subset import Subset
from lungs import masks as lung_masks
from records.run import Run
from report.tables.audit import audit_blocks
from tests.shared import CPU, cli, read_json, refused, succeed

SIZE, PEOPLE = 32, 120


# ---------------------------------------------------------------- made-up models and images


class Reading(torch.nn.Module):
    """Reads the mean grey level of one place: "border" or "lungs" (where lungs can lie)."""

    kind, in_chans = "vit", 1

    def __init__(self, place):
        super().__init__()
        at = (torch.arange(SIZE) + 0.5) / SIZE
        depth = torch.minimum(at, 1 - at)
        depth = torch.minimum(depth[:, None], depth[None])
        self.where = depth < 0.08 if place == "border" else depth > 0.13
        self.head = torch.nn.Linear(2, 2)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[0.0, 0.0], [20.0, 0.0]]))
            self.head.bias.copy_(torch.tensor([0.0, -10.0]))

    def forward(self, x):
        told = x[:, 0, self.where].mean(1)
        return self.head(torch.stack([told, x.mean((1, 2, 3))], dim=1))


def pictures(rng, y):
    """uint8 [N, S, S] of noise, with border and middle brighter where y is 1; and the lungs, which lie there
    in another place for each, bool [N, S, S]."""
    images = rng.normal(120, 10, (len(y), SIZE, SIZE))
    lungs = np.zeros(images.shape, bool)
    for i, sick in enumerate(y):
        images[i, :3], images[i, -3:] = rng.normal(110 + 25 * sick, 12, (2, 1, 1))
        images[i, :, :3], images[i, :, -3:] = rng.normal(110 + 25 * sick, 12, (2, 1, 1))
        left, top = rng.integers(4, 13, 2)
        lungs[i, top : top + 16, left : left + 16] = True
        images[i][lungs[i]] += 50 * sick + rng.normal(-25, 20)
    return images.clip(0, 255).astype(np.uint8), lungs


@pytest.fixture
def made(monkeypatch):
    """made(place) -> (Audit of all sections, scored) of a model that reads that place."""
    rng = np.random.default_rng(0)
    y = np.arange(2 * PEOPLE) % 2
    images, lungs = pictures(rng, y)
    files = [f"p{i // 2:03d}/{i}.png" for i in range(len(y))]
    patients = [f"p{i // 2:03d}" for i in range(len(y))]
    known = dict(zip(files, lungs))
    monkeypatch.setattr(
        lung_masks, "open_source", lambda *about: lambda pixels, names: np.stack([known[n] for n in names])
    )

    def build(place, asked=record.KEYS, whose=patients):
        subset = Subset(files, y.astype(np.int64), images, np.arange(len(y)), patients=whose)
        run = SimpleNamespace(
            kind="vit",
            task=Task(),
            config=SimpleNamespace(needs_lungs=False, lungs="x.safetensors", img_size=SIZE, resize="squash"),
            results={
                "mean": [0.0],
                "std": [1.0],
                "recipe": {"amp": False},
                "model_config": {},
                "data": {},
                "split": {"original_size": {"width": [9, 9], "height": [9, 9]}},
            },
            calibrated=lambda: [],
            model=lambda: Reading(place),
        )
        reader = Reader(run, CPU, "PNEUMONIA")
        reader.threshold = 0.5
        audit = script.Audit(side_of(subset, run.task, "PNEUMONIA", "val", 10_000), reader, asked, 10_000)
        audit.score(64)
        return audit

    return build


def test_a_reader_of_the_border_is_found_out(made):
    found = made("border", ["border", "lungs"]).answers()
    assert {key: line["verdict"] for key, (line, _) in found.items()} == {
        "border": "broken",
        "lungs": "broken",
    }
    spans = found["border"][1]
    assert spans["other"]["value"] < 0.2 and spans["same"]["value"] > 0.8  # the border lies, or tells
    mark = rules.shortcut([line for line, _ in found.values()])
    assert mark["verdict"] == "broken" and "border" in mark["text"] and "lungs" in mark["text"]


def test_a_reader_of_the_lungs_is_cleared(made):
    audit = made("lungs", ["border", "lungs"])
    found = audit.answers()
    assert [line["verdict"] for line, _ in found.values()] == ["kept", "kept"], found["lungs"]
    spans = found["lungs"][1]
    # All that it reads is grey: it gives every image nearly the same score.
    assert spans["without"]["value"] < 0.75 < spans["without_others"]["value"]
    assert abs(spans["alone"]["value"] - spans["whole"]["value"]) < 0.02
    assert rules.shortcut([line for line, _ in found.values()])["verdict"] == "kept"


def test_figures_of_an_audit_are_those_of_its_images(made):
    """AUROC and shares, computed a second time from the model itself on images that are changed here."""
    audit = made("border", ["border", "corruptions"])
    found, side = audit.answers(), audit.side
    images, model = side.subset.pixels(), Reading("border")

    def scores(pixels):
        with torch.no_grad():
            logits = model(torch.from_numpy(pixels).unsqueeze(1).float() / 255)
        return logits.softmax(1)[:, 1].numpy()

    assert found["border"][1]["whole"]["value"] == pytest.approx(roc_auc_score(side.y, scores(images)))
    darker = scores((images / 255 - 0.15).clip(0, 1).__mul__(255).round().astype(np.uint8)) >= 0.5
    row = next(c for c in found["corruptions"][1]["changes"] if c["name"] == "darker")
    assert row["recall"]["value"] == pytest.approx(darker[side.y == 1].mean())
    assert row["specificity"]["value"] == pytest.approx((~darker)[side.y == 0].mean())
    fall = (scores(images) >= 0.5)[side.y == 1].mean() - darker[side.y == 1].mean()
    assert row["recall_fall"]["value"] == pytest.approx(fall)
    assert found["corruptions"][0]["verdict"] == "broken"  # darker by 0.15: nobody is called sick


def test_one_patient_and_no_lungs(made, monkeypatch):
    """Nothing can be said, and every section says why."""
    found = made("border", whose=["only"] * (2 * PEOPLE)).answers()
    assert list(found) == list(record.KEYS)
    assert {line["verdict"] for line, _ in found.values()} == {"open"}
    assert all("not looked at" in line["text"] for line, _ in found.values())
    assert "1 patients" in found["border"][0]["text"] and "40 patients" in found["clusters"][0]["text"]

    monkeypatch.setattr(
        lung_masks, "open_source", lambda *about: lambda pixels, names: np.zeros(pixels.shape, bool)
    )
    line, _ = made("border", ["lungs"]).answers()["lungs"]
    assert line["verdict"] == "open" and "lungs are found on 0 images" in line["text"]


# ---------------------------------------------------------------- changed images


def test_borrowed_parts_are_where_they_should_be():
    rng = np.random.default_rng(1)
    own, others = rng.integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
    made = changes.framed(own, others)
    assert np.array_equal(made[:, 12:-12, 12:-12], own[:, 12:-12, 12:-12])
    assert np.array_equal(made[:, :5], others[:, :5]) and np.array_equal(made[:, :, -5:], others[:, :, -5:])
    mask = rng.random(own.shape) < 0.5
    grey = changes.greyed(own, mask)
    assert (grey[mask] == 128).all() and np.array_equal(grey[~mask], own[~mask])


def test_donors_are_other_patients_of_the_class_asked():
    rng = np.random.default_rng(2)
    patients, y = rng.integers(0, 8, 40), rng.integers(0, 2, 40)
    drawn = changes.donors(patients, lambda i: y == y[i], rng)
    assert (patients[drawn] != patients).all() and np.array_equal(y[drawn], y)
    assert changes.donors(["a", "a"], lambda i: np.ones(2, bool), rng).tolist() == [-1, -1]


def test_some_patients_are_whole_and_of_both_kinds():
    rng = np.random.default_rng(3)
    patients = rng.integers(0, 200, 900)
    y = (patients < 150).astype(int)
    some = some_patients(y, patients, 300)
    assert 280 < len(some) <= 300
    taken = set(patients[some])
    assert np.array_equal(some, np.flatnonzero(np.isin(patients, list(taken))))
    assert abs(y[some].mean() - 0.5) < 0.05  # of all images three quarters are with the finding
    assert len(some_patients(y, patients, 900)) == 900
    assert some_patients(np.ones(50, int), np.zeros(50), 20).tolist() == list(range(50))


# ---------------------------------------------------------------- intervals


def test_intervals_of_shares_agree_with_the_normal_law():
    """One image a patient: the standard error of a mean, of a paired difference and of a difference of two
    groups has a closed form."""
    rng = np.random.default_rng(4)
    before, after = rng.random(900) < 0.9, rng.random(900) < 0.8
    inside, whose = rng.random(900) < 0.3, np.arange(900)

    def near(span, value, deviation):
        assert span["value"] == pytest.approx(value)
        assert span["lo"] == pytest.approx(value - 1.96 * deviation, abs=0.1 * deviation + 0.002)
        assert span["hi"] == pytest.approx(value + 1.96 * deviation, abs=0.1 * deviation + 0.002)

    near(figures.share(before, whose), before.mean(), before.std() / 30)
    change = before.astype(float) - after
    (fall,) = figures.falls(before, after[:, None], whose, 0.95)
    near(fall, change.mean(), change.std() / 30)
    parts = before[inside], before[~inside]
    error = np.sqrt(sum(part.var() / len(part) for part in parts))
    near(figures.difference_of_shares(before, inside, whose), parts[0].mean() - parts[1].mean(), error)


def test_intervals_count_patients():
    """Ten images of each patient, all alike, are one."""
    hits = np.random.default_rng(5).random(100) < 0.8
    once = figures.share(hits, np.arange(100))
    tenfold = figures.share(np.repeat(hits, 10), np.repeat(np.arange(100), 10))
    assert tenfold == pytest.approx(once)
    sure = figures.share(np.ones(20, bool), np.arange(20))
    assert sure["hi"] == 1 and 0.8 < sure["lo"] < 0.9  # no draw differs, and yet it is not certain


def test_a_paired_difference_of_auroc_is_narrower():
    """Scores that are nearly the same: the difference is known far better than either."""
    rng = np.random.default_rng(6)
    y = np.arange(200) % 2
    a = y + rng.normal(0, 1, 200)
    b = a + rng.normal(0, 0.1, 200)
    curve = figures.Curve(y, np.arange(200))
    one, other = curve.draws(a), curve.draws(b)
    assert one[0] == pytest.approx(roc_auc_score(y, a))
    span, difference = curve.span(one), curve.difference(figures.minus(one, other))
    assert difference["value"] == pytest.approx(roc_auc_score(y, a) - roc_auc_score(y, b))
    assert difference["hi"] - difference["lo"] < 0.3 * (span["hi"] - span["lo"])


# ---------------------------------------------------------------- other signals


def probed(features, signal, score=None):
    """The row of one signal by a model whose features and score, of healthy patients, are given."""
    count = len(signal)
    pixels = np.random.default_rng(7).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    files = [f"{i}.png" for i in range(count)]
    subset = Subset(files, np.zeros(count, np.int64), pixels, np.arange(count), patients=files)
    side = Side(subset, np.zeros(count, int), "val", count)
    side.features = features
    side.clean = np.random.default_rng(8).random(count) if score is None else score
    everybody = np.ones(count, bool)
    return signals.signal_figures(side, {"view AP": (signal, everybody)})


def test_a_probe_finds_a_signal_and_invents_none():
    rng = np.random.default_rng(9)
    signal = rng.random(200) < 0.4
    noise = rng.normal(0, 1, (200, 30)).astype(np.float32)
    (nothing,) = probed(noise, signal)["signals"]
    assert nothing["features"]["lo"] < 0.5 < nothing["features"]["hi"]
    telling = noise + 3 * signal[:, None] * (np.arange(30) == 3)
    found = probed(telling, signal)
    assert found["signals"][0]["features"]["lo"] > 0.8 and found["signals"][0]["pixels"]["lo"] < 0.6
    assert rules.features(found)["verdict"] == "open"  # known, and not used
    used = probed(telling, signal, score=rng.random(200) / 2 + 0.5 * ~signal)
    line = rules.features(used)
    assert line["verdict"] == "broken" and "view AP" in line["text"]


def test_a_probe_never_sees_the_patient_it_judges():
    """Features that name the patient tell nothing of others: a split by image would give an AUROC of 1."""
    rng = np.random.default_rng(10)
    who = np.repeat(np.arange(40), 5)
    told = signals.probe(np.eye(40)[who] + rng.normal(0, 0.01, (200, 40)), (rng.random(40) < 0.5)[who], who)
    assert roc_auc_score((rng.random(40) < 2)[who] * 0 + (who % 2), told) < 0.8


def test_signals_are_those_that_vary():
    cohort = {
        "sex": np.array(["F", "M", "", "F"]),
        "view": np.array(["PA", "PA", "PA", "PA"]),
        "machine": np.array(["a", "b", "c", "a"]),
        "age": np.array([1.0, 2.0, 30.0, np.nan]),
    }
    sizes = np.array([[100, 50], [200, 50], [300, 100], [np.nan, np.nan]], float)
    found = signals.signals_of(cohort, sizes)
    assert list(found) == [
        "sex M",
        "machine a",
        "machine b",
        "machine c",
        "age above 2",
        "width above 200",
        "aspect ratio above 3",
    ]
    assert [v.tolist() for v in found["sex M"]] == [[False, True, False, False], [True, True, False, True]]
    assert found["age above 2"][0].tolist() == [False, False, True, False]
    assert signals.signals_of(None, np.full((4, 2), np.nan)) == {}


# ---------------------------------------------------------------- clusters of false alarms


def crowd(rng, kind=30, others=170):
    """Features [N, 6] of patients, a few of a kind of its own; which these are; names."""
    x = rng.normal(0, 1, (kind + others, 6))
    inside = np.arange(len(x)) < kind
    x[inside] += [6, 6, 0, 0, 0, 0]
    return x, inside, np.array([f"p{i:03d}" for i in range(len(x))])


def test_false_alarms_of_one_kind_are_found():
    rng = np.random.default_rng(11)
    x, inside, names = crowd(rng)
    called = rng.random(200) < np.where(inside, 0.7, 0.03)
    found, typical = clusters.figures(x, called, names, names)
    assert rules.clusters(found)["verdict"] == "broken" and found["p"] < 0.001
    assert inside[np.isin(names, found["files"])].all() and inside[typical].all() and len(typical) == 6
    assert found["held_out"]["value"] < 0.6 < 0.9 < found["held_out_others"]["value"]


def test_false_alarms_at_random_are_not():
    rng = np.random.default_rng(12)
    x, _, names = crowd(rng)
    found, _ = clusters.figures(x, rng.random(200) < 0.15, names, names)
    assert found["p"] > 0.05 and rules.clusters(found)["verdict"] in ("kept", "open")


def test_the_permutation_test_keeps_its_level(monkeypatch):
    """Alarms at random in 200 made-up sets: p is uniform, although the worst group is always chosen."""
    monkeypatch.setattr(clusters, "PERMUTATIONS", 1000)
    rng, p = np.random.default_rng(13), []
    groups = np.repeat(np.arange(6), [12, 15, 20, 25, 30, 48])
    for seed in range(200):
        alarms = (rng.random(150) < 0.3) * rng.random(150)  # shares, so that few sets tie
        excess = clusters.excesses(alarms[None], groups, 6).max()
        kind = SimpleNamespace(groups=groups, count=6, excess=excess)
        p.append(clusters.p_of_worst(kind, alarms, seed))
    assert kstest(p, "uniform").pvalue > 0.01 and np.mean(np.array(p) <= 0.05) < 0.1


def test_the_permutation_test_counts_all_orders(monkeypatch):
    """Seven patients: every order of the alarms, one by one."""
    monkeypatch.setattr(clusters, "LEAST_IN_GROUP", 1)
    monkeypatch.setattr(clusters, "PERMUTATIONS", 20_000)
    groups, alarms = np.array([0, 0, 0, 1, 1, 2, 2]), np.array([1, 1, 0, 0, 1, 0, 0.0])
    excess = clusters.excesses(alarms[None], groups, 3).max()

    def worst(order):
        values = []
        for g in range(3):
            own = alarms[list(order)][groups == g]
            deviation = alarms.std(ddof=1) * np.sqrt(len(own) * (1 - len(own) / 7))
            values.append((own.sum() - len(own) * alarms.mean()) / deviation)
        return max(values)

    assert excess == pytest.approx(worst(range(7)))
    exact = np.mean([worst(order) >= excess - 1e-9 for order in itertools.permutations(range(7))])
    kind = SimpleNamespace(groups=groups, count=3, excess=excess)
    assert clusters.p_of_worst(kind, alarms) == pytest.approx(exact, abs=0.015)


def test_held_out_patients_do_not_choose_their_group():
    """Alarms at random: the chosen group looks worse than the rest, on those held out it does not."""
    rng, chosen, honest = np.random.default_rng(14), [], []
    for _ in range(8):
        x, alarms = rng.normal(0, 1, (200, 6)), (rng.random(200) < 0.3).astype(float)
        kind = clusters.Kind(x, alarms)
        inside = kind.groups == kind.worst
        elsewhere = clusters.held_out(x, alarms)
        chosen.append(alarms[inside].mean() - alarms[~inside].mean())
        honest.append(alarms[elsewhere].mean() - alarms[~elsewhere].mean())
    assert np.mean(chosen) > 0.1 and abs(np.mean(honest)) < 0.08


def test_too_little_for_clusters():
    names = np.array([f"p{i}" for i in range(50)])
    x, some = np.random.default_rng(15).normal(0, 1, (50, 3)), np.arange(50) < 5
    nobody = np.zeros(50, bool)
    assert clusters.figures(x, nobody, names, names) == (None, None)
    assert clusters.figures(x, np.arange(50) < 4, names, names) == (None, None)
    assert clusters.figures(x, some, names, names)[0] is not None
    assert clusters.figures(x, ~nobody, names, names) == (None, None)
    assert clusters.figures(x[:20], some[:20], names[:20], names[:20]) == (None, None)
    assert clusters.figures(x, some, np.array(["a"] * 50), names) == (None, None)


def test_the_direction_of_the_head_is_gone():
    rng = np.random.default_rng(16)
    head, x = torch.nn.Linear(5, 2), rng.normal(0, 1, (30, 5)).astype(np.float32)
    reader = SimpleNamespace(task=Task(), finding="PNEUMONIA", inputs=SimpleNamespace(device=CPU))
    direction = (head.weight[1] - head.weight[0]).detach().double().numpy()
    gradients = Reader._gradients(reader, head, x)
    assert np.allclose(gradients, direction, atol=1e-6)
    left = project_out(x.astype(float), gradients)
    assert np.allclose(left @ direction, 0, atol=1e-5)
    assert np.linalg.matrix_rank(left - left.mean(0)) == 4
    along = np.outer(x @ direction, direction) / (direction @ direction)
    assert np.allclose(left, x - along, atol=1e-5)


@pytest.mark.parametrize(
    "task, finding",
    [
        (Task(("Normal", "A", "B")), "any disease"),
        (Task(("Normal", "A", "B")), "B"),
        (Task(("No Finding", "A", "B"), "sigmoid"), "any finding"),
        (Task(("No Finding", "A", "B"), "sigmoid"), "A"),
    ],
)
def test_directions_of_the_head_are_those_of_the_log_odds(task, finding):
    """Of several classes or findings, and of a head with hidden units, against finite differences."""
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    x = np.random.default_rng(17).normal(0, 1, (5, 4)).astype(np.float32)
    reader = SimpleNamespace(task=task, finding=finding, inputs=SimpleNamespace(device=CPU))
    head64, k, step = head.double(), task.findings.index(finding), 1e-5

    def log_odds(features):
        with torch.no_grad():
            return task.log_odds(head64(torch.from_numpy(features)).numpy())[:, k]

    wanted = [
        (log_odds(x + step * e) - log_odds(x - step * e)) / (2 * step) for e in np.eye(4, dtype=np.float64)
    ]
    assert np.allclose(Reader._gradients(reader, head.float(), x), np.array(wanted).T, atol=1e-4)


# ---------------------------------------------------------------- audit.json


def a_side(finding="A", verdict="kept"):
    return {
        "finding": finding,
        "images": 5,
        "of_images": 9,
        "patients": 5,
        "lines": [rules.line("border", verdict, f"{finding} {verdict}")],
        "shortcut": {"verdict": "open", "text": "-"},
        "figures": {},
    }


def test_an_audit_is_kept_side_by_side(tmp_path, capsys):
    run = SimpleNamespace(folder=tmp_path, checkpoint_sha256="one", calibrated=list)
    assert record.audit_of(run) is None
    record.save_side(run, "val", a_side("B"), "A")
    assert record.audit_of(run)["sides"]["val"]["finding"] == "B"  # nothing else is there to show
    record.save_side(run, "val", a_side("A"), "A")
    record.save_side(run, "val", a_side("B", "broken"), "A")
    record.save_side(run, "test", a_side("A", "open"), "A")
    audit = record.audit_of(run)
    assert audit["sides"]["val"]["finding"] == "A" and list(audit["sides"]) == ["val", "test"]
    assert record.kept_of(audit, "val", "B")["lines"][0]["verdict"] == "broken"
    assert record.kept_of(audit, "test", "B") is None and record.kept_of(None, "val", "A") is None
    assert not capsys.readouterr().err

    run.checkpoint_sha256 = "two"
    assert record.audit_of(run) is None and "another checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.pop("sides"),
        lambda a: a["sides"]["val"].pop("lines"),
        lambda a: a["sides"]["val"].pop("others"),
        lambda a: a["sides"]["val"]["lines"][0].update(verdict="passed"),
        lambda a: a["sides"].update(train=a["sides"]["val"]),
        lambda a: a.update(format=99),
    ],
)
def test_a_damaged_audit_is_an_error(tmp_path, change):
    run = SimpleNamespace(folder=tmp_path, checkpoint_sha256="one")
    record.save_side(run, "val", a_side(), "A")
    audit = read_json(tmp_path, "audit.json")
    change(audit)
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    with pytest.raises(InputError, match="audit.json"):
        record.audit_of(run)


# ---------------------------------------------------------------- the command


def test_audit_of_a_run(bench, monkeypatch):
    """The command line on drawn images: all sections, then one again; the test images stay closed."""
    monkeypatch.setattr("data.load_test", None)
    done = succeed("audit", "--run", "outputs/linear", cwd=bench)
    assert "SYNTHETIC" in done.out and "False alarms: " in done.out
    path = bench / "outputs/linear/audit.json"
    first = read_json(path)["sides"]["val"]
    assert [line["key"] for line in first["lines"]] == list(record.KEYS)
    assert "nothing else is known" in first["lines"][2]["text"]
    assert len(first["figures"]["corruptions"]["changes"]) == 13

    done = succeed("audit", "--run", "outputs/linear", "--only", "border", "--most-images", 60, cwd=bench)
    assert "are audited, drawn at random" in done.err and "False alarms" not in done.out
    again = read_json(path)["sides"]["val"]
    assert again["lines"][1:] == first["lines"][1:] and again["images"] <= 60
    assert again["figures"]["border"] != first["figures"]["border"]

    # The report gives each section its own number of images.
    few, all_of_them = again["images"], first["images"]
    report = succeed("compare", "--run", "outputs/linear", cwd=bench).out
    assert f", {few} (Border), {all_of_them} (Lungs)" in report and f"| {few} to {all_of_them} |" in report

    # A section is interrupted: what was there stays.
    kept = path.read_text()
    monkeypatch.setattr(Reader, "outputs", lambda *about: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli("audit", "--run", "outputs/linear", cwd=bench).code == 130
    assert path.read_text() == kept


def test_sections_of_another_threshold_are_left_out(tmp_path, capsys):
    run = SimpleNamespace(folder=tmp_path, checkpoint_sha256="one", calibrated=lambda: [""])
    run.calibration = lambda: {"findings": {"A": {"threshold": 0.25}}}
    side = a_side()
    for key, at in (("corruptions", 0.25), ("clusters", 0.5)):
        side["lines"].append(rules.line(key, "kept", key) | {"threshold": at})
    record.save_side(run, "val", side, "A")
    lines = record.audit_of(run)["sides"]["val"]["lines"]
    assert [line["key"] for line in lines] == ["border", "corruptions"]
    said = capsys.readouterr().err
    assert "judged another threshold than today's @Rec of A: False alarms left out" in said


def test_audit_of_a_run_without_threshold(own_runs):
    """Not calibrated, and few patients: every section says why it cannot be run."""
    folder = own_runs / "outputs/scratch"
    (folder / "calibration.json").unlink()
    done = succeed("audit", "--run", folder, "--only", "corruptions", "clusters", "border", cwd=own_runs)
    lines = {line["key"]: line for line in read_json(folder, "audit.json")["sides"]["val"]["lines"]}
    assert {line["verdict"] for line in lines.values()} == {"open"}
    assert "not calibrated" in lines["clusters"]["text"] and "calibrate.py" in done.out


def test_what_cannot_be_audited(own_runs):
    refused(cli("audit", "--run", "outputs/nothing", cwd=own_runs), "outputs/nothing")
    refused(cli("audit", "--run", "outputs/linear", "--finding", "X", cwd=own_runs), "--finding X")
    refused(cli("audit", "--run", "outputs/linear", "--only", "heart", cwd=own_runs), "heart")
    (own_runs / "outputs/linear/audit.json").write_text("{")
    refused(cli("audit", "--run", "outputs/linear", cwd=own_runs), "audit.json")


def test_audits_in_the_report(own_runs):
    """What the report says of a run that was audited on both sides, and of one that was not."""
    run = Run(own_runs / "outputs/linear")
    record.save_side(run, "val", a_side("PNEUMONIA", "broken"), "PNEUMONIA")
    record.save_side(run, "test", a_side("PNEUMONIA"), "PNEUMONIA")
    entries = [SimpleNamespace(run=run, name="linear", task=run.task)]
    entries.append(SimpleNamespace(run=Run(own_runs / "outputs/scratch"), name="scratch", task=run.task))
    _, text, verdicts, sentences, missing = audit_blocks(entries)
    assert verdicts.rows[0][:4] == ["linear, validation", "5", "open", "broken"]
    assert verdicts.rows[1][3:5] == ["kept", "-"]
    assert ["linear, test", "Border", "kept", "PNEUMONIA kept"] in sentences.rows
    assert "5 of 9 validation images" in text.text and "scratch" in missing.text
    assert "kept" in succeed("compare", cwd=own_runs).out
