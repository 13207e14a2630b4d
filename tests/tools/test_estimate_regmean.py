"""Estimates of Grams and merges: published sizes, and small ones against real runs."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen3MoeConfig,
)

from common.devices import HERE
from regmean.average import AVERAGERS, CHUNK_ELEMENTS
from regmean.compute import probe
from regmean.config import GramFlags, MergeFlags
from regmean.hooks import LinearInputs, linear_layers
from regmean.read_ahead import READERS
from tests.commands import run
from tests.conftest import REPOSITORY
from tests.regmean.conftest import make_gpt2, make_llama
from tests.regmean.folders import TEXT, build
from tools.estimate import Device, causal_lm_on_meta, cost_of, known_device
from tools.estimate_regmean import (
    _model,
    batch_cost,
    estimate_grams,
    estimate_layerwise_grams,
    estimate_merge,
    estimate_sequential,
    layer_inputs,
)

LLAMA_3_8B = str(REPOSITORY / "configs/models/llama-3-8b")
LLAMA_3_70B = str(REPOSITORY / "configs/models/llama-3-70b")
LARGE = Device(HERE, "cpu", 1, 2**50, 1e9, 1e9, 1e9, "")


def make_modernbert() -> ModernBertForMaskedLM:
    options = TEXT | {"cls_token_id": 1, "sep_token_id": 2}
    return ModernBertForMaskedLM(ModernBertConfig(**options))


@pytest.mark.parametrize(
    "make", [make_llama, lambda: make_llama(tied=True), make_gpt2, partial(build, "distilbert"), make_modernbert]
)
def test_layers_share_inputs_as_in_a_run(save: Callable[..., Path], make: Callable) -> None:
    real, flags = make().eval(), GramFlags(model=str(save(make(), "model")), max_length=64, plan="h100")
    probed = probe(real, linear_layers(real), [1, 5, 6], torch.device("cpu"))
    planned = _model(flags.model, None, "auto")
    assert [each.layers for each in layer_inputs(planned)] == probed.inputs
    assert estimate_grams(flags, planned, LARGE).counts["passes"] == 1


QWEN3_30B = {
    "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "layers", "others"),
    [
        pytest.param(Qwen3MoeConfig(**QWEN3_30B, num_hidden_layers=2), 2, 0, id="few layers"),
        pytest.param(Qwen3MoeConfig(**QWEN3_30B, num_hidden_layers=48), 48, 0, marks=pytest.mark.slow, id="qwen3-30b"),
        pytest.param(DeepseekV3Config(), 58, 3, marks=pytest.mark.slow, id="deepseek-v3"),
    ],
)
def test_a_mixture_of_experts(
    config: Qwen3MoeConfig | DeepseekV3Config, layers: int, others: int, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    model = causal_lm_on_meta(str(tmp_path), dtype=torch.bfloat16)
    wide, narrow, count = config.hidden_size, config.moe_intermediate_size, config.num_local_experts
    experts = [each for each in layer_inputs(model) if each.share < 1]
    assert len(experts) == layers * 2 * count
    assert {each.share for each in experts} == {config.num_experts_per_tok / count}
    assert sum(each.file_bytes for each in experts) == layers * count * 2 * (wide * (wide + 1) + narrow * (narrow + 1))
    planned = estimate_grams(GramFlags(model=str(tmp_path), plan="h200"), model, known_device("h200", 1))
    active = sum(each.token_macs for each in layer_inputs(model)) - wide * config.vocab_size
    sums = sum(each.token_products for each in layer_inputs(model))
    once, more = 2 * active + sums, 2 * active * (planned.counts.get("passes", 1) - 1)
    # Every pass but the last ends where its last sum is done.
    assert 0.9 * once < planned.flops / planned.counts["tokens"] < 1.1 * once + more
    assert planned.memory["activations"] < 10e9


def test_experts_take_turns_in_a_sequential_merge_where_memory_is_short(tmp_path: Path) -> None:
    Qwen3MoeConfig(**QWEN3_30B, num_hidden_layers=2).save_pretrained(tmp_path)
    flags, device = MergeFlags(method="regmean_asym", models=[str(tmp_path)] * 2, plan="h200"), known_device("h200", 1)
    whole, short = (estimate_sequential(flags, each) for each in (device, replace(device, memory=10 * 2**30)))
    # Of gate and up: three sums over the texts and the system's square, and its right-hand side.
    sums = 128 * 4 * (4 * 2048**2 + 2048 * 2 * 768)
    assert whole.counts["systems"] == 2 * (3 + 2 * 128) + 1
    assert whole.memory["sums"] == sums and "turns" not in whole.counts
    assert short.memory["sums"] == sums / 2 and short.counts["turns"] == 2
    assert short.flops > whole.flops


def test_a_batch_takes_what_its_plan_says(save: Callable[..., Path]) -> None:
    """The estimate equals the sum over all tensors of a real forward pass, counted while they exist."""
    folder = save(make_llama(), "model")
    planned = batch_cost(causal_lm_on_meta(str(folder)), 8, 40, LARGE).peak_bytes
    real = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.full((8, 40), 5)
    inputs = LinearInputs(linear_layers(real), real.get_output_embeddings(), lambda name, x: x.clone())
    with inputs:
        measured = cost_of(lambda: inputs.run(real, ids, torch.ones_like(ids)), real).peak_bytes
    assert planned == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(("device", "passes"), [("a100-80gb", 1), ("h100", 1), ("rtx4090", 5), ("rtx3090", 4)])
def test_llama_3_8b_on_one_gpu(device: str, passes: int) -> None:
    model = causal_lm_on_meta(LLAMA_3_8B)
    flags = GramFlags(model=LLAMA_3_8B, plan=device)
    planned = estimate_grams(flags, model, known_device(device, 1))
    widths = 32 * [4096, 4096, 4096, 14336] + [4096]
    total = planned.parameters["model"]
    assert (total, planned.counts["inputs"]) == (8_030_261_248, 129)
    assert sum(each.sum_bytes for each in layer_inputs(model)) == sum(4 * width**2 for width in widths)
    assert planned.transfers["disk"] == sum(2 * width * (width + 1) for width in widths)
    # All except the head.
    assert planned.memory["weights"] == pytest.approx(2 * (total - 4096 * 128256), rel=1e-6)
    assert planned.counts["passes"] == passes
    assert planned.peak < known_device(device, 1).memory
    layers = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    attention = 32 * 4 * 256 * 4096 / 2
    # Four passes end after about one, two, three quarters of the layers, and all of them; if a quarter's sums do not
    # quite fit, a fifth pass has the rest of the last layers.
    forwards = {1: 1, 4: 2.5, 5: 3.5}[passes]
    work = planned.counts["tokens"] * (forwards * (2 * layers + attention) + sum(width**2 for width in widths))
    assert planned.flops == pytest.approx(work, rel=0.01 if passes == 1 else 0.05)


def test_a_model_that_does_not_fit_is_told(capsys: pytest.CaptureFixture) -> None:
    words = ["--model", str(REPOSITORY / "configs/models/llama-3-70b"), "--dtype", "bfloat16", "--plan", "h100"]
    run(["python", str(REPOSITORY / "compute_gram.py"), *words, "--layerwise", "off"])
    out = capsys.readouterr().out
    assert "no number of passes fits" in out and "DOES NOT FIT" in out
    run(["python", str(REPOSITORY / "compute_gram.py"), *words])
    out = capsys.readouterr().out
    assert re.search(r"memory .*: fits", out) and re.search(r"steps +82$", out, re.MULTILINE)


LAYER = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672  # weights of a layer's linear layers in Llama-3-70B
SQUARES = 80 * (3 * 8192**2 + 28672**2) + 8192**2


def test_llama_3_70b_layer_by_layer_on_one_gpu() -> None:
    device, model = known_device("a100-80gb", 1), causal_lm_on_meta(LLAMA_3_70B)
    planned = estimate_layerwise_grams(GramFlags(model=LLAMA_3_70B, plan="a100-80gb"), model, device)
    tokens = 10_000 * 256
    # The widest step's weights are the embedding table.
    assert planned.memory["weights"] == pytest.approx(2 * 8192 * 128256, rel=1e-3)
    assert planned.memory["sums"] == 4 * (3 * 8192**2 + 28672**2)
    assert planned.peak < 10e9
    assert planned.transfers["states"] == tokens * 8192 * 2
    attention = 80 * 4 * 256 * 8192 / 2
    assert planned.flops == pytest.approx(tokens * (80 * 2 * LAYER + attention + SQUARES), rel=0.01)
    assert planned.seconds == pytest.approx(planned.flops / device.half_flops)


@pytest.mark.parametrize(("method", "calibration"), [("regmean++", []), ("regmean_asym", ["math", "code"])])
def test_layer_sequential_merge_of_llama_3_70b_on_one_gpu(method: str, calibration: list[str]) -> None:
    device = known_device("a100-80gb", 1)
    flags = MergeFlags(method=method, models=[LLAMA_3_70B] * 2, calibration=calibration, plan="a100-80gb")
    planned = estimate_sequential(flags, device)
    tokens, is_asymmetric = 2 * 10_000 * 256, method == "regmean_asym"
    assert (planned.counts["systems"], planned.counts["tokens"]) == (321, tokens)
    assert planned.peak < device.memory
    states = tokens * 8192 * 2
    assert planned.transfers["states"] == pytest.approx(states * (2 if is_asymmetric else 1 + 1 / 16))
    parts = [8192 * (8192 + 2048), 8192**2, 2 * 8192 * 28672]  # before the second, third and fourth input of a layer
    second, third, fourth = parts[0], sum(parts[:2]), sum(parts)
    if is_asymmetric:
        forward, squares, solving = 2 * (second + third + LAYER) + fourth, 4, 18
    else:
        forward, squares, solving = fourth + LAYER * (1 + 1 / 16), 1, 5
    work = tokens * (80 * 2 * forward + squares * SQUARES)
    inputs = 80 * [(8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192)] + [(8192, 128256)]
    work += sum(width**3 / 3 + solving * outputs * width**2 for width, outputs in inputs)
    assert planned.flops == pytest.approx(work, rel=0.02)


def test_llama_3_8b_merges_in_few_gigabytes() -> None:
    device = known_device("h100", 1)
    planned = estimate_merge(MergeFlags(method="regmean", models=[LLAMA_3_8B] * 2, plan="h100"), device)
    assert planned.counts == {"systems": 129}
    # Seven squares of the head's inputs, and 13 blocks of its outputs, each of a GPU's maximum size.
    assert planned.peak == 4 * (7 * 4096**2 + 13 * 2**28)
    on_cpu = estimate_merge(MergeFlags(method="regmean", models=[LLAMA_3_8B] * 2, plan="h100"), LARGE)
    assert 2.8e9 < on_cpu.peak < 2.9e9
    widths = 32 * [4096, 4096, 4096, 14336] + [4096]
    total = planned.parameters["each model"]
    assert planned.transfers["read"] == 2 * (2 * total + sum(2 * width * (width + 1) for width in widths))
    assert planned.transfers["written"] == 2 * total
    average = estimate_merge(MergeFlags(method="avg", models=[LLAMA_3_8B] * 3, plan="h100"), device)
    assert average.peak == 36 * AVERAGERS * CHUNK_ELEMENTS
    assert (average.flops, average.transfers["read"]) == (0, 6 * total)


def test_a_merge_takes_as_long_as_the_slower_of_gpu_and_host() -> None:
    """Two 8B models take 10.6 s of arithmetic on an H100; beside it, eight threads of the host read 8.03e9 elements of
    both and 32.8 GB of Grams in 6.7 s, and one writes 8.03e9 in 11.5 s. A CPU has no threads beside.
    """
    device = known_device("h100", 1)
    planned = estimate_merge(MergeFlags(method="regmean", models=[LLAMA_3_8B] * 2, plan="h100"), device)
    assert planned.flops / device.single_flops == pytest.approx(10.6, abs=0.1)
    total, grams = planned.parameters["each model"], planned.transfers["read"] - 4 * planned.parameters["each model"]
    reading, writing = total / 0.42e9 + grams / 0.96e9, total / 0.70e9
    assert (reading / 8, writing) == (pytest.approx(6.7, abs=0.1), pytest.approx(11.5, abs=0.1))
    assert planned.seconds == pytest.approx(writing)
    alphas = MergeFlags(method="regmean", models=[LLAMA_3_8B] * 2, alpha=[0.1, 0.5], plan="h100")
    assert estimate_merge(alphas, device).seconds == pytest.approx(2 * writing)
    on_cpu = estimate_merge(MergeFlags(method="regmean", models=[LLAMA_3_8B] * 2, plan="h100"), LARGE)
    host = (reading + writing) / READERS
    assert on_cpu.seconds == pytest.approx(on_cpu.flops / LARGE.single_flops + host)
    average = estimate_merge(MergeFlags(method="avg", models=[LLAMA_3_8B] * 2, plan="h100"), device)
    assert average.seconds == pytest.approx((total / 0.42e9 + writing) / 2)


def test_the_plan_of_a_merge_is_the_one_that_it_prints(
    save: Callable[..., Path], texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    models = [str(save(make_llama(seed), f"model{seed}")) for seed in (0, 1)]
    for model in models:
        words = ["--model", model, "--dataset", str(texts), "--text_column", "text", "--output_dir", f"{model}-grams"]
        run(["python", str(REPOSITORY / "compute_gram.py"), *words])
    merge = ["python", str(REPOSITORY / "merge_model.py"), "--method", "regmean", "--models", *models]
    merge += ["--output_dir", str(tmp_path / "merged")]
    capsys.readouterr()
    run([*merge, "--plan"])
    assert not (tmp_path / "merged").exists()
    plan = capsys.readouterr().out
    run([*merge, "--grams", *(f"{model}-grams" for model in models)])
    printed = capsys.readouterr().out
    planned = estimate_merge(MergeFlags(method="regmean", models=models, plan="h100"), known_device("h100", 1))
    assert f"at most about {planned.peak / 1e9:.2f} GB of arrays" in printed
    systems = planned.counts["systems"]
    assert f"in {systems} systems" in printed and re.search(rf"systems +{systems}$", plan, re.MULTILINE)
