"""Command lines: the parser of every script, types of numbers, and flags made from a dataclass."""

import argparse
import dataclasses
import difflib
import re
import shutil
import textwrap

from common import scripts
from common.console import InputError, remember_flags


class Parser(argparse.ArgumentParser):
    """The command line of a script.

    --help is the script's docstring and the flags in `everyday`, ("--epochs", ...); None: all. --help-all
    shows every flag. A wrong command line is an InputError. Flags must be written out, because an abbreviated
    one could be taken for another."""

    def __init__(self, doc, everyday=None, **kwargs):
        super().__init__(description=doc, formatter_class=_Formatter, allow_abbrev=False, **kwargs)
        for name in (None, "store"):  # of the groups of flags, too
            self.register("action", name, _Store)
        self.everyday = everyday
        self._positionals.title, self._optionals.title = "arguments", "flags"
        if self.add_help:
            self.add_argument("--help-all", action=_HelpAll, help="show every flag and exit")

    def parse_args(self, args=None, namespace=None):
        parsed = super().parse_args(args, namespace)
        remember_flags(self._option_string_actions)
        return parsed

    def error(self, message):
        unknown = []
        if message.startswith("unrecognized"):
            unknown = re.findall(r"(?:^|\s)(--[\w-]+)", message)
        hints = "".join(f"{hint} " for hint in map(self._hint, dict.fromkeys(unknown)) if hint)
        help_flag = "--help-all" if self.hidden() else "--help"
        raise InputError(f"{message} ({hints}see python {self.prog} {help_flag})")

    def _hint(self, unknown):
        """What to say of a flag that this script does not have: who has it, or what it may be meant to be."""
        if unknown in scripts.GONE:
            return f"{unknown} is gone: {scripts.LAST_VERSION} is the last that has it;"
        if owners := scripts.having(unknown, self.prog):
            return f"{unknown} is a flag of {', '.join(owners)};"
        close = difflib.get_close_matches(unknown, self._option_string_actions, 1)
        return f"did you mean {close[0]}?" if close else ""

    def hidden(self):
        """The flags that --help leaves out, but for the two that ask for help: list of argparse actions."""
        if self.everyday is None:
            return []
        flags = [action for action in self._actions if action.option_strings and not _asks_for_help(action)]
        return [action for action in flags if not set(action.option_strings) & set(self.everyday)]

    def format_help(self, everything=False):
        """The text of --help, or, with `everything`, of --help-all."""
        hidden = [] if everything else self.hidden()
        # argparse's own usage lists every flag before it says what the script does.
        formatter = self._get_formatter()
        formatter.add_usage(self._usage(), self._actions, [])
        formatter.add_text(self.description)
        for group in self._action_groups:
            formatter.start_section(group.title)
            for action in group._group_actions:
                if everything or not (action in hidden or _asks_for_help(action)):
                    formatter.add_argument(action)
            formatter.end_section()
        if hidden:
            formatter.add_text(f"{len(hidden)} more flag{'s' * (len(hidden) > 1)}: --help-all")
        return formatter.format_help()

    def _usage(self):
        """One line: the flags that must be given, [flags] for the others, and what else is read."""
        required, arguments = [], []
        for action in self._actions:
            if action.option_strings and action.required:
                required.append(f"{action.option_strings[0]} {action.metavar}")
            elif not action.option_strings:
                name = action.metavar or action.dest
                if action.nargs == "*":
                    name = f"[{name} ...]"
                arguments.append(name)
        return " ".join([self.prog, *required, "[flags]", *arguments]).replace("%", "%%")


class _HelpAll(argparse.Action):
    """Prints the whole help and exits."""

    def __init__(self, option_strings, dest, help):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help(everything=True), end="")
        parser.exit()


class _Store(argparse._StoreAction):
    """Keeps a value, the last one if a flag is given twice; of a flag that takes a list, the values of all,
    so that `--run A --run B` is `--run A B`. An empty one is an InputError: most often it is a shell variable
    that is not set, and no wish for the default."""

    filled = None  # the result of parsing in which this flag was given already

    def __call__(self, parser, namespace, values, option_string=None):
        if values == "" or isinstance(values, list) and "" in values:
            name = option_string or self.metavar or self.dest
            raise InputError(f"{name} is empty: give a value, or leave it out")
        if self.nargs == "+" and self.filled is namespace:
            values = [*getattr(namespace, self.dest), *values]
        self.filled = namespace
        super().__call__(parser, namespace, values, option_string)


def _asks_for_help(action):
    return bool({"--help", "--help-all"} & set(action.option_strings))


WIDEST = 110  # columns of a help text


class _Formatter(argparse.HelpFormatter):
    """Paragraphs are wrapped to the terminal, indented lines (commands) are kept, each flag tells its
    default."""

    def __init__(self, prog):
        super().__init__(prog, width=min(WIDEST, shutil.get_terminal_size().columns - 2))

    def _fill_text(self, text, width, indent):
        wrapped = []
        for paragraph in text.strip().split("\n\n"):
            if not paragraph.startswith(" "):
                paragraph = textwrap.fill(paragraph, width, break_on_hyphens=False)
            wrapped.append(paragraph)
        return "\n\n".join(wrapped)

    def _split_lines(self, text, width):
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _get_help_string(self, action):
        meaning, default = meaning_and_default(action)
        if not default:
            return meaning
        if default == REQUIRED:
            return f"{meaning} ({default})"
        return f"{meaning} (default: {default.replace('%', '%%')})"


