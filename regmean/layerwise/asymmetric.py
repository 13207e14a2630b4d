"""Mathematics of `regmean_asym`: a layer of the merge reproduces, from the merged model's states, what each model's own
layer puts out for its own states.

For one linear layer with weights W_i of models i, X_i its inputs in model i and H_i its inputs in the merged model, on
the same n_i tokens,

    minimise  f(W) = sum_i w_i ||H_i W - X_i W_i||^2 / n_i.

Around the weighted mean M, with G = sum_i w_i H_i^T H_i / n_i and lambda a fraction of the mean of G's diagonal,

    W = M + D,    (G + lambda I) D = sum_i w_i (H_i^T X_i W_i - H_i^T H_i M) / n_i.

Off-diagonals of H_i^T H_i, H_i^T X_i and X_i^T X_i are first scaled by alpha. That minimises alpha f plus (1 - alpha)
times the sum of f over single input features, which is convex. RegMean (solve.py) is the case H_i = X_i.

Of an expert's projection, X_i and H_i have the tokens that both runs route to the expert. As in RegMean, its sums have
a few tokens of the mean over all experts of the layer, and are divided by the number of tokens of all (solve.py).

Here a layer's weights are `rows` of shape (outputs, inputs), so W is their transpose.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from regmean.gram import add_cross_products, add_products, symmetrise_, zeros
from regmean.solve import POOLED, SOLVERS, Objective, inner, refined

Routed = tuple[torch.Tensor, torch.Tensor | None]  # rows, and the token of each, ascending; None for all tokens


def paired(h: Routed, x: Routed) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of the tokens that are in both, in the same order."""
    (h_rows, h_tokens), (x_rows, x_tokens) = h, x
    if h_tokens is None:
        return h_rows, x_rows
    return h_rows[torch.isin(h_tokens, x_tokens)], x_rows[torch.isin(x_tokens, h_tokens)]


class Moments:
    """Sums over a model's tokens: H^T H, H^T X and X^T X, each float32 (inputs, inputs); and the number of tokens."""

    def __init__(self, width: int, device: torch.device):
        self.merged, self.cross, self.own = (zeros(width, device) for _ in range(3))
        self.tokens = torch.zeros(1, dtype=torch.int64, device=device)

    def add(self, h: torch.Tensor, x: torch.Tensor) -> None:
        """Add the inputs of a batch, both (tokens, inputs)."""
        self.tokens += len(h)
        add_products(self.merged, h)
        add_cross_products(self.cross, h, x)
        add_products(self.own, x)

    def sums(self) -> list[torch.Tensor]:
        """All sums, of this rank's tokens."""
        return [symmetrise_(self.merged), self.cross, symmetrise_(self.own), self.tokens]

    def join(self, other: "Moments") -> None:
        """Add the sums of other tokens."""
        self.tokens += other.tokens
        self._add(other, 1.0)

    def shrink(self, pool: "Moments") -> None:
        """Add a few tokens of the mean of `pool`, the sums over all experts of a layer, to those of one."""
        self._add(pool, POOLED * len(self.own) / pool.tokens.item())

    def _add(self, other: "Moments", factor: float) -> None:
        for mine, theirs in ((self.merged, other.merged), (self.cross, other.cross), (self.own, other.own)):
            mine.add_(theirs, alpha=factor)


class Errors:
    """Sums over a model's tokens for layers of few outputs, with T = X W_i - H M: H^T H; T^T H; the diagonals of H^T H,
    H^T X and X^T X; and |T|^2. They take less work and memory than `Moments`.

    Args:
        blocks: for each block of the outputs, the rows W_i and M, float32 (outputs, inputs).
    """

    def __init__(self, blocks: list[tuple[torch.Tensor, torch.Tensor]]):
        self.sizes = [len(mean) for _, mean in blocks]
        self.rows, self.mean = (torch.cat(rows) for rows in zip(*blocks, strict=True))
        width, device = self.mean.shape[1], self.mean.device
        self.merged, self.product = zeros(width, device), torch.zeros_like(self.mean)
        self.diagonals = torch.zeros(3, width, device=device)
        self.square = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, h: torch.Tensor, x: torch.Tensor) -> None:
        """Add the inputs of a batch, both (tokens, inputs)."""
        h, x = h.float(), x.float()
        errors = (x @ self.rows.T).addmm_(h, self.mean.T, alpha=-1)
        add_products(self.merged, h)
        self.product.addmm_(errors.T, h)
        self.diagonals += torch.stack([(a * b).sum(0) for a, b in ((h, h), (h, x), (x, x))])
        self.square += inner(errors, errors)

    def sums(self) -> list[torch.Tensor]:
        """All sums, of this rank's tokens."""
        return [symmetrise_(self.merged), self.product, self.diagonals, self.square]


def has_few_outputs(outputs: int, inputs: int, device: torch.device) -> bool:
    """True if `Errors` take less time than `Moments`: not on a GPU, where the latter's products have half precision."""
    return device.type == "cpu" and 2 * outputs <= inputs


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

    def add(self, index: int, model_weight: float, sums: Moments | Errors, tokens: int) -> None:
        """Add model `index` with its weight w_i. The sums are overwritten."""
        a = _scaled(sums.merged.div_(tokens), self.alpha)
        rhs = self._of_errors(sums, tokens) if isinstance(sums, Errors) else self._of_moments(index, sums, a, tokens)
        for number, (block, at_mean) in enumerate(rhs):
            self._at_mean += model_weight * at_mean
            if number == len(self._rhs):
                self._rhs.append(block.mul_(model_weight))
            else:
                self._rhs[number].add_(block, alpha=model_weight)
        if self.total is None:
            self.total = a.mul_(model_weight)
        else:
            self.total.add_(a, alpha=model_weight)

    def _of_moments(
        self, index: int, sums: Moments, a: torch.Tensor, tokens: int
    ) -> Iterator[tuple[torch.Tensor, float]]:
        """The model's right-hand side and objective at the mean, block by block; `a` is its scaled H^T H per token."""
        b, c = (_scaled(moment.div_(tokens), self.alpha) for moment in (sums.own, sums.cross))
        c.sub_(a)
        # With E = H - X, and so C = H^T X - H^T H = -H^T E: E^T E = X^T X - H^T H - C - C^T.
        b.sub_(a).sub_(c).sub_(c.T)
        for rows, mean in self.blocks():
            own = rows[index]
            from_mean, drift = mean - own, own @ c.T
            under = from_mean @ a
            at_mean = inner(from_mean, under) - 2 * inner(from_mean, drift) + inner(own, own @ b)
            # H^T X W_i - H^T H M = C W_i - H^T H (M - W_i)
            yield drift.sub_(under), at_mean

    def _of_errors(self, sums: Errors, tokens: int) -> Iterator[tuple[torch.Tensor, float]]:
        """As `_of_moments`. The value at alpha is alpha times that of T and (1 - alpha) times that of single inputs."""
        hh, hx, xx = sums.diagonals.div_(tokens)
        whole = sums.square.item() / tokens
        blocks = (each.split(sums.sizes) for each in (sums.product, sums.rows, sums.mean))
        for product, own, mean in zip(*blocks, strict=True):
            single = inner(own * xx, own) - 2 * inner(own * hx, mean) + inner(mean * hh, mean)
            rhs = product.mul_(self.alpha / tokens).add_(own * hx - mean * hh, alpha=1 - self.alpha)
            yield rhs, self.alpha * whole + (1 - self.alpha) * single
            whole = 0.0  # of all blocks

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
