"""Lung masks of a set of images: where they come from, and their cache.

A source of masks is one of
    lung_unet.safetensors   weights of train_lungs.py; the project's own lie beside this file
    heuristic               lungs.heuristic_mask, which needs no training
    FILE.npz                masks made before, of images squashed to squares: uint8 `masks` [N, S, S/8]
                            (packed bits), `names` and perhaps bool `confident` [N]; for training and studies,
                            as new images are not in it
Masks are kept beside the decoded images, one bit a pixel.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.console import InputError, advice, progress, say
from common.files import atomic_path, check_regular, sha256
from common.safe_files import load_arrays
from images.cache import allocate, seal, valid_cache
from lungs.show import already_cut, heuristic_mask, plausible
from lungs.unet import load_net

SHIPPED = "lung_unet.safetensors"
HEURISTIC = "heuristic"
VERSION = 2  # raise it when masks change, so that cached ones are made again


def find_source(source):
    """ "heuristic", or the path of a file: as given, else beside this module. InputError if there is none."""
    if source == HEURISTIC:
        return source
    paths = [Path(source), Path(__file__).parent / source]
    path = next((p for p in paths if p.exists()), None)
    if path is None:
        raise InputError(f"lung masks {source}: there is no such file" + _other_source())
    check_regular(path)
    if path.suffix not in (".safetensors", ".npz"):
        raise InputError(f"lung masks {source}: neither {HEURISTIC!r} nor a .safetensors nor a .npz file")
    return path


def _other_source():
    """What to do without a source of masks: training can take another, a trained run cannot."""
    return advice("--lungs", f"; name one with --lungs, or {HEURISTIC!r}") or ": put it back"


def holds_masks(source):
    """Whether a source holds the masks of certain images, and cannot find lungs on others."""
    return str(source).endswith(".npz")


def fingerprint(source):
    """SHA-256 of all that decides the masks of a source."""
    found = find_source(source)
    return sha256([VERSION, found if found == HEURISTIC else sha256(found)])


def check_source(source, expected):
    """InputError unless a source is that with the fingerprint `expected`."""
    if fingerprint(source) != expected:
        raise InputError(
            f"the lung masks of {source} are not those the run was trained with (another file, or another "
            "version): put that file back, or train again"
        )


class Finder:
    """Finds the lungs on any image, by a source that can: the U-Net or the heuristic.

    InputError if the source is a file of given masks."""

    def __init__(self, source, device="cpu"):
        found = find_source(source)
        if holds_masks(source):
            raise InputError(
                f"{source} holds the masks of certain images, not a way to find lungs on others: train with "
                f"--lungs {SHIPPED} for that"
            )
        self.device = torch.device(device)
        if self.device.type == "mps":  # no antialiasing there
            self.device = torch.device("cpu")
        self.net = None if found == HEURISTIC else load_net(found).to(self.device)

    @torch.inference_mode()
    def __call__(self, pixels):
        """uint8 [B, S, S] -> bool [B, S, S], True on the lungs; a numpy array."""
        if self.net is None:
            masks = np.stack([heuristic_mask(image) for image in pixels])
        else:
            grey = torch.from_numpy(np.array(pixels)).to(self.device).unsqueeze(1).float() / 255
            masks = self.net.masks(grey)[:, 0].bool().cpu().numpy()
        for i, image in enumerate(pixels):
            cut = already_cut(image)
            if cut is not None:
                masks[i] = cut
        return masks


def pack(masks):
    """bool [B, S, S] -> uint8 [B, S, ceil(S / 8)], a bit a pixel."""
    return np.packbits(masks, axis=-1)


def unpack(packed):
    """uint8 [B, S, ceil(S / 8)] -> bool [B, S, S]."""
    return np.unpackbits(packed, axis=-1, count=packed.shape[-2]).view(bool)


def load_masks(source, found, files, what, expected, fate="these are shown as they are"):
    """The packed masks of images, memory-mapped read-only: uint8 [N, S, ceil(S / 8)], a row for each row of
    found.images (images.Decoded); those that could not be read stay empty.

    Kept beside the images; a cache that belongs to other images or another source is made again. Says how
    many images have no plausible lungs; `what` ("train images in DIR") is for messages. InputError if the
    source is not that with the fingerprint `expected`. `fate` says what becomes of images without lungs."""
    check_source(source, expected)
    path = found.path.with_name(f"{found.path.stem}-{sha256(str(source))[:8]}.lungs.npy")
    key = sha256([expected, found.crc32, files])
    info = valid_cache(path, key, verify=False)
    if info is None:
        info = _make(path, key, source, found, files, f"lung masks of {what}")
    masks = np.load(path, mmap_mode="r", allow_pickle=False)
    missing = len(found.rows) - info["plausible"]
    if missing:
        lacking = f"{source} has no certain mask for" if holds_masks(source) else "no lungs found on"
        say(f"note: {lacking} {missing} of {len(found.rows)} {what}; {fate}")
    return masks


def _make(path, key, source, found, files, title):
    """Find the lungs on every readable image and write the cache; returns its side file's content."""
    side, rows, count = found.images.shape[-1], found.rows, 0
    masks_of = open_source(source, side, [files[r] for r in rows], title)
    with atomic_path(path) as tmp:
        array = allocate(tmp, (len(found.images), side, (side + 7) // 8))
        parts = [rows[begin : begin + 64] for begin in range(0, len(rows), 64)]
        for some in progress(parts, len(rows), title, "images", size=len):
            masks = masks_of(found.images[some], [files[r] for r in some])
            array[some] = pack(masks)
            count += int(plausible(masks).sum())
        array.flush()
        del array
    return seal(path, {"key": key, "plausible": count})


def of_images(config, decoded, files, title):
    """The packed masks of Decoded images, as a DataConfig asks for them: see load_masks. `title`: what images
    these are. InputError where masks from a file do not fit how the images are resized."""
    check_resize(config.lungs, config.resize)
    fate = "these are left out" if config.input == "pair" else "these are shown as they are"
    if config.reads_lungs:
        fate += ", cut in the middle where left and right are read apart"
    return load_masks(config.lungs, decoded, files, title, config.lungs_sha256, fate)


def finder_of(config, device="cpu"):
    """The Finder that a run's DataConfig asks for; None where no masks are needed."""
    if not config.needs_lungs:
        return None
    check_source(config.lungs, config.lungs_sha256)
    return Finder(config.lungs, device)


def not_found(config):
    """What happens to an image without plausible lungs in a run with this DataConfig, as text."""
    text = "no lungs found: the whole image was used"
    if config.reads_lungs:
        text += ", cut in the middle where left and right are read apart"
    return text


def check_resize(source, resize):
    """InputError where masks from a file do not fit how the images are resized."""
    if holds_masks(source) and resize != "squash":
        raise InputError(f"--lungs {source}: masks from a file go with --resize squash only")


def open_source(source, side, files=(), what="", resize="squash"):
    """A source as a function (images uint8 [B, side, side], their names) -> masks bool [B, side, side].

    InputError if it holds masks, and none of `files`, which `what` names, or if the images were resized in
    another way than by squashing: masks in a file are of whole images."""
    if holds_masks(source):
        check_resize(source, resize)
        given = GivenMasks(source, side)
        given.check(files, what)
        return lambda pixels, files: given.of(files)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    finder = Finder(source, device)
    return lambda pixels, files: finder(pixels)


class GivenMasks:
    """Masks from a .npz file by the names of images, at any side S. InputError if the file is not one."""

    def __init__(self, path, side):
        arrays = load_arrays(find_source(path))
        try:
            masks, names = arrays["masks"], arrays["names"]
            sure = arrays.get("confident", np.ones(len(names), bool))
            good = masks.dtype == np.uint8 and masks.ndim == 3 and len(masks) == len(names) == len(sure)
        except (KeyError, TypeError):
            good = False
        if not good or masks.shape[2] != (masks.shape[1] + 7) // 8:
            raise InputError(f"{path} needs uint8 masks [N, S, S/8] (numpy.packbits) and as many names")
        self.path, self.names, self.masks, self.side = path, [str(name) for name in names], masks, side
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise InputError(f"{path} holds two masks of {twice}: leave one of them")
        self.row = {name: i for i, name in enumerate(self.names) if sure[i]}

    def check(self, files, what):
        """InputError if not one of these files is named; `what` says which they are."""
        if len(files) and not set(files).intersection(self.names):
            example = f", as {self.names[0]}" if self.names else ""
            raise InputError(
                f"{what}: {self.path} names none of them{example}; it must name images relative to "
                f"--data-dir, as {files[0]}"
            )

    def of(self, files):
        """bool [B, S, S] of these files; all False for those without a certain mask."""
        out = np.zeros((len(files), self.side, self.side), bool)
        for i, file in enumerate(files):
            if file in self.row:
                mask = torch.from_numpy(unpack(self.masks[self.row[file]][None])).float()[:, None]
                out[i] = F.interpolate(mask, (self.side, self.side), mode="area")[0, 0].numpy() > 0.5
        return out
