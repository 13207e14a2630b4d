"""What an LLM says after a sequence of vectors: greedy text, or the likelihood of given words."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache, PreTrainedModel

from mindmerger.evaluation.slot_cache import SlotCache
from mindmerger.modeling import Sequence

# Rows that begin together are padded to the longest, and their activations are in memory together.
_READ_AT_ONCE = 4


@dataclass
class Answer:
    """What the LLM has said to one row so far.

    Attributes:
        row: its number.
        ids: new token ids; an eos that ended it is included, so that an answer without one was stopped.
        is_done: whether it gets no more.
    """

    row: int
    ids: list[int] = field(default_factory=list)
    is_done: bool = False


def greedy(llm: PreTrainedModel, sequence: Sequence, max_new_tokens: int, eos_token_ids: set[int]) -> list[list[int]]:
    """The most likely continuation of every row of `sequence`, all at once; `Answer.ids` of each."""
    rows = len(sequence.mask)
    outputs: list[list[int]] = [[] for _ in range(rows)]

    def read(numbers: list[int]) -> Sequence:
        return Sequence(sequence.embeds[numbers], sequence.mask[numbers])

    for answers in greedy_steps(llm, read, rows, rows, max_new_tokens, eos_token_ids):
        for answer in answers:
            outputs[answer.row] = answer.ids
    return outputs


@torch.inference_mode()
def greedy_steps(
    llm: PreTrainedModel,
    read: Callable[[list[int]], Sequence],
    rows: int,
    slots: int,
    max_new_tokens: int,
    eos_token_ids: set[int],
    has_ended: Callable[[list[int]], bool] | None = None,
) -> Iterator[list[Answer]]:
    """Greedy decoding of any number of rows, `slots` of them at a time, one token after the other.

    A row that ends makes way for the next one that waits, so that every step runs full until none waits: the
    iteration-level scheduling of Orca (Yu et al., OSDI 2022). Hugging Face's `generate` computes finished rows until
    the batch's last one ends.

    Beside an LLM that keeps anything else of a row than keys and values, as a recurrent one does, no row can begin
    while others run: there the next ones begin when all have ended.

    Args:
        llm: a causal language model.
        read: what the LLM reads of the rows of these numbers, which come in ascending order. Rows of falling length
            need the least memory, and the least padding.
        rows: how many there are.
        slots: how many run at once.
        max_new_tokens: of each row.
        eos_token_ids: any of these ends a row.
        has_ended: told a row's new token ids after each of them; a row ends when it says so.

    Yields:
        The answers that have got one more token.
    """
    waiting = deque(Answer(row) for row in range(rows))
    while waiting:
        batch = _Slots(llm, min(slots, len(waiting)))
        while True:
            free = [place for place, answer in enumerate(batch.answers) if answer.is_done]
            if free and waiting and batch.can_read:
                places = free[: min(len(waiting), batch.read_at_once)]
                told = [waiting.popleft() for _ in places]
                tokens = batch.read(places, told, read([answer.row for answer in told]))
            elif len(free) < len(batch.answers):
                if free:
                    batch.drop(free)
                told, tokens = batch.answers, batch.step()
            else:
                break
            for answer, token in zip(told, tokens.tolist(), strict=True):
                answer.ids.append(token)
                answer.is_done = (
                    token in eos_token_ids
                    or len(answer.ids) == max_new_tokens
                    or (has_ended is not None and has_ended(answer.ids))
                )
            yield told


class _Slots:
    """The rows that run: a key-value cache, and of each row of it the answer, the last token and the length.

    Args:
        llm: a causal language model.
        count: how many slots; each is free at first.
    """

    def __init__(self, llm: PreTrainedModel, count: int):
        self._llm = llm
        self._cache: Cache = DynamicCache(config=llm.config)
        self._takes_rows = SlotCache.can_hold(self._cache)
        if self._takes_rows:
            self._cache = SlotCache(self._cache, count)
        self.answers = [Answer(-1, is_done=True) for _ in range(count)]
        self.can_read, self.read_at_once = True, _READ_AT_ONCE if self._takes_rows else count
        self._tokens, self._lengths = torch.zeros(2, count, dtype=torch.int64, device=llm.device)
        self._columns = 0

    def read(self, places: list[int], answers: list[Answer], sequence: Sequence) -> torch.Tensor:
        """Let rows begin in free slots; the first token of each."""
        cache = DynamicCache(config=self._llm.config)
        inputs = {"inputs_embeds": sequence.embeds}
        tokens = _step(self._llm, inputs, sequence.mask, sequence.position_ids, cache).argmax(dim=-1)
        self._tokens[places], self._lengths[places] = tokens, sequence.mask.sum(dim=1)
        for place, answer in zip(places, answers, strict=True):
            self.answers[place] = answer
        if self._takes_rows:
            self._columns = int(self._lengths.max())
            self._cache.fill(places, cache, self._columns)
        else:
            self._cache, self._columns, self.can_read = cache, sequence.mask.shape[1], False
        return tokens

    def drop(self, places: list[int]) -> None:
        """Do without these slots from now on."""
        kept = [place for place in range(len(self.answers)) if place not in places]
        self.answers = [self.answers[place] for place in kept]
        self._tokens, self._lengths = self._tokens[kept], self._lengths[kept]
        self._cache.reorder_cache(torch.tensor(kept, device=self._tokens.device))
        if self._takes_rows:
            self._columns = int(self._lengths.max())
            self._cache.trim(self._columns)

    def step(self) -> torch.Tensor:
        """The next token of every slot, none of which is free."""
        self._columns, self._lengths = self._columns + 1, self._lengths + 1
        columns = torch.arange(self._columns, device=self._tokens.device)
        # All rows end in the last column.
        mask = (columns >= self._columns - self._lengths.unsqueeze(1)).long()
        inputs, positions = {"input_ids": self._tokens.unsqueeze(1)}, self._lengths.unsqueeze(1) - 1
        self._tokens = _step(self._llm, inputs, mask, positions, self._cache).argmax(dim=-1)
        return self._tokens


@torch.inference_mode()
def label_log_likelihoods(
    llm: PreTrainedModel, sequence: Sequence, labels: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probability of each label as the continuation of each row, and whether it is the greedy one.

    Args:
        llm: a causal language model.
        sequence: what it has read.
        labels: token ids of each label word, without eos.

    Returns:
        ([rows, labels], float32, in nats: the sum over a label's tokens; [rows, labels], bool: every one of its tokens
        is the most likely one).
    """
    rows, count, longest = len(sequence.mask), len(labels), max(map(len, labels))
    device = sequence.mask.device
    cache = DynamicCache(config=llm.config)
    logits = _step(llm, {"inputs_embeds": sequence.embeds}, sequence.mask, sequence.position_ids, cache)
    first = torch.tensor([label[0] for label in labels], device=device)
    scores = logits.float().log_softmax(dim=-1)[:, first]
    are_greedy = logits.argmax(dim=-1, keepdim=True) == first
    if longest == 1:
        return scores, are_greedy

    # One copy of the cache for each label; its tokens but the last are read, all but the first are scored.
    cache.batch_repeat_interleave(count)
    ids = torch.tensor([label + [0] * (longest - len(label)) for label in labels], device=device).repeat(rows, 1)
    is_scored = torch.tensor([[n < len(label) for n in range(1, longest)] for label in labels], device=device)
    mask = F.pad(sequence.mask.repeat_interleave(count, dim=0), (0, longest - 1), value=1)
    positions = sequence.position_ids[:, -1:].repeat_interleave(count, dim=0) + torch.arange(1, longest, device=device)
    logits = llm(
        input_ids=ids[:, :-1], attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).logits
    later = logits.float().log_softmax(dim=-1).gather(2, ids[:, 1:, None]).squeeze(2).view(rows, count, -1)
    are_later_greedy = (logits.argmax(dim=-1) == ids[:, 1:]).view(rows, count, -1) | ~is_scored
    return scores + (later * is_scored).sum(dim=-1), are_greedy & are_later_greedy.all(dim=-1)


def _step(
    llm: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    mask: torch.Tensor,
    positions: torch.Tensor,
    cache: Cache,
) -> torch.Tensor:
    """Logits [rows, vocabulary] of the next token; the cache grows by what was read."""
    return llm(
        **inputs,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
