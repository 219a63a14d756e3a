"""Time every path of this project against a plain baseline, and against what the machine can do, on your own machine.

    python benchmark.py --data-dir Data/chest_xray

The baseline is what a notebook does: torchvision's ImageFolder and DataLoader (2 workers) decoding every file in every
epoch, transforms image by image, torchvision's ViT, fp32, AdamW as it comes. Ours and the baseline take turns (--repeats
times, after one unmeasured turn); the table shows medians in images a second, the ratio with its least and greatest value,
and the peak memory of our side. `fraction of peak` is the share of the machine's own matrix-multiply speed in the same
number format that a training step reaches, its operations counted by formula (`step_flops`). An "epoch" is one over
--images images with its validation and files, not the whole set. Last come whole scripts as a user starts them (not with
--quick), and one epoch shared among more and more processes. The last line of stdout is the same as JSON.
"""

import argparse
import contextlib
import ctypes
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import VisionTransformer as PlainViT

import common
import data
import engine
from vit import CONFIGS, build_vit

BATCH, MEAN = 32, (0.5,) * 3
FROZEN_EPOCHS = 30


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
    synchronise(device)
    started = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - started


def compare(name, count, ours, baseline, device, repeats, scale=1.0, warm=None):
    """A row: `ours` and `baseline` (functions that handle `count` images) in turn. `scale`: how often the baseline's
    work has to be done for ours to be done once. `warm`: done, untimed, before each turn of ours, because the baseline's
    turn gives memory back to the system, as a notebook's process does (see engine.keep_freed_memory)."""
    times = []
    reset_peak(device)
    for turn in range(repeats + 1):
        engine.keep_freed_memory()
        if warm:
            warm()
        first = timed(ours, device)
        peak = peak if turn else peak_mib(device)
        engine.keep_freed_memory(False)
        second = timed(baseline, device) * scale
        if turn or repeats == 0:
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
    memory = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    print(
        f"| {name} | {row['ours']:.1f} | {row['baseline']:.1f} | {row['ratio']:.2f} | {row['ratio_min']:.2f} to "
        f"{row['ratio_max']:.2f} | {memory} |",
        flush=True,
    )
    return row


def matmul_peak(device, dtype, side=4096, repeats=8):
    """Greatest measured speed of a square matrix product, GFLOP/s."""
    side = side * 2 if device.type == "cuda" else side
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return max(2 * side**3 / timed(lambda: a @ b, device) / 1e9 for _ in range(repeats))


