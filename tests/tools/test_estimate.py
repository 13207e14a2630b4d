"""Costs counted on the meta device, against arithmetic and against the same code with real tensors."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from common.devices import HERE, parse_devices
from common.errors import InputError
from tests.tiny_models import tiny_llama
from tools.estimate import (
    causal_lm_on_meta,
    cost_of,
    cost_of_layers,
    duration,
    find_device,
    known_device,
    parameters,
    weight_bytes,
)

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}


def llama(folder: Path, layers: int = 6, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    LlamaConfig(**SIZES, num_hidden_layers=layers, **options).save_pretrained(folder)
    return causal_lm_on_meta(str(folder), dtype=dtype)


def read(model: nn.Module, rows: int, tokens: int, device: str = "meta") -> torch.Tensor:
    """Forward pass with a gradient to the embeddings, as in training; no logits."""
    embeds = torch.zeros(rows, tokens, SIZES["hidden_size"], dtype=model.dtype, device=device, requires_grad=True)
    return model.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state


@pytest.mark.parametrize(
    ("text", "expected"),
    [("h100", ("h100", None)), ("8xa100-80gb", ("a100-80gb", 8)), ("16xH100", ("h100", 16)), (HERE, (HERE, None))],
)
def test_devices_are_named_alone_or_with_their_number(text: str, expected: tuple) -> None:
    assert parse_devices(text) == expected


@pytest.mark.parametrize("text", ["h1000", "0xh100", "8x", "", "True", "h100x8", "99999999999xh100"])
def test_unknown_devices_are_told(text: str) -> None:
    with pytest.raises(InputError, match="--plan"):
        parse_devices(text)
    with pytest.raises(InputError, match="did you mean h100"):
        parse_devices("h10")


def test_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    device = find_device(HERE, "auto")
    assert (device.type, device.count) == ("cpu", 2)
    assert device.memory > 1e8 and device.single_flops > 1e9 and device.bandwidth > 1e8
    assert find_device("4xh100", "cpu") == known_device("h100", 4)
    assert find_device("a6000", "auto").memory == 47.4 * 2**30
    for name in ("gpu", "cuda"):
        with pytest.raises(InputError, match=f"--device {name}: "):
            find_device(HERE, name)


def test_a_product_is_counted() -> None:
    with torch.device("meta"):
        layer, x = nn.Linear(8, 16, bias=False).requires_grad_(False), torch.empty(4, 8)
    cost = cost_of(lambda: layer(x), layer)
    assert (cost.peak_bytes, cost.kept_bytes, cost.flops) == (4 * 4 * 16, 4 * 4 * 16, 2 * 4 * 8 * 16)
    # Two live at once, one at the end.
    cost = cost_of(lambda: layer(x).relu(), layer)
    assert (cost.peak_bytes, cost.kept_bytes) == (2 * 4 * 4 * 16, 4 * 4 * 16)
    # The weight's transpose, the product, the maximum.
    assert cost.calls == 3


def test_few_layers_tell_of_many(tmp_path: Path) -> None:
    model = llama(tmp_path, layers=9)
    for run in (lambda: read(model, 2, 40), lambda: read(model, 2, 40).sum().backward()):
        assert vars(cost_of_layers(run, model)) == pytest.approx(vars(cost_of(run, model)), rel=1e-6)
    assert len(model.base_model.layers) == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_llama_layer_keeps_for_the_backward_pass(tmp_path: Path, dtype: torch.dtype) -> None:
    """The formula of docs/scaling.md."""
    rows, tokens = 3, 50
    h, i = SIZES["hidden_size"], SIZES["intermediate_size"]
    heads, width = SIZES["num_attention_heads"], h // SIZES["num_attention_heads"]
    kv = SIZES["num_key_value_heads"] * width
    # Both norms' inputs in float32; query, key, value and output of attention; gate, its activation, up.
    formula = 2 * 4 * h + dtype.itemsize * (2 * h + 2 * kv + 3 * i) + 4 * heads

    few, many = (
        cost_of(lambda model=model: read(model, rows, tokens), model).kept_bytes
        for model in (llama(tmp_path / "2", 2, dtype), llama(tmp_path / "6", 6, dtype))
    )
    each = (many - few) / 4 / (rows * tokens)
    assert each == pytest.approx(formula, rel=0.03)


def test_operations_are_two_for_each_weight_and_token(tmp_path: Path) -> None:
    rows, tokens, layers = 2, 64, 6
    model = llama(tmp_path, layers)
    weights = sum(weight.numel() for weight in model.base_model.layers.parameters() if weight.dim() == 2)
    attention = layers * 4 * tokens * SIZES["hidden_size"] / 2  # a query attends to half of the keys
    forward = cost_of(lambda: read(model, rows, tokens), model).flops
    assert forward == pytest.approx(rows * tokens * (2 * weights + attention), rel=0.01)
    both = cost_of(lambda: read(model, rows, tokens).sum().backward(), model).flops
    assert both == pytest.approx(rows * tokens * (4 * weights + 3.5 * attention), rel=0.01)


def test_real_tensors_take_what_shapes_foretold(tmp_path: Path) -> None:
    planned = llama(tmp_path)
    real = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).requires_grad_(False).eval()
    expected = cost_of(lambda: read(planned, 4, 100).sum().backward(), planned)
    measured = cost_of(lambda: read(real, 4, 100, "cpu").sum().backward(), real)
    assert expected.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_loaded_model(tmp_path: Path, tied: bool) -> None:
    planned = llama(tmp_path, tie_word_embeddings=tied)
    real = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert parameters(planned) == real.num_parameters()
    assert weight_bytes(planned) == 4 * parameters(planned) + sum(buffer.nbytes for buffer in {*real.buffers()})


def test_no_weights_are_read(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"spoilt")
    assert parameters(causal_lm_on_meta(str(tmp_path))) > 0
    with pytest.raises(InputError, match="no model config"):
        causal_lm_on_meta(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.5, "1.5 s"), (150, "2.5 min"), (9000, "2.5 h"), (864000, "10.0 days")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
