"""Tests of flags: what --help and --help-all show, and docs/FLAGS.md."""

import re

import pytest

from common import scripts
from common.cli import Parser, flag
from common.console import InputError
from studies import flags
from tests.shared import REPO, cli, refused
from training import recipe

SHOWN = 22  # flags in --help, at most
READERS = (*scripts.ALL, "data")  # every script at the root that has a command line


@pytest.fixture(scope="module")
def command_lines():
    """{script: its parser}."""
    return {script: scripts.parser_of(script) for script in READERS}


def listed(text):
    """The flags that a help text lists: set of str."""
    heads = re.findall(r"^  (-.*?)(?:  |$)", text, re.MULTILINE)
    return {name for head in heads for name in re.findall(r"(?:^|, )(--?[\w-]+)", head)}


@pytest.mark.parametrize("script", READERS)
def test_help_is_short_and_help_all_is_whole(script, command_lines, monkeypatch):
    parser = command_lines[script]
    for columns in ("80", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        short, whole = parser.format_help(), parser.format_help(everything=True)
        assert listed(whole) == set(parser._option_string_actions)
        assert listed(short) <= listed(whole) and len(re.findall(r"^  -", short, re.MULTILINE)) <= SHOWN
        left_out = {name for action in parser.hidden() for name in action.option_strings}
        assert listed(whole) - listed(short) == left_out | {"-h", "--help", "--help-all"}
        assert short.splitlines()[0].count("[") <= 2 and short.splitlines()[1] == ""  # no wall of usage
        last = short.splitlines()[-1]
        assert not left_out or last == f"{len(parser.hidden())} more flags: --help-all"


@pytest.mark.parametrize("script", READERS)
def test_every_flag_tells_what_it_does_and_its_default(script, command_lines, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    parser = command_lines[script]
    for action in parser._actions:
        assert action.help and len(action.help.split()) >= 2, action.option_strings
    for entry in re.split(r"\n(?=  -)", parser.format_help(everything=True))[1:]:
        entry = entry.split("\n\n")[0]
        if not re.match(r"  (-h|--help-all)", entry):
            assert re.search(r"\((default:.*\S|required)\)", " ".join(entry.split())), entry
            assert "default: )" not in entry and "None" not in entry and "[]" not in entry


def test_groups_of_the_training_scripts(command_lines):
    """The same four in --help of each, in the same order."""
    for script in scripts.TRAINING:
        text = command_lines[script].format_help()
        titles = re.findall(r"^(\w[\w ]*):$", text, re.MULTILINE)
        assert titles == [name for name in ("data", "model", "recipe", "run") if name in titles]
        assert {"data", "recipe", "run"} <= set(titles)


def test_everyday_flags_exist(command_lines):
    """A flag that is renamed must not vanish from --help unnoticed."""
    every = set().union(*(command_lines[script]._option_string_actions for script in scripts.TRAINING))
    assert set(recipe.EVERYDAY) <= every
    calibrate = command_lines["calibrate"]
    assert set(calibrate.everyday) <= set(calibrate._option_string_actions)


def test_docs_list_the_flags_of_the_parsers(shipped_recipe):
    text = (REPO / "docs/FLAGS.md").read_text(encoding="utf-8")
    assert text == flags.document(), "make it anew: python studies/flags.py > docs/FLAGS.md"


def test_rows_of_the_docs_by_hand():
    rows = (REPO / "docs/FLAGS.md").read_text(encoding="utf-8").splitlines()
    (epochs,) = [row for row in rows if row.startswith("| **`--epochs`**")]
    assert "`15`; train_pretrained: `3`; train_hybrid: `6`; pretrain_mae: `90`" in epochs
    assert epochs.endswith("| all but train_linear |")
    assert any(row.startswith("| `--accumulate` | `N` | `1` |") for row in rows)  # not in --help, so not bold


def test_help_of_a_small_parser(monkeypatch):
    """By hand: everyday flags, defaults in words, one line of usage, whole words."""
    monkeypatch.setenv("COLUMNS", "60")
    parser = Parser("Do it.\n\n    python x.py --a 1\n", everyday=("--a", "--m"), prog="x.py")
    parser.add_argument("places", nargs="*", metavar="PLACES", help="where to go")
    parser.add_argument("--m", required=True, metavar="FILE", help="what is read")
    group = parser.add_argument_group("numbers")
    group.add_argument("--a", type=float, default=3e-4, metavar="X", help="share of 100%% of all")
    group.add_argument("--b", default="", metavar="NAME", help="the name")
    expected = """usage: x.py --m FILE [flags] [PLACES ...]

Do it.

    python x.py --a 1

arguments:
  PLACES  where to go

flags:
  --m FILE  what is read (required)

numbers:
  --a X   share of 100% of all (default: 0.0003)

1 more flag: --help-all
"""
    assert re.sub(r" +", " ", parser.format_help()) == re.sub(r" +", " ", expected)
    whole = " ".join(parser.format_help(everything=True).split())
    assert "--b NAME the name (default: none)" in whole and "more flag" not in whole
    with pytest.raises(InputError, match="see python x.py --help-all"):
        parser.parse_args(["--b"])


def test_wrong_values_of_hidden_flags_point_to_the_whole_help(tmp_path):
    refused(cli("train_scratch", "--ema", 2, cwd=tmp_path), "--ema", "see python train_scratch.py --help-all")
    refused(cli("monitor", "x.csv", "--point", "top", cwd=tmp_path), "see python monitor.py --help)")


def test_flags_of_a_dataclass_carry_their_text():
    assert flag(1, "how many").metadata["help"] == "how many"
