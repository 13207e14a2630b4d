"""`run_training.py` under the real launcher, on tiny models."""

import json
import math
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import REPOSITORY
from tests.mindmerger.datas import write_datas
from tests.mindmerger.scripts import ENVIRONMENT, deepspeed_command, python_command, run

Words = tuple[object, ...]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user stands, with a `datas` folder."""
    folder = tmp_path_factory.mktemp("work")
    write_datas(folder / "datas")
    return folder


@pytest.fixture(scope="module")
def pair(models: dict[str, Path]) -> Words:
    return ("--llm_path", models["llama"], "--mt_path", models["mt5"])


@pytest.fixture(scope="module")
def small(pair: Words) -> Words:
    """Two languages, 20 training rows: steps of 8, 8 and 4 rows, so that the last one is not full."""
    return (
        *("--deepspeed", *pair, "--stage_name", "mapping", "--languages", "de,sw", "--train_num", 12),
        *("--dev_size", 4, "--train_batch_size", 8, "--epoch_num", 2, "--lr", "1e-3", "--max_seq_len", 64),
    )


@pytest.fixture(scope="module")
def reference(work: Path, small: Words) -> dict[str, torch.Tensor]:
    """The mapping after the small run on one rank, every row of a step at once."""
    run(python_command("run_training.py", *small, "--train_micro_batch_size_per_gpu", 8, "--save_name", "one"), work)
    return load_file(work / "outputs/one/mapping/model.safetensors")


def metrics(work: Path, run_folder: str, name: str) -> list[float]:
    lines = (work / "outputs" / run_folder / "metrics.jsonl").read_text().splitlines()
    return [row[name] for row in map(json.loads, lines) if name in row]


def assert_same(work: Path, save_name: str, reference: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    mapping = load_file(work / "outputs" / save_name / "mapping/model.safetensors")
    assert mapping.keys() == reference.keys()
    for name, tensor in reference.items():
        torch.testing.assert_close(mapping[name], tensor, rtol=tolerance, atol=tolerance)


def test_published_commands_verbatim(work: Path, pair: Words) -> None:
    """Both stages and the evaluation; only data sizes and generation length are cut to the machine."""
    command = (
        f"--deepspeed {' '.join(map(str, pair))} --stage_name {{stage}} --train_num {{n}} --train_batch_size 128 "
        "--train_micro_batch_size_per_gpu {micro} --gradient_accumulation {accumulation} --augmentation False "
        "--epoch_num 3"
    )
    words = command.format(stage="mapping", n=100000, micro=8, accumulation=16).split()
    run(deepspeed_command(1, "run_training.py", *words, "--dev_size", 24), work)
    after_mapping = (work / "outputs/MergeMinds/pytorch_model.bin").read_bytes()
    words = command.format(stage="augmentation", n=30000, micro=2, accumulation=64).split()
    printed = run(deepspeed_command(1, "run_training.py", *words, "--dev_size", 24), work)
    assert printed.count("warning: --augmentation False in the augmentation stage") == 1
    assert (work / "outputs/MergeMinds/pytorch_model.bin").read_bytes() != after_mapping
    words = (*pair, "--init_checkpoint", "outputs/MergeMinds/pytorch_model.bin", "--augmentation", "True")
    run(python_command("run_evaluation.py", *words, "--max_gen_len", 8), work)
    scores = json.loads((work / "results/MergeMinds/mgsm/scores.json").read_text())
    assert len(scores["languages"]) == 11

    for stage in ("mapping", "augmentation"):
        folder = work / "outputs/MergeMinds" / stage
        assert {path.name for path in folder.iterdir()} == {
            "config.json", "model.safetensors", "pytorch_model.bin", "metrics.jsonl", "run.json", "tensorboard",
        }  # fmt: skip
        config = json.loads((folder / "config.json").read_text())
        assert (config["stage"], config["llm_hidden_size"], config["mt_hidden_size"]) == (stage, 32, 24)
        perplexities = metrics(work, f"MergeMinds/{stage}", "dev_perplexity")
        assert len(perplexities) == 4
        best = json.loads((folder / "run.json").read_text())["result"]["best_dev_perplexity"]
        assert best == pytest.approx(min(perplexities), abs=1e-4)


@pytest.mark.parametrize(
    ("save_name", "ranks", "words"),
    [
        ("accumulated", 1, ("--train_micro_batch_size_per_gpu", 1)),
        ("two_ranks", 2, ("--train_micro_batch_size_per_gpu", 2, "--gradient_accumulation", 2)),
        ("zero3", 2, ("--gradient_accumulation", 1, "--deepspeed_config", "zero3.json", "--gradient_checkpointing")),
    ],
)
def test_micro_batch_accumulation_ranks_and_zero_stage_change_nothing(
    work: Path, small: Words, reference: dict[str, torch.Tensor], save_name: str, ranks: int, words: Words
) -> None:
    (work / "zero3.json").write_text('{"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0}')
    run(deepspeed_command(ranks, "run_training.py", *small, *words, "--save_name", save_name), work)
    assert_same(work, save_name, reference)
    ours, theirs = (metrics(work, f"{name}/mapping", "loss") for name in (save_name, "one"))
    assert ours == pytest.approx(theirs, rel=1e-5) and len(ours) == 6
    ours, theirs = (metrics(work, f"{name}/mapping", "dev_perplexity") for name in (save_name, "one"))
    assert ours == pytest.approx(theirs, rel=1e-5) and len(ours) == 3


def test_only_the_mapping_has_gradients_and_optimizer_state(
    work: Path, small: Words, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under DeepSpeed, too, frozen weights are bit for bit what they were, and the optimizer knows none of them."""
    from common.flags import parse_flags
    from mindmerger import trainer
    from mindmerger.flags import TrainingFlags

    stages = []
    fit = trainer.Stage.fit
    monkeypatch.setattr(trainer.Stage, "fit", lambda stage: (stages.append(stage), fit(stage))[1])
    monkeypatch.chdir(work)
    trainer.train(parse_flags(TrainingFlags, [str(word) for word in (*small, "--save_name", "in_process")]))

    (stage,) = stages
    fresh = trainer.MindMergerForCausalLM.from_base_models(stage.model.config)
    for part in ("encoder", "llm"):
        trained = dict(getattr(stage.model, part).named_parameters())
        for name, parameter in getattr(fresh, part).named_parameters():
            assert torch.equal(trained[name], parameter) and trained[name].grad is None
    mapping = sum(parameter.numel() for parameter in stage.model.mapping.parameters())
    moments = stage.engine.optimizer.optimizer.state.values()
    assert sum(state["exp_avg"].numel() for state in moments) == mapping


