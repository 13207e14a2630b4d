"""The solvers against a plain float64 oracle written here."""

import numpy as np
import pytest
import torch

from regmean import solve
from regmean.solve import (
    GPU_BLOCK_ELEMENTS,
    GPU_SQUARES,
    Cholesky,
    Inverse,
    Lstsq,
    SolveError,
    System,
    gpu_block_elements,
    scaled,
    system_bytes,
)
from regmean.triangular import LibraryFactor

MODEL_WEIGHTS = [0.25, 0.75]


def oracle(weights: list[np.ndarray], grams: list[np.ndarray], model_weights: list[float], alpha: float) -> np.ndarray:
    """argmin of the objective, in float64, by NumPy's SVD-based minimum-norm solution around the mean."""
    scaled = [scale(gram, alpha) for gram in grams]
    mean = sum(w * weight for w, weight in zip(model_weights, weights, strict=True))
    total = sum(w * gram for w, gram in zip(model_weights, scaled, strict=True))
    rhs = sum(s * (w - mean) @ g for s, w, g in zip(model_weights, weights, scaled, strict=True))
    # Equilibrated, so that the cut-off for zero singular values is the same for every input.
    diagonal = np.diag(total)
    root = np.where(diagonal > 0, 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1)), 0)
    delta = np.linalg.lstsq(total * root * root[:, None], (rhs * root).T, rcond=1e-12)[0].T * root
    return mean + delta


def scale(gram: np.ndarray, alpha: float) -> np.ndarray:
    return alpha * gram + (1 - alpha) * np.diag(np.diag(gram))


def objective(
    weight: np.ndarray, weights: list[np.ndarray], grams: list[np.ndarray], model_weights: list[float], alpha: float
) -> float:
    deltas = [weight - other for other in weights]
    return sum(s * np.trace(d @ scale(g, alpha) @ d.T) for s, d, g in zip(model_weights, deltas, grams, strict=True))


def problem(tokens: int, width: int = 48, outputs: int = 20, dead: int = 0, ratio: float = 1e6, models: int = 2):
    """Weights and Grams per token like a trained layer's: correlated inputs, diagonals spread over `ratio`."""
    generator = np.random.default_rng(7)
    spread = np.logspace(0, -0.5 * np.log10(ratio), width)
    mixing = generator.normal(size=(width, width)) * 0.3 + np.eye(width)
    grams, weights = [], []
    base = generator.normal(size=(outputs, width))
    for _ in range(models):
        x = (generator.normal(size=(tokens, width)) @ mixing + 1.0) * spread
        x[:, width - dead :] = 0.0
        grams.append((x.T @ x / tokens).astype(np.float32))
        weights.append((base + 0.1 * generator.normal(size=base.shape)).astype(np.float32))
    return weights, grams


def merge(weights, grams, model_weights, alpha: float, solver: str = "cholesky"):
    tensors = [torch.from_numpy(weight.copy()) for weight in weights]
    mean = sum(w * tensor for w, tensor in zip(model_weights, tensors, strict=True))
    system = System(lambda index: grams[index].copy(), [1] * len(grams), model_weights, solver)
    merged = system.regress(tensors, mean).solve(alpha)
    return merged.numpy().astype(np.float64), system.objectives[alpha], system.solvers[alpha]


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize(("tokens", "dead"), [(4000, 0), (60, 0), (10, 0), (4000, 5), (10, 5), (1, 0)])
@pytest.mark.parametrize("model_weights", [MODEL_WEIGHTS, [0.2, 0.3, 0.5]])
def test_cholesky_is_as_good_as_the_oracle(model_weights: list[float], tokens: int, dead: int, alpha: float) -> None:
    weights, grams = problem(tokens, dead=dead, models=len(model_weights))
    double = [w.astype(np.float64) for w in weights], [g.astype(np.float64) for g in grams], model_weights, alpha
    expected = oracle(*double)
    best = objective(expected, *double)
    mean = sum(w * weight for w, weight in zip(model_weights, double[0], strict=True))
    at_mean = objective(mean, *double)

    merged, values, solver = merge(weights, grams, model_weights, alpha)
    found = objective(merged, *double)
    # Both bounds are relative to the mean's objective: the oracle's own may be zero.
    assert found <= at_mean * (1 + 1e-6)
    assert found - best <= 1e-6 * at_mean
    assert values.mean == pytest.approx(at_mean, rel=1e-4)
    assert values.merged == pytest.approx(found, rel=1e-3, abs=1e-5 * at_mean)
    for value, weight in zip(values.inputs, double[0], strict=True):
        assert value == pytest.approx(objective(weight, *double), rel=1e-4)
    # Nor does it move along flat directions: the oracle has the shortest distance from the mean.
    assert np.linalg.norm(merged - mean) <= 1.001 * np.linalg.norm(expected - mean)
    if dead:
        np.testing.assert_allclose(merged[:, -dead:], mean[:, -dead:], rtol=1e-6)
    if alpha <= 0.9:
        assert solver.label == "cholesky float32"
    if alpha == 1.0 and tokens <= 10:
        assert "jitter" in solver.label


