"""Time every path of this project against a plain baseline, and against what the machine can do.

    python studies/benchmark.py --data-dir Data/chest_xray

The baseline is what a notebook does: torchvision's ImageFolder and DataLoader (2 workers) decode every file
in every epoch, transforms run image by image, the model is torchvision's ViT in fp32, the optimiser plain
AdamW. Our side and the baseline take turns, --repeats times after one turn that is not counted. The table
shows medians in images a second, their ratio with its least and greatest value, and the peak memory of our
side.

"fraction of peak" is the speed of a training step, its operations counted by formula (`step_flops`), as a
fraction of the machine's own speed of matrix products in the same number format. An "epoch" covers --images
images, with validation and the files it writes, not the whole set. At the end (not with --quick) whole
scripts are timed as a user starts them, and an epoch is shared among more and more processes. The last line
of standard output is the same as JSON.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from common import console
from common.cli import Number, Parser
from common.console import InputError, command_line
from common.device import (
    add_device_argument,
    device_name,
    fast_bf16,
    keep_freed_memory,
    pick_device,
    versions,
)
from data import DEFAULT_DIR
from images.drawn import make_synthetic
from images.subset import Subset
from layouts.folders import find_root
from records.run import Run
from studies.workload import HEAD, RECIPE, Baseline, Ours, enlarge
from training.evaluate import predict
from vit import CONFIGS

LABELS = "supervised"  # the recipe of epochs with labels alone

# ---------------------------------------------------------------- measuring


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def reset_peak(device):
    """Start a new peak: of device memory on CUDA, else of this process's resident memory (Linux only)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what earlier rows freed but the C library kept
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device):
    """Peak since reset_peak, MiB; None where that is not known."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else peak_resident("self")


def peak_resident(process):
    """Peak resident memory of a process, MiB; None where that is not known (Linux only)."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM")), None)


def timed(function, device):
    """Seconds that a call takes."""
    synchronise(device)
    started = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - started


def rounded(mib):
    return "-" if mib is None else f"{mib:.0f}"


def compare(name, count, ours, baseline, args, scale=1.0, warm=None):
    """Time `ours` and `baseline`, functions that handle `count` images, in turn; print and return the row.

    `scale`: how often the baseline's work has to be done for ours to be done once. `warm`: called untimed
    before each turn of ours, because the baseline's turn gives memory back to the system as a notebook's
    process does (see device.keep_freed_memory)."""
    times, device, peak = [], args.device, None
    reset_peak(device)
    for turn in range(args.repeats + 1):
        keep_freed_memory()
        if warm:
            warm()
        first = timed(ours, device)
        peak = peak_mib(device) if turn == 0 else peak
        keep_freed_memory(False)
        second = timed(baseline, device) * scale
        if turn:
            times.append((first, second))
    ratios = [b / a for a, b in times]
    row = {
        "name": name,
        "unit": "images/s",
        "ours": count / statistics.median(a for a, _ in times),
        "baseline": count / statistics.median(b for _, b in times),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "peak_mib": peak,
    }
    speeds = f"{row['ours']:.1f} | {row['baseline']:.1f} | {row['ratio']:.2f}"
    spread = f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}"
    print(f"| {name} | {speeds} | {spread} | {rounded(peak)} |", flush=True)
    return row


def matmul_peak(device, dtype, quick=False, repeats=8):
    """Greatest measured speed of a square matrix product, GFLOP/s."""
    side = 1024 if quick else 8192 if device.type == "cuda" else 4096
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return max(2 * side**3 / timed(lambda: a @ b, device) / 1e9 for _ in range(repeats))


