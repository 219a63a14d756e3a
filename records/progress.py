"""How far a training run is: what last.pth keeps as "state"."""

from dataclasses import dataclass, field, fields


@dataclass
class Progress:
    """How far a training run is.

    `epoch`: how many epochs are over; `step`: how many steps of the next one are, `loss_sum`: the sum of
    their losses, `seconds`: the time they took before an interruption; `history`: a row an epoch, as in
    results.json; `best_epoch`: its number, from 1 on, 0 before there is one; `head_seconds`: spent on the
    head alone, before the epochs; `lr`: learning rate of the last step, None before the first."""

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
        """Time of training so far, validation and the stage of the head included."""
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
