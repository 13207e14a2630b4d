"""Faults injected into a training run in this process: nothing is lost, and messages name the cause."""

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.modeling_outputs import CausalLMOutput

from common.errors import InputError, Stopped
from common.locks import locked
from mindmerger import trainer
from mindmerger.batching import Batch
from mindmerger.dev import DevPass
from mindmerger.modeling import MindMergerForCausalLM
from tests.mindmerger.scripts import train_here

Words = tuple[object, ...]
STEPS = 12


@pytest.fixture(scope="module")
def words(models: dict[str, Path]) -> Words:
    """A run of 12 steps with four micro batches each, evaluated every third, saved every second."""
    return (
        *("--deepspeed", "--llm_path", models["llama"], "--mt_path", models["mt5"], "--languages", "de,sw"),
        *("--train_num", 10, "--dev_size", 4, "--train_batch_size", 8, "--train_micro_batch_size_per_gpu", 2),
        *("--epoch_num", 6, "--lr", "1e-3", "--lr_scheduler", "cosine", "--warmup_ratio", 0.2, "--max_seq_len", 64),
        *("--boundary_lr", "2e-3", "--eval_steps", 3, "--save_steps", 2, "--device", "cpu"),
    )


def mapping(work: Path, save_name: str) -> dict[str, torch.Tensor]:
    return load_file(work / "outputs" / save_name / "mapping/model.safetensors")


@pytest.fixture(scope="module")
def whole(work: Path, words: Words) -> dict[str, torch.Tensor]:
    """The mapping of the undisturbed run."""
    train_here(work, *words, "--save_name", "whole")
    return mapping(work, "whole")


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)) for name in a)


def before_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> list[int]:
    """Call `act` with the number of each step that begins; return the list of these numbers."""
    step, begun = trainer.Trainer.step, []

    def watched(self: trainer.Trainer, rows: list) -> Any:
        begun.append(len(begun) + 1)
        act(begun[-1])
        return step(self, rows)

    monkeypatch.setattr(trainer.Trainer, "step", watched)
    return begun


@pytest.mark.parametrize(("name", "at"), [("SIGTERM", 5), ("SIGUSR1", 6), ("SIGTERM", 12)])
def test_a_signal_saves_and_stops_and_the_same_command_goes_on(
    work: Path, words: Words, whole: dict, monkeypatch: pytest.MonkeyPatch, name: str, at: int
) -> None:
    save_name = f"{name}{at}"
    with monkeypatch.context() as patch:
        before_step(patch, lambda step: step == at and os.kill(os.getpid(), getattr(signal, name)))
        with pytest.raises(Stopped, match=f"{name} after step {at} of {STEPS}"):
            train_here(work, *words, "--save_name", save_name)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    begun = before_step(monkeypatch, lambda step: None)
    train_here(work, *words, "--save_name", save_name)
    assert len(begun) == STEPS - at
    assert same_bits(mapping(work, save_name), whole)
    lines = [(work / "outputs" / run / "mapping/metrics.jsonl").read_text().count("\n") for run in (save_name, "whole")]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(("method", "step"), [("loss", 0), ("judge", 12)])