@pytest.mark.parametrize("solver", ["cholesky", "lstsq", "inverse"])
def test_every_solver_solves_a_regular_system(solver: str) -> None:
    weights, grams = problem(4000, ratio=100.0, models=3)
    model_weights = [0.2, 0.3, 0.5]
    expected = oracle(
        [w.astype(np.float64) for w in weights], [g.astype(np.float64) for g in grams], model_weights, 0.9
    )
    merged, _, _ = merge(weights, grams, model_weights, 0.9, solver)
    np.testing.assert_allclose(merged, expected, atol=2e-4)


def test_the_objective_at_each_of_three_models() -> None:
    weights, grams = problem(4000, models=3)
    double = [w.astype(np.float64) for w in weights], [g.astype(np.float64) for g in grams], [0.2, 0.3, 0.5], 0.9
    _, values, _ = merge(weights, grams, [0.2, 0.3, 0.5], 0.9)
    assert values.inputs == pytest.approx([objective(weight, *double) for weight in double[0]], rel=1e-4)


@pytest.mark.parametrize(("models", "reads", "products"), [(2, 1, 1), (3, 4, 3)])
def test_of_two_models_grams_are_read_once_and_multiplied_once(
    monkeypatch: pytest.MonkeyPatch, models: int, reads: int, products: int
) -> None:
    """For more models, Grams are read per block and multiplied one by one; results equal those of one block."""
    weights, grams = problem(4000, ratio=100.0, models=models)
    model_weights, read, multiplied = [1 / models] * models, [], []
    whole, _, _ = merge(weights, grams, model_weights, 0.9)

    def read_gram(index: int) -> np.ndarray:
        read.append(index)
        return 7 * grams[index]

    exact = solve.Regression.add
    monkeypatch.setattr(solve.Regression, "add", lambda *taken: multiplied.append(1) or exact(*taken))
    system = System(read_gram, [7] * models, model_weights, "cholesky")
    for start in range(0, 20, 5):
        rows = [torch.from_numpy(weight[start : start + 5].copy()) for weight in weights]
        merged = system.regress(rows, sum(rows) / models).solve(0.9)
        np.testing.assert_allclose(merged.numpy(), whole[start : start + 5], atol=1e-5)
    assert read == reads * list(range(models))
    assert len(multiplied) == 4 * products


