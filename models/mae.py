"""The masked autoencoder (He et al. 2021, arXiv:2111.06377) that pretrain_mae.py trains."""

import torch
import torch.nn.functional as F
from torch import nn

from common.console import InputError, advice
from vit import Block, VisionTransformer


class MaskedAutoencoder(nn.Module):
    """Self-supervised pretraining (He et al. 2022, arXiv:2111.06377): the encoder sees a random share 1 -
    `mask_ratio` of the patches, a small decoder guesses the grey levels of the others, each patch scaled to
    mean 0 and variance 1.

    forward: images (B, C, H, W) -> float32 (B, 1), the mean squared error over each image's hidden patches.
    In eval mode the same patches of every image are hidden every time. `encoder` holds the keywords of the
    VisionTransformer.
    """

    kind = "mae"

    def __init__(self, encoder, mask_ratio=0.75, decoder_dim=128, decoder_depth=1, decoder_heads=4):
        super().__init__()
        self.config = dict(
            encoder=encoder,
            mask_ratio=mask_ratio,
            decoder_dim=decoder_dim,
            decoder_depth=decoder_depth,
            decoder_heads=decoder_heads,
        )
        self.encoder = VisionTransformer(**encoder)
        self.in_chans = self.encoder.in_chans
        self.encoder.head.requires_grad_(False)  # there are no classes here
        self.patches = self.encoder.grid_size[0] * self.encoder.grid_size[1]
        self.hidden = round(self.patches * mask_ratio)
        if not 0 < self.hidden < self.patches:
            raise InputError(
                f"mask ratio {mask_ratio} hides {self.hidden} of {self.patches} patches: enlarge --img-size"
                + advice("--masked-epochs", " or --masked-epochs 0")
                + advice("--mask-ratio", " or another --mask-ratio")
            )
        self.embed = nn.Linear(self.encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patches, decoder_dim))
        self.blocks = nn.ModuleList(
            Block(decoder_dim, decoder_heads, 4.0, 0.0, 0.0) for _ in range(decoder_depth)
        )
        self.norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.predict = nn.Linear(decoder_dim, self.encoder.patch_size**2)
        for p in (self.mask_token, self.pos_embed):
            nn.init.trunc_normal_(p, std=0.02)

    def forward(self, x):
        """Scaled images (B, C, H, W) -> the loss of the hidden patches of each image, float32 (B, 1)."""
        B = len(x)
        if self.training:
            order = torch.rand(B, self.patches, device=x.device).argsort(1)
        else:  # the same patches of every image, so that no loss depends on the batch an image is in
            fixed = torch.Generator().manual_seed(0)
            order = torch.rand(self.patches, generator=fixed).argsort().to(x.device).expand(B, -1)
        keep, hide = order[:, self.hidden :], order[:, : self.hidden]
        seen = self.embed(self.encoder.forward_features(x, keep=keep))  # (B, 1 + kept, decoder_dim)
        tokens = (
            self.mask_token.to(seen.dtype)
            .expand(B, self.patches, -1)
            .scatter(1, keep.unsqueeze(2).expand(-1, -1, seen.shape[2]), seen[:, 1:])
        )
        tokens = torch.cat([seen[:, :1], tokens], dim=1) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        index = hide.unsqueeze(2)
        guess = self.predict(
            self.norm(tokens[:, 1:].gather(1, index.expand(-1, -1, tokens.shape[2])))
        ).float()
        p = self.encoder.patch_size
        # The channels repeat one grey image, so the first is all there is to guess.
        target = F.unfold(x[:, :1].float(), p, stride=p).transpose(1, 2)
        target = target.gather(1, index.expand(-1, -1, target.shape[2]))
        var, mean = torch.var_mean(target, dim=2, keepdim=True)
        return (
            F.mse_loss(guess, (target - mean) / (var + 1e-6).sqrt(), reduction="none")
            .mean((1, 2))
            .unsqueeze(1)
        )
