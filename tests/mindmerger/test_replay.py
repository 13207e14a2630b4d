"""Replayed rows: the LLM's own right answers as targets, and the divergence from the LLM alone."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.errors import InputError
from common.ranks import Process
from mindmerger import replay
from mindmerger.batching import Tokens, lay_out, without_sources
from mindmerger.config import ModelPair
from mindmerger.data import Example
from mindmerger.losses import ReplayLoss
from mindmerger.modeling import MindMergerForCausalLM
from mindmerger.replay import OwnAnswers
from mindmerger.tasks import TRAINING_TASKS
from mindmerger.token_table import Rows, TokenTable, open_table
from tests.mindmerger.scripts import run_ranks, train_here
from tests.mindmerger.test_training import ZERO_3, keep_trainers

Words = tuple[object, ...]
HERE = Process(0, 1, torch.device("cpu"))
FLAGS = ("--replay", 1, "--replay_weight", 0.5, "--kl_weight", 0.7)


@pytest.fixture
def located(examples: list[Example]) -> list[Example]:
    return [replace(example, location=f"datas/rows.tsv, line {n}") for n, example in enumerate(examples)]


@pytest.fixture
def table(build: Callable, located: list[Example], tmp_path: Path) -> TokenTable:
    return open_table(lambda: located, build()[1], {"files": {}}, tmp_path)


def answers_of(build: Callable, models: dict[str, Path], **more: object) -> OwnAnswers:
    pair = ModelPair(str(models["llama"]), str(models["mt5"]))
    given = {"keeps_all": True, "tokenizer": build(max_gen_len=12)[1], "dtype": torch.float32, "slots": 2}
    return OwnAnswers(pair, TRAINING_TASKS["math"], **(given | more))


def test_replayed_targets_are_the_llms_own_greedy_answers(
    build: Callable, models: dict[str, Path], table: TokenTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OwnAnswers, "_is_kept", lambda *_: True)
    train = table.rows(np.array([4, 0, 2]))
    joined = answers_of(build, models).replay(table, train, 0.67, 0, HERE)
    assert joined.replayed.tolist() == [False] * 3 + [True] * 2
    assert joined.lengths[:3].tolist() == train.lengths.tolist()
    model, tokenizer = build()
    originals = {tuple(row.prompt): row for row in train.tokens([0, 1, 2])}
    for row in joined.tokens([3, 4]):
        original = originals[tuple(row.prompt)]
        assert list(row.source) == list(original.source)
        ids = torch.tensor([[tokenizer.bos_token_id, *row.prompt]])
        # One forward pass of the whole text for each token, without a cache.
        for token in row.target:
            assert int(model.llm(ids).logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        assert row.target[-1] == 2 or len(row.target) == 12
    with monkeypatch.context() as patch:
        patch.setattr(replay, "load_llm", lambda *_: pytest.fail("answered again"))
        again = answers_of(build, models).replay(table, train, 0.67, 0, HERE)
        with pytest.raises(pytest.fail.Exception):
            answers_of(build, models, dtype=torch.bfloat16).replay(table, train, 0.67, 0, HERE)
    assert [list(row.target) for row in again.tokens([3, 4])] == [list(row.target) for row in joined.tokens([3, 4])]


def test_rows_of_given_languages_are_replayed(
    build: Callable, models: dict[str, Path], table: TokenTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OwnAnswers, "_is_kept", lambda *_: True)
    train = table.rows(np.arange(len(table)))
    languages = train.row_languages()
    chosen = languages[-1]
    joined = answers_of(build, models).replay(table, train, 1, 0, HERE, [chosen])
    assert joined.row_languages() == [*languages, *[chosen] * languages.count(chosen)]
    assert 0 < languages.count(chosen) < len(languages)


@pytest.mark.parametrize(
    ("task", "keeps_all", "answer", "target", "right"),
    [
        ("math", False, "3 + 4 = 7. The answer is: 7", "The answer is: 7", True),
        ("math", False, "The answer is: 8", "The answer is: 7", False),
        ("math", False, "<think>7", "The answer is: 7", False),
        ("math", False, "no number", "none", False),
        ("math", True, "any sentence", "another one", True),
        ("math", True, " ", "another one", False),
        ("x-csqa", False, " B", "B", True),
        ("x-csqa", False, "C", "B", False),
    ],
)
def test_right_answers_are_kept(
    build: Callable, models: dict[str, Path], task: str, keeps_all: bool, answer: str, target: str, right: bool
) -> None:
    own = replace(answers_of(build, models, keeps_all=keeps_all), task=TRAINING_TASKS[task])
    ids = [own.tokenizer.llm_tokenizer(text, add_special_tokens=False).input_ids for text in (answer, target)]
    assert own._is_kept([*ids[0], 2], np.array([*ids[1], 2]), {2}) == right
    # An answer that did not end is none.
    assert not own._is_kept(ids[0], np.array([*ids[1], 2]), {2})


def reference_loss(
    model: torch.nn.Module, rows: list[Tokens], replayed: list[bool], weights: tuple[float, float]
) -> torch.Tensor:
    """Summed loss in float64, row by row, from whole sequences and all logits."""
    total = torch.zeros((), dtype=torch.float64)
    for row, is_own in zip(rows, replayed, strict=True):
        batch = lay_out([row], 1)
        target, count = torch.tensor(np.asarray(row.target, np.int64)), len(row.target)
        log_p = model.llm(inputs_embeds=model.embed(batch)).logits[0, -count:].log_softmax(-1)
        loss = -log_p.gather(1, target[:, None]).sum()
        if is_own:
            ids = torch.tensor([[1, *row.prompt, *row.target[:-1]]])
            alone = model.llm(ids).logits[0, -count:].log_softmax(-1).detach()
            loss = weights[0] * loss + weights[1] * (alone.exp() * (alone - log_p)).sum()
        total = total + loss
    return total


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weights", [(0.5, 0.7), (1.0, 0.0), (0.0, 1.0)])
def test_the_loss_is_that_of_a_float64_computation(
    build: Callable, examples: list[Example], table: TokenTable, packed: bool, weights: tuple[float, float]
) -> None:
    model, tokenizer = build()
    assert model.pack_rows(tokenizer.source_pad_id)
    train = Rows(table.arrow, np.arange(5), trained=3)
    rows, is_own = train.tokens(range(5)), [False] * 3 + [True] * 2
    # In an order in which replayed rows are neither first nor last.
    order = [0, 4, 1, 3, 2]

    def layout(rows: list[Tokens]) -> object:
        return lay_out(without_sources(rows), 1, tokenizer.source_pad_id, packed)

    replayed = ReplayLoss(*weights, layout, in_step=False).of(train, order, [order], HERE.device)
    batch = lay_out([rows[row] for row in order], 1, tokenizer.source_pad_id, packed)
    model(batch=batch, num_items_in_batch=10.0, replayed=replayed).loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.mapping.parameters()])
    model.zero_grad()
    model.double()
    wanted = reference_loss(model, rows, is_own, weights)
    (wanted / 10).backward()
    reference = torch.cat([parameter.grad.flatten() for parameter in model.mapping.parameters()])
    assert float((gradient - reference).norm() / reference.norm()) < 1e-4


def test_ranks_without_replayed_rows_run_the_llm_only_in_step(table: TokenTable) -> None:
    train = Rows(table.arrow, np.arange(5), trained=3)
    laid: list[int] = []

    def layout(rows: list[Tokens]) -> None:
        laid.append(len(rows))
        return lay_out(without_sources(rows), 1)

    def of(in_step: bool, kl_weight: float, own: list[int], others: list[int]) -> object:
        return ReplayLoss(1.0, kl_weight, layout, in_step).of(train, own, [own, others], HERE.device)

    assert of(True, 1.0, [0, 1], [2]) is None
    assert of(False, 1.0, [0, 1], [2, 3]) is None and of(True, 0.0, [0, 1], [2, 3]) is None
    assert laid == []
    assert len(of(True, 1.0, [0, 1], [2, 3]).positions) == 0 and laid == [1]
    assert len(of(False, 1.0, [3, 1], [2]).positions) == train.target_lengths[3] and laid == [1, 1]


@pytest.fixture(scope="module")
def small(models: dict[str, Path]) -> Words:
    """Two languages, 20 training rows and as many replayed ones at most: steps of 8 rows."""
    return (
        *("--deepspeed", "--llm_path", models["llama"], "--mt_path", models["mt5"], "--stage_name", "mapping"),
        *("--languages", "de,sw", "--train_num", 12, "--augmentation", "True", "--dev_size", 4, "--max_gen_len", 8),
        *("--train_batch_size", 8, "--epoch_num", 1, "--lr", "1e-3", "--cache_dir", "rows", *FLAGS),
    )


@pytest.fixture(scope="module")
def reference(work: Path, small: Words) -> dict[str, torch.Tensor]:
    """The mapping of one rank, every row of a step at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OwnAnswers, "_is_kept", lambda *_: True)
        seen = keep_trainers(patch, lambda trainer: int(trainer.train.replayed.sum()))
        train_here(work, *small, "--train_micro_batch_size_per_gpu", 8, "--save_name", "one")
    assert seen == [20]
    return load_file(work / "outputs/one/mapping/model.safetensors")


