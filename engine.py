"""One training loop, one prediction loop, one checkpoint format, shared by every model.

A run folder holds `checkpoint.pth` (weights of the best epoch, tensors only), `last.pth` (everything
needed to resume) and `results.json`. Each is written to a temporary name and renamed.
"""

import argparse
import ctypes
import math
import os
import platform
import random
import signal
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import data
from common import (
    FORMAT,
    InputError,
    Interrupted,
    atomic_path,
    command_line,
    load_tensors,
    read_json,
    read_results,
    say,
    sha256,
    write_json,
)
from vit import build_model

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h

# ---------------------------------------------------------------- command line


def add_arguments(parser, out, epochs, lr, batch_size=32, drop_path=0.0, supervised=True):
    """The training flags all arms share; `out`, `epochs`, `lr` and `batch_size` are the script's own defaults.

    Without `supervised` those that need labels are left out."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, default=epochs, help="passes over the training images")
    group.add_argument("--batch-size", type=int, default=batch_size, help="images a step, over all processes")
    group.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="run each step in N parts, for less memory: the same step to rounding",
    )
    group.add_argument("--lr", type=float, default=lr, help="peak learning rate of AdamW")
    group.add_argument(
        "--weight-decay", type=float, default=0.05, help="not on biases, norms, [CLS], positions"
    )
    group.add_argument(
        "--schedule", choices=("cosine", "constant"), default="cosine", help="after the warm-up"
    )
    group.add_argument("--warmup-epochs", type=float, default=1.0, help="linear warm-up, in epochs")
    group.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    group.add_argument(
        "--ema",
        type=float,
        default=0.0,
        metavar="D",
        help="validate and keep an exponential moving "
        "average of the weights with this decay a step, in [0, 1); 0: the weights themselves",
    )
    if supervised:
        group.add_argument(
            "--label-smoothing", type=float, default=0.05, help="of the cross-entropy, in [0, 1)"
        )
        group.add_argument(
            "--class-weights",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="weight the loss by inverse class frequency",
        )
        group.add_argument("--patience", type=int, default=5, help="epochs without a better validation AUROC")
        group.add_argument(
            "--patch-drop", type=float, default=0.0, metavar="X", help="share of patches left out in training"
        )
        group.add_argument(
            "--drop-path",
            type=float,
            default=drop_path,
            metavar="X",
            help="stochastic depth of the last block",
        )
    group = add_run_arguments(parser, out)
    group.add_argument("--seed", type=int, default=0, help="of initial weights, order and augmentation")
    group.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=None,
        metavar="N",
        help="one run a seed, in OUT-seedN; compare.py reports mean, spread and ensemble",
    )
    group.add_argument("--device", default="auto", help="auto (cuda > mps > cpu), cuda, cuda:1, mps, cpu")
    group.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="bf16 autocast (default: where the device does it fast)",
    )
    group.add_argument(
        "--deterministic", action="store_true", help="deterministic kernels, at some cost on a GPU"
    )
    group.add_argument("--max-steps", type=int, default=None, help="stop training after this many steps")
    group.add_argument("--resume", action="store_true", help="continue the interrupted run in --out")


def parse(parser, recipes):
    """Parse the command line. `recipes` {name: {flag's name: value}} are the defaults that --recipe chooses among, the
    first unless named; a flag given by hand wins."""
    group = parser.add_argument_group("recipe")
    group.add_argument(
        "--recipe",
        choices=list(recipes),
        default=next(iter(recipes)),
        help="which defaults: those chosen in EXPERIMENTS.md (default)"
        + (", or the plain ones of earlier work (paper)" if "paper" in recipes else ""),
    )
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--recipe", default=next(iter(recipes)))
    parser.set_defaults(**recipes.get(early.parse_known_args()[0].recipe, {}))
    return parser.parse_args()


def add_run_arguments(parser, out):
    """--out and --overwrite; returns their group."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--out", default=None, help=f"run folder (default: {out}, with -demo appended for --demo)"
    )
    group.add_argument("--overwrite", action="store_true", help="replace a run that is already in --out")
    parser.set_defaults(default_out=out, resume=False)
    return group


def _recipe_from_args(args):
    """Parsed training flags -> the settings that define a result; InputError if one is out of range."""
    for name in ("epochs", "batch_size", "accumulate", "patience"):
        if getattr(args, name, 1) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("lr", "head_lr", "clip"):
        if not 0 < getattr(args, name, 1) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    for name in ("weight_decay", "warmup_epochs", "freeze_epochs"):
        if not 0 <= getattr(args, name, 0) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} must not be negative, got {getattr(args, name)}")
    for name in ("label_smoothing", "patch_drop", "drop_path", "drop_rate", "ema"):
        if not 0 <= getattr(args, name, 0) < 1:
            raise InputError(f"--{name.replace('_', '-')} must lie in [0, 1), got {getattr(args, name)}")
    if args.max_steps is not None and args.max_steps < 1:
        raise InputError(f"--max-steps must be at least 1, got {args.max_steps}")
    names = [n for n in RECIPE if hasattr(args, n)]
    return {name: getattr(args, name) for name in names}


