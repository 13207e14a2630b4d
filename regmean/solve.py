"""RegMean's mathematics, apart from files and models.

Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models" (ICLR 2023), section 4: for one linear
layer, with inputs X_i and weights W_i of models i, find the W closest to all of them in what the layer puts out,

    minimise  f(W) = sum_i w_i ||X_i W - X_i W_i||^2 / n_i  =  sum_i w_i tr((W - W_i)^T G_i (W - W_i)),

where G_i = X_i^T X_i / n_i is the Gram per token and w_i the model's weight. Off-diagonals of every G_i are first
scaled by alpha (their equation 3's shrinking towards the diagonal). Around the weighted mean M, the solution is

    W = M + G^-1 sum_i w_i G_i (W_i - M),    G = sum_i w_i G_i.

It equals the published form G^-1 sum_i w_i G_i W_i, but rounds a correction where that one rounds the whole weight,
and where G says nothing (an input that is always zero) the mean stays.

The layers' weights are here as nn.Linear keeps them, `rows` of shape (outputs, inputs): independent problems of one
matrix G. `System` solves them block by block; `model_weights` are the w_i, which sum to 1.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from regmean.triangular import factor_on

# Elements per model of the outputs solved at a time: 28 MB in float32. From 32 MB on, the C library requests the memory
# of every array from the system, page by page.
BLOCK_ELEMENTS = 7 << 20
# Maximum on a GPU, which small blocks leave idle: whole weights, if they fit into memory.
GPU_BLOCK_ELEMENTS = 1 << 28
# Fractions of the free memory that blocks may fill: of a GPU's, and of the host's.
GPU_PART, HOST_PART = 0.8, 0.5
# Square matrices beside a factor for each alpha: the sum of Grams, and one more Gram or the difference of two; on a GPU
# also the system in float64 and its factor's other half, and a copy of the factor.
SQUARES, GPU_SQUARES = 2, 6
# The same if several systems are solved side by side, where a block needs no reading of Grams.
SIDE_BY_SIDE_BLOCK_ELEMENTS = 1 << 19
# Tried in turn until the factorisation succeeds; the jitter is relative to the equilibrated diagonal of ones.
ATTEMPTS = tuple((dtype, jitter) for dtype in (torch.float32, torch.float64) for jitter in (0.0, 1e-5, 1e-4, 1e-3))
# Relative residuals |R - D G| / |R|: target of a Cholesky solution's refinement, and maximum for any solution.
REFINED_RESIDUAL = 1e-4
ACCEPTED_RESIDUAL = 1e-2
# Random combinations of the outputs that a residual is first estimated from, and how far below REFINED_RESIDUAL that
# estimate must lie; else the whole residual is computed. With 16, an estimate is a third of the truth or less once in
# 300,000 times where all outputs err alike, and else more rarely still.
PROBES = 16
PROBE_MARGIN = 1 / 3
# Distance from the mean at which a solution without refinement is refused, in differences of the models. On nearly
# singular Grams it is hundreds although the residual is small, and 20 with the default solver.
FARTHEST = 100
# Tokens of the sum over all experts that are added to each expert's, for each input of the projection: few enough to
# change nothing in an expert with many tokens, and enough to decide where one has none.
POOLED = 1 / 8
PANEL = 1024  # rows and columns of a tile of an inner product matrix that is never held whole
SINGULAR = "the scaled Gram is singular; use --solver cholesky, or a smaller --alpha"


class SolveError(Exception):
    """The system could not be solved; the message gives the reason, not the layer."""


def scaled(total: torch.Tensor, alpha: float) -> torch.Tensor:
    """A copy of the Gram G with off-diagonals times alpha; an input that is always zero gets a one on the diagonal.

    Such an input's right-hand side is zero too, so the one leaves its weights at the mean.
    """
    diagonal = total.diagonal()
    system = total * alpha
    system.diagonal().copy_(torch.where(diagonal > 0, diagonal, 1.0))
    return system


class Cholesky:
    """The default solver: Cholesky factor of the system, equilibrated to a diagonal of ones.

    float32 first. Where the matrix is singular to float32 (alpha near 1 with fewer tokens than inputs) jitter is added
    and its effect refined away against the true matrix.

    `label` has the dtype and jitter used, `condition` an estimate of the equilibrated system's condition number.

    Raises:
        SolveError: every attempt failed, so the matrix is far from positive semi-definite.
    """

    refinements = 5

    def __init__(self, total: torch.Tensor, alpha: float):
        if not any(self._factorise(total, alpha, dtype, jitter) for dtype, jitter in ATTEMPTS):
            raise SolveError("the Gram is not positive semi-definite, as no sum of x x^T can be: its file is damaged")

    def _factorise(self, total: torch.Tensor, alpha: float, dtype: torch.dtype, jitter: float) -> bool:
        """True if there is a factor in this dtype with this jitter."""
        self._factor = None  # frees that of an attempt before
        system = scaled(total, alpha).to(dtype)
        self._scale = system.diagonal().rsqrt()
        system.mul_(self._scale).mul_(self._scale[:, None])
        system.diagonal().fill_(1 + jitter)
        largest = _largest_eigenvalue(system.matmul, self._scale)
        try:
            self._factor = factor_on(system.device)(system)
        except ArithmeticError:
            return False
        del system  # one factor is in this memory, and the other has its own
        self.condition: float | None = largest * _largest_eigenvalue(self._factor.solve, self._scale)
        self.label = f"cholesky {str(dtype).removeprefix('torch.')}" + (f" jitter {jitter:g}" if jitter else "")
        # As in LAPACK's posvx, the factor of a matrix that is singular to working precision is not used.
        return jitter > 0 or self.condition < 1 / torch.finfo(dtype).eps

    def solve(self, rhs: torch.Tensor) -> torch.Tensor:
        """D with D G = rhs, both (outputs, inputs)."""
        columns = (rhs * self._scale).T.contiguous()
        return self._factor.solve(columns).T.contiguous().mul_(self._scale).to(rhs.dtype)


class Lstsq:
    """The published solver, `torch.linalg.lstsq`, with the driver named.

    torch's default on the CPU, gelsy, cuts these matrices to a low rank. gels assumes full rank, and does not say
    where that fails.
    """

    label = "lstsq gels"
    refinements = 0
    condition: float | None = None

    def __init__(self, total: torch.Tensor, alpha: float):
        self._system = scaled(total, alpha)

    def solve(self, rhs: torch.Tensor) -> torch.Tensor:
        """D with D G = rhs; gels reports a singular matrix only if it is exactly singular after rounding."""
        try:
            return torch.linalg.lstsq(self._system, rhs.T, driver="gels").solution.T
        except torch.linalg.LinAlgError as error:
            raise SolveError(SINGULAR) from error


class Inverse:
    """The paper's original: the explicit inverse."""

    label = "inverse"
    refinements = 0

    def __init__(self, total: torch.Tensor, alpha: float):
        system = scaled(total, alpha)
        self._inverse, singular = torch.linalg.inv_ex(system)
        if singular:
            raise SolveError(SINGULAR)
        self.condition: float | None = (torch.linalg.norm(system, 1) * torch.linalg.norm(self._inverse, 1)).item()

    def solve(self, rhs: torch.Tensor) -> torch.Tensor:
        """D with D G = rhs."""
        return rhs @ self._inverse.T


