"""Mathematics of embedding tables merged by token counts, apart from files and models.

An embedding is a linear layer with one-hot inputs, and its Gram is the diagonal of token counts. For rows v_it of
model i, which c_it of n_i tokens read, RegMean's objective (solve.py) is

    f(V) = sum_i w_i sum_t (c_it / n_i) |v_t - v_it|^2,

and row t of the solution is the mean of the v_it with weights w_i (c_it / n_i + e). e is the same for all models, so
that a row that no text reads stays at the plain mean.

A table that is also the output head has two terms: the head's, with its Grams G_i per token, and f times a factor beta,

    sum_i w_i tr((V - V_i) G_i (V - V_i)^T) + beta f(V),

where beta makes both terms equal at V = M, the plain mean of the whole tables. Row t of the solution fulfils

    v_t (G + C_t I) = sum_i w_i v_it (G_i + beta (c_it / n_i) I),

with G = sum_i w_i G_i and C_t = beta sum_i w_i c_it / n_i. Off-diagonals of the G_i are scaled by alpha, as in a linear
layer. One eigendecomposition G = Q L Q^T serves all rows: with the right-hand side in delta form,
r_t = sum_i w_i (v_it - m_t) (G_i + beta (c_it / n_i) I), the solution is v_t = m_t + r_t Q (L + C_t I)^-1 Q^T.

Rows are float tensors of shape (rows, width), frequencies c_it / n_i float64 of shape (rows,), both in the models'
order; w_i are `model_weights`, which sum to 1. Results are float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from regmean.solve import Objective, SolveError, scaled

EVEN = 1e-6  # e
# Smallest eigenvalue that is divided by, relative to the largest; below it lies the rounding of float32 sums.
FLOOR = 1e-6
# Relative size of a negative eigenvalue that rounding does not explain.
NEGATIVE = 1e-3


def merge_by_counts(
    rows: list[torch.Tensor], frequencies: list[torch.Tensor], model_weights: list[float]
) -> tuple[torch.Tensor, Objective]:
    """Rows of a table merged by counts, and f at the mean, at each model's rows and at the merged ones."""
    mean, deltas = in_delta_form(rows, model_weights)
    weights = _by_row(frequencies, model_weights)
    total, rhs = sum(weights), _weighted_sum(deltas, weights)
    delta = rhs / (total + EVEN)
    at_mean = sum((weight * each.square()).sum() for weight, each in zip(weights, deltas, strict=True))
    *inputs, merged = (
        (at_mean - 2 * (each * rhs).sum() + (total * each.square()).sum()).item() for each in (*deltas, delta)
    )
    return mean + delta, Objective(at_mean.item(), inputs, merged)


