"""Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929), with timm's state-dict names.

Conv patch embedding, [CLS], learnable 1-D position embedding, pre-LN blocks, exact GELU and
stochastic depth (Huang et al. 2016, arXiv:1603.09382). No data and no files here. DINOv3, with rotary
positions, is models/dinov3.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

from common.console import InputError

# Every value is a keyword of VisionTransformer. Parameter counts with 2 classes at 224 px:
# scratch 4,987,138 - ti16 5,524,802 - s16 21,666,434 - b16 85,800,194 - b32 87,456,770 - l16 303,303,682.
CONFIGS = {
    "scratch": dict(patch_size=16, embed_dim=256, depth=6, num_heads=8, drop_rate=0.1, drop_path_rate=0.05),
    "ti16": dict(patch_size=16, embed_dim=192, depth=12, num_heads=3),
    "s16": dict(patch_size=16, embed_dim=384, depth=12, num_heads=6),
    "b16": dict(patch_size=16, embed_dim=768, depth=12, num_heads=12),
    "b32": dict(patch_size=32, embed_dim=768, depth=12, num_heads=12),
    "l16": dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16),
    "s14": dict(patch_size=14, embed_dim=384, depth=12, num_heads=6, layer_scale=True),
    "b14": dict(patch_size=14, embed_dim=768, depth=12, num_heads=12, layer_scale=True),
    "l14": dict(patch_size=14, embed_dim=1024, depth=24, num_heads=16, layer_scale=True),
}
READOUTS = ("cls", "mean", "cls+mean")
PLAIN = dict(  # what a ViT has unless its config says more
    layer_scale=False, reg_tokens=0, readout="cls", class_token=True, fc_norm=False, norm_eps=1e-6
)


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a residual branch per sample with probability `p` and
    divide the kept ones by 1 - p, so that the expectation is unchanged. Identity in eval mode."""

    def __init__(self, p=0.0):
        super().__init__()
        self.p = float(p)

    def forward(self, x):
        if not self.training or self.p == 0.0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * (keep / (1 - self.p))


class Dropout(nn.Dropout):
    """nn.Dropout whose mask on a CPU comes from 8 random bits an element (p to the nearest 1/256, its inverse
    exact): torch's own Bernoulli draws there cost more than the matrix products around them."""

    def forward(self, x):
        dropped = round(self.p * 256)
        if not self.training or dropped == 0 or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 7) // 8,)).view(torch.uint8)[: x.numel()]
        kept = (bits >= dropped).view(x.shape) if dropped < 256 else torch.zeros(x.shape, dtype=torch.bool)
        return x * kept.to(x.dtype).mul_(256 / max(1, 256 - dropped))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, h*w, D)


class Attention(nn.Module):
    def __init__(self, dim, num_heads, drop=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = Dropout(drop)

    def forward(self, x, rotate=None):
        """`rotate`: what queries and keys (B, heads, N, head_dim) go through, see `rotation` below."""
        q, k, v = self._qkv(x, rotate)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            # There the fused kernel's backward takes over twice as long as the products written out.
            return self._out(self._explicit(q, k, v)[0])
        return self._out(F.scaled_dot_product_attention(q, k, v))

    def forward_explicit(self, x, rotate=None):
        """The same by matrix products, and the attention (B, heads, N, N), whose rows sum to 1."""
        out, attention = self._explicit(*self._qkv(x, rotate))
        return self._out(out), attention

    @staticmethod
    def _explicit(q, k, v):
        attention = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)  # (B, heads, N, N)
        return attention @ v, attention

    def project(self, x):
        """Tokens (B, N, D) -> queries, keys and values side by side, (B, N, 3D)."""
        return self.qkv(x)

    def _qkv(self, x, rotate):
        B, N, D = x.shape
        heads = (3, self.num_heads, D // self.num_heads)
        # (B, N, 3D) -> (3, B, heads, N, head_dim)
        q, k, v = self.project(x).view(B, N, *heads).permute(2, 0, 3, 1, 4).unbind(0)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        return q, k, v

    def _out(self, x):
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # (B, heads, N, head_dim) -> (B, N, D)


class Mlp(nn.Module):
    def __init__(self, dim, hidden, drop=0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class LayerScale(nn.Module):
    """A learnable factor for every channel of a residual branch (Touvron et al. 2021, arXiv:2103.17239)."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-LN transformer block: x + attn(norm1(x)), then x + mlp(norm2(x)), DropPath on both branches, and
    LayerScale before it where it is asked for."""

    def __init__(self, dim, num_heads, mlp_ratio, drop, drop_path, layer_scale=False, norm_eps=1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, drop)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, round(dim * mlp_ratio), drop)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x, rotate=None):
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), rotate)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))

    def forward_explicit(self, x, rotate=None):
        """`forward`, and the attention (B, heads, N, N)."""
        out, attention = self.attn.forward_explicit(self.norm1(x), rotate)
        x = x + self.drop_path(self.ls1(out))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x)))), attention


