"""Plans of training and evaluation: published sizes, and small ones against real models and real tensors."""

from pathlib import Path

import pytest
import torch

from common.devices import known_device
from common.errors import InputError
from mindmerger.config import EvaluationFlags, ModelFlags, TrainingFlags
from mindmerger.frozen_models import load_encoder
from mindmerger.modeling import MindMergerForCausalLM, mapping_config
from tests.commands import run
from tests.conftest import REPOSITORY
from tests.tiny_models import tiny_llama, tiny_mt5, tiny_nllb, tiny_qwen, tiny_xlm_roberta
from tools.estimate import cost_of, parameters, weight_bytes
from tools.estimate_mindmerger import (
    Row,
    encoder_cost,
    encoder_on_meta,
    evaluation_plan,
    model_on_meta,
    step_cost,
    training_plan,
)

MODELS = REPOSITORY / "configs" / "models"
PUBLISHED = {"llm_path": str(MODELS / "metamath-7b"), "mt_path": str(MODELS / "mt5-xl")}
ZERO2, ZERO3 = ({"zero_optimization": {"stage": stage}} for stage in (2, 3))


def flags(plan: str, **more: object) -> TrainingFlags:
    options = {"train_micro_batch_size_per_gpu": 8, "train_batch_size": 128, "plan": plan}
    return TrainingFlags(**PUBLISHED, **(options | more))


def plan(device: str, count: int = 1, zero: dict = ZERO2, **more: object):
    return training_plan(flags(f"{count}x{device}", **more), known_device(device, count), zero, torch.bfloat16)


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
    """Every tensor of the real step counted, as long as it lives."""
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


def test_the_published_training_fits_one_gpu() -> None:
    mapping = plan("a100-80gb", stage_name="mapping")
    assert (mapping.llm, mapping.mapping) == (6_738_423_808, 25_178_112)
    m, inner, layers, vocabulary = 2048, 5120, 24, 250112
    # Of each layer four attention matrices, three of the feed-forward and two norms; one norm, and one table of biases.
    assert mapping.encoder == vocabulary * m + layers * (4 * m * m + 3 * m * inner + 2 * m) + m + 32 * 32
    assert mapping.weights == pytest.approx(2 * (mapping.llm + mapping.encoder), rel=1e-6)
    assert mapping.optimizer == 20 * mapping.mapping + 2 * 500_000_000
    assert mapping.disk == 48 * mapping.mapping
    assert (mapping.steps, mapping.micro_batches) == (3 * 7008, 3 * 7008 * 16)
    # A token of LLaMA-7B keeps 131 KB a layer in bf16; 8 rows of 1 + 512 + 1 + 512 tokens.
    kept = 32 * 8 * 1026 * (2 * 4 * 4096 + 2 * (4 * 4096 + 3 * 11008))
    assert kept < mapping.activations < 1.1 * kept
    assert mapping.peak < known_device("a100-80gb", 1).memory
    # 2 n forward, 2 n backward, for 897,000 rows three times, and the encoder.
    work = 3 * 897_000 * (137 * 4 * 6.6e9 + 73 * 2 * 1.16e9)
    assert mapping.flops == pytest.approx(work, rel=0.1)
    assert mapping.mean_activations < mapping.activations / 5
    rows = 3 * 7008 * 128 + (1 + 3 * 7008 // 500 + 3) * 3000  # learned from, and evaluated
    assert (mapping.llm_tokens, mapping.encoder_tokens) == (137 * rows, 73 * rows)


def test_dev_rows_are_part_of_the_peak() -> None:
    few, many = (plan("h100", eval_batch_size=rows, gradient_checkpointing=True) for rows in (1, 64))
    assert many.activations > 2 * few.activations
    assert plan("h100", eval_batch_size=64, gradient_checkpointing=True, dev_size=0).activations == few.activations
    assert plan("h100", eval_batch_size=64, gradient_checkpointing=True, dev_size=1).activations == few.activations


def test_recomputation_and_zero3_take_less() -> None:
    whole = plan("a100-80gb", 8)
    split = plan("a100-80gb", 8, ZERO3)
    gathered = 1_000_000_000
    assert whole.traffic == 0 and split.traffic == pytest.approx(2 * 7 / 8 * whole.weights * whole.steps * 2)
    assert split.weights == pytest.approx(whole.weights / 8 + 2 * gathered)
    assert whole.optimizer == pytest.approx((4 + 16 / 8) * whole.mapping + 2 * 500_000_000)
    assert plan("a100-80gb", 8, gradient_checkpointing=True).activations < whole.activations / 4


def test_under_zero3_linear_layers_keep_their_inputs() -> None:
    """A frozen one keeps nothing by itself. These are, of a layer, both norms' outputs, and what o and down read."""
    plain, divided = plan("a100-80gb", 8), plan("a100-80gb", 8, ZERO3)
    inputs = 32 * 8 * 1026 * 2 * (3 * 4096 + 11008)
    assert inputs < divided.activations - plain.activations < 1.25 * inputs
    usual = {"zero_optimization": {"stage": 3, "memory_efficient_linear": False}}
    assert plan("a100-80gb", 8, usual).activations == plain.activations
    assert torch.nn.functional.linear is torch._C._nn.linear


def test_a_planned_number_of_devices_stands_for_the_ranks() -> None:
    assert flags("8xh100").gradient_accumulation == 2
    assert flags("h100").gradient_accumulation == 16


def test_the_cache_of_an_evaluation() -> None:
    device = known_device("a100-80gb", 1)
    evaluation = EvaluationFlags(**PUBLISHED, plan="a100-80gb")
    planned = evaluation_plan(evaluation, "mgsm", device, torch.bfloat16)
    assert planned.cache == 2 * 32 * 4096 * 2 * 16 * (1 + 512 + 1 + 512 + 512)
    assert planned.problems == 11 * 250
    assert (planned.llm_tokens, planned.encoder_tokens) == (2750 * (1 + 73 + 1 + 190 + 103), 2750 * 73)
    assert planned.weights == pytest.approx(2 * (planned.llm + planned.encoder + planned.mapping), rel=1e-6)
    assert planned.peak < device.memory
    alone = evaluation_plan(
        EvaluationFlags(llm_path=PUBLISHED["llm_path"], baseline=True, plan="h100"), "mgsm", device, torch.bfloat16
    )
    assert alone.encoder == alone.mapping == alone.encoder_tokens == 0 and alone.cache < planned.cache
    labels = evaluation_plan(evaluation, "xnli", device, torch.bfloat16)
    assert labels.cache == 4 * 2 * 32 * 4096 * 2 * 16 * (1 + 512 + 1 + 512 + 2)


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
