"""Muon, an optimizer for matrices: each step is orthogonal, so that no direction of the gradient outshouts the others.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, with steps as long as AdamW's (Liu et al. 2025, "Muon is
scalable for LLM training", arXiv 2502.16982, equation 4), so that one learning rate serves both.
"""

from typing import Any

import torch

from common.ranks import Process

# Of the odd polynomial that five times over brings every singular value from 0.01 to 1 near 1 (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# Root mean square of AdamW's steps in units of the learning rate, as Liu et al. 2025 found it.
ADAMW_RMS = 0.2


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """U V^T of `matrix` = U S V^T, but for singular values of about 0.7 to 1.2 in place of 1: Newton-Schulz.

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
    """Muon for matrices and AdamW for all else, on whole tensors or on ZeRO's partitions of them.

    Args:
        groups: parameter groups as AdamW takes them. One with a `shape` holds a single matrix of that shape and is
            moved by Muon; with ZeRO each rank has an equal part of it there, flat, in the order of ranks.
        process: this rank.
        defaults: AdamW's. Its first beta is Muon's momentum, too.
    """

    def __init__(self, groups: list[dict[str, Any]], process: Process, **defaults: Any):
        super().__init__(groups, **defaults)
        self._process = process

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all parameters that have a gradient; for all ranks together."""
        moved = [(part, group) for group in self.param_groups if "shape" in group for part in group["params"]]
        gradients = [part.grad for part, _ in moved]
        for part, group in moved:
            self._move(part, group)
            # AdamW passes over what has no gradient.
            part.grad = None
        result = super().step(closure)
        # With its optimizer offloaded ZeRO fills the same gradients again.
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