def _checked_size(img_size, patch_size):
    """(height, width) of the images; InputError unless whole patches fill them."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if height % patch_size or width % patch_size or min(height, width) < patch_size:
        near = max(1, round(height / patch_size)) * patch_size
        raise InputError(
            f"image size {height}x{width} is not divisible by the patch size {patch_size}: take {near}"
        )
    return height, width


def _check_architecture(embed_dim, num_heads, depth, num_classes, readout, class_token):
    """InputError for sizes that no network can have."""
    if embed_dim % num_heads:
        raise InputError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")
    if num_classes < 1 or depth < 1:
        raise InputError(f"num_classes ({num_classes}) and depth ({depth}) must be at least 1")
    if readout not in READOUTS:
        raise InputError(f"readout {readout!r} is not one of {', '.join(READOUTS)}")
    if not class_token and readout != "mean":
        raise InputError(f"readout {readout!r} needs a [CLS] token, which this model has not: take mean")


class VisionTransformer(nn.Module):
    """Images (B, in_chans, H, W), already scaled -> float32 logits (B, num_classes).

    `img_size` is a side or (H, W), each divisible by `patch_size`; `drop_rate` acts after the position
    embedding and in every block; `drop_path_rate` grows linearly from 0 in the first block to its
    value in the last; in training each image loses a random share `patch_drop_rate` of its patches (Liu et
    al. 2022, arXiv:2208.07220), which also makes a step cheaper. `layer_scale`: see LayerScale;
    `reg_tokens`: register tokens between [CLS] and the patches (Darcet et al. 2024, arXiv:2309.16588),
    without a position; `readout`: what the head reads, [CLS], the mean patch token, or one after the other (2
    D values, as DINOv2's own linear classifier, Oquab et al. 2023, arXiv:2304.07193). `class_token`: whether
    there is a [CLS]; `fc_norm`: normalise what is read, instead of every token (as MAE does for the mean);
    `norm_eps`: of every LayerNorm. InputError for sizes that do not fit together.
    """

    kind = "vit"
    learnt_positions = True

    def __init__(  # noqa: PLR0913  (an architecture is that many numbers; the names are timm's)
        self,
        img_size=224,
        patch_size=16,
        in_chans=3,
        num_classes=2,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        drop_rate=0.0,
        drop_path_rate=0.0,
        patch_drop_rate=0.0,
        layer_scale=False,
        reg_tokens=0,
        readout="cls",
        class_token=True,
        fc_norm=False,
        norm_eps=1e-6,
    ):
        super().__init__()
        height, width = _checked_size(img_size, patch_size)
        _check_architecture(embed_dim, num_heads, depth, num_classes, readout, class_token)
        self.img_size, self.patch_size, self.in_chans = (height, width), patch_size, in_chans
        self.num_classes, self.embed_dim = num_classes, embed_dim
        self.grid_size = (height // patch_size, width // patch_size)
        self.config = dict(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            patch_drop_rate=patch_drop_rate,
        )
        extras = dict(layer_scale=layer_scale, reg_tokens=reg_tokens, readout=readout)
        extras |= dict(class_token=class_token, fc_norm=fc_norm, norm_eps=norm_eps)
        self.config |= {k: v for k, v in extras.items() if v != PLAIN[k]}  # as earlier versions wrote it
        self.patch_drop_rate, self.readout = patch_drop_rate, readout
        self.prefix = class_token + reg_tokens  # tokens before the patches
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.add_tokens(class_token, reg_tokens)
        self.pos_drop = Dropout(drop_rate)
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(self.make_block({**PLAIN, **self.config}, rate) for rate in rates)
        self.norm, self.fc_norm = nn.LayerNorm(embed_dim, eps=norm_eps), nn.Identity()
        if fc_norm:
            self.norm, self.fc_norm = self.fc_norm, self.norm
        read_tokens = 2 if readout == "cls+mean" else 1
        self.head = nn.Linear(embed_dim * read_tokens, num_classes)
        self.reset_parameters()

    def add_tokens(self, class_token, reg_tokens):
        """The parameters cls_token, reg_token and pos_embed, as far as there are any."""
        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        if reg_tokens:
            self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, self.embed_dim))
        if self.learnt_positions:
            positions = class_token + self.grid_size[0] * self.grid_size[1]
            self.pos_embed = nn.Parameter(torch.zeros(1, positions, self.embed_dim))

    def make_block(self, config, drop_path):
        """One of the blocks."""
        names = ("embed_dim", "num_heads", "mlp_ratio", "drop_rate")
        extras = dict(layer_scale=config["layer_scale"], norm_eps=config["norm_eps"])
        return Block(*(config[name] for name in names), drop_path, **extras)

    def reset_parameters(self):
        """Truncated normal (std 0.02) weights and embeddings, zero biases."""
        for name in ("cls_token", "pos_embed", "reg_token"):
            if hasattr(self, name):
                nn.init.trunc_normal_(getattr(self, name), std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def rotation(self, keep):
        """What every block does to queries and keys, None for nothing: positions can be written into these
        instead (models/dinov3.py). `keep`: see forward_features."""
        return None

    def first_tokens(self):
        """What comes before the patches, [CLS] with its position and the registers: (1, prefix, D)."""
        tokens = []
        if hasattr(self, "cls_token"):
            tokens.append(self.cls_token)
            if self.learnt_positions:
                tokens[0] = self.cls_token + self.pos_embed[:, :1]
        if hasattr(self, "reg_token"):
            tokens.append(self.reg_token)
        return torch.cat(tokens, dim=1)

    def forward_features(self, x, return_attention=False, keep=None):
        """Images (B, C, H, W) -> tokens (B, prefix + h*w, D) after the final norm, [CLS] first, then the
        registers; with `keep`, int64 (B, M), only those patches of each image (B, prefix + M, D).

        With `return_attention`: (tokens, attention (B, depth, heads, N, N)), computed by explicit
        products, which equal the fused kernel to rounding.
        """
        if x.ndim != 4 or tuple(x.shape[1:]) != (self.in_chans, *self.img_size):
            raise InputError(
                f"expected images (B, {self.in_chans}, {self.img_size[0]}, {self.img_size[1]}), "
                f"got {tuple(x.shape)}"
            )
        x = self.patch_embed(x)
        if self.learnt_positions:
            x = x + self.pos_embed[:, -x.shape[1] :]
        if keep is None and self.training and self.patch_drop_rate:
            count = max(1, round(x.shape[1] * (1 - self.patch_drop_rate)))
            keep = torch.rand(x.shape[:2], device=x.device).argsort(1)[:, :count]
        if keep is not None:
            x = x.gather(1, keep.unsqueeze(2).expand(-1, -1, x.shape[2]))
        if self.prefix:
            x = torch.cat([self.first_tokens().expand(x.shape[0], -1, -1), x], dim=1)
        x, rotate = self.pos_drop(x), self.rotation(keep)
        maps = []
        for block in self.blocks:
            if return_attention:
                x, attention = block.forward_explicit(x, rotate)
                maps.append(attention)
            else:
                x = block(x, rotate)
        x = self.norm(x)
        return (x, torch.stack(maps, dim=1)) if return_attention else x

    def features(self, x):
        """Images (B, C, H, W) -> what the head reads (see `readout`): (B, D), of "cls+mean" (B, 2 D)."""
        return self.read(self.forward_features(x))

    def read(self, tokens):
        """Tokens (B, N, D) -> what the head reads."""
        if self.readout == "cls":
            return self.fc_norm(tokens[:, 0])
        mean = self.fc_norm(tokens[:, self.prefix :].mean(dim=1))
        return mean if self.readout == "mean" else torch.cat([self.fc_norm(tokens[:, 0]), mean], dim=1)

    def layers(self):
        """Parts from input to head: (name, module) pairs."""
        blocks = [(f"block {i}", block) for i, block in enumerate(self.blocks)]
        return [("patches", self.patch_embed), *blocks, ("head", self.head)]

    def forward_head(self, tokens):
        """Tokens (B, N, D) -> logits (B, K), outside autocast: bf16 logits would tie scores artificially."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self.head(self.read(tokens).to(self.head.weight.dtype))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def build_vit(name, num_classes=2, img_size=224, **overrides):
    """A freshly initialised VisionTransformer of a named configuration (see CONFIGS).

    `overrides` replace keywords of the configuration. ValueError for an unknown name.
    """
    if name not in CONFIGS:
        raise InputError(f"unknown model {name!r}; known: {', '.join(CONFIGS)}")
    return VisionTransformer(
        **{**CONFIGS[name], "num_classes": num_classes, "img_size": img_size, **overrides}
    )