def in_delta_form(rows: list[torch.Tensor], model_weights: list[float]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The weighted mean of the models' rows and each model's difference to it, which is 0 where all are equal."""
    rows = [each.double() for each in rows]
    # Differences to one of the models first: they are exact where the models are equal, as a sum of products is not.
    differences = [each - rows[-1] for each in rows]
    shift = _weighted_sum(differences, model_weights)
    return _weighted_sum(rows, model_weights), [each - shift for each in differences]


@dataclass
class _Terms:
    """Sums over all rows of inner products with the right-hand sides and with C_t, of one alpha."""

    gain: float
    inputs: list[float]


@dataclass(eq=False)
class TiedTable:
    """A table that is also the output head. All rows are given twice: to `measure`, which finds beta, then to `merge`.

    Args:
        grams: each model's Gram of the head's input per token, (width, width); read only.
        model_weights: w_i, summing to 1.
    """

    grams: list[torch.Tensor]
    model_weights: list[float]
    _read_term: float = 0.0
    _systems: dict[float, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _terms: dict[float, _Terms] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # The D_i add up to zero: sum_i w_i D_i G_i = sum_i w_i D_i (G_i - G_k) for any k, one product fewer.
        last = self.grams[-1]
        self._differences = [gram.double() - last for gram in self.grams[:-1]]
        self._total = last.double() + _weighted_sum(self._differences, self.model_weights[:-1])
        self._moments = [torch.zeros_like(self._total) for _ in self.grams]  # D_i^T D_i

    def measure(self, rows: list[torch.Tensor], frequencies: list[torch.Tensor]) -> None:
        """Add a block of rows to both terms at the mean."""
        _, deltas = in_delta_form(rows, self.model_weights)
        for weight, frequency, delta, moment in zip(
            self.model_weights, frequencies, deltas, self._moments, strict=True
        ):
            # In float32, which is enough for one number.
            single = delta.float()
            moment += single.T @ single
            self._read_term += weight * (frequency @ delta.square().sum(1)).item()

    def beta(self, alpha: float) -> float:
        """Factor on the embedding's term; 0 if the models agree in all rows that a text reads."""
        return self._head_term(alpha) / self._read_term if self._read_term else 0.0

    def merge(
        self, rows: list[torch.Tensor], frequencies: list[torch.Tensor], alphas: list[float]
    ) -> Iterator[torch.Tensor]:
        """Yield a block of merged rows for each alpha.

        Raises:
            SolveError: the Grams are no sums of x x^T.
        """
        mean, deltas = in_delta_form(rows, self.model_weights)
        whole = diagonal = torch.zeros_like(mean)
        for weight, delta, gram in zip(self.model_weights, deltas, self._differences, strict=False):
            whole = whole + weight * (delta @ gram)
            diagonal = diagonal + weight * delta * gram.diagonal()
        weights = _by_row(frequencies, self.model_weights)
        read, by_counts = sum(weights), _weighted_sum(deltas, weights)
        for alpha in alphas:
            values, vectors = self._system(alpha)
            beta = self.beta(alpha)
            rhs = torch.lerp(diagonal, whole, alpha) + beta * by_counts
            delta = ((rhs @ vectors) / (values + beta * read)) @ vectors.T
            terms = self._terms.setdefault(alpha, _Terms(0.0, [0.0] * len(deltas)))
            terms.gain += (delta * rhs).sum().item()
            for index, each in enumerate(deltas):
                terms.inputs[index] += (beta * read * each.square() - 2 * each * rhs).sum().item()
            yield mean + delta

    def objective(self, alpha: float) -> Objective:
        """Values of both terms' sum over all rows: at the mean, at each model's table and at the merge."""
        terms, at_mean = self._terms[alpha], self._head_term(alpha) + self.beta(alpha) * self._read_term
        under_total = [_scaled_inner(self._total, moment, alpha) for moment in self._moments]
        inputs = [at_mean + a + b for a, b in zip(under_total, terms.inputs, strict=True)]
        return Objective(at_mean, inputs, at_mean - terms.gain)

    def _head_term(self, alpha: float) -> float:
        """The head's term at the mean."""
        values = (_scaled_inner(gram, moment, alpha) for gram, moment in zip(self.grams, self._moments, strict=True))
        return sum(weight * value for weight, value in zip(self.model_weights, values, strict=True))

    def _system(self, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues and eigenvectors of the scaled mean Gram."""
        if alpha not in self._systems:
            values, vectors = torch.linalg.eigh(scaled(self._total, alpha))
            if values[0] < -NEGATIVE * values[-1]:
                raise SolveError(
                    "the Gram is not positive semi-definite, as no sum of x x^T can be: its file is damaged"
                )
            self._systems[alpha] = values.clamp(min=FLOOR * values[-1].item()), vectors
        return self._systems[alpha]


def _by_row(frequencies: list[torch.Tensor], model_weights: list[float]) -> list[torch.Tensor]:
    """w_i c_it / n_i of each model, (rows, 1)."""
    return [weight * frequency[:, None] for weight, frequency in zip(model_weights, frequencies, strict=True)]


def _weighted_sum(tensors: list[torch.Tensor], weights: list) -> torch.Tensor:
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += tensor * weight
    return total


def _scaled_inner(gram: torch.Tensor, moment: torch.Tensor, alpha: float) -> float:
    """<G, A> in float64, with the off-diagonals of G scaled by alpha."""
    whole, diagonal = (gram * moment).sum(), (gram.diagonal() * moment.diagonal()).sum()
    return (alpha * whole + (1 - alpha) * diagonal).item()
