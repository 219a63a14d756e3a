"""Print docs/FLAGS.md: every flag of every script, from the scripts' own parsers.

    python studies/flags.py > docs/FLAGS.md

A test compares that file with the parsers.
"""

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from common import scripts
from common.cli import Parser, meaning_and_default
from common.console import InputError, start

INTRODUCTION = """# Flags

`python SCRIPT.py --help` shows the flags in **bold**, `--help-all` shows all. Write flags out in full:
`--epo` is refused. Any single flag wins over `--recipe`.
`python studies/flags.py > docs/FLAGS.md` makes this file anew.
"""
HEAD = "| flag | value | default | meaning | scripts |\n| --- | --- | --- | --- | --- |"
GROUPS = ("data", "model", "recipe", "run")
OTHERS = ("calibrate", "predict", "explain", "monitor", "audit", "compare", "data")


class Flag(NamedTuple):
    """A row of the tables: texts, but for `everyday`, whether --help shows it."""

    names: str
    value: str
    meaning: str
    default: str
    everyday: bool


def value_of(action):
    """What is written after a flag: its choices or the name of its value, "" for a switch."""
    if action.nargs == 0:
        return ""
    if action.choices and not action.metavar:
        return ", ".join(map(str, action.choices))
    names = action.metavar or action.dest.upper()
    text = names if isinstance(names, str) else " ".join(names)
    return f"{text} ..." if action.nargs == "+" else text


def flags_of(script):
    """{group: [Flag, ...]} of a script, without --help and --help-all. InputError where a package that it
    needs is missing."""
    parser = scripts.parser_of(script)
    if parser is None:
        raise InputError(f"{script}.py cannot be imported here; install what requirements.txt lists")
    found, hidden = {}, parser.hidden()
    for group in parser._action_groups:
        for action in group._group_actions:
            if action.option_strings and not {"--help", "--help-all"} & set(action.option_strings):
                names = ", ".join(action.option_strings)
                flag = Flag(names, value_of(action), *meaning_and_default(action), action not in hidden)
                found.setdefault(group.title, []).append(flag)
    return found


def training_rows(group):
    """The rows of a group of flags of the training scripts: those alike in several scripts share one."""
    rows = {}  # all of a Flag but its default -> {script: default}
    for script in scripts.TRAINING:
        for flag in flags_of(script).get(group, []):
            rows.setdefault(flag._replace(default=""), {})[script] = flag.default
    for flag, defaults in rows.items():
        usual = next(iter(defaults.values()))
        others = [f"{script}: {as_code(text)}" for script, text in defaults.items() if text != usual]
        yield row(flag, "; ".join([as_code(usual), *others]), owners_in_words(defaults))


def owners_in_words(owners):
    """Which of the training scripts have a flag."""
    missing = [script for script in scripts.TRAINING if script not in owners]
    if not missing:
        return "all"
    if len(missing) < len(owners):
        return f"all but {', '.join(missing)}"
    return ", ".join(owners)


def as_code(default):
    """A default as markdown: a value as code, a description as text."""
    return default if " " in default else f"`{default}`"


def row(flag, default, owners):
    """A line of a table."""
    names = f"`{flag.names}`"
    if flag.everyday:
        names = f"**{names}**"
    value = f"`{flag.value}`" if flag.value else ""
    cells = (names, value, default, flag.meaning, owners)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def document():
    """The text of docs/FLAGS.md."""
    parts, known = [INTRODUCTION.rstrip()], set()
    for group in GROUPS:
        parts.append(f"\n## Training: {group}\n\n{HEAD}")
        parts += training_rows(group)
    for script in scripts.TRAINING:
        known |= {flag[:3] for flags in flags_of(script).values() for flag in flags}
    for script in OTHERS:
        flags = [flag for group in flags_of(script).values() for flag in group]
        own = [flag for flag in flags if script != "data" or flag[:3] not in known]
        parts.append(f"\n## {script}.py\n\n{HEAD.replace(' scripts |', '').removesuffix(' --- |')}")
        parts += [row(flag, as_code(flag.default), "").removesuffix("  |") for flag in own]
        if shared := [flag.names for flag in flags if flag not in own]:
            parts.append(f"\nAs in training: {', '.join(f'`{names}`' for names in shared)}.")
    return "\n".join(parts) + "\n"


def main():
    Parser(__doc__).parse_args()
    sys.stdout.write(document())


if __name__ == "__main__":
    start(main)
