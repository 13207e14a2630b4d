"""What an LLM says after a sequence of vectors: greedy text, or the likelihood of given words."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel

from mindmerger.modeling import Sequence


def greedy(
    llm: PreTrainedModel,
    sequence: Sequence,
    max_new_tokens: int,
    eos_token_ids: set[int],
    has_ended: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """The most likely continuation of every row, token by token.

    Args:
        llm: a causal language model.
        sequence: what it has read.
        max_new_tokens: of each row.
        eos_token_ids: any of these ends a row.
        has_ended: told a row's new token ids after each of them; a row ends when it says so.

    Returns:
        New token ids of every row; an eos that ended it is included, so that a row without one was stopped.
    """
    outputs: list[list[int]] = [[] for _ in range(len(sequence.mask))]

    def ends(row: int, token: int) -> bool:
        outputs[row].append(token)
        return token in eos_token_ids or (has_ended is not None and has_ended(outputs[row]))

    for _ in greedy_steps(llm, sequence, max_new_tokens, ends):
        pass
    return outputs


@torch.inference_mode()
def greedy_steps(
    llm: PreTrainedModel, sequence: Sequence, max_new_tokens: int, ends: Callable[[int, int], bool]
) -> Iterator[None]:
    """Greedy decoding, one step at a time.

    Hugging Face's `generate` computes finished rows until the last one ends; here a row leaves the batch, and the
    cache, as soon as it has ended.

    Args:
        llm: a causal language model.
        sequence: what it has read.
        max_new_tokens: of each row.
        ends: takes a row and its next token; a row that ends gets no more.

    Yields:
        None, once every running row has its next token.
    """
    cache = DynamicCache(config=llm.config)
    running = list(range(len(sequence.mask)))
    mask, positions = sequence.mask, sequence.position_ids
    inputs: dict[str, torch.Tensor] = {"inputs_embeds": sequence.embeds}
    for step in range(max_new_tokens):
        tokens = _step(llm, inputs, mask, positions, cache).argmax(dim=-1)
        steps = zip(running, tokens.tolist(), strict=True)
        going_on = [place for place, (row, token) in enumerate(steps) if not ends(row, token)]
        yield
        if not going_on or step == max_new_tokens - 1:
            break
        if len(going_on) < len(running):
            running = [running[place] for place in going_on]
            places = torch.tensor(going_on, device=mask.device)
            tokens, mask, positions = (tensor[places] for tensor in (tokens, mask, positions))
            cache.batch_select_indices(places)
        inputs = {"input_ids": tokens.unsqueeze(1)}
        mask = F.pad(mask, (0, 1), value=1)
        positions = positions[:, -1:] + 1


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
    cache: DynamicCache,
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
