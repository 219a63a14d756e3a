"""Tests of commands."""

import ast
import importlib
import json
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import scipy.special
import scipy.stats
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from common import scripts
from images import decode
from images.drawn import make_synthetic
from images.split import split_train_val
from layouts.folders import list_images
from tests.shared import REPO, SCRIPTS, cli, copy_set, load_pth, read_json, refused, same_tensors, succeed
from training import plan
from vit import VisionTransformer


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_docstring(script, tmp_path):
    doc = importlib.import_module(script).__doc__
    for flag in ("--help", "--help-all"):
        done = cli(script, flag, cwd=tmp_path)
        assert done.code == 0 and done.err == "" and done.out.startswith(f"usage: {script}.py [flags]")
        assert " ".join(doc.split()) in " ".join(done.out.split()) and f"\n    python {script}.py" in done.out
        assert "default:" in done.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "script, argv, word",
    [
        ("train_scratch", ["--epochs", "0"], "--epochs"),
        ("train_scratch", ["--batch-size", "0"], "--batch-size"),
        ("train_scratch", ["--lr", "nan"], "--lr"),
        ("train_scratch", ["--lr", "-1"], "--lr"),
        ("train_scratch", ["--weight-decay", "-1"], "--weight-decay"),
        ("train_scratch", ["--patience", "0"], "--patience"),
        ("train_scratch", ["--label-smoothing", "1"], "--label-smoothing"),
        ("train_scratch", ["--augment", "plain,rotate=999"], "rotate"),
        ("train_scratch", ["--augment", "plain,scale=1"], "scale"),
        ("train_scratch", ["--augment", "plain,wings=1"], "wings"),
        ("train_scratch", ["--augment", "wild"], "plain, robust, strong"),
        ("train_scratch", ["--max-steps", "0"], "--max-steps"),
        ("train_scratch", ["--device", "abacus"], "abacus"),
        ("train_scratch", ["--img-size", "33"], "33"),
        ("train_scratch", ["--img-size", "0"], "--img-size"),
        ("train_scratch", ["--resume"], "last.pth"),
        ("train_scratch", ["--seed", "-1"], "--seed"),
        ("train_scratch", ["--split-seed", "-1"], "-1"),
        ("train_linear", ["--C", "0"], "--C"),
        ("train_linear", ["--img-size", "48"], "multiple of 32"),
        ("train_pretrained", ["--drop-path", "1"], "--drop-path"),
        ("train_pretrained", ["--weights", "w.npz"], "check the path"),
    ],
)
def test_bad_flags(script, argv, word, flags, tiny_npz, tmp_path):
    more = ["--weights", tiny_npz] if script == "train_pretrained" and "--weights" not in argv else []
    refused(cli(script, *flags, *more, *argv, cwd=tmp_path), word)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.startswith("train") and s != "train_linear"])
def test_flags_are_written_out(script, tmp_path):
    """An abbreviated --recipe once trained the default recipe and recorded the other one."""
    for argv in (["--rec", "paper"], ["--recip=paper"], ["--epoch", "1"], ["--dem"]):
        refused(cli(script, *argv, cwd=tmp_path), argv[0].split("=")[0])
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_flag_is_met_with_the_right_one(tmp_path):
    refused(cli("train_scratch", "--epoch", 3, cwd=tmp_path), "--epoch 3", "did you mean --epochs?")
    refused(cli("train_scratch", "--seeds", "0,1", cwd=tmp_path), "--seeds", "separate several by spaces")


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_flag_is_a_usage_error(script, tmp_path):
    done = cli(script, "--no-such-flag", cwd=tmp_path)
    assert done.code == 2 and "--no-such-flag" in done.err


@pytest.mark.parametrize("script", ["train_scratch", "train_linear"])
def test_no_data(script, tmp_path):
    refused(cli(script, cwd=tmp_path), "--data-dir", "--download", "--demo", "Data/chest_xray")
    refused(cli(script, "--data-dir", "nowhere", cwd=tmp_path), "nowhere", "--demo")


