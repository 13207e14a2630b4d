"""`run_training.py` under the real launcher, on tiny models."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file, save_file

from common.cli import parse_flags
from common.errors import InputError
from common.io import sha256
from common.models import load_tokenizer
from mindmerger import build
from mindmerger.batching import lay_out
from mindmerger.config import TrainingFlags
from mindmerger.dev import DevPass
from mindmerger.modeling import MindMergerForCausalLM
from tests.conftest import REPOSITORY
from tests.mindmerger.scripts import (
    deepspeed_command,
    end_of,
    python_command,
    rank_processes,
    run,
    run_ranks,
    started,
    train_here,
    trained_before_5,
    wait_for,
)

Words = tuple[object, ...]
# With the default threshold, ZeRO-3 would not partition tensors as small as these.
ZERO_3 = {"stage": 3, "stage3_param_persistence_threshold": 0}


@pytest.fixture(scope="module")
def pair(models: dict[str, Path]) -> Words:
    return ("--llm_path", models["llama"], "--mt_path", models["mt5"])


@pytest.fixture(scope="module")
def small(pair: Words) -> Words:
    """Two languages, 20 training rows: steps of 8, 8 and 4 rows, so that the last one is not full."""
    return (
        *("--deepspeed", *pair, "--stage_name", "mapping", "--languages", "de,sw", "--train_num", 12),
        *("--dev_size", 4, "--train_batch_size", 8, "--epoch_num", 2, "--max_seq_len", 64),
        *("--lr", "1e-3", "--boundary_lr", "2e-3"),
    )


@pytest.fixture(scope="module")
def reference(work: Path, small: Words) -> dict[str, torch.Tensor]:
    """The mapping after the small run on one rank, every row of a step at once."""
    train_here(work, *small, "--train_micro_batch_size_per_gpu", 8, "--save_name", "one")
    return load_file(work / "outputs/one/mapping/model.safetensors")


def metrics(work: Path, run_folder: str, name: str) -> list[float]:
    lines = (work / "outputs" / run_folder / "metrics.jsonl").read_text().splitlines()
    return [row[name] for row in map(json.loads, lines) if name in row]


def verdicts(work: Path, run_folder: str) -> dict[str, dict[str, Any]]:
    """Verdicts in the config of a mapping, which must be bound to its file."""
    folder = work / "outputs" / run_folder
    found = json.loads((folder / "config.json").read_text())["verdicts"]
    assert found["mapping_sha256"] == sha256(folder / "model.safetensors")
    return found["languages"]


def assert_same(work: Path, save_name: str, reference: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    mapping = load_file(work / "outputs" / save_name / "mapping/model.safetensors")
    assert mapping.keys() == reference.keys()
    for name, tensor in reference.items():
        torch.testing.assert_close(mapping[name], tensor, rtol=tolerance, atol=tolerance)


def keep_trainers(monkeypatch: pytest.MonkeyPatch, see: Callable[[Any], Any] = lambda trainer: trainer) -> list[Any]:
    """List that collects `see(trainer)` for every `Trainer` fitted from now on in this process.

    Training must draw no random numbers, since a saved state holds no generator.
    """
    from mindmerger.trainer import Trainer

    seen, fit = [], Trainer.fit

    def watched(trainer: Trainer) -> dict[str, float]:
        seen.append(see(trainer))
        before = torch.get_rng_state()
        result = fit(trainer)
        assert torch.equal(torch.get_rng_state(), before)
        return result

    monkeypatch.setattr(Trainer, "fit", watched)
    return seen


def test_published_commands_verbatim(work: Path, pair: Words) -> None:
    """Both stages and the evaluation; only data sizes and generation length are reduced."""
    command = (
        f"--deepspeed {' '.join(map(str, pair))} --stage_name {{stage}} --train_num {{n}} --train_batch_size 128 "
        "--train_micro_batch_size_per_gpu {micro} --gradient_accumulation {accumulation} --augmentation False "
        "--epoch_num 3"
    )
    words = command.format(stage="mapping", n=100000, micro=8, accumulation=16).split()
    launcher = deepspeed_command(1, "run_training.py", *words, "--dev_size", 24)
    run(launcher, work)
    port = launcher[launcher.index("--master_port") + 1]
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))
    after_mapping = (work / "outputs/MergeMinds/pytorch_model.bin").read_bytes()
    words = command.format(stage="augmentation", n=30000, micro=2, accumulation=64).split()
    printed = run(deepspeed_command(1, "run_training.py", *words, "--dev_size", 24), work)
    assert printed.count("warning: --augmentation False is not the default of the augmentation stage") == 1
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
    (work / "zero3.json").write_text(json.dumps({"zero_optimization": ZERO_3}))
    run_ranks(ranks, work, "run_training.py", *small, *words, "--save_name", save_name)
    assert_same(work, save_name, reference)
    ours, theirs = (metrics(work, f"{name}/mapping", "loss") for name in (save_name, "one"))
    assert ours == pytest.approx(theirs, rel=1e-5) and len(ours) == 6
    ours, theirs = (metrics(work, f"{name}/mapping", "dev_perplexity") for name in (save_name, "one"))
    assert ours == pytest.approx(theirs, rel=1e-5) and len(ours) == 3
    ours, theirs = (verdicts(work, f"{name}/mapping") for name in (save_name, "one"))
    assert ours.keys() == theirs.keys() == {"German", "Swahili"}
    for language, entry in theirs.items():
        assert ours[language].pop("verdict") == entry.pop("verdict") and ours[language].pop("by") == entry.pop("by")
        assert ours[language] == pytest.approx(entry, rel=1e-4)


STAGES = [("mapping", False), ("augmentation", False), ("augmentation", True)]


@pytest.mark.parametrize(("stage", "augmentation"), STAGES)
def test_dev_rows_decide_by_the_losses_of_the_best_mapping_and_the_llm_alone(
    work: Path,
    pair: Words,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    augmentation: bool,
) -> None:
    """Row by row, from the files' texts and the LLM's own loss; of the second stage the first mapping is the best."""
    monkeypatch.setattr("mindmerger.evaluation.paired.FEWEST_ROWS", 5)
    if stage == "augmentation":
        loss, counts = DevPass.loss, itertools.count(1)
        monkeypatch.setattr(DevPass, "loss", lambda *given: (next(counts) * loss(*given)[0], loss(*given)[1]))
    save_name = f"decided_{stage}_{augmentation}"
    trainers = keep_trainers(monkeypatch)
    words = ("--deepspeed", *pair, "--stage_name", stage, "--languages", "de,sw", "--train_num", 12, "--dev_size", 14)
    words = (*words, "--augmentation", augmentation, "--train_batch_size", 5, "--init_checkpoint", "none", "--lr", 1)
    train_here(work, *words, "--epoch_num", 2, "--save_name", save_name)
    perplexities = metrics(work, f"{save_name}/{stage}", "dev_perplexity")
    assert (perplexities == sorted(perplexities)) == (stage == "augmentation")

    (trainer,) = trainers
    model = MindMergerForCausalLM.from_pretrained(work / "outputs" / save_name / stage)
    tokenizer = load_tokenizer(str(models["llama"]))
    flags = parse_flags(TrainingFlags, [str(word) for word in words])
    monkeypatch.chdir(work)
    examples = {example.location: example for example in build._read_examples(flags, with_prompts=True)}
    losses: dict[str, list[tuple[float, float, int]]] = {}
    with torch.no_grad():
        for row, location in enumerate(trainer.dev.locations(range(14))):
            example = examples[location]
            prompt, target = tokenizer([example.prompt.text, example.target], add_special_tokens=False).input_ids
            target = [*target, tokenizer.eos_token_id]
            ids = torch.tensor([[tokenizer.bos_token_id, *prompt, *target]])
            labels = ids.masked_fill(torch.arange(ids.shape[1]) <= len(prompt), -100)
            alone = float(model.llm(ids, labels=labels).loss) * len(target)
            batch = lay_out(trainer.dev.tokens([row]), tokenizer.bos_token_id)
            mapped = float(model(batch=batch, num_items_in_batch=1.0).loss)
            losses.setdefault(example.language.name, []).append((mapped, alone, len(target)))
    found = verdicts(work, f"{save_name}/{stage}")
    assert found.keys() == losses.keys() and sum(map(len, losses.values())) == 14
    for language, rows in losses.items():
        entry, tokens = found[language], sum(count for *_, count in rows)
        assert entry["mapped"] == pytest.approx(sum(mapped for mapped, *_ in rows) / tokens, rel=1e-4)
        assert entry["alone"] == pytest.approx(sum(alone for _, alone, _ in rows) / tokens, rel=1e-4)
        gains = [alone - mapped for mapped, alone, _ in rows]
        assert entry["gain"] == pytest.approx(sum(gains) / len(rows), rel=1e-3)
        if min(gains) > 0 or max(gains) < 0:
            assert entry["verdict"] == ("helps" if gains[0] > 0 else "harms")


def test_a_stage_whose_prompts_do_not_fit_has_no_verdicts(
    work: Path, small: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(work, *small, "--epoch_num", 1, "--max_prompt_len", 9, "--save_name", "short")
    assert "note: no verdicts by language, for which the LLM alone reads the dev rows' prompts: --max_prompt_len 9" in (
        capsys.readouterr().out
    )
    assert json.loads((work / "outputs/short/mapping/config.json").read_text())["verdicts"] is None


def test_only_the_mapping_has_gradients_and_optimizer_state(
    work: Path, small: Words, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also under DeepSpeed, frozen weights are bit for bit unchanged, and none is in the optimizer."""
    trainers, waits = keep_trainers(monkeypatch), []
    monkeypatch.setattr(type(get_accelerator()), "synchronize", lambda *_: waits.append(1))
    train_here(work, *small, "--save_name", "in_process")
    assert not waits, "DeepSpeed waits for the device in a step"

    (trainer,) = trainers
    model = trainer.engine.module
    fresh = MindMergerForCausalLM.from_base_models(model.config)
    for part in ("encoder", "llm"):
        trained = dict(getattr(model, part).named_parameters())
        for name, parameter in getattr(fresh, part).named_parameters():
            assert torch.equal(trained[name], parameter) and trained[name].grad is None
    mapping = sum(parameter.numel() for parameter in model.mapping.parameters())
    moments = trainer.engine.optimizer.optimizer.state.values()
    assert sum(state["exp_avg"].numel() for state in moments) == mapping

    # The published AdamW and its clipping.
    groups = trainer.engine.optimizer.param_groups
    assert [group["lr"] for group in groups] == [1e-3, 2e-3]
    assert sum(tensor.numel() for tensor in groups[1]["params"]) == model.mapping.end_boundary.numel()
    for group in groups:
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.999), 1e-8, 3e-7)
    assert trainer.engine.gradient_clipping() == 1.0


