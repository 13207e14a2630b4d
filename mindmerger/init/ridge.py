"""The mathematics of the aligned start: overlapping tokens, and a ridge regression in the form of a mapping."""

from dataclasses import dataclass

import torch

# Characters of a token in its text: the first, and the one after the last.
Span = tuple[int, int]


def covering(spans: list[Span], others: list[Span]) -> list[list[int]]:
    """For each of `spans`, indices of the overlapping ones of `others`, spans of the same text."""
    return [
        [number for number, (start, end) in enumerate(others) if start < last and first < end] for first, last in spans
    ]


@dataclass(frozen=True)
class AffineMap:
    """The map `y = weight (x - mean) / scale + bias` in float64.

    Attributes:
        mean, scale: mean and standard deviation of the inputs, [inputs].
        weight: [outputs, inputs].
        bias: [outputs].
    """

    mean: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map [..., inputs] of any float type to [..., outputs] in float64."""
        return ((inputs.double() - self.mean) / self.scale) @ self.weight.T + self.bias


def ridge(inputs: torch.Tensor, outputs: torch.Tensor, penalty: float) -> AffineMap:
    """Ridge regression (Hoerl and Kennard 1970) on standardised inputs, solved in float64.

    Args:
        inputs: [n, inputs].
        outputs: [n, outputs].
        penalty: factor of the squared weights, for each of the n rows; the inputs' variance is 1.

    Returns:
        The map with the least `sum ||outputs - map(inputs)||^2 + n * penalty * ||weight||^2`.
    """
    inputs, outputs = inputs.double(), outputs.double()
    mean, bias = inputs.mean(dim=0), outputs.mean(dim=0)
    scale = (inputs - mean).square().mean(dim=0).sqrt()
    # A constant input gets weight 0 for any scale.
    scale = torch.where(scale > 1e-6 * inputs.abs().max(), scale, 1.0)
    standard = (inputs - mean) / scale
    gram = standard.T @ standard
    gram.diagonal().add_(penalty * len(inputs))
    weight = torch.linalg.solve(gram, standard.T @ (outputs - bias), left=True).T
    return AffineMap(mean, scale, weight, bias)


def relative_error(predicted: torch.Tensor, outputs: torch.Tensor) -> float:
    """Squared error relative to that of the mean: 0 for a perfect prediction, 1 for the mean of the outputs."""
    return float((predicted - outputs).square().sum() / (outputs - outputs.mean(dim=0)).square().sum())


def correlation(predicted: torch.Tensor, outputs: torch.Tensor) -> float:
    """Pearson's correlation, from -1 to 1, of two [n, width] matrices as vectors, each column centred."""
    predicted, outputs = predicted - predicted.mean(dim=0), outputs - outputs.mean(dim=0)
    return float((predicted * outputs).sum() / (predicted.norm() * outputs.norm()))


def as_mlp(affine: AffineMap) -> dict[str, torch.Tensor]:
    """Convert an affine map to two float32 linear layers with a ReLU between them, exactly.

    `z = relu(z) - relu(-z)`: one half of the hidden units is the standardised inputs, the other their negatives.
    """
    standardise = torch.diag(1 / affine.scale)
    shift = affine.mean / affine.scale
    state = {
        "mlp.linear1.weight": torch.cat([standardise, -standardise]),
        "mlp.linear1.bias": torch.cat([-shift, shift]),
        "mlp.linear2.weight": torch.cat([affine.weight, -affine.weight], dim=1),
        "mlp.linear2.bias": affine.bias,
    }
    return {name: tensor.float().contiguous() for name, tensor in state.items()}