SOLVERS: dict[str, type] = {"cholesky": Cholesky, "lstsq": Lstsq, "inverse": Inverse}


@dataclass
class Objective:
    """Values of f, in float64: at the mean, at each model's weights, and at the merge."""

    mean: float = 0.0
    inputs: list[float] = field(default_factory=list)
    merged: float = 0.0

    def add(self, other: "Objective") -> None:
        """Add the values of further outputs of the same layers."""
        self.mean += other.mean
        self.merged += other.merged
        self.inputs = [a + b for a, b in zip(self.inputs or [0.0] * len(other.inputs), other.inputs, strict=True)]


@dataclass(eq=False)
class System:
    """The regression of all layers that share one input, solved block by block of their outputs, for any alpha.

    Of two models the Grams are read once and kept as their sum and their difference: with D_i = W_i - M,
    w_1 D_1 + w_2 D_2 = 0, so that sum_i w_i D_i G_i = w_1 D_1 (G_1 - G_2), one product in place of two. Of more they
    are read again for each block, one at a time: keeping every model's Gram would take more memory than all else.
    `solvers` and `objectives` are by alpha, the latter summed over all blocks.

    Args:
        read: returns the sum of x x^T of a model by its index: float32 (inputs, inputs), which may be overwritten.
        tokens: the token count of each of these sums.
        model_weights: w_i, summing to 1.
        solver: a name of `SOLVERS`.
        for_each: the `map` that calls `read`, possibly for several models at once.
    """

    read: Callable[[int], np.ndarray | torch.Tensor]
    tokens: list[int]
    model_weights: list[float]
    solver: str
    for_each: Callable[..., Iterator] = map
    solvers: dict[float, Any] = field(default_factory=dict)
    objectives: dict[float, Objective] = field(default_factory=dict)
    total: torch.Tensor | None = None
    _difference: torch.Tensor | None = None

    def regress(self, rows: list[torch.Tensor], mean: torch.Tensor) -> "Regression":
        """The regression of a block of outputs; `rows` are each model's weights, float32 (outputs, inputs), overwritten
        by their differences to `mean`, the weighted mean, which is on the device that solves.
        """
        regression = Regression(self, rows, mean)
        if len(rows) == 2:
            if self._difference is None:
                # Threads only read: PyTorch would start a thread pool in each.
                grams = self.for_each(self.read, range(2))
                first, second = (self._per_token(gram, index, mean.device) for index, gram in enumerate(grams))
                self._difference = first.sub_(second)
                self.total = second.add_(self._difference, alpha=self.model_weights[0])
            regression.add(self._difference)
            return regression
        is_first = self.total is None
        for index, weight in enumerate(self.model_weights):
            gram = self._per_token(self.read(index), index, mean.device)
            if is_first:
                self.total = torch.zeros_like(gram) if index == 0 else self.total
                self.total.add_(gram, alpha=weight)
            regression.add(gram, index)
            del gram
        return regression

    def solver_for(self, alpha: float) -> Any:
        """One of `SOLVERS`, made from the sum of the Grams.

        Raises:
            SolveError: the system has no factor.
        """
        if alpha not in self.solvers:
            self.solvers[alpha] = SOLVERS[self.solver](self.total, alpha)
        return self.solvers[alpha]

    def _per_token(self, gram: np.ndarray | torch.Tensor, index: int, device: torch.device) -> torch.Tensor:
        return torch.as_tensor(gram, device=device).div_(self.tokens[index])