def test_bad_images_and_folders(synthetic, tmp_path):
    root = copy_set(synthetic, tmp_path)
    argv = ["--data-dir", root, "--img-size", 32]
    cut = next((root / "train" / "NORMAL").iterdir())
    cut.write_bytes(cut.read_bytes()[:2000])
    (root / "train" / "PNEUMONIA" / "notes.jpeg").write_text("not an image")
    refused(cli("train_linear", *argv, cwd=tmp_path), cut.name, "notes.jpeg", "--skip-bad", "2 of 97")
    done = succeed("train_linear", *argv, "--skip-bad", cwd=tmp_path)
    assert "left out 2 of 97" in done.err
    split = read_json(tmp_path, "outputs/linear/results.json")["split"]
    assert split["train"] + split["val"] == 95
    succeed("calibrate", cwd=tmp_path)  # the run's own settings: bad images left out there too
    for path in (root / "test" / "NORMAL").iterdir():
        path.unlink()
    refused(cli("train_linear", *argv, "--out", "y", cwd=tmp_path), "test/NORMAL")
    shutil.rmtree(root / "train" / "NORMAL")
    refused(cli("train_linear", *argv, "--out", "y", cwd=tmp_path), "train holds PNEUMONIA", "two classes")


def test_training_never_opens_a_test_image(synthetic, tmp_path, tiny_npz, monkeypatch):
    """With garbage for test images every training script works, and calibrate.py names them."""
    root = copy_set(synthetic, tmp_path)
    for path in (root / "test").rglob("*.jpeg"):
        path.write_bytes(b"garbage")
    opened, real = [], Image.open
    monkeypatch.setattr(
        Image, "open", lambda source, *a, **k: opened.append(str(source)) or real(source, *a, **k)
    )
    argv = ["--data-dir", root, "--img-size", 32]
    succeed("train_linear", *argv, cwd=tmp_path)
    succeed("train_pretrained", *argv, "--weights", tiny_npz, "--max-steps", 2, cwd=tmp_path)
    done = succeed("train_scratch", *argv, "--max-steps", 2, cwd=tmp_path)
    assert ", 40): " in done.out  # counted
    assert len(set(opened)) == 96 and not any("/test/" in name for name in opened)
    refused(cli("calibrate", cwd=tmp_path), "40 of 40", "test/NORMAL/IM-0001-0001.jpeg")
    assert not list((tmp_path / "outputs").rglob("calibration.json"))


def test_demo(tmp_path, monkeypatch):
    """--demo draws the set, appends -demo to the run's folder and says what it is."""
    monkeypatch.setattr(plan, "make_synthetic", lambda root: make_synthetic(root, train=48, test=16))
    done = succeed("train_linear", "--demo", "--img-size", 32, cwd=tmp_path)
    assert "SYNTHETIC" in done.out
    results = read_json(tmp_path, "outputs/linear-demo/results.json")
    assert results["synthetic"] is True and results["data"]["data_dir"] == "Data/synthetic"
    assert results["split"]["train"] + results["split"]["val"] == 48
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Data", "outputs"]
    assert "SYNTHETIC" in succeed("calibrate", cwd=tmp_path).out


def test_image_split_reports_shared_patients(flags, tmp_path):
    done = succeed("train_linear", *flags, "--split", "image", cwd=tmp_path)
    split = read_json(tmp_path, "outputs/linear/results.json")["split"]
    assert split["shared_patients"] > 0 and f"{split['shared_patients']} validation images share" in done.out


@pytest.mark.parametrize("more", [["--recipe", "paper"], ["--batch-size", 100]])
def test_diverging_run(more, flags, tiny_npz, tmp_path):
    """In the middle of an epoch, or after its only step."""
    done = cli(
        "train_pretrained", *flags, "--weights", tiny_npz, "--lr", "1e30", "--no-amp", *more, cwd=tmp_path
    )
    refused(done, "epoch 1", "--lr")
    assert not (tmp_path / "outputs" / "pretrained" / "checkpoint.pth").exists()


def test_linear_is_scikit_learns_logistic_regression(runs, synthetic):
    """Pooling, standardising and fitting again by hand gives the decision function that the run's logits
    have."""

    def pixels(files):  # 64 px, means of 2 x 2 cells
        decoded = np.stack([decode.decode(synthetic / str(f), 64) for f in files]) / 255
        return decoded.reshape(len(files), 32, 2, 32, 2).mean((2, 4)).reshape(len(files), 1024)

    files, labels, *_ = list_images(synthetic, "train")
    train, val = split_train_val(files, labels)
    scaler = StandardScaler().fit(pixels([files[i] for i in train]))
    fitted = LogisticRegression(C=0.01, max_iter=2000)
    fitted.fit(scaler.transform(pixels([files[i] for i in train])), labels[train])
    with np.load(runs.out / "linear" / "scores.npz") as scores:
        assert scores["val_files"].tolist() == [files[i] for i in val]
        for split in ("val", "test"):
            decision = fitted.decision_function(scaler.transform(pixels(scores[f"{split}_files"])))
            assert np.abs(scores[f"{split}_p1"] - scipy.special.expit(decision)).max() < 1e-3
            assert decision.std() > 0.3


