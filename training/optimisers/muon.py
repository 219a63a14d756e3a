"""Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
https://kellerjordan.github.io/posts/muon/): momentum, made orthogonal, for the matrices of attention and MLP.

torch.optim.Muon is the same algorithm. It always multiplies in bfloat16, though, which a CPU without such
instructions emulates, at eighteen times the time (docs/MODELS.md). This one needs no newer torch than the
rest, treats fused queries, keys and values as three matrices, and takes all matrices of one shape at once.
"""

import re

import torch
from torch import nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic; chosen by Jordan for a steep slope at 0
ITERATIONS = 5
EPSILON = 1e-7
MOMENTUM = 0.95
UPDATE_RMS = 0.2  # that of AdamW's updates, as Liu et al. 2025 (arXiv:2502.16982) measured it

# Layers of attention and MLP, by the name of a part of the model that holds them: those of vit.py and timm,
# and "read", the cross-attention of the hybrid.
INNER = re.compile(r"(^|\.)(\w*attn\w*|xca|mlp|read)\.")
FUSED = {"qkv": 3, "kv": 2}  # layers that hold so many matrices, one above the other


def hidden_matrices(model):
    """The matrices of attention and MLP that are trained: {id(parameter): (name, how many matrices it
    holds)}. Convolutions, embeddings, positions, tokens and the head are none."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not INNER.search(name):
            continue
        if module.weight.requires_grad:
            parts = FUSED.get(name.rpartition(".")[2], 1)
            found[id(module.weight)] = (f"{name}.weight", parts)
    return found


def orthogonal(matrices):
    """The nearest matrices with orthonormal rows or columns, about: float [N, A, B] -> the same shape and
    type, with singular values of about 0.7 to 1.2, by five Newton-Schulz iterations. 0 stays 0."""
    a, b, c = COEFFICIENTS
    # The smaller side makes the products: fewer operations.
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    # No singular value may exceed 1; the Frobenius norm is no smaller than the largest.
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for parameters of two dimensions.

    A group has "lr", "weight_decay", and "parts": how many matrices, one above the other, each parameter
    holds. Every update of a matrix has root mean square 0.2 times the rate, as AdamW's has about (torch's
    adjust_lr_fn="match_rms_adamw"), so that AdamW's rates and weight decay fit. `bf16`: multiply in bfloat16,
    else in float32."""

    def __init__(self, groups, lr, bf16=False):
        super().__init__(groups, dict(lr=lr, weight_decay=0.0, parts=1))
        self.product_type = torch.bfloat16 if bf16 else torch.float32

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # All matrices of one shape go through the iterations at once.
            alike = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.shape, []).append(p)
            for parameters in alike.values():
                self._update(parameters, group)
        return loss

    def _update(self, parameters, group):
        """Update `parameters` of one shape."""
        parts = group["parts"]
        directions = torch.cat([self._momentum(p).unflatten(0, (parts, -1)) for p in parameters])
        updates = orthogonal(directions.to(self.product_type)).to(directions.dtype)
        # An orthogonal matrix of A x B has root mean square 1 / sqrt(max(A, B)).
        rate = group["lr"] * UPDATE_RMS * max(updates.shape[1:]) ** 0.5
        for p, update in zip(parameters, updates.split(parts)):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update.flatten(0, 1), alpha=-rate)

    def _momentum(self, p):
        """The direction of a parameter's next update: its gradient, and the average of those so far."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        average = state["momentum_buffer"].lerp_(p.grad, 1 - MOMENTUM)
        return p.grad.lerp(average, MOMENTUM)


class Joined:
    """Several optimisers, each for parameters of its own, used as one."""

    def __init__(self, *optimisers):
        self.optimisers = optimisers

    @property
    def param_groups(self):
        """The groups of all, as they are: a rate that is set here is set."""
        return [group for optimiser in self.optimisers for group in optimiser.param_groups]

    def zero_grad(self, set_to_none=True):
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none)

    def step(self):
        for optimiser in self.optimisers:
            optimiser.step()

    def state_dict(self):
        """{"joined": [the state of each]}."""
        return {"joined": [optimiser.state_dict() for optimiser in self.optimisers]}

    def load_state_dict(self, state):
        """Go on from what `state_dict` gave. KeyError or ValueError if it is another's."""
        for optimiser, own in zip(self.optimisers, state["joined"], strict=True):
            optimiser.load_state_dict(own)
