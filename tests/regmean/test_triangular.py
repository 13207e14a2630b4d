"""Factors in blocks against NumPy's in float64."""

import numpy as np
import pytest
import torch

from regmean import triangular
from regmean.triangular import Factor, LibraryFactor, factor_on


def system(size: int) -> np.ndarray:
    """Symmetric and positive definite, with a condition number of about 100."""
    rows = np.random.default_rng(size).normal(size=(2 * size, size))
    return rows.T @ rows / size + 0.1 * np.eye(size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "block"), [(1, 4), (4, 4), (5, 4), (61, 16), (64, 16), (30, 256)])
def test_a_factor_in_blocks_solves_the_system(
    monkeypatch: pytest.MonkeyPatch, size: int, block: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(triangular, "BLOCK", block)
    matrix, columns = system(size), np.random.default_rng(0).normal(size=(size, 3))
    given = torch.tensor(columns, dtype=dtype)
    solution = Factor(torch.tensor(matrix, dtype=dtype)).solve(given)
    expected = np.linalg.solve(matrix, columns)
    assert solution is given
    assert np.linalg.norm(solution.double().numpy() - expected) < (
        1e-5 if dtype == torch.float32 else 1e-12
    ) * np.linalg.norm(expected)


@pytest.mark.parametrize("bad", [0, 37])
def test_a_matrix_that_is_not_positive_definite_has_none(monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    monkeypatch.setattr(triangular, "BLOCK", 16)
    matrix = torch.eye(40)
    matrix[bad, bad] = -1.0
    with pytest.raises(ArithmeticError):
        Factor(matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 30, 300])
def test_the_factor_of_a_gpu_solves_the_system(size: int, dtype: torch.dtype) -> None:
    matrix, columns = system(size), np.random.default_rng(0).normal(size=(size, 3))
    given, given_columns = torch.tensor(matrix, dtype=dtype), torch.tensor(columns, dtype=dtype)
    solution = LibraryFactor(given).solve(given_columns)
    expected = np.linalg.solve(matrix, columns)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert solution.dtype == dtype
    assert np.linalg.norm(solution.double().numpy() - expected) < tolerance * np.linalg.norm(expected)
    blocks = Factor(given.clone()).solve(given_columns.clone())
    assert (solution - blocks).norm() < tolerance * blocks.norm()


def test_a_gpu_is_asked_once_whether_there_is_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, asked = torch.Tensor.item, []
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: asked.append(tensor.shape) or exact(tensor))
    LibraryFactor(torch.tensor(system(300), dtype=torch.float32)).solve(torch.ones(300, 2))
    assert asked == [()]
    matrix = torch.eye(40)
    matrix[37, 37] = -1.0
    with pytest.raises(ArithmeticError):
        LibraryFactor(matrix)


def test_the_device_decides_which_factor_is_taken() -> None:
    assert [factor_on(torch.device(name)) for name in ("cpu", "cuda:1")] == [Factor, LibraryFactor]