def block_elements(models: int, side_by_side: bool) -> int:
    """Elements per model of the outputs that a system is solved for at a time."""
    return SIDE_BY_SIDE_BLOCK_ELEMENTS if side_by_side and models == 2 else BLOCK_ELEMENTS


def gpu_block_elements(models: int, inputs: int, alphas: int, free: int, free_host: int) -> int:
    """Elements per model of the outputs solved at a time on a GPU; `free` bytes there, `free_host` on the host."""
    there = (GPU_PART * free - 4 * (GPU_SQUARES + alphas) * inputs**2) / (4 * (models + 8))
    # On the host: each model's values, those of two being decoded, their mean, and the merged values being encoded.
    here = HOST_PART * free_host / (4 * (models + 12))
    return max(BLOCK_ELEMENTS, min(GPU_BLOCK_ELEMENTS, int(there), int(here)))


def system_bytes(models: int, systems: list[tuple[int, int]], alphas: int, block: int, squares: int = SQUARES) -> int:
    """Peak bytes of arrays of a `System` of any of these (inputs, outputs), with blocks of outputs of `block`
    elements.
    """
    # For a block: one array for each model, and eight in the solver.
    sizes = (
        4 * ((squares + alphas) * inputs**2 + (models + 8) * min(block, inputs * outputs))
        for inputs, outputs in systems
    )
    return max(sizes, default=0)


