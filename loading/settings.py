"""What weights do not say themselves: how their inputs were scaled, and how many heads attention has.

Read from flags, from the files that publishers put beside the weights, from timm; else taken from the family,
and said."""

import difflib
import math
from pathlib import Path
from typing import NamedTuple

from common.console import InputError
from common.files import read_json
from common.safe_files import listed

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # width: heads; ViT-H has 16, DINOv3-H+ 20
OURS = {"embed_dim": 256, "depth": 6, "mlp_ratio": 4.0}, 8  # the scratch arm, and its heads
GATED = ("silu", "swish")  # hidden_act of DINOv3's gated MLP; every other has gelu


class Settings(NamedTuple):
    """`mean`, `std`: 3 floats each, or None; `scaling`: where they come from; `heads`: a number or None;
    `norm_eps`: of the LayerNorms, a float or None; `readout`: what the head reads, or None; `notes`: lines to
    say."""

    mean: tuple | None = None
    std: tuple | None = None
    scaling: str | None = None
    heads: int | None = None
    norm_eps: float | None = None
    readout: str | None = None
    notes: tuple = ()

    def or_else(self, other):
        """This, and where it says nothing what `other` says."""
        scaling = self if self.mean else other
        return Settings(
            scaling.mean,
            scaling.std,
            scaling.scaling,
            self.heads or other.heads,
            self.norm_eps or other.norm_eps,
            self.readout or other.readout,
            self.notes + other.notes,
        )


def settings_of(path, width, depth, *, heads=None, timm_name=None, around=None):
    """The Settings of weights at `path`, of a ViT `width` wide with `depth` blocks (None: of a CNN).

    `heads`, `timm_name`: as given on the command line; `around`: Held.around. The first that speaks is right:
    the flags, what stands in the file, preprocessor_config.json, config.json and results.json beside it.
    InputError for a file beside it that is damaged or contradicts the weights, and an unknown timm name.
    """
    found = Settings(heads=heads)
    if timm_name:
        found = found.or_else(of_timm(timm_name, width, "--timm-name"))
    found = found.or_else(_in_file(around or {}, width))
    return found.or_else(_beside(Path(path), width, depth))


