"""A finished run whose probabilities another model learns beside the labels."""

from dataclasses import replace

import torch

from common.console import InputError, tell
from images.augment import tta_views
from models.inputs import Inputs
from records.run import WITHOUT_CLASSES

SHOWN = ("img_size", "resize", "input", "lungs_sha256")


class Teacher:
    """What a finished run makes of the very images its student is shown, changed as they are (Hinton et al.
    2015, arXiv:1503.02531; the same view for both: Beyer et al. 2022, arXiv:2106.05237). `share`, in [0, 1]:
    the part of the loss that imitates it.

    InputError unless the run is finished, answers the questions of `config`, a DataConfig, and is shown what
    a model of `config` is.
    """

    def __init__(self, run, config, device, share):
        there = run.config
        # It must answer the same questions, of the same pictures, without more to look at.
        if run.kind in WITHOUT_CLASSES or there.task != config.task:
            tells = "nothing"
            if run.kind not in WITHOUT_CLASSES:
                tells = ", ".join(there.classes)
            raise InputError(f"--teacher {run} tells {tells}; asked here: {', '.join(config.classes)}")
        if not run.results["finished"]:
            raise InputError(f"--teacher: {run.why_unfinished()}")
        if len(run.input_modes) > 1:
            raise InputError(f"--teacher {run} has members that are shown different parts of an image")
        if there.reads_lungs:
            raise InputError(f"--teacher {run} reads masks of the lungs, which its student is not given")
        if differ := [k for k in SHOWN if getattr(there, k) != getattr(config, k)]:
            before = ", ".join(f"{k} {getattr(there, k)}, here {getattr(config, k)}" for k in differ)
            raise InputError(f"--teacher {run} is shown something else than its student: {before}")
        self.run, self.share = run, share
        # Of a teacher that is scored by several views one is enough: each image is changed at random anyway.
        self.model, inputs = run.model().to(device), Inputs.of_run(run.results, device)
        self.inputs = replace(inputs, views=tuple(tta_views()[:1]))

    def begin(self):
        """Say who teaches."""
        tell(f"taught by {self.run}, {self.run.results['model']}: {self.share:g} of the loss")

    @torch.no_grad()
    def __call__(self, grey):
        """Images as the student's Inputs.grey gives them -> logits, float32 [B, K]."""
        return self.inputs.logits(self.model, grey)

    def description(self):
        """What results.json says of it."""
        return {
            "run": str(self.run),
            "checkpoint": self.run.checkpoint_sha256,
            "model": self.run.results["model"],
            "minutes": self.run.minutes,
        }
