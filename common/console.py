"""What a command says and how it ends: errors of one line, notes on stderr, the pace of long work, exit
codes.
"""

import contextlib
import errno
import os
import shlex
import signal
import sys
import time

from common import prelude


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, where, and what to do."""


class Interrupted(KeyboardInterrupt):
    """A run stopped on request after saving its state. `signum` is the signal that asked for it."""

    def __init__(self, message, signum):
        super().__init__(message)
        self.signum = signum


_script = {"runs": False, "flags": None}  # whether `start` runs a main(), and the flags of its command line


def remember_flags(flags):
    """Keep the flags of the command line that `start` has run, for `has_flag`."""
    if _script["runs"]:
        _script["flags"] = frozenset(flags)


def has_flag(flag):
    """Whether the script that runs has a flag; True where none runs, as in a notebook."""
    return _script["flags"] is None or flag in _script["flags"]


def advice(flag, text):
    """`text`, which advises `flag`, where the script that runs has that flag; else ""."""
    return text if has_flag(flag) else ""


class Pace:
    """Says every half minute how far a long job is and what remains, where no progress bar can be drawn."""

    def __init__(self, every=30):
        self.every, self.begin, self.last = every, time.monotonic(), time.monotonic()

    def rest(self, done, total, now):
        """The seconds that remain at the time `now`, `done` of `total` units being done."""
        return (total - done) * (now - self.begin) / done

    def step(self, done, total, text, left=None):
        """`done` of `total` units are done; `text` says what of; `left`: see `progress`."""
        now = time.monotonic()
        if now - self.last > self.every and done:
            self.last = now
            rest = self.rest(done, total, now)
            remains = f"{in_minutes(rest)} left"
            if left is not None:
                remains = left(rest)
            say(f"{text}: {remains}")

    def count(self, done, what):
        """The same where the total is not known."""
        now = time.monotonic()
        if now - self.last > self.every:
            self.last = now
            say(f"{done} {what}, {done / (now - self.begin):.1f} a second")


def in_minutes(seconds):
    """A time as text: "2.3 min", "12 min", "1 h 40 min"."""
    minutes = seconds / 60
    if minutes < 10:
        return f"{minutes:.1f} min"
    minutes = round(minutes)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class TimeLeft:
    """What remains of a training: `total` steps, an epoch of `steps` each followed by validation, and the
    same again for the seeds that follow. Times are those measured in this process, in seconds.

    `seeds`: how many the command trains, `following` of them after this one; `around`: what each takes before
    and after these epochs, None if that is not known; `may_end`: whether training may end early."""

    def __init__(self, steps, total, seeds=1, following=0, around=(0.0, 0.0), may_end=False):
        self.steps, self.total, self.seeds, self.following = steps, total, seeds, following
        self.before, self.after = around
        self.may_end = may_end
        self.last = time.monotonic()
        self.begin_stage(None)

    def begin_stage(self, until):
        """Measure anew: the steps that come take another time. `until`: the epoch with which that ends again,
        so that nothing is known of what follows; None if it does not end before the training."""
        self.until, self.done, self.step_seconds, self.ends, self.end_seconds = until, 0, 0.0, 0, 0.0

    def begin(self):
        """The steps of an epoch begin now."""
        self.last = time.monotonic()

    def end_step(self):
        """A step is over."""
        self.done += 1
        self.step_seconds += self._passed()

    def end_epoch(self):
        """What comes after the last step of an epoch is over: validation, and what was written."""
        self.ends += 1
        self.end_seconds += self._passed()

    def _passed(self):
        """The seconds since the last of these three."""
        now = time.monotonic()
        passed, self.last = now - self.last, now
        return passed

    def text(self, rest, epoch):
        """What remains, as text: `rest` seconds of the steps of an `epoch`, counted from 0, and all that
        comes after them."""
        end = self.total
        if self.until is not None:
            end = min(end, self.until * self.steps)
        # Each kind of work that remains, times what it took so far.
        later = end - min(end, (epoch + 1) * self.steps)
        ends = -(-end // self.steps) - epoch  # rounded up
        a_step = self.step_seconds / max(self.done, 1)
        an_end = self.end_seconds / max(self.ends, 1)
        after = self.after or 0.0
        seconds = rest + later * a_step + ends * an_end + after
        text = f"{in_minutes(seconds)} left"
        if self.after is None:
            text = f"at least {text}"
        if self.may_end:
            text = f"at most {text}"
        if self.until is not None:
            text += " of this stage"
        elif self.following:
            one = self.before + end * a_step + -(-end // self.steps) * an_end + after
            text += f", {in_minutes(seconds + self.following * one)} for all {self.seeds} seeds"
        if not self.ends:
            text += ", without validation"
        return text


def progress(items, total, title, unit="steps", *, size=None, begin=0, status=None, left=None):
    """Pass `items` on and say how far the work on them is: by a bar on a terminal, else by a line every half
    minute on what remains; of a single unit nothing. Under torchrun only the first process says it.

    `total`: how many `unit` there are in all, `begin` of them done before; `size`: a function item -> how
    many it is (default: 1); `title`: what is done, None: nothing is said; `status`: a function without
    arguments -> a few words on the last item; `left`: a function of the seconds that remain of these items
    -> what remains of the whole, as text, where they are a part of something longer."""
    if title is None or total == 1 or sys.stderr is None or os.environ.get("RANK", "0") != "0":
        yield from items
        return
    bar = None
    if sys.stderr.isatty():
        from tqdm import tqdm  # not needed by scripts that show no bar

        bar = tqdm(total=total, initial=begin, desc=title, unit=f" {unit}", leave=False)
    pace, done = Pace(), begin
    try:
        for item in items:
            yield item
            step = 1 if size is None else size(item)
            done += step
            words = "" if status is None else f", {status()}"
            if bar is None:
                pace.step(done - begin, total - begin, f"{title}: {done} of {total} {unit}{words}", left)
            else:
                if left is not None:
                    words += f", {left(pace.rest(done - begin, total - begin, time.monotonic()))}"
                bar.set_postfix_str(words.removeprefix(", "), refresh=False)
                bar.update(step)
    finally:
        if bar is not None:
            bar.close()


def command_line():
    """The command as typed, quoted for a shell, for results.json and resume messages."""
    number = os.environ.get("WORLD_SIZE", "1")
    runner = ["python"] if number == "1" else ["torchrun", "--nproc_per_node", number]
    return shlex.join([*runner, os.path.basename(sys.argv[0]), *sys.argv[1:]])


# ---------------------------------------------------------------- output, start and stop

_lost_output = []  # the error that ended standard output, if any
_said = set()  # what say_once has said in this command


_already_said = None  # within notes_once: what was said


@contextlib.contextmanager
def notes_once():
    """Meanwhile `say` says each text once: for scripts that do the same for several runs."""
    global _already_said
    _already_said = set()
    try:
        yield
    finally:
        _already_said = None


def say(message):
    """One line on stderr. Under torchrun only the first process speaks, except of errors."""
    if sys.stderr is None:
        return
    if _already_said is not None:
        if message in _already_said:
            return
        _already_said.add(message)
    if os.environ.get("RANK", "0") == "0" or str(message).startswith("error: "):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody is listening
            print(message, file=sys.stderr, flush=True)


def say_once(message):
    """`say`, but the same line only once in a command."""
    if message not in _said:
        _said.add(message)
        say(message)


def tell(line):
    """Print a line about long work. If standard output is gone, the work goes on and a note says so, once."""
    try:
        print(line, flush=True)
    except OSError as error:
        _discard_output(error)
        say(f"note: standard output cannot be written ({error.strerror}); the work goes on without it")


def _discard_output(error):
    """Point standard output at nothing, so that later prints, and Python's own last flush, cannot fail."""
    _lost_output.append(error)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _prepare_output():
    """Results are UTF-8 everywhere; names that are not valid Unicode are escaped. InputError if stdout is
    closed."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
        raise InputError("standard output is closed: redirect it to a file, or to /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def _terminable():
    """Within the block SIGTERM ends as Ctrl-C does, so that nothing stays locked or half-written."""

    def stop(signum, frame):
        raise Interrupted("", signum)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def start(main):
    """Run a script's `main()` and exit: 0 success, 2 bad input (one line, no traceback), 130 on Ctrl-C, 143
    on SIGTERM, 141 when the reader of standard output went away before the end."""
    code = 0
    _lost_output.clear()
    _script.update(runs=True, flags=None)
    _said.clear()
    try:
        with prelude.interruptible(), _terminable():
            _prepare_output()
            main()
            sys.stdout.flush()
    except ModuleNotFoundError as error:
        if (text := prelude.missing(error)) is None:
            raise
        say(f"error: {text}")
        code = 2
    except InputError as error:
        say(f"error: {_one_line(error)}")
        code = 2
    except BrokenPipeError as error:  # `compare.py | head`
        _discard_output(error)
        code = 141
    except OSError as error:
        if error.filename is not None:
            say(f"error: {_one_line(error.filename)}: {error.strerror}")
        elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF, errno.EFBIG):
            _discard_output(error)
        else:  # not about a file: a bug, so let it be seen
            raise
        code = 2
    except KeyboardInterrupt as stop:
        say(str(stop) or "interrupted")
        code = 128 + getattr(stop, "signum", 2)
    finally:
        _script.update(runs=False, flags=None)
    if _lost_output and not isinstance(_lost_output[0], BrokenPipeError):
        say(f"error: standard output cannot be written ({_lost_output[0].strerror})")
        code = code or 2
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # DistributedDataParallel keeps gloo's threads for the life of the process. One that frees a tensor
        # while the interpreter is torn down aborts it, now and then, so under torchrun nothing is torn down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _one_line(error):
    """An error as one line; lists that are indented by two spaces keep their lines."""
    text = str(error)
    return text if "\n  " in text else " ".join(text.split("\n"))


def printable(text):
    """Text on one line that any UTF-8 file can hold: line ends become spaces, the unprintable is escaped."""
    text = " ".join(str(text).splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


SHORT = 300  # characters of a text that is told in one line


def in_one_line(text):
    """A text, or what an exception says, in one line. Of more than SHORT characters the middle is left out,
    marked "...": libraries put the cause last."""
    line = " ".join(str(text).split())
    if len(line) <= SHORT:
        return line
    tail = SHORT // 3
    return f"{line[: SHORT - tail - 5].rstrip()} ... {line[-tail:].lstrip()}"