# What a result depends on beside the data: first what `fit` takes, then what builds the model and its loss.
FIT = (
    "epochs",
    "batch_size",
    "accumulate",
    "lr",
    "weight_decay",
    "schedule",
    "warmup_epochs",
    "clip",
    "patience",
    "max_steps",
    "ema",
)
RECIPE = (
    *FIT,
    "label_smoothing",
    "class_weights",
    "patch_drop",
    "drop_path",
    "drop_rate",
    "freeze_epochs",
    "head_lr",
    "mask_ratio",
    "init",
)


def out_from_args(args, suffix=""):
    """The run folder; refuses, before any work is done, to overwrite a run silently (InputError)."""
    out = Path((args.out or args.default_out + ("-demo" if args.demo else "")) + suffix)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    if args.resume:
        if not (out / "last.pth").exists() and not suffix:
            raise InputError(
                f"--resume: there is no {out / 'last.pth'} to continue from; start without --resume"
            )
    elif not args.overwrite and (out / "results.json").exists():
        done = read_json(out / "results.json").get("finished")
        raise InputError(
            f"{out} already holds {'a finished' if done else 'an interrupted'} run: "
            + ("" if done else "continue it with --resume, ")
            + "choose another folder with --out, or replace it with --overwrite"
        )
    return out


@dataclass(frozen=True)
class Plan:
    """A checked command line: what to train on, how, and where to."""

    recipe: dict
    augment: data.Augment
    config: data.DataConfig
    out: Path
    device: torch.device
    amp: bool
    resume: bool


def plans_from_args(args):
    """One Plan a seed, its randomness seeded as it is yielded.

    Every flag and every run folder is checked before any work is done; then data are drawn or fetched if asked to.
    With --seeds and --resume, finished seeds are passed over and those not begun are begun.
    """
    join_processes(args.device)
    recipe, augment = _recipe_from_args(args), data.augment_from_args(args)
    seeds = args.seeds or [args.seed]
    if len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**63:
        raise InputError(f"seeds must differ and lie in [0, 2^63), got {' '.join(map(str, seeds))}")
    if args.seeds and args.seed:
        raise InputError("give --seed or --seeds, not both")
    outs = [out_from_args(args, f"-seed{seed}" if args.seeds else "") for seed in seeds]
    device = pick_device(args.device)
    amp = fast_bf16(device) if args.amp is None else args.amp
    with first_process_first():  # nothing is written before every process has checked the flags and folders
        config = data.config_from_args(args)
    for seed, out in zip(seeds, outs):
        resume = args.resume and (out / "last.pth").exists()
        if resume and args.seeds and read_json(out / "results.json").get("finished"):
            say(f"{out} is finished, passed over")
            continue
        seed_everything(seed, args.deterministic)
        yield Plan(
            {**recipe, "seed": seed, **asdict(augment), "amp": amp}, augment, config, out, device, amp, resume
        )


