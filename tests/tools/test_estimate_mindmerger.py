"""Estimates of training and evaluation: published sizes, and small ones against real models and tensors."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.errors import InputError
from common.io import read_json
from mindmerger.config import EvaluationFlags, ModelFlags, TrainingFlags
from mindmerger.frozen_models import load_encoder
from mindmerger.modeling import MindMergerForCausalLM, mapping_config
from tests.commands import run
from tests.conftest import REPOSITORY
from tests.mindmerger.test_probe import PLANNED
from tests.tiny_models import tiny_llama, tiny_mt5, tiny_nllb, tiny_qwen, tiny_xlm_roberta
from tools.estimate import (
    LAUNCH_SECONDS,
    OWN_ATTENTION,
    causal_lm_on_meta,
    cost_of,
    known_device,
    parameters,
    weight_bytes,
)
from tools.estimate_mindmerger import (
    Row,
    _frozen_weights,
    encoder_cost,
    encoder_on_meta,
    estimate_evaluation,
    estimate_training,
    model_on_meta,
    prefill_cost,
    step_cost,
)

MODELS = REPOSITORY / "configs" / "models"
PUBLISHED = {"llm_path": str(MODELS / "metamath-7b"), "mt_path": str(MODELS / "mt5-xl")}
ZERO2, ZERO3 = (read_json(REPOSITORY / f"configs/deepspeed/zero{stage}_bf16.json") for stage in (2, 3))
BUCKET = 30_000_000  # elements of DeepSpeed's buffer for gradients, by both files


def flags(plan: str, **more: object) -> TrainingFlags:
    options = PUBLISHED | {"train_micro_batch_size_per_gpu": 8, "train_batch_size": 128, "plan": plan}
    return TrainingFlags(**(options | more))


def plan(device: str, count: int = 1, zero: dict = ZERO2, **more: object):
    return estimate_training(flags(f"{count}x{device}", **more), known_device(device, count), zero, torch.bfloat16)


@pytest.mark.parametrize("write", [tiny_mt5, tiny_nllb, tiny_xlm_roberta, tiny_qwen])
def test_the_encoder_is_the_one_that_is_loaded(tmp_path: Path, write) -> None:
    write(tmp_path)
    options = (str(tmp_path), None, torch.float32, False)
    planned, loaded = encoder_on_meta(*options), load_encoder(*options)
    assert parameters(planned) == parameters(loaded)
    if write is tiny_qwen:
        assert parameters(encoder_on_meta(*options, 1)) == parameters(load_encoder(*options, 1)) < parameters(planned)
    else:
        with pytest.raises(InputError, match="--encoder_layer"):
            encoder_on_meta(*options, 1)


@pytest.mark.parametrize("write", [tiny_mt5, tiny_nllb, tiny_xlm_roberta, tiny_qwen])
def test_a_step_takes_what_its_plan_says(tmp_path: Path, write) -> None:
    """The estimate equals the sum over all tensors of a real step, counted while they exist."""
    tiny_llama(tmp_path / "L")
    write(tmp_path / "M")
    names = ModelFlags(llm_path=str(tmp_path / "L"), mt_path=str(tmp_path / "M"))
    rows, row = 4, Row(64, 96, 8)
    planned = model_on_meta(names, torch.float32)
    expected = max(cost(planned, rows, row).peak_bytes for cost in (encoder_cost, step_cost))

    model = MindMergerForCausalLM.from_base_models(mapping_config(names.models, 1))
    source, prompt, target = (torch.full((rows, length), 10) for length in (row.source, row.prompt, row.target))
    everything = (source, torch.ones_like(source), prompt, torch.ones_like(prompt), target)
    measured = cost_of(lambda: model(*everything).loss.backward(), model).peak_bytes
    assert expected == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_a_plan_of_training_through_an_llm_with_attention_of_its_own(
    family: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Two products forward and two backward for each weight and token; some for attention, encoder and mapping."""
    PLANNED[family].save_pretrained(tmp_path)
    planned = plan("h100", llm_path=str(tmp_path), mt_path=str(models["mt5"]), dev_size=0)
    modules = causal_lm_on_meta(str(tmp_path)).base_model.modules()
    layers = [module for module in modules if not isinstance(module, torch.nn.Embedding)]
    weights = sum(p.numel() for module in layers for p in module.parameters(recurse=False) if p.ndim == 2)
    assert 1 < planned.flops / (4 * weights * planned.counts["LLM tokens"]) < 3


