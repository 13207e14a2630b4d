"""Greedy decoding by an LLM from input embeddings, and likelihoods of given words."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from mindmerger.evaluation.slot_cache import SlotCache
from mindmerger.frozen_models import cache_name
from mindmerger.modeling import InputEmbeds

# Number of problems in a prefill, which pads them to the longest and has all their activations in memory.
_BEGIN_AT_ONCE = 4
# Later columns of a mask: the number of steps before it is made anew.
_ROOM = 64


@dataclass(slots=True)
class Answer:
    """The LLM's answer to one problem so far.

    Attributes:
        problem: index of the problem.
        length: tokens of the problem's input, if known.
        ids: new token ids, including the eos, if any; an answer without one ended at a limit.
        is_done: True if the answer has ended.
    """

    problem: int
    length: int = 0
    ids: list[int] = field(default_factory=list)
    is_done: bool = False


def greedy(
    llm: PreTrainedModel, sequence: InputEmbeds, max_new_tokens: int, eos_token_ids: set[int]
) -> list[list[int]]:
    """Generate the greedy continuation of every row of `sequence` in one batch; return `Answer.ids` of each."""
    rows = range(len(sequence.mask))
    outputs: list[list[int]] = [[] for _ in rows]

    def input_of(chosen: list[int]) -> InputEmbeds:
        return InputEmbeds(sequence.embeds[chosen], sequence.mask[chosen])

    for answers in greedy_steps(llm, rows, input_of, len(rows), max_new_tokens, eos_token_ids):
        for answer in answers:
            outputs[answer.problem] = answer.ids
    return outputs


def greedy_steps(
    llm: PreTrainedModel,
    problems: Iterable[int],
    input_of: Callable[[list[int]], InputEmbeds],
    slots: int,
    max_new_tokens: int,
    eos_token_ids: set[int],
    has_ended: Callable[[list[int]], bool] | None = None,
    lengths: Mapping[int, int] | None = None,
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
        input_of: function from the indices of some problems to the input of their prefill.
        slots: maximum number of problems at once.
        max_new_tokens: maximum tokens of an answer.
        eos_token_ids: ids that end an answer.
        has_ended: function from an answer's token ids so far to True if the answer ends there.
        lengths: tokens of each problem's input. Rows are padded to the longest, so while problems longer than the
            mean are active, there are fewer: as many as take the memory of `slots` problems of mean length.

    Yields:
        The answers that have one more token.
    """
    waiting = deque(Answer(problem, lengths[problem] if lengths else 0) for problem in problems)
    mean = sum(answer.length for answer in waiting) / max(len(waiting), 1)
    limits = _Limits(max_new_tokens, eos_token_ids, has_ended, slots, slots * (mean + max_new_tokens))
    while waiting:
        batch = _Slots(llm, limits)
        while answers := batch.advance(waiting, input_of):
            yield answers


@dataclass(frozen=True)
class _Limits:
    """Conditions that end an answer, and limits of active problems.

    Attributes:
        max_new_tokens, eos_token_ids, has_ended: see `greedy_steps`.
        slots: maximum number of active problems.
        cells: maximum product of their number and the largest possible length of input and answer.
    """

    max_new_tokens: int
    eos_token_ids: set[int]
    has_ended: Callable[[list[int]], bool] | None
    slots: int
    cells: float

    def may_end(self, tokens: list[int]) -> bool:
        """False if no answer ends with its next token, of these, unless by its length."""
        return self.has_ended is not None or not self.eos_token_ids.isdisjoint(tokens)

    def ends(self, ids: list[int]) -> bool:
        """True if an answer ends with the last of these tokens."""
        if ids[-1] in self.eos_token_ids or len(ids) == self.max_new_tokens:
            return True
        return self.has_ended is not None and self.has_ended(ids)

    def room(self, active: list[Answer], waiting: Iterable[Answer]) -> int:
        """Count the waiting problems that can start now, in their order; one can always if none is active."""
        count, longest = len(active), max((answer.length for answer in active), default=0)
        for answer in waiting:
            longest = max(longest, answer.length)
            if count == self.slots or (count and (count + 1) * (longest + self.max_new_tokens) > self.cells):
                break
            count += 1
        return count - len(active)