def test_flags_that_would_be_ignored_or_overflow(tmp_path):
    for argv in (
        ["--demo", "--data-dir", "elsewhere"],
        ["--seed", 1, "--seeds", 0, 1],
        ["--seed", 2**70],
        ["--demo", "--img-size", 100_000],
        ["--demo", "--cache-dir", __file__],
        ["--out", __file__],
    ):
        done = cli("train_scratch", *argv, cwd=tmp_path)
        assert done.code == 2 and done.err.startswith("error: "), (argv, done.err)


def test_time_counts_the_stage_of_the_head(synthetic, cache, tmp_path, tiny_npz, monkeypatch):
    """minutes = the head's stage + the epochs, also after the run was resumed."""
    real = plan.fit_head

    def slow(*args, **kwargs):
        time.sleep(0.2)
        return real(*args, **kwargs)

    monkeypatch.setattr(plan, "fit_head", slow)
    argv = ["--data-dir", synthetic, "--cache-dir", cache, "--img-size", 32, "--weights", tiny_npz]
    argv += ["--freeze-epochs", 1, "--epochs", 1, "--max-steps", 2]
    succeed("train_pretrained", *argv, cwd=tmp_path)
    results = read_json(tmp_path, "outputs/pretrained/results.json")
    epochs = sum(row["seconds"] for row in results["history"])
    head = load_pth(tmp_path, "outputs/pretrained/last.pth")["state"]["head_seconds"]
    assert head >= 0.2 and results["minutes"] == pytest.approx((head + epochs) / 60)


def test_weights_that_are_not_there(synthetic, tmp_path):
    """The link of ViT-B/16 is told only where ViT-B/16 was asked for."""
    argv = ["--data-dir", synthetic, "--img-size", 32]
    done = cli("train_pretrained", *argv, "--weights", "weights/Ti.npz", cwd=tmp_path)
    refused(done, "no weights at weights/Ti.npz: check the path", "WEIGHTS.md")
    assert "curl" not in done.err
    refused(cli("train_pretrained", *argv, cwd=tmp_path), "no weights at weights/ViT-B_16.npz", "curl")


def test_linear_probe(synthetic, cache, tiny_npz, tmp_path):
    """--epochs 0: the head alone, in a run like any other."""
    flags = ("--data-dir", synthetic, "--cache-dir", cache, "--img-size", 32, "--weights", tiny_npz)
    argv = ("train_pretrained", *flags, "--epochs", 0, "--readout", "cls+mean", "--probe-views", 1)
    done = cli(*argv, "--freeze-epochs", 0, cwd=tmp_path)
    refused(done, "--epochs 0 trains nothing", "--freeze-epochs")
    refused(cli("train_scratch", "--epochs", 0, cwd=tmp_path), "--epochs 0 trains nothing")
    argv += ("--freeze-epochs", 20, "--ema", 0.5)
    done = succeed(*argv, cwd=tmp_path)
    run = tmp_path / "outputs/pretrained"
    results, before = read_json(run, "results.json"), load_pth(run, "checkpoint.pth")
    assert (
        results["finished"]
        and results["best_epoch"] == 1
        and results["model_config"]["readout"] == "cls+mean"
    )
    (row,) = results["history"]
    assert {"train_loss", "val_loss", "val_auroc", "train_auroc"} <= row.keys() and "head alone" in done.out
    assert row["train_loss"] < 0.69 and results["minutes"] > 0
    arrays = np.load(tiny_npz)
    assert np.array_equal(before["cls_token"].flatten(), arrays["cls"].flatten())  # the backbone is frozen
    again = succeed(*argv, "--resume", cwd=tmp_path)
    assert "finished" in again.err and same_tensors(load_pth(run, "checkpoint.pth"), before)
    succeed("calibrate", "--min-recall", 0.9, cwd=tmp_path)
    succeed("compare", cwd=tmp_path)