def test_the_published_training_fits_one_gpu() -> None:
    mapping = plan("a100-80gb", stage_name="mapping")
    size = mapping.parameters
    assert (size["LLM"], size["mapping"]) == (6_738_423_808, 25_178_112)
    m, inner, layers, vocabulary = 2048, 5120, 24, 250112
    # Per layer four attention matrices, three of the feed-forward and two norms; one norm, and one table of biases.
    assert size["encoder"] == vocabulary * m + layers * (4 * m * m + 3 * m * inner + 2 * m) + m + 32 * 32
    assert mapping.memory["weights"] == pytest.approx(2 * (size["LLM"] + size["encoder"]), rel=1e-6)
    assert mapping.memory["optimizer"] == 20 * size["mapping"] + 2 * BUCKET
    # The whole mapping goes into the buffer at once; DeepSpeed's own size would take 0.94 GB more.
    assert size["mapping"] < BUCKET
    own = plan("a100-80gb", zero={"zero_optimization": {"stage": 2}}, stage_name="mapping")
    assert own.memory["optimizer"] - mapping.memory["optimizer"] == 2 * (500_000_000 - BUCKET)
    assert mapping.transfers == {"disk": 48 * size["mapping"]}
    assert mapping.counts["steps"] == 3 * 7008
    # A token of LLaMA-7B keeps 131 KB a layer in bf16; 8 rows of 1 + 512 + 1 + 512 tokens.
    kept = 32 * 8 * 1026 * (2 * 4 * 4096 + 2 * (4 * 4096 + 3 * 11008))
    assert kept < mapping.memory["activations"] < 1.1 * kept
    assert mapping.peak < known_device("a100-80gb", 1).memory
    # 2 n forward, 2 n backward, for 897,000 rows three times, and the encoder.
    work = 3 * 897_000 * (137 * 4 * 6.6e9 + 73 * 2 * 1.16e9)
    assert mapping.flops == pytest.approx(work, rel=0.1)
    rows = 3 * 7008 * 128 + (1 + 3 * 7008 // 500 + 3) * 3000  # for training, and for evaluation
    assert (mapping.counts["LLM tokens"], mapping.counts["encoder tokens"]) == (137 * rows, 73 * rows)


def activations(**more: object) -> float:
    return plan("h100", gradient_checkpointing=True, **more).memory["activations"]


def test_dev_rows_are_part_of_the_peak() -> None:
    few, many = (activations(eval_batch_size=rows) for rows in (1, 64))
    assert many > 2 * few
    assert activations(eval_batch_size=64, dev_size=0) == activations(eval_batch_size=64, dev_size=1) == few


def test_recomputation_and_zero3_take_less() -> None:
    whole = plan("a100-80gb", 8)
    split = plan("a100-80gb", 8, ZERO3)
    gathered = 1_000_000_000
    read = 2 * 7 / 8 * whole.memory["weights"] * whole.counts["steps"] * 2
    assert "traffic" not in whole.transfers and split.transfers["traffic"] == pytest.approx(read)
    assert split.memory["weights"] == pytest.approx(whole.memory["weights"] / 8 + 2 * gathered)
    mapping = whole.parameters["mapping"]
    assert whole.memory["optimizer"] == pytest.approx((4 + 16 / 8) * mapping + 2 * BUCKET)
    recomputed = plan("a100-80gb", 8, gradient_checkpointing=True)
    assert recomputed.memory["activations"] < whole.memory["activations"] / 4


def test_zero3_gathers_the_largest_module_whole() -> None:
    """The head of Llama-3.1-405B, as large as the embedding, exceeds DeepSpeed's limit of live parameters."""
    largest = flags("8xh200", llm_path=str(MODELS / "llama-3.1-405b"))
    model = model_on_meta(largest, torch.bfloat16)
    head = 16384 * 128256
    assert head == model.llm.get_output_embeddings().weight.numel() == 2_101_346_304 > 1_000_000_000
    weights, _ = _frozen_weights(largest, known_device("h200", 8), ZERO3["zero_optimization"], model, 1)
    assert weights == weight_bytes(model.llm, model.encoder) / 8 + 2 * head


def test_under_zero3_linear_layers_keep_their_inputs() -> None:
    """A frozen layer keeps nothing itself. These are, per layer, both norms' outputs and the inputs of o and down."""
    usual = {"zero_optimization": {"stage": 3, "memory_efficient_linear": False}}
    plain, divided, stage3 = (plan("a100-80gb", 8, zero).memory["activations"] for zero in (ZERO2, ZERO3, usual))
    inputs = 32 * 8 * 1026 * 2 * (3 * 4096 + 11008)
    assert inputs < divided - plain < 1.25 * inputs
    assert stage3 == plain
    assert torch.nn.functional.linear is torch._C._nn.linear


def test_a_planned_number_of_devices_stands_for_the_ranks() -> None:
    assert flags("8xh100").gradient_accumulation == 2
    assert flags("h100").gradient_accumulation == 16


def test_the_cache_of_an_evaluation() -> None:
    device = known_device("a100-80gb", 1)
    evaluation = EvaluationFlags(**PUBLISHED, plan="a100-80gb")
    planned = estimate_evaluation(evaluation, "mgsm", device, torch.bfloat16)
    assert planned.memory["cache"] == 2 * 32 * 4096 * 2 * 16 * (1 + 512 + 1 + 512 + 512)
    tokens = {"LLM tokens": 2750 * (1 + 73 + 1 + 190 + 103), "encoder tokens": 2750 * 73}
    assert planned.counts == {"problems": 11 * 250, **tokens}
    assert planned.memory["weights"] == pytest.approx(2 * sum(planned.parameters.values()), rel=1e-6)
    assert planned.peak < device.memory
    alone = estimate_evaluation(
        EvaluationFlags(llm_path=PUBLISHED["llm_path"], baseline=True, plan="h100"), "mgsm", device, torch.bfloat16
    )
    assert alone.parameters == {"LLM": planned.parameters["LLM"]} and alone.counts["encoder tokens"] == 0
    assert alone.memory["cache"] < planned.memory["cache"]
    # With LLaMA-7B, a token of every row takes as long as starting its operations, about 77 a layer. An A100's memory
    # needs only 11 ms for 13.5 GB of weights and 2.2 GB of cache (16 rows of 265 tokens).
    calls = prefill_cost(causal_lm_on_meta(PUBLISHED["llm_path"], dtype=torch.bfloat16), 16, 1).calls
    assert 32 * 75 < calls < 32 * 80
    assert planned.seconds > 2750 / 16 * 103 * calls * LAUNCH_SECONDS > 2750 / 16 * 103 * 15.7e9 / device.bandwidth
    assert f"a token takes {calls:,.0f} operations" in planned.notes["time"]
    vllm = estimate_evaluation(replace(evaluation, backend="vllm"), "mgsm", device, torch.bfloat16)
    cpu = estimate_evaluation(evaluation, "mgsm", replace(device, type="cpu"), torch.bfloat16)
    assert "operations" not in vllm.notes["time"] + cpu.notes["time"] and cpu.seconds < planned.seconds
    labels = estimate_evaluation(evaluation, "xnli", device, torch.bfloat16)
    assert labels.memory["cache"] == 4 * 2 * 32 * 4096 * 2 * 16 * (1 + 512 + 1 + 512 + 2)


def test_a_plan_needs_two_configs_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    tiny_llama(tmp_path / "L")
    tiny_mt5(tmp_path / "M")
    for path in tmp_path.glob("[LM]/*"):
        if path.name != "config.json":
            path.unlink()
    monkeypatch.chdir(tmp_path / "work")
    models = ["--llm_path", "../L", "--mt_path", "../M", "--plan"]
    run(["python", str(REPOSITORY / "run_training.py"), *models])
    assert "this machine's cpu" in capsys.readouterr().out
    run(["python", str(REPOSITORY / "run_evaluation.py"), "--task", "mgsm,x-csqa", *models, "2xh200"])
    out = capsys.readouterr().out
    assert "evaluation on mgsm" in out and "evaluation on x-csqa" in out and "2 x h200" in out and "fits" in out
    assert not list((tmp_path / "work").iterdir())
    assert weight_bytes(encoder_on_meta("../M", None, torch.float32, False)) > 0
