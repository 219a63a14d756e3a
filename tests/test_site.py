"""Tests of hospital: promises by closed form and by simulation, and the commands around them."""

import json
import math
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import beta, binom, norm

from calibration import site as site_module
from calibration import wording
from calibration.operating_point import Rule
from common.console import InputError
from images.drawn import make_synthetic
from metrics import choose_threshold_by_min_recall, choose_threshold_with_guarantee, positives_needed
from tests.shared import cli, middle_below, of_one, predict_rows, read_json, refused, succeed

RULE = Rule(bootstrap=200)


def made_up(n, seed, images=1):
    """(truth, scores, patients) of n patients with the finding and as many without, `images` of each."""
    rng = np.random.default_rng(seed)
    y = np.repeat([0, 1], n * images)
    centre = np.repeat(rng.normal(size=2 * n), images) + 1.5 * y
    p = 1 / (1 + np.exp(-centre - 0.3 * rng.normal(size=len(y))))
    return y, p, np.repeat(np.arange(2 * n), images).astype(str)


@pytest.mark.parametrize("floor, confidence", [(0.95, 0.95), (0.9, 0.95), (0.95, 0.9), (0.99, 0.5)])
def test_needed_is_the_least_number(floor, confidence):
    n = positives_needed(floor, confidence)
    assert floor**n <= 1 - confidence < floor ** (n - 1)
    y, p, patients = made_up(n, 0)
    choose_threshold_with_guarantee(y, p, floor, confidence, patients)
    few = (y == 0) | (np.cumsum(y) <= n - 1)
    with pytest.raises(InputError, match=f"at least {n} are needed"):
        choose_threshold_with_guarantee(y[few], p[few], floor, confidence, patients[few])


def test_what_too_few_can_promise_instead_is_what_they_can():
    """Asked for just that, the guaranteed threshold exists; asked for a little more, it does not."""
    y, p, patients = made_up(30, 1)
    found = site_module.choose(y, p, patients, RULE)
    assert found["guaranteed"] is None and found["needed"] == 59 and found["positive_patients"] == 30
    less = found["instead"]
    assert (less["floor"], less["confidence"]) == (0.904, 0.785)  # 0.05^(1/30) and 1 - 0.95^30, rounded down
    for how in ((less["floor"], 0.95), (0.95, less["confidence"])):
        choose_threshold_with_guarantee(y, p, *how, patients)
    for how in ((less["floor"] + 1e-3, 0.95), (0.95, less["confidence"] + 1e-3)):
        with pytest.raises(InputError):
            choose_threshold_with_guarantee(y, p, *how, patients)


@pytest.mark.parametrize("more", [{"min_specificity": 0.99}, {"jointly": True}])
def test_no_confidence_is_advised_where_more_must_be_granted(more):
    """--guarantee asks for @InGuar too, and --jointly shares it out: the confidence alone may be refused."""
    y, p, patients = made_up(30, 1)
    rule = replace(RULE, **more)
    found = site_module.choose(y, p, patients, replace(rule, jointly=False))
    text = "\n".join(site_module.lines("x", "sick", found, rule))
    assert "with confidence 0.785" in text and "--guarantee" not in text
    found = site_module.choose(y, p, patients, RULE)
    assert "--guarantee 0.785" in "\n".join(site_module.lines("x", "sick", found, RULE))


def test_advice_of_a_site_is_granted_to_the_last_printed_digit():
    """Every number of patients that is too few for the usual promise, with the flags as they are printed."""
    for n in range(5, 59):
        y, p, patients = made_up(n, n)
        (line,) = [
            x
            for x in site_module.lines("x", "sick", site_module.choose(y, p, patients, RULE), RULE)
            if "no @Guar" in x
        ]
        floor, confidence = (
            float(re.search(rf"--{flag} ([\d.]+)", line)[1]) for flag in ("min-recall", "guarantee")
        )
        choose_threshold_with_guarantee(y, p, floor, 0.95, patients)
        choose_threshold_with_guarantee(y, p, 0.95, confidence, patients)
        assert floor**n <= 0.05 + 1e-12 < (floor + 0.001) ** n  # nothing is given away, but for rounding
        assert confidence <= 1 - 0.95**n < confidence + 0.001
    tiny = site_module.instead(1, 0.9999, 0.95)["confidence"]  # 0.0001: three decimals would be 0
    assert 0 < tiny <= 1e-4


