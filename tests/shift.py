"""Tests of shift: distances against scikit-learn, p-values against brute force and by simulation."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import binom, ks_2samp
from sklearn.covariance import LedoitWolf

import shift
from common import InputError
from inputs import Inputs
from models import Ensemble, PixelLinear
from run import Run
from tests.shared import CPU, cli, predict_rows, read_json, refused, small_vit, succeed

D = 6


def drawn(count, seed, move=0.0):
    """(features float32 [count, D], correlated; logits [count, 2]) of a made-up model."""
    rng = np.random.default_rng([seed, 7])
    mixing = np.random.default_rng(0).normal(size=(D, D))
    features = (rng.normal(size=(count, D)) @ mixing + move).astype(np.float32)
    half = features[:, 0] + rng.normal(size=count)
    return features, np.stack([-half, half], axis=1).astype(np.float32)


def reference(seed=0, validated=300):
    features, logits = drawn(validated, seed)
    return shift.Reference(shift.learn(drawn(400, seed + 1000)[0], features, logits, range(validated)), "x")


def judged(known, features, logits):
    """The verdict on one image each of so many patients."""
    batch, (typicality, places) = shift.Batch(), known.place(features)
    for i in range(len(features)):
        batch.add(f"{i}", f"p{i}", typicality[i], places[i], logits[i], logits[i, 1] > 0)
    return known.judge(batch, known.logits[:, 1] > 0)


# ---------------------------------------------------------------- an image


def test_distance_is_scikit_learns_and_typicality_a_count():
    train, (val, logits), new = drawn(200, 1)[0], drawn(90, 2), drawn(50, 3, move=1.0)[0]
    fitted = LedoitWolf().fit(train)
    known = shift.Reference(shift.learn(train, val, logits, range(90)), "x")
    usual, found = (np.sqrt(fitted.mahalanobis(x)) for x in (val, new))
    expected = [(1 + (usual >= d).sum()) / 91 for d in found]
    assert known.place(new)[0] == pytest.approx(expected)
    assert known.distances == pytest.approx(np.sort(usual), rel=1e-4)


def test_typicality_of_new_images_is_uniform():
    """P(typicality <= t) <= t, over references and images drawn alike."""
    known = [reference(seed, validated=60) for seed in range(40)]
    found = np.concatenate([k.place(drawn(25, 5000 + i)[0])[0] for i, k in enumerate(known)])
    for t in (0.05, 0.1, 0.3):
        assert (found <= t).mean() < t + 4 * np.sqrt(t * (1 - t) / 40)


def test_many_features_are_cut_to_those_of_most_variance(monkeypatch):
    monkeypatch.setattr(shift, "ROOM", 4 * D * 2)
    train, (val, logits) = drawn(200, 1)[0], drawn(90, 2)
    arrays = shift.learn(train, val, logits, range(90))
    values, axes = np.linalg.eigh(LedoitWolf().fit(train).covariance_)
    z = (val - train.mean(0)) @ axes[:, -2:] / np.sqrt(values[-2:])
    assert arrays["whiten"].shape == (D, 2)
    assert arrays["distances"] == pytest.approx(np.sort(np.linalg.norm(z, axis=1)), rel=1e-3)


def test_what_a_run_keeps_is_small_and_holds_no_image():
    rng = np.random.default_rng(0)
    for width in (192, 1024):
        train = rng.normal(size=(1100, width)).astype(np.float32)
        arrays = shift.learn(train[:1024], train, train[:, :2], range(1100))
        assert sum(a.nbytes for a in arrays.values()) < 2 << 20
        assert arrays["features"].shape == (1000, 64)


# ---------------------------------------------------------------- a batch


def test_one_image_of_each_patient():
    patients = list("aabbbcaadd")
    some = shift.one_each(patients)
    assert sorted(np.array(patients)[some]) == list("abcd")
    assert {tuple(sorted(shift.one_each(patients, seed))) for seed in range(50)} > {tuple(sorted(some))}


def test_a_batch_neither_grows_nor_minds_the_order(monkeypatch):
    monkeypatch.setattr(shift, "BATCH", 20)
    rows = [(f"image{i}", f"patient{i % 50}", i, np.zeros(2), np.zeros(2), True) for i in range(400)]
    one, two = shift.Batch(), shift.Batch()
    for row in rows:
        one.add(*row)
    for row in rows[::-1]:
        two.add(*row)
    assert len(one.rows) == len(one.heap) == 20
    assert {p: row[:2] for p, row in one.rows.items()} == {p: row[:2] for p, row in two.rows.items()}
    for patient, (here, *_) in one.rows.items():
        names = [name for name, whose, *_ in rows if whose == patient]
        assert here == min(map(shift.checksum, names))
    keys = sorted((shift.checksum(f"patient patient{i}"), f"patient{i}") for i in range(50))
    assert set(one.rows) == {patient for _, patient in keys[:20]}


def test_odd_images_against_simulation():
    """How many of n uniform numbers beat the r-th best of N: counted."""
    rng, validated, n, tries = np.random.default_rng(0), 300, 40, 40_000
    limit = np.sort(rng.random((tries, validated)), axis=1)[:, -3]  # r = 3 = 0.01 * 301
    beaten = (rng.random((tries, n)) > limit[:, None]).sum(axis=1)
    for odd in (1, 2, 3):
        p = (beaten >= odd).mean()
        assert shift.odd_test(odd, n, validated) == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / tries))
    assert shift.odd_test(0, n, validated) == 1.0
    assert shift.odd_test(0, n, 98) is None and shift.odd_test(0, n, 99) == 1.0  # 1 / (99 + 1) is odd enough


def test_a_small_validation_set_cannot_tell_what_is_odd(own_runs, synthetic, tmp_path):
    """24 validation images: the oddest has typicality 0.04, so 0% odd would be no news."""
    succeed("calibrate", "--min-recall", 0.9, "--run", "outputs/linear", cwd=own_runs)
    argv = (synthetic / "test", "--run", "outputs/linear", "--summary", "s.json")
    done = succeed("predict", *argv, cwd=own_runs)
    found = read_json(own_runs, "s.json")
    assert found["odd"] is None and found["p"]["odd"] is None
    assert "that takes 99 validation images" in done.err and "% odd" not in done.err


def test_permutation_test_against_all_permutations():
    """Two strata so small that every assignment can be tried."""
    from itertools import combinations, product

    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(5, 2)), rng.normal(size=(5, 2)) + 0.8
    sa, sb = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 1])

    def statistic(first, second, kernel):
        i, j = list(first), list(second)
        return kernel[np.ix_(i, i)].mean() + kernel[np.ix_(j, j)].mean() - 2 * kernel[np.ix_(i, j)].mean()

    values = []
    for s in (0, 1):
        both = np.concatenate([a[sa == s], b[sb == s]])
        m, n = (sa == s).sum(), (sb == s).sum()
        squared = ((both[:, None] - both[None]) ** 2).sum(2)
        kernel = np.exp(-squared / np.median(squared))
        every = range(m + n)
        splits = [tuple(range(m)), *[c for c in combinations(every, m) if c != tuple(range(m))]]
        scale = m * n / (m + n)
        values.append([scale * statistic(c, set(every) - set(c), kernel) for c in splits])
    sums = [x + y for x, y in product(*values)]
    expected = np.mean(np.array(sums) >= sums[0] - 1e-12)
    got = shift.two_sample_test(a, b, sa, sb, draws=4000)
    assert got == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 4000))
    assert shift.two_sample_test(a, b, np.zeros(5), np.ones(5)) is None


@pytest.mark.parametrize("n", [20, 100])
def test_false_alarms(n, monkeypatch):
    """Batches like validation are called shifted in at most 5% of 150 draws, as far as these can tell."""
    monkeypatch.setattr(shift, "DRAWS", 99)
    monkeypatch.setattr(shift, "two_sample_test", fast_test(99))
    found = [judged(reference(s, 150), *drawn(n, 20_000 + s))["verdict"] for s in range(150)]
    assert set(found) <= {"like", "shifted"}
    assert found.count("shifted") <= binom.ppf(0.999, 150, shift.LEVEL)


def fast_test(draws, real=shift.two_sample_test):
    return lambda *args: real(*args, draws=draws)


def test_shifts_are_found():
    known = reference()
    verdict = judged(known, *drawn(80, 5, move=1.5))
    assert verdict["verdict"] == "shifted" and verdict["p_joint"] <= 0.05 and verdict["patients"] == 80
    scores = drawn(80, 6)
    assert judged(known, scores[0], scores[1] * 4)["p"]["scores"] <= 0.01
    few = judged(known, *drawn(10, 7))
    assert few["verdict"] == "few" and "n < 20" in few["says"]
    assert judged(known, *drawn(10, 8, move=9.0))["verdict"] == "shifted"
    empty = known.judge(shift.Batch(), known.logits[:, 1] > 0)
    assert empty["verdict"] == "few" and empty["p"] == {} and "no image" in shift.sentence(empty)


def test_another_share_of_sick_people_is_no_shift():
    """Images of one kind in another mixture; a test without strata sees that at once."""
    rng, known = np.random.default_rng(0), reference(validated=400)
    features, logits = drawn(3000, 9)
    sick = np.flatnonzero(logits[:, 1] > 0)
    some = np.concatenate([rng.choice(sick, 90), rng.choice(np.flatnonzero(logits[:, 1] <= 0), 10)])
    verdict = judged(known, features[some], logits[some])
    assert verdict["verdict"] == "like" and verdict["called"] == 0.9
    assert ks_2samp(known.logits[:, 1], logits[some, 1]).pvalue < 1e-6


# ---------------------------------------------------------------- in the scripts


def test_features_are_what_the_head_reads():
    torch.manual_seed(0)
    x, view = torch.rand(3, 1, 32, 32), torch.nn.Identity()
    vit = small_vit(img_size=32, patch_size=8).eval()
    inputs = Inputs((0.5,) * vit.in_chans, (0.5,) * vit.in_chans, CPU, views=(view, lambda z: z.flip(3)))
    with torch.no_grad():
        out = inputs.logits_and_features(vit, x)
        assert torch.equal(out[:, : vit.num_classes], inputs.logits(vit, x))
        assert torch.allclose(out[:, vit.num_classes :], inputs.features(vit, x), atol=1e-6)
        both = Ensemble([{"kind": "linear", **PixelLinear().config}] * 2, [[0.5]] * 2, [[0.5]] * 2).eval()
        plain = Inputs((0.0,), (1.0,), CPU)
        assert plain.logits_and_features(both, x).shape == (3, 2 + 2 * 1024)
    assert not vit.head._forward_pre_hooks


def test_predict_says_whether_images_are_like_validation(own_runs, synthetic):
    done = succeed("calibrate", "--min-recall", 0.9, "--run", "outputs/linear", cwd=own_runs)
    assert (own_runs / "outputs/linear/reference.npz").stat().st_size < 2 << 20
    argv = (synthetic / "test", "--run", "outputs/linear", "--summary", "s.json", "--keep", "drawn test")
    done = succeed("predict", *argv, cwd=own_runs)
    found = read_json(own_runs, "s.json")
    assert (
        found["says"] in done.err
        and found["images"] == 40
        and set(found["p"]) == {"odd", "features", "scores"}
    )
    assert read_json(own_runs, "outputs/linear/batches/drawn test.json")["verdict"] == found["verdict"]
    rows = predict_rows(own_runs, synthetic / "test", "--run", "outputs/linear")
    known = Run(own_runs / "outputs/linear").reference()
    assert all(1 / (1 + len(known.distances)) <= float(r["typicality"]) <= 1 for r in rows)
    report = succeed("compare", cwd=own_runs).out
    assert "are they like validation?" in report and found["says"] in report
    path = own_runs / "outputs/linear/batches/drawn test.json"
    path.write_text(json.dumps({"images": 3}))
    refused(cli("compare", cwd=own_runs), "drawn test.json is damaged")


def test_runs_of_an_older_version_have_no_typicality(own_runs, synthetic):
    (own_runs / "outputs/linear/reference.npz").unlink()
    rows = predict_rows(own_runs, synthetic / "test", "--run", "outputs/linear")
    assert {r["typicality"] for r in rows} == {""}
    argv = ("predict", synthetic / "test", "--run", "outputs/linear")
    assert "run calibrate.py for typicality" in succeed(*argv, cwd=own_runs).err
    refused(cli(*argv, "--summary", "s.json", cwd=own_runs), "nothing to hold images against")
    refused(cli(*argv, "--keep", "../x", cwd=own_runs), "--keep '../x'")


@pytest.mark.parametrize("change", ["nan", "shape", "absent", "text"])
def test_damaged_references_are_one_line(own_runs, synthetic, change):
    path = own_runs / "outputs/linear/reference.npz"
    arrays = dict(np.load(path, allow_pickle=False))
    if change == "nan":
        arrays["mean"][0] = np.nan
    elif change == "shape":
        arrays["features"] = arrays["features"][:, :3]
    elif change == "absent":
        del arrays["whiten"]
    np.savez(path, **arrays)
    if change == "text":
        path.write_text("no arrays")
    argv = ("predict", synthetic / "test", "--run", "outputs/linear")
    refused(cli(*argv, cwd=own_runs), "reference.npz")


def test_bad_arrays():
    with pytest.raises(InputError, match="x is damaged"):
        shift.Reference({"whiten": np.zeros((2, 2))}, "x")
