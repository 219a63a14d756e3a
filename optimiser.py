"""What AdamW is given: the learning rate of each step, and which parameters decay."""

import math


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
