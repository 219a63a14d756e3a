"""The training loop, shared by every model: epochs, the best of them, and a stop on request.

What a step does stands in step.py, what a resumed run needs in resume.py.
"""

import math
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common.console import InputError, TimeLeft, progress, say, tell
from common.device import device_name, processes, stop_requests, versions
from common.files import FORMAT
from images.split import epoch_order
from models.batches import Batches
from records.track import Tracker
from training import resume
from training.evaluate import predict_together, say_stage
from training.loss import figures
from training.step import Gradient, SharedDraws, WarmAverage, optimiser, scheduled_rate


class Loop:
    """Training of one model: keeps the epoch with the most merit on validation, and can be stopped and
    resumed.

    After an interruption (Ctrl-C, SIGTERM, kill -9) a resumed run goes on from last.pth; on a CPU the end is
    bit for bit that of an uninterrupted run. Under torchrun the batch is shared out among the processes
    (DistributedDataParallel) and the first one writes. `meta` is copied into results.json; a `teacher` takes
    its share of the loss.
    """

    def __init__(self, model, objective, plan, inputs, meta, teacher=None):
        self.model, self.objective, self.plan, self.inputs, self.meta = model, objective, plan, inputs, meta
        self.recipe, self.run, self.device = plan.recipe, plan.run, inputs.device
        self.gradient = Gradient(objective, self.recipe, inputs, plan.change, teacher)
        self.rank, self.number = processes()
        self.progress = resume.Progress()
        self.longer = False  # whether a run that is resumed gets more epochs
        self.frozen = None  # whether the stem of a hybrid is, known from the first epoch on

    def fit(self, train, val, others=None):
        """Train on Subset `train`, validate on Subset `val` -> the content of results.json. `others`: {name:
        Subset} whose figures are told beside those of `val`, and choose nothing.

        InputError on a non-finite loss, naming epoch, step and learning rate; Interrupted when stopped on
        request, after saving."""
        if self.plan.resume:
            self.longer = resume.is_longer(self.plan, self.meta)
            if self.run.results["finished"] and not self.longer:
                say(f"{self.run} is finished, and stays as it is")
                return self.run.results
        # Optimiser and average, and after an interruption what last.pth kept of them.
        self.others = others or {}
        self.prepare(len(self._order(0, train)))
        if self.plan.resume:
            self._go_on()
            if self.longer and self._done():
                say(f"{self.run} had been ended by {self._end()}, and stays as it is")
                return self.run.results
            if self.longer and self.run.calibrated():
                say(f"the calibration of {self.run} is removed: it belongs to the weights so far")
        # From here on the folder holds this run, and trackers follow it.
        results = self._begin()
        trackers = self.plan.track
        if self.rank:
            trackers = ()
        self.tracker = Tracker(trackers, self.run)
        self.tracker.begin(self.meta)
        try:
            self._epochs(train, val, results)
        finally:
            self.tracker.close()
        best, epoch = self.progress.history[results["best_epoch"] - 1], self.progress.epoch
        ended = ""
        if epoch < self.recipe.epochs and epoch * self.steps < self.total:
            recipe = self.recipe
            ended = f" (ended after epoch {epoch} of {recipe.epochs} by --patience {recipe.patience}"
            if recipe.schedule == "cosine" and self.progress.lr > recipe.lr / 2:
                ended += f", with the learning rate still at {self.progress.lr:.1e}; a longer one goes on"
            ended += ")"
        tell(
            f"best epoch {results['best_epoch']}{ended}: {figures(best, self.recipe.watch)}; "
            f"{results['minutes']:.1f} min; wrote {self.run}/checkpoint.pth and results.json"
        )
        return results

    def smallest_part(self, train):
        """How many images of a step the network sees at least at once."""
        return self.gradient.smallest_part(len(self._order(0, train)))

    def keep_head(self, loss, outputs, stage):
        """Take what `fit_head` returns for the only epoch there is: a linear probe."""
        self.progress.step, self.progress.loss_sum, self.progress.lr = 1, loss, stage.lr
        self.gradient.seen = [(torch.arange(len(outputs)), outputs)]

    # ------------------------------------------------------------ start

    def prepare(self, count):
        """Everything that `fit` uses, for `count` training images."""
        recipe, model = self.recipe, self.model.to(self.device)
        self._share()
        if self.number > 1:  # images are changed alike in all processes, dropout is another in each
            self.gradient.draws = SharedDraws(self.device)
            torch.manual_seed(recipe.seed + (1 + self.rank) * 1_000_003)
        # What is validated and saved is the average of the weights, where there is one.
        self.optimizer = optimiser(model, recipe, self.inputs)
        self.average, self.kept = None, model
        if recipe.ema:
            self.average = WarmAverage(model, recipe.ema)
            self.kept = self.average.module
        # How long training is: epochs of so many steps, fewer in all with --max-steps.
        self.steps = math.ceil(count / recipe.batch_size)
        self.total = min(recipe.epochs * self.steps, recipe.max_steps or math.inf)
        self.pending = torch.zeros(2, device=self.device)  # loss of the last steps; requests to stop

    def _share(self):
        """The model as it is trained, shared by all processes."""
        self.net = self.model
        if self.number == 1:
            return
        if layout := getattr(self.model, "layout", None):
            self.model.to(memory_format=layout)  # that of its gradients, or DistributedDataParallel warns
        ids = [self.device] if self.device.type == "cuda" else None
        self.net = DistributedDataParallel(self.model, ids)

    def _go_on(self):
        """Go on from where the run was stopped."""
        resume.restore(self)
        # last.pth is written before checkpoint.pth: the process may have died before it could write that.
        if self.progress.step == 0 and self.progress.best_epoch == self.progress.epoch > 0:
            self._save_model()
        say(f"resuming {self.run} {self.progress.place}")

    def _begin(self):
        """The content of results.json, new or from where the run was stopped; an earlier run's files are
        removed."""
        command = resume.command(self.plan, self.longer)
        if self.rank == 0:  # what was calibrated belongs to other weights
            self.run.folder.mkdir(parents=True, exist_ok=True)
            self.run.clear(weights=not self.plan.resume)
        results = {
            "command": command,
            **self.meta,
            "format": FORMAT,
            "finished": False,
            "synthetic": self.meta["split"]["synthetic"],
            "params": sum(p.numel() for p in self.model.parameters()),
            "device": device_name(self.device),
            "versions": versions(),
            "best_epoch": self.progress.best_epoch,
            "history": self.progress.history,
            "minutes": self.progress.minutes,
        }
        if not self.plan.resume:  # from now on it can be resumed, and no other is begun here unasked
            self._write(results)
            resume.save_last(self)
        return results

    # ------------------------------------------------------------ epochs

    def _epochs(self, train, val, results):
        """The epochs that are left; when they are over, the run is finished. Interrupted when asked to stop,
        after saving."""
        source = Batches(train, self.inputs, self.recipe.balance)
        plan, before = self.plan, self.progress.head_seconds
        may_end = "patience" in plan.used and self.recipe.epochs > self.recipe.patience
        around = before, plan.after
        self.left = TimeLeft(self.steps, self.total, plan.seeds, plan.following, around, may_end)
        with stop_requests() as stop:
            # A linear probe has one epoch, which is over before the first step: see keep_head.
            if self.recipe.epochs == 0 and not self.progress.epoch:
                self._end_epoch(train, val, results, time.perf_counter())
            while not self._done():
                started = time.perf_counter() - self.progress.seconds
                if self._train_epoch(source, stop):
                    self.progress.seconds = time.perf_counter() - started
                    resume.save_last(self)
                    self._write(results)  # so that a new run does not overwrite it unasked
                    raise resume.interrupted(stop, self.progress)
                self._end_epoch(train, val, results, started)
        results["finished"] = True
        self._write(results)
        self.tracker.end(results)
        # Asked to stop in the last validation: this run is finished, and the command has more to train.
        if self._read_loss(stop) and (plan.outer or plan.following):
            raise resume.interrupted(stop)

    def _done(self):
        epoch, recipe = self.progress.epoch, self.recipe
        if epoch >= recipe.epochs or epoch * self.steps >= self.total:
            return True
        # While a hybrid's stem is frozen, nobody loses patience.
        waited = min(self.progress.waited(recipe.stop_on), epoch - recipe.frozen_epochs)
        return "patience" in self.plan.used and waited >= recipe.patience

    def _end(self):
        """The flag that ended training before its last epoch."""
        if self.progress.epoch * self.steps >= self.total:
            return f"--max-steps {self.recipe.max_steps}"
        return f"--patience {self.recipe.patience}"

    def _order(self, epoch, train):
        return epoch_order(self.recipe.seed, epoch, train.targets, self.recipe.balance, train.sources)

    def _train_epoch(self, source, stop):
        """Run the rest of the epoch that `progress` is in; returns whether to stop. `stop`: the signals that
        asked for it."""
        if self.recipe.frozen_epochs:
            self._enter_stage()
        self.net.train()
        if not self.progress.step:
            self.gradient.seen = []
        # The order is a function of seed and epoch, so a resumed epoch goes on where it was stopped.
        epoch, first, size = self.progress.epoch, self.progress.step, self.recipe.batch_size
        order = torch.from_numpy(self._order(epoch, source.subset))
        batches = order.split(size)[: self.total - epoch * self.steps]
        # Reading the loss makes a GPU wait.
        every = 1 if self.device.type == "cpu" else 10
        begin, stopping = time.perf_counter(), False

        def status():
            speed = (self.progress.step - first) * size / (time.perf_counter() - begin)
            return f"loss {self.progress.mean_loss:.3f}, {speed:.0f} images/s"

        title = f"epoch {epoch + 1}/{self.recipe.epochs}"
        self.left.begin()
        told = {"begin": first, "status": status, "left": lambda rest: self.left.text(rest, epoch)}
        for index in progress(batches[first:], len(batches), title, **told):
            self._set_rate()
            self._add_gradient(source, index)
            # A loss that is not finite must not change the weights, so it is read first.
            if self.progress.step % every == 0 or self.progress.step == len(batches):
                stopping = self._read_loss(stop)
            self._change_weights()
            self.left.end_step()
            if stopping:
                break
        return stopping

    def _enter_stage(self):
        """Freeze the stem of a hybrid, or let it be trained, as the epoch that comes asks for."""
        recipe = self.recipe
        frozen = self.progress.epoch < recipe.frozen_epochs
        if frozen == self.frozen:
            return
        self.frozen = frozen
        self.left.begin_stage(recipe.frozen_epochs if frozen else None)
        self.model.freeze(frozen)
        self._share()  # DistributedDataParallel must know what has a gradient
        stage = recipe.stages[0] if frozen else recipe.stages[-1]
        say_stage(self.model, stage, recipe.backbone_lr_scale)

    def _set_rate(self):
        """Give every layer the learning rate of the step that comes."""
        merits = [self.objective.merit(row) for row in self.progress.history]
        place = self.progress.epoch, self.progress.step
        self.progress.lr = scheduled_rate(self.recipe, *place, self.steps, self.total, merits)
        for group in self.optimizer.param_groups:
            group["lr"] = self.progress.lr * group.get("lr_scale", 1.0)  # absent in older last.pth

    def _add_gradient(self, source, index):
        """The gradient of the batch at positions `index`, clipped; its loss is added to `pending`."""
        self.optimizer.zero_grad(set_to_none=True)
        self.pending[0] += self.gradient.add(self.net, source, index)
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.clip)
        self.progress.step += 1

    def _read_loss(self, stop):
        """Add the `pending` loss of all processes to that of the epoch; returns whether any process was asked
        to stop, so that none waits for one that has left. InputError if the loss is not finite."""
        # One exchange for both: what the other processes lost, and whether one of them was asked to stop.
        self.pending[1] = len(stop)
        if self.number > 1:
            dist.all_reduce(self.pending)
        loss, requests = self.pending.tolist()
        self.pending.zero_()
        if not math.isfinite(loss):
            raise InputError(
                f"the loss became {loss} in epoch {self.progress.epoch + 1}, step {self.progress.step}, at "
                f"learning rate {self.progress.lr:.2e}. Try {resume.what_to_try(self.plan, self.inputs)}"
            )
        self.progress.loss_sum += loss
        return requests > 0

    def _change_weights(self):
        """AdamW's step, and that of the average."""
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    # ------------------------------------------------------------ the end of an epoch

    def _end_epoch(self, train, val, results, started):
        """Validate the epoch that `progress` is in and write what is to be kept; `started`: when it began."""
        row = self._validate(train, val)
        row["seconds"] = time.perf_counter() - started
        better = self.progress.end_epoch(row, self.objective.merit)
        # last.pth goes first: if the process dies between the two, resuming rewrites the checkpoint from it.
        resume.save_last(self)
        if better:
            self._save_model()
        results.update(best_epoch=self.progress.best_epoch, minutes=self.progress.minutes)
        self._write(results)
        self.left.end_epoch()
        # Trackers and the reader of the terminal learn of it when it is safe.
        number, recipe = self.progress.epoch, self.recipe
        self.tracker.epoch(number, row, recipe.stage_of(number))
        name = f"epoch {number}/{recipe.epochs}" if recipe.epochs else "head alone"
        mark = " *" if better else ""
        tell(
            f"{name}: train loss {row['train_loss']:.4f}, {figures(row, recipe.watch)}{mark}, "
            f"lr {row['lr']:.1e}, {row['seconds']:.0f} s"
        )

    def _validate(self, train, val):
        """The history entry of the epoch that `progress` is in; InputError if the validation loss is not
        finite."""
        outputs = predict_together(self.kept, val, self.inputs, "validation")
        targets = torch.from_numpy(val.targets).to(self.device)
        losses = self.objective.losses(outputs.to(self.device), targets)
        loss = float(losses.sum() / self.objective.weights(targets).sum())
        if not math.isfinite(loss):
            advice = resume.what_to_try(self.plan, self.inputs)
            raise InputError(
                f"the validation loss became {loss} in epoch {self.progress.epoch + 1}: try {advice}"
            )
        watched = self.objective.watch(val.targets, outputs)
        # Of the training images what training saw counts: augmented, and with weights on their way.
        index, logits = self.gradient.seen_by_all()
        watched |= self.objective.watch(train.targets[index.numpy()], logits, "train")
        row = {"train_loss": self.progress.mean_loss, "val_loss": loss, **watched, "lr": self.progress.lr}
        # Images held out of other hospitals choose nothing.
        if self.others:
            row["others"] = {}
        for name, other in self.others.items():
            outputs = predict_together(self.kept, other, self.inputs, name)
            row["others"][name] = self.objective.watch(other.targets, outputs, "held_out")
        return row

    # ------------------------------------------------------------ files

    def _write(self, results):
        if self.rank == 0:
            self.run.save_results(results)

    def _save_model(self):
        if self.rank == 0:
            self.run.save_model(self.kept)