@pytest.mark.parametrize("zero_3", [False, True])
def test_two_ranks_take_the_same_steps(
    work: Path, small: Words, reference: dict[str, torch.Tensor], zero_3: bool
) -> None:
    words = ["--train_micro_batch_size_per_gpu", 2, "--save_name", f"two-{zero_3}"]
    if zero_3:
        (work / "zero3.json").write_text(json.dumps({"zero_optimization": ZERO_3}))
        words += ["--deepspeed_config", "zero3.json"]
    run_ranks(2, work, "run_training.py", *small, *words)
    mapping = load_file(work / f"outputs/two-{zero_3}/mapping/model.safetensors")
    for name, tensor in reference.items():
        torch.testing.assert_close(mapping[name], tensor, rtol=1e-5, atol=1e-5)


class Killed(Exception):
    pass


def test_a_run_with_replay_continues(
    work: Path, small: Words, reference: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mindmerger.trainer import Trainer

    words = (*small, "--train_micro_batch_size_per_gpu", 4, "--save_name", "resumed", "--save_steps", 2)
    step, begun, kept = Trainer.step, [], itertools.cycle([True, False])

    def interrupted(trainer: Trainer, rows: object) -> object:
        begun.append(trainer.state.step)
        if len(begun) in (4, 5):
            raise Killed
        return step(trainer, rows)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with monkeypatch.context() as patch:
        patch.setattr(replay, "load_llm", lambda *_: pytest.fail("answered again"))
        with pytest.raises(Killed):
            train_here(work, *words)
    # Another cache, and other answers.
    with monkeypatch.context() as patch:
        patch.setattr(OwnAnswers, "_is_kept", lambda *_: next(kept))
        with pytest.raises(InputError, match=r"state/step_2 was saved with other token ids .* or --overwrite the run"):
            train_here(work, *words, "--cache_dir", "other")
        record = json.loads((work / "outputs/resumed/mapping/state/step_2/state.json").read_text())
        del record["rows_sha256"]
        patch.setattr("mindmerger.train_state.read_json", lambda _: record)
        with pytest.raises(Killed):
            train_here(work, *words, "--cache_dir", "other")
    assert begun == [0, 1, 2, 3, 2]
    train_here(work, *words)
    mapping = load_file(work / "outputs/resumed/mapping/model.safetensors")
    for name, tensor in reference.items():
        torch.testing.assert_close(mapping[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["rows_sha256", "training rows", "dev rows", "dev rows for the LLM alone", "replayed rows"]
)
def test_ranks_with_other_rows_train_nothing(
    work: Path, small: Words, reference: dict, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One process, which finds values of a second rank that differ in one place."""
    compare = Process.check_same

    def differs(process: Process, values: dict) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Process, "gather", lambda _, own: [own, own | ({name: "other"} if name in own else {})])
            compare(process, values)

    monkeypatch.setattr(Process, "check_same", differs)
    monkeypatch.setattr(MindMergerForCausalLM, "from_base_models", lambda *_: pytest.fail("loaded"))
    with pytest.raises(InputError, match=f"^{name} differ between rank 0 and rank 1: "):
        train_here(work, *small, "--train_micro_batch_size_per_gpu", 8, "--save_name", "refused")
    assert not (work / "outputs/refused").exists()


def test_an_llm_that_does_not_fit_one_device_answers_nothing(
    work: Path, small: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("transformers.LlamaForCausalLM.to", run_out)
    with pytest.raises(InputError, match=r"^out of memory while the LLM, whole on each device, .*--plan shows"):
        train_here(work, *small, "--save_name", "too_large", "--seed", 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--replay", 1.5), "--replay 1.5 must be from 0 to 1"),
        (("--kl_weight", "nan"), "--kl_weight nan must be a number of at least 0"),
        (("--replay", 0), "--kl_weight 0.7 needs --replay"),
        (("--replay_weight", 0, "--kl_weight", 0), "--replay_weight 0 leaves replayed rows without a loss"),
        (("--augmentation", "False"), "--replay needs --augmentation True"),
        (("--replay_languages", "tr,de,fr"), "--replay_languages tr,de,fr: no training row is in French, Turkish"),
        (("--replay_languages", "de,xx"), "--replay_languages: unknown language 'xx'"),
        (("--replay_languages", "de,German"), "--replay_languages de,German: a language is named twice"),
        (("--replay", 0, "--kl_weight", 0, "--replay_languages", "de"), "--replay_languages de needs --replay"),
    ],
)
def test_bad_flags_are_one_line(
    work: Path, small: Words, monkeypatch: pytest.MonkeyPatch, words: Words, message: str
) -> None:
    monkeypatch.setattr(MindMergerForCausalLM, "from_base_models", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("mindmerger.build.AlignedStart", lambda *_: pytest.fail("loaded"))
    with pytest.raises(InputError, match=message):
        train_here(work, *small, "--save_name", "refused", "--mapping_init", "aligned", *words)
    assert not (work / "outputs/refused").exists()
