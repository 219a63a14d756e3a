"""Going on with an interrupted run: what is there already, what must be as it was, and what last.pth holds.

Progress is how far it was. `save_last` and `restore` write and read the state of a Loop; when they are called
stands in loop.py.
"""

import signal
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import torch

from common.console import InputError, Interrupted, command_line, in_one_line, say
from common.device import gather
from common.scripts import LAST_VERSION
from records.schema import ADDED, GONE

# What must be the same for a run to be resumed; of a dict every key of the new one but the IGNORED.
CHECKED = ("model", "model_config", "recipe", "data", "split", "mean", "std", "weights", "init", "teacher")
IGNORED = {"data": ("cache_dir", "verify_cache"), "weights": ("path",)}
IGNORED |= dict.fromkeys(("init", "teacher"), ("run", "minutes"))


# ---------------------------------------------------------------- how far a run is


@dataclass
class Progress:
    """How far a training run is.

    `epoch`: how many epochs are over; `step`: how many steps of the next one are, `loss_sum`: the sum of
    their losses, `seconds`: the time they took before an interruption; `history`: a row an epoch, as in
    results.json; `best_epoch`: its number, from 1 on, 0 before there is one; `head_seconds`: spent before
    the epochs, on the head or on masked ones; `lr`: learning rate of the last step, None before the first."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    history: list = field(default_factory=list)
    best_epoch: int = 0
    head_seconds: float = 0.0
    lr: float = None

    @classmethod
    def from_saved(cls, saved):
        """The Progress that `saved` gave; what older versions did not keep is as at the start. TypeError if
        it is no dict."""
        return cls(**{f.name: saved[f.name] for f in fields(cls) if f.name in saved})

    def saved(self):
        """The same as a dict of plain values, for last.pth."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.lr is None:
            del values["lr"]
        return values

    @property
    def minutes(self):
        """Time of training so far, validation and the stage before the epochs included."""
        epochs = sum(row["seconds"] for row in self.history)
        return (self.head_seconds + epochs) / 60

    @property
    def mean_loss(self):
        """Mean training loss of the steps of this epoch so far."""
        return self.loss_sum / self.step

    @property
    def place(self):
        """Where training is, as text."""
        return f"in epoch {self.epoch + 1} after step {self.step}"

    def end_epoch(self, row, merit):
        """Add the history `row` of the epoch that ends; returns whether it has more `merit`, a function of a
        row, than the best before."""
        better = not self.best_epoch or merit(row) > merit(self.history[self.best_epoch - 1])
        self.history.append(row)
        self.epoch += 1
        self.step, self.loss_sum, self.seconds = 0, 0.0, 0.0
        if better:
            self.best_epoch = self.epoch
        return better

    def waited(self, stop_on):
        """How many epochs brought nothing better: since the best one or, with "loss" to `stop_on`, since the
        lowest validation loss."""
        last = self.best_epoch
        if stop_on == "loss" and self.history:
            losses = [row["val_loss"] for row in self.history]
            last = losses.index(min(losses)) + 1
        return self.epoch - last


# ---------------------------------------------------------------- what must be as it was


def is_longer(plan, meta):
    """Whether a Plan that resumes its run asks for more epochs than the run was begun with; says so. `meta`:
    what results.json says of the present command. InputError if other settings differ."""
    run, last = plan.run, plan.run.load_last()
    before = {**run.results, **last["meta"]}
    longer = _more_epochs(plan, before["recipe"].get("epochs"))
    if longer:  # the one setting that may differ
        before["recipe"] = {**before["recipe"], "epochs": plan.recipe.epochs}
    if differ := differences(before, meta):
        raise InputError(f"--resume: the settings differ from those of {run}: " + "; ".join(differ))
    return longer


