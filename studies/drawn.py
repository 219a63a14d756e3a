"""Small drawn images, labels, lung masks and weights for studies/pins.py. The same in every call."""

import math
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PIXELS = 64  # side of a drawn image; models see 32


def chest(rng, disc, square):
    """(a drawn chest, float [PIXELS, PIXELS] in 0 to 1; its lungs, bool).

    A bright disc in the left lung, a square in the right one, or neither. The marks vary in strength, so that
    no model is perfect."""
    y, x = np.mgrid[-1 : 1 : PIXELS * 1j, -1 : 1 : PIXELS * 1j]
    x, y = x - rng.normal(0, 0.05), y - rng.normal(0, 0.05)
    lungs = np.minimum(((x + 0.42) / 0.3) ** 2, ((x - 0.42) / 0.3) ** 2) + (y / 0.65) ** 2 < 1
    grey = 0.6 - 0.35 * lungs + rng.normal(0, 0.06, lungs.shape)
    grey += disc * rng.uniform(0, 0.35) * ((x + 0.42) ** 2 + (y - 0.1) ** 2 < 0.04)
    grey += square * rng.uniform(0, 0.35) * ((abs(x - 0.42) < 0.18) & (abs(y + 0.1) < 0.18))
    return grey.clip(0, 1), lungs


def save(path, grey, bits=8):
    """A PNG of 8 or 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {8: np.uint8, 16: np.uint16}[bits]
    Image.fromarray((grey * np.iinfo(kind).max).astype(kind)).save(path)


def draw_classes(root, rng, classes, counts, bits=8):
    """{split: count} images of each {class: (disc, square)}, named as Kermany's, one to three of a patient ->
    ([name], [lungs])."""
    names, lungs = [], []
    for split, count in counts.items():
        for label, marks in classes.items():
            for i in range(count):
                patient = i - i % int(rng.integers(1, 4))
                name = f"person{patient}_bacteria_{i}.png"
                if label == "NORMAL":
                    name = f"IM-{patient:04d}-{i:04d}.png"
                grey, mask = chest(rng, *marks)
                names.append(str(Path(split, label, name)))
                lungs.append(mask)
                save(root / names[-1], grey, bits)
    return names, lungs


def draw_table(root, rng, count=150):
    """Images with any of two findings, some unknown, and labels.csv."""
    rows = ["path,patient,No Finding,Disc,Square"]
    for i in range(count):
        disc, square = rng.random(2) < 0.45
        save(root / f"images/{i:03d}.png", chest(rng, disc, square)[0])
        asked = "" if i % 9 == 0 else int(square)
        rows.append(f"images/{i:03d}.png,{i // 2},{int(not (disc or square))},{int(disc)},{asked}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")


def timm_vit(rng, width=64, depth=2, patch=8, grid=4):
    """Random weights of a small ViT under timm's names, float32."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid * grid, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for i in range(depth):
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            shapes |= {f"blocks.{i}.{name}.weight": (rows, columns), f"blocks.{i}.{name}.bias": (rows,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (width,), f"blocks.{i}.{name}.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"head.weight": (2, width), "head.bias": (2,)}
    state = {}
    for name, shape in shapes.items():
        scale = 0.1 if len(shape) < 2 else math.prod(shape[1:]) ** -0.5
        centre = 1 if re.search(r"norm\d?\.weight", name) else 0
        state[name] = torch.from_numpy(rng.normal(centre, scale, shape).astype(np.float32))
    return state


def google_vit(rng, width=32, depth=2, heads=2, patch=8, grid=4):
    """The same under Google's names, as an .npz holds them."""
    shapes = {
        "cls": (1, 1, width),
        "Transformer/posembed_input/pos_embedding": (1, 1 + grid * grid, width),
        "embedding/kernel": (patch, patch, 3, width),
        "embedding/bias": (width,),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (width, 2),
        "head/bias": (2,),
    }
    each = width // heads
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}/{norm}/scale": (width,), f"{block}/{norm}/bias": (width,)}
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            shapes |= {
                f"{attention}/{part}/kernel": (width, heads, each),
                f"{attention}/{part}/bias": (heads, each),
            }
        shapes |= {f"{attention}/out/kernel": (heads, each, width), f"{attention}/out/bias": (width,)}
        for part, ins, outs in (("Dense_0", width, 4 * width), ("Dense_1", 4 * width, width)):
            shapes |= {
                f"{block}/MlpBlock_3/{part}/kernel": (ins, outs),
                f"{block}/MlpBlock_3/{part}/bias": (outs,),
            }
    return {
        name: rng.normal(float(name.endswith("scale")), 0.15, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def draw(root):
    """Everything that is trained on or scored, under `root`, the same in every call."""
    if (root / "drawn").exists():
        return
    shutil.rmtree(root, ignore_errors=True)
    rng = np.random.default_rng(0)
    two = {"NORMAL": (False, False), "PNEUMONIA": (True, False)}
    names, lungs = draw_classes(root / "two", rng, two, {"train": 100, "test": 30})
    masks = np.packbits(np.stack(lungs), axis=-1)
    np.savez(root / "masks.npz", masks=masks, names=np.array(names))
    draw_classes(root / "clinic", rng, two, {"": 40}, bits=16)
    three = {"NORMAL": (False, False), "DISC": (True, False), "SQUARE": (False, True)}
    draw_classes(root / "three", rng, three, {"train": 50, "test": 15})
    draw_table(root / "table", rng)
    np.savez(root / "tiny.npz", **google_vit(rng))
    torch.save(timm_vit(rng), root / "tiny.pth")
    (root / "config.json").write_text('{"hidden_size": 64, "num_attention_heads": 1}')  # of tiny.pth
    (root / "drawn").write_text("")
