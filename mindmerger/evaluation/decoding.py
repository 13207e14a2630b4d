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
from mindmerger.modeling import Sequence

# Number of problems in a prefill, which pads them to the longest and has all their activations in memory.
_BEGIN_AT_ONCE = 4
# Free columns of a new mask: the number of steps before it is made anew.
_ROOM = 64


@dataclass
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
        prefill: function from the indices of some problems to the input of their prefill.
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
    total = sum(answer.length for answer in waiting)
    room = _Room(slots, max_new_tokens, slots * (total / max(len(waiting), 1) + max_new_tokens))
    while waiting:
        batch = _Slots(llm, room)
        while passed := batch.advance(waiting, prefill):
            for answer, token in zip(*passed, strict=True):
                ids = answer.ids
                ids.append(token)
                if token in eos_token_ids or len(ids) == max_new_tokens or (has_ended is not None and has_ended(ids)):
                    answer.is_done = True
            yield passed[0]


@dataclass(frozen=True)
class _Room:
    """Limits of active problems.

    Attributes:
        slots: maximum number.
        max_new_tokens: maximum tokens of an answer.
        cells: maximum product of their number and the largest possible length of input and answer.
    """

    slots: int
    max_new_tokens: int
    cells: float

    def left(self, active: list[Answer], waiting: Iterable[Answer]) -> int:
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
        room: limits of active problems.
    """

    def __init__(self, llm: PreTrainedModel, room: _Room):
        self._llm, self._room = llm, room
        self._cache: Cache = DynamicCache(config=llm.config)
        self._takes_rows = SlotCache.can_hold(self._cache)
        if self._takes_rows:
            self._cache = SlotCache(self._cache)
        self._can_begin = True
        self._answers: list[Answer] = []
        # Number of steps so far, and for each row that number less its tokens.
        self._steps, self._starts = 0, []
        # The last token of each row and its position, [rows, 1], and a mask whose last column in use is at `_end`.
        self._tokens, self._positions = torch.zeros(2, 0, 1, dtype=torch.int64, device=llm.device)
        self._mask, self._end = torch.zeros(0, 0, dtype=torch.int64, device=llm.device), -1
        # Numbers of the mask's columns.
        self._axis = torch.arange(0, device=llm.device)

    def advance(
        self, waiting: deque[Answer], prefill: Callable[[list[int]], Sequence]
    ) -> tuple[list[Answer], list[int]] | None:
        """Run one forward pass: a prefill of waiting problems if they can start, else a step of all active ones.

        Returns:
            The answers in the pass, and the next token of each; None if all have ended and none can start.
        """
        free = [slot for slot, answer in enumerate(self._answers) if answer.is_done]
        for slot in free:
            self._starts[slot] = self._steps
        if waiting and self._can_begin and (free or not self._answers):
            active = [answer for answer in self._answers if not answer.is_done]
            if count := self._room.left(active, waiting):
                free += self._add(count - len(free))
                count = min(count, _BEGIN_AT_ONCE) if self._takes_rows else count
                answers = [waiting.popleft() for _ in range(count)]
                return answers, self._begin(free[:count], answers, prefill([answer.problem for answer in answers]))
        if len(free) == len(self._answers):
            return None
        if free:
            self._drop(free)
        return list(self._answers), self._continue()

    @property
    def _columns(self) -> int:
        """Tokens of the longest active row."""
        return self._steps - min(self._starts)

    def _add(self, count: int) -> range:
        """Add free slots; return them."""
        rows = len(self._answers)
        if count <= 0:
            return range(0)
        self._answers += [Answer(-1, is_done=True)] * count
        self._starts += [self._steps] * count
        self._tokens, self._positions, self._mask = (
            F.pad(part, (0, 0, 0, count)) for part in (self._tokens, self._positions, self._mask)
        )
        return range(rows, rows + count)

    def _begin(self, slots: list[int], answers: list[Answer], sequence: Sequence) -> list[int]:
        """Start problems in free slots; return the first token of each."""
        index, positions = torch.tensor(slots, device=self._tokens.device), sequence.position_ids
        if self._takes_rows:
            self._cache.begin(index, len(self._answers), self._columns)
        logits = _next(self._llm, {"inputs_embeds": sequence.embeds}, sequence.mask, positions, self._cache)
        tokens, last = logits.argmax(dim=-1, keepdim=True), positions[:, -1:]
        self._tokens.index_copy_(0, index, tokens)
        self._positions.index_copy_(0, index, last)
        # The only values that the host reads.
        tokens, positions = map(list, zip(*torch.cat([tokens, last], dim=1).tolist(), strict=True))
        if not self._takes_rows:
            # The cache keeps all columns.
            positions = [sequence.mask.shape[1] - 1] * len(slots)
        for slot, answer, position in zip(slots, answers, positions, strict=True):
            self._answers[slot], self._starts[slot] = answer, self._steps - position - 1
        if max(positions) > self._end:
            self._renew_mask()
        else:
            self._mask.index_copy_(0, index, self._mask_of(last))
        if self._takes_rows:
            self._cache.trim(self._columns)
        else:
            self._can_begin = False
        return tokens

    def _drop(self, slots: list[int]) -> None:
        """Remove these slots."""
        kept = [slot for slot in range(len(self._answers)) if slot not in slots]
        index = torch.tensor(kept, device=self._tokens.device)
        self._answers, self._starts = ([part[slot] for slot in kept] for part in (self._answers, self._starts))
        self._tokens, self._positions, self._mask = (
            part.index_select(0, index) for part in (self._tokens, self._positions, self._mask)
        )
        self._cache.reorder_cache(index)
        if self._takes_rows:
            self._cache.trim(self._columns)

    def _continue(self) -> list[int]:
        """Compute the next token of every slot; no slot is free."""
        self._steps, self._end = self._steps + 1, self._end + 1
        self._positions += 1
        if self._end == len(self._axis):
            self._renew_mask()
        columns = self._columns
        mask = self._mask.narrow(1, self._end + 1 - columns, columns)
        logits = _next(self._llm, {"input_ids": self._tokens}, mask, self._positions, self._cache)
        self._tokens = logits.argmax(dim=-1, keepdim=True)
        return self._tokens.flatten().tolist()

    def _renew_mask(self) -> None:
        """Make the mask of all rows, with free columns after the one in use."""
        self._end = self._columns - 1
        self._axis = torch.arange(self._columns + _ROOM, device=self._positions.device)
        self._mask = self._mask_of(self._positions)

    def _mask_of(self, positions: torch.Tensor) -> torch.Tensor:
        """Mask of rows with these last positions; all rows end in the same column."""
        return (self._axis >= self._end - positions).long()


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
