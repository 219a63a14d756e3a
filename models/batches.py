"""One grey uint8 array -> batches on the device, as a model is shown them."""

import mmap
from typing import NamedTuple

import torch

from images.split import image_weights


class Batch(NamedTuple):
    """x: what the model is shown, float32 [B, 1 or 2, S, S] (lungs.show); target: int64 [B] or int8 [B, K];
    weight: float32 [B] (split.image_weights); all on the device."""

    x: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor


class Batches:
    """Batches of a Subset on the device of `inputs`.

    On CUDA the whole uint8 array is kept on the device if it takes less than half the free memory; otherwise
    rows are gathered from the memory map, whose pages are let go again every 4 batches: resident memory does
    not grow with the number of images (the system's file cache still holds them).
    """

    def __init__(self, subset, inputs, balance="none"):
        self.subset, self.inputs = subset, inputs
        self.targets = torch.from_numpy(subset.targets).to(inputs.device)
        weights = image_weights(subset.targets, subset.sources, balance)
        self.weights = torch.from_numpy(weights).to(inputs.device)
        self.resident, self.taken = None, 0
        size = len(subset) * subset.images[0].nbytes
        if inputs.device.type == "cuda" and size < torch.cuda.mem_get_info(inputs.device)[0] / 2:
            self.resident = torch.from_numpy(subset.pixels()).to(inputs.device)

    def get(self, index):
        """Positions `index` (int64 tensor [B] on the CPU) -> Batch."""
        on_device, masks = index.to(self.inputs.device), None
        if self.inputs.needs_lungs:
            masks = self.subset.lungs(index.numpy())
        if self.resident is not None:
            pixels = self.resident[on_device]
        else:
            pixels = self._gathered(index)
        grey = self.inputs.grey(pixels, masks)
        return Batch(grey, self.targets[on_device], self.weights[on_device])

    def _gathered(self, index):
        """The pixels of these positions from the memory map, in memory."""
        pixels = self.subset.images[self.subset.rows[index.numpy()]]
        self.taken += 1
        if self.taken % 4 == 0:  # `pixels` is a copy, so the pages are not needed any more
            self._let_pages_go()
        return pixels

    def _let_pages_go(self):
        """Tell the system that the pages of the memory maps which were read are not needed any more."""
        for array in getattr(self.subset.images, "arrays", [self.subset.images]):
            file = getattr(array, "_mmap", None)
            if file is not None and hasattr(mmap, "MADV_DONTNEED"):
                file.madvise(mmap.MADV_DONTNEED)
