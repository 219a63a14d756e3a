"""A finished run whose probabilities, and features, another model learns beside the labels."""

import torch
import torch.nn.functional as F
from torch import nn

from common.console import InputError, tell
from common.device import processes
from models.inputs import Inputs
from records.run import WITHOUT_CLASSES

SHOWN = ("img_size", "resize", "input", "lungs_sha256", "normalise")


class FeatureMatch(nn.Module):
    """How far a student's features, through a linear layer that is trained along and then thrown away, are
    from its teacher's, normalised without weights: the smooth L1 distance of Wei et al. 2022
    (arXiv:2205.14141), beta 2. Features are what the head of either model was last given."""

    def __init__(self, student, teacher, width):
        """width: that of the teacher's features."""
        super().__init__()
        self.last = {}
        self.project = nn.Linear(student.head.in_features, width)
        for name, model in (("student", student), ("teacher", teacher)):
            model.head.register_forward_pre_hook(self._keeper(name))

    def _keeper(self, name):
        return lambda head, given: self.last.update({name: given[0]})

    def forward(self):
        """The distance of every image of the batch that both models saw last, [B]."""
        student, teacher = (self.last.pop(name).float() for name in ("student", "teacher"))
        wanted = F.layer_norm(teacher, teacher.shape[1:])
        return F.smooth_l1_loss(self.project(student), wanted, reduction="none", beta=2.0).mean(dim=1)


class Teacher:
    """What a finished run makes of the very images its student is shown, changed as they are (Hinton et al.
    2015, arXiv:1503.02531; the same view for both: Beyer et al. 2022, arXiv:2106.05237). `share`, in [0, 1]:
    the part of the loss that imitates it. `match`: the FeatureMatch of a student that imitates features, too.

    InputError unless the run is finished, answers the questions of `config`, a DataConfig, and is shown what
    a model of `config` is.
    """

    def __init__(self, run, config, device, share):
        there = run.config
        if run.kind in WITHOUT_CLASSES or there.task != config.task:
            tells = "nothing" if run.kind in WITHOUT_CLASSES else ", ".join(there.classes)
            raise InputError(f"--teacher {run} tells {tells}; asked here: {', '.join(config.classes)}")
        if not run.results["finished"]:
            raise InputError(f"--teacher: {run.why_unfinished()}")
        if len(run.looks) > 1:
            raise InputError(f"--teacher {run} has members that are shown different parts of an image")
        if there.reads_lungs:
            raise InputError(f"--teacher {run} reads masks of the lungs, which its student is not given")
        if differ := [k for k in SHOWN if getattr(there, k) != getattr(config, k)]:
            before = ", ".join(f"{k} {getattr(there, k)}, here {getattr(config, k)}" for k in differ)
            raise InputError(f"--teacher {run} is shown something else than its student: {before}")
        self.run, self.share, self.match = run, share, None
        self.model, self.inputs = run.model().to(device), Inputs.of_run(run.results, device)

    def begin(self):
        """Say who teaches."""
        tell(f"taught by {self.run}, {self.run.results['model']}: {self.share:g} of the loss")

    def show_features(self, student):
        """From now on `match` compares the features of this model with the teacher's. InputError for a
        teacher without a head of its own, and under torchrun."""
        if not hasattr(self.model, "head"):
            raise InputError(f"--teacher-features: {self.run} is an ensemble and has no features of its own")
        if processes()[1] > 1:
            raise InputError("--teacher-features needs one process: start it without torchrun")
        device, side = self.inputs.device, self.run.config.img_size
        with torch.no_grad():
            blank = torch.zeros(1, self.model.in_chans, side, side, device=device)
            width = self.model.features(blank).shape[1]
        self.match = FeatureMatch(student, self.model, width).to(device)

    @torch.no_grad()
    def __call__(self, grey):
        """Images as the student's Inputs.grey gives them -> logits, float32 [B, K]."""
        return self.inputs.logits(self.model, grey)

    def about(self):
        """What results.json says of it."""
        results = self.run.results
        about = {"run": str(self.run), "checkpoint": self.run.checkpoint_sha256, "model": results["model"]}
        return {**about, "minutes": self.run.minutes}
