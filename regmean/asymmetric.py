"""Mathematics of `regmean_asym`: a layer of the merge reproduces, from the merged model's states, what each model's own
layer puts out for its own states.

For one linear layer with weights W_i of models i, X_i its inputs in model i and H_i its inputs in the merged model, on
the same n_i tokens,

    minimise  f(W) = sum_i w_i ||H_i W - X_i W_i||^2 / n_i.

Around the weighted mean M, with G = sum_i w_i H_i^T H_i / n_i and lambda a fraction of the mean of G's diagonal,

    W = M + D,    (G + lambda I) D = sum_i w_i (H_i^T X_i W_i - H_i^T H_i M) / n_i.

Off-diagonals of H_i^T H_i, H_i^T X_i and X_i^T X_i are first scaled by alpha. That minimises alpha f plus (1 - alpha)
times the sum of f over single input features, which is convex. RegMean (solve.py) is the case H_i = X_i.

Here a layer's weights are `rows` of shape (outputs, inputs), so W is their transpose.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from regmean.solve import SOLVERS, Objective, inner, refined


@dataclass
class Moments:
    """Sums over a model's tokens: H^T H, H^T X and X^T X, each float32 (inputs, inputs), and the number of tokens."""

    merged: torch.Tensor
    cross: torch.Tensor
    own: torch.Tensor
    tokens: int


@dataclass(eq=False)
class AsymmetricSystem:
    """The regression of layers that share an input; models are added one at a time.

    Args:
        alpha: factor on off-diagonals, from 0 to 1.
        ridge: lambda as a fraction of the mean of G's diagonal.
        blocks: returns an iterator over blocks of the layers' outputs: for each, the rows of all models and their
            weighted mean, in float32 on the device of the moments.
    """

    alpha: float
    ridge: float
    blocks: Callable[[], Iterator[tuple[list[torch.Tensor], torch.Tensor]]]
    total: torch.Tensor | None = None
    _rhs: list[torch.Tensor] = field(default_factory=list)
    _at_mean: float = 0.0

    def add(self, index: int, model_weight: float, moments: Moments) -> None:
        """Add model `index` with its weight w_i. The moments are overwritten."""
        a, b, c = (_scaled(moment.div_(moments.tokens), self.alpha) for moment in
                   (moments.merged, moments.own, moments.cross.sub_(moments.merged)))  # fmt: skip
        # With E = H - X, and so C = H^T X - H^T H = -H^T E: E^T E = X^T X - H^T H - C - C^T.
        b.sub_(a).sub_(c).sub_(c.T)
        for number, (rows, mean) in enumerate(self.blocks()):
            own = rows[index]
            from_mean, drift = mean - own, own @ c.T
            under = from_mean @ a
            self._at_mean += model_weight * (
                inner(from_mean, under) - 2 * inner(from_mean, drift) + inner(own, own @ b)
            )
            # H^T X W_i - H^T H M = C W_i - H^T H (M - W_i)
            rhs = drift.sub_(under).mul_(model_weight)
            if number == len(self._rhs):
                self._rhs.append(rhs)
            else:
                self._rhs[number].add_(rhs)
        if self.total is None:
            self.total = a.mul_(model_weight)
        else:
            self.total.add_(a, alpha=model_weight)

    def solve(self, solver_name: str = "cholesky") -> tuple[list[torch.Tensor], Objective, object]:
        """The merged rows of each block, the objective at mean, models and merge, without lambda, and the solver.

        Raises:
            SolveError: the system has no factor, or a solution leaves a residual.
        """
        damping = self.ridge * self.total.diagonal().mean()
        self.total.diagonal().add_(damping)
        solver = SOLVERS[solver_name](self.total, 1.0)
        merged, objective = [], Objective(self._at_mean, [], self._at_mean)
        gains: list[float] = []
        for rhs, (rows, mean) in zip(self._rhs, self.blocks(), strict=True):
            delta, gain = refined(rhs, solver.solve(rhs), self.total, solver, 1.0)
            objective.merged -= gain + damping.item() * inner(delta, delta)
            for index, own in enumerate(rows):
                step = own - mean
                under = step @ self.total
                value = 2 * inner(step, rhs) - inner(step, under) + damping.item() * inner(step, step)
                gains[index : index + 1] = [(gains[index] if index < len(gains) else 0.0) + value]
            merged.append(delta.add_(mean))
        objective.inputs = [self._at_mean - gain for gain in gains]
        return merged, objective, solver


def _scaled(matrix: torch.Tensor, alpha: float) -> torch.Tensor:
    """Scale a matrix's off-diagonals in place."""
    diagonal = matrix.diagonal().clone()
    matrix.mul_(alpha).diagonal().copy_(diagonal)
    return matrix
