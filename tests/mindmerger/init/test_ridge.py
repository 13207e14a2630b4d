"""Mathematics of the aligned start, against independent oracles in float64."""

import numpy as np
import pytest
import torch

from mindmerger.init.ridge import as_mlp, correlation, covering, relative_error, ridge
from mindmerger.modeling import MLP


@pytest.mark.parametrize(
    ("spans", "others", "expected"),
    [
        ([(0, 3), (4, 9)], [(0, 3), (4, 9)], [[0], [1]]),
        # One token there is two here, and vice versa.
        ([(0, 2), (2, 3), (4, 9)], [(0, 3), (4, 6), (6, 9)], [[0], [0], [1, 2]]),
        # Tokens that overlap without one containing the other; a gap; a token without text.
        ([(0, 4), (9, 9), (9, 10)], [(2, 6), (6, 9)], [[0], [], []]),
        ([], [(0, 1)], []),
        ([(0, 0), (0, 1)], [], [[], []]),
    ],
)
def test_tokens_that_share_a_character(spans: list, others: list, expected: list) -> None:
    assert covering(spans, others) == expected


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs of very different size, one of them constant, and fewer rows than a plain solution needs."""
    torch.manual_seed(0)
    inputs = torch.randn(30, 40) @ torch.randn(40, 40)
    inputs = inputs * torch.logspace(-2, 3, 40) + 5
    inputs[:, 7] = 3.25
    return inputs, torch.randn(30, 5)


def test_ridge_against_least_squares_with_penalty_rows(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    inputs, outputs = (matrix.double().numpy() for matrix in data)
    scale = np.where(inputs.std(axis=0) > 0, inputs.std(axis=0), 1)
    standard = (inputs - inputs.mean(axis=0)) / scale
    # A penalty equals one more row to fit for each weight, with target zero.
    system = np.concatenate([standard, np.sqrt(30 * 0.03) * np.eye(40)])
    wanted = np.concatenate([outputs - outputs.mean(axis=0), np.zeros((40, 5))])
    weight = np.linalg.lstsq(system, wanted, rcond=None)[0]

    affine = ridge(*data, penalty=0.03)
    np.testing.assert_allclose(affine.weight.T.numpy(), weight, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(affine(data[0]).numpy(), standard @ weight + outputs.mean(axis=0), rtol=1e-8, atol=1e-9)


def test_without_a_penalty_to_speak_of_an_affine_map_is_found_again() -> None:
    torch.manual_seed(1)
    inputs = torch.randn(200, 6) * 4 + 1
    weight, bias = torch.randn(3, 6), torch.randn(3)
    outputs = inputs @ weight.T + bias
    affine = ridge(inputs[:100], outputs[:100], penalty=1e-12)
    torch.testing.assert_close(affine(inputs[100:]), outputs[100:].double(), rtol=1e-5, atol=1e-5)


def test_an_mlp_that_is_the_same_function(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    inputs, outputs = data
    affine = ridge(inputs, outputs, penalty=0.01)
    mlp = MLP(40, 5)
    mlp.load_state_dict({name.removeprefix("mlp."): tensor for name, tensor in as_mlp(affine).items()})
    unseen = inputs[torch.randperm(30)] + torch.randn(30, 40)
    with torch.no_grad():
        torch.testing.assert_close(mlp(unseen).double(), affine(unseen), rtol=1e-3, atol=1e-3)
        # Both signs of the hidden layer matter.
        mlp.linear1.weight[40:] = 0
        assert not torch.allclose(mlp(unseen).double(), affine(unseen), rtol=1e-1, atol=1e-1)


def test_measures_of_a_prediction() -> None:
    generator = np.random.default_rng(0)
    outputs = generator.normal(size=(20, 4))
    predicted = outputs + generator.normal(size=(20, 4))
    centred = [(matrix - matrix.mean(axis=0)).ravel() for matrix in (predicted, outputs)]
    assert correlation(*map(torch.tensor, (predicted, outputs))) == pytest.approx(np.corrcoef(*centred)[0, 1])
    expected = np.square(predicted - outputs).sum() / (outputs.var(axis=0) * 20).sum()
    assert relative_error(*map(torch.tensor, (predicted, outputs))) == pytest.approx(expected)
    mean = torch.tensor(outputs).mean(dim=0).expand(20, 4)
    assert relative_error(mean, torch.tensor(outputs)) == pytest.approx(1)
    # A shift common to all rows does not change the correlation.
    assert correlation(torch.tensor(outputs) + 7, torch.tensor(outputs)) == pytest.approx(1)