def step_flops(config, img_size):
    """Floating-point operations of one image's training step, matrix products only.

    Forward, per block: 4 N D^2 (query, key, value, projection) + 2 r N D^2 (MLP of ratio r = 4) + 2 N^2 D
    (attention) multiply-adds for N tokens of width D; the patch embedding adds (N - 1) D 3 P^2. Two
    operations each; the backward pass is twice the forward one."""
    D, P = config["embed_dim"], config["patch_size"]
    N = (img_size // P) ** 2 + 1
    forward = config["depth"] * (12 * N * D * D + 2 * N * N * D) + (N - 1) * D * 3 * P * P
    return 3 * 2 * forward


# ---------------------------------------------------------------- rows


def repeat(function, times):
    for _ in range(times):
        function()


def decode_rows(args, small, large):
    """decode_*: every file decoded and resized once; ours builds its cache, the baseline its batches."""
    for name, (plain, ours) in (("decode_small", small), ("decode_original", large)):
        yield compare(name, len(ours.files), partial(ours.load, fresh=True), plain.decode, args)


def step_row(name, args, plain, ours):
    """train_step_*: a batch that lies ready, on one model after the other."""
    batch = min(args.images, 4 if args.quick else RECIPE.batch_size)
    step = ours.stepper(ours.model(name), ours.load(), batch)
    other, optimizer = plain.model(name)
    x, y = torch.randn(batch, 3, args.img_size, args.img_size), torch.arange(batch) % 2
    baseline = partial(plain.step, other.train(), optimizer, x, y)
    times = 1 if name == "b16" and args.device.type == "cpu" else 3
    work = partial(repeat, step, times), partial(repeat, baseline, times)
    return compare(f"train_step_{name}", times * batch, *work, args, warm=step)


def loop_rows(args, small, large):
    """evaluate_scratch, epoch_scratch, epoch_scratch_originals: whole loops, data included."""
    plain, ours = small
    model, subset, (other, optimizer) = ours.model("scratch"), ours.load(), plain.model("scratch")
    evaluate = partial(predict, model, subset, ours.inputs), partial(plain.evaluate, other)
    yield compare("evaluate_scratch", len(subset), *evaluate, args)
    for name, (plain, ours) in (("epoch_scratch", small), ("epoch_scratch_originals", large)):
        subset = ours.load()
        epoch = partial(ours.epoch, model, subset), partial(plain.epoch, other, optimizer)
        yield compare(name, len(subset), *epoch, args)


def frozen_row(args, plain, ours):
    """frozen_stage: the epochs of HEAD on the frozen Ti/16, whose features are computed once; the baseline's
    time is that of one such epoch times their number."""
    (other, _), subset = plain.model("ti16"), ours.load()
    other.requires_grad_(False)
    other.heads.requires_grad_(True)
    optimizer = torch.optim.AdamW(other.heads.parameters(), lr=HEAD.lr)
    stage = partial(ours.head, ours.model("ti16"), subset), partial(plain.frozen_epoch, other, optimizer)
    return compare("frozen_stage", len(subset) * HEAD.epochs, *stage, args, scale=HEAD.epochs)


def first_costs(args, small, large):
    """(what, seconds, images) without a baseline: building the caches, and from there to the end of the first
    step."""
    for name, (_, ours) in (("224 px files", small), ("originals", large)):
        seconds = timed(partial(ours.load, fresh=True), args.device)
        yield f"first epoch's extra cost without a cache, {name}", seconds, len(ours.files)
    _, ours = small

    def start():
        subset = ours.load()
        ours.stepper(ours.model("scratch"), subset, min(RECIPE.batch_size, len(subset)))()

    name = "start to the end of the first step, cache there, imports done"
    yield name, timed(start, args.device), len(ours.files)


def growth(args, ours, speed):
    """Markdown: how a scratch epoch of the whole set grows with the side of the images. Measured: one step;
    by formula: images * step_flops / `speed` (operations a second at --img-size), which is also how it grows
    with their number."""
    lines = [
        "\n| side, px | GFLOP an image | images/s | minutes for 15 epochs of 4,172 images | by formula |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    batch, many = 4 if args.quick else RECIPE.batch_size, 15 * 4172
    for size in sorted({args.img_size // 32 * 16, args.img_size, args.img_size // 16 * 27 // 16 * 16}):
        images = np.random.default_rng(0).integers(0, 256, (batch, size, size), dtype=np.uint8)
        subset = Subset([""] * batch, np.arange(batch) % 2, images, np.arange(batch))
        step = ours.stepper(ours.model("scratch", size), subset, batch)
        times = [timed(step, args.device) for _ in range(args.repeats + 1)]
        flops, measured = step_flops(CONFIGS["scratch"], size), batch / statistics.median(times[1:])
        minutes = f"{many / measured / 60:.1f} | {many * flops / speed / 60:.1f}"
        lines.append(f"| {size} | {flops / 1e9:.2f} | {measured:.0f} | {minutes} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- whole scripts, as a user starts them


def start_script(*argv, threads=None, **flags):
    """Run Python with `argv` and `flags` in this folder, quietly: (seconds, peak resident memory in MiB or
    None where unknown). `threads`: for matrix products. InputError if the script fails."""
    for name, value in flags.items():
        argv += (f"--{name.replace('_', '-')}", value)
    env = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    command = [sys.executable, *map(str, argv)]
    started, peak = time.perf_counter(), None
    with tempfile.TemporaryFile("w+") as errors:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": errors}
        process = subprocess.Popen(command, env=env, cwd=Path(__file__).resolve().parents[1], **quiet)
        while process.poll() is None:
            peak = peak_resident(process.pid) or peak
            time.sleep(0.02)
        if process.returncode:
            errors.seek(0)
            raise InputError(f"{' '.join(map(str, argv))} failed: {errors.read()[-500:]}")
    return time.perf_counter() - started, peak


def script_rows(args, root, work):
    """(what, seconds, MiB) of calibrate.py and predict.py on the whole set, and of a short scratch training
    alone."""
    run, device = work / "runs/scratch", args.device
    flags = {"data_dir": root.resolve(), "cache_dir": work / "cache", "img_size": args.img_size, "out": run}
    name, flags["device"], flags["recipe"] = "train_scratch.py, 20 steps and a validation", device, LABELS
    yield name, *start_script("train_scratch.py", epochs=1, max_steps=20, **flags)
    imports, _ = start_script("-c", "import calibrate")
    for name in ("calibrate.py", "calibrate.py again, scores kept"):
        name = f"{name} (imports: {imports:.1f} s of it)"
        yield name, *start_script("calibrate.py", run=run, device=device)
    test = (root / "test").resolve()
    yield "predict.py on the test folder", *start_script("predict.py", test, run=run, device=device)


def process_growth(args, work):
    """Markdown: an epoch of the scratch model on drawn images under torchrun, shared among more and more
    processes; on CPUs the cores are shared out too. By formula: n processes are n times as fast on n GPUs, no
    faster on a CPU."""
    cuda, kind = args.device.type == "cuda", args.device.type
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    make_synthetic(work / "drawn", train=args.images, test=8)
    flags = {"data_dir": work / "drawn", "cache_dir": work / "cache", "img_size": args.img_size, "epochs": 2}
    flags |= {"recipe": LABELS}
    lines = ["\n| processes | threads each | images/s | by formula |", "| ---: | ---: | ---: | ---: |"]
    alone = None
    for n in (1, 2, 4, 8):
        if n > (torch.cuda.device_count() if cuda else cores):
            break
        out, threads = work / f"processes{n}", max(1, cores // n)
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n)
        start_script(*torchrun, "train_scratch.py", threads=threads, device=kind, out=out, **flags)
        results = Run(out).results
        speed = results["split"]["train"] / results["history"][-1]["seconds"]
        alone = alone or speed
        lines.append(f"| {n} | {threads} | {speed:.0f} | {alone * (n if cuda else 1):.0f} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- the command


def parse():
    """The command line; `device` and `amp` are decided here."""
    parser = Parser(__doc__)
    parser.add_argument("--data-dir", default=DEFAULT_DIR, help="folder with train/ and test/")
    parser.add_argument(
        "--originals",
        default=None,
        metavar="DIR",
        help="folder with one folder of full-size images a class (default: images of --data-dir, enlarged)",
    )
    add_device_argument(parser)
    parser.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="bf16 on our side (default: where the device does it fast)",
    )
    for name, default, least, most, text in (
        ("--images", 512, 4, 2**20, "images of an epoch and of an evaluation"),
        ("--img-size", 224, 16, 2048, "side of the square input, px, a multiple of 16"),
        ("--repeats", 3, 1, 1000, "measured turns"),
        ("--workers", 2, 0, 256, "the baseline's DataLoader workers"),
    ):
        kind = Number(int, least, most)
        parser.add_argument(name, type=kind, default=default, metavar="N", help=text)
    quick = "64 images, 1 turn, steps of 4 images, small matrix products: a first look"
    parser.add_argument("--quick", action="store_true", help=quick)
    args = parser.parse_args()
    if args.img_size % 16:
        raise InputError(f"--img-size must be divisible by 16, got {args.img_size}")
    if args.originals and not Path(args.originals).is_dir():
        raise InputError(f"--originals {args.originals} is no folder")
    if args.quick:
        args.images, args.repeats = min(args.images, 64), 1
    args.device = pick_device(args.device)
    args.amp = fast_bf16(args.device) if args.amp is None else args.amp
    return args


def measure(args, root, work):
    """Measure and print everything -> what goes into the JSON."""
    pairs = []
    originals = args.originals or enlarge(root / "train", work / "large", 8 if args.quick else 64)
    for folder, place in ((root / "train", "small"), (Path(originals), "large")):
        plain = Baseline(folder, args)
        pairs.append((plain, Ours(folder, plain.rows, args, work / place)))
    small, form = pairs[0], "bf16" if args.amp else "fp32"
    peak = matmul_peak(args.device, torch.bfloat16 if args.amp else torch.float32, args.quick)
    print(
        f"{device_name(args.device)}, torch {torch.__version__}, {form}; "
        f"matrix products reach {peak:.0f} GFLOP/s\n\n"
        "| | ours, images/s | baseline, images/s | ratio | least to greatest | our peak memory, MiB |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        flush=True,
    )
    rows = list(decode_rows(args, *pairs))
    fractions = {}
    for name in ("scratch", "ti16", "b16"):
        rows.append(step_row(name, args, *small))
        flops = step_flops(CONFIGS[name], args.img_size)
        fractions[f"train_step_{name}"] = rows[-1]["ours"] * flops / peak / 1e9
    rows += [*loop_rows(args, *pairs), frozen_row(args, *small)]
    print("\nfraction of peak: " + ", ".join(f"{k} {v:.2f}" for k, v in fractions.items()))
    more = {}
    for name, seconds, count in first_costs(args, *pairs):
        more[name] = seconds
        print(f"{name}: {seconds:.2f} s ({count} images)", flush=True)
    print(growth(args, small[1], fractions["train_step_scratch"] * peak * 1e9), flush=True)
    if not args.quick:
        print("\n| script, from start to end | seconds | peak memory, MiB |\n| --- | ---: | ---: |")
        for name, seconds, memory in script_rows(args, root, work):
            more[name] = seconds
            print(f"| {name} | {seconds:.1f} | {rounded(memory)} |", flush=True)
        print(process_growth(args, work))
    return {"matmul_peak_gflops": peak, "rows": rows, "fraction_of_peak": fractions, "more_seconds": more}


def main():
    args = parse()
    root = find_root(args.data_dir)
    with tempfile.TemporaryDirectory() as work:
        measured = measure(args, root, Path(work))
    about = {
        "device": device_name(args.device),
        "dtype": "bf16" if args.amp else "fp32",
        **measured,
        "images": args.images,
        "img_size": args.img_size,
        "repeats": args.repeats,
        "versions": versions(),
        "command": command_line(),
    }
    print(json.dumps(about))


if __name__ == "__main__":
    console.start(main)