def _scaling(mean, std, source, where):
    """Settings of a mean and a std from a file; one number stands for all channels. InputError unless they
    are 3 finite numbers each, std above 0."""
    values = []
    for name, given in (("mean", mean), ("std", std)):
        numbers = given if isinstance(given, (list, tuple)) else [given]
        usable = all(type(v) in (int, float) and math.isfinite(v) and abs(v) < 1000 for v in numbers)
        if not usable or len(numbers) not in (1, 3) or (name == "std" and min(numbers) <= 0):
            raise InputError(
                f"{where}: {name} is {listed([given])}, not 3 numbers: mend it, or take it away and give "
                "--mean and --std"
            )
        values.append(tuple(map(float, numbers * (3 // len(numbers)))))
    return Settings(*values, source)


# ---------------------------------------------------------------- timm


def of_timm(name, width, source):
    """Settings by timm's configuration of the model `name`. InputError where timm is absent or does not know
    it, or where it is of another width than the weights."""
    try:
        import timm
    except ImportError:
        raise InputError(f"{source} {listed([name])} needs the package timm: pip install timm") from None
    if not timm.is_model(name):
        near = difflib.get_close_matches(name[:100], timm.list_models(), 3)
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        raise InputError(f"{source}: timm knows no model {listed([name])}{hint}")
    try:
        about = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # no such tag
        raise InputError(f"{source} {listed([name])}: {listed([error])}") from None
    found = Settings()
    if about and about.mean and about.std:
        found = _scaling(about.mean, about.std, f"timm's configuration of {name}", source)
    if width is None:
        return found
    there, heads = _timm_heads(timm, name)
    if there != width:
        raise InputError(f"{source} {name} is {there or 'not a ViT, or not'} wide, the weights are {width}")
    return found._replace(heads=heads)


def _timm_heads(timm, name):
    """(width, heads) of a ViT of timm, built without memory; (None, None) of another model."""
    import torch

    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
        return model.embed_dim, model.blocks[0].attn.num_heads
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None, None


# ---------------------------------------------------------------- in the file, and beside it


def _in_file(around, width):
    """Settings by what stands around the weights in their file: timm's pretrained_cfg, or its name."""
    for key in ("pretrained_cfg", "default_cfg"):
        about = around.get(key)
        if isinstance(about, dict) and {"mean", "std"} <= about.keys():
            return _scaling(about["mean"], about["std"], f"{key} in the file", key)
    for key in ("arch", "architecture"):
        name = around.get(key)
        if isinstance(name, str):
            try:
                return of_timm(name, width, f'"{key}" in the file,')
            except InputError as error:
                return Settings(notes=(f"{error}: not used",))
    return Settings()


def _beside(path, width, depth):
    """Settings by preprocessor_config.json, config.json (Hugging Face, timm) and results.json (a run of
    ours) in the folder of the weights."""
    folder = path.parent
    names = ["config", "preprocessor_config"] + ["results"] * (path.name == "checkpoint.pth")
    files = {name: folder / f"{name}.json" for name in names}
    try:
        there = {name: read_json(file) for name, file in files.items() if file.is_file()}
    except InputError as error:
        raise InputError(f"{error}: mend it, or take it away") from None
    config, prepared, results = (there.get(name, {}) for name in ("config", "preprocessor_config", "results"))
    if other := _of_another_model(config, width, depth):
        files = "config.json"
        if prepared:
            files += " and preprocessor_config.json"
        return Settings(notes=(f"{files} beside the weights not used: {other}",))
    found = Settings()
    if prepared:
        found = _prepared(prepared, folder / "preprocessor_config.json")
    about = config.get("pretrained_cfg")
    if isinstance(about, dict) and {"mean", "std"} <= about.keys():
        source = "pretrained_cfg in config.json"
        found = found.or_else(_scaling(about["mean"], about["std"], source, folder / "config.json"))
    if {"mean", "std"} <= results.keys() and isinstance(results.get("model_config"), dict):
        found = found.or_else(
            _scaling(results["mean"], results["std"], "results.json", folder / "results.json")
        )
        found = found.or_else(_architecture(results["model_config"], "num_heads", "norm_eps"))
        found = found.or_else(Settings(readout=results["model_config"].get("readout")))
    if width is None:
        return found
    name = config.get("architecture")  # as timm writes it
    if isinstance(name, str) and "num_attention_heads" not in config:
        try:
            found = found.or_else(of_timm(name, width, '"architecture" in config.json,'))
        except InputError as error:
            found = found.or_else(Settings(notes=(f"{error}: not used",)))
    return found.or_else(_architecture(config, "num_attention_heads", "layer_norm_eps"))


def _prepared(prepared, path):
    """Settings by Hugging Face's preprocessor_config.json. InputError where its scaling is no mean and std of
    pixels in [0, 1]."""
    factor = prepared.get("rescale_factor", 1 / 255)
    rescaled = prepared.get("do_rescale", True) is True
    if not rescaled or type(factor) not in (int, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-2):
        raise InputError(
            f"{path} does not scale pixels to [0, 1] first (rescale_factor {listed([factor])}): take it away "
            "and give --mean and --std, as shares of white"
        )
    if prepared.get("do_normalize", True) is False:
        return Settings((0.0,) * 3, (1.0,) * 3, "preprocessor_config.json (do_normalize is false)")
    if not {"image_mean", "image_std"} <= prepared.keys():
        return Settings(notes=(f"{path.name} beside the weights has no image_mean and image_std: not used",))
    return _scaling(prepared["image_mean"], prepared["image_std"], "preprocessor_config.json", path)


def _of_another_model(config, width, depth):
    """Why a config.json is that of another model, None if it is not."""
    if width is None and "num_attention_heads" in config:
        return "it is that of a transformer"
    sizes = {"hidden_size": width, "num_features": width, "num_hidden_layers": depth}
    for name, here in sizes.items():
        if here is not None and name in config and config[name] != here:
            return f"its {name} is {listed([config[name]])}, the weights have {here}"
    return None


def _architecture(config, heads, eps):
    """Settings by the heads and the eps that a config holds under these names. InputError for an activation
    or rotations that vit.py does not have."""
    usual = GATED if config.get("use_gated_mlp") is True else ("gelu",)
    activation = config.get("hidden_act", usual[0])
    if activation not in usual:
        raise InputError(f"config.json: hidden_act is {listed([activation])}, such a ViT has {usual[0]} here")
    if config.get("rope_theta", 100) != 100:
        raise InputError(f"config.json: rope_theta is {listed([config['rope_theta']])}, DINOv3 has 100")
    count, small = config.get(heads), config.get(eps)
    if type(count) is not int or not 0 < count <= 256:
        count = None
    if type(small) is not float or not 0 < small < 0.1:
        small = None
    return Settings(heads=count, norm_eps=small)