def step_flops(config, img_size):
    """Floating-point operations of one image's training step, matrix products only.

    Forward, per block: 4 N D^2 (query, key, value, projection) + 2 r N D^2 (MLP of ratio r = 4) + 2 N^2 D (attention)
    multiply-adds for N tokens of width D; the patch embedding adds (N - 1) D 3 P^2. Two operations each; the backward
    pass is twice the forward one."""
    D, P = config["embed_dim"], config["patch_size"]
    N = (img_size // P) ** 2 + 1
    forward = config["depth"] * (12 * N * D * D + 2 * N * N * D) + (N - 1) * D * 3 * P * P
    return 3 * 2 * forward


# ---------------------------------------------------------------- the plain baseline


class Baseline:
    """ImageFolder + DataLoader + torchvision's ViT + AdamW, fp32."""

    def __init__(self, folder, count, size, device, workers):
        train = transforms.Compose(
            [
                transforms.Resize((size, size)),
                transforms.RandomAffine(7, (0.05, 0.05), (0.9, 1.1)),
                transforms.ColorJitter(0.1, 0.15),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, MEAN),
            ]
        )
        plain = transforms.Compose(
            [transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize(MEAN, MEAN)]
        )
        self.size, self.device, self.workers = size, device, workers
        order = np.random.default_rng(0).permutation(len(ImageFolder(folder)))
        self.rows = np.resize(order, count)
        self.train, self.plain = (
            torch.utils.data.Subset(ImageFolder(folder, t), self.rows.tolist()) for t in (train, plain)
        )

    def loader(self, dataset, shuffle=False):
        return DataLoader(dataset, BATCH, shuffle=shuffle, num_workers=self.workers)

    def model(self, config):
        return PlainViT(
            self.size,
            config["patch_size"],
            config["depth"],
            config["num_heads"],
            config["embed_dim"],
            4 * config["embed_dim"],
            dropout=config.get("drop_rate", 0.0),
            num_classes=2,
        ).to(self.device)

    def step(self, model, optimizer, x, y):
        loss = F.cross_entropy(model(x.to(self.device)), y.to(self.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def evaluate(self, model):
        model.eval()
        return torch.cat([model(x.to(self.device)).cpu() for x, _ in self.loader(self.plain)])

    def epoch(self, model, optimizer, val_share=0.25):
        model.train()
        for x, y in self.loader(self.train, shuffle=True):
            self.step(model, optimizer, x, y)
        full, self.plain = (
            self.plain,
            torch.utils.data.Subset(self.plain, range(round(len(self.plain) * val_share))),
        )
        self.evaluate(model)
        self.plain = full

    def frozen_epoch(self, model, optimizer):
        """One epoch of the head on a frozen backbone, run anew for every image."""
        for x, y in self.loader(self.plain, shuffle=True):
            self.step(model, optimizer, x, y)


# ---------------------------------------------------------------- our side


class Ours:
    """The same work by data.py and engine.py, from the cache in `work`."""

    def __init__(self, folder, rows, size, device, amp, work):
        self.folder, self.rows, self.size, self.device, self.amp, self.work = (
            folder,
            rows,
            size,
            device,
            amp,
            work,
        )
        self.files = [Path(p).relative_to(folder).as_posix() for p, _ in ImageFolder(folder).samples]
        self.labels = np.array([y for _, y in ImageFolder(folder).samples])[rows]
        self.config = data.DataConfig(str(folder), size, cache_dir=str(work / "cache"))
        self.scaling = dict(mean=MEAN, std=MEAN, device=device, amp=amp)

    def load(self, fresh=False):
        """The images as a Subset; `fresh`: without a cache."""
        config = (
            replace(self.config, cache_dir=str(self.work / f"fresh{time.monotonic_ns()}"))
            if fresh
            else self.config
        )
        images, _, _ = data.load_images(self.folder, self.files, config, "train")
        return data.Subset([self.files[r] for r in self.rows], self.labels, images, self.rows)

    def step(self, model, optimizer, source, index):
        model.train()
        optimizer.zero_grad(set_to_none=True)
        engine.backward(
            model,
            source,
            index,
            index,
            loss_fn=engine.cross_entropy(None, 0.0),
            augment=data.Augment(),
            accumulate=1,
            **self.scaling,
        )
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def epoch(self, model, subset, val_share=0.25):
        meta = {
            "model_config": {"kind": "vit", **model.config},
            "recipe": {},
            "data": {},
            "split": {"synthetic": False},
        }
        with contextlib.redirect_stdout(io.StringIO()):
            engine.fit(
                model,
                subset,
                subset.take(np.arange(round(len(subset) * val_share))),
                out=self.work / "run",
                meta=meta,
                loss_fn=engine.cross_entropy(None, 0.0),
                monitor=None,
                augment=data.Augment(),
                epochs=1,
                batch_size=BATCH,
                lr=1e-4,
                weight_decay=0.01,
                schedule="cosine",
                warmup_epochs=0.0,
                clip=1.0,
                seed=0,
                **self.scaling,
            )


def optimizer_of(model, device):
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type in ("cpu", "cuda"))


def enlarge(folder, target, count):
    """Full-size stand-ins where no originals are given: images of `folder` at 1800 x 1400 px, JPEG quality 92."""
    for path, label in ImageFolder(folder).samples[:: max(1, len(ImageFolder(folder).samples) // count)]:
        to = Path(target, str(label), Path(path).name).with_suffix(".jpeg")
        to.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.convert("L").resize((1800, 1400), Image.Resampling.BICUBIC).save(to, quality=92)
    return target


# ---------------------------------------------------------------- rows


def decode_rows(args, small, large, device):
    """decode_small, decode_original: every file decoded and resized once; ours builds its cache, the baseline its batches."""
    for name, (plain, ours) in (("decode_small", small), ("decode_original", large)):

        def read(plain=plain):
            for _ in plain.loader(plain.plain.dataset):
                pass

        yield compare(
            name, len(ours.files), lambda ours=ours: ours.load(fresh=True), read, device, args.repeats
        )


def step_rows(args, plain, ours, device):
    """train_step_*: a batch that lies ready, on one model after the other."""
    source = data.Batches(ours.load(), device)
    for name in ("scratch", "ti16", "b16"):
        batch = BATCH if not args.quick else 4
        index, config = torch.arange(batch), CONFIGS[name]
        model = build_vit(name, img_size=args.img_size, drop_rate=0.0).to(device)  # as the default recipes
        other = plain.model({**config, "drop_rate": 0.0}).train()
        optimizer, ordinary = optimizer_of(model, device), torch.optim.AdamW(other.parameters(), lr=1e-4)
        x, y = torch.randn(batch, 3, args.img_size, args.img_size), torch.arange(batch) % 2
        steps = 1 if name == "b16" and device.type == "cpu" else 3
        yield compare(
            f"train_step_{name}",
            steps * batch,
            lambda: [ours.step(model, optimizer, source, index) for _ in range(steps)],
            lambda: [plain.step(other, ordinary, x, y) for _ in range(steps)],
            device,
            args.repeats,
            warm=lambda: ours.step(model, optimizer, source, index),
        )
        del model, other, optimizer, ordinary


def loop_rows(args, small, large, device):
    """evaluate_scratch, epoch_scratch, epoch_scratch_originals: whole loops, data included."""
    config = CONFIGS["scratch"]
    plain, ours = small
    model, other = (
        build_vit("scratch", img_size=args.img_size, drop_rate=0.0).to(device),
        plain.model({**config, "drop_rate": 0.0}),
    )
    subset = ours.load()
    yield compare(
        "evaluate_scratch",
        len(subset),
        lambda: engine.predict(model, subset, **ours.scaling),
        lambda: plain.evaluate(other),
        device,
        args.repeats,
    )
    for name, (plain, ours) in (("epoch_scratch", small), ("epoch_scratch_originals", large)):
        subset = ours.load()
        ordinary = torch.optim.AdamW(other.parameters(), lr=1e-4)
        yield compare(
            name,
            len(subset),
            lambda: ours.epoch(model, subset),
            lambda: plain.epoch(other, ordinary),
            device,
            args.repeats,
        )


def frozen_row(args, plain, ours, device):
    """frozen_stage: FROZEN_EPOCHS epochs of a head on the frozen Ti/16, computed once; the baseline's time is that of one
    such epoch times their number."""
    model, other = build_vit("ti16", img_size=args.img_size), plain.model(CONFIGS["ti16"])
    other.requires_grad_(False)
    other.heads.requires_grad_(True)
    ordinary, subset = torch.optim.AdamW(other.heads.parameters(), lr=1e-3), ours.load()

    def stage():
        with contextlib.redirect_stderr(io.StringIO()):
            engine.fit_head(
                model,
                subset,
                epochs=FROZEN_EPOCHS,
                batch_size=BATCH,
                lr=1e-3,
                weight_decay=0.01,
                loss_fn=engine.cross_entropy(None, 0.0),
                seed=0,
                **ours.scaling,
            )

    yield compare(
        "frozen_stage",
        len(subset) * FROZEN_EPOCHS,
        stage,
        lambda: plain.frozen_epoch(other, ordinary),
        device,
        args.repeats,
        scale=FROZEN_EPOCHS,
    )


def more_rows(args, small, large, device):
    """Times without a baseline, seconds: from a start with a cache to the first step, and building the caches."""
    for name, (_, ours) in (
        ("first epoch's extra cost without a cache, 224 px files", small),
        ("first epoch's extra cost without a cache, originals", large),
    ):
        yield name, timed(lambda: ours.load(fresh=True), device), len(ours.files)
    _, ours = small

    def start():
        subset = ours.load()
        model = build_vit("scratch", img_size=args.img_size, drop_rate=0.0).to(device)
        ours.step(
            model,
            optimizer_of(model, device),
            data.Batches(subset, device),
            torch.arange(min(BATCH, len(subset))),
        )

    yield (
        "start to the end of the first step, cache there, imports done",
        timed(start, device),
        len(ours.files),
    )


def growth(args, ours, device, fraction):
    """Markdown: how a scratch epoch of the whole set grows with the side of the images. Measured: one step; predicted:
    images * step_flops / (fraction of peak at --img-size * peak), which is also how it grows with their number."""
    lines = [
        "\n| side, px | GFLOP an image's step | images/s | minutes for 15 epochs of 4,172 images | by formula |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for size in sorted({args.img_size // 32 * 16, args.img_size, args.img_size // 16 * 27 // 16 * 16}):
        model, batch = (
            build_vit("scratch", img_size=size, drop_rate=0.0).to(device),
            4 if args.quick else BATCH,
        )
        images = np.random.default_rng(0).integers(0, 256, (batch, size, size), dtype=np.uint8)
        subset = data.Subset([""] * batch, np.arange(batch) % 2, images, np.arange(batch))
        source, optimizer = data.Batches(subset, device), optimizer_of(model, device)
        times = [
            timed(lambda: ours.step(model, optimizer, source, torch.arange(batch)), device)
            for _ in range(args.repeats + 1)
        ]
        speed, flops = batch / statistics.median(times[1:]), step_flops(CONFIGS["scratch"], size)
        lines.append(
            f"| {size} | {flops / 1e9:.2f} | {speed:.0f} | {15 * 4172 / speed / 60:.1f} | "
            f"{15 * 4172 * flops / fraction / 60:.1f} |"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------- whole scripts, as a user starts them


def start_script(*argv, threads=None):
    """Run Python with `argv` in this folder, quietly: (seconds, peak resident memory in MiB or None where unknown)."""
    env = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *map(str, argv)],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=env,
            cwd=Path(__file__).parent,
        )
        peak = None
        while process.poll() is None:
            peak = peak_resident(process.pid) or peak
            time.sleep(0.02)
        if process.returncode:
            errors.seek(0)
            raise common.InputError(f"{' '.join(map(str, argv))} failed: {errors.read()[-500:]}")
    return time.perf_counter() - started, peak


def script_rows(args, root, device, work):
    """(what, seconds, MiB) of calibrate.py and predict.py on the whole set, and of a short scratch training alone."""
    run, more = work / "runs/scratch", ("--device", device)
    yield (
        "train_scratch.py, 20 steps and a validation",
        *start_script(
            "train_scratch.py",
            "--data-dir",
            root.resolve(),
            "--cache-dir",
            work / "cache",
            "--img-size",
            args.img_size,
            "--epochs",
            1,
            "--max-steps",
            20,
            "--out",
            run,
            *more,
        ),
    )
    imports, _ = start_script("-c", "import calibrate")
    for name in ("calibrate.py", "calibrate.py again, scores kept"):
        seconds, memory = start_script("calibrate.py", "--run", run, *more)
        yield f"{name} (imports: {imports:.1f} s of it)", seconds, memory
    yield (
        "predict.py on the test folder",
        *start_script("predict.py", (root / "test").resolve(), "--run", run, *more),
    )


def process_growth(args, device, work):
    """Markdown: an epoch of the scratch model on drawn images under torchrun, shared among more and more processes; on CPUs the
    cores are shared out too. By formula: as fast as one process however they are shared out, or n times as fast on n GPUs."""
    cores, cuda = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        device.type == "cuda",
    )
    numbers = [n for n in (1, 2, 4, 8) if n <= (torch.cuda.device_count() if cuda else cores)]
    data.make_synthetic(work / "drawn", train=args.images, test=8)
    lines = ["\n| processes | threads each | images/s | by formula |", "| ---: | ---: | ---: | ---: |"]
    for n in numbers:
        start_script(
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            n,
            "train_scratch.py",
            "--data-dir",
            work / "drawn",
            "--cache-dir",
            work / "cache",
            "--img-size",
            args.img_size,
            "--epochs",
            2,
            "--device",
            device.type,
            "--out",
            work / f"processes{n}",
            threads=max(1, cores // n),
        )
        results = common.read_json(work / f"processes{n}" / "results.json")
        speed = results["split"]["train"] / results["history"][-1]["seconds"]
        one = speed if n == 1 else one
        lines.append(f"| {n} | {max(1, cores // n)} | {speed:.0f} | {one * (n if cuda else 1):.0f} |")
    return "\n".join(lines)


def parse():
    """Checked command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--data-dir", default=data.DEFAULT_DIR, help="folder with train/ and test/")
    parser.add_argument(
        "--originals",
        default=None,
        metavar="DIR",
        help="folder with one folder of full-size images a class "
        "(default: images of --data-dir enlarged to 1800 x 1400)",
    )
    parser.add_argument("--device", default="auto", help="auto (cuda > mps > cpu), cuda, mps, cpu")
    parser.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="bf16 on our side (default: where the device does it fast)",
    )
    parser.add_argument("--images", type=int, default=512, help="images of an epoch and of an evaluation")
    parser.add_argument("--img-size", type=int, default=224, metavar="PX", help="side of the square input")
    parser.add_argument("--repeats", type=int, default=3, help="measured turns")
    parser.add_argument("--workers", type=int, default=2, help="the baseline's DataLoader workers")
    parser.add_argument(
        "--quick", action="store_true", help="64 images, 1 turn, batches of 4 for the steps: a first look"
    )
    args = parser.parse_args()
    for name in ("images", "repeats", "img_size"):
        if getattr(args, name) < 1:
            raise common.InputError(
                f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
            )
    if args.img_size % 16:
        raise common.InputError(f"--img-size must be divisible by 16, got {args.img_size}")
    if args.quick:
        args.images, args.repeats = min(args.images, 64), 1
    return args


def main():
    args = parse()
    device = engine.pick_device(args.device)
    amp = engine.fast_bf16(device) if args.amp is None else args.amp
    dtype = torch.bfloat16 if amp else torch.float32
    root = data.find_root(args.data_dir)
    if args.originals and not Path(args.originals).is_dir():
        raise common.InputError(f"--originals {args.originals} is no folder")
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        originals = args.originals or enlarge(root / "train", work / "large", 64)
        pairs = []
        for folder, place in ((root / "train", "small"), (Path(originals), "large")):
            plain = Baseline(folder, args.images, args.img_size, device, args.workers)
            pairs.append((plain, Ours(folder, plain.rows, args.img_size, device, amp, work / place)))
        peak = matmul_peak(device, dtype)
        print(
            f"{engine.device_name(device)}, torch {torch.__version__}, {'bf16' if amp else 'fp32'}; matrix products reach "
            f"{peak:.0f} GFLOP/s\n\n| | ours, images/s | baseline, images/s | ratio | least to greatest | our peak, MiB |\n"
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            flush=True,
        )
        rows = [
            *decode_rows(args, *pairs, device),
            *step_rows(args, *pairs[0], device),
            *loop_rows(args, *pairs, device),
            *frozen_row(args, *pairs[0], device),
        ]
        fractions = {
            row["name"]: row["ours"] * step_flops(CONFIGS[row["name"][11:]], args.img_size) / peak / 1e9
            for row in rows
            if row["name"].startswith("train_step")
        }
        print("\nfraction of peak: " + ", ".join(f"{k} {v:.2f}" for k, v in fractions.items()))
        more = {}
        for name, seconds, count in more_rows(args, *pairs, device):
            more[name] = seconds
            print(f"{name}: {seconds:.2f} s ({count} images)", flush=True)
        print(growth(args, pairs[0][1], device, fractions["train_step_scratch"] * peak * 1e9), flush=True)
        if not args.quick:
            print("\n| script, from start to end | seconds | peak, MiB |\n| --- | ---: | ---: |")
            for name, seconds, memory in script_rows(args, root, device, work):
                more[name] = seconds
                print(
                    f"| {name} | {seconds:.1f} | {'-' if memory is None else f'{memory:.0f}'} |", flush=True
                )
            print(process_growth(args, device, work))
    print(
        json.dumps(
            {
                "device": engine.device_name(device),
                "dtype": "bf16" if amp else "fp32",
                "matmul_peak_gflops": peak,
                "rows": rows,
                "fraction_of_peak": fractions,
                "more_seconds": more,
                "images": args.images,
                "img_size": args.img_size,
                "repeats": args.repeats,
                "versions": engine.versions(),
                "command": common.command_line(),
            }
        )
    )


if __name__ == "__main__":
    common.start(main)
