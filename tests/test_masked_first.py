"""Tests of train_scratch.py --masked-epochs: masked pretraining and training in one command."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest

import train_scratch
from common import console
from common.console import TimeLeft
from records import lock
from records.run import Run, find_runs
from tests.shared import cli, load_pth, read_json, refused, same_tensors, strip_time, succeed
from training import loop, plan, recipe, resume, seen, step

MASKED_STEPS, STEPS = 2, 5  # an epoch: 77 images by 64, by 16
AMONG = ("--device", "cpu", "--no-amp")
ONE = ("--masked-epochs", 2, "--epochs", 2, "--batch-size", 16)


@pytest.fixture
def argv(flags):
    return [*flags, *AMONG, *ONE]


@pytest.fixture(scope="module")
def whole(built_once, flags):
    """An uninterrupted run: its folder, outputs/scratch of another."""
    cwd, _ = built_once(
        "masked_first", lambda cwd: succeed("train_scratch", *flags, *AMONG, *ONE, cwd=cwd).code
    )
    return cwd / "outputs/scratch"


def stop_at(patch, number, signum=signal.SIGTERM):
    """Have this process asked to stop in step `number`, counted from 1 over both stages."""
    real, steps = step.Gradient.add, []

    def add(self, *batch):
        steps.append(1)
        if len(steps) == number:
            os.kill(os.getpid(), signum)
        return real(self, *batch)

    patch.setattr(step.Gradient, "add", add)


def same_runs(one, two):
    """Whether two runs have the same weights and history, in both stages."""
    for a, b in ((one, two), (one / "masked", two / "masked")):
        if not same_tensors(load_pth(a, "checkpoint.pth"), load_pth(b, "checkpoint.pth")):
            return False
        histories = [strip_time(read_json(run, "results.json")["history"]) for run in (a, b)]
        if histories[0] != histories[1]:
            return False
    return True


def test_one_command_does_what_two_do(argv, flags, whole, tmp_path):
    """Bit for bit: the masked epochs are those of pretrain_mae.py, the others begin with --init."""
    succeed("pretrain_mae", *flags, *AMONG, "--epochs", 2, "--out", "a", cwd=tmp_path)
    argv[argv.index("--masked-epochs") + 1] = 0
    succeed("train_scratch", *argv, "--init", "a", "--out", "b", cwd=tmp_path)
    shutil.move(tmp_path / "a", tmp_path / "b/masked")
    assert same_runs(whole, tmp_path / "b")
    masked, alone = read_json(whole, "masked/results.json"), read_json(tmp_path, "b/masked/results.json")
    assert masked["recipe"] == alone["recipe"] and masked["split"] == alone["split"]
    assert masked["model_config"] == alone["model_config"] and masked["model_config"]["kind"] == "mae"


def test_results_tell_of_both_stages(whole):
    results, masked = read_json(whole, "results.json"), read_json(whole, "masked/results.json")
    assert results["finished"] and results["recipe"]["masked_epochs"] == 2 and len(masked["history"]) == 2
    assert set(results["init"]) == {"run", "checkpoint", "minutes", "own"} and results["init"]["own"]
    assert results["init"]["checkpoint"] == Run(whole / "masked").checkpoint_sha256
    own = sum(row["seconds"] for row in results["history"]) / 60
    assert results["init"]["minutes"] == masked["minutes"] > 0
    assert results["minutes"] == pytest.approx(masked["minutes"] + own)
    assert Run(whole).minutes == results["minutes"]  # they are not counted twice
    assert masked["command"] == results["command"]


@pytest.mark.parametrize("number", [3, 2 * MASKED_STEPS + 1, 2 * MASKED_STEPS + STEPS + 2])
def test_stopped_in_either_stage_it_goes_on_bit_for_bit(argv, whole, tmp_path, number):
    """In the second masked epoch, in the first step with labels, in the second epoch with labels."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, number)
        assert cli("train_scratch", *argv, "--out", "run", cwd=tmp_path).code == 143
    in_masked = number <= 2 * MASKED_STEPS
    assert (tmp_path / "run/results.json").exists() != in_masked
    refused(cli("train_scratch", *argv, "--out", "run", cwd=tmp_path), "--resume", "--overwrite")
    succeed("train_scratch", *argv, "--out", "run", "--resume", cwd=tmp_path)
    assert same_runs(whole, tmp_path / "run")
    results = read_json(tmp_path, "run/results.json")
    assert "--resume" not in results["command"] and results["minutes"] > results["init"]["minutes"]