def train(plan, model, *, name, mean, std, loss_fn=None, **more):
    """Load the data of `plan`, train `model` with its recipe, write the run; returns results.json's content.

    `name` goes into results.json as "model"; `mean` and `std` are the input scaling, one float a channel;
    `more` is copied into results.json. `loss_fn(output, labels)` replaces the cross-entropy of a model without classes;
    the best epoch is then that of the least validation loss.
    """
    with first_process_first():
        train_set, val_set, split = data.load_train_val(plan.config)
    r = plan.recipe
    weight = None
    if r.get("class_weights"):
        weight = class_weights(train_set.labels, len(plan.config.classes)).to(plan.device)
    meta = {
        "model": name,
        "model_config": {"kind": model.kind, **model.config},
        "recipe": r,
        "data": asdict(plan.config),
        "split": split,
        "seed": r["seed"],
        "mean": list(mean),
        "std": list(std),
        "input_range": data.input_range(train_set),
        **more,
    }
    print(
        f"model: {name}, {sum(p.numel() for p in model.parameters()):,} parameters, {plan.config.img_size} px, on "
        f"{device_name(plan.device)}, {'bf16' if plan.amp else 'fp32'}; writing to {plan.out}",
        flush=True,
    )
    if r.get("freeze_epochs") and not plan.resume:
        fit_head(
            model,
            train_set,
            epochs=r["freeze_epochs"],
            batch_size=r["batch_size"],
            lr=r["head_lr"],
            weight_decay=r["weight_decay"],
            loss_fn=cross_entropy(weight, r["label_smoothing"]),
            mean=mean,
            std=std,
            device=plan.device,
            amp=plan.amp,
            seed=r["seed"],
        )
    keys = [k for k in (*FIT, "seed") if k in r]
    loss = loss_fn or cross_entropy(weight, r["label_smoothing"])
    return fit(
        model,
        train_set,
        val_set,
        out=plan.out,
        meta=meta,
        mean=mean,
        std=std,
        augment=plan.augment,
        loss_fn=loss,
        monitor=None if loss_fn else binary_auroc,
        device=plan.device,
        amp=plan.amp,
        resume=plan.resume,
        **{k: r[k] for k in keys},
    )


# ---------------------------------------------------------------- device, precision, randomness


def pick_device(name="auto"):
    """ "auto" -> cuda, else mps, else cpu; or the named device. InputError if it is not there.

    Under torchrun each process takes its own CUDA device, or the CPU. On a CPU, see keep_freed_memory."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if processes()[1] > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" else "cpu" if name == "mps" else name
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory(keep=True):
    """Have glibc keep the memory that tensors free for the next ones (nothing happens where there is no glibc).

    As it comes, it hands large blocks back to the system, which has to clear every page anew: 250,000 page faults, a fifth of
    the time, in each ViT-B/16 step of 16 images. The peak is the same. `keep` False: what a long-running process has by itself."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            for option, value in (
                (M_MMAP_MAX, 0 if keep else 65536),
                (M_TRIM_THRESHOLD, -1 if keep else 64 << 20),
                (M_MMAP_THRESHOLD, 32 << 20),
            ):
                mallopt(option, value)


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


def autocast(device, amp):
    """The autocast context of training and prediction: bf16 if `amp`, else nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bool(amp))


def trained_precision(results, device):
    """Whether a run is scored under bf16 autocast: as it was trained, where this device does it fast."""
    return bool(results["recipe"]["amp"]) and fast_bf16(device)


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
    return f"{device.type} ({torch.get_num_threads()} threads, {platform.machine()})"


# ---------------------------------------------------------------- several processes (torchrun)


def processes():
    """(rank, number) of this process: (0, 1) unless torchrun started it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes(device):
    """Under torchrun: join the others, over nccl on GPUs and gloo on CPUs. Only the first one prints and writes."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    cuda = device.startswith("cuda") or device == "auto" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")


@contextmanager
def first_process_first():
    """The block runs in the first process, then in the others: what it writes is there when they come."""
    rank, number = processes()
    if rank:
        dist.barrier()
    yield
    if number > 1 and not rank:
        dist.barrier()


def gather(value):
    """A picklable value of every process -> their list, in every process."""
    parts = [None] * processes()[1]
    if len(parts) == 1:
        return [value]
    dist.all_gather_object(parts, value)
    return parts


# ---------------------------------------------------------------- pure functions of the recipe


def learning_rate(step, total, warmup, peak, schedule="cosine"):
    """Rate at 0-based `step` of `total`: linear from peak/warmup to peak over `warmup` steps, then
    "cosine" to 0 at `total` (Loshchilov and Hutter 2017, arXiv:1608.03983) or "constant"."""
    if step < warmup:
        return peak * min(1.0, (step + 1) / warmup)
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def parameter_groups(model, weight_decay):
    """Two groups: weight decay on matrices and kernels; none on biases, norms, cls_token, pos_embed."""
    decay, plain = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (plain if p.ndim <= 1 or name.endswith(("_token", "pos_embed")) else decay).append(p)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def class_weights(labels, num_classes):
    """n / (K n_k) per class, float32 [K]: 1 on average over the images."""
    counts = np.bincount(labels, minlength=num_classes)
    return torch.tensor(len(labels) / (num_classes * np.maximum(counts, 1)), dtype=torch.float32)


def cross_entropy(weight, label_smoothing):
    """loss(logits [B, K], labels [B]) -> scalar mean, with class weights [K] (or None) and label smoothing.

    loss.weight is `weight`: what an image's part in the mean is."""

    def loss(logits, y):
        return F.cross_entropy(logits, y, weight=weight, label_smoothing=label_smoothing)

    loss.weight = weight
    return loss


