"""Optimizers of the mapping and their learning rate: AdamW as published, and Muon for the two matrices.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes each step of a matrix orthogonal, so that all
directions of the gradient have equal weight. Its steps have the RMS of AdamW's (Liu et al. 2025, "Muon is scalable for
LLM training", arXiv 2502.16982, equation 4), so that both use the same learning rate.
"""

from typing import Any

import torch
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from common.ranks import Process
from mindmerger.modeling import Mapping

# Odd polynomial that, applied five times, brings singular values from 0.01 to 1 near 1 (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# Root mean square of AdamW's steps in units of the learning rate, as measured by Liu et al. 2025.
ADAMW_RMS = 0.2

# Betas, eps and weight decay of the published AdamW.
DEFAULTS = {"betas": (0.8, 0.999), "eps": 1e-8, "weight_decay": 3e-7}


def make_optimizer(name: str, mapping: Mapping, lr: float, boundary_lr: float, process: Process) -> torch.optim.AdamW:
    """Build the optimizer of the mapping.

    Args:
        name: "adamw", or "muon" for the two matrices.
        mapping: module to train.
        lr: peak learning rate of all parameters but the boundary.
        boundary_lr: peak learning rate of the boundary.
        process: this rank.
    """
    boundary = {"params": [mapping.end_boundary], "lr": boundary_lr}
    if name == "adamw":
        return torch.optim.AdamW([{"params": list(mapping.mlp.parameters()), "lr": lr}, boundary], **DEFAULTS)
    layers = (mapping.mlp.linear1, mapping.mlp.linear2)
    matrices = [
        {"params": [layer.weight], "lr": lr, "shape": (layer.out_features, layer.in_features)} for layer in layers
    ]
    biases = {"params": [layer.bias for layer in layers], "lr": lr}
    return Muon([*matrices, biases, boundary], process, **DEFAULTS)


def make_schedule(
    name: str, optimizer: torch.optim.Optimizer, warmup: int, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Build the schedule of `steps` steps: a linear rise over `warmup` steps, then constant or a cosine."""
    if name == "cosine":
        return get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    return get_constant_schedule_with_warmup(optimizer, warmup)


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Approximate U V^T of `matrix` = U S V^T by Newton-Schulz, with singular values of about 0.7 to 1.2.

    Args:
        matrix: [rows, columns], float32 or float64.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    wide = wide / wide.norm().clamp(min=1e-12)
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if tall else wide


class Muon(torch.optim.AdamW):
    """Muon for matrices and AdamW for other parameters, on whole tensors or on ZeRO's partitions.

    Args:
        groups: parameter groups of AdamW. A group with a `shape` has a single matrix of that shape, which Muon
            updates; under ZeRO it has this rank's equal, flat part of the matrix, in the order of ranks.
        process: this rank.
        defaults: AdamW's defaults. Its first beta is also Muon's momentum.
    """

    def __init__(self, groups: list[dict[str, Any]], process: Process, **defaults: Any):
        super().__init__(groups, **defaults)
        self._process = process

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient; a collective operation of all ranks."""
        moved = [(part, group) for group in self.param_groups if "shape" in group for part in group["params"]]
        gradients = [part.grad for part, _ in moved]
        for part, group in moved:
            self._move(part, group)
            # AdamW skips parameters without a gradient.
            part.grad = None
        result = super().step(closure)
        # With an offloaded optimizer, ZeRO fills the same gradient tensors again.
        for (part, _), gradient in zip(moved, gradients, strict=True):
            part.grad = gradient
        return result

    def _move(self, part: torch.Tensor, group: dict[str, Any]) -> None:
        state, beta = self.state[part], group["betas"][0]
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(part)}
        state["step"] += 1
        state["exp_avg"].lerp_(part.grad, 1 - beta)
        # Nesterov's momentum.
        direction = part.grad.lerp(state["exp_avg"], beta).flatten()
        whole = self._process.concatenate(direction.to(self._process.device))
        rows, columns = group["shape"]
        matrix = whole[: rows * columns].view(rows, columns)
        matrix.copy_(orthogonalised(matrix))
        own = whole[self._process.rank * len(direction) :][: len(direction)].view_as(part).to(part.device)
        part.mul_(1 - group["lr"] * group["weight_decay"])
        part.add_(own, alpha=-group["lr"] * ADAMW_RMS * max(rows, columns) ** 0.5)