def test_no_threshold_of_a_fixed_list_beats_the_guaranteed_one():
    """Testing thresholds fixed beforehand, without correction, passes none above @Guar: nothing is lost."""
    for seed in range(20):
        y, p, patients = made_up(120, seed)
        guaranteed = choose_threshold_with_guarantee(y, p, groups=patients)[0]
        lowered = site_module.choose(y, p, patients, RULE)["guaranteed"]
        assert lowered < guaranteed and ((p >= lowered) == (p >= guaranteed)).all()
        candidates = np.random.default_rng(seed).random(50)
        misses = np.array([(p[y == 1] < t).sum() for t in candidates])
        passed = candidates[binom.cdf(misses, 120, 0.05) <= 0.05]
        assert len(passed) == 0 or passed.max() <= guaranteed


def test_recall_at_the_mean_threshold_is_kept_on_average():
    """Uniform scores: the k-th smallest of n is Beta(k, n + 1 - k), so the mean recall is 1 - k / (n + 1)."""
    rng, recalls = np.random.default_rng(0), {}
    for n in (19, 30, 60):
        values = [1 - site_module.conformal_threshold(rng.random(n), np.arange(n), 0.95) for _ in range(300)]
        k = int(0.05 * (n + 1))
        expected, spread = beta.mean(k, n + 1 - k), beta.std(k, n + 1 - k)
        assert np.mean(values) == pytest.approx(1 - expected, abs=4 * spread / np.sqrt(300))
        recalls[n] = np.mean(values)
    assert min(recalls.values()) > 0.94
    assert site_module.conformal_threshold(rng.random(18), np.arange(18), 0.95) is None
    assert site_module.needed_on_average(0.95) == 19 and site_module.needed_on_average(0.9) == 9


def test_guaranteed_threshold_holds_where_recall_first_does_not():
    """A reduced form of the study: 300 draws of 80 local patients, true recall known."""
    below = {"threshold": 0, "guaranteed": 0}
    everyone = made_up(20_000, 99)
    sick = np.sort(everyone[1][everyone[0] == 1])
    for seed in range(300):
        found = site_module.choose(*made_up(80, seed), RULE)
        for name in below:
            below[name] += np.searchsorted(sick, found[name]) / len(sick) > 0.05
    assert below["guaranteed"] <= binom.ppf(0.999, 300, 0.05) and below["threshold"] > 90


def test_too_few_for_any_threshold():
    y, p, patients = made_up(4, 0)
    assert "5 of each are needed" in site_module.choose(y, p, patients, RULE)["why_not"]
    assert site_module.held_out(*made_up(6, 0), 0.5, RULE) is None


def test_halves_have_whole_patients_and_both_kinds():
    y, p, patients = made_up(31, 0, images=3)
    here, there = site_module.halves(patients, y)
    assert not set(patients[here]) & set(patients[there]) and len(here) + len(there) == len(y)
    assert abs((y[here] == 1).sum() - (y[there] == 1).sum()) <= 3 and len(set(y[here])) == 2


def test_held_out_figures_are_of_the_other_half():
    y, p, patients = made_up(80, 3, images=2)
    here, there = site_module.halves(patients, y)
    found = site_module.held_out(y, p, patients, 0.5, RULE)
    thr = site_module.choose(y[here], p[here], patients[here], RULE)["threshold"]
    row = found["points"]["at_rec"]
    assert row["thr"] == thr and row["recall"] == pytest.approx((p[there] >= thr)[y[there] == 1].mean())
    shipped = found["points"]["at_shipped"]
    assert shipped["specificity"] == pytest.approx((p[there] < 0.5)[y[there] == 0].mean())


def test_thresholds_of_a_site_lie_between_its_scores():
    """All three of them, and no local decision changes."""
    y, p, patients = made_up(80, 2)
    found = site_module.choose(y, p, patients, RULE)
    exact = {
        "threshold": choose_threshold_by_min_recall(y, p, 0.95)[0],
        "mean": np.sort(p[y == 1])[int(0.05 * 81) - 1],  # one image a patient: the k-th smallest
        "guaranteed": choose_threshold_with_guarantee(y, p, groups=patients)[0],
    }
    for name, thr in exact.items():
        assert found[name] == pytest.approx(middle_below(thr, p), rel=1e-9)
        assert ((p >= found[name]) == (p >= thr)).all() and found["gaps"][name] > 0


