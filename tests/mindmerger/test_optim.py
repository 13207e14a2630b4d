"""Muon against singular values in float64, and against PyTorch's own."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from common.ranks import Process
from mindmerger.optim import Muon, orthogonalised

ALONE = Process(0, 1, torch.device("cpu"))
DEFAULTS = {"lr": 1e-2, "betas": (0.8, 0.999), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("shape", [(6, 6), (5, 12), (12, 5), (1, 7)])
def test_orthogonalised_changes_singular_values_alone(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).normal(size=shape)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.sqrt((values**2).sum())
    assert values.min() > 0.01
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert values.min() > 0.6 and values.max() < 1.3
    expected = (left * values) @ right
    np.testing.assert_allclose(orthogonalised(torch.tensor(matrix)).numpy(), expected, rtol=1e-9, atol=1e-9)
    # For any size of the gradient.
    np.testing.assert_allclose(orthogonalised(torch.tensor(1e-6 * matrix)).numpy(), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(orthogonalised(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_steps_are_pytorchs_for_matrices_and_adamws_for_all_else(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix, bias = torch.randn(shape), torch.randn(5)
    gradients = [(torch.randn(shape), torch.randn(5)) for _ in range(6)]

    def moved(make: Callable[..., list[torch.optim.Optimizer]]) -> tuple[torch.Tensor, torch.Tensor]:
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in (matrix, bias)]
        optimizers = make(*parameters)
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            for optimizer in optimizers:
                optimizer.step()
        return tuple(parameter.detach() for parameter in parameters)

    def pytorchs(weight: torch.nn.Parameter, other: torch.nn.Parameter) -> list[torch.optim.Optimizer]:
        muon = torch.optim.Muon(
            [weight], lr=1e-2, weight_decay=0.1, momentum=0.8, nesterov=True, adjust_lr_fn="match_rms_adamw"
        )
        return [muon, torch.optim.AdamW([other], **DEFAULTS)]

    def ours(weight: torch.nn.Parameter, other: torch.nn.Parameter) -> list[torch.optim.Optimizer]:
        return [Muon([{"params": [weight], "shape": shape}, {"params": [other]}], ALONE, **DEFAULTS)]

    (our_matrix, our_bias), (their_matrix, their_bias) = moved(ours), moved(pytorchs)
    assert torch.equal(our_bias, their_bias)
    # PyTorch's iteration is in bfloat16.
    assert (our_matrix - their_matrix).norm() < 0.02 * (their_matrix - matrix).norm()
