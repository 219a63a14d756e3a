"""Where the numbers are computed: device, precision, randomness, and several processes under torchrun."""

import ctypes
import os
import platform
import random
import re
import signal
import sys
import warnings
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common.console import InputError, Interrupted, say

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h
HELP = "auto (cuda > mps > cpu), cuda, cuda:1, mps, cpu"
WAIT = timedelta(hours=12)  # for another process: one decodes the images of a large set while the others wait


def add_device_argument(parser):
    """--device, the same in every script."""
    parser.add_argument("--device", default="auto", help=f"where to compute: {HELP}")


def _best_device():
    """The name of the fastest device that is there."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def pick_device(name="auto"):
    """ "auto" -> cuda, else mps, else cpu; or the named device. InputError if it is not there.

    Under torchrun each process takes its own CUDA device, or the CPU. On a CPU, see keep_freed_memory."""
    if name == "auto":
        name = _best_device()
    if not re.fullmatch(r"cuda(:\d{1,3})?|mps|cpu", name):
        raise InputError(f"--device {name} is not one of {HELP}")
    if processes()[1] > 1:
        if name == "cuda":
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        elif name == "mps":  # gloo, which joins the processes, has no mps
            name = "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory(keep=True):
    """Have glibc keep the memory that tensors free for the next ones (nothing happens where there is no
    glibc).

    Otherwise it hands large blocks back to the system, which has to clear every page anew: 250,000 page
    faults, a fifth of the time, in each ViT-B/16 step of 16 images. The peak is the same. `keep` False: what
    a long-running process has by itself."""
    if sys.platform != "linux":
        return
    options = {M_MMAP_MAX: 65536, M_TRIM_THRESHOLD: 64 << 20}
    if keep:  # no block is mapped by itself, and the heap is never trimmed
        options = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
    options[M_MMAP_THRESHOLD] = 32 << 20
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in options.items():
            mallopt(option, value)


# ---------------------------------------------------------------- precision


def fast_bf16(device):
    """Whether bf16 autocast pays here: CUDA with bf16 units; CPUs with AVX512-BF16 or AMX; not mps."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or sys.platform != "linux":
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def can_bf16(device):
    """Whether bf16 autocast works here, fast or not. CPUs emulate it; a GPU or mps may refuse."""
    try:
        with warnings.catch_warnings(), torch.autocast(device.type, dtype=torch.bfloat16):
            warnings.simplefilter("ignore")
            x = torch.ones(2, 2, device=device)
            return (x @ x).dtype == torch.bfloat16
    except (RuntimeError, ValueError):
        return False


def autocast(device, amp):
    """The autocast context of training and prediction: bf16 if `amp`, else nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bool(amp))


# ---------------------------------------------------------------- randomness, description


def seed_everything(seed, deterministic=False):
    """Seed Python, NumPy and torch on all devices; `deterministic` also demands deterministic kernels."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def device_name(device):
    """A readable name of the device, for results.json."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({threads} {'thread' if threads == 1 else 'threads'}, {platform.machine()})"


def versions():
    """Versions of what decides a number."""
    import sklearn

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
    }


# ---------------------------------------------------------------- several processes (torchrun)


def processes():
    """(rank, number) of this process: (0, 1) unless torchrun started it."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def join_processes(device):
    """Under torchrun: join the others, over nccl on GPUs and gloo on CPUs. Only the first one prints and
    writes."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    backend = "gloo"
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl"
    dist.init_process_group(backend, timeout=WAIT)
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")


@contextmanager
def first_process_first():
    """The block runs in the first process, then in the others: what it writes is there when they come.

    If it fails in the first process, the others must not wait for the time limit: they fail too."""
    rank, number = processes()
    if number == 1:
        yield
        return
    # The others wait here until the first one is through, and then go the same way.
    if rank:
        if not _first_succeeded(None):
            raise InputError("the first process failed: see its message")
        yield
        return
    ok = False
    try:
        yield
        ok = True
    finally:
        _first_succeeded(ok)


def _first_succeeded(ok):
    """Broadcast the first process's outcome to all; returns it."""
    box = [ok]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value):
    """A picklable value of every process -> their list, in every process."""
    parts = [None] * processes()[1]
    if len(parts) == 1:
        return [value]
    dist.all_gather_object(parts, value)
    return parts


@contextmanager
def stop_requests():
    """Within the block Ctrl-C and SIGTERM only leave their number in the yielded list, so that a step can end
    and state be saved; a second one acts at once. Outside the main thread: nothing is caught."""
    received, old = [], {}

    def handler(signum, frame):
        if received:
            raise Interrupted("interrupted twice: state since the last epoch is lost", signum)
        received.append(signum)
        say("stopping after this step ...")

    try:
        for s in (signal.SIGINT, signal.SIGTERM):
            old[s] = signal.signal(s, handler)
    except ValueError:  # not the main thread
        pass
    try:
        yield received
    finally:
        for s, h in old.items():
            signal.signal(s, h)
