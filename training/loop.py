"""The training loop, shared by every model."""

import math
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.console import InputError, Interrupted, Pace, command_line, say, tell
from common.device import device_name, gather, processes, stop_requests, versions
from common.files import FORMAT
from data import Batches
from images.split import epoch_order
from records.track import Tracker
from training.evaluate import predict, say_stage
from training.optimiser import WarmAverage, learning_rate, parameter_groups, plateau_factor
from training.recipe import THAWED, differences
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
        self.state = {"epoch": 0, "step": 0, "loss_sum": 0.0, "seconds": 0.0, "history": [], "best_epoch": 0}
        self.state["head_seconds"] = 0.0  # spent on the head alone, before the epochs
        self.longer = False  # whether a run that is resumed gets more epochs
        self.frozen = None  # whether the stem of a hybrid is, known from the first epoch on

    # ------------------------------------------------------------ start and resume

    def finished(self):
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

    def fit(self, train, val, others=None):
        """Train on Subset `train`, validate on Subset `val` -> the content of results.json. `others`: {name:
        Subset} whose figures are told beside those of `val`, and choose nothing.

        InputError on a non-finite loss, naming epoch, step and learning rate; Interrupted when stopped on
        request, after saving."""
        if self.plan.resume and self.finished():
            return self.run.results
        self.others = others or {}
        self.prepare(len(self._order(0, train)))
        results, history = self._begin(), self.state["history"]
        self.tracker = Tracker(() if self.rank else self.plan.track, self.run)
        self.tracker.begin(self.meta)
        try:
            self._train(train, val, results)
        finally:
            self.tracker.close()
        best = history[results["best_epoch"] - 1]
        tell(
            f"best epoch {results['best_epoch']}: {self._figures(best)}; {results['minutes']:.1f} min; "
            f"wrote {self.run}/checkpoint.pth and results.json"
        )
        return results

    def _train(self, train, val, results):
        """The epochs that are left."""
        source = Batches(train, self.inputs, self.recipe.balance)
        with stop_requests() as stop:
            if self.recipe.epochs == 0 and not self.state["epoch"]:
                self._end_epoch(train, val, results, time.perf_counter())
            while not self._done():
                started = time.perf_counter() - self.state["seconds"]
                if self._train_epoch(source, stop):
                    self.state["seconds"] = time.perf_counter() - started
                    self._save_last()
                    self._write(results)  # so that a new run does not overwrite it unasked
                    # none: another process was asked
                    raise self._interrupted(stop[0] if stop else signal.SIGTERM)
                self._end_epoch(train, val, results, started)
        results["finished"] = True
        self._write(results)
        self.tracker.end(results)

    def _order(self, epoch, train):
        return epoch_order(self.recipe.seed, epoch, train.targets, self.recipe.balance, train.sources)

    def smallest_part(self, train):
        """How many images of a step the network sees at least at once."""
        return self.gradient.smallest_part(len(self._order(0, train)))

    def keep_head(self, loss, outputs, stage):
        """Take what `fit_head` returns for the only epoch there is: a linear probe."""
        self.state.update(step=1, loss_sum=loss, lr=stage.lr)
        self.gradient.seen = [(torch.arange(len(outputs)), outputs)]

    def prepare(self, count):
        """Everything that `fit` uses, for `count` training images."""
        recipe, model = self.recipe, self.model.to(self.device)
        self._share()
        if self.number > 1:  # images are changed alike in all processes, dropout is another in each
            self.gradient.draws = SharedDraws(self.device)
            torch.manual_seed(recipe.seed + (1 + self.rank) * 1_000_003)
        groups = parameter_groups(model, recipe.weight_decay, recipe.backbone_lr_scale, recipe.layer_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, fused=self.device.type in ("cpu", "cuda"))
        self.average = WarmAverage(model, recipe.ema) if recipe.ema else None
        self.kept = self.average.module if self.average else model  # what is validated and saved
        self.steps = math.ceil(count / recipe.batch_size)
        self.total = min(recipe.epochs * self.steps, recipe.max_steps or math.inf)

    def _share(self):
        """The model as it is trained, shared by all processes."""
        ids = [self.device] if self.device.type == "cuda" else None
        if self.number > 1 and (layout := getattr(self.model, "layout", None)):
            self.model.to(memory_format=layout)  # that of its gradients, or DistributedDataParallel warns
        self.net = DistributedDataParallel(self.model, ids) if self.number > 1 else self.model

    def _enter_stage(self):
        """Freeze the stem, or let it be trained, as the epoch that comes asks for."""
        recipe, epoch = self.recipe, self.state["epoch"]
        frozen = epoch < recipe.frozen_epochs
        if recipe.frozen_epochs and frozen != self.frozen:
            self.frozen = frozen
            self.model.freeze(frozen)
            self._share()  # DistributedDataParallel must know what has a gradient
            say_stage(self.model, recipe.stages[0 if frozen else -1], recipe.backbone_lr_scale)

    def _begin(self):
        """The content of results.json, new or from where the run was stopped; an earlier run's files are
        removed."""
        meta = self.meta
        if self.plan.resume:
            self._restore(self.run.load_last())
            # The command that began the run tells more than the one that resumed it.
            now = command_line()
            began = now.replace(" --resume", "") if self.longer else self.run.results.get("command", now)
            meta = {**meta, "command": began}
        if self.rank == 0:
            self.run.folder.mkdir(parents=True, exist_ok=True)
            self.run.clear(weights=not self.plan.resume)
        results = {
            "command": command_line(),
            **meta,
            "format": FORMAT,
            "finished": False,
            "synthetic": meta["split"]["synthetic"],
            "params": sum(p.numel() for p in self.model.parameters()),
            "device": device_name(self.device),
            "versions": versions(),
            "best_epoch": self.state["best_epoch"],
            "history": self.state["history"],
            "minutes": self._minutes(),
        }
        if not self.plan.resume:  # from now on it can be, and no other is begun in its folder unasked
            self._write(results)
            self._save_last()
        return results

    def _minutes(self):
        """Time of training so far, validation and the stage of the head included."""
        return (self.state["head_seconds"] + sum(h["seconds"] for h in self.state["history"])) / 60

    def _restore(self, last):
        """Model, optimiser, random state and progress from last.pth."""
        if len(last["rng"]) != self.number:
            raise InputError(
                f"--resume: {self.run} was trained by {len(last['rng'])} processes, now {self.number}"
            )
        try:
            self.model.load_state_dict(last["model"])
            self.optimizer.load_state_dict(last["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(last["average"])
            if self.number > 1 and last.get("draws"):
                self.gradient.draws.states = last["draws"]
            elif self.number > 1:
                say("note: an older version wrote last.pth: the changes of images are drawn from the start")
            random_state, device_state = last["rng"][self.rank]
            torch.set_rng_state(random_state)
            if device_state is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(device_state, self.device)
            self.state = {**self.state, **last["state"]}
            self.gradient.put_back(last["seen"][self.rank] if "seen" in last else [])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"--resume: {self.run.folder / 'last.pth'} is damaged ({reason})") from None
        if self.state["step"] == 0 and self.state["best_epoch"] == self.state["epoch"]:
            self._save_model()  # the process may have died before it could
        say(f"resuming {self.run} in epoch {self.state['epoch'] + 1} after step {self.state['step']}")

    def _done(self):
        epoch, recipe = self.state["epoch"], self.recipe
        last = self.state["best_epoch"]
        if recipe.stop_on == "loss" and self.state["history"]:
            losses = [row["val_loss"] for row in self.state["history"]]
            last = losses.index(min(losses)) + 1
        waited = epoch - last >= recipe.patience and "patience" not in self.plan.unused
        return epoch >= recipe.epochs or epoch * self.steps >= self.total or waited

    def _interrupted(self, signum):
        """The exception that tells where a run was stopped and how to go on."""
        again = command_line().replace(" --overwrite", "")
        again += "" if " --resume" in again else " --resume"
        where = f"in epoch {self.state['epoch'] + 1} after step {self.state['step']}"
        return Interrupted(f"stopped {where}; saved. Go on with:\n  {again}", signum)

    # ------------------------------------------------------------ an epoch

    def _end_epoch(self, train, val, results, started):
        """Validate the epoch in `state` and write what is to be kept; `started`: when it began."""
        row, history = self._validate(train, val), self.state["history"]
        row["seconds"] = time.perf_counter() - started
        best = self.state["best_epoch"]
        better = not best or self.objective.merit(row) > self.objective.merit(history[best - 1])
        history.append(row)
        self.state.update(epoch=self.state["epoch"] + 1, step=0, loss_sum=0.0, seconds=0.0)
        if better:
            self.state["best_epoch"] = self.state["epoch"]
        # last.pth goes first: if the process dies between the two, resuming rewrites the checkpoint from it.
        self._save_last()
        if better:
            self._save_model()
        results.update(best_epoch=self.state["best_epoch"], minutes=self._minutes())
        self._write(results)
        number, recipe = self.state["epoch"], self.recipe
        self.tracker.epoch(number, row, 1 + (number > recipe.frozen_epochs > 0) + (recipe.freeze_epochs > 0))
        name = f"epoch {self.state['epoch']}/{self.recipe.epochs}" if self.recipe.epochs else "head alone"
        tell(
            f"{name}: train loss {row['train_loss']:.4f}, {self._figures(row)}{' *' if better else ''}, "
            f"lr {row['lr']:.1e}, {row['seconds']:.0f} s"
        )

    def _rate(self):
        """Learning rate of the step that comes next."""
        recipe = self.recipe
        step = self.state["epoch"] * self.steps + self.state["step"]
        warmup = min(recipe.warmup_epochs * self.steps, self.total)
        thawed = recipe.frozen_epochs and self.state["epoch"] >= recipe.frozen_epochs
        peak = recipe.lr * (THAWED if thawed else 1.0)
        if recipe.schedule == "plateau":
            peak *= plateau_factor([self.objective.merit(row) for row in self.state["history"]])
        return learning_rate(step, self.total, warmup, peak, recipe.schedule, recipe.min_lr)

    def _train_epoch(self, source, stop):
        """Run the rest of the epoch in `state`; returns whether to stop.

        The processes agree on that, so that none waits for one that has left."""
        state, epoch, size = self.state, self.state["epoch"], self.recipe.batch_size
        self._enter_stage()
        self.net.train()
        order = torch.from_numpy(self._order(epoch, source.subset))
        if not state["step"]:
            self.gradient.seen = []
        batches = order.split(size)[: self.total - epoch * self.steps]
        look = 1 if self.device.type == "cpu" else 10  # reading the loss makes a GPU wait
        running, pace = torch.zeros(2, device=self.device), Pace()
        begin, seen, stopping = time.perf_counter(), 0, 0.0
        name = f"epoch {epoch + 1}/{self.recipe.epochs}"
        quiet = bool(self.rank) or not sys.stderr.isatty()
        with tqdm(
            total=len(batches), initial=state["step"], desc=name, unit="step", leave=False, disable=quiet
        ) as bar:
            for index in batches[state["step"] :]:
                state["lr"] = self._rate()
                for group in self.optimizer.param_groups:
                    group["lr"] = state["lr"] * group.get("lr_scale", 1.0)  # absent in older last.pth
                self.optimizer.zero_grad(set_to_none=True)
                running[0] += self.gradient.add(self.net, source, index)
                torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.clip)
                state["step"] += 1
                seen += len(index)
                if state["step"] % look == 0 or state["step"] == len(batches):
                    running[1] = len(stop)
                    if self.number > 1:
                        dist.all_reduce(running)
                    value, stopping = running.tolist()
                    running.zero_()
                    self._check(value)
                    state["loss_sum"] += value
                self.optimizer.step()
                if self.average is not None:
                    self.average.update_parameters(self.model)
                speed = seen / (time.perf_counter() - begin)
                status = f"loss {state['loss_sum'] / state['step']:.3f}, {speed:.0f} images/s"
                bar.set_postfix_str(status, refresh=False)
                bar.update()
                if quiet:
                    text = f"{name} step {state['step']}/{len(batches)}: {status}"
                    pace.step(seen, seen + (len(batches) - state["step"]) * size, text)
                if stopping:
                    break
        return bool(stopping)

    def _check(self, loss):
        """InputError if the loss of the last steps is not finite."""
        if not math.isfinite(loss):
            raise InputError(
                f"the loss became {loss} in epoch {self.state['epoch'] + 1}, step {self.state['step']}, at "
                f"learning rate {self.state['lr']:.2e}. Try a smaller --lr"
                + (", or --no-amp" if self.inputs.amp else "")
            )

    def _validate(self, train, val):
        """The history entry of the epoch in `state`; InputError if the validation loss is not finite.

        Figures of the training images are of the outputs that training saw: augmented, and weights on their
        way."""
        outputs = self._outputs(val)
        targets = torch.from_numpy(val.targets).to(self.device)
        losses = self.objective.losses(outputs.to(self.device), targets)
        loss = float(losses.sum() / self.objective.weights(targets).sum())
        if not math.isfinite(loss):
            raise InputError(
                f"the validation loss became {loss} in epoch {self.state['epoch'] + 1}: try a smaller --lr"
            )
        watched = self.objective.watch(val.targets, outputs)
        seen = (part for rank in gather(self.gradient.outputs()) for part in rank)
        index, logits = (torch.cat(v) for v in zip(*seen))
        watched |= self.objective.watch(train.targets[index.numpy()], logits, "train")
        mean = self.state["loss_sum"] / self.state["step"]
        row = {"train_loss": mean, "val_loss": loss, **watched, "lr": self.state["lr"]}
        if self.others:
            parts = ((n, o.targets, self._outputs(o, n)) for n, o in self.others.items())
            row["others"] = {n: self.objective.watch(t, o, "held_out") for n, t, o in parts}
        return row

    def _outputs(self, subset, name="validation"):
        """What the kept weights give for a Subset, of which every process takes its share; on the CPU."""
        mine = subset.take(np.arange(self.rank, len(subset), self.number))
        mine = predict(self.kept, mine, self.inputs, progress=name)
        outputs = mine.new_empty(len(subset), mine.shape[1])
        for rank, part in enumerate(gather(mine)):
            outputs[rank :: self.number] = part
        return outputs

    def _figures(self, row):
        """A history entry's validation figures as text; the accuracy where it chooses the epoch."""
        names = {"val_auroc": "val AUROC", "val_dice": "val Dice"}
        names |= {"val_accuracy": "val accuracy"} if self.recipe.watch == "accuracy" else {}
        parts = [f", {name} {row[key]:.4f}" for key, name in names.items() if key in row]
        for name, found in row.get("others", {}).items():
            auroc = found.get("held_out_auroc")
            parts += [] if auroc is None else [f", {name} AUROC {auroc:.4f}"]
        return f"val loss {row['val_loss']:.4f}" + "".join(parts)

    # ------------------------------------------------------------ files

    def _write(self, results):
        if self.rank == 0:
            self.run.save_results(results)

    def _save_model(self):
        if self.rank == 0:
            self.run.save_model(self.kept)

    def _save_last(self):
        cuda = self.device.type == "cuda"
        rng = gather((torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if cuda else None))
        seen = gather(self.gradient.outputs() if self.state["step"] else [])
        if self.rank:
            return
        self.run.save_last(
            {
                "meta": {k: self.meta[k] for k in ("model_config", "recipe", "data", "split")},
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "state": self.state,
                "average": self.average and self.average.state_dict(),
                "rng": rng,
                "draws": self.gradient.draws and self.gradient.draws.states,
                "seen": seen,
            }
        )
