"""From a checkpoint to the model that results.json describes, and tensors to a file. Needs torch."""

import shutil

import torch

from common.console import InputError
from common.files import atomic_path
from common.safe_files import check_state_dict, load_tensors
from loading.vits import differences
from models.build import build_model


def model_of(results, path, checkpoint):
    """The model of a results.json (`results`, read from `path`) with the weights of `checkpoint`, in eval
    mode on the CPU.

    Sizes in results.json are checked against the shapes in the checkpoint before anything is allocated.
    InputError where the two do not belong together, or weights are not finite."""
    weights = load_tensors(checkpoint)
    check_state_dict(weights, checkpoint)
    config = results["model_config"]
    try:
        with torch.device("meta"):
            expected = build_model(config).state_dict()
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise InputError(f"{path} does not describe a model: {error}") from None
    if differ := differences(weights, expected):
        raise InputError(f"{checkpoint} does not fit the model in results.json: {differ}")
    bad = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if bad:
        raise InputError(f"{checkpoint} holds NaN or infinite weights in {', '.join(bad[:3])}: train again")

    model = build_model(config)
    if len(results["mean"]) != model.in_chans:
        raise InputError(f"{path} is damaged: mean does not fit the model's input")
    if getattr(model, "reads_lungs", False) != results["data"].get("reads_lungs", False):
        raise InputError(f"{path} is damaged: reads_lungs does not fit the model's input")
    model.load_state_dict(weights)
    return model.eval()


def save_tensors(path, value):
    """Write tensors and plain Python values, atomically."""
    with atomic_path(path) as tmp:
        try:
            torch.save(value, tmp)
        except RuntimeError as error:  # how torch reports a full disk
            free = shutil.disk_usage(path.parent).free / 1e6
            text = f"{str(error).splitlines()[0]} ({free:.0f} MB are free there: is the disk full?)"
            raise OSError(None, text, str(path)) from None