class Kept:
    """What hospital.promise needs of a Run."""

    checkpoint_sha256 = "x"
    task, results = SimpleNamespace(findings=()), {}

    def calibration(self, name):
        return {"temperature": 1.0, "temperature_applied": False, "precision": "fp32"}

    def __str__(self):
        return "run"

    def save_site(self, site, thresholds, name=""):
        self.site = json.loads(json.dumps(thresholds))


def promised(truth, scores, rule):
    """What hospital.promise keeps of made-up findings, one image a patient: truth, scores [N, F]."""
    shipped = {f"finding {k}": 0.5 for k in range(truth.shape[1])}
    run, patients = Kept(), np.array([f"p{i}" for i in range(len(truth))])
    site_module.promise(run, "here", patients, (truth, scores, shipped), rule)
    return run.site


def several_findings(counts, n=400, seed=0):
    """Truth int8 [n, F] with so many images with each finding, and scores better than chance."""
    rng = np.random.default_rng(seed)
    truth = np.stack([rng.permutation(np.arange(n) < count) for count in counts], axis=1).astype(np.int8)
    return truth, 1 / (1 + np.exp(-(rng.normal(size=truth.shape) + 1.5 * truth)))


def test_jointly_reaches_a_site(capsys):
    """Three findings share the 5% that may go wrong; a fourth is too rare for any threshold."""
    truth, scores = several_findings((150, 120, 90, 3))
    patients, seen = np.array([f"p{i}" for i in range(400)]), {}
    for jointly, confidence in ((False, 0.95), (True, 1 - 0.05 / 3)):
        found = promised(truth, scores, Rule(jointly=jointly))
        for k in range(3):
            exact = choose_threshold_with_guarantee(truth[:, k], scores[:, k], 0.95, confidence, patients)[0]
            kept = found["findings"][f"finding {k}"]["guaranteed"]
            assert kept == pytest.approx(middle_below(exact, scores[:, k]), rel=1e-9)
        assert "why_not" in found["findings"]["finding 3"]
        seen[jointly] = found["jointly"], capsys.readouterr().out
    assert seen[False][0] is None and "union bound" not in seen[False][1]
    assert seen[True][0] == {"confidence": 0.95, "findings": 3}
    assert "floors of 3 findings hold at once with confidence 0.95" in seen[True][1]
    assert (
        "each alone with 0.983333, which needs 80 patients" in seen[True][1]
    )  # 0.95^80 < 0.05 / 3 < 0.95^79
    assert "with confidence 0.983333, while patients stay like these" in seen[True][1]
    assert 0.95**80 <= 0.05 / 3 < 0.95**79


@pytest.mark.parametrize("jointly", [False, True])
def test_advice_for_several_findings_is_granted_to_all(capsys, jointly):
    """A finding's own --guarantee would be refused for one with fewer patients: the advice is for all."""
    truth, scores = several_findings((100, 45, 30))
    promised(truth, scores, Rule(jointly=jointly))
    out = capsys.readouterr().out
    asked = re.findall(r"--guarantee ([\d.]+)", out)
    assert len(asked) == 1
    found = promised(truth, scores, Rule(0.95, float(asked[0]), strict=True, jointly=jointly))
    assert all(f["guaranteed"] is not None for f in found["findings"].values())
    more = Rule(0.95, float(asked[0]) + 0.001, strict=True, jointly=jointly)
    with pytest.raises(InputError, match="finding 2: 30 independent positives"):
        promised(truth, scores, more)
    for floor in re.findall(r"--min-recall ([\d.]+)", out):
        assert promised(truth, scores, Rule(float(floor), jointly=jointly))


def test_guaranteed_is_never_above_recall_first_at_a_site():
    """Three patients of twenty images each, with low scores, are few among patients and many among images."""
    rng = np.random.default_rng(3)
    patients = np.r_[
        np.repeat(["a", "b", "c"], 20), [f"s{i}" for i in range(120)], [f"h{i}" for i in range(100)]
    ]
    y = np.repeat([1, 0], [180, 100])
    p = np.r_[rng.uniform(0.05, 0.2, 60), rng.uniform(0.5, 0.99, 120), rng.uniform(0, 0.6, 100)]
    found = site_module.choose(y, p, patients, RULE)
    assert found["guaranteed"] <= found["threshold"] < 0.2


