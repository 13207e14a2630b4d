"""Greedy decoding in slots: each answer equals that of its row alone, and no step has an empty slot."""

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    FalconH1Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from mindmerger.evaluation import decoding, slot_cache
from mindmerger.evaluation.decoding import greedy_steps
from mindmerger.evaluation.slot_cache import SlotCache
from mindmerger.modeling import InputEmbeds

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 90}  # fmt: skip
LLMS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=90),
    # All layers slide, and one of the two.
    "mistral": MistralConfig(**SIZES, sliding_window=12),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=12,
                               layer_types=["sliding_attention", "full_attention"]),
    # Has states, so that slots cannot be refilled.
    "falcon_h1": FalconH1Config(**SIZES, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8,
                                mamba_n_groups=1, mamba_chunk_size=8),
}  # fmt: skip
MAX_NEW_TOKENS = 20
# Lengths of each row's input and of its answer.
LENGTHS = {9: 20, 31: 1, 1: 12, 14: 3, 5: 1, 40: 20, 2: 7, 22: 2, 17: 16, 3: 20, 28: 5}


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(LLMS[family]).eval()
    for parameter in llm.parameters():
        # Otherwise an untrained model gives the same answer to all.
        parameter.data.mul_(2.0)
    return llm


@torch.inference_mode()
def alone(llm: PreTrainedModel, row: torch.Tensor) -> list[int]:
    """Greedy decoding by definition: no cache, no padding, a full forward pass for every token."""
    ids: list[int] = []
    for _ in range(MAX_NEW_TOKENS):
        read = torch.cat([row, llm.get_input_embeddings()(torch.tensor(ids, dtype=torch.int64))])
        ids.append(int(llm(inputs_embeds=read[None]).logits[0, -1].argmax()))
    return ids


def problems(llm: PreTrainedModel) -> tuple[list[torch.Tensor], dict[int, list[int]], Callable[[list[int]], bool]]:
    """(rows, the answer of each alone, a `has_ended` with which rows end at many different times)."""
    scale = llm.get_input_embeddings().weight.std()
    rows = [torch.randn(length, 32) * scale for length in LENGTHS]
    whole = [alone(llm, row) for row in rows]
    ends = {tuple(ids[:length]) for ids, length in zip(whole, LENGTHS.values(), strict=True)}
    cut = [next(ids[:n] for n in range(1, MAX_NEW_TOKENS + 1) if tuple(ids[:n]) in ends) for ids in whole]
    assert len({tuple(ids) for ids in cut}) > 6
    return rows, dict(enumerate(cut)), lambda ids: tuple(ids) in ends


def padded(rows: list[torch.Tensor]) -> InputEmbeds:
    longest = max(map(len, rows))
    embeds, mask = torch.zeros(len(rows), longest, 32), torch.zeros(len(rows), longest, dtype=torch.int64)
    for number, row in enumerate(rows):
        embeds[number, -len(row) :], mask[number, -len(row) :] = row, 1
    return InputEmbeds(embeds, mask)


def in_slots(
    llm: PreTrainedModel, rows: list[torch.Tensor], slots: int, has_ended: Callable[[list[int]], bool] | None = None
) -> Iterator[dict[int, list[int]]]:
    """Number of complete answers after every step."""

    def input_of(problems: list[int]) -> InputEmbeds:
        return padded([rows[problem] for problem in problems])

    done: dict[int, list[int]] = {}
    for answers in greedy_steps(llm, range(len(rows)), input_of, slots, MAX_NEW_TOKENS, set(), has_ended):
        assert len(answers) <= slots
        done |= {answer.problem: answer.ids for answer in answers if answer.is_done}
        yield done


@pytest.mark.parametrize("family", LLMS)
def test_any_number_of_slots_gives_the_answers_of_one_row_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # So small that the cache is moved many times.
    monkeypatch.setattr(slot_cache, "_ROOM", 3)
    monkeypatch.setattr(slot_cache, "_VIEWS", 2)
    # Memory that is read before it is written changes the answers.
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda like, *size: like.new_full(size, float("nan")))
    llm = build(family)
    rows, expected, has_ended = problems(llm)
    for slots in (1, 3, 5, 99):
        *_, done = in_slots(llm, rows, slots, has_ended)
        assert done == expected, slots