def _more_epochs(plan, epochs):
    """Whether more epochs are asked for than the `epochs` the run to be resumed was begun with; says so.
    InputError where its learning rate was planned over those."""
    run, recipe = plan.run, plan.recipe
    if not isinstance(epochs, int) or recipe.epochs <= epochs:
        return False
    if recipe.schedule == "cosine":
        raise InputError(
            f"--resume: {run} was begun with --epochs {epochs}, over which its learning rate falls "
            f"(--schedule cosine), so {recipe.epochs} epochs are another run: go on with --epochs {epochs}, "
            f"or train anew with --epochs {recipe.epochs} and --overwrite, or another --out. Only a run with "
            "--schedule constant or plateau can be made longer"
        )
    if epochs < max(1, recipe.warmup_epochs):
        raise InputError(
            f"--resume: {run} was begun with --epochs {epochs}, too few for its warm-up, which differs from "
            f"that of {recipe.epochs} epochs: train anew with --epochs {recipe.epochs} and --overwrite, or "
            "another --out"
        )
    say(
        f"{run} was begun with --epochs {epochs} and goes on to {recipe.epochs}, as if begun with these "
        f"(--schedule {recipe.schedule}, --lr {recipe.lr:g})"
    )
    return True


def differences(old, new):
    """What differs between the settings of a run and those of the command that would resume it: list of text.

    Values that the older version of a run did not record are not compared, unless ADDED has them, nor those
    that are gone, if they changed nothing."""
    differ = []
    for key, settings in GONE.items():
        for name, usual in settings.items():
            value = old.get(key, {}).get(name, usual)
            if value != usual:
                differ.append(f"{key}.{name}: was {value!r}, which is gone: {LAST_VERSION} goes on with it")
    for key in CHECKED:
        if key not in new and key not in old:
            continue
        if key not in new:
            differ.append(f"{key}: was given, now it is not")
        elif key not in old:
            differ.append(f"{key}: was not given, now it is")
        elif isinstance(new[key], dict):
            differ += _different_values(key, old[key], new[key])
        elif list(old[key]) != list(new[key]):  # a text or, as list or tuple, numbers
            differ.append(f"{key}: was {old[key]!r}, now {new[key]!r}")
    return differ


def _different_values(key, old, new):
    """`differences` of the dict under a key."""
    # The path of a file tells less than its checksum; without one it must be the same.
    may_differ = IGNORED.get(key, ())
    if key != "data" and not _have_checksums(old, new):
        may_differ = ()
    differ, old = [], ADDED.get(key, {}) | old
    for name, value in new.items():
        if name not in old or name in may_differ:
            continue
        before, now = _as_in_json(old[name]), _as_in_json(value)
        if before != now:
            differ.append(f"{key}.{name}: was {_short(before)}, now {_short(now)}")
    return differ


def _as_in_json(value):
    """A value as JSON gives it back: a list for a tuple."""
    return list(value) if isinstance(value, tuple) else value


def _short(value):
    """A value as text, of a checksum its beginning."""
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:12]!r}..."
    return repr(value)


def _have_checksums(old, new):
    """Whether both name a file's checksum."""
    return any(name in old and name in new for name in ("sha256", "checkpoint"))


# ---------------------------------------------------------------- commands


def command(plan, longer):
    """The command line for results.json: the one that began the run, which tells more than the one that
    resumes it, unless this one asks for more epochs (`longer`)."""
    present = command_line().replace(" --resume", "")  # it may have gone on with masked epochs
    if longer or not plan.resume:
        return present
    return plan.run.results.get("command", present)


def interrupted(stop, progress=None):
    """The Interrupted of a command that was asked to stop: by the signals `stop` or, without any, in another
    process; in an epoch, of which `progress` tells, or between two trainings. It says how to go on."""
    where = f"stopped {progress.place}; saved. Go on" if progress else "stopped; what is saved goes on"
    return Interrupted(f"{where} with:\n  {command_that_goes_on()}", stop[0] if stop else signal.SIGTERM)


