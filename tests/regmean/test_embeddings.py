"""Embedding tables by token counts, against dense solutions row by row in float64."""

import pytest
import torch

from regmean.average import weighted_mean
from regmean.embeddings import EVEN, TiedTable, merge_by_counts
from regmean.solve import SolveError

WIDTH, ROWS = 6, 9
WEIGHTS = {2: [0.3, 0.7], 3: [0.2, 0.5, 0.3]}
ALPHAS = [0.0, 0.1, 0.9]


def make(models: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Tables, frequencies and Grams of models; no model reads the last row, and only the first reads row 1."""
    generator = torch.Generator().manual_seed(models)
    base = torch.randn(ROWS, WIDTH, generator=generator)
    tables = [base + 0.1 * torch.randn(ROWS, WIDTH, generator=generator) for _ in range(models)]
    frequencies, grams = [], []
    for model in range(models):
        counts = torch.randint(0, 5, (ROWS,), generator=generator)
        counts[0], counts[1], counts[-1] = 3, 4 * (model == 0), 0
        frequencies.append(counts / counts.sum(dtype=torch.float64))
        states = torch.randn(40, WIDTH, generator=generator) + torch.linspace(0, 2, WIDTH)
        grams.append((states.double().T @ states.double() / 40).float())
    return tables, frequencies, grams


def scale(gram: torch.Tensor, alpha: float) -> torch.Tensor:
    return alpha * gram.double() + (1 - alpha) * torch.diag(gram.double().diagonal())


def tied(tables, frequencies, grams, weights, alphas) -> tuple[TiedTable, dict[float, torch.Tensor]]:
    """A tied table merged in two blocks of rows."""
    table, blocks, merged = TiedTable(grams, weights), (slice(0, 4), slice(4, ROWS)), {alpha: [] for alpha in alphas}
    for block in blocks:
        table.measure([each[block] for each in tables], [each[block] for each in frequencies])
    for block in blocks:
        rows = table.merge([each[block] for each in tables], [each[block] for each in frequencies], alphas)
        for alpha, values in zip(alphas, rows, strict=True):
            merged[alpha].append(values)
    return table, {alpha: torch.cat(values) for alpha, values in merged.items()}


def objective(table, tables, frequencies, grams, weights, factor=1.0) -> float:
    """The sum of both terms over models, written as defined."""
    value = 0.0
    for weight, own, frequency, gram in zip(weights, tables, frequencies, grams, strict=True):
        delta = table.double() - own.double()
        value += weight * (torch.trace(delta @ gram @ delta.T) + factor * (frequency @ delta.square().sum(1))).item()
    return value


@pytest.mark.parametrize("models", [2, 3])
def test_rows_by_counts_are_weighted_means(models: int) -> None:
    tables, frequencies, _ = make(models)
    weights = WEIGHTS[models]
    merged, values = merge_by_counts(tables, frequencies, weights)
    for row in range(ROWS):
        factors = [w * (f[row] + EVEN) for w, f in zip(weights, frequencies, strict=True)]
        expected = sum(c * v[row].double() for c, v in zip(factors, tables, strict=True)) / sum(factors)
        torch.testing.assert_close(merged[row], expected, rtol=0, atol=1e-14)
    mean = sum(w * v.double() for w, v in zip(weights, tables, strict=True))
    none = [torch.zeros(WIDTH, WIDTH, dtype=torch.float64)] * models
    expected = [objective(table, tables, frequencies, none, weights) for table in (mean, *tables, merged)]
    assert [values.mean, *values.inputs, values.merged] == pytest.approx(expected, rel=1e-9)
    assert values.merged < min(values.mean, *values.inputs)


@pytest.mark.parametrize("models", [2, 3])
def test_rows_of_a_tied_table_solve_their_systems(models: int) -> None:
    tables, frequencies, grams = make(models)
    weights = WEIGHTS[models]
    table, merged = tied(tables, frequencies, grams, weights, ALPHAS)
    mean = sum(w * v.double() for w, v in zip(weights, tables, strict=True))
    none = [torch.zeros_like(scale(gram, 1)) for gram in grams]
    for alpha in ALPHAS:
        own, beta = [scale(gram, alpha) for gram in grams], table.beta(alpha)
        # Both terms are equal at the mean.
        head, embedding = (
            objective(mean, tables, frequencies, of, weights, factor) for of, factor in ((own, 0), (none, beta))
        )
        assert head == pytest.approx(embedding, rel=1e-6)
        for row in range(ROWS):
            systems = [
                g + beta * f[row] * torch.eye(WIDTH, dtype=torch.float64) for g, f in zip(own, frequencies, strict=True)
            ]
            right = sum(w * (v[row].double() @ s) for w, v, s in zip(weights, tables, systems, strict=True))
            expected = torch.linalg.solve(sum(w * s for w, s in zip(weights, systems, strict=True)), right)
            torch.testing.assert_close(merged[alpha][row], expected, rtol=0, atol=1e-12)
        values = table.objective(alpha)
        tried = (mean, *tables, merged[alpha])
        expected = [objective(each, tables, frequencies, own, weights, beta) for each in tried]
        assert [values.mean, *values.inputs, values.merged] == pytest.approx(expected, rel=1e-6)
        assert values.merged < min(values.mean, *values.inputs)


def test_equal_models_and_unread_rows_stay_as_they_are() -> None:
    tables, frequencies, grams = make(3)
    weights = [0.1, 0.2, 0.7]
    same = [tables[0]] * 3
    assert torch.equal(merge_by_counts(same, frequencies, weights)[0].float(), tables[0])
    # With a singular Gram as well.
    for own in (grams, [torch.ones(WIDTH, WIDTH)] * 3):
        _, merged = tied(same, frequencies, own, weights, [0.9, 1.0])
        assert all(torch.equal(each.float(), tables[0]) for each in merged.values())
    mean = weighted_mean([each.flatten().numpy() for each in tables], weights).reshape(ROWS, WIDTH)
    merged, _ = merge_by_counts(tables, frequencies, weights)
    assert torch.equal(merged[-1].float(), torch.from_numpy(mean[-1]))
    assert not torch.equal(merged[0].float(), torch.from_numpy(mean[0]))


def test_a_tied_table_with_singular_or_damaged_grams() -> None:
    tables, frequencies, _ = make(2)
    state = torch.linspace(1, 2, WIDTH)
    dead = torch.outer(state, state)
    dead[0], dead[:, 0] = 0, 0
    _, merged = tied(tables, frequencies, [dead, 2 * dead], [0.5, 0.5], [1.0])
    difference = (tables[0] - tables[1]).abs().max()
    mean = (tables[0] + tables[1]).double() / 2
    assert (merged[1.0] - mean).abs().max() < 2 * difference
    # An input that is always zero, in a row that no text reads.
    assert torch.equal(merged[1.0][-1, 0], mean[-1, 0])
    with pytest.raises(SolveError, match="damaged"):
        tied(tables, frequencies, [2 - torch.eye(WIDTH), torch.eye(WIDTH)], [0.9, 0.1], [1.0])