def test_no_step_has_an_empty_slot_while_a_row_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = build("llama")
    sizes = []
    llm.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(len(inputs["input_ids"])) if "input_ids" in inputs else None,
        with_kwargs=True,
    )
    rows, _, has_ended = problems(llm)
    sizes.clear()
    for done in in_slots(llm, rows, 4, has_ended):
        if sizes and len(done) < len(rows) - 4:
            assert sizes[-1] == 4
    # Each token except a row's first is of one row of one step.
    assert sum(sizes) == sum(len(ids) - 1 for ids in done.values())


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_cache_holds_no_more_than_the_longest_row_and_its_room(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[SlotCache] = []

    class Watched(SlotCache):
        def __init__(self, like: DynamicCache, most: int):
            super().__init__(like, most)
            caches.append(self)

    monkeypatch.setattr(decoding, "SlotCache", Watched)
    llm = build(family)
    monkeypatch.setattr(slot_cache, "_ROOM", 8)
    rows, done = [torch.randn(5, 32) for _ in range(60)], {}
    steps = in_slots(llm, rows, 3, lambda ids: sum(ids) % 5 == 0)
    for step, done in enumerate(steps):  # noqa: B007
        for layer in caches[-1].layers:
            assert layer.columns <= 5 + MAX_NEW_TOKENS
            assert layer.keys.shape[2] <= 5 + MAX_NEW_TOKENS + slot_cache._ROOM
    # Three times as many columns were written as the one cache has.
    assert len(done) == 60 and len(caches) == 1 and step > 3 * layer.keys.shape[2]


def test_a_new_buffer_has_no_more_free_columns_than_steps() -> None:
    """Short answers have no memory of long ones, and columns keep their content wherever they move."""
    cache, written = SlotCache(DynamicCache(config=LLMS["llama"]), most=3), torch.randn(2, 2, 40, 8)
    cache.begin(torch.arange(2), 2, 0)
    cache.update(written[:, :, :5], written[:, :, :5], 0)
    for column in range(5, 40):
        # The longest row ends often, and another of five columns stays.
        cache.trim(5 if column % 4 == 0 else cache.layers[0].columns or 5)
        keys, values = cache.update(*[written[:, :, column : column + 1]] * 2, 0)
        assert torch.equal(keys, values) and torch.equal(keys, written[:, :, column + 1 - keys.shape[2] : column + 1])
        assert cache.layers[0].keys.shape[2] <= 5 + 4 + 3


def test_an_llm_with_states_of_another_kind_is_told_apart() -> None:
    assert not SlotCache.can_hold(DynamicCache(config=LLMS["falcon_h1"]))
    assert SlotCache.can_hold(DynamicCache(config=LLMS["gemma3"]))


@pytest.mark.parametrize("family", ["llama", "falcon_h1"])
def test_long_problems_leave_fewer_rows_so_that_padding_takes_no_memory(family: str) -> None:
    """Rows x the longest possible row never exceed slots x (mean length + MAX_NEW_TOKENS), or one row is active."""
    llm, slots = build(family), 4
    rows = [torch.randn(length, 32) for length in sorted(LENGTHS, reverse=True)]
    lengths = {problem: len(row) for problem, row in enumerate(rows)}
    cells = slots * (sum(lengths.values()) / len(rows) + MAX_NEW_TOKENS)
    counts, answers = [], {}
    for active in greedy_steps(
        llm, lengths, lambda some: padded([rows[row] for row in some]), slots, MAX_NEW_TOKENS, set(), None, lengths
    ):
        counts.append(len(active))
        assert len(active) == 1 or len(active) * (max(a.length for a in active) + MAX_NEW_TOKENS) <= cells
        answers |= {answer.problem: answer.ids for answer in active}
    assert counts[0] < slots == max(counts)
    assert answers == {problem: alone(llm, row) for problem, row in enumerate(rows)}