REQUIRED = "required"


def meaning_and_default(action):
    """What an argparse action does, and its default: two texts. A help text that ends in "(default: ...)"
    tells the default itself; what is no flag has none, ""."""
    text = action.help.replace(" (default: %(default)s)", "")  # argparse adds it to switches before 3.13
    meaning, told, default = text.partition(" (default: ")
    if told:
        return meaning, default.removesuffix(")")
    if not action.option_strings or action.default == argparse.SUPPRESS:
        return text, ""
    if action.required:
        return text, REQUIRED
    return text, in_words(action.default)


def in_words(default):
    """The default of a flag as its help text shows it."""
    if default is None or default == "" or default == []:
        return "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, float):
        return f"{default:g}"
    return str(default)


class Number:
    """An argparse type: a finite int or float between `low` and `high`, the ends included unless
    `above`/`below`.

    Number(int, 1, 100), Number(float, 0, 1, above=True): 0 < x <= 1. Also callable on values already parsed.
    """

    def __init__(self, kind, low, high, above=False, below=False):
        self.kind, self.low, self.high, self.above, self.below = kind, low, high, above, below
        self.__name__ = kind.__name__

    def contains(self, value):
        """Whether a value (of any type) is a number in the range."""
        numeric = int if self.kind is int else (int, float)
        if not isinstance(value, numeric) or isinstance(value, bool) or value != value:
            return False
        if self.above and value == self.low or self.below and value == self.high:
            return False
        return self.low <= value <= self.high

    def __str__(self):
        left = "(" if self.above else "["
        right = ")" if self.below else "]"
        low, high = (str(end) if self.kind is int else f"{end:g}" for end in (self.low, self.high))
        return f"{left}{low}, {high}{right}"

    def __call__(self, text):
        try:
            value = self.kind(text)
        except (ValueError, OverflowError):
            value = None
        if value is None or not self.contains(value):
            kind = "a whole number" if self.kind is int else "a number"
            hint = "; separate several by spaces" if "," in str(text) else ""
            raise argparse.ArgumentTypeError(f"{str(text)[:40]!r} is not {kind} in {self}{hint}")
        return value


COUNT = Number(int, 1, 2**20)  # batch sizes, epochs and the like
SEED = Number(int, 0, 2**63 - 1)


def flag(default, help, kind=None, metavar=None):
    """A dataclass field that is a command-line flag too. `kind`: a Number, a tuple of choices, or None for
    text or, where the default is a bool, a switch."""
    return dataclasses.field(default=default, metadata={"help": help, "kind": kind, "metavar": metavar})


def add_calibrated_run_arguments(parser):
    """--run and --site, of scripts that decide by what calibrate.py has chosen."""
    parser.add_argument("--run", default="outputs/pretrained", metavar="DIR", help="a calibrated run folder")
    parser.add_argument(
        "--site",
        metavar="WHERE",
        help="use the thresholds that calibrate.py --site made for WHERE (default: the run's)",
    )


def check_name(flag, name):
    """InputError unless a name given by a flag, if any, can be part of a file name."""
    if name is not None and not re.fullmatch(r"[\w-][\w. -]{0,59}", name):
        raise InputError(f"{flag} {name[:60]!r}: give a name of letters, digits, dots and dashes")


def add_flags(group, cls, leave_out=(), **defaults):
    """A flag for every `flag` field of a dataclass but those in `leave_out`; `defaults` replace the fields'
    own."""
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata or field.name in leave_out:
            continue
        name, kind = f"--{field.name.replace('_', '-')}", field.metadata["kind"]
        settings = {"default": defaults.get(field.name, field.default), "help": field.metadata["help"]}
        # A switch is --flag and --no-flag, never a value: "--flag False" would mean True.
        if isinstance(field.default, bool):
            group.add_argument(name, action=argparse.BooleanOptionalAction, **settings)
        elif isinstance(kind, tuple):
            group.add_argument(name, type=type(kind[0]), choices=kind, **settings)
        else:
            group.add_argument(name, type=kind or str, metavar=field.metadata["metavar"], **settings)


def check_fields(value):
    """Names of the fields of a dataclass instance whose type, choice or range is wrong."""
    return [field.name for field in dataclasses.fields(value) if not _fits(getattr(value, field.name), field)]


def _fits(value, field):
    """Whether a value is one that the flag of a dataclass field could have given."""
    kind = field.metadata.get("kind")
    if isinstance(kind, Number):
        return kind.contains(value) or value is None and field.default is None
    if isinstance(kind, tuple):
        return type(value) is type(kind[0]) and value in kind
    like = (int, float) if isinstance(field.default, float) else type(field.default)
    return isinstance(value, like) and "\0" not in str(value)