def test_a_signal_during_an_evaluation_waits_for_no_end_of_it(
    work: Path, words: Words, whole: dict, monkeypatch: pytest.MonkeyPatch, method: str, step: int
) -> None:
    """Also while the dev rows decide on languages, with the best mapping in the model."""
    forward, begin, begun, batches = DevPass._forward, getattr(DevPass, method), [], []

    def watched(self: DevPass, batch: Batch) -> CausalLMOutput:
        batches.extend([batch] * len(begun))
        if len(batches) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return forward(self, batch)

    save_name = f"evaluating_{method}"
    with monkeypatch.context() as patch:
        patch.setattr(DevPass, method, lambda *given: (begun.append(1), begin(*given))[1])
        patch.setattr(DevPass, "_forward", watched)
        with pytest.raises(Stopped, match=f"SIGUSR1 after step {step} of 12"):
            train_here(work, *words, "--save_name", save_name, "--eval_batch_size", 1)
    assert len(batches) == 2
    train_here(work, *words, "--save_name", save_name, "--eval_batch_size", 1)
    assert same_bits(mapping(work, save_name), whole)
    ours, theirs = (work / f"outputs/{name}/mapping" for name in (save_name, "whole"))
    lines = [(folder / "metrics.jsonl").read_text().count("\n") for folder in (ours, theirs)]
    assert lines[0] == lines[1]
    verdicts = [json.loads((folder / "config.json").read_text())["verdicts"] for folder in (ours, theirs)]
    assert verdicts[0]["mapping_sha256"] == verdicts[1]["mapping_sha256"]
    for name, entry in verdicts[0]["languages"].items():
        theirs = verdicts[1]["languages"][name]
        assert entry["rows"] == theirs["rows"] and entry["mapped"] == pytest.approx(theirs["mapped"], rel=1e-4)


class Killed(BaseException):
    pass


def die(at: int) -> Callable[[int], None]:
    def act(step: int) -> None:
        if step == at:
            raise Killed

    return act


