"""How busy the machine is while a model is trained: processor, memory, GPU."""

import threading

from common.console import say

SECONDS = 5  # between two measurements of MLflow and Weights & Biases
GPU_SECONDS = 1  # between two of ours
GB = 1e9


def measured(tracker, begin):
    """What `begin` returns; None, with a note, where it needs a package that is not there."""
    import torch

    try:
        meter = begin()
    except ImportError as error:
        say(
            f"note: --track {tracker}: use of processor, memory and GPU is not measured: pip install "
            f"{error.name or 'psutil'}"
        )
        return None
    if torch.cuda.is_initialized():
        try:
            import pynvml  # noqa: F401
        except ImportError:
            say(f"note: --track {tracker}: use of the GPU is not measured: pip install nvidia-ml-py")
    return meter


class Usage:
    """Use since it was last asked. ImportError without psutil."""

    def __init__(self):
        import psutil

        self.psutil = psutil
        psutil.cpu_percent()  # the mean that it returns is since the last call; the first one returns 0
        self.gpu, self.over = [], threading.Event()
        threading.Thread(target=self._watch_gpu, daemon=True).start()

    def _watch_gpu(self):
        """Measure the GPU now and then: NVIDIA's driver knows no mean since the last call."""
        import torch

        while torch.cuda.is_initialized() and not self.over.wait(GPU_SECONDS):
            try:
                self.gpu.append(torch.cuda.utilization())
            except Exception:  # without nvidia-ml-py, see `measured`; or the driver tells nothing
                return

    def figures(self):
        """{name: float}: the processor (mean since the last call) and memory of the machine in percent,
        memory of this process in GB, and the GPU's where one is used."""
        import torch

        figures = {
            "system/cpu_percent": self.psutil.cpu_percent(),
            "system/memory_percent": self.psutil.virtual_memory().percent,
            "system/process_memory_gb": self.psutil.Process().memory_info().rss / GB,
        }
        if torch.cuda.is_initialized():
            free, total = torch.cuda.mem_get_info()
            figures["system/gpu_memory_gb"] = (total - free) / GB
        percents, self.gpu = self.gpu, []
        if percents:
            figures["system/gpu_percent"] = sum(percents) / len(percents)
        return figures

    def stop(self):
        """Measure no more."""
        self.over.set()