def test_image_size_follows_the_patch(synthetic, cache, tmp_path):
    """By default the nearest multiple of the weights' patch."""
    model = VisionTransformer(28, 14, embed_dim=12, depth=1, num_heads=1, layer_scale=True)
    state = {n: v for n, v in model.state_dict().items() if not n.startswith("head.")}
    torch.save(state, tmp_path / "w.pth")
    flags = ("--weights", "w.pth", "--heads", 1, "--freeze-epochs", 2, "--epochs", 0, "--cache-dir", cache)
    succeed("train_pretrained", *flags, "--data-dir", synthetic, cwd=tmp_path)
    results = read_json(tmp_path, "outputs/pretrained/results.json")
    assert results["data"]["img_size"] == 224 and results["weights"]["source"] == "DINOv2"
    odd = ("--data-dir", synthetic, "--img-size", 60, "--out", "o")
    done = cli("train_pretrained", *flags, *odd, cwd=tmp_path)
    refused(done, "60", "patch size 14", "take 56")


def test_focal_loss_reaches_training(flags, tmp_path):
    """Near p = 1/2 the focal loss is about a quarter of the cross-entropy."""
    losses = []
    for name, extra in (("ce", ()), ("focal", ("--loss", "focal", "--focal-gamma", 2))):
        argv = ("--max-steps", 1, "--no-amp", "--out", name, *extra)
        succeed("train_scratch", *flags, *argv, cwd=tmp_path)
        losses.append(read_json(tmp_path, name, "results.json")["history"][0]["train_loss"])
    assert 0.1 * losses[0] < losses[1] < 0.5 * losses[0]


def test_scaling_by_the_training_pixels(flags, tiny_npz, tmp_path):
    """data.py --statistics prints what --mean auto --std auto take; RandAugment beside them."""
    said = succeed("data", "--statistics", flags[1], *flags[2:], cwd=tmp_path).out
    mean, std = (float(x) for x in re.search(r"mean (0\.\d+), std (0\.\d+)", said).groups())
    argv = ("train_pretrained", *flags, "--weights", tiny_npz, "--max-steps", 1, "--randaugment", "2,9")
    succeed(*argv, "--mean", "auto", "--std", "0.5", "0.5", "0.25", cwd=tmp_path)
    results = read_json(tmp_path, "outputs/pretrained/results.json")
    assert results["mean"] == pytest.approx([mean] * 3, abs=1e-4) and results["std"] == [0.5, 0.5, 0.25]
    assert results["recipe"]["randaugment"] == "2,9" and 0.05 < std < 0.5
    for bad in (["auto", "0.5"], ["0.5"], ["0", "0", "auto"]):
        refused(cli(*argv, "--out", "o", "--mean", *bad, cwd=tmp_path), "--mean", "3 numbers", "auto")
    for bad in (["0", "0", "nan"], ["half"]):
        refused(cli(*argv, "--out", "o", "--mean", *bad, cwd=tmp_path), "--mean", bad[-1])
    refused(cli("data", "--statistics", "nowhere", cwd=tmp_path), "nowhere")
    refused(cli("data", cwd=tmp_path), "--statistics")


# ---------------------------------------------------------------- what messages advise


@pytest.fixture(scope="module")
def parsers():
    """{script: its flags}, of every script that reads a command line."""
    found = {script: scripts.flags_of(script) for script in (*scripts.ALL, "studies.benchmark", "data")}
    assert all("--help" in flags for flags in found.values())
    return found


@pytest.mark.parametrize(
    "script, argv, owners",
    [
        ("train_scratch", ["--weights", "w.npz"], "train_pretrained.py, train_cnn.py, train_hybrid.py"),
        ("train_linear", ["--seeds", 1], "train_scratch.py, train_pretrained.py"),
        ("predict", ["x.png", "--min-recall=0.9"], "calibrate.py, monitor.py"),
        ("compare", ["--site", "x"], "calibrate.py, predict.py, monitor.py"),
        ("explain", ["--card", "x"], "compare.py"),
        ("calibrate", ["--freeze-epochs", 3], "train_pretrained.py, train_cnn.py"),
        ("monitor", ["log.csv", "--no-amp"], "train_scratch.py"),
    ],
)
def test_a_flag_of_another_script_names_that_script(script, argv, owners, parsers, tmp_path):
    flag = next(text for text in map(str, argv) if text.startswith("--")).partition("=")[0]
    done = cli(script, *argv, cwd=tmp_path)
    refused(done, f"{flag} is a flag of {owners}")
    named = re.findall(r"\b(\w+)\.py", done.err.partition(" is a flag of ")[2].partition(";")[0])
    assert named == [other for other in scripts.ALL if flag in parsers[other]]  # all of them, and no other
    assert list(tmp_path.iterdir()) == []


