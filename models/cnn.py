"""Convolutional networks: those of timm, with a head of two layers. Nothing else imports timm."""

import copy
import difflib
import logging
from pathlib import Path

import torch
from torch import nn

from common.console import InputError, in_one_line
from common.files import sha256
from common.safe_files import check_state_dict, listed
from loading import cnns
from loading.families import IMAGENET
from loading.files import read_state_dict
from loading.settings import Settings, settings_of
from loading.vits import differences


def _timm():
    try:
        import timm
    except ImportError:
        raise InputError("this arm needs the package timm: pip install timm") from None
    return timm


class Cnn(nn.Module):
    """A CNN of timm by `name`: images (B, 3, H, W), already scaled -> float32 logits (B, num_classes).

    Its last feature map is pooled as timm does; the head is LayerNorm, dropout 0.3, Linear to 128, ReLU,
    dropout 0.25, Linear. `norm_eps`: of BatchNorm, None for timm's.
    InputError where timm is absent, for a name that it does not know, and for a model whose features are no
    map."""

    kind = "cnn"
    in_chans = 3
    layout = torch.channels_last  # of what it reads, see `features`

    def __init__(self, name, num_classes=2, drop_path_rate=0.0, norm_eps=None):
        super().__init__()
        timm = _timm()
        self.config = dict(name=name, num_classes=num_classes, drop_path_rate=drop_path_rate)
        if not isinstance(name, str) or not timm.is_model(name):
            near = difflib.get_close_matches(str(name)[:100], timm.list_models(), 3)
            hint = f": did you mean {' or '.join(near)}?" if near else "; timm.list_models() has all names"
            raise InputError(f"timm knows no model {str(name)[:100]!r}{hint}")
        extra = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
        self.tap = nn.Identity()  # the last feature map passes here, for Grad-CAM
        try:
            self.body = timm.create_model(name, num_classes=0, **extra)
            about = self.body.pretrained_cfg
            side = about["input_size"][-1] if about.get("fixed_input_size") else 96
            with torch.no_grad():
                found = self.body.eval().forward_features(torch.zeros(1, 3, side, side))
                width = self.body.forward_head(found).shape[-1]
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{name} cannot be used as a CNN: {listed([error])}") from None
        if found.ndim != 4 or found.shape[1] != self.body.num_features:
            raise InputError(f"{name} is no CNN of timm: its features are {tuple(found.shape)}, not a map")
        self.head = nn.Sequential(
            nn.LayerNorm(width),
            nn.Dropout(0.3),
            nn.Linear(width, 128),
            nn.ReLU(),
            nn.Dropout(0.25),
            nn.Linear(128, num_classes),
        )

        if norm_eps:
            self.set_norm_eps(norm_eps)

    def set_norm_eps(self, eps):
        """Give every BatchNorm this eps; it becomes part of the config."""
        self.config["norm_eps"] = eps
        for module in self.body.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eps = eps

    @property
    def scaling(self):
        """(mean, std) of the inputs that timm's weights were trained with, 3 floats each."""
        about = self.body.pretrained_cfg
        return about.get("mean") or IMAGENET[0], about.get("std") or IMAGENET[1]

    def features(self, x):
        """Images (B, 3, H, W) -> what the head reads, the last feature map as timm pools it: (B, D)."""
        if x.device.type != "mps":  # there unproven; elsewhere this layout is faster, see docs/BENCHMARK.md
            x = x.contiguous(memory_format=self.layout)
        return self.body.forward_head(self.tap(self.body.forward_features(x)))

    def check_training(self, side, images):
        """InputError unless a training step can have `images` of side x side px; nothing is changed, the
        random state included."""
        body = copy.deepcopy(self.body).train()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):  # stochastic depth draws
                body(torch.zeros(images, 3, side, side))
        except (RuntimeError, ValueError) as error:
            few = images == 1 and "more than 1 value per channel" in str(error)  # raised by BatchNorm
            if few:
                what, advice = (
                    "a training step of one image",
                    "--batch-size, so that no step is left with one",
                )
            else:
                what = f"images of {side} px"
                advice = "--img-size"
            raise InputError(
                f"{self.config['name']} cannot take {what}: {listed([error])}; try another {advice}"
            ) from None

    def layers(self):
        """Parts from input to head: (name, module) pairs."""
        return [*self.body.named_children(), ("head", self.head)]

    def forward(self, x):
        features = self.features(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(features.to(self.head[2].weight.dtype))


def has_batch_norm(model):
    """Whether a model normalises by the statistics of a batch in training."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def usual_size(name):
    """The side of the inputs that timm's weights of a model were trained with, px. InputError as for Cnn."""
    timm = _timm()
    try:
        about = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError as error:  # no such tag
        raise InputError(f"--model {name}: {error}") from None
    return about.input_size[-1] if about else 224


def load_weights(model, path):
    """Copy a state dict (.pth, .safetensors) of the same network into a Cnn's body; returns the report as
    npz_loader.load_npz does. timm's names, torchvision's, CheXNet's and torchxrayvision's are known
    (loading/cnns.py); the file's classifier is left out. InputError if anything else is missing, left over or
    of another shape: then the model is untouched."""
    path = str(path)
    if path.endswith(".npz"):
        raise InputError(f"{path} is an .npz, as Google's ViTs come: a CNN needs a .pth or .safetensors")
    if not Path(path).exists():
        raise InputError(f"no weights at {path}: check the path (docs/WEIGHTS.md says where to get them)")
    wanted = model.body.state_dict()
    held = read_state_dict(path, (*cnns.ROOTS, *wanted))
    if "patch_embed.proj.weight" in held.state and "patch_embed.proj.weight" not in wanted:
        raise InputError(f"{path} holds a ViT (it has patch_embed.proj.weight): train_pretrained.py reads it")
    check_state_dict(held.state, path)
    state, settings, notes = cnns.timm_names(held.state, wanted, model.config["name"], path)

    # The file's head is not ours: timm's classifier, torchvision's, or that of train_cnn.py.
    about = model.body.pretrained_cfg.get("classifier") or ()
    heads = [about] if isinstance(about, str) else list(about)
    heads = tuple(f"{name}." for name in ("head", "classifier", "fc", *heads))
    dropped = [name for name in state if name not in wanted and name.startswith(heads)]
    found = {name: value for name, value in state.items() if name not in dropped}
    # Files older than torch 0.4.1 do not count BatchNorm's batches, and nothing here reads the count.
    counts, loaded = {n: v for n, v in wanted.items() if n.endswith("num_batches_tracked")}, sorted(found)
    found = counts | found
    if text := differences(found, wanted, held.state):
        raise InputError(f"{path} does not hold {model.config['name']}: {text}")
    found = {n: v.to(wanted[n].dtype) for n, v in found.items()}  # 1e60 is infinite in float32
    if bad := sorted(n for n, v in found.items() if not torch.isfinite(v).all()):
        raise InputError(f"{path}: NaN or infinite values in [{listed(bad)}]")

    # What stands in the file or beside it is right; then its layout; then timm's configuration of --model.
    own = settings_of(path, None, None, around=held.around).or_else(settings)
    usual = Settings(*model.scaling, f"timm's configuration of {model.config['name']}")
    model.body.load_state_dict(found)
    if own.norm_eps:
        model.set_norm_eps(own.norm_eps)
    report = _report(path, loaded, dropped, own.or_else(usual))
    return report | {"sha256": sha256(Path(path)), "notes": [*held.notes, *notes, *own.notes]}


def _report(path, loaded, dropped, settings):
    """What results.json says of the weights, and npz_loader.describe prints."""
    return dict(
        path=path,
        source="timm CNN",
        mean=list(settings.mean),
        std=list(settings.std),
        scaling=settings.scaling,
        guessed=settings.scaling.startswith("guessed"),
        loaded=loaded,
        resized=[],
        reset=["head"],
        dropped=dropped,
    )


def download(model):
    """Fetch timm's own weights into a Cnn's body (only when asked); returns the report as load_weights does.
    InputError with the file to fetch by hand if that fails."""
    name, timm = model.config["name"], _timm()
    about = timm.get_pretrained_cfg(name)
    source = about and (about.hf_hub_id and f"https://huggingface.co/{about.hf_hub_id}" or about.url)
    if not source:
        raise InputError(f"--pretrained: timm has no weights of {name}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
    try:
        body = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # no network, no such file: each library has errors of its own
        reason = in_one_line(error)
        raise InputError(
            f"--pretrained: the weights of {name} cannot be fetched ({reason}). By hand: get them from "
            f"{source} and name the file with --weights"
        ) from None
    model.body.load_state_dict(body.state_dict())
    settings = Settings(*model.scaling, f"timm's configuration of {name}")
    return _report(source, sorted(body.state_dict()), [], settings)
