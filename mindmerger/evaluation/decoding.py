"""Greedy decoding by an LLM from input embeddings, and likelihoods of given words."""

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

# Number of problems in a prefill, which pads them to the longest and has all their activations in memory.
_BEGIN_AT_ONCE = 4


@dataclass
class Answer:
    """The LLM's answer to one problem so far.

    Attributes:
        problem: index of the problem.
        ids: new token ids, including the eos, if any; an answer without one ended at a limit.
        is_done: True if the answer has ended.
    """

    problem: int
    ids: list[int] = field(default_factory=list)
    is_done: bool = False


def greedy(llm: PreTrainedModel, sequence: Sequence, max_new_tokens: int, eos_token_ids: set[int]) -> list[list[int]]:
    """Generate the greedy continuation of every row of `sequence` in one batch; return `Answer.ids` of each."""
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
    """Decode answers to any number of problems greedily, at most `slots` at once, one token per step.

    When an answer ends, the next waiting problem takes its slot, so that steps stay full: the iteration-level
    scheduling of Orca (Yu et al., OSDI 2022). Hugging Face's `generate` computes finished rows until the last row of
    the batch ends.

    If the LLM keeps other states than keys and values, as recurrent ones do, problems start only when all active
    answers have ended.

    Args:
        llm: a causal language model.
        problems: indices of the problems, in the order in which they start. Falling length needs the least memory.
        prefill: function from the indices of some problems to the input of their prefill.
        slots: maximum number of problems at once.
        max_new_tokens: maximum tokens of an answer.
        eos_token_ids: ids that end an answer.
        has_ended: function from an answer's token ids so far to True if the answer ends there.

    Yields:
        The answers that have one more token.
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
    """Slots of a key-value cache, each with an answer, its last token and its length.

    Args:
        llm: a causal language model.
        count: number of slots, all free at first.
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
        """Run one forward pass: a prefill of waiting problems if slots are free, else a step of all active ones.

        Returns:
            The answers in the pass, each with its next token; None if all have ended and none can start.
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
        """Start problems in free slots; return the first token of each."""
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
        """Remove these slots."""
        kept = [slot for slot in range(len(self._answers)) if slot not in slots]
        self._answers = [self._answers[slot] for slot in kept]
        self._tokens, self._lengths = self._tokens[kept], self._lengths[kept]
        self._cache.reorder_cache(torch.tensor(kept, device=self._tokens.device))
        if self._takes_rows:
            self._columns = int(self._lengths.max())
            self._cache.trim(self._columns)

    def _continue(self) -> torch.Tensor:
        """Compute the next token of every slot; no slot is free."""
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
    """Compute the log probability of each label as the continuation of each row.

    Args:
        llm: a causal language model.
        sequence: input of the LLM before the label.
        labels: token ids of each label word, without eos.

    Returns:
        ([rows, labels], float32, in nats: sums over the label's tokens; [rows, labels], bool: True if the label is the
        greedy continuation).
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

    # One copy of the cache for each label. Inputs are all its tokens but the last; all but the first are scored.
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
    """Compute logits [rows, tokens, vocabulary] of tokens after a filled cache, and add them to the cache.

    Args:
        llm: a causal language model.
        ids: [rows, tokens].
        mask, positions: values of all columns, first those of the cache, then those of `ids`.
        cache: cache of the columns before `ids`.
    """
    count, columns = ids.shape[1], mask.shape[1]
    # Several tokens at once reset some recurrent states (Jamba).
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
    """Compute logits [rows, vocabulary] of the next token, and add the inputs to the cache."""
    return read(llm, inputs, mask, positions, cache, logits_to_keep=1)[:, -1]


def read(
    llm: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    mask: torch.Tensor,
    positions: torch.Tensor,
    cache: Cache,
    **options: int,
) -> torch.Tensor:
    """Compute logits [rows, tokens, vocabulary] of inputs at `positions`, and add them to the cache."""
    name = cache_name(type(llm))
    if name != "past_key_values":
        # Purely recurrent LLMs multiply their inputs by the mask.
        mask = mask[:, -positions.shape[1] :]
    arguments = {"attention_mask": mask, "position_ids": positions, name: cache, "use_cache": True}
    return llm(**inputs, **arguments, **options).logits