class _Slots:
    """Slots of a key-value cache, each with an answer, its last token and its length.

    Args:
        llm: a causal language model.
        limits: conditions that end an answer, and limits of active problems.
    """

    def __init__(self, llm: PreTrainedModel, limits: _Limits):
        self._llm, self._limits = llm, limits
        # One context for all passes: making one takes longer than entering it.
        self._inference = torch.inference_mode()
        self._cache: Cache = DynamicCache(config=llm.config)
        self._takes_rows = SlotCache.can_hold(self._cache)
        if self._takes_rows:
            self._cache = SlotCache(self._cache, limits.max_new_tokens)
        self._can_begin = True
        self._answers: list[Answer] = []
        # Slots whose answers have ended, and the columns of the cache that the input of each slot took.
        self._free, self._lengths = [], []
        # Columns of the longest active row, and tokens of the longest active answer.
        self._columns = self._longest = 0
        # The last token of each row and its position, [rows, 1].
        self._tokens, self._positions = torch.zeros(2, 0, 1, dtype=torch.int64, device=llm.device)
        # A mask of the columns in use and of later ones, and the number of its columns; 0 if rows have changed.
        self._mask, self._masked = torch.zeros(0, 0, dtype=torch.int64, device=llm.device), 0

    def advance(self, waiting: deque[Answer], input_of: Callable[[list[int]], InputEmbeds]) -> list[Answer]:
        """Run one forward pass: a prefill of waiting problems if they can start, else a step of all active ones.

        Returns:
            The answers in the pass, which have one more token; none if all have ended and none can start.
        """
        with self._inference:
            if answers := self._next_of(waiting):
                tokens = self._begin(answers, input_of([answer.problem for answer in answers]))
            elif len(self._free) < len(self._answers):
                self._drop()
                answers, tokens = list(self._answers), self._continue()
            else:
                return []
        for answer, token in zip(answers, tokens, strict=True):
            answer.ids.append(token)
        if self._longest == self._limits.max_new_tokens or self._limits.may_end(tokens):
            for answer in answers:
                answer.is_done = self._limits.ends(answer.ids)
            self._settle()
        return answers

    def _next_of(self, waiting: deque[Answer]) -> list[Answer]:
        """Take the waiting problems that can start now, and add the slots that they need."""
        if not waiting or not self._can_begin or (self._answers and not self._free):
            return []
        active = [answer for answer in self._answers if not answer.is_done]
        count = self._limits.room(active, waiting)
        if (more := count - len(self._free)) > 0:
            self._free += range(len(self._answers), len(self._answers) + more)
            self._answers += [Answer(-1, is_done=True)] * more
            self._lengths += [0] * more
            self._tokens, self._positions = (F.pad(part, (0, 0, 0, more)) for part in (self._tokens, self._positions))
        return [waiting.popleft() for _ in range(min(count, _BEGIN_AT_ONCE) if self._takes_rows else count)]

    def _begin(self, answers: list[Answer], sequence: InputEmbeds) -> list[int]:
        """Start problems in free slots; return the first token of each."""
        slots = self._free[: len(answers)]
        index, positions = torch.tensor(slots, device=self._tokens.device), sequence.position_ids
        if self._takes_rows:
            self._cache.begin(index, len(self._answers), self._columns)
        logits = _next(self._llm, {"inputs_embeds": sequence.embeds}, sequence.mask, positions, self._cache)
        tokens, last = logits.argmax(dim=-1, keepdim=True), positions[:, -1:]
        self._tokens.index_copy_(0, index, tokens)
        self._positions.index_copy_(0, index, last)
        # The only values that the host reads.
        tokens, lengths = map(list, zip(*torch.cat([tokens, last + 1], dim=1).tolist(), strict=True))
        if not self._takes_rows:
            # The cache keeps all columns.
            lengths, self._can_begin = [sequence.mask.shape[1]] * len(slots), False
        for slot, answer, length in zip(slots, answers, lengths, strict=True):
            self._answers[slot], self._lengths[slot] = answer, length
        self._free = self._free[len(slots) :]
        self._resize(max(self._columns, *lengths), max(self._longest, 1))
        return tokens

    def _settle(self) -> None:
        """Find the free slots and the longest rows, after answers have ended."""
        sizes = [
            (len(answer.ids), length)
            for answer, length in zip(self._answers, self._lengths, strict=True)
            if not answer.is_done
        ]
        self._free = [slot for slot, answer in enumerate(self._answers) if answer.is_done]
        # The last token of each answer is not in the cache yet.
        self._resize(max(map(sum, sizes), default=1) - 1, max(sizes, default=(0, 0))[0])

    def _resize(self, columns: int, longest: int) -> None:
        """Set the columns of the longest active row, and the tokens of the longest active answer."""
        self._columns, self._longest, self._masked = columns, longest, 0
        if self._takes_rows:
            self._cache.trim(columns)

    def _drop(self) -> None:
        """Remove the free slots."""
        if not self._free:
            return
        kept = [slot for slot, answer in enumerate(self._answers) if not answer.is_done]
        index = torch.tensor(kept, device=self._tokens.device)
        self._answers, self._lengths = ([part[slot] for slot in kept] for part in (self._answers, self._lengths))
        self._tokens, self._positions = (part.index_select(0, index) for part in (self._tokens, self._positions))
        self._cache.reorder_cache(index)
        self._free = []

    def _continue(self) -> list[int]:
        """Compute the next token of every slot; no slot is free."""
        self._columns, self._longest = self._columns + 1, self._longest + 1
        self._positions += 1
        if self._columns > self._masked:
            self._renew_mask()
        mask = self._mask.narrow(1, 0, self._columns)
        tokens = _next(self._llm, {"input_ids": self._tokens}, mask, self._positions, self._cache).argmax(dim=-1)
        self._tokens = tokens.unsqueeze(1)
        return tokens.tolist()

    def _renew_mask(self) -> None:
        """Make the mask of all rows, which end in the same column, with later columns."""
        self._masked = self._columns + _ROOM
        columns = torch.arange(self._masked, device=self._positions.device)
        self._mask = (columns >= self._columns - 1 - self._positions).long()


@torch.inference_mode()
def label_log_likelihoods(
    llm: PreTrainedModel, sequence: InputEmbeds, labels: list[list[int]]
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
    logits = continued_logits(llm, ids[:, :-1], mask, (mask.cumsum(dim=1) - 1).clamp(min=0), cache)
    later = logits.float().log_softmax(dim=-1).gather(2, ids[:, 1:, None]).squeeze(2).view(rows, count, -1)
    are_later_greedy = (logits.argmax(dim=-1) == ids[:, 1:]).view(rows, count, -1) | ~is_scored
    return scores + (later * is_scored).sum(dim=-1), are_greedy & are_later_greedy.all(dim=-1)


def continued_logits(
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
        logits.append(cached_logits(llm, inputs, mask[:, :end], positions[:, first:end], cache))
    return torch.cat(logits, dim=1)


def _next(
    llm: PreTrainedModel, inputs: dict[str, torch.Tensor], mask: torch.Tensor, positions: torch.Tensor, cache: Cache
) -> torch.Tensor:
    """Compute logits [rows, vocabulary] of the next token, and add the inputs to the cache."""
    return cached_logits(llm, inputs, mask, positions, cache, logits_to_keep=1).select(1, -1)


def cached_logits(
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