def share(loss_fn, part, whole):
    """The part of a batch's mean loss that the mean over some of its images stands for; labels [P], [B] -> scalar.

    The sum over the parts of share * loss is the loss of the whole batch, whoever computes which part."""
    weight = getattr(loss_fn, "weight", None)
    if weight is None:
        return len(part) / len(whole)
    return weight[part].sum() / weight[whole].sum()


def binary_auroc(labels, logits):
    """AUROC of softmax(logits)[:, 1] for labels 0/1: what early stopping watches."""
    return float(roc_auc_score(labels, probabilities(logits)[:, 1]))


def probabilities(logits):
    """Softmax in float64: float32 would saturate at 1 and tie confident scores. [N, K] -> [N, K] numpy."""
    return torch.as_tensor(logits).double().softmax(1).numpy()


def scale_input(x, mean, std):
    """Grey [B, 1, S, S] in [0, 1] -> (x - mean) / std with len(mean) channels, by repeating grey."""
    mean, std = (torch.tensor(v, device=x.device, dtype=x.dtype).view(1, -1, 1, 1) for v in (mean, std))
    return (x - mean) / std


# ---------------------------------------------------------------- prediction


@torch.inference_mode()
def predict(model, subset, *, mean, std, device, amp, batch_size=64, views=None, progress=None):
    """Logits of every image of a Subset, in order, float32 [N, K] on the CPU; eval mode, no augmentation.

    With `views` (data.tta_views) the logits are averaged over them."""
    was_training = model.training
    model.eval()
    batches, out = data.Batches(subset, device), []
    for index in tqdm(
        torch.arange(len(subset)).split(batch_size),
        desc=progress,
        unit="batch",
        leave=False,
        disable=progress is None or not sys.stderr.isatty(),
    ):
        x, _ = batches.get(index)
        out.append(forward(model, x, mean=mean, std=std, amp=amp, views=views))
    model.train(was_training)
    return torch.cat(out).cpu()


def forward(model, x, *, mean, std, amp, views=None):
    """Grey images [B, 1, S, S] in [0, 1] on the model's device -> float32 logits [B, K], averaged over `views`."""
    with autocast(x.device, amp):
        parts = [model(scale_input(view(x), mean, std)).float() for view in views or [lambda x: x]]
    return torch.stack(parts).mean(0)


# ---------------------------------------------------------------- training


@contextmanager
def stop_requests():
    """Within the block Ctrl-C and SIGTERM only leave their number in the yielded list, so that a step
    can end and state be saved; a second one acts at once. Outside the main thread: nothing is caught."""
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


@torch.inference_mode()
def cls_features(model, subset, *, mean, std, device, amp, batch_size=64, progress=None):
    """[CLS] after the final norm, which the head reads, of every image of a Subset: float32 [N, D] on `device`; eval mode, no augmentation."""
    was_training = model.training
    model.to(device).eval()
    batches, out = data.Batches(subset, device), []
    for index in tqdm(
        torch.arange(len(subset)).split(batch_size),
        desc=progress,
        unit="batch",
        leave=False,
        disable=progress is None or not sys.stderr.isatty(),
    ):
        x, _ = batches.get(index)
        with autocast(device, amp):
            out.append(model.forward_features(scale_input(x, mean, std))[:, 0].float())
    model.train(was_training)
    return torch.cat(out)


