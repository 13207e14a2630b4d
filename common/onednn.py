"""Float32 matrix products by oneDNN, on processors where PyTorch's own take twice as long.

On the CPU, PyTorch has MKL multiply float32 matrices, and MKL uses AVX-512 on Intel's processors only. oneDNN, which
is part of PyTorch too, uses it on others: on two cores of an AMD Zen 5 it does nn.Linear's products at 400 to 500
GFLOP/s, and MKL at 220; on a Zen 4, which takes two steps for 512 bits, at 220 and 186.
"""

import functools
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

# Elements of the smallest weight that is worth it: oneDNN generates code for each new shape, in up to 3 ms.
LARGE = 1 << 18
# Rows of a weight, as they lie in memory, that a product is added by at a time: so its temporary arrays stay in the
# cache, and few shapes come up where sizes vary. Of many, code and arrays leave the C library's heap full of holes.
TILE = 2048


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """rows W^T + bias as `F.linear`, by oneDNN where that is faster, for weights that are not trained.

    Args:
        rows: (..., inputs); the gradient reaches them alone.
        weight: (outputs, inputs).
        bias: (outputs,), or None.

    Returns:
        (..., outputs).
    """
    if not _suits(rows, weight):
        return F.linear(rows, weight, bias)
    return _Linear.apply(rows, weight, bias)


def add_product(total: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, factor: float = 1.0) -> None:
    """total += factor rows W^T, by oneDNN where that is faster, without a gradient.

    Args:
        total: (rows, outputs), of the others' dtype.
        rows: (rows, inputs).
        weight: (outputs, inputs).
        factor: of the product.
    """
    if not _suits(rows, weight):
        total.addmm_(rows, weight.T, alpha=factor)
        return
    # Cut so that the pieces of the weight have no gaps between their rows either.
    if weight.is_contiguous():
        for part, piece in zip(total.split(TILE, dim=1), weight.split(TILE), strict=True):
            part.add_(_product(rows, piece, None), alpha=factor)
    else:
        for part, piece in zip(rows.split(TILE, dim=1), weight.split(TILE, dim=1), strict=True):
            total.add_(_product(part, piece, None), alpha=factor)


def use_onednn(model: nn.Module) -> None:
    """Have the model's nn.Linear layers compute by `linear` wherever their weights are not trained."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FrozenLinear


class FrozenLinear(nn.Linear):
    """An nn.Linear that computes by `linear` unless its weight is to be trained."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As nn.Linear's."""
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return super().forward(input)
        return linear(input, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return _product(rows, weight, bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _product(gradient, ctx.weight.T, None), None, None


def _suits(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and weight.numel() >= LARGE
        and rows.numel() > 0
        # A weight with gaps between its rows would take oneDNN a thousand times as long.
        and (weight.is_contiguous() or weight.T.is_contiguous())
        and is_faster()
    )


@functools.cache
def is_faster() -> bool:
    """Whether this processor has AVX-512 that MKL leaves unused."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()


def _product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # The operator that torch.compile puts in nn.Linear's place; PyTorch offers oneDNN's product of dense float32
    # tensors by no other name.
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