def test_asking_for_a_flag_runs_nothing(parsers, tmp_path, monkeypatch):
    """A script is asked for its parser without being run, and one that lacks a package has none to show."""
    monkeypatch.chdir(tmp_path)
    assert scripts.having("--no-such-flag") == [] and "--seg-weight" in parsers["train_hybrid"]
    assert scripts.having("--seg-weight", "train_hybrid.py") == []
    monkeypatch.setitem(sys.modules, "train_cnn", None)  # importing it is an ImportError
    assert scripts.flags_of("train_cnn") == set()
    assert list(tmp_path.iterdir()) == [] and "--epochs" not in parsers["compare"]


def messages(path):
    """[(line, text)] of the strings of a file that hold a flag, docstrings and help texts left out; what an
    f-string fills in is {}."""
    tree, found, skipped = ast.parse(path.read_text()), [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))  # a docstring
        if isinstance(node, ast.keyword) and node.arg == "help":
            skipped |= {id(part) for part in ast.walk(node.value)}
        if isinstance(node, ast.JoinedStr) and id(node) not in skipped:
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            skipped |= {id(part) for part in node.values}
            found.append((node.lineno, "".join(parts)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            found.append((node.lineno, node.value))
    return [(line, text) for line, text in found if re.search(r"(?<![\w-])--[a-z]", text)]


OTHERS = {"--unzip", "--nproc_per_node", "--standalone", "--help"}  # of kaggle, of torchrun, of all
OTHERS |= set(scripts.GONE)  # of older versions, whose runs are spoken of


def test_messages_name_flags_that_there_are(parsers):
    """A flag named after a script (calibrate.py --site) is one of that script; in a script's own messages, a
    flag without one is its own; in shared rooms it is one of some script."""
    every, wrong = set().union(*parsers.values()) | OTHERS, []
    for path in sorted(REPO.glob("*.py")):
        for line, text in messages(path):
            for match in re.finditer(r"(?<![\w-])--[a-z][\w-]*", text):
                before = re.findall(r"\b(\w+)\.py\b", re.split(r"\. |; ", text[: match.start()])[-1])
                owner = before[-1] if before and before[-1] in parsers else path.stem
                if owner == path.stem == "data":  # a shared room, too: its messages are those of every script
                    owner = "some script"
                if match[0] not in (parsers.get(owner, every) | OTHERS):
                    wrong.append(f"{path.name}:{line}: {match[0]} is no flag of {owner}: {text[:80]}")
    assert wrong == []


@pytest.mark.parametrize("script", ["calibrate", "explain", "train_linear"])
def test_where_images_have_moved_only_own_flags_are_advised(runs, script, synthetic, tmp_path, parsers):
    """--demo and --download are for training. calibrate.py and explain.py find the images by --data-dir."""
    shutil.copytree(runs.out / "scratch", tmp_path / "outputs/scratch")
    path = tmp_path / "outputs/scratch/results.json"
    results = read_json(path)
    results["data"]["data_dir"] = "elsewhere"
    path.write_text(json.dumps(results))
    argv = [] if script == "train_linear" else ["--run", "outputs/scratch"]
    done = cli(script, *argv, "--cache-dir", "cache", cwd=tmp_path)
    refused(done, "no data: ", "--data-dir DIR")
    assert set(re.findall(r"--[a-z][\w-]*", done.err)) <= parsers[script]
    if script == "explain":
        argv += ["--data-dir", synthetic, "--cache-dir", "cache", "--tests", 0, "--method", "rollout"]
        assert "wrote outputs/scratch/explain/val/sheet.png" in succeed(script, *argv, cwd=tmp_path).out
        refused(cli(script, "x.png", *argv, cwd=tmp_path), "--data-dir, --cache-dir: files that are named")
    if script == "calibrate":
        bad = copy_set(synthetic, tmp_path)
        next((bad / "train/NORMAL").iterdir()).write_bytes(b"")
        refused(
            cli("explain", *argv, "--data-dir", bad, "--cache-dir", "cache", cwd=tmp_path), "Mend or remove"
        )
        assert "--skip-bad" in parsers["calibrate"] - parsers["explain"]


# ---------------------------------------------------------------- no run


def test_a_run_that_is_not_there_lists_those_that_are(runs, tmp_path):
    shutil.copytree(runs.out, tmp_path / "outputs")
    log = tmp_path / "log.csv"
    log.write_text("path,score,diagnosis\na,1,1\n")
    listed = "the runs that are there: outputs/scratch, outputs/"
    for script, argv in (
        ("predict", ["x"]),
        ("explain", []),
        ("calibrate", []),
        ("compare", []),
        ("monitor", [log]),
    ):
        done = cli(script, *argv, "--run", "outputs/scrach", cwd=tmp_path)
        refused(done, listed, "outputs/linear", "python train_scratch.py --out outputs/scrach makes one")
        assert set(re.findall(r"--[a-z][\w-]*", done.err)) <= {"--out"}
    done = cli("train_scratch", "--data-dir", "x", "--teacher", "outputs/pretraind", "--demo", cwd=tmp_path)
    assert done.code == 2
    (tmp_path / "empty").mkdir()
    done = cli("predict", "x", cwd=tmp_path / "empty")
    refused(done, "outputs/pretrained", "there is no run yet; python train_pretrained.py makes one")
    refused(cli("predict", "x", "--run", "outputs", cwd=tmp_path), "outputs/pretrained")  # the folder above


def test_the_command_that_makes_a_run():
    for folder, command in (
        ("outputs/scratch", "python train_scratch.py"),
        ("outputs/mae", "python pretrain_mae.py"),
        ("outputs/linear-demo", "python train_linear.py --out outputs/linear-demo"),
        ("my runs/cnn2", "python train_cnn.py --out 'my runs/cnn2'"),
        ("nowhere", "python train_scratch.py --out nowhere"),
        ("outputs/ensemble", "python calibrate.py --ensemble RUN RUN --out outputs/ensemble"),
        ("a", "python train_scratch.py --out a"),  # near to mae, which has no scores
    ):
        assert scripts.making(folder) == command
    assert scripts.making("x", "pretrain_mae") == "python pretrain_mae.py --out x"


def test_an_interrupted_run_without_a_checkpoint_says_how_to_go_on(runs, tmp_path):
    folder = Path(shutil.copytree(runs.out / "scratch", tmp_path / "outputs/scratch"))
    results = read_json(folder, "results.json")
    command = "python train_scratch.py --out outputs/scratch --epochs 2"
    results |= {"finished": False, "command": f"{command} --overwrite"}
    (folder / "results.json").write_text(json.dumps(results))
    done = cli("calibrate", cwd=tmp_path)
    refused(done, "no finished runs", f"continue it with {command} --resume\n", "name it with --run")
    (folder / "checkpoint.pth").unlink()
    for script, argv in (("calibrate", ["--run"]), ("predict", ["x", "--run"]), ("explain", ["--run"])):
        done = cli(script, *argv, "outputs/scratch", cwd=tmp_path)
        refused(done, "interrupted before it had a checkpoint", f"continue it with {command} --resume")
    assert "name it with --run" not in cli("calibrate", cwd=tmp_path).err
    (folder / "last.pth").unlink()
    refused(
        cli("predict", "x", "--run", "outputs/scratch", cwd=tmp_path), f"again with {command} --overwrite"
    )
    (folder / "results.json").write_text(json.dumps({**results, "finished": True}))
    refused(cli("predict", "x", "--run", "outputs/scratch", cwd=tmp_path), "train the model again, or copy")


def test_flags_that_would_lose_something_are_refused(tmp_path):
    for pair in (("--out", "--html"), ("--csv", "--out")):
        refused(cli("compare", pair[0], "x.md", pair[1], "./x.md", cwd=tmp_path), "name the same file")
    site = ("--site", "x", "--name", "y")
    refused(cli("calibrate", *site, "--track", "mlflow", cwd=tmp_path), "--track follows a run, not a site")