def fit_head(model, train, *, epochs, batch_size, lr, weight_decay, loss_fn, mean, std, device, amp, seed):
    """Stage 1 of two-stage fine-tuning (Kumar et al. 2022, arXiv:2202.10054): train model.head alone, in place.

    The frozen backbone's features are computed once, without augmentation, so an epoch costs milliseconds; the result
    is that of epochs through the frozen backbone, to rounding. Returns the last epoch's mean loss. Constant rate."""
    started = time.perf_counter()
    features = cls_features(
        model, train, mean=mean, std=std, device=device, amp=amp, progress="features"
    ).clone()
    labels = torch.from_numpy(train.labels).to(device)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=lr, weight_decay=weight_decay)
    for epoch in range(epochs):
        total, order = 0.0, torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(train)))
        for index in order.to(device).split(batch_size):
            loss = loss_fn(model.head(features[index]), labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(index)
    say(
        f"head alone, {epochs} epochs on frozen features: train loss {float(total) / len(train):.4f}, "
        f"{time.perf_counter() - started:.0f} s"
    )
    return float(total) / len(train)


def fit(
    model,
    train,
    val,
    *,
    out,
    meta,
    loss_fn,
    mean,
    std,
    augment,
    device,
    amp,
    epochs,
    batch_size,
    lr,
    weight_decay,
    schedule,
    warmup_epochs,
    clip,
    seed,
    patience=math.inf,
    monitor=binary_auroc,
    max_steps=None,
    resume=False,
    ema=0.0,
    accumulate=1,
):
    """Train `model` on Subset `train`, keep the epoch with the best `monitor` (None: the least loss) on Subset `val`.

    `meta` is copied into results.json and must match on `resume` (its key "recipe" and "data" decide what
    a result is). `loss_fn(logits, labels)` and `monitor(labels, logits)` are given by the caller. After
    an interruption (Ctrl-C, SIGTERM, kill -9) `resume` goes on from last.pth; on a CPU the end is bit
    for bit that of an uninterrupted run. Returns the content of results.json. InputError on a non-finite
    loss, naming epoch, step and learning rate; Interrupted when stopped on request, after saving. Under torchrun the
    batch is shared out among the processes (DistributedDataParallel) and the first one writes.
    """
    out, (rank, number) = Path(out), processes()
    model.to(device)
    net = DistributedDataParallel(model, [device] if device.type == "cuda" else None) if number > 1 else model
    if rank:
        torch.manual_seed(seed + rank * 1_000_003)  # other augmentations than the first process's
    optimizer = torch.optim.AdamW(
        parameter_groups(model, weight_decay), lr=lr, fused=device.type in ("cpu", "cuda")
    )
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema)) if ema else None
    kept = average.module if ema else model  # what is validated and saved
    steps = math.ceil(len(train) / batch_size)
    total = min(epochs * steps, max_steps or math.inf)
    warmup = min(warmup_epochs * steps, total)
    state, results = _begin(out, model, optimizer, average, device, meta, resume)
    source, history = data.Batches(train, device), state["history"]

    def best_so_far():
        return _goodness(history[state["best_epoch"] - 1]) if state["best_epoch"] else -math.inf

    def done():
        return (
            state["epoch"] >= epochs
            or state["epoch"] * steps >= total
            or state["epoch"] - state["best_epoch"] >= patience
        )

    with stop_requests() as stop:
        while not done():
            started = time.perf_counter() - state["seconds"]
            state["lr"], stopped = _train_epoch(
                net,
                source,
                optimizer,
                state,
                stop,
                average=average,
                accumulate=accumulate,
                loss_fn=loss_fn,
                mean=mean,
                std=std,
                augment=augment,
                device=device,
                amp=amp,
                batch_size=batch_size,
                clip=clip,
                seed=seed,
                epochs=epochs,
                total=total,
                rate=lambda s: learning_rate(s, total, warmup, lr, schedule),
            )
            if stopped:
                state["seconds"] = time.perf_counter() - started
                _save_last(out, model, optimizer, device, meta, state, average)
                _write(out, results)  # so that a new run does not overwrite it unasked
                raise _interrupted(
                    state, stop[0] if stop else signal.SIGTERM
                )  # none: another process was asked
            row = _validate(
                kept, val, state, loss_fn=loss_fn, monitor=monitor, mean=mean, std=std, device=device, amp=amp
            )
            row["seconds"] = time.perf_counter() - started
            better = _goodness(row) > best_so_far()
            history.append(row)
            state.update(epoch=state["epoch"] + 1, step=0, loss_sum=0.0, seconds=0.0)
            if better:
                state["best_epoch"] = state["epoch"]
            # last.pth goes first: if the process dies between the two, resume rewrites the checkpoint from it.
            _save_last(out, model, optimizer, device, meta, state, average)
            if better:
                _save_checkpoint(out, kept)
            results.update(best_epoch=state["best_epoch"], minutes=sum(h["seconds"] for h in history) / 60)
            _write(out, results)
            print(
                f"epoch {state['epoch']}/{epochs}: train loss {row['train_loss']:.4f}, {_told(row)}{' *' if better else ''}, "
                f"lr {row['lr']:.1e}, {row['seconds']:.0f} s",
                flush=True,
            )
    results["finished"] = True
    _write(out, results)
    print(
        f"best epoch {results['best_epoch']}: {_told(history[results['best_epoch'] - 1])}; {results['minutes']:.1f} min; wrote "
        f"{out}/checkpoint.pth and results.json",
        flush=True,
    )
    return results