def what_to_try(plan, inputs):
    """What to do where the loss of a Plan is no number any more, as text."""
    advice = ["a smaller --lr"]
    if plan.outer:  # masked epochs have a rate of their own
        advice = ["--masked-epochs 0"] + ["--optimiser adamw"] * (plan.recipe.optimiser != "adamw")
    return ", or ".join(advice + ["--no-amp"] * bool(inputs.amp))


def command_that_goes_on():
    """The command line, with --resume and without --overwrite."""
    again = command_line().replace(" --overwrite", "")
    return again if " --resume" in again else f"{again} --resume"


@contextmanager
def stopped_between_stages(run):
    """Within the block Ctrl-C ends in the command that goes on, where it came between the masked epochs of a
    Run, which are saved, and the others."""
    try:
        yield
    except Interrupted:  # within a stage, which says it itself
        raise
    except KeyboardInterrupt:
        if run.begun or not run.masked.begun:
            raise
        raise interrupted([signal.SIGINT]) from None


# ---------------------------------------------------------------- last.pth


def save_last(loop):
    """Write last.pth: all that a Loop needs to go on bit for bit. What each process has is gathered, and the
    first one writes."""
    # Gathering needs every process, so it comes before all but the first one return.
    cuda_state, outputs = None, []
    if loop.device.type == "cuda":
        cuda_state = torch.cuda.get_rng_state(loop.device)
    random_states = gather((torch.get_rng_state(), cuda_state))
    if loop.progress.step:  # within an epoch: its training figures need what was seen so far
        outputs = loop.gradient.outputs()
    seen = gather(outputs)
    if loop.rank:
        return
    last = {
        "meta": {k: loop.meta[k] for k in ("model_config", "recipe", "data", "split")},
        "model": loop.model.state_dict(),
        "optimizer": loop.optimizer.state_dict(),
        "state": loop.progress.saved(),
        "average": loop.average and loop.average.state_dict(),
        "rng": random_states,
        "draws": loop.gradient.draws and loop.gradient.draws.states,
        "seen": seen,
    }
    loop.run.save_last(last)


def restore(loop):
    """Put a Loop where last.pth says that training was. InputError if the file is damaged, or another number
    of processes wrote it."""
    last = loop.run.load_last()
    if len(last["rng"]) != loop.number:
        raise InputError(
            f"--resume: {loop.run} was trained by {len(last['rng'])} processes, now {loop.number}"
        )
    try:
        _restore_weights(loop, last)
        _restore_random_state(loop, last)
        loop.progress = loop.progress.from_saved(last["state"])
        seen = []  # older versions kept none
        if "seen" in last:
            seen = last["seen"][loop.rank]
        loop.gradient.put_back(seen)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = in_one_line(error)
        raise InputError(f"--resume: {loop.run.folder / 'last.pth'} is damaged ({reason})") from None
    # Of the epoch that was the last one the loop writes it again.
    best, is_last = loop.progress.best_epoch, loop.progress.best_epoch == loop.progress.epoch
    if best and not (is_last and loop.progress.step == 0) and not loop.run.checkpoint.exists():
        raise InputError(
            f"--resume: {loop.run.checkpoint} is not there, with the weights of epoch {best}, the best: copy "
            "it back beside last.pth, or train anew with --overwrite"
        )


def _restore_weights(loop, last):
    """The model, the average of its weights, and the optimiser."""
    loop.model.load_state_dict(last["model"])
    loop.optimizer.load_state_dict(last["optimizer"])
    if loop.average is not None:
        loop.average.load_state_dict(last["average"])


def _restore_random_state(loop, last):
    """The random state of this process, and the one that all processes share."""
    if loop.number > 1:
        if last.get("draws"):
            loop.gradient.draws.states = last["draws"]
        else:
            say("note: an older version wrote last.pth: the changes of images are drawn from the start")
    random_state, device_state = last["rng"][loop.rank]
    torch.set_rng_state(random_state)
    if device_state is not None and loop.device.type == "cuda":
        torch.cuda.set_rng_state(device_state, loop.device)