def test_a_damaged_state_is_named_and_the_one_before_it_used(
    work: Path, words: Words, whole: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    damages: dict[str, Callable[[Path], None]] = {
        "flipped": lambda state: flip(state / "state.safetensors"),
        "record": lambda state: flip(state / "state.json"),
        "cut": lambda state: os.truncate(state / "state.safetensors", 1000),
        "gone": lambda state: (state / "state.safetensors").unlink(),
        "sums": lambda state: (state / "SHA256SUMS").write_bytes(b"\xff\x00"),
    }
    states = work / "outputs/damaged/mapping/state"
    at = [9]
    for name, damage in damages.items():
        with monkeypatch.context() as patch:
            # The next run continues from the state before the damaged one: four steps beyond its own two.
            before_step(patch, die(at.pop()))
            with pytest.raises(Killed):
                train_here(work, *words, "--save_name", "damaged")
        at.append(3)
        last, before = sorted((int(path.name[5:]) for path in states.glob("step_*")), reverse=True)[:2]
        assert (last, before) == (8, 6), name
        damage(states / "step_8")
    capsys.readouterr()
    train_here(work, *words, "--save_name", "damaged")
    printed = capsys.readouterr().out
    assert "state/step_8 is damaged" in printed and "continuing after step 6 of 12" in printed
    assert same_bits(mapping(work, "damaged"), whole)


def test_a_run_without_any_whole_state_is_not_begun_anew_unasked(
    work: Path, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        before_step(patch, die(6))
        with pytest.raises(Killed):
            train_here(work, *words, "--save_name", "ruined")
    for state in (work / "outputs/ruined/mapping/state").iterdir():
        (state / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"step_4.*step_2: not as written.*--overwrite starts anew"):
        train_here(work, *words, "--save_name", "ruined")
    train_here(work, *words, "--save_name", "ruined", "--overwrite")


def losses(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
    """Replace every training loss by `spoil(micro batch, loss)`."""
    forward, seen = MindMergerForCausalLM.forward, []

    def spoilt(model: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(model, *args, **kwargs)
        if torch.is_grad_enabled():
            seen.append(1)
            output.loss = spoil(len(seen), output.loss)
        return output

    monkeypatch.setattr(MindMergerForCausalLM, "forward", spoilt)


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.inf


@pytest.mark.parametrize(
    ("kind", "spoilt"),
    [
        ("nan", lambda loss: loss * torch.nan),
        # Its gradient is finite, since a constant does not change it.
        ("inf", lambda loss: loss + torch.inf),
        ("gradient", InfiniteGradient.apply),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_and_its_rows_are_named(
    work: Path,
    words: Words,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    kind: str,
    spoilt: Callable,
) -> None:
    # Steps have four micro batches: the second one of step 3.
    losses(monkeypatch, lambda number, loss: spoilt(loss) if number == 10 else loss)
    weights: list[torch.Tensor] = []
    stage_step = trainer.Trainer.step

    def watched(self: trainer.Trainer, rows: list) -> Any:
        weights.append(self.engine.module.mapping.mlp.linear1.weight.detach().clone())
        return stage_step(self, rows)

    monkeypatch.setattr(trainer.Trainer, "step", watched)
    train_here(work, *words, "--save_name", kind)
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(weights)]
    # Warm-up begins with a learning rate of 0.
    assert [step for step, changed in enumerate(moved, start=1) if not changed] == [1, 3]
    printed = capsys.readouterr().out
    assert "warning: step 3 is skipped" in printed and "skipped_steps 1" in printed
    (line,) = [line for line in printed.splitlines() if "is skipped" in line]
    # Only the losses show which micro batch it was.
    assert line.count("train_100k.") == (8 if kind == "gradient" else 2)
    assert "datas/bilingual_pairs/en-" in line and ", line " in line
    assert all(tensor.isfinite().all() for tensor in mapping(work, kind).values())


def test_steps_that_stay_non_finite_end_the_run_with_the_last_state_in_place(
    work: Path, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        losses(patch, lambda number, loss: loss * torch.nan if number > 12 else loss)
        with pytest.raises(InputError, match=r"5 steps in a row had no finite loss.*train_100k.*lower --lr"):
            train_here(work, *words, "--save_name", "diverged")
    before_step(monkeypatch, lambda step: None)
    assert all(tensor.isfinite().all() for tensor in mapping(work, "diverged").values())
    assert (work / "outputs/diverged/mapping/state/step_6").exists()


def test_too_little_memory_names_the_flags_to_change(work: Path, words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(number: int, loss: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    losses(monkeypatch, too_large)
    with pytest.raises(InputError) as error:
        train_here(work, *words, "--save_name", "large")
    for part in ("out of memory in step 1", "micro batches of 2 row(s)", "--gradient_checkpointing",
                 "--train_micro_batch_size_per_gpu 1 --gradient_accumulation 8"):  # fmt: skip
        assert part in str(error.value)


def test_too_little_memory_for_dev_rows_names_their_flag(
    work: Path, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(MindMergerForCausalLM, "forward", too_large)
    message = r"in an evaluation, with a batch of \d+ dev rows; .* Use an --eval_batch_size below \d+"
    with pytest.raises(InputError, match=message):
        train_here(work, *words, "--save_name", "large_dev")


def test_a_second_run_on_the_same_folder_is_refused(
    work: Path, words: Words, whole: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second(step: int) -> None:
        # Like another process: locks on two descriptors exclude each other also within one process.
        if step == 2:
            message = rf"outputs/twice/mapping is in use by process {os.getpid()} on "
            with pytest.raises(InputError, match=message), locked(Path("outputs/twice/mapping")):
                pass

    before_step(monkeypatch, second)
    train_here(work, *words, "--save_name", "twice")
    assert same_bits(mapping(work, "twice"), whole)
    assert not list((work / "outputs/twice").glob(".*"))


@pytest.mark.parametrize(("size", "largest"), [(20_000, 4_000), (75_000, 20_000)])
def test_a_full_disk_ends_a_run_in_one_line_and_what_was_written_stays(
    work: Path, words: Words, whole: dict, small_disk: Callable[[int, int], Path], size: int, largest: int
) -> None:
    """The mapping's files have 12 kB each, a state 40 kB: the first disk has no room for a mapping."""
    disk = small_disk(size, largest)
    with pytest.raises(InputError, match=r"cannot write outputs/full/mapping/.*: (No space left|File too large)"):
        train_here(disk, *words, "--save_name", "full", "--data_dir", work / "datas")
    written = disk / "outputs/full/mapping"
    assert not list(written.rglob("*.partial"))
    if size > 20_000:
        assert mapping(disk, "full").keys() == whole.keys()
