"""The work that benchmark.py times, in two ways: as a notebook does it, and by this project's modules."""

import contextlib
import io
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import VisionTransformer as PlainViT

import data
from common.console import InputError
from data import Batches
from images.augment import Augment
from images.cache import load_images
from images.subset import Subset
from models.inputs import Inputs
from records.run import Run
from training import loop as loop_module
from training.evaluate import fit_head
from training.loss import Supervised
from training.plan import Plan
from training.recipe import Recipe, Stage
from vit import CONFIGS, build_vit

MEAN = (0.5,) * 3
HEAD = Stage("head", epochs=30, lr=1e-3)
RECIPE = Recipe(epochs=1, batch_size=32, lr=1e-4, weight_decay=0.01, warmup_epochs=0.0, label_smoothing=0.0)


def image_folder(folder, transform=None):
    """torchvision's ImageFolder; InputError unless it holds images of two classes."""
    try:
        found = ImageFolder(folder, transform)
    except OSError as error:
        raise InputError(f"{folder}: {error}") from None
    if len(found.classes) != 2:
        raise InputError(f"{folder} has {len(found.classes)} class folders, not 2")
    return found


class Baseline:
    """ImageFolder + DataLoader + torchvision's ViT + AdamW, fp32."""

    def __init__(self, folder, args):
        square = transforms.Resize((args.img_size, args.img_size))
        scaled = [transforms.ToTensor(), transforms.Normalize(MEAN, MEAN)]
        moved = transforms.RandomAffine(7, (0.05, 0.05), (0.9, 1.1))
        train = transforms.Compose([square, moved, transforms.ColorJitter(0.1, 0.15), *scaled])
        plain = transforms.Compose([square, *scaled])
        self.args, self.device = args, args.device
        order = np.random.default_rng(0).permutation(len(image_folder(folder)))
        self.rows = np.resize(order, args.images)
        self.train, self.plain = (
            torch.utils.data.Subset(image_folder(folder, t), self.rows.tolist()) for t in (train, plain)
        )

    def loader(self, dataset, shuffle=False):
        return DataLoader(dataset, RECIPE.batch_size, shuffle=shuffle, num_workers=self.args.workers)

    def decode(self):
        """Every file once."""
        for _ in self.loader(self.plain.dataset):
            pass

    def model(self, name):
        """(model, optimiser) of a name in vit.CONFIGS, without dropout."""
        config = CONFIGS[name]
        dim, depth, heads = config["embed_dim"], config["depth"], config["num_heads"]
        model = PlainViT(self.args.img_size, config["patch_size"], depth, heads, dim, 4 * dim, num_classes=2)
        return model.to(self.device), torch.optim.AdamW(model.parameters(), lr=RECIPE.lr)

    def step(self, model, optimizer, x, y):
        loss = F.cross_entropy(model(x.to(self.device)), y.to(self.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def evaluate(self, model, fraction=1.0):
        model.eval()
        dataset = torch.utils.data.Subset(self.plain, range(round(len(self.plain) * fraction)))
        return torch.cat([model(x.to(self.device)).cpu() for x, _ in self.loader(dataset)])

    def epoch(self, model, optimizer):
        model.train()
        for x, y in self.loader(self.train, shuffle=True):
            self.step(model, optimizer, x, y)
        self.evaluate(model, fraction=0.25)

    def frozen_epoch(self, model, optimizer):
        """One epoch of the head; the frozen backbone is run anew for every image."""
        for x, y in self.loader(self.plain, shuffle=True):
            self.step(model, optimizer, x, y)


class Unwatched(Supervised):
    """Plain cross-entropy. Nothing else is watched on validation: a few images may be of one class only."""

    def watch(self, targets, outputs, side="val"):
        return {}

    def merit(self, row):
        return -row["val_loss"]


class Ours:
    """The same work by this project's modules, on the images `rows`, from the cache in the folder `work`."""

    def __init__(self, folder, rows, args, work):
        samples = image_folder(folder).samples
        self.folder, self.rows, self.args, self.work = folder, rows, args, work
        self.files = [Path(path).relative_to(folder).as_posix() for path, _ in samples]
        self.targets = np.array([target for _, target in samples])[rows]
        self.inputs = Inputs(MEAN, MEAN, args.device, args.amp)
        self.config = data.DataConfig(str(folder), args.img_size, cache_dir=str(work / "cache"))
        self.objective = Unwatched(self.config.task)

    def load(self, fresh=False):
        """The images as a Subset; `fresh`: without a cache."""
        cache = self.work / f"fresh{time.monotonic_ns()}" if fresh else self.config.cache_dir
        how = {"size": self.args.img_size, "resize": "squash", "skip_bad": False}
        images = load_images(self.folder, self.files, **how, cache_dir=cache, name="train").images
        return Subset([self.files[r] for r in self.rows], self.targets, images, self.rows)

    def model(self, name, size=None):
        """As the default recipes: without dropout."""
        model = build_vit(name, img_size=size or self.args.img_size, drop_rate=0.0)
        return model.to(self.args.device)

    def loop(self, model):
        """An engine.Loop that writes into the folder `work`."""
        plan = Plan(RECIPE, Augment(), self.config, Run(self.work / "run"), self.args.device, self.args.amp)
        about = {"kind": "vit", **model.config}
        meta = {"model_config": about, "recipe": {}, "data": {}, "split": {"synthetic": False}}
        return loop_module.Loop(model, self.objective, plan, self.inputs, meta)

    def stepper(self, model, subset, batch):
        """A function that makes one training step on the first `batch` images of a Subset."""
        loop, source, index = self.loop(model), Batches(subset, self.inputs), torch.arange(batch)
        loop.prepare(len(subset))

        def step():
            loop.net.train()
            loop.optimizer.zero_grad(set_to_none=True)
            loop.gradient.add(loop.net, source, index)
            torch.nn.utils.clip_grad_norm_(loop.net.parameters(), RECIPE.clip)
            loop.optimizer.step()

        return step

    def epoch(self, model, subset):
        with contextlib.redirect_stdout(io.StringIO()):
            self.loop(model).fit(subset, subset.take(np.arange(round(len(subset) * 0.25))))

    def head(self, model, subset):
        """Train the head on frozen features."""
        with contextlib.redirect_stderr(io.StringIO()):
            fit_head(model, subset, HEAD, objective=self.objective, recipe=RECIPE, inputs=self.inputs)


def enlarge(folder, target, count):
    """Stand-ins for full-size originals: about `count` images of `folder` at 1800 x 1400 px, JPEG quality
    92."""
    samples = image_folder(folder).samples
    for path, label in samples[:: max(1, len(samples) // count)]:
        to = Path(target, str(label), Path(path).name).with_suffix(".jpeg")
        to.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.convert("L").resize((1800, 1400), Image.Resampling.BICUBIC).save(to, quality=92)
    return target
