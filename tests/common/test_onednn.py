"""oneDNN's products against float64, whether or not this machine's processor would choose them."""

from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common import onednn
from common.onednn import FrozenLinear, add_product, linear, use_onednn

INPUTS, OUTPUTS = 512, 640


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(2, 7, INPUTS, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [None, torch.arange(float(OUTPUTS))])
def test_products_are_those_of_float64(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool, onednn_products: Mock
) -> None:
    if transposed:
        weight = weight.T.contiguous().T
    # As a slice, whose rows lie apart.
    rows = rows.repeat(1, 1, 2)[..., :INPUTS]
    expected = F.linear(rows.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(linear(rows, weight, bias).double(), expected, rtol=1e-5, atol=1e-3)
    assert onednn_products.call_count == 1


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tile", [200, onednn.TILE])
def test_a_product_is_added_to_a_part_of_a_matrix(
    rows: torch.Tensor,
    weight: torch.Tensor,
    tile: int,
    transposed: bool,
    onednn_products: Mock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onednn, "TILE", tile)
    if transposed:
        weight = weight.T.contiguous().T
    total = torch.ones(9, OUTPUTS + 3)
    add_product(total[1:8, 2:-1], rows[0], weight, -2.0)
    expected = torch.ones(9, OUTPUTS + 3, dtype=torch.float64)
    expected[1:8, 2:-1] -= 2 * rows[0].double() @ weight.double().T
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-3)
    # No piece may have gaps between its rows.
    pieces = [call.args[1] for call in onednn_products.call_args_list]
    assert all((piece.T if transposed else piece).is_contiguous() for piece in pieces)
    assert len(pieces) == -(-(INPUTS if transposed else OUTPUTS) // tile)


def test_a_frozen_layer_passes_the_gradient_on(rows: torch.Tensor, onednn_products: Mock) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS), nn.GELU(), nn.Linear(OUTPUTS, INPUTS, bias=False))
    model.requires_grad_(False)
    plain = rows.double().requires_grad_()
    model.double()(plain).square().sum().backward()
    use_onednn(model.float())
    rows.requires_grad_()
    model(rows).square().sum().backward()
    assert isinstance(model[0], FrozenLinear)
    assert (rows.grad.double() - plain.grad).norm() < 1e-5 * plain.grad.norm()
    assert onednn_products.call_count == 4


def test_a_layer_that_is_trained_gets_its_gradient(rows: torch.Tensor, onednn_products: Mock) -> None:
    layer = nn.Linear(INPUTS, OUTPUTS)
    use_onednn(layer)
    layer(rows).sum().backward()
    assert layer.weight.grad is not None
    assert onednn_products.call_count == 0
    with torch.no_grad():
        layer(rows)
    assert onednn_products.call_count == 1


def test_what_does_not_suit_is_left_to_pytorch(rows: torch.Tensor, weight: torch.Tensor, onednn_products: Mock) -> None:
    half = INPUTS // 2
    unsuited = [
        (rows.bfloat16(), weight.bfloat16()),
        (rows.double(), weight.double()),
        (rows[..., :8].contiguous(), weight[:, :8].contiguous()),
        (rows[:0], weight),
        # Rows of a wider matrix.
        (rows.repeat(1, 1, 2), weight.repeat(2, 4)[:, : 2 * INPUTS]),
    ]
    for some, other in unsuited:
        torch.testing.assert_close(linear(some, other), F.linear(some, other), rtol=0, atol=0)
    torch.testing.assert_close(
        linear(rows[..., :half], weight[:, :half]), F.linear(rows[..., :half], weight[:, :half]), rtol=0, atol=0
    )
    assert onednn_products.call_count == 0


@pytest.mark.parametrize(
    ("capability", "vendor", "expected"),
    [("AVX512", "AuthenticAMD", True), ("AVX512", "GenuineIntel", False), ("AVX2", "AuthenticAMD", False)],
)
def test_intels_own_library_serves_intels_processors(
    monkeypatch: pytest.MonkeyPatch, capability: str, vendor: str, expected: bool
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(onednn.Path, "read_text", lambda self: f"vendor_id : {vendor}\n")
    onednn.is_faster.cache_clear()
    try:
        assert onednn.is_faster() is expected
    finally:
        onednn.is_faster.cache_clear()
