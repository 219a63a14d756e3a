"""One reader of torch state dicts, for ViTs and CNNs: what trainers wrap around the weights is taken off, and
said. Nothing is unpickled (common/safe_files.py)."""

from pathlib import Path
from typing import NamedTuple

import torch

from common.console import InputError
from common.safe_files import Refused, listed, load_safetensors, load_tensors

WRAPPERS = ("state_dict", "model_state_dict", "model", "teacher", "student")
PREFIXES = (
    *("module.", "_orig_mod.", "model.", "encoder.", "backbone.", "vit."),
    *("deit.", "dinov2.", "dinov2_with_registers.", "densenet121.", "densenet169.", "net.", "body."),
)
NESTED = 8  # wrappers in wrappers, or prefixes before prefixes


class Held(NamedTuple):
    """What a file holds: `state` {name: tensor}; `notes`, a line on each thing that was taken off;
    `wrappers`, the keys under which the weights were; `around`, text and dicts beside them, such as {"arch":
    "resnet50"}."""

    state: dict
    notes: list
    wrappers: tuple = ()
    around: dict = {}


def read_state_dict(path, roots):
    """A .pth, .pt, .bin (torch.save) or .safetensors file -> Held.

    `roots`: names that the outermost layers of a model have; prefixes are taken off until one of them is
    there. The tensors may be views of the file, so they must not be changed. InputError as of load_tensors
    and load_safetensors, where no weights are found, and where two names become one.
    """
    if str(path).endswith(".safetensors"):
        held = load_safetensors(path, copy=False)
    else:
        try:
            held = load_tensors(path, copy=False)
        except Refused as error:
            raise InputError(f"{error}{_how_to_save(path, error)}") from None
    if {"model", "optimizer", "state", "rng"} <= held.keys():
        raise InputError(
            f"{path} is for --resume and holds the weights of the last step: take checkpoint.pth of that run"
        )
    inside = _unwrapped(held, path)
    state, taken_off = _without_prefixes(inside.state, roots, path)
    return inside._replace(state=state, notes=inside.notes + taken_off)


def _how_to_save(path, refused):
    """How to save the weights of a refused file by themselves: three lines of Python, "" where these are no
    help."""
    if refused.name.startswith("torch.") or not f"{refused.name}{path}".isprintable():
        return ""
    weights = "held.state_dict()"  # of a whole model
    if refused.first in ("dict", "collections OrderedDict"):
        weights = f"next((held[key] for key in {WRAPPERS} if key in held), held)"
    new = f"{Path(path).with_suffix('')}-weights.pth"
    return (
        ". If you trust its source, save the weights by themselves and name the new file:\n"
        "  import torch\n"
        f"  held = torch.load({str(path)!r}, map_location='cpu', weights_only=False)  # runs its code\n"
        f"  torch.save({weights}, {new!r})"
    )


def renamed(state, ours_of, refusal):
    """`state` under the names that ours_of(name) gives, None for a name that is unknown. InputError that
    begins with `refusal` for those, and for two names that become one."""
    out, unknown = {}, []
    for name, value in state.items():
        ours = ours_of(name)
        if ours is None or ours in out:
            unknown.append(name)
        out[ours] = value
    if unknown:
        raise InputError(f"{refusal}: [{listed(unknown)}]")
    return out


def _unwrapped(held, path):
    """Held, with the innermost dict of weights. InputError where it is not clear which that is."""
    notes, wrappers, around = [], (), {}
    for _ in range(NESTED):
        key = _wrapper(held)
        if key is None:
            break
        others = [name for name in held if name != key]
        note = f'"{listed([key])}" of the file is read'
        if others:
            note += f", not {listed(others)}"
        notes.append(note)
        wrappers += (key,)
        around |= {name: held[name] for name in others if isinstance(held[name], (str, dict))}
        held = held[key]
    dicts = [name for name, value in held.items() if isinstance(value, dict)]
    if dicts and not any(isinstance(value, torch.Tensor) for value in held.values()):
        raise InputError(
            f"{path} holds several dicts, and none of them is called {', '.join(WRAPPERS)}: it has "
            f"[{listed(dicts)}]. Save the one with the weights by itself, with torch.save"
        )
    return Held(held, notes, wrappers, around)


def _wrapper(held):
    """The key of the dict in `held` that the weights are in, None if they are not in one."""
    dicts = [name for name, value in held.items() if isinstance(value, dict) and value]
    known = [name for name in WRAPPERS if name in dicts]
    if known:
        return known[0]
    has_tensors = any(isinstance(value, torch.Tensor) for value in held.values())
    if len(dicts) == 1 and not has_tensors:
        return dicts[0]
    empty = [name for name in WRAPPERS if held.get(name) == {}]
    return empty[0] if empty else None


def _without_prefixes(state, roots, path):
    """(state with the common prefixes taken off, notes); as it was where that leads to no known model."""
    if not all(isinstance(name, str) for name in state):
        return state, []
    stripped, notes = state, []
    for _ in range(NESTED):
        if any(name in stripped for name in roots):
            return stripped, notes
        counts = {prefix: sum(name.startswith(prefix) for name in stripped) for prefix in PREFIXES}
        prefix = max(counts, key=counts.get)
        if not counts[prefix]:
            break
        notes.append(f'"{prefix}" is taken off {counts[prefix]} of {len(stripped)} names')
        stripped = _renamed(stripped, prefix, path)
    return state, []


def _renamed(state, prefix, path):
    """`state` without the prefix. InputError where a name is then there twice, as in a masked autoencoder."""
    if {"mask_token", "encoder.pos_embed"} <= set(state):
        raise InputError(
            f"{path} holds a masked autoencoder, as pretrain_mae.py trains it: its encoder is read by "
            "train_scratch.py --init RUN"
        )
    out = {}
    for name, value in state.items():
        short = name.removeprefix(prefix)
        if short in out:
            raise InputError(
                f"{path} has {listed([short])} twice, with and without {prefix!r}: two models in one file? "
                "Save the weights of one by themselves, with torch.save"
            )
        out[short] = value
    return out