def test_bf16_on_the_cpu_as_on_a_gpu(work: Path, small: Words, reference: dict[str, torch.Tensor]) -> None:
    config = REPOSITORY / "configs/deepspeed/zero2_bf16.json"
    run(python_command("run_training.py", *small, "--deepspeed_config", config, "--save_name", "bf16"), work)
    ours, theirs = (metrics(work, f"{name}/mapping", "dev_perplexity") for name in ("bf16", "one"))
    assert ours == pytest.approx(theirs, rel=0.05)
    assert_same(work, "bf16", reference, tolerance=2e-2)
    # The saved mapping is the optimizer's float32 copy, not its rounding.
    saved = load_file(work / "outputs/bf16/mapping/model.safetensors")["mlp.linear1.weight"]
    assert saved.dtype == torch.float32 and not torch.equal(saved, saved.bfloat16().float())


def test_a_killed_run_continues_to_the_same_mapping(work: Path, small: Words) -> None:
    words = (*small, "--epoch_num", 20, "--save_steps", 10, "--lr_scheduler", "cosine", "--warmup_ratio", 0.1)
    run(python_command("run_training.py", *words, "--save_name", "whole"), work)
    whole = load_file(work / "outputs/whole/mapping/model.safetensors")

    command = python_command("run_training.py", *words, "--save_name", "killed")
    process = subprocess.Popen(command, cwd=work, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = work / "outputs/killed/mapping/state"
    while not (state / "latest").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Optimizer and mapping, and some 20 kB of DeepSpeed's own; the frozen models alone would be ten times this.
    mapping_bytes = sum(tensor.nbytes for tensor in whole.values())
    newest = state / (state / "latest").read_text()
    assert sum(path.stat().st_size for path in newest.iterdir()) < 4 * mapping_bytes + 30_000

    printed = run(command, work)
    assert re.search(r"continuing after step \d+ of 60", printed)
    assert_same(work, "killed", whole, tolerance=0)
    assert metrics(work, "killed/mapping", "loss") == metrics(work, "whole/mapping", "loss")
    assert not state.exists()
    assert "finished: nothing to do" in run(command, work)
    refused = run([*command, "--lr", "2e-3"], work, expect=2)
    assert "lr was 0.001, now 0.002" in refused and "--overwrite" in refused and "Traceback" not in refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--train_batch_size", 8, "--train_micro_batch_size_per_gpu", 3), "--train_batch_size 8 is not"),
        (("--languages", "de,xx"), "unknown language 'xx'"),
        (("--data_dir", "nowhere"), "nowhere/bilingual_pairs/en-de/train_100k.de: no such file"),
        (("--dev_size", 24), "--dev_size 24 holds out all of the 24 training rows"),
        (("--stage_name", "augmentation", "--save_name", "new"), "run --stage_name mapping first"),
        (("--llm_path", "nowhere"), "no tokenizer could be loaded from nowhere"),
        (("--deepspeed_config", "nowhere.json"), "nowhere.json: no such file"),
        (("--save_name", "a/b"), "must be a plain folder name"),
        (("--init_checkpoint", "nowhere"), "no mapping at nowhere"),
        (("--warmup_ratio", 2), "--warmup_ratio 2.0 must be from 0 to 1"),
        (("--task", "maths"), "--task 'maths' is not one of: math, x-csqa, xnli"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    work: Path, small: Words, words: Words, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from common.errors import InputError
    from common.flags import parse_flags
    from mindmerger.flags import TrainingFlags
    from mindmerger.trainer import train

    monkeypatch.chdir(work)
    with pytest.raises(InputError) as error:
        train(parse_flags(TrainingFlags, [str(word) for word in (*small, "--save_name", "refused", *words)]))
    assert message in str(error.value) and "\n" not in str(error.value).split("(")[0]
    assert not (work / "outputs/refused").exists()


def test_batch_sizes_are_derived() -> None:
    from mindmerger.flags import TrainingFlags

    def sizes(**given: int) -> tuple[int, int, int]:
        flags = TrainingFlags(llm_path="L", mt_path="M", **given)
        return flags.train_batch_size, flags.train_micro_batch_size_per_gpu, flags.gradient_accumulation

    assert sizes() == (128, 8, 16)
    assert sizes(train_batch_size=24, gradient_accumulation=6) == (24, 4, 6)
    assert sizes(train_micro_batch_size_per_gpu=2) == (128, 2, 64)
    assert sizes(train_micro_batch_size_per_gpu=3, gradient_accumulation=5) == (15, 3, 5)


def test_loss_falls(work: Path, reference: dict[str, torch.Tensor]) -> None:
    perplexities = metrics(work, "one/mapping", "dev_perplexity")
    assert perplexities[-1] < perplexities[0] and all(map(math.isfinite, perplexities))