@pytest.mark.parametrize("patients, images, floor", [(19, 2, 0.95), (36, 3, 0.95), (67, 2, 0.9)])
def test_the_chance_below_the_floor_holds_for_images_more_or_less_alike(patients, images, floor):
    """Simulated: images of one patient share a part of their score, from none to all of it."""
    rng, said = np.random.default_rng(0), wording.chance_text(patients * images, patients, floor)
    bound = float(said.split()[-1])
    for shared in (0, 0.3, 0.6, 0.9, 1):
        own = rng.normal(size=(4000, patients, 1)) * np.sqrt(shared)
        scores = own + rng.normal(size=(4000, patients, images)) * np.sqrt(1 - shared)
        missed = math.floor(patients * images * (1 - floor) + 1e-9)
        threshold = np.sort(scores.reshape(4000, -1), axis=1)[:, missed]
        assert (norm.sf(threshold) < floor).mean() <= bound + 0.04


def test_bad_figures_of_a_site_are_warned_of():
    """Sick and healthy alike: @Guar calls everybody sick; on new patients recall falls below the floor."""
    rng = np.random.default_rng(0)
    y, p, patients = np.repeat([0, 1], 60), np.r_[rng.uniform(0.5, 1, 60), rng.random(60)], np.arange(120)
    found = site_module.choose(y, p, patients, RULE)
    text = "\n".join(site_module.lines("x", "sick", found, RULE))
    assert found["specificities"]["guaranteed"] == 0
    assert "warning: on these images calls everybody sick: specificity 0" in text
    chance = sum(math.comb(60, k) * 0.05**k * 0.95 ** (60 - k) for k in range(4))  # three of 60 may be missed
    assert f"below it with a chance of up to {chance:.2f} " in text
    more = binom.cdf(6, 120, 0.05)  # by 120 images, of which 6 may be missed; 60 patients give less
    assert wording.chance_text(120, 60, 0.95) == f"a chance of at most about {max(chance, more):.2f}"
    row = {"tp": 9, "fn": 1, "fp": 3, "tn": 0}
    assert wording.concerns(row, 0.95) == [
        "recall 0.900 is below the floor of 0.95",
        "calls the healthy sick: specificity 0",
    ]
    assert wording.concerns({"tp": 0, "fn": 5, "fp": 0, "tn": 5}, 0.95) == ["calls nobody sick: recall 0"]
    assert wording.concerns({"tp": 94999, "fn": 5001, "fp": 0, "tn": 5}, 0.95) == [
        "recall 0.94999 is below the floor of 0.95"
    ]
    assert wording.concerns({"tp": 19, "fn": 1, "fp": 0, "tn": 5}, 0.95) == []


# ---------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def clinic(tmp_path_factory):
    """Labelled images of another hospital."""
    root = tmp_path_factory.mktemp("clinic") / "elsewhere"
    make_synthetic(root, train=20, test=120)
    return root / "test"


def test_a_site_from_labels_to_decisions(own_runs, clinic):
    argv = (
        "calibrate",
        "--run",
        "outputs/linear",
        "--site",
        clinic,
        "--name",
        "our clinic",
        "--bootstrap",
        100,
    )
    done = succeed(*argv, "--report", "--min-recall", 0.9, cwd=own_runs)
    assert "needed at our clinic: 29 patients" in done.out and "as shipped" in done.out
    found = read_json(own_runs, "outputs/linear/sites/our clinic.json")
    only = found["findings"]["PNEUMONIA"]
    assert found["images"] == 120 and only["guaranteed"] <= only["threshold"]
    assert "chosen on half" in done.out and set(only["held_out"]["points"]) >= {"at_rec", "at_shipped"}
    rows = predict_rows_at(own_runs, clinic, "our clinic")
    for point, name in (("Rec", "threshold"), ("Guar", "guaranteed")):
        for row in rows:
            assert (row[f"decision@{point}"] == "PNEUMONIA") == (float(row["p_pneumonia"]) >= only[name])
    before = predict_rows(own_runs, clinic, "--run", "outputs/linear")  # the shipped ones stay
    shipped = of_one(read_json(own_runs, "outputs/linear/calibration.json"))["threshold"]
    assert all((r["decision@Rec"] == "PNEUMONIA") == (float(r["p_pneumonia"]) >= shipped) for r in before)
    refused(
        cli("predict", clinic, "--run", "outputs/linear", "--site", "x", cwd=own_runs), "'x'", "our clinic"
    )
    path = own_runs / "outputs/linear/sites/our clinic.json"
    wrong = [{"findings": {}}, {"findings": {"PNEUMONIA": {"threshold": 7}}}, {"checkpoint": "0" * 64}]
    for change in [*wrong, {"min_recall": "high"}]:
        path.write_text(json.dumps({**found, **change}))
        done = cli("predict", clinic, "--run", "outputs/linear", "--site", "our clinic", cwd=own_runs)
        refused(done, "our clinic.json")


