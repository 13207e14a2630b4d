"""Continuations of a sequence of vectors by an LLM: greedy text, or the likelihood of given words."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from mindmerger.evaluation.slot_cache import SlotCache
from mindmerger.frozen_models import cache_name
from mindmerger.modeling import Sequence

# Problems that begin together are padded to the longest, and their activations are in memory together.
_BEGIN_AT_ONCE = 4


@dataclass
class Answer:
    """The LLM's answer to one problem so far.

    Attributes:
        problem: its index.
        ids: new token ids; an eos that ended it is included, so that an answer without one was stopped.
        is_done: True if it gets no more.
    """

    problem: int
    ids: list[int] = field(default_factory=list)
    is_done: bool = False


def greedy(llm: PreTrainedModel, sequence: Sequence, max_new_tokens: int, eos_token_ids: set[int]) -> list[list[int]]:
    """The most likely continuation of every row of `sequence`, all at once; `Answer.ids` of each."""
    rows = range(len(sequence.mask))
    outputs: list[list[int]] = [[] for _ in rows]

    def prefill(chosen: list[int]) -> Sequence:
        return Sequence(sequence.embeds[chosen], sequence.mask[chosen])

    for answers in greedy_steps(llm, rows, prefill, len(rows), max_new_tokens, eos_token_ids):
        for answer in answers:
            outputs[answer.problem] = answer.ids
    return outputs


@torch.inference_mode()
def greedy_steps(
    llm: PreTrainedModel,
    problems: Iterable[int],
    prefill: Callable[[list[int]], Sequence],
    slots: int,
    max_new_tokens: int,
    eos_token_ids: set[int],
    has_ended: Callable[[list[int]], bool] | None = None,
) -> Iterator[list[Answer]]:
    """Greedy decoding of any number of problems, `slots` of them at a time, one token after the other.

    A problem that ends makes way for the next one that waits, so that every step runs full until none waits: the
    iteration-level scheduling of Orca (Yu et al., OSDI 2022). Hugging Face's `generate` computes finished rows until
    the batch's last one ends.

    Beside an LLM that keeps anything else of a row than keys and values, as a recurrent one does, no problem can begin
    while others run: there the next ones begin when all have ended.

    Args:
        llm: a causal language model.
        problems: their indices, in the order in which they begin. Falling length needs the least memory and padding.
        prefill: from the indices of some problems to the input of the LLM's first forward pass.
        slots: how many run at once.
        max_new_tokens: of each problem.
        eos_token_ids: any of these ends an answer.
        has_ended: from an answer's token ids so far to whether it ends here.

    Yields:
        The answers that have got one more token.
    """
    waiting = deque(Answer(problem) for problem in problems)
    while waiting:
        batch = _Slots(llm, min(slots, len(waiting)))
        while active := batch.advance(waiting, prefill):
            for answer, token in active:
                answer.ids.append(token)
                answer.is_done = (
                    token in eos_token_ids
                    or len(answer.ids) == max_new_tokens
                    or (has_ended is not None and has_ended(answer.ids))
                )
            yield [answer for answer, _ in active]


class _Slots:
    """The active rows: a key-value cache, and of each of its rows the answer, the last token and the length.

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
        self._answers = [Answer(-1, is_done=True) for _ in range(count)]
        self._can_begin, self._begin_at_once = True, _BEGIN_AT_ONCE if self._takes_rows else count
        self._tokens, self._lengths = torch.zeros(2, count, dtype=torch.int64, device=llm.device)
        self._columns = 0

    def advance(
        self, waiting: deque[Answer], prefill: Callable[[list[int]], Sequence]
    ) -> list[tuple[Answer, int]] | None:
        """One forward pass: of problems that begin in free slots, or else of all active ones.

        Returns:
            The answers in the pass, each with its next token; None when all have ended and none can begin.
        """
        free = [slot for slot, answer in enumerate(self._answers) if answer.is_done]
        if free and waiting and self._can_begin:
            slots = free[: min(len(waiting), self._begin_at_once)]
            active = [waiting.popleft() for _ in slots]
            tokens = self._begin(slots, active, prefill([answer.problem for answer in active]))
        elif len(free) < len(self._answers):
            if free:
                self._drop(free)
            active, tokens = self._answers, self._continue()
        else:
            return None
        return list(zip(active, tokens.tolist(), strict=True))

    def _begin(self, slots: list[int], answers: list[Answer], sequence: Sequence) -> torch.Tensor:
        """Let problems begin in free slots; the first token of each."""
        cache = DynamicCache(config=self._llm.config)
        inputs = {"inputs_embeds": sequence.embeds}
        tokens = _next(self._llm, inputs, sequence.mask, sequence.position_ids, cache).argmax(dim=-1)
        self._tokens[slots], self._lengths[slots] = tokens, sequence.mask.sum(dim=1)
        for slot, answer in zip(slots, answers, strict=True):
            self._answers[slot] = answer
        if self._takes_rows:
            self._columns = int(self._lengths.max())
            self._cache.fill(slots, cache, self._columns)
        else:
            self._cache, self._columns, self._can_begin = cache, sequence.mask.shape[1], False
        return tokens

    def _drop(self, slots: list[int]) -> None:
        """Do without these slots from now on."""
        kept = [slot for slot in range(len(self._answers)) if slot not in slots]
        self._answers = [self._answers[slot] for slot in kept]
        self._tokens, self._lengths = self._tokens[kept], self._lengths[kept]
        self._cache.reorder_cache(torch.tensor(kept, device=self._tokens.device))
        if self._takes_rows:
            self._columns = int(self._lengths.max())
            self._cache.trim(self._columns)

    def _continue(self) -> torch.Tensor:
        """The next token of every slot, none of which is free."""
        self._columns, self._lengths = self._columns + 1, self._lengths + 1
        columns = torch.arange(self._columns, device=self._tokens.device)
        # All rows end in the last column.
        mask = (columns >= self._columns - self._lengths.unsqueeze(1)).long()
        inputs, positions = {"input_ids": self._tokens.unsqueeze(1)}, self._lengths.unsqueeze(1) - 1
        self._tokens = _next(self._llm, inputs, mask, positions, self._cache).argmax(dim=-1)
        return self._tokens


