"""Tests of teacher: a finished run whose probabilities another learns."""

import json
import shutil

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F

from common.task import Task
from data import Batches
from images.drawn import make_synthetic
from models.inputs import Inputs
from records.run import Run
from tests.shared import (
    CPU,
    cli,
    load_pth,
    randomise,
    read_json,
    refused,
    same_tensors,
    small_vit,
    strip_time,
    succeed,
    toy_subset,
    two_class_gradient,
)
from training.earlier.teacher import Teacher
from training.loss import Supervised

INPUTS = Inputs((0.5,), (0.5,), CPU)
THREE, FINDINGS = Task(("a", "b", "c")), Task(("a", "b", "c"), "sigmoid")


# ---------------------------------------------------------------- losses


def test_imitation_is_the_divergence_of_scipy():
    rng = torch.Generator().manual_seed(0)
    z, wanted = (torch.randn(20, 3, generator=rng, dtype=torch.float64) * 3 for _ in range(2))
    p, q = (scipy.special.softmax(v.numpy(), axis=1) for v in (wanted, z))
    assert np.allclose(THREE.imitation(z, wanted), scipy.special.rel_entr(p, q).sum(1), atol=1e-12)
    p, q = (scipy.special.expit(v.numpy()) for v in (wanted, z))
    each = scipy.special.rel_entr(p, q) + scipy.special.rel_entr(1 - p, 1 - q)
    assert np.allclose(FINDINGS.imitation(z, wanted), each.mean(1), atol=1e-12)
    for task in (THREE, FINDINGS):
        assert torch.allclose(task.imitation(wanted, wanted), torch.zeros(20, dtype=torch.float64))
        sure = torch.tensor([[60.0, -60, -60]]).requires_grad_()
        task.imitation(sure, -sure.detach()).sum().backward()
        assert torch.isfinite(sure.grad).all()


def test_an_unknown_class_counts_for_nothing():
    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    y, weight = torch.tensor([0, -1, 2, 1, -1, 2]), torch.tensor([3.0, 0.5, 1.0])
    known = y >= 0
    for how in ({}, {"class_weights": weight}, {"focal_gamma": 2.0}, {"label_smoothing": 0.1}):
        found = THREE.losses(z, y, **how)
        assert not found[~known].any() and torch.equal(found[known], THREE.losses(z[known], y[known], **how))
    for w in (None, weight):
        assert torch.equal(THREE.weights(y, w)[known], THREE.weights(y[known], w))
        assert not THREE.weights(y, w)[~known].any()
    assert np.array_equal(THREE.class_weights(y.numpy()), THREE.class_weights(y[known].numpy()))
    truth = THREE.truth(y.numpy())
    assert (truth[~known.numpy()] == -1).all()
    assert np.array_equal(truth[known.numpy()], THREE.truth(y[known].numpy()))
    watched = [Supervised(THREE).watch(y[k].numpy(), z[k]) for k in (slice(None), known)]
    assert watched[0] == watched[1]