def test_a_full_disk_after_the_masked_epochs_does_not_cost_them(argv, whole, tmp_path):
    """results.json of the second stage was written, its last.pth was not."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for name in ("last.pth", "checkpoint.pth"):
        (run / name).unlink()
    results = read_json(run, "results.json")
    (run / "results.json").write_text(
        json.dumps(results | {"finished": False, "history": [], "best_epoch": 0})
    )
    refused(cli("train_scratch", *argv, "--out", "run", cwd=tmp_path), "continue it with --resume")
    refused(cli("calibrate", "--run", "run", cwd=tmp_path), "continue it with", "--resume")
    before = (run / "masked/checkpoint.pth").read_bytes()
    succeed("train_scratch", *argv, "--out", "run", "--resume", cwd=tmp_path)
    assert (run / "masked/checkpoint.pth").read_bytes() == before and same_runs(whole, run)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_last_validation_of_a_stage_it_begins_nothing_else(argv, whole, tmp_path, signum):
    real = loop.predict_together

    def predict(model, subset, *others):
        if len(seen_by_validation) == 1:  # the second masked epoch is the last one
            os.kill(os.getpid(), signum)
        seen_by_validation.append(subset)
        return real(model, subset, *others)

    seen_by_validation = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "predict_together", predict)
        done = cli("train_scratch", *argv, "--out", "run", cwd=tmp_path)
    assert done.code == 128 + signum and "what is saved goes on with" in done.err
    assert read_json(tmp_path, "run/masked/results.json")["finished"]
    assert not (tmp_path / "run/results.json").exists() and len(seen_by_validation) == 2
    succeed("train_scratch", *argv, "--out", "run", "--resume", cwd=tmp_path)
    assert same_runs(whole, tmp_path / "run")


def test_labels_that_cannot_be_trained_are_refused_before_the_masked_epochs(argv, synthetic, tmp_path):
    names = sorted(path.relative_to(synthetic).as_posix() for path in synthetic.glob("*/*/*.jpeg"))
    rows = [f"{name},{int(number == 0)}" for number, name in enumerate(names)]
    (tmp_path / "rare.csv").write_text("\n".join(["path,Rare", *rows]))
    done = cli("train_scratch", *argv, "--labels", "rare.csv", "--findings", "Rare", cwd=tmp_path)
    refused(done, "validation no finding is present")
    assert not list(tmp_path.glob("outputs/*"))


def test_a_loss_that_is_no_number_has_advice_that_helps():
    plain = SimpleNamespace(outer=None, recipe=recipe.Recipe(optimiser="muon"))
    stage = SimpleNamespace(outer=Run("x"), recipe=recipe.Recipe(optimiser="muon"))
    amp = SimpleNamespace(amp=True)
    assert resume.what_to_try(plain, SimpleNamespace(amp=False)) == "a smaller --lr"
    assert resume.what_to_try(plain, amp) == "a smaller --lr, or --no-amp"
    assert resume.what_to_try(stage, amp) == "--masked-epochs 0, or --optimiser adamw, or --no-amp"


def test_stopped_between_the_stages_it_goes_on(argv, whole, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_scratch, "build_vit", stop)
        done = cli("train_scratch", *argv, "--out", "outputs/run", cwd=tmp_path)
        assert done.code == 130 and "goes on with" in done.err and "--resume" in done.err
    # What is there is no model, and everybody says so.
    listed = succeed("compare", "--list", cwd=tmp_path).out
    assert "masked epochs: finished" in listed and "last.pth of a finished run" in listed
    assert "ViT scratch" in listed and "masked autoencoder" not in listed
    refused(cli("calibrate", "--run", "outputs/run", cwd=tmp_path), "only its masked epochs", "--resume")
    refused(cli("calibrate", cwd=tmp_path), "no finished runs")
    plain = argv.copy()
    plain[plain.index("--masked-epochs") + 1] = 0
    for flag in ("--resume", "--seed=0"):
        done = cli("train_scratch", *plain, flag, "--out", "outputs/run", cwd=tmp_path)
        refused(done, "masked epochs", "--masked-epochs 2", "--resume")
    longer = [*argv, "--masked-epochs", 3, "--out", "outputs/run", "--resume"]
    refused(cli("train_scratch", *longer, cwd=tmp_path), "--masked-epochs 2")
    other = [*argv, "--img-size", 48, "--out", "outputs/run", "--resume"]
    refused(cli("train_scratch", *other, cwd=tmp_path), "img_size")
    succeed("train_scratch", *argv, "--out", "outputs/run", "--resume", cwd=tmp_path)
    assert same_runs(whole, tmp_path / "outputs/run")


def test_an_overwritten_run_leaves_nothing(argv, whole, tmp_path):
    """Stopped in its masked epochs, the new run has none of the old one's files; without masked epochs, none
    of theirs."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "calibration.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 1)
        done = cli("train_scratch", *argv, "--seed", 1, "--out", "run", "--overwrite", cwd=tmp_path)
    assert done.code == 143 and [p.name for p in run.iterdir()] == ["masked"]
    # The same command goes on, --overwrite and all.
    again = (*argv, "--seed", 1, "--out", "run", "--overwrite", "--resume")
    assert "resuming run/masked" in succeed("train_scratch", *again, cwd=tmp_path).err
    plain = argv.copy()
    plain[plain.index("--masked-epochs") + 1] = 0
    succeed("train_scratch", *plain, "--max-steps", 1, "--out", "run", "--overwrite", cwd=tmp_path)
    assert not (run / "masked").exists() and "init" not in read_json(run, "results.json")
    refused(cli("train_scratch", *argv, "--out", "run", "--resume", cwd=tmp_path), "without masked epochs")