def test_alpha_zero_is_the_diagonal_formula() -> None:
    weights, grams = problem(500)
    a, b = (w * np.diag(gram).astype(np.float64) for w, gram in zip(MODEL_WEIGHTS, grams, strict=True))
    merged, _, _ = merge(weights, grams, MODEL_WEIGHTS, 0.0)
    np.testing.assert_allclose(merged, (weights[0] * a + weights[1] * b) / (a + b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_equal_grams_give_the_mean(alpha: float) -> None:
    weights, grams = problem(4000, ratio=100.0)
    merged, _, _ = merge(weights, [grams[0], grams[0]], MODEL_WEIGHTS, alpha)
    np.testing.assert_allclose(merged, MODEL_WEIGHTS[0] * weights[0] + MODEL_WEIGHTS[1] * weights[1], atol=2e-5)


@pytest.mark.parametrize("solver", ["cholesky", "lstsq", "inverse"])
def test_identical_models_merge_to_themselves(solver: str) -> None:
    weights, grams = problem(4000)
    merged, values, _ = merge([weights[0], weights[0]], grams, [0.5, 0.5], 0.9, solver)
    np.testing.assert_array_equal(merged, weights[0])
    assert (values.mean, values.merged) == (0.0, 0.0)


def test_the_order_of_the_models_does_not_matter() -> None:
    weights, grams = problem(4000, ratio=100.0, models=3)
    forward, _, _ = merge(weights, grams, [0.2, 0.3, 0.5], 0.9)
    backward, _, _ = merge(weights[::-1], grams[::-1], [0.5, 0.3, 0.2], 0.9)
    np.testing.assert_allclose(forward, backward, atol=1e-5)


@pytest.mark.parametrize("solver", ["lstsq", "inverse"])
def test_a_singular_gram_is_refused_by_the_published_solvers(solver: str) -> None:
    weights, _ = problem(10)
    with pytest.raises(SolveError, match=r"singular.*--solver cholesky"):
        merge(weights, [np.ones((48, 48), np.float32)] * 2, MODEL_WEIGHTS, 1.0, solver)


@pytest.mark.parametrize("solver", ["lstsq", "inverse"])
def test_a_solution_far_from_the_models_is_refused(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of two models along lines that are nearly one: the residual is small, the solution 1 / angle away."""
    angle, weights = 2e-3, [np.float32([[1.0, 0.0]]), np.float32([[0.0, 0.0]])]
    lines = [np.array([1.0, 0.0]), np.array([np.cos(angle), np.sin(angle)])]
    grams = [np.outer(line, line).astype(np.float32) for line in lines]
    with pytest.raises(SolveError, match=rf"{solver}.* by \d+ times the models' difference.*use --solver cholesky"):
        merge(weights, grams, [0.5, 0.5], 1.0, solver)
    monkeypatch.setattr(solve, "FARTHEST", np.inf)
    far, *_ = merge(weights, grams, [0.5, 0.5], 1.0, solver)
    np.testing.assert_allclose(far, [[1.0, -1 / np.tan(angle)]], rtol=0.1)


def test_a_solution_that_does_not_solve_the_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, grams = problem(4000)
    exact = Lstsq.solve
    merge(weights, grams, MODEL_WEIGHTS, 0.9, "lstsq")
    monkeypatch.setattr(Lstsq, "solve", lambda self, rhs: exact(self, rhs) * 1.1)
    with pytest.raises(SolveError, match=r"residual of 0\.1 .*--solver cholesky"):
        merge(weights, grams, MODEL_WEIGHTS, 0.9, "lstsq")
    monkeypatch.setattr(Lstsq, "solve", lambda self, rhs: rhs * np.nan)
    with pytest.raises(SolveError, match="residual of nan"):
        merge(weights, grams, MODEL_WEIGHTS, 0.9, "lstsq")


def test_float64_is_used_when_float32_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, grams = problem(10)
    monkeypatch.setattr(solve, "ATTEMPTS", ((torch.float32, 0.0), (torch.float64, 1e-5)))
    merged, _, used = merge(weights, grams, MODEL_WEIGHTS, 1.0)
    assert used.label == "cholesky float64 jitter 1e-05"
    assert np.isfinite(merged).all()


def test_a_matrix_that_is_no_gram_is_refused() -> None:
    total = torch.tensor([[1.0, 5.0], [5.0, 1.0]])
    with pytest.raises(SolveError, match="positive semi-definite"):
        Cholesky(total, 1.0)


def test_the_condition_number_is_estimated() -> None:
    _, grams = problem(4000, ratio=10.0)
    total = torch.from_numpy(grams[0])
    system = scaled(total, 0.9).double().numpy()
    root = 1 / np.sqrt(np.diag(system))
    assert Cholesky(total, 0.9).condition == pytest.approx(np.linalg.cond(system * root * root[:, None]), rel=0.3)
    assert Inverse(total, 0.9).condition == pytest.approx(np.linalg.cond(system, 1), rel=1e-3)
    assert Lstsq(total, 0.9).condition is None


@pytest.mark.parametrize("panel", [7, 512])
def test_a_quadratic_form_is_summed_in_panels(monkeypatch: pytest.MonkeyPatch, panel: int) -> None:
    monkeypatch.setattr(solve, "PANEL", panel)
    weights, grams = problem(4000)
    whole, diagonal = solve._quadratic_form(torch.from_numpy(weights[0]), torch.from_numpy(grams[0]))
    delta, gram = weights[0].astype(np.float64), grams[0].astype(np.float64)
    assert whole == pytest.approx(np.trace(delta @ gram @ delta.T), rel=1e-5)
    assert diagonal == pytest.approx(np.trace(delta @ scale(gram, 0.0) @ delta.T), rel=1e-5)


def test_of_a_quadratic_form_one_number_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "PANEL", 7)
    weights, grams = problem(4000)
    exact, read = torch.Tensor.item, []
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: read.append(tensor.dtype) or exact(tensor))
    solve._quadratic_form(torch.from_numpy(weights[0]), torch.from_numpy(grams[0]))
    assert read == 2 * [torch.float64]  # and one of the diagonal


@pytest.mark.parametrize("alpha", [0.1, 1.0])
@pytest.mark.parametrize("tokens", [4000, 10])
def test_the_factor_of_a_gpu_gives_the_same_merge(monkeypatch: pytest.MonkeyPatch, tokens: int, alpha: float) -> None:
    """Same merge also with jitter, for a singular system."""
    weights, grams = problem(tokens)
    expected, values, solver = merge(weights, grams, MODEL_WEIGHTS, alpha)
    monkeypatch.setattr(solve, "factor_on", lambda device: LibraryFactor)
    found, gpu_values, gpu_solver = merge(weights, grams, MODEL_WEIGHTS, alpha)
    assert gpu_solver.label == solver.label and ("jitter" in solver.label) == (alpha == 1.0 and tokens == 10)
    assert gpu_solver.condition == pytest.approx(solver.condition, rel=0.05)
    assert gpu_values.merged == pytest.approx(values.merged, rel=1e-3, abs=1e-5 * values.mean)
    if tokens == 4000:
        assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


def test_a_gpu_solves_whole_weights_where_memory_holds_them() -> None:
    down, gate_and_up = 14336 * 4096, 4096 * 28672
    for inputs, elements in ((14336, down), (4096, gate_and_up)):
        # A large GPU on a large host, and both with 24 GB.
        assert gpu_block_elements(2, inputs, 1, 140 * 10**9, 128 * 10**9) == GPU_BLOCK_ELEMENTS > elements
        assert gpu_block_elements(2, inputs, 1, 24 * 10**9, 24 * 10**9) > elements
    # Two further alphas hold two further factors.
    one, three = (gpu_block_elements(2, 14336, alphas, 16 * 10**9, 10**12) for alphas in (1, 3))
    assert one - three == pytest.approx(2 * 14336**2 / 10, abs=1)
    held = system_bytes(2, [(14336, 10**9)], 3, three, GPU_SQUARES)
    assert held == pytest.approx(0.8 * 16e9, rel=1e-6)
    # With little host memory, and without GPU memory, it is the CPU's size.
    assert gpu_block_elements(2, 4096, 1, 140 * 10**9, 2 * 10**9) == 10**9 // 56
    assert gpu_block_elements(2, 14336, 1, 4 * 10**9, 128 * 10**9) == solve.BLOCK_ELEMENTS


@pytest.mark.parametrize("alike", [True, False])
def test_a_residual_is_estimated_from_random_sums_of_the_outputs(alike: bool) -> None:
    weights, grams = problem(4000, outputs=400, ratio=100.0)
    generator = np.random.default_rng(3)
    # The hardest case is the same error in all outputs: its signs may cancel in a sum.
    error = generator.normal(size=(400, 48))
    if alike:
        error = np.outer(error[:, 0], error[0])
    delta, total = weights[0] - weights[1], torch.from_numpy(grams[0])
    rhs = delta.astype(np.float64) @ scale(grams[0].astype(np.float64), 0.9) + 1e-3 * error
    norm, inner = solve._probed_residual(
        torch.from_numpy(rhs.astype(np.float32)), torch.from_numpy(delta), total, alpha=0.9
    )
    assert norm == pytest.approx(1e-3 * np.linalg.norm(error), rel=0.5)
    assert abs(inner - 1e-3 * np.vdot(delta, error)) < 1e-3 * np.linalg.norm(delta) * np.linalg.norm(error)


def test_one_bad_output_among_many_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, grams = problem(4000, outputs=400, ratio=100.0)
    exact = Lstsq.solve

    def spoilt(self: Lstsq, rhs: torch.Tensor) -> torch.Tensor:
        solution = exact(self, rhs).clone()
        solution[123] *= 2
        return solution

    monkeypatch.setattr(Lstsq, "solve", spoilt)
    with pytest.raises(SolveError, match="left a residual of"):
        merge(weights, grams, MODEL_WEIGHTS, 0.9, "lstsq")
