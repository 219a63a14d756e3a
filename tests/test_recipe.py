"""Tests of recipe: flags, defaults, what goes into results.json."""

import importlib
import sys
from dataclasses import asdict

import pytest

from common.cli import Parser
from common.console import InputError
from data import add_arguments
from images.augment import PRESETS
from training import recipe

SCRIPTS = ("train_scratch", "train_pretrained", "pretrain_mae")


def parsed(script, *argv):
    """A script's command line -> (args, Recipe, Augment)."""
    parser = Parser("doc")
    add_arguments(parser)
    defaults = importlib.import_module(script).DEFAULTS
    recipe.add_arguments(parser, defaults)
    return recipe.parse(parser, defaults, list(argv))


def test_recipe_flag_chooses_the_defaults(shipped_recipe):
    """--recipe swaps defaults; a flag given by hand wins over both, before or after it."""
    _, default, augment = parsed("train_scratch")
    assert (default.patch_drop, default.ema, default.drop_rate, default.drop_path) == (0.5, 0.99, 0.0, 0.05)
    assert (default.optimiser, default.masked_epochs) == ("muon", 25)
    assert asdict(augment) == {**asdict(PRESETS["strong"]), "frame": 0.5, "tone": 0.5}
    _, labels, augment = parsed("train_scratch", "--recipe", "supervised")
    assert (labels.patch_drop, labels.ema, labels.drop_rate, labels.drop_path) == (0.5, 0.99, 0.0, 0.05)
    assert (labels.optimiser, labels.masked_epochs) == ("adamw", 0)
    assert asdict(augment) == {**asdict(PRESETS["robust"]), "frame": 0.5, "tone": 0.5}
    _, paper, augment = parsed("train_scratch", "--recipe", "paper")
    plain = dict(drop_rate=0.1, drop_path=0.05, patch_drop=0.0, ema=0.0, epochs=15, batch_size=32, lr=3e-4)
    plain |= dict(label_smoothing=0.05, weight_decay=0.05, schedule="cosine", warmup_epochs=1.0, clip=1.0)
    assert {k: getattr(paper, k) for k in plain} == plain and augment == PRESETS["plain"]
    _, mixed, augment = parsed("train_scratch", "--ema", "0.5", "--augment", "none", "--recipe", "paper")
    assert mixed.ema == 0.5 and mixed.drop_rate == 0.1 and augment == PRESETS["none"]
    _, tuned, augment = parsed("train_pretrained")
    assert (tuned.epochs, tuned.freeze_epochs, tuned.lr, tuned.ema) == (3, 30, 3e-5, 0.99)
    assert augment == PRESETS["strong"]
    assert [tuple(s) for s in tuned.stages] == [("head", 30, 1e-3), ("all", 3, 3e-5)]
    _, masked, augment = parsed("pretrain_mae")
    assert (masked.epochs, masked.lr, masked.batch_size, masked.warmup_epochs) == (90, 1e-3, 64, 4.0)
    assert (augment.rotate, augment.aspect, augment.gamma, augment.brightness) == (15.0, 0.15, 0.3, 0.1)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_recipe_that_is_named(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks
    for name, values in importlib.import_module(script).DEFAULTS.recipes.items():
        with pytest.raises(SystemExit):
            parsed(script, "--recipe", name, "--help")
        shown = " ".join(capsys.readouterr().out.split())
        assert f"(default: {values['augment']})" in shown


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_of_a_script_are_few(script):
    """A parser that grows past reading is what this house wants to avoid."""
    parser = Parser("doc")
    add_arguments(parser)
    recipe.add_arguments(parser, importlib.import_module(script).DEFAULTS)
    assert len(parser._actions) <= 62


def test_json_holds_what_the_script_uses():
    """The keys that earlier versions wrote, so that old and new runs of one recipe make one family."""
    _, settings, augment = parsed("train_scratch", "--seed", "3")
    found = recipe.to_json(settings, augment, False, importlib.import_module("train_scratch").DEFAULTS.used)
    assert found["seed"] == 3 and found["amp"] is False and found["tone"] == 0.5
    assert not {"freeze_epochs", "head_lr", "mask_ratio"} & found.keys()
    assert {"epochs", "clip", "schedule", "warmup_epochs", "drop_rate", "rotate"} <= found.keys()


@pytest.mark.parametrize(
    "argv", [("--seeds", "1", "1"), ("--seeds", "0", "1", "--seed", "2"), ("--seeds", "-1")]
)
def test_seeds_are_given_once(argv):
    with pytest.raises(InputError, match="seed"):
        parsed("train_scratch", *argv)


@pytest.mark.parametrize(
    "argv",
    [
        ("--batch-size", str(2**64)),
        ("--freeze-epochs", str(10**12)),
        ("--epochs", "1e3"),
        ("--lr", "inf"),
        ("--lr", "nan"),
        ("--ema", "1"),
        ("--head-lr", "0"),
        ("--seed", str(2**63)),
        ("--max-steps", "0"),
    ],
)
def test_numbers_have_ranges(argv):
    with pytest.raises(InputError, match=argv[0]) as error:
        parsed("train_pretrained", *argv)
    assert "\n" not in str(error.value)


def test_mask_ratio_has_a_range():
    for value in ("nan", "inf", "0", "1"):
        with pytest.raises(InputError, match="--mask-ratio"):
            parsed("pretrain_mae", "--mask-ratio", value)
    assert sys.argv  # parsed() never reads it