def _begin(out, model, optimizer, average, device, meta, resume):
    """The loop's state and the content of results.json, new or from where a run in `out` was stopped; files of before go."""
    state = {"epoch": 0, "step": 0, "loss_sum": 0.0, "seconds": 0.0, "history": [], "best_epoch": 0}
    if resume:
        state = _load_last(out, model, optimizer, device, meta, average)
        if (
            out / "results.json"
        ).exists():  # the command that began the run tells more than the one that resumed it
            meta = {**meta, "command": read_json(out / "results.json").get("command", command_line())}
    if processes()[0] == 0:
        out.mkdir(parents=True, exist_ok=True)
        # Scores belong to the weights of before.
        _clear(out, "scores", "calibration", *(() if resume else ("checkpoint", "last", "results")))
    results = {
        "command": command_line(),
        **meta,
        "format": FORMAT,
        "finished": False,
        "synthetic": meta["split"]["synthetic"],
        "params": sum(p.numel() for p in model.parameters()),
        "device": device_name(device),
        "versions": versions(),
        "best_epoch": state["best_epoch"],
        "history": state["history"],
        "minutes": sum(h["seconds"] for h in state["history"]) / 60,
    }
    if not resume:  # from now on the run can be resumed, and no other is begun in its folder unasked
        _write(out, results)
        _save_last(out, model, optimizer, device, meta, state, average)
    return state, results


def _goodness(row):
    """What the best epoch has most of: AUROC on validation, or, of a model without classes, minus its loss there."""
    return row.get("val_auroc", -row["val_loss"])


def _told(row):
    return f"val loss {row['val_loss']:.4f}" + (
        f", val AUROC {row['val_auroc']:.4f}" if "val_auroc" in row else ""
    )


def _interrupted(state, signum):
    """The exception that tells where a run was stopped and how to go on."""
    again = command_line().replace(" --overwrite", "")
    again += "" if " --resume" in again else " --resume"
    return Interrupted(
        f"stopped in epoch {state['epoch'] + 1} after step {state['step']}; saved. Go on with:\n  {again}",
        signum,
    )


def _validate(model, val, state, *, loss_fn, monitor, mean, std, device, amp):
    """The history entry of the epoch in `state`; InputError if the validation loss is not finite."""
    rank, number = processes()
    mine = predict(
        model,
        val.take(np.arange(rank, len(val), number)),
        mean=mean,
        std=std,
        device=device,
        amp=amp,
        progress="validation",
    )
    logits = mine.new_empty(len(val), mine.shape[1])
    for r, part in enumerate(gather(mine)):
        logits[r::number] = part
    loss = float(loss_fn(logits.to(device), torch.from_numpy(val.labels).to(device)))
    if not math.isfinite(loss):
        raise InputError(
            f"the validation loss became {loss} in epoch {state['epoch'] + 1}: try a smaller --lr"
        )
    watched = {"val_auroc": monitor(val.labels, logits)} if monitor else {}
    return {"train_loss": state["loss_sum"] / state["step"], "val_loss": loss, **watched, "lr": state["lr"]}