def predict_rows_at(folder, images, site):
    import csv
    import io

    done = succeed("predict", images, "--run", "outputs/linear", "--site", site, cwd=folder)
    return list(csv.DictReader(io.StringIO(done.out)))


def test_a_site_with_few_images_is_told_what_it_can_have(own_runs, clinic, tmp_path):
    few = tmp_path / "few"
    for kind in ("NORMAL", "PNEUMONIA"):
        (few / kind).mkdir(parents=True)
        for path in sorted((clinic / kind).iterdir())[:8]:
            shutil.copy(path, few / kind)
    argv = ("calibrate", "--run", "outputs/linear", "--site", few, "--name", "few")
    done = succeed(*argv, "--report", cwd=own_runs)
    assert "no @Guar: needs 59 patients with PNEUMONIA" in done.out and "no @Mean: needs 19" in done.out
    assert "These can promise a recall of" in done.out
    refused(cli(*argv, "--guarantee", 0.95, cwd=own_runs), "at least 59 are needed")
    for path in sorted((few / "NORMAL").iterdir())[2:]:
        path.unlink()
    done = cli(*argv[:-1], "fewer", cwd=own_runs)
    assert done.code == 2 and "too few labelled images" in done.err and "5 of each are needed" in done.out
    assert not (own_runs / "outputs/linear/sites/fewer.json").exists()


def test_a_table_instead_of_folders_gives_the_same_thresholds(own_runs, clinic, tmp_path):
    names = [path.relative_to(clinic) for path in sorted(clinic.rglob("*.jpeg"))]
    rows = [f"{name},{name.stem},{int(name.parts[0] == 'PNEUMONIA')}" for name in names]
    (tmp_path / "t.csv").write_text("\n".join(["path,patient,Pneumonia", *rows]))
    (tmp_path / "p.csv").write_text(
        "\n".join(["path,patient", *(f"{clinic.name}/{n},{n.stem}" for n in names)])
    )
    argv = ("calibrate", "--run", "outputs/linear", "--site", clinic, "--name")
    succeed(*argv, "folders", "--patients", tmp_path / "p.csv", cwd=own_runs)
    succeed(*argv, "table", "--labels", tmp_path / "t.csv", cwd=own_runs)
    a, b = (read_json(own_runs / f"outputs/linear/sites/{n}.json") for n in ("folders", "table"))
    assert len(names) == a["images"] == b["images"]
    assert a["findings"] == b["findings"]


def test_a_note_on_patients_only_where_they_are_not_known(own_runs, clinic, tmp_path):
    argv = ("calibrate", "--run", "outputs/linear", "--bootstrap", 100, "--name", "x", "--site")
    known = succeed(*argv, clinic, cwd=own_runs)  # the file names tell, one image each
    assert "as a patient of its own" not in known.err
    plain, rows = tmp_path / "plain", ["path,patient"]
    for kind in ("NORMAL", "PNEUMONIA"):
        (plain / kind).mkdir(parents=True)
        for i, path in enumerate(sorted((clinic / kind).iterdir())[:20]):
            shutil.copy(path, plain / kind / f"a{i}.jpeg")
            rows.append(f"plain/{kind}/a{i}.jpeg,{kind}{i}")
    unknown = succeed(*argv, plain, cwd=own_runs)
    assert unknown.err.count("patients unknown: every image counts as a patient of its own") == 1
    table = tmp_path / "p.csv"
    table.write_text("\n".join(rows))
    assert "of its own" not in succeed(*argv, plain, "--patients", table, cwd=own_runs).err
    table.write_text("\n".join(rows[:-3]))
    assert "3 of 40 images count" in succeed(*argv, plain, "--patients", table, cwd=own_runs).err


