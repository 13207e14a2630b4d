"""What an LLM says after a sequence of vectors: greedy text, or the likelihood of given words."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache, PreTrainedModel

from mindmerger.modeling import Sequence
from mindmerger.slot_cache import SlotCache


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
    for answers in greedy_steps(llm, lambda _: sequence, rows, rows, max_new_tokens, eos_token_ids):
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
    waiting = deque(range(rows))
    # By place in the cache: answers, their last tokens, and how many columns of the cache are theirs.
    running: list[Answer] = []
    cache: Cache | None = None
    while True:
        free = [place for place, answer in enumerate(running) if answer.is_done]
        is_idle = len(free) == len(running)
        if waiting and (is_idle or (free and isinstance(cache, SlotCache))):
            count = min(slots if is_idle else len(free), len(waiting))
            told = [Answer(waiting.popleft()) for _ in range(count)]
            sequence = read([answer.row for answer in told])
            fresh = DynamicCache(config=llm.config)
            inputs = {"inputs_embeds": sequence.embeds}
            new = _step(llm, inputs, sequence.mask, sequence.position_ids, fresh).argmax(dim=-1)
            if is_idle:
                running, tokens, lengths, columns = told, new, sequence.mask.sum(dim=1), sequence.mask.shape[1]
                cache = SlotCache(fresh) if SlotCache.can_hold(fresh) else fresh
            else:
                places = torch.tensor(free[:count], device=new.device)
                tokens[places], lengths[places] = new, sequence.mask.sum(dim=1)
                columns = int(lengths.max())
                cache.fill(places, fresh, columns)
                for place, answer in zip(free, told, strict=False):
                    running[place] = answer
        elif is_idle:
            return
        else:
            if free:
                going_on = [place for place, answer in enumerate(running) if not answer.is_done]
                places = torch.tensor(going_on, device=tokens.device)
                running, tokens, lengths = [running[place] for place in going_on], tokens[places], lengths[places]
                cache.reorder_cache(places)
                if isinstance(cache, SlotCache):
                    columns = int(lengths.max())
                    cache.trim(columns)
            columns, lengths = columns + 1, lengths + 1
            mask = (torch.arange(columns, device=tokens.device) >= columns - lengths[:, None]).long()
            inputs = {"input_ids": tokens.unsqueeze(1)}
            tokens = _step(llm, inputs, mask, lengths[:, None] - 1, cache).argmax(dim=-1)
            told, new = running, tokens
        for answer, token in zip(told, new.tolist(), strict=True):
            answer.ids.append(token)
            answer.is_done = (
                token in eos_token_ids
                or len(answer.ids) == max_new_tokens
                or (has_ended is not None and has_ended(answer.ids))
            )
        yield told


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