@pytest.mark.parametrize("config", ["zero2_bf16", "zero3_bf16"])
def test_the_gpus_bf16_files_run_on_a_cpu_too(
    work: Path, small: Words, reference: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    path = REPOSITORY / "configs/deepspeed" / f"{config}.json"
    still = ("--lr", "1e-12", "--boundary_lr", "1e-12")
    words = (*small, "--deepspeed_config", path, "--init_checkpoint", "outputs/one/mapping", *still)
    train_here(work, *words, "--save_name", config)
    ours, theirs = metrics(work, f"{config}/mapping", "dev_perplexity"), metrics(work, "one/mapping", "dev_perplexity")
    assert ours[0] == pytest.approx(theirs[-1], rel=0.05)
    # Written as read: the optimizer's float32 copy, without rounding to bf16.
    assert_same(work, config, reference, tolerance=1e-7)

    learned = f"{config}_accumulated"
    trainers = keep_trainers(monkeypatch)
    train_here(work, *small, "--deepspeed_config", path, "--train_micro_batch_size_per_gpu", 1, "--save_name", learned)
    assert trainers[0].engine.optimizer.gradient_accumulation_dtype == torch.float32
    before, *_, after = metrics(work, f"{learned}/mapping", "dev_perplexity")
    assert before - after == pytest.approx(theirs[0] - theirs[-1], rel=0.05)


def test_an_llm_that_neither_packs_nor_pads_trains_nothing(
    work: Path, small: Words, monkeypatch: pytest.MonkeyPatch, ignore: Callable
) -> None:
    trainers = keep_trainers(monkeypatch)
    monkeypatch.setattr("mindmerger.modeling.pack_attention", lambda llm: False)
    ignore("attention_mask", "position_ids")
    with pytest.raises(InputError, match="gives logits in a padded batch that differ by .* from those of a row alone"):
        train_here(work, *small, "--save_name", "wrong_padding")
    assert not trainers


@pytest.mark.parametrize(("mt", "config"), [("nllb", "zero3.json"), ("llama_without_padding", None)])
def test_other_encoders_train(
    work: Path,
    small: Words,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    mt: str,
    config: str | None,
) -> None:
    if mt == "llama_without_padding":
        shutil.copytree(models["llama"], work / mt)
        settings = json.loads((work / mt / "tokenizer_config.json").read_text())
        del settings["pad_token"]
        (work / mt / "tokenizer_config.json").write_text(json.dumps(settings))
    words = (*small, "--mt_path", models.get(mt, work / mt), "--save_name", mt, "--epoch_num", 1, "--report_to", "none")
    (work / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    linear = keep_trainers(monkeypatch, lambda _: torch.nn.functional.linear)
    train_here(work, *words, *(("--deepspeed_config", config) if config else ()))
    # As in the epoch's plan.
    assert linear == [zero3_linear_wrap if config else torch._C._nn.linear]
    before, after = metrics(work, f"{mt}/mapping", "dev_perplexity")
    assert math.isfinite(before) and math.isfinite(after)
    assert not (work / "outputs" / mt / "mapping/tensorboard").exists()


def test_what_a_run_reads_is_part_of_what_it_is(
    work: Path,
    small: Words,
    reference: dict[str, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same command is another run if the data or the initial mapping have changed."""
    augment = (*small, "--stage_name", "augmentation", "--save_name", "follows", "--epoch_num", 1)
    start = work / "outputs/follows/mapping"
    shutil.copytree(work / "outputs/one/mapping", start)
    train_here(work, *augment)
    train_here(work, *augment)
    assert "finished: nothing to do" in capsys.readouterr().out
    # A mapping from a checkpoint has no other start. Its LLM has Gemma's type here.
    trained_before_5(start, monkeypatch)
    train_here(work, *augment, "--mapping_init", "aligned")
    said = capsys.readouterr().out
    assert "finished: nothing to do" in said and "--mapping_init aligned has no effect" in said
    assert "outputs/follows/mapping was trained under transformers 4.57.3" in said
    state = load_file(start / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in state.items()}, start / "model.safetensors")
    with pytest.raises(InputError, match="initial_mapping_sha256 was"):
        train_here(work, *augment)
    shutil.copytree(work / "datas", work / "other")
    pairs = work / "other/bilingual_pairs/en-de/train_100k.de"
    pairs.write_text(pairs.read_text().replace("German 0", "German 00"))
    with pytest.raises(InputError, match="rows_sha256 was"):
        train_here(work, *small, "--data_dir", "other", "--train_micro_batch_size_per_gpu", 8, "--save_name", "one")


def test_a_killed_run_continues_to_the_same_mapping(work: Path, small: Words) -> None:
    """Killed once; `test_kills.py` kills at random moments, and ranks alone."""
    words = (*small, "--epoch_num", 20, "--save_steps", 10, "--lr_scheduler", "cosine", "--warmup_ratio", 0.1)
    run(python_command("run_training.py", *words, "--save_name", "whole"), work)
    whole = load_file(work / "outputs/whole/mapping/model.safetensors")

    command = python_command("run_training.py", *words, "--save_name", "killed")
    folder = work / "outputs/killed/mapping"
    with started(command, work) as process:
        wait_for(lambda: (folder / "state/step_20").exists(), process)
        process.send_signal(signal.SIGSTOP)
        second = run(command, work, expect=2)
        assert f"outputs/killed/mapping is in use by process {process.pid} on" in second and "Traceback" not in second
        process.kill()
        process.wait()
    # The optimizer's two moments and the mapping.
    mapping_bytes = sum(tensor.nbytes for tensor in whole.values())
    states = sorted((folder / "state").glob("step_*"))
    assert len(states) == 2
    for state in states:
        assert sum(path.stat().st_size for path in state.iterdir()) < 3 * mapping_bytes + 10_000

    printed = run(command, work)
    assert re.search(r"continuing after step \d+ of 60", printed)
    assert_same(work, "killed", whole, tolerance=0)
    for name in ("loss", "dev_perplexity"):
        assert metrics(work, "killed/mapping", name) == metrics(work, "whole/mapping", name)
    assert not (folder / "state").exists()
    with pytest.raises(InputError, match=r"lr was 0\.001, now 0\.002[\s\S]*--overwrite"):
        train_here(work, *words, "--save_name", "killed", "--lr", "2e-3")


def test_slurms_signal_to_all_of_a_job_ends_it_with_a_state_and_an_exit_code(work: Path, small: Words) -> None:
    """Same as `trap "" USR1; deepspeed ...` in a job script, since DeepSpeed's launcher does not handle the signal."""
    words = (*small, "--epoch_num", 100, "--save_name", "slurm", "--gradient_accumulation", 2)
    command = deepspeed_command(2, "run_training.py", *words)
    folder = work / "outputs/slurm/mapping"
    with started(["bash", "-c", 'trap "" USR1; "$@"', "job", *command], work) as process:
        wait_for(lambda: (folder / "metrics.jsonl").exists(), process)
        os.killpg(process.pid, signal.SIGUSR1)
        assert process.wait(timeout=60) == 75
    assert len(list((folder / "state").glob("step_*"))) == 1
    printed = (work / "output.txt").read_text()
    assert re.search(r"stopped: .* after step \d+ of 300, whose state is in", printed) and "Traceback" not in printed


@pytest.mark.parametrize(
    ("optimizer", "zero"),
    [
        ("adamw", {"stage": 3, "stage3_param_persistence_threshold": 0}),
        ("muon", {"stage": 3, "stage3_param_persistence_threshold": 0}),
        ("muon", {"stage": 2}),
        ("muon", {"stage": 1, "offload_optimizer": {"device": "cpu"}}),
    ],
    ids=["adamw", "muon, ZeRO-3", "muon, ZeRO-2", "muon, offloaded"],
)
def test_ranks_that_do_not_divide_a_parameter_stop_and_continue(
    work: Path, small: Words, optimizer: str, zero: dict[str, Any]
) -> None:
    words = (*small, "--optimizer", optimizer, "--train_batch_size", 6, "--epoch_num", 5, "--save_steps", 5)
    whole, parts = f"whole_{optimizer}", f"parts_{optimizer}_{zero['stage']}"
    if not (work / "outputs" / whole).exists():
        train_here(work, *words, "--train_micro_batch_size_per_gpu", 6, "--save_name", whole)
    reference = load_file(work / "outputs" / whole / "mapping/model.safetensors")
    assert any(tensor.numel() % 3 for tensor in reference.values())

    (work / f"{parts}.json").write_text(json.dumps({"zero_optimization": zero}))
    words = (*words, "--deepspeed_config", f"{parts}.json", "--gradient_accumulation", 1, "--save_name", parts)
    state = work / "outputs" / parts / "mapping/state"
    ranks = rank_processes(3, work, "run_training.py", *words)
    while not (state / "step_5").exists():
        assert all(rank.is_alive() for rank in ranks), (work / "output.txt").read_text()
        time.sleep(0.001)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGUSR1)
    end_of(ranks, work, expect=75)
    assert re.search(r"continuing after step \d+ of 20", run_ranks(3, work, "run_training.py", *words))
    assert_same(work, parts, reference, tolerance=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device", "cuda:1"), "--device cuda:1: DeepSpeed gives each rank its GPU"),
        (("--train_batch_size", 8, "--train_micro_batch_size_per_gpu", 3), "--train_batch_size 8 is not"),
        (("--languages", "de,xx"), "unknown language 'xx'"),
        (("--data_dir", "nowhere"), "nowhere/bilingual_pairs/en-de/train_100k.de: no such file"),
        (("--dev_size", 24), "--dev_size 24 holds out all of the 24 training rows"),
        (("--stage_name", "augmentation", "--save_name", "new"), "run --stage_name mapping first"),
        (("--llm_path", "nowhere"), "no tokenizer could be loaded from nowhere"),
        (("--deepspeed_config", "nowhere.json"), "nowhere.json: no such file"),
        (("--deepspeed_config", "no_zero.json"), 'no_zero.json: set "zero_optimization"'),
        (("--deepspeed_config", "offends.json"), "offends.json: invalid for DeepSpeed"),
        (("--lr", "nan"), "--lr nan must be above 0"),
        (("--boundary_lr", 0), "--boundary_lr 0.0 must be above 0"),
        (("--save_name", "a/b"), "must be a plain folder name"),
        (("--init_checkpoint", "nowhere"), "no mapping at nowhere"),
        (("--warmup_ratio", 2), "--warmup_ratio 2.0 must be from 0 to 1"),
        (("--task", "maths"), "--task 'maths' is not one of: math, x-csqa, xnli"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(work: Path, small: Words, words: Words, message: str) -> None:
    (work / "no_zero.json").write_text("{}")
    (work / "offends.json").write_text('{"zero_optimization": {"stage": 2}, "bf16": {"loss_scale_window": 50}}')
    with pytest.raises(InputError) as error:
        train_here(work, *small, "--save_name", "refused", *words)
    assert message in str(error.value) and "\n" not in str(error.value).split("(")[0]
    assert not (work / "outputs/refused").exists()


def test_an_engine_that_does_not_fit_into_memory_is_one_line(
    work: Path, small: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(**_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("deepspeed.initialize", run_out)
    with pytest.raises(InputError, match=r"mt5: out of memory while the model loads: .*ZeRO-3.*--plan shows"):
        train_here(work, *small, "--save_name", "too_large")


def test_batch_sizes_are_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    from mindmerger.config import TrainingFlags

    def sizes(**given: int) -> tuple[int, int, int]:
        flags = TrainingFlags(llm_path="L", mt_path="M", **given)
        return flags.train_batch_size, flags.train_micro_batch_size_per_gpu, flags.gradient_accumulation

    assert sizes() == (128, 8, 16)
    assert sizes(train_batch_size=12) == (12, 6, 2)
    assert sizes(train_batch_size=24, gradient_accumulation=6) == (24, 4, 6)
    assert sizes(train_micro_batch_size_per_gpu=2) == (128, 2, 64)
    assert sizes(train_micro_batch_size_per_gpu=3, gradient_accumulation=5) == (15, 3, 5)
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(InputError, match="6 rank.s. = 126: set it to a multiple of 6$"):
        sizes()
    with pytest.raises(InputError, match="set it to a multiple of 24$"):
        sizes(train_micro_batch_size_per_gpu=4)
    with pytest.raises(InputError, match="set it to a multiple of 24, or leave one of the three out"):
        sizes(train_batch_size=10, train_micro_batch_size_per_gpu=2, gradient_accumulation=2)


def test_loss_falls(work: Path, reference: dict[str, torch.Tensor]) -> None:
    perplexities = metrics(work, "one/mapping", "dev_perplexity")
    assert perplexities[-1] < perplexities[0] and all(map(math.isfinite, perplexities))
