"""The mathematics of the aligned start: which tokens say the same, and a regression written as a mapping."""

from dataclasses import dataclass

import torch

# Of a token in its text: first character and the one after its last.
Span = tuple[int, int]


def covering(spans: list[Span], others: list[Span]) -> list[list[int]]:
    """For each of `spans`, which of `others`, spans of the same text in their order, share a character with it."""
    return [
        [number for number, (start, end) in enumerate(others) if start < last and first < end] for first, last in spans
    ]


@dataclass(frozen=True)
class AffineMap:
    """`y = weight (x - mean) / scale + bias`, all of it float64.

    Attributes:
        mean, scale: of the inputs, [inputs].
        weight: [outputs, inputs].
        bias: [outputs].
    """

    mean: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., inputs] of any float type to [..., outputs] in float64."""
        return ((inputs.double() - self.mean) / self.scale) @ self.weight.T + self.bias


def ridge(inputs: torch.Tensor, outputs: torch.Tensor, penalty: float) -> AffineMap:
    """Ridge regression (Hoerl and Kennard 1970) on standardised inputs, solved in float64.

    Args:
        inputs: [n, inputs].
        outputs: [n, outputs].
        penalty: on the squared weights, for each of the n rows; the inputs' variance is 1.

    Returns:
        The map with the least `sum ||outputs - map(inputs)||^2 + n * penalty * ||weight||^2`.
    """
    inputs, outputs = inputs.double(), outputs.double()
    mean, bias = inputs.mean(dim=0), outputs.mean(dim=0)
    scale = (inputs - mean).square().mean(dim=0).sqrt()
    # An input that never changes says nothing, whatever it is divided by.
    scale = torch.where(scale > 1e-6 * inputs.abs().max(), scale, 1.0)
    standard = (inputs - mean) / scale
    gram = standard.T @ standard
    gram.diagonal().add_(penalty * len(inputs))
    weight = torch.linalg.solve(gram, standard.T @ (outputs - bias), left=True).T
    return AffineMap(mean, scale, weight, bias)


def relative_error(predicted: torch.Tensor, outputs: torch.Tensor) -> float:
    """Squared error over that of the mean: 0 for a perfect prediction, 1 for one that knows the mean alone."""
    return float((predicted - outputs).square().sum() / (outputs - outputs.mean(dim=0)).square().sum())


def correlation(predicted: torch.Tensor, outputs: torch.Tensor) -> float:
    """Pearson's correlation of two [n, width] matrices as vectors, each column centred: -1 to 1."""
    predicted, outputs = predicted - predicted.mean(dim=0), outputs - outputs.mean(dim=0)
    return float((predicted * outputs).sum() / (predicted.norm() * outputs.norm()))


def as_mlp(affine: AffineMap) -> dict[str, torch.Tensor]:
    """The same function as two linear layers with a ReLU between, as many hidden units as twice the inputs; float32.

    `z = relu(z) - relu(-z)`: one half of the hidden units holds the standardised inputs, the other their negatives.
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