class Regression:
    """Right-hand sides and objectives of some outputs, shared by all alphas.

    All are kept for whole Grams and for their diagonals alone. The value at alpha is alpha times the first plus
    (1 - alpha) times the second. Arguments are those of `System.regress`.
    """

    def __init__(self, system: System, rows: list[torch.Tensor], mean: torch.Tensor):
        self._system = system
        self._mean = mean
        # The second of two is a multiple of the first.
        self._deltas = [row.sub_(mean) for row in (rows[:1] if len(rows) == 2 else rows)]
        self._model_weights = system.model_weights
        self._rhs: torch.Tensor | None = None
        self._diagonal_rhs: torch.Tensor | None = None
        # tr(D A D^T) for each matrix A added and the D that goes with it: with A whole, and its diagonal alone.
        self._own: list[tuple[float, float]] = []
        # The same with G for A.
        self._under_total: list[tuple[float, float]] = []

    def add(self, matrix: torch.Tensor, index: int = 0) -> None:
        """Add a Gram per token: G_1 - G_2 for two models (with index 0), else the Gram of model `index`."""
        delta, weight = self._deltas[index], self._model_weights[index]
        product, diagonal_product = delta @ matrix.T, delta * matrix.diagonal()
        self._own.append((inner(delta, product), inner(delta, diagonal_product)))
        if self._rhs is None:
            self._rhs, self._diagonal_rhs = product.mul_(weight), diagonal_product.mul_(weight)
        else:
            self._rhs.add_(product, alpha=weight)
            self._diagonal_rhs.add_(diagonal_product, alpha=weight)

    def solve(self, alpha: float) -> torch.Tensor:
        """The merged weights, float32 (outputs, inputs); the objective's values are added to the system's.

        Raises:
            SolveError: there is no solution, or it is not finite or does not solve the system.
        """
        total, solver = self._system.total, self._system.solver_for(alpha)
        rhs = torch.lerp(self._diagonal_rhs, self._rhs, alpha)
        delta = solver.solve(rhs)
        self._check_distance(delta, solver)
        delta, gain = refined(rhs, delta, total, solver, alpha)
        if gain < 0:
            # Only if the models agree up to rounding: the mean cannot be improved.
            delta.zero_()
            gain = 0.0
        at_mean, at_inputs = self._at_mean_and_inputs(rhs, total, alpha)
        self._system.objectives.setdefault(alpha, Objective()).add(Objective(at_mean, at_inputs, at_mean - gain))
        return delta.add_(self._mean)

    def _check_distance(self, delta: torch.Tensor, solver: Any) -> None:
        if solver.refinements:
            return
        # For two models, the first one's difference from the mean is w_2 (W_1 - W_2); for more, the largest is used.
        factor = self._model_weights[1] if len(self._model_weights) == 2 else 0.5
        difference = max(each.norm().item() for each in self._deltas) / factor
        distance = delta.norm().item()
        if distance > FARTHEST * difference:
            raise SolveError(
                f"{solver.label} leads away from the mean by {distance / (difference or 1.0):.0f} times the models' "
                "difference, as happens on nearly singular Grams; use --solver cholesky, or a smaller --alpha"
            )

    def _at_mean_and_inputs(self, rhs: torch.Tensor, total: torch.Tensor, alpha: float) -> tuple[float, list[float]]:
        """The objective at the mean and at each model's weights."""
        if not self._under_total:
            self._under_total = [_quadratic_form(delta, total) for delta in self._deltas]
        own, under_total = (
            [alpha * whole + (1 - alpha) * diagonal for whole, diagonal in values]
            for values in (self._own, self._under_total)
        )
        if len(self._model_weights) == 2:
            # G_1 = G + w_2 (G_1 - G_2), G_2 = G - w_1 (G_1 - G_2) and D_2 = -(w_1 / w_2) D_1; and the objective at
            # W_1 is w_2 tr((W_1 - W_2) G_2 (W_1 - W_2)^T), with W_1 - W_2 = D_1 / w_2.
            first, second = self._model_weights
            under_first, under_second = under_total[0] + second * own[0], under_total[0] - first * own[0]
            at_mean = first * under_first + first**2 / second * under_second
            return at_mean, [under_second / second, first * under_first / second**2]
        at_mean = sum(weight * value for weight, value in zip(self._model_weights, own, strict=True))
        return at_mean, [
            value - 2 * inner(delta, rhs) + at_mean for delta, value in zip(self._deltas, under_total, strict=True)
        ]


