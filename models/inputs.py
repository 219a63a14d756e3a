"""The one way from grey pixels to logits: scaling, precision, views. Training, scoring, prediction
and explanation all go through it, so that an image has one score whoever asks."""

from dataclasses import dataclass, replace
from functools import partial

import torch

from common import scaling
from common.cli import Number
from common.console import InputError, advice, say
from common.device import autocast, can_bf16, fast_bf16
from images.augment import tta_views
from lungs import show

AUTO = "auto"
SCALING = {"mean": Number(float, -1000, 1000), "std": Number(float, 0, 1000, above=True)}


@dataclass(frozen=True)
class Inputs:
    """How a model's inputs are made. `mean`, `std`: scaling, one float a channel; `device`: torch.device;
    `amp`: bf16 autocast; `views`: functions [B, C, S, S] -> the same shape whose logits are averaged
    (test-time augmentation), none for the image itself, or, of an ensemble, for what its members have;
    `input_mode`: what of an image the model is shown, one of lungs.INPUT_MODES; `reads_lungs`: whether the
    model is given the mask of the lungs, too, as the last channel.

    "Grey" below is [B, 1, S, S] in [0, 1], or what lungs.show gives: [B, 2, S, S], the second channel 1 where
    the model may look; for a model that reads them, the lungs follow as one more channel. Random changes and
    views move all channels together."""

    mean: tuple
    std: tuple
    device: torch.device
    amp: bool = False
    views: tuple = ()
    input_mode: str = "full"
    reads_lungs: bool = False

    @property
    def needs_lungs(self):
        """Whether images must come with masks of the lungs."""
        return self.input_mode != "full" or self.reads_lungs

    @classmethod
    def of_run(cls, results, device, tta=None):
        """The inputs of a run's results.json: bf16 if it was trained so and this device does it fast.

        `tta`: {"flip": bool} for test-time augmentation; None: the views that the run has itself."""
        tta, views = tta or scaling.own_views(results), ()
        if tta and "members" not in tta:  # an ensemble averages over those itself
            views = tuple(tta_views(**tta))
        return cls(
            mean=tuple(results["mean"]),
            std=tuple(results["std"]),
            device=device,
            amp=bool(results["recipe"]["amp"]) and fast_bf16(device),
            views=views,
            input_mode=results["data"].get("input", "full"),
            reads_lungs=results["data"].get("reads_lungs", False),
        )

    @classmethod
    def of_calibration(cls, run, calibration, device):
        """The inputs that the scores of a run's calibration were made with: its views, and its precision
        where this device can do that. What differs, or is not certain, is said in a line."""
        inputs = cls.of_run(run.results, device, calibration.get("tta"))
        precision, certain = scaling.precision_of(calibration, run.results)
        again = f"calibrate.py{scaling.tta_flag(calibration, run)} --run {run}"
        # Thresholds fit the precision they were chosen in, even where another one is faster.
        amp = precision == "bf16" and can_bf16(device)
        if not certain:
            say(
                f"note: {run} was calibrated by an older version, which kept no precision: {precision} is "
                f"taken, as in training; python {again} makes it certain"
            )
        if precision == "bf16" and not amp:
            say(
                f"note: {run} was calibrated in bf16, which {device.type} cannot do here: fp32 is used, so "
                "scores differ a little (up to about 0.02) from those its thresholds were chosen on; python "
                f"{again} on this device chooses them anew"
            )
        elif amp and not fast_bf16(device):
            say(
                f"note: {run} was calibrated in bf16, so that is used here too, where it is slow; python "
                f"{again} on this device would choose thresholds in fp32"
            )
        return replace(inputs, amp=amp)

    @property
    def precision(self):
        """ "bf16" or "fp32"."""
        return "bf16" if self.amp else "fp32"

    def on(self, device):
        """The same on another device, in fp32."""
        return replace(self, device=torch.device(device), amp=False)

    def grey(self, pixels, masks=None):
        """uint8 [B, S, S], array or tensor, and bool masks of the lungs, where they are needed -> grey on the
        device."""
        grey = unit_grey(torch.as_tensor(pixels).to(self.device))
        if not self.needs_lungs:
            return grey
        return self.shown(grey, torch.as_tensor(masks).to(self.device).unsqueeze(1).float())

    def shown(self, grey, masks):
        """[B, 1, S, S] in [0, 1] and masks of the lungs, 0 or 1, of the same shape -> grey."""
        shown = show.show(grey, masks, self.input_mode)
        if not self.reads_lungs:
            return shown
        if self.input_mode in ("crop", "masked-crop"):
            masks = show.show(masks, masks, "crop")
        return torch.cat([shown, masks], dim=1)

    def cover(self, grey):
        """Grey with all that the model may not see in one grey: [B, 1, S, S], and the lungs if it reads
        them."""
        if not self.reads_lungs:
            return show.cover(grey)
        return torch.cat([show.cover(grey[:, :-1]), grey[:, -1:]], dim=1)

    def scale(self, grey):
        """Grey -> (grey - mean) / std with len(mean) channels, by repeating grey, and the lungs as they are
        if the model reads them; what the model may not see is covered first."""
        if self.input_mode == "pair":
            return grey
        grey = self.cover(grey)
        mean, std = (torch.tensor(v, device=grey.device, dtype=grey.dtype) for v in (self.mean, self.std))
        scaled = (grey[:, :1] - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
        return torch.cat([scaled, grey[:, 1:]], dim=1) if self.reads_lungs else scaled

    def logits(self, model, grey):
        """Grey on the device -> float32 logits [B, K], averaged over the views."""
        with autocast(self.device, self.amp):
            return self.mean_logits(model, grey)

    def mean_logits(self, model, grey, together=False):
        """`logits` in the precision of whoever calls: an exported graph has no autocast. `together`: all
        views in one batch, so that the model is in a graph once."""
        if getattr(model, "shows", False):  # the view is of what each member is shown; None: its own
            logits = [model(self.scale(grey), view, together).float() for view in self.views or [None]]
            return torch.stack(logits).mean(0)
        if together and self.views:
            every = torch.cat([self.scale(view(grey)) for view in self.views])  # (views * B, C, S, S)
            return model(every).float().unflatten(0, (len(self.views), -1)).mean(0)
        views = self.views or [lambda x: x]
        return torch.stack([model(self.scale(view(grey))).float() for view in views]).mean(0)

    def logits_and_features(self, model, grey):
        """Grey on the device -> `logits`, then what the heads read of the first view: float32
        [B, K + D]; of an ensemble, one member after the other."""
        heads = [member.head for member in getattr(model, "members", [model])]
        kept = {head: [] for head in heads}
        hooks = [h.register_forward_pre_hook(lambda head, x: kept[head].append(x[0])) for h in heads]
        try:
            logits = self.logits(model, grey)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([logits, *(kept[head][0].float() for head in heads)], dim=1)

    def features(self, model, grey):
        """Grey on the device -> what the model's head reads, float32 [B, D]."""
        with autocast(self.device, self.amp):
            return model.features(self.scale(grey)).float()


def add_scaling_arguments(group):
    """--mean and --std."""
    for name in SCALING:
        text = f"input {name}, 3 numbers, or auto: of the training pixels (default: the weights' own)"
        kind = partial(_auto_or, SCALING[name])
        group.add_argument(f"--{name}", type=kind, nargs="+", default=None, metavar="X", help=text)


def _auto_or(kind, text):
    return text if text == AUTO else kind(text)


HOW_TO_SCALE = (
    "if that is wrong, give --mean and --std, or put the publisher's preprocessor_config.json or config.json "
    "in the folder of the weights"
)


def chosen_scaling(args, report):
    """(mean, std, where they come from) as --mean and --std say, else by the report of weights, as load_npz
    gives it: 3 floats each, or AUTO. A guess is said in a note. InputError for flags of anything else."""
    chosen, flags = [], []
    for name in SCALING:
        values, flag = getattr(args, name), f"--{name}"
        if values not in (None, [AUTO]) and (len(values) != 3 or AUTO in values):
            raise InputError(f"{flag} {' '.join(map(str, values))[:60]}: give 3 numbers, or {AUTO}")
        if values is None:
            values = report[name]
        else:
            flags.append(flag)
        chosen.append(AUTO if values == [AUTO] else values)
    if len(flags) == len(SCALING):
        return *chosen, " and ".join(flags)
    source = report["scaling"]
    if report.get("guessed"):
        mean, std = (" ".join(f"{v:g}" for v in report[name]) for name in SCALING)
        timm_name = advice("--timm-name", "--timm-name NAME or ")
        how = HOW_TO_SCALE.replace("--mean", f"{timm_name}--mean", 1)
        say(
            f"note: nothing says how the inputs of {report['path']} were scaled: {source}, mean {mean}, std "
            f"{std} are taken; {how}"
        )
    if flags:
        source = f"{flags[0]}, else {source}"
    return *chosen, source


def unit_grey(pixels):
    """uint8 [B, S, S] -> float32 [B, 1, S, S] in [0, 1]."""
    return pixels.unsqueeze(1).float().div_(255)