def _train_epoch(
    net,
    source,
    optimizer,
    state,
    stop,
    *,
    average,
    accumulate,
    loss_fn,
    mean,
    std,
    augment,
    device,
    amp,
    batch_size,
    clip,
    seed,
    epochs,
    total,
    rate,
):
    """Run the rest of the epoch in `state` (updated in place); returns the last learning rate, and whether to stop.

    The processes agree on the latter, so that none waits for one that has left."""
    net.train()
    (rank, number), count, epoch = processes(), len(source.subset), state["epoch"]
    steps = math.ceil(count / batch_size)
    # The order is a function of (seed, epoch) alone, so a resumed epoch continues in the same order.
    order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(count))
    batches = order.split(batch_size)[: total - epoch * steps]
    current = rate(epoch * steps + max(0, state["step"] - 1))
    stopping = 0.0
    look = 1 if device.type == "cpu" else 10  # reading the loss makes a GPU wait
    running, told, seen, begin = torch.zeros(2, device=device), time.perf_counter(), 0, time.perf_counter()
    with tqdm(
        total=len(batches),
        initial=state["step"],
        desc=f"epoch {epoch + 1}/{epochs}",
        unit="step",
        leave=False,
        disable=bool(rank) or not sys.stderr.isatty(),
    ) as bar:
        for index in batches[state["step"] :]:
            current = rate(epoch * steps + state["step"])
            for group in optimizer.param_groups:
                group["lr"] = current
            optimizer.zero_grad(set_to_none=True)
            running[0] += backward(
                net,
                source,
                index[rank::number],
                index,
                loss_fn=loss_fn,
                mean=mean,
                std=std,
                augment=augment,
                device=device,
                amp=amp,
                accumulate=accumulate,
            )
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
            state["step"] += 1
            seen += len(index)
            if state["step"] % look and state["step"] < len(batches):
                _step(optimizer, average, net)
                continue
            running[1] = len(stop)
            if number > 1:
                dist.all_reduce(running)
            value, stopping = running.tolist()
            running.zero_()
            if not math.isfinite(value):
                raise InputError(
                    f"the loss became {value} in epoch {epoch + 1}, step {state['step']}, at learning "
                    f"rate {current:.2e}. Try a smaller --lr" + (", or --no-amp" if amp else "")
                )
            _step(optimizer, average, net)
            state["loss_sum"] += value
            now = time.perf_counter()
            status = f"loss {state['loss_sum'] / state['step']:.3f}, {seen / (now - begin):.0f} images/s"
            bar.set_postfix_str(status, refresh=False)
            bar.update(state["step"] - bar.n)
            if not rank and bar.disable and now - told > 30:
                told, left = now, (len(batches) - state["step"]) * batch_size * (now - begin) / seen
                say(
                    f"epoch {epoch + 1}/{epochs} step {state['step']}/{len(batches)}: {status}, {left:.0f} s left"
                )
            if stopping:
                break
    return current, bool(stopping)


def _step(optimizer, average, net):
    optimizer.step()
    if average is not None:
        average.update_parameters(getattr(net, "module", net))


def backward(net, source, mine, whole, *, loss_fn, mean, std, augment, device, amp, accumulate):
    """Add the gradient of this process's rows `mine` of the batch `whole`; returns their part of its loss, detached."""
    number, total = processes()[1], 0.0
    labels = source.labels[whole.to(device)]
    parts = (mine if len(mine) else whole[:1]).split(math.ceil(max(1, len(mine)) / accumulate))
    for i, index in enumerate(parts):
        x, y = source.get(index)
        with torch.no_grad():
            x = scale_input(augment(x), mean, std)
        wait = net.no_sync() if number > 1 and i < len(parts) - 1 else nullcontext()
        with wait:
            with autocast(device, amp):
                logits = net(x)
            part = loss_fn(logits.float(), y) * (share(loss_fn, y, labels) if len(mine) else 0.0)
            (part * number).backward()  # DistributedDataParallel takes the mean over processes
        total += part.detach()
    return total


# ---------------------------------------------------------------- files of a run


def versions():
    """Versions of what decides a number."""
    import sklearn

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
    }


def _clear(out, *names):
    """Remove files of an earlier run in `out`, so that none is taken for the new one's."""
    suffixes = {
        "checkpoint": ".pth",
        "last": ".pth",
        "results": ".json",
        "scores": ".npz",
        "calibration": ".json",
    }
    for name in names:
        for tta in ("", "-tta"):
            (out / f"{name}{tta}{suffixes[name]}").unlink(missing_ok=True)


def _write(out, results):
    if processes()[0] == 0:
        write_json(out / "results.json", results)


def _save_checkpoint(out, model):
    if processes()[0]:
        return
    with atomic_path(Path(out, "checkpoint.pth")) as tmp:
        torch.save({name: p.detach().cpu() for name, p in model.state_dict().items()}, tmp)


