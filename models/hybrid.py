"""The two-lung hybrid: a plain ViT as stem, and on its feature map a small transformer that reads the left
and the right half of the chest and lets one learnt query attend to both."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from common.console import InputError
from lungs.unet import lung_sized, soft_dice
from models.dinov3 import make_vit
from vit import Block

SIDE = 56  # of the feature map that is cut and pooled
NARROWEST = 0.25  # the cut between the lungs stays this far from either edge, as a share of the width


def found(masks):
    """Whether the area of soft masks (B, 1, S, S) can be that of lungs: bool (B,)."""
    return lung_sized(masks.mean(dim=(1, 2, 3)))


def midlines(masks):
    """Where left and right are cut: soft masks of the lungs (B, 1, S, S) -> (B,), the mean x of each mask as
    a share of the width; the middle where no lungs were found."""
    side = masks.shape[-1]
    at = (torch.arange(side, device=masks.device, dtype=masks.dtype) + 0.5) / side
    across = masks.sum(dim=(1, 2))  # (B, S)
    mean = (across * at).sum(1) / across.sum(1).clamp(min=1e-6)
    return torch.where(found(masks), mean.clamp(NARROWEST, 1 - NARROWEST), torch.full_like(mean, 0.5))


def overlaps(low, high, count, side):
    """Weights that average `side` pixels over `count` equal bins between low and high, shares (B,) of the
    side: (B, count, side), each row summing to 1."""
    at = torch.arange(max(count, side) + 1, device=low.device, dtype=low.dtype)
    edges = low.unsqueeze(1) + (high - low).unsqueeze(1) * at[: count + 1] / count  # (B, count + 1)
    pixels = at[: side + 1] / side
    begin = torch.maximum(edges[:, :-1, None], pixels[:-1])
    width = (torch.minimum(edges[:, 1:, None], pixels[1:]) - begin).clamp(min=0)
    return width / width.sum(2, keepdim=True)


class CrossAttention(nn.Module):
    """One query (B, 1, D) reads tokens (B, N, D), by several heads: returns what it read (B, 1, D), and the
    attention averaged over the heads (B, N), which sums to 1."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, query, tokens):
        heads = (self.num_heads, tokens.shape[-1] // self.num_heads)
        q = self.q(query).unflatten(2, heads).transpose(1, 2)  # (B, heads, 1, head_dim)
        k, v = (x.unflatten(2, heads).transpose(1, 2) for x in self.kv(tokens).chunk(2, dim=2))
        attention = (q * heads[1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)  # (B, heads, 1, N)
        return self.proj((attention @ v).transpose(1, 2).flatten(2)), attention.mean(dim=1)[:, 0]


class TwoLungs(nn.Module):
    """What follows the stem: its feature map (B, D, h, w) and masks (B, 1, S, S) -> features (B, d_model).

    A 1x1 convolution to d_model channels, enlarged to SIDE x SIDE; the left and the right part (see
    `midlines`) are each mean-pooled to token_grid x token_grid tokens and go through the same `depth` pre-LN
    blocks; the query token reads both by cross-attention, and the tokens of the whole map too
    if `global_tokens`. With `segment` a small head predicts the masks from the map."""

    def __init__(self, width, d_model, token_grid, depth, num_heads, drop_rate, global_tokens, segment):
        super().__init__()
        self.token_grid, self.parts = token_grid, 3 if global_tokens else 2
        self.project = nn.Conv2d(width, d_model, 1)
        self.pos_embed = nn.Parameter(torch.zeros(self.parts, token_grid**2, d_model))
        self.query_token = nn.Parameter(torch.zeros(1, 1, d_model))
        for p in (self.pos_embed, self.query_token):
            nn.init.trunc_normal_(p, std=0.02)
        self.blocks = nn.ModuleList(Block(d_model, num_heads, 4.0, drop_rate, 0.0) for _ in range(depth))
        self.norm = nn.LayerNorm(d_model, eps=1e-6)
        self.read = CrossAttention(d_model, num_heads)
        self.last = nn.LayerNorm(d_model, eps=1e-6)
        self.segment = None
        if segment:
            middle = nn.Conv2d(d_model, d_model // 4, 3, padding=1)
            self.segment = nn.Sequential(middle, nn.GELU(), nn.Conv2d(d_model // 4, 1, 1))

    def pool(self, x, cut):
        """(B, C, S, S) and where it is cut (B,) -> the mean of every token's area, (B, parts, N, C)."""
        zero, one = torch.zeros_like(cut), torch.ones_like(cut)
        sides = [(zero, cut), (cut, one), (zero, one)][: self.parts]
        down = overlaps(zero, one, self.token_grid, x.shape[2]).to(x.dtype)
        across = [overlaps(*side, self.token_grid, x.shape[3]).to(x.dtype) for side in sides]
        rows = down.unsqueeze(1) @ x  # (B, C, g, S)
        parts = [rows @ weights.unsqueeze(1).transpose(2, 3) for weights in across]  # (B, C, g, g)
        return torch.stack(parts, dim=1).flatten(3).transpose(2, 3)

    def forward(self, x, masks):
        """Returns features (B, d_model), the attention of the query (B, parts * N), which sums to 1, the
        share of each token's area that is lung (the same shape), and the enlarged map (B, d_model, SIDE,
        SIDE)."""
        x = F.interpolate(self.project(x), size=(SIDE, SIDE), mode="bilinear")
        cut = midlines(masks)
        tokens = (self.pool(x, cut) + self.pos_embed).flatten(0, 1)  # (B * parts, N, d_model)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens).unflatten(0, (-1, self.parts)).flatten(1, 2)
        query = self.query_token.expand(x.shape[0], -1, -1)
        read, attention = self.read(query, tokens)
        return self.last(query + read)[:, 0], attention, self.pool(masks, cut).flatten(1), x


class Hybrid(nn.Module):
    """Scaled images and masks of the lungs (B, 3 + 1, H, W) -> float32 logits (B, num_classes).

    `stem`: the keywords of its VisionTransformer (or DinoV3); the others: see TwoLungs. In training two
    columns follow the logits: each image's segmentation loss, 0.5 binary cross-entropy + 0.5 (1 - soft Dice)
    at SIDE x SIDE (0 without `segment`), and the attention that the query pays to other things than lungs, in
    [0, 1]; both are 0 where no lungs were found, which does not say that there are none.
    """

    kind, in_chans, reads_lungs = "hybrid", 3, True

    def __init__(
        self,
        stem,
        num_classes=2,
        d_model=192,
        token_grid=4,
        depth=2,
        num_heads=4,
        drop_rate=0.1,
        **options,  # global_tokens, segment
    ):
        super().__init__()
        if unknown := options.keys() - {"global_tokens", "segment"}:
            raise InputError(f"a hybrid has no option {', '.join(sorted(unknown))}")
        if d_model % (step := math.lcm(4, num_heads)):
            raise InputError(f"d_model {d_model} is not a multiple of {step}")
        shape = dict(d_model=d_model, token_grid=token_grid, depth=depth, num_heads=num_heads)
        shape |= dict(drop_rate=drop_rate, global_tokens=False, segment=False) | options
        self.config = dict(stem=stem, num_classes=num_classes, **shape)
        self.stem = make_vit(**stem)
        self.stem.head.requires_grad_(False)  # the neck reads the patches
        self.neck = TwoLungs(self.stem.embed_dim, **shape)
        self.head = nn.Sequential(nn.Dropout(drop_rate), nn.Linear(d_model, num_classes))
        self.frozen = False

    def freeze(self, frozen):
        """Freeze the stem, which then is in eval mode even in training, or let it be trained again."""
        self.frozen = frozen
        for name, p in self.stem.named_parameters():
            p.requires_grad_(not frozen and not name.startswith("head."))
        return self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        self.stem.train(mode and not self.frozen)
        return self

    def layers(self):
        """Parts from input to head: (name, module) pairs."""
        return [*self.stem.layers()[:-1], ("two lungs", self.neck), ("head", self.head)]

    def _read(self, x):
        tokens = self.stem.fc_norm(self.stem.forward_features(x[:, :3])[:, self.stem.prefix :])
        return self.neck(tokens.transpose(1, 2).unflatten(2, self.stem.grid_size), x[:, 3:])

    def features(self, x):
        """(B, 4, H, W) -> what the head reads, (B, d_model)."""
        return self._read(x)[0]

    def forward(self, x):
        """Images and lungs (B, 4, H, W) -> logits (B, K); in training (B, K + 2): the last two columns are
        the losses of segmentation and of attention beside the lungs."""
        features, attention, share, large = self._read(x)
        with torch.autocast(x.device.type, enabled=False):
            logits = self.head(features.float())
            if not self.training:
                return logits
            off = 1 - (attention.float() * share.float()).sum(1)
            lost = self._segmentation(large, x[:, 3:]) if self.neck.segment else torch.zeros_like(off)
            more = torch.stack([lost, off], 1) * found(x[:, 3:]).unsqueeze(1)
            return torch.cat([logits, more], dim=1)

    def _segmentation(self, large, masks):
        """The segmentation loss of every image, (B,)."""
        truth = F.interpolate(masks.float(), size=(SIDE, SIDE), mode="area").clamp(0, 1)
        logits, sides = self.neck.segment(large.float()), (1, 2, 3)
        dice = soft_dice(logits.sigmoid(), truth)
        entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(sides)
        return 0.5 * entropy + 0.5 * (1 - dice)