def refined(
    rhs: torch.Tensor, delta: torch.Tensor, total: torch.Tensor, solver: Any, alpha: float
) -> tuple[torch.Tensor, float]:
    """Refine a solution D of D G = R if its residual is not small; also return its gain 2 <D, R> - <D, D G>.

    Args:
        rhs, delta: R and D, (outputs, inputs).
        total: G, whose off-diagonals are scaled by `alpha`.
        solver: one of `SOLVERS`, made from G.

    Raises:
        SolveError: the residual stays large.
    """
    residual_norm, against_delta = _probed_residual(rhs, delta, total, alpha)
    rhs_norm = rhs.norm().item()
    if residual_norm <= PROBE_MARGIN * REFINED_RESIDUAL * rhs_norm:
        return delta, inner(delta, rhs) + against_delta
    product = _times(delta, total, alpha)
    for _ in range(solver.refinements):
        residual = rhs - product
        if not residual.norm() > REFINED_RESIDUAL * rhs_norm:
            break
        delta += solver.solve(residual)
        product = _times(delta, total, alpha)
    residual_norm = (rhs - product).norm().item()
    # `not <=` also catches NaN.
    if not residual_norm <= ACCEPTED_RESIDUAL * rhs_norm:
        left = f"{solver.label} left a residual of {residual_norm / (rhs_norm or 1.0):.1g} of the right-hand side"
        raise SolveError(f"{left}, as happens on singular Grams; use --solver cholesky, or a smaller --alpha")
    return delta, 2 * inner(delta, rhs) - inner(delta, product)


def _times(delta: torch.Tensor, total: torch.Tensor, alpha: float) -> torch.Tensor:
    """delta times G, which is symmetric, with its off-diagonals scaled, without a scaled copy of G."""
    return torch.lerp(delta * total.diagonal(), delta @ total.T, alpha)


def _probed_residual(rhs: torch.Tensor, delta: torch.Tensor, total: torch.Tensor, alpha: float) -> tuple[float, float]:
    """|r| and <D, r> of the residual r = R - D G, estimated without the product D G.

    From sums of the outputs with random signs s: the mean of |s r|^2 is |r|^2, that of <s D, s r> is <D, r>, and
    s D G takes one row's work. What is not finite in any output is not finite in a sum.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (PROBES, len(rhs)), generator=generator).mul_(2).sub_(1).to(rhs) / PROBES**0.5
    probe = signs @ delta
    residual = signs @ rhs - _times(probe, total, alpha)
    return residual.norm().item(), inner(probe, residual)


def _quadratic_form(delta: torch.Tensor, matrix: torch.Tensor) -> tuple[float, float]:
    """tr(D A D^T), for a symmetric A and for its diagonal alone, as <D^T D, A>: half the work of the product D A."""
    # Summed on the device: reading a number from a GPU synchronizes.
    whole, columns = torch.zeros((), dtype=torch.float64, device=delta.device), delta.T.contiguous()
    side = 4 * PANEL if matrix.device.type == "cuda" else PANEL  # products of fewer rows leave a GPU idle
    for start in range(0, len(matrix), side):
        down = slice(start, start + side)
        for left in range(0, start + 1, side):
            across = slice(left, left + side)
            # A tile left of the diagonal also counts for its mirror image.
            times = 1 if left == start else 2
            whole += times * _inner_sum(columns[down] @ columns[across].T, matrix[down, across])
    return whole.item(), inner(delta.square().sum(0), matrix.diagonal())


def inner(a: torch.Tensor, b: torch.Tensor) -> float:
    """<a, b>, by rows in their own precision, over these in float64."""
    return _inner_sum(a, b).item()


def _inner_sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`inner` as a tensor, on the device."""
    return torch.linalg.vecdot(a, b).sum(dtype=torch.float64)


def _largest_eigenvalue(times: Callable[[torch.Tensor], torch.Tensor], like: torch.Tensor, steps: int = 8) -> float:
    """Largest eigenvalue of a positive definite matrix, given by its product with a vector (n, 1). Estimated from below
    by power iteration, in the dtype and on the device of `like`, which has n elements.
    """
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(len(like), 1, generator=generator, dtype=torch.float64).to(like)
    for _ in range(steps):
        vector = times(vector / vector.norm())
    return vector.norm().item()
