"""DINOv3 (Simeoni et al. 2025, arXiv:2508.10104): a ViT whose positions are rotations of queries and keys.

Parameters are named as in timm's `vit_*_patch16_dinov3_qkvb`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from common.console import InputError
from vit import Attention, Dropout, DropPath, Mlp, VisionTransformer

BASE = 100  # the longest period of the rotations, in units of the image's side
EPS = 1e-5


def angles(grid, head_dim, device=None):
    """Angle of every channel at every patch of a grid (h, w): float32 (h*w, head_dim).

    A quarter of the channels turns with y and a quarter with x, at frequencies from 2 pi down to about
    2 pi / BASE; the other half repeats them (see `Rotation`). Patch centres lie in [-1, 1] on both axes,
    whatever the grid, so that any image size will do."""
    y, x = ((torch.arange(n, device=device) + 0.5) / n * 2 - 1 for n in grid)
    centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).view(-1, 2, 1)  # (h*w, 2, 1)
    frequencies = BASE ** -torch.arange(0, 1, 4 / head_dim, device=device)  # (head_dim / 4,)
    return (2 * math.pi * centres * frequencies).flatten(1).tile(2)


class Rotation:
    """Turns the patch tokens of queries or keys (B, heads, prefix + N, head_dim): channel i and channel
    i + head_dim / 2 are a point in the plane, turned by its angle. [CLS] and registers stay as they are.

    angles: float32, that of (N, head_dim) or one for each image, (B, N, head_dim)."""

    def __init__(self, angles, prefix):
        if angles.ndim == 3:
            angles = angles.unsqueeze(1)  # the same for every head
        self.cos, self.sin, self.prefix = angles.cos(), angles.sin(), prefix

    def __call__(self, x):
        first, patches = x[:, :, : self.prefix], x[:, :, self.prefix :]
        left, right = patches.chunk(2, dim=-1)
        turned = patches * self.cos + torch.cat([-right, left], dim=-1) * self.sin
        return torch.cat([first, turned.to(x.dtype)], dim=2)


class QvAttention(Attention):
    """Attention whose queries and values have a bias, but not its keys."""

    def __init__(self, dim, num_heads, drop=0.0):
        super().__init__(dim, num_heads, drop)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))

    def project(self, x):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(x, self.qkv.weight, bias)


class SwiGlu(nn.Module):
    """Gated MLP (Shazeer 2020, arXiv:2002.05202): fc2(silu(fc1_g(x)) * fc1_x(x))."""

    def __init__(self, dim, hidden, drop=0.0):
        super().__init__()
        self.fc1_g = nn.Linear(dim, hidden)
        self.fc1_x = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(F.silu(self.fc1_g(x)) * self.fc1_x(x))))


class DinoV3Block(nn.Module):
    """The block of vit.py, with the attention and the MLP above; gamma_1 and gamma_2 are its LayerScale."""

    def __init__(self, dim, num_heads, hidden, drop, drop_path, gated):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = QvAttention(dim, num_heads, drop)
        self.gamma_1 = nn.Parameter(torch.full((dim,), 1e-5))
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = SwiGlu(dim, hidden, drop) if gated else Mlp(dim, hidden, drop)
        self.gamma_2 = nn.Parameter(torch.full((dim,), 1e-5))
        self.drop_path = DropPath(drop_path)

    def forward(self, x, rotate):
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x), rotate))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))

    def forward_explicit(self, x, rotate):
        """`forward`, and the attention (B, heads, N, N)."""
        out, attention = self.attn.forward_explicit(self.norm1(x), rotate)
        x = x + self.drop_path(self.gamma_1 * out)
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x))), attention


class DinoV3(VisionTransformer):
    """A VisionTransformer with rotary positions; `settings` are that class's keywords. `gated`: SwiGLU in the
    blocks, as S+ and H+ have. InputError for a head whose channels cannot be cut into pairs for y and x.

    Its authors also jitter the positions in training; this class does not."""

    learnt_positions = False

    def __init__(self, gated=False, rotary=True, reg_tokens=4, norm_eps=EPS, **settings):
        self.gated = gated  # read by make_block, which the next line calls
        super().__init__(reg_tokens=reg_tokens, norm_eps=norm_eps, **settings)
        self.head_dim = self.config["embed_dim"] // self.config["num_heads"]
        if not rotary or norm_eps != EPS or self.head_dim % 4:
            raise InputError("DINOv3 is rotary, with heads of a multiple of 4 channels and norms of eps 1e-5")
        self.config |= dict(rotary=True, reg_tokens=reg_tokens)
        if gated:
            self.config["gated"] = True

    def make_block(self, config, drop_path):
        hidden = round(config["embed_dim"] * config["mlp_ratio"])
        sizes = (config["embed_dim"], config["num_heads"], hidden, config["drop_rate"])
        return DinoV3Block(*sizes, drop_path, self.gated)

    def rotation(self, keep):
        turns = angles(self.grid_size, self.head_dim, self.patch_embed.proj.weight.device)
        if keep is not None:
            turns = turns[keep]  # (h*w, head_dim) -> (B, M, head_dim)
        return Rotation(turns, self.prefix)


def make_vit(**config):
    """The VisionTransformer of a model_config: a DinoV3 where it says `rotary`."""
    return DinoV3(**config) if config.get("rotary") else VisionTransformer(**config)