def taught_gradient(share, accumulate=1):
    """A Gradient whose teacher is another small ViT."""
    made = two_class_gradient(INPUTS, accumulate, change=lambda x: x.flip(-1))
    knows = randomise(small_vit(in_chans=1), seed=5)

    def teacher(grey):
        with torch.no_grad():
            return knows((grey - 0.5) / 0.5)

    made.teacher = teacher
    teacher.share = share
    return made


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_taught_step_is_the_formula(accumulate):
    """(1 - W) x loss of the known + W x mean divergence from what the teacher makes of the changed images."""
    subset = toy_subset(24, 0)
    subset.targets = np.where(np.arange(24) % 4 == 3, -1, subset.targets)
    model, plain = (randomise(small_vit(in_chans=1)) for _ in range(2))
    made = taught_gradient(0.3, accumulate)
    found = made.add(model.eval(), Batches(subset, INPUTS), torch.arange(24))
    grey = (torch.from_numpy(subset.images)[:, None].float() / 255).flip(-1)
    y, z = torch.from_numpy(subset.targets), plain.eval()((grey - 0.5) / 0.5)
    hard = F.cross_entropy(z, y, ignore_index=-1)
    soft = F.kl_div(
        z.log_softmax(1), made.teacher(grey).log_softmax(1), log_target=True, reduction="batchmean"
    )
    wanted = 0.7 * hard + 0.3 * soft
    wanted.backward()
    assert float(found) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for (name, a), b in zip(model.named_parameters(), plain.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name


def test_images_without_labels_alone_leave_the_hard_loss_zero():
    subset = toy_subset(8, 0)
    subset.targets = np.full(8, -1)
    model = randomise(small_vit(in_chans=1)).eval()
    assert float(taught_gradient(0.0).add(model, Batches(subset, INPUTS), torch.arange(8))) == 0
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


# ---------------------------------------------------------------- the commands


SHORT = ("--epochs", 1, "--batch-size", 32, "--max-steps", 3)


@pytest.fixture(scope="module")
def school(own_build, flags, tiny_npz):
    """A trained teacher in outputs/pretrained."""

    def build(cwd):
        succeed("train_pretrained", *flags, "--weights", tiny_npz, *SHORT, cwd=cwd)

    return own_build("school", build)[0], flags


def test_a_teacher_is_what_predict_makes_of_an_image(school):
    """The same logits as the run gives itself, whatever its own scaling."""
    run = Run(school[0] / "outputs/pretrained")
    teacher = Teacher(run, run.config, CPU, 0.5)
    grey = torch.rand(5, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(run.results[k]).view(1, -1, 1, 1) for k in ("mean", "std"))
    expected = run.model()((grey.expand(-1, 3, -1, -1) - mean) / std)
    assert torch.allclose(teacher(grey), expected, atol=1e-5) and not teacher(grey).requires_grad
    assert teacher.description()["minutes"] == run.results["minutes"]


def test_a_taught_run(school):
    """It says so everywhere; the teacher's minutes count; a share of 0 is training without a teacher."""
    cwd, flags = school
    teacher = ("--teacher", "outputs/pretrained")
    done = succeed("train_scratch", *flags, *SHORT, *teacher, "--out", "outputs/taught", cwd=cwd)
    assert "taught by outputs/pretrained" in done.out
    results = read_json(cwd / "outputs/taught/results.json")
    assert results["teacher"]["model"] == read_json(cwd / "outputs/pretrained/results.json")["model"]
    assert Run(cwd / "outputs/taught").minutes == results["minutes"] + results["teacher"]["minutes"]
    runs = {"alone": (), "unheeded": (*teacher, "--teacher-weight", 0)}
    for name, more in runs.items():
        succeed("train_scratch", *flags, *SHORT, *more, "--out", f"outputs/{name}", cwd=cwd)
    alone, unheeded, taught = (load_pth(cwd, "outputs", n, "checkpoint.pth") for n in (*runs, "taught"))
    assert same_tensors(alone, unheeded) and not same_tensors(alone, taught)
    histories = [read_json(cwd / "outputs" / n / "results.json")["history"] for n in runs]
    assert strip_time(histories[0]) == strip_time(histories[1])
    succeed("calibrate", "--bootstrap", 100, "--run", "outputs/taught", cwd=cwd)
    table = succeed("compare", "--run", "outputs/taught", cwd=cwd).out
    assert "ViT scratch, taught" in table and "(outputs/pretrained) |" in table
    assert (
        "and stays as it is"
        in succeed(
            "train_scratch", *flags, *SHORT, *teacher, "--out", "outputs/taught", "--resume", cwd=cwd
        ).err
    )
    done = cli("train_scratch", *flags, *SHORT, "--out", "outputs/taught", "--resume", cwd=cwd)
    refused(done, "settings differ", "teacher: was given")


def test_images_without_labels_join_a_taught_run(school, tmp_path_factory):
    cwd, flags = school
    elsewhere = tmp_path_factory.mktemp("more") / "elsewhere"
    make_synthetic(elsewhere, train=24, test=8, seed=7)
    argv = ("train_scratch", *flags, *SHORT, "--also-unlabelled", elsewhere, "--out", "outputs/more")
    done = succeed(*argv, "--teacher", "outputs/pretrained", cwd=cwd)
    assert "32 without labels" in done.out
    also = read_json(cwd / "outputs/more/results.json")["split"]["also"]
    assert [o["train"] for o in also.values()] == [32]
    succeed("calibrate", "--bootstrap", 100, "--run", "outputs/more", cwd=cwd)
    argv_site = ("calibrate", "--site", elsewhere / "train", "--name", "x", "--run")
    refused(cli(*argv_site, "outputs/more", cwd=cwd), "are among those", "outputs/more was trained")
    # a student of such a run has never been shown these images, but its teacher has
    short = ("train_scratch", *flags, *SHORT, "--teacher", "outputs/more", "--out", "outputs/pupil")
    succeed(*short, cwd=cwd)
    succeed("calibrate", "--bootstrap", 100, "--run", "outputs/pupil", cwd=cwd)
    done = cli(*argv_site, "outputs/pupil", cwd=cwd)
    refused(done, "are among those", "outputs/more, from which outputs/pupil was made")
    shutil.move(cwd / "outputs/more", cwd / "outputs/away")
    done = cli(*argv_site, "outputs/pupil", cwd=cwd)
    assert "outputs/more, which is not there any more" in done.err and "are among those" not in done.err
    shutil.move(cwd / "outputs/away", cwd / "outputs/more")
    refused(cli(*argv, "--overwrite", cwd=cwd), "give --teacher")
    done = cli(*argv, "--overwrite", "--teacher", "outputs/pretrained", "--balance", "sampler", cwd=cwd)
    refused(done, "--balance sampler", "--also-unlabelled")


def test_teachers_that_cannot_teach(school, tmp_path):
    cwd, flags = school
    shutil.copytree(cwd / "outputs/pretrained", tmp_path / "outputs/pretrained")
    argv = ("train_scratch", *flags, *SHORT, "--teacher", "outputs/pretrained")
    refused(cli(*argv, "--img-size", 48, cwd=tmp_path), "something else", "img_size 32, here 48")
    refused(cli(*argv, "--split-seed", 3, cwd=tmp_path), "another split")
    refused(cli(*argv, "--mixup", 0.2, cwd=tmp_path), "--mixup")
    refused(cli(*argv[:-1], "nowhere", cwd=tmp_path), "nowhere")
    refused(cli(*argv, "--teacher-weight", 1.5, cwd=tmp_path), "--teacher-weight")
    succeed("pretrain_mae", *flags, *SHORT, cwd=tmp_path)
    refused(cli(*argv[:-1], "outputs/mae", cwd=tmp_path), "tells nothing")
    assert not (tmp_path / "outputs/scratch").exists()


# ------------------------------------------------- runs of the version that had --teacher-features


def older(run, **changes):
    """Make a run folder one that the version of commit 82507f6 left: it kept settings that are gone now, in
    results.json and in last.pth. `changes`: {"data" or "recipe": {name: value}}."""
    results = read_json(run, "results.json")
    last = load_pth(run, "last.pth") if (run / "last.pth").exists() else None
    for settings in filter(None, (results, last and last["meta"])):
        settings["data"] |= {"normalise": "none"} | changes.get("data", {})
        settings["recipe"] |= {"teacher_features": 0.0} | changes.get("recipe", {})
    (run / "results.json").write_text(json.dumps(results))
    if last:
        torch.save(last, run / "last.pth")


def test_a_run_taught_features_is_read_but_not_resumed(school, synthetic, tmp_path):
    cwd, flags = school
    shutil.copytree(cwd / "outputs/pretrained", tmp_path / "outputs/pretrained")
    argv = ("train_scratch", *flags, *SHORT, "--teacher", "outputs/pretrained")
    succeed(*argv, cwd=tmp_path)
    run = tmp_path / "outputs/scratch"
    older(run, recipe={"teacher_features": 1.0})
    weights = load_pth(run, "checkpoint.pth")
    done = cli(*argv, "--resume", cwd=tmp_path)
    refused(done, "recipe.teacher_features: was 1.0, which is gone", "the version of commit 82507f6")
    assert done.err.count("\n") == 1
    done = cli(*argv, "--resume", "--teacher-features", 1, cwd=tmp_path)
    refused(done, "--teacher-features is gone: the version of commit 82507f6 is the last that has it")
    assert same_tensors(weights, load_pth(run, "checkpoint.pth"))
    succeed("calibrate", "--bootstrap", 100, "--run", run, cwd=tmp_path)
    succeed("predict", synthetic / "test", "--run", run, cwd=tmp_path)
    assert "ViT scratch, taught" in succeed("compare", "--run", run, cwd=tmp_path).out
    older(run)  # one that did not use it goes on
    assert "and stays as it is" in succeed(*argv, "--resume", cwd=tmp_path).err


@pytest.mark.parametrize("mode", ["standard", "equalise"])
def test_runs_of_another_exposure_name_the_version_that_reads_them(school, mode, synthetic, tmp_path):
    """With --normalise none, its default, they are read as ever: the same scores, the same family."""
    cwd, flags = school
    run = tmp_path / "outputs/pretrained"
    shutil.copytree(cwd / "outputs/pretrained", run)
    succeed("calibrate", "--bootstrap", 100, "--run", run, cwd=tmp_path)
    before = (run / "scores.npz").read_bytes()
    older(run)
    assert Run(run).results == read_json(cwd, "outputs/pretrained/results.json")
    succeed("calibrate", "--bootstrap", 100, "--run", run, cwd=tmp_path)
    assert (run / "scores.npz").read_bytes() == before
    older(run, data={"normalise": mode})
    words = (
        f"{run} was trained with --normalise {mode}",
        "the version of commit 82507f6 is the last that reads",
    )
    for script, argv in (
        ("calibrate", ["--run", run]),
        ("predict", [synthetic / "test", "--run", run]),
        ("explain", ["--run", run]),
        ("train_scratch", [*flags, *SHORT, "--teacher", run]),
    ):
        done = cli(script, *argv, cwd=tmp_path)
        refused(done, *words)
        assert done.err.count("\n") == 1 and done.out == ""
    assert "exposure " + mode in succeed("compare", "--run", run, cwd=tmp_path).out  # it was measured
    weights = cwd / read_json(run, "results.json")["weights"]["path"]
    done = cli("train_pretrained", *flags, "--weights", weights, *SHORT, "--resume", cwd=tmp_path)
    refused(done, f"data.normalise: was '{mode}', which is gone", "the version of commit 82507f6")
