"""Mathematics of the asymmetric RegMean, compared with float64 and whole matrices."""

import pytest
import torch

from regmean.layerwise.asymmetric import AsymmetricSystem, Errors, Moments, has_few_outputs

ALPHA, RIDGE = 0.7, 1e-3
WEIGHTS, TOKENS, INPUTS, OUTPUTS = [0.2, 0.3, 0.5], [50, 70, 90], 12, 5


@pytest.mark.parametrize("few_outputs", [False, True])
def test_solution_and_objective_equal_float64(few_outputs: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(OUTPUTS, INPUTS, generator=generator) for _ in TOKENS]
    mean = sum(weight * own for weight, own in zip(WEIGHTS, rows, strict=True))
    own_inputs = [torch.randn(count, INPUTS, generator=generator) for count in TOKENS]
    merged_inputs = [x + 0.3 * torch.randn(x.shape, generator=generator) for x in own_inputs]
    parts = [slice(0, 3), slice(3, OUTPUTS)]

    system = AsymmetricSystem(
        ALPHA, RIDGE, lambda: (([own[part].clone() for own in rows], mean[part]) for part in parts)
    )
    for index, weight in enumerate(WEIGHTS):
        blocks = [(rows[index][part], mean[part]) for part in parts]
        sums = Errors(blocks) if few_outputs else Moments(INPUTS, torch.device("cpu"))
        for part in (slice(0, 20), slice(20, None)):
            sums.add(merged_inputs[index][part], own_inputs[index][part])
        sums.sums()
        system.add(index, weight, sums, TOKENS[index])
    solved, objective, _ = system.solve()

    def value(candidate: torch.Tensor) -> float:
        total = 0.0
        for weight, h, x, own in zip(WEIGHTS, merged_inputs, own_inputs, rows, strict=True):
            h, x, own = h.double(), x.double(), own.double()
            whole = (h @ candidate.T - x @ own.T).square().sum()
            # (tokens, outputs, inputs): each input alone.
            single = (h[:, None] * candidate - x[:, None] * own).square().sum()
            total += weight * (ALPHA * whole + (1 - ALPHA) * single) / len(h)
        return float(total)

    scale = torch.full((INPUTS, INPUTS), ALPHA, dtype=torch.float64).fill_diagonal_(1.0)
    zipped = list(zip(WEIGHTS, merged_inputs, own_inputs, rows, strict=True))
    gram = sum(weight / len(h) * scale * (h.double().T @ h.double()) for weight, h, _, _ in zipped)
    rhs = sum(weight / len(h) * own.double() @ (scale * (x.double().T @ h.double())) for weight, h, x, own in zipped)
    damped = gram + RIDGE * gram.diagonal().mean() * torch.eye(INPUTS, dtype=torch.float64)
    expected = mean.double() + torch.linalg.solve(damped, (rhs - mean.double() @ gram).T).T
    assert ((torch.cat(solved) - expected).norm() / (expected - mean).norm()).item() < 1e-5
    assert objective.mean == pytest.approx(value(mean.double()), rel=1e-5)
    assert objective.merged == pytest.approx(value(expected), rel=1e-5)
    assert objective.inputs == pytest.approx([value(own.double()) for own in rows], rel=1e-5)


def test_layers_of_few_outputs_are_those_that_the_cpu_sums_faster() -> None:
    cpu = torch.device("cpu")
    assert has_few_outputs(4096, 14336, cpu) and not has_few_outputs(4096, 4096, cpu)
    assert not has_few_outputs(4096, 14336, torch.device("cuda"))
