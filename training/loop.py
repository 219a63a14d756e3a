"""The training loop, shared by every model: epochs, the best of them, stopping and resuming."""

import math
import signal
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common.console import InputError, Interrupted, command_line, progress, say, tell
from common.device import device_name, gather, processes, stop_requests, versions
from common.files import FORMAT
from images.split import epoch_order
from models.batches import Batches
from records.progress import Progress
from records.track import Tracker
from training.evaluate import predict_together, say_stage
from training.loss import figures
from training.optimiser import WarmAverage, adamw, scheduled_rate
from training.recipe import differences
from training.step import Gradient, SharedDraws


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
        self.progress = Progress()
        self.longer = False  # whether a run that is resumed gets more epochs
        self.frozen = None  # whether the stem of a hybrid is, known from the first epoch on

    def fit(self, train, val, others=None):
        """Train on Subset `train`, validate on Subset `val` -> the content of results.json. `others`: {name:
        Subset} whose figures are told beside those of `val`, and choose nothing.

        InputError on a non-finite loss, naming epoch, step and learning rate; Interrupted when stopped on
        request, after saving."""
        if self.plan.resume and self._nothing_left():
            return self.run.results
        self.others = others or {}
        self.prepare(len(self._order(0, train)))
        results = self._begin()
        self.tracker = Tracker(() if self.rank else self.plan.track, self.run)
        self.tracker.begin(self.meta)
        try:
            self._epochs(train, val, results)
        finally:
            self.tracker.close()
        best = self.progress.history[results["best_epoch"] - 1]
        tell(
            f"best epoch {results['best_epoch']}: {figures(best, self.recipe.watch)}; "
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

    # ------------------------------------------------------------ start and resume

    def _nothing_left(self):
        """Whether the run to be resumed is finished already; says so. InputError if its settings differ."""
        results, last = self.run.results, self.run.load_last()
        before = {**results, **last["meta"]}
        self.longer = self._is_longer(before["recipe"].get("epochs"))
        if self.longer:
            before["recipe"] = {**before["recipe"], "epochs": self.recipe.epochs}
        if differ := differences(before, self.meta):
            raise InputError(f"--resume: the settings differ from those of {self.run}: " + "; ".join(differ))
        if self.longer:
            return False
        if results["finished"]:
            say(f"{self.run} is finished: nothing is left to do, and nothing was changed")
        return results["finished"]

    def _is_longer(self, epochs):
        """Whether more epochs are asked for than the `epochs` the run to be resumed was begun with; says so.
        InputError where its learning rate was planned over those."""
        asked = self.recipe.epochs
        if not isinstance(epochs, int) or asked <= epochs:
            return False
        if self.recipe.schedule == "cosine":
            raise InputError(
                f"--resume: {self.run} was begun with --epochs {epochs}, over which its learning rate falls "
                f"(--schedule cosine), so {asked} epochs are another run: go on with --epochs {epochs}, or "
                f"train anew with --epochs {asked} and --overwrite, or another --out. Only a run with "
                "--schedule constant or plateau can be made longer"
            )
        say(
            f"{self.run} was begun with --epochs {epochs} and goes on to {asked}, as if begun with these "
            f"(--schedule {self.recipe.schedule}, --lr {self.recipe.lr:g}); its calibration is removed"
        )
        return True

    def prepare(self, count):
        """Everything that `fit` uses, for `count` training images."""
        recipe, model = self.recipe, self.model.to(self.device)
        self._share()
        if self.number > 1:  # images are changed alike in all processes, dropout is another in each
            self.gradient.draws = SharedDraws(self.device)
            torch.manual_seed(recipe.seed + (1 + self.rank) * 1_000_003)
        self.optimizer = adamw(model, recipe, self.device)
        self.average = WarmAverage(model, recipe.ema) if recipe.ema else None
        self.kept = self.average.module if self.average else model  # what is validated and saved
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

    def _begin(self):
        """The content of results.json, new or from where the run was stopped; an earlier run's files are
        removed."""
        began = command_line()
        if self.plan.resume:
            self._restore(self.run.load_last())
            # The command that began the run tells more than the one that resumed it.
            if self.longer:
                began = began.replace(" --resume", "")
            else:
                began = self.run.results.get("command", began)
        if self.rank == 0:
            self.run.folder.mkdir(parents=True, exist_ok=True)
            self.run.clear(weights=not self.plan.resume)
        results = {
            "command": began,
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
        if not self.plan.resume:  # from now on it can be, and no other is begun in its folder unasked
            self._write(results)
            self._save_last()
        return results

    def _restore(self, last):
        """Model, optimiser, random state and progress from last.pth."""
        if len(last["rng"]) != self.number:
            raise InputError(
                f"--resume: {self.run} was trained by {len(last['rng'])} processes, now {self.number}"
            )
        try:
            self._restore_weights(last)
            self._restore_random_state(last)
            self.progress = Progress.from_saved(last["state"])
            self.gradient.put_back(last["seen"][self.rank] if "seen" in last else [])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"--resume: {self.run.folder / 'last.pth'} is damaged ({reason})") from None
        if self.progress.step == 0 and self.progress.best_epoch == self.progress.epoch:
            self._save_model()  # the process may have died before it could
        say(f"resuming {self.run} {self.progress.place}")

    def _restore_weights(self, last):
        """The model, what is trained beside it, their average, and the optimiser."""
        self.model.load_state_dict(last["model"])
        self.optimizer.load_state_dict(last["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(last["average"])

    def _restore_random_state(self, last):
        """That of this process, and the one that all processes share."""
        if self.number > 1:
            if last.get("draws"):
                self.gradient.draws.states = last["draws"]
            else:
                say("note: an older version wrote last.pth: the changes of images are drawn from the start")
        random_state, device_state = last["rng"][self.rank]
        torch.set_rng_state(random_state)
        if device_state is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(device_state, self.device)

    # ------------------------------------------------------------ epochs

    def _epochs(self, train, val, results):
        """The epochs that are left."""
        source = Batches(train, self.inputs, self.recipe.balance)
        with stop_requests() as stop:
            if self.recipe.epochs == 0 and not self.progress.epoch:  # a linear probe: see keep_head
                self._end_epoch(train, val, results, time.perf_counter())
            while not self._done():
                started = time.perf_counter() - self.progress.seconds
                if self._train_epoch(source, stop):
                    self.progress.seconds = time.perf_counter() - started
                    self._save_last()
                    self._write(results)  # so that a new run does not overwrite it unasked
                    signum = stop[0] if stop else signal.SIGTERM  # none: another process was asked
                    raise self._interrupted(signum)
                self._end_epoch(train, val, results, started)
        results["finished"] = True
        self._write(results)
        self.tracker.end(results)

    def _done(self):
        epoch, recipe = self.progress.epoch, self.recipe
        if epoch >= recipe.epochs or epoch * self.steps >= self.total:
            return True
        return "patience" in self.plan.used and self.progress.waited(recipe.stop_on) >= recipe.patience

    def _interrupted(self, signum):
        """The exception that tells where a run was stopped and how to go on."""
        again = command_line().replace(" --overwrite", "")
        if " --resume" not in again:
            again += " --resume"
        return Interrupted(f"stopped {self.progress.place}; saved. Go on with:\n  {again}", signum)

    def _order(self, epoch, train):
        return epoch_order(self.recipe.seed, epoch, train.targets, self.recipe.balance, train.sources)

    def _train_epoch(self, source, stop):
        """Run the rest of the epoch that `progress` is in; returns whether to stop. `stop`: the signals that
        asked for it."""
        self._enter_stage()
        self.net.train()
        if not self.progress.step:
            self.gradient.seen = []
        epoch, first, size = self.progress.epoch, self.progress.step, self.recipe.batch_size
        order = torch.from_numpy(self._order(epoch, source.subset))
        batches = order.split(size)[: self.total - epoch * self.steps]
        every = 1 if self.device.type == "cpu" else 10  # reading the loss makes a GPU wait
        begin, stopping = time.perf_counter(), False

        def status():
            speed = (self.progress.step - first) * size / (time.perf_counter() - begin)
            return f"loss {self.progress.mean_loss:.3f}, {speed:.0f} images/s"

        title = f"epoch {epoch + 1}/{self.recipe.epochs}"
        for index in progress(batches[first:], len(batches), title, begin=first, status=status):
            self._add_gradient(source, index)
            if self.progress.step % every == 0 or self.progress.step == len(batches):
                stopping = self._read_loss(stop)  # before the weights are changed by it
            self._change_weights()
            if stopping:
                break
        return stopping

    def _enter_stage(self):
        """Freeze the stem, or let it be trained, as the epoch that comes asks for."""
        recipe = self.recipe
        frozen = self.progress.epoch < recipe.frozen_epochs
        if recipe.frozen_epochs and frozen != self.frozen:
            self.frozen = frozen
            self.model.freeze(frozen)
            self._share()  # DistributedDataParallel must know what has a gradient
            say_stage(self.model, recipe.stages[0 if frozen else -1], recipe.backbone_lr_scale)

    def _add_gradient(self, source, index):
        """The gradient of the batch at positions `index`, clipped; its loss is added to `pending`."""
        merits = [self.objective.merit(row) for row in self.progress.history]
        place = self.progress.epoch, self.progress.step
        self.progress.lr = scheduled_rate(self.recipe, *place, self.steps, self.total, merits)
        for group in self.optimizer.param_groups:
            group["lr"] = self.progress.lr * group.get("lr_scale", 1.0)  # absent in older last.pth
        self.optimizer.zero_grad(set_to_none=True)
        self.pending[0] += self.gradient.add(self.net, source, index)
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.clip)
        self.progress.step += 1

    def _read_loss(self, stop):
        """Add the `pending` loss of all processes to that of the epoch; returns whether any process was asked
        to stop, so that none waits for one that has left. InputError if the loss is not finite."""
        self.pending[1] = len(stop)
        if self.number > 1:
            dist.all_reduce(self.pending)
        loss, requests = self.pending.tolist()
        self.pending.zero_()
        if not math.isfinite(loss):
            advice = ", or --no-amp" if self.inputs.amp else ""
            raise InputError(
                f"the loss became {loss} in epoch {self.progress.epoch + 1}, step {self.progress.step}, at "
                f"learning rate {self.progress.lr:.2e}. Try a smaller --lr{advice}"
            )
        self.progress.loss_sum += loss
        return requests > 0

    def _change_weights(self):
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
        self._save_last()
        if better:
            self._save_model()
        results.update(best_epoch=self.progress.best_epoch, minutes=self.progress.minutes)
        self._write(results)
        number, recipe = self.progress.epoch, self.recipe
        stage = 1
        if recipe.freeze_epochs:
            stage += 1
        if recipe.frozen_epochs and number > recipe.frozen_epochs:
            stage += 1
        self.tracker.epoch(number, row, stage)
        name = f"epoch {number}/{recipe.epochs}" if recipe.epochs else "head alone"
        mark = " *" if better else ""
        tell(
            f"{name}: train loss {row['train_loss']:.4f}, {figures(row, recipe.watch)}{mark}, "
            f"lr {row['lr']:.1e}, {row['seconds']:.0f} s"
        )

    def _validate(self, train, val):
        """The history entry of the epoch that `progress` is in; InputError if the validation loss is not
        finite.

        Figures of the training images are of the outputs that training saw: augmented, and weights on their
        way."""
        outputs = predict_together(self.kept, val, self.inputs, "validation")
        targets = torch.from_numpy(val.targets).to(self.device)
        losses = self.objective.losses(outputs.to(self.device), targets)
        loss = float(losses.sum() / self.objective.weights(targets).sum())
        if not math.isfinite(loss):
            raise InputError(
                f"the validation loss became {loss} in epoch {self.progress.epoch + 1}: try a smaller --lr"
            )
        watched = self.objective.watch(val.targets, outputs)
        index, logits = self.gradient.seen_by_all()
        watched |= self.objective.watch(train.targets[index.numpy()], logits, "train")
        row = {"train_loss": self.progress.mean_loss, "val_loss": loss, **watched, "lr": self.progress.lr}
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

    def _save_last(self):
        """Write last.pth, from which --resume goes on; what each process has is gathered."""
        cuda_state = None
        if self.device.type == "cuda":
            cuda_state = torch.cuda.get_rng_state(self.device)
        random_states = gather((torch.get_rng_state(), cuda_state))
        seen = gather(self.gradient.outputs() if self.progress.step else [])
        if self.rank:
            return
        last = {
            "meta": {k: self.meta[k] for k in ("model_config", "recipe", "data", "split")},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": self.progress.saved(),
            "average": self.average and self.average.state_dict(),
            "rng": random_states,
            "draws": self.gradient.draws and self.gradient.draws.states,
            "seen": seen,
        }
        self.run.save_last(last)