def test_a_site_of_a_run_whose_images_have_moved(own_runs, synthetic, clinic, tmp_path):
    """--data-dir says where they are, and --skip-bad holds for the site, too."""
    argv = ("calibrate", "--run", "outputs/linear", "--bootstrap", 100, "--name", "x", "--site")
    site, moved = tmp_path / "site", tmp_path / "moved"
    shutil.copytree(clinic, site)
    succeed(*argv, site, cwd=own_runs)
    thresholds = read_json(own_runs / "outputs/linear/sites/x.json")["findings"]
    shutil.copytree(synthetic, moved)
    path = own_runs / "outputs/linear/results.json"
    results = read_json(path)
    results["data"]["data_dir"] = str(tmp_path / "gone")
    path.write_text(json.dumps(results))
    refused(cli(*argv, site, cwd=own_runs), "gone")
    succeed(*argv, site, "--data-dir", moved, cwd=own_runs)
    assert read_json(own_runs / "outputs/linear/sites/x.json")["findings"] == thresholds
    (site / "NORMAL/broken.jpeg").write_bytes(b"no image")
    refused(cli(*argv, site, "--data-dir", moved, cwd=own_runs), "broken.jpeg")
    succeed(*argv, site, "--data-dir", moved, "--skip-bad", cwd=own_runs)
    assert read_json(own_runs / "outputs/linear/sites/x.json")["findings"] == thresholds


def test_copies_at_a_site_count_as_one_patient(own_runs, clinic, synthetic, tmp_path):
    """59 patients are needed for @Guar; 24 pictures under 72 names are 24."""
    site = tmp_path / "site"
    for kind in ("NORMAL", "PNEUMONIA"):
        (site / kind).mkdir(parents=True)
        for i, path in enumerate(sorted((clinic / kind).iterdir())[:24]):
            for copy in range(3 if kind == "PNEUMONIA" else 1):
                shutil.copy(path, site / kind / f"a{copy}-{i}.jpeg")
    argv = ("calibrate", "--run", "outputs/linear", "--bootstrap", 100, "--name", "x", "--site")
    done = succeed(*argv, site, cwd=own_runs)
    assert "48 of 96 images are copies of another one" in done.err and "leaves 48 fewer" in done.err
    assert "72 images of 24 patients with PNEUMONIA" in done.out
    assert "no @Guar: needs 59 patients" in done.out
    other = sorted((site / "NORMAL").iterdir())[0]
    shutil.copy(other, site / "PNEUMONIA/b.jpeg")
    assert "with other labels" in succeed(*argv, site, cwd=own_runs).err
    # The test images of the run are no new ones.
    assert "are test images of" in succeed(*argv, synthetic / "test", cwd=own_runs).err


def test_sites_side_by_side_have_a_cache_each(own_runs, clinic, tmp_path):
    argv = ("calibrate", "--run", "outputs/linear", "--bootstrap", 100, "--name", "x", "--site")
    for name in ("a", "b"):
        shutil.copytree(clinic, tmp_path / name)
    succeed(*argv, tmp_path / "a", cwd=own_runs)
    succeed(*argv, tmp_path / "b", cwd=own_runs)
    assert "rebuilding" not in succeed(*argv, tmp_path / "a", cwd=own_runs).err


def test_small_thresholds_of_a_site_are_not_printed_as_zero():
    y, p, patients = made_up(70, 3)
    chosen = site_module.choose(y, p * 1e-9, patients, RULE)
    shown = "\n".join(site_module.lines("site", "PNEUMONIA", chosen, RULE, True))
    assert "0.0000" not in shown and "e-" in shown


def test_wrong_sites(own_runs, clinic, synthetic, tmp_path):
    argv = ("calibrate", "--run", "outputs/linear")
    refused(cli(*argv, "--site", clinic, cwd=own_runs), "--site DIR and --name WHERE")
    refused(cli(*argv, "--site", clinic, "--name", "../x", cwd=own_runs), "--name '../x'")
    refused(cli(*argv, "--site", clinic, "--name", "x-tta", cwd=own_runs), "--name x-tta")
    refused(cli(*argv, "--report", cwd=own_runs), "--site DIR and --name WHERE")
    refused(cli(*argv, "--site", tmp_path, "--name", "x", cwd=own_runs), "NORMAL does not exist")
    refused(cli(*argv, "--site", synthetic / "train", "--name", "x", cwd=own_runs), "96 images", "trained")
    other = tmp_path / "other"
    shutil.copytree(clinic, other)
    (other / "PNEUMONIA").rename(other / "EDEMA")
    refused(cli(*argv, "--site", other, "--name", "x", cwd=own_runs), "PNEUMONIA does not exist", "EDEMA")
    table = tmp_path / "t.csv"
    table.write_text("path,patient,Edema\na.png,1,0\n")
    wanted = (*argv, "--site", clinic, "--name", "x", "--labels", table)
    refused(cli(*wanted, cwd=own_runs), "t.csv: it needs a column for PNEUMONIA", "it has Edema")