def test_the_command_of_a_run_is_the_one_whose_settings_it_has(argv, tmp_path):
    """Settings of the epochs with labels may change while none has begun."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 1)
        assert cli("train_scratch", *argv, "--out", "run", cwd=tmp_path).code == 143
    done = succeed("train_scratch", *argv, "--lr", "2e-4", "--out", "run", "--resume", cwd=tmp_path)
    assert "settings of the epochs with labels, which have not begun, are those of this command" in done.err
    results = read_json(tmp_path, "run/results.json")
    assert "--lr 2e-4" in results["command"] and "--resume" not in results["command"]
    assert results["recipe"]["lr"] == 2e-4


def test_masked_epochs_and_init_exclude_each_other(argv, tmp_path):
    refused(cli("train_scratch", *argv, "--init", "x", cwd=tmp_path), "--init", "--masked-epochs 0")


def test_init_replaces_the_masked_epochs_of_the_default(flags, shipped_recipe, tmp_path):
    assert shipped_recipe["masked_epochs"]
    refused(cli("train_scratch", *flags, "--init", "x", cwd=tmp_path), "--init x holds no run")


def test_a_recipe_may_begin_masked(monkeypatch):
    """A named recipe sets the field; --masked-epochs 0 turns it off."""
    from tests.test_recipe import parsed

    recipes = {"default": {}, "best": dict(masked_epochs=25)}
    monkeypatch.setattr(train_scratch, "DEFAULTS", train_scratch.DEFAULTS._replace(recipes=recipes))
    monkeypatch.setitem(recipe.RECIPES, "best", "the best")
    assert parsed("train_scratch")[1].masked_epochs == 0
    assert parsed("train_scratch", "--recipe", "best")[1].masked_epochs == 25
    assert parsed("train_scratch", "--recipe", "best", "--masked-epochs", "0")[1].masked_epochs == 0


def test_both_stages_share_what_they_must(argv, tmp_path):
    """The optimiser, the seed, the parts of a step, --max-steps. Each seed has its own masked epochs."""
    more = ("--optimiser", "muon", "--accumulate", 2, "--seeds", 0, 1, "--max-steps", 2)
    succeed("train_scratch", *argv, *more, cwd=tmp_path)
    encoders = []
    for seed in (0, 1):
        run = tmp_path / f"outputs/scratch-seed{seed}"
        one, two = read_json(run, "masked/results.json"), read_json(run, "results.json")
        for name, value in (("optimiser", "muon"), ("accumulate", 2), ("max_steps", 2), ("seed", seed)):
            assert one["recipe"][name] == two["recipe"][name] == value
        assert len(one["history"]) == len(two["history"]) == 1
        encoders.append(load_pth(run, "masked/checkpoint.pth"))
    assert not same_tensors(*encoders)


def test_unlabelled_images_join_the_masked_epochs(argv, synthetic, tmp_path):
    """Without a teacher they teach nothing else."""
    from images.drawn import make_synthetic

    make_synthetic(tmp_path / "drawn", train=8, test=4, seed=7)
    shutil.move(tmp_path / "drawn/train", tmp_path / "clinic")
    also = ("--also-unlabelled", tmp_path / "clinic", "--max-steps", 1, "--balance", "sampler")
    done = succeed("train_scratch", *argv, *also, cwd=tmp_path)
    assert "join the masked epochs alone" in done.err
    first, second = (read_json(tmp_path, "outputs/scratch", p, "results.json") for p in ("masked", "."))
    assert first["split"]["also"]["clinic"]["train"] == 8 and "also" not in second["split"]
    # A run that learns from this one is still compared with them.
    ((folder, encoder),) = seen.forebears(Run(tmp_path / "outputs/scratch"))
    assert encoder.config.also_unlabelled == (str(tmp_path / "clinic"),)


def test_a_run_keeps_its_masked_epochs_where_it_is_moved(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "elsewhere")
    ((named, encoder),) = seen.forebears(Run(tmp_path / "elsewhere"))
    assert named == "outputs/scratch/masked" and encoder.folder == tmp_path / "elsewhere/masked"
    shutil.rmtree(tmp_path / "elsewhere/masked")
    assert seen.forebears(Run(tmp_path / "elsewhere")) == [("outputs/scratch/masked", None)]


def test_masked_epochs_are_no_model(argv, whole, tmp_path):
    """The folder of the first stage is listed nowhere as a run; its last.pth is spare."""
    shutil.copytree(whole, tmp_path / "outputs/scratch")
    done = succeed("train_scratch", *argv, "--resume", cwd=tmp_path)
    assert "is finished, and stays as it is" in done.err
    assert [str(run) for run in find_runs(tmp_path / "outputs")] == [str(tmp_path / "outputs/scratch")]
    listed = succeed("compare", "--list", cwd=tmp_path).out
    assert "1 run folder," in listed and "outputs/scratch/masked/last.pth" in listed
    succeed("calibrate", "--bootstrap", 100, "--min-recall", 0.9, cwd=tmp_path)
    report = succeed("compare", cwd=tmp_path).out
    assert "masked pretraining" in report
    card = succeed("compare", "--card", "outputs/scratch", cwd=tmp_path).out
    assert "an encoder trained without labels first, in" in card and "masked_epochs 2" in card


def test_the_run_is_locked_during_both_stages(argv, tmp_path, monkeypatch):
    real, held = plan.train, []

    def train(p, *args, **kwargs):
        held.append(lock.holder(tmp_path / "run"))
        return real(p, *args, **kwargs)

    monkeypatch.setattr(plan, "train", train)
    real_add = step.Gradient.add

    def add(self, *batch):
        held.append(lock.holder(tmp_path / "run"))
        return real_add(self, *batch)

    monkeypatch.setattr(step.Gradient, "add", add)
    succeed("train_scratch", *argv, "--max-steps", 1, "--out", "run", cwd=tmp_path)
    assert held.count(None) == 1 and len(held) == 2 + 1 + 1  # train locks it itself


def test_time_left_covers_both_stages(monkeypatch):
    """4 steps of a minute; after them 10 minutes, once that is known; two seeds follow."""
    times = iter(range(0, 6000, 60))
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(times)))
    for after, told in (
        (None, "at least 3.0 min left, 11 min for all 3 seeds, without validation"),
        (600.0, "13 min left, 41 min for all 3 seeds, without validation"),
    ):
        left = TimeLeft(4, 4, 3, 2, around=(0.0, after))
        left.begin()
        left.end_step()
        assert left.text(3 * 60, 0) == told