@torch.inference_mode()
def label_log_likelihoods(
    llm: PreTrainedModel, sequence: Sequence, labels: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probability of each label as the continuation of each row, and whether it is the greedy one.

    Args:
        llm: a causal language model.
        sequence: its input before the label.
        labels: token ids of each label word, without eos.

    Returns:
        ([rows, labels], float32, in nats: the sum over a label's tokens; [rows, labels], bool: every one of its tokens
        is the most likely one).
    """
    rows, count, longest = len(sequence.mask), len(labels), max(map(len, labels))
    device = sequence.mask.device
    cache = DynamicCache(config=llm.config)
    logits = _next(llm, {"inputs_embeds": sequence.embeds}, sequence.mask, sequence.position_ids, cache)
    first = torch.tensor([label[0] for label in labels], device=device)
    scores = logits.float().log_softmax(dim=-1)[:, first]
    are_greedy = logits.argmax(dim=-1, keepdim=True) == first
    if longest == 1:
        return scores, are_greedy

    # One copy of the cache for each label; its tokens but the last are input, all but the first are scored.
    cache.reorder_cache(torch.arange(rows, device=device).repeat_interleave(count))
    ids = torch.tensor([label + [0] * (longest - len(label)) for label in labels], device=device).repeat(rows, 1)
    is_scored = torch.tensor([[n < len(label) for n in range(1, longest)] for label in labels], device=device)
    mask = F.pad(sequence.mask.repeat_interleave(count, dim=0), (0, longest - 1), value=1)
    logits = read_on(llm, ids[:, :-1], mask, (mask.cumsum(dim=1) - 1).clamp(min=0), cache)
    later = logits.float().log_softmax(dim=-1).gather(2, ids[:, 1:, None]).squeeze(2).view(rows, count, -1)
    are_later_greedy = (logits.argmax(dim=-1) == ids[:, 1:]).view(rows, count, -1) | ~is_scored
    return scores + (later * is_scored).sum(dim=-1), are_greedy & are_later_greedy.all(dim=-1)


def read_on(
    llm: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache
) -> torch.Tensor:
    """Logits [rows, tokens, vocabulary] of tokens behind a filled cache, which grows by them.

    Args:
        llm: a causal language model.
        ids: [rows, tokens].
        mask, positions: of all columns, those of the cache and then those of `ids`.
        cache: of the columns before `ids`.
    """
    count, columns = ids.shape[1], mask.shape[1]
    # Several tokens at once start some recurrent states anew: Jamba's.
    is_recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
    size, logits = 1 if is_recurrent else count, []
    for start in range(0, count, size):
        first, end = columns - count + start, columns - count + start + size
        inputs = {"input_ids": ids[:, start : start + size]}
        logits.append(read(llm, inputs, mask[:, :end], positions[:, first:end], cache))
    return torch.cat(logits, dim=1)


def _next(
    llm: PreTrainedModel, inputs: dict[str, torch.Tensor], mask: torch.Tensor, positions: torch.Tensor, cache: Cache
) -> torch.Tensor:
    """Logits [rows, vocabulary] of the next token; the cache grows by the inputs."""
    return read(llm, inputs, mask, positions, cache, logits_to_keep=1)[:, -1]


def read(
    llm: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    mask: torch.Tensor,
    positions: torch.Tensor,
    cache: Cache,
    **options: int,
) -> torch.Tensor:
    """Logits [rows, tokens, vocabulary] of inputs, whose positions these are; the cache grows by them."""
    name = cache_name(type(llm))
    if name != "past_key_values":
        # Recurrent alone: they multiply their inputs by the mask.
        mask = mask[:, -positions.shape[1] :]
    arguments = {"attention_mask": mask, "position_ids": positions, name: cache, "use_cache": True}
    return llm(**inputs, **arguments, **options).logits