def save_run(out, model, results):
    """Write checkpoint.pth and a finished results.json for a model that `fit` did not train."""
    _clear(Path(out), "last", "scores", "calibration")
    _save_checkpoint(out, model)
    write_json(
        Path(out, "results.json"),
        {**results, "format": FORMAT, "finished": True, "versions": versions(), "command": command_line()},
    )


def _save_last(out, model, optimizer, device, meta, state, average=None):
    value = {
        "format": FORMAT,
        "meta": {k: meta[k] for k in ("model_config", "recipe", "data", "split")},
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "state": state,
        "average": average and average.state_dict(),
        "rng": gather(
            (torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)
        ),
    }
    if processes()[0]:
        return
    with atomic_path(out / "last.pth") as tmp:
        torch.save(value, tmp)


def _load_last(out, model, optimizer, device, meta, average=None):
    """Restore model, optimiser and random state from last.pth; returns the loop's state."""
    path = out / "last.pth"
    last = load_tensors(path)
    if last.get("format") != FORMAT:
        raise InputError(f"{path} has format {last.get('format')}, this version reads {FORMAT}")
    last["meta"]["data"].pop("cache_dir", None)  # decides nothing
    differ = [
        f"{k}.{n}: was {last['meta'][k].get(n)!r}, now {v!r}"
        for k in last["meta"]
        for n, v in meta[k].items()
        if n != "cache_dir" and last["meta"][k].get(n) != v
    ]
    if differ:
        raise InputError(f"--resume: the settings differ from those of {out}: " + "; ".join(differ))
    model.load_state_dict(last["model"])
    optimizer.load_state_dict(last["optimizer"])
    if average is not None:
        average.load_state_dict(last["average"])
    rank, number = processes()
    if len(last["rng"]) != number:
        raise InputError(
            f"--resume: {out} was trained by {len(last['rng'])} processes, now there are {number}"
        )
    random_state, device_state = last["rng"][rank]
    torch.set_rng_state(random_state)
    if device_state is not None and device.type == "cuda":
        torch.cuda.set_rng_state(device_state, device)
    state = last["state"]
    if state["step"] == 0 and state["best_epoch"] == state["epoch"]:
        _save_checkpoint(
            out, average.module if average else model
        )  # the process may have died before it could
    say(f"resuming {out} in epoch {state['epoch'] + 1} after step {state['step']}")
    return state


def load_encoder(model, run, config):
    """Load the encoder of a pretrain_mae.py run into a VisionTransformer, all but its head; returns what it was, for
    results.json. InputError if the run is another kind, its shape differs, or it saw images of `config`'s validation."""
    auto, results = load_run(run)
    if auto.kind != "mae":
        raise InputError(f"--init {run} is no run of pretrain_mae.py")
    if {k: v for k, v in results["data"].items() if k.startswith("split") or k == "normalise"} != {
        k: v for k, v in asdict(config).items() if k.startswith("split") or k == "normalise"
    }:
        raise InputError(f"--init {run} was made with other --split, --split-seed or --normalise settings")
    weights = {k: v for k, v in auto.encoder.state_dict().items() if not k.startswith("head.")}
    try:
        model.load_state_dict({**model.state_dict(), **weights})
    except RuntimeError as error:
        raise InputError(
            f"--init {run} does not fit this model: {' '.join(str(error).split())[:300]}"
        ) from None
    return {"run": str(run), "checkpoint": sha256(Path(run, "checkpoint.pth")), "minutes": results["minutes"]}


def load_run(run):
    """A run folder -> (model in eval mode on the CPU, results). InputError if incomplete, damaged or newer."""
    run = Path(run)
    results = read_results(run)
    try:
        model = build_model(results["model_config"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{run / 'results.json'} does not describe a model: {error}") from None
    weights = load_tensors(run / "checkpoint.pth")
    bad = [n for n, v in weights.items() if isinstance(v, torch.Tensor) and not torch.isfinite(v).all()]
    if bad:
        raise InputError(
            f"{run / 'checkpoint.pth'} holds NaN or infinite weights in {', '.join(bad[:3])}: train again"
        )
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:
        raise InputError(
            f"{run / 'checkpoint.pth'} does not fit the model in results.json: "
            f"{' '.join(str(error).split())[:300]}"
        ) from None
    return model.eval(), results
