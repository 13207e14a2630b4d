"""Sequences end to end in one row instead of padded to one length: attention stays within each of them, exactly.

A third of what a padded micro batch of questions makes an LLM read is padding. Packed, nothing is; only attention has
to know where each sequence begins and ends, for which it gets a function of its own.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Name of the attention below among transformers' attention implementations.
PACKED = "mindmerger_packed"
# Kinds of layers, by transformers' names, in which tokens meet in nothing but attention.
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Arguments that change what attention computes, and that `packed_attention` knows nothing of.
_FOREIGN = ("softcap", "position_bias", "s_aux")


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segment_lengths: list[int] | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment of one row; a function for transformers' `AttentionInterface`.

    Args:
        module: the attention layer.
        query: [1, heads, tokens, head width].
        key, value: [1, key-value heads, tokens, head width].
        attention_mask: not read where there are segments.
        scaling: of the scores; default 1 / sqrt(head width).
        sliding_window: how many tokens back a token sees, itself included; None for all.
        segment_lengths: tokens of each segment, in order; None for an ordinary padded batch.

    Returns:
        ([1, tokens, heads, head width], None).

    Raises:
        ValueError: an argument that this attention cannot honour.
    """
    if segment_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if foreign := [name for name in _FOREIGN if kwargs.get(name) is not None]:
        raise ValueError(f"packed attention knows no {', '.join(foreign)}")
    grouped, dtype = key.shape[1] != query.shape[1], query.dtype
    if query.device.type == "cpu" and dtype is torch.bfloat16:
        # This kernel takes three times as long on a CPU as the one for float32, and rounds besides.
        query, key, value = query.float(), key.float(), value.float()
    outputs = []
    for q, k, v in zip(*(tensor.split(segment_lengths, dim=2) for tensor in (query, key, value)), strict=True):
        length = q.shape[2]
        window = None
        if sliding_window is not None and length > sliding_window:
            seen = torch.ones(length, length, dtype=torch.bool, device=q.device)
            window = seen.tril() & seen.triu(1 - sliding_window)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=window, is_causal=window is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype, memory_format=torch.contiguous_format), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def pack_attention(llm: PreTrainedModel) -> bool:
    """Give an LLM `packed_attention`, if it then says of packed sequences what it says of each alone.

    Tried on the model itself: what a configuration does not tell (positions counted from the row's first column, states
    carried from token to token) shows in the logits.

    Args:
        llm: in eval mode.

    Returns:
        Whether it reads packed rows from now on; if not it is as it was.
    """
    config = llm.config.get_text_config()
    standard = config._attn_implementation
    if standard != "sdpa" or not set(getattr(config, "layer_types", None) or ()) <= _LAYER_TYPES:
        return False
    embedding = llm.get_input_embeddings()
    ids = torch.arange(8, device=llm.device) * (embedding.num_embeddings // 8)
    segments = [ids[:5], ids[5:]]
    with torch.no_grad():
        each = [llm(inputs_embeds=embedding(segment[None]), use_cache=False).logits for segment in segments]
        alone = torch.cat(each, dim=1)
        llm.set_attn_implementation(PACKED)
        try:
            together = llm(
                inputs_embeds=embedding(ids[None]), use_cache=False, **packed_arguments([5, 3], llm.device)
            ).logits
        # Third parties' models refuse arguments in their own ways.
        except (TypeError, ValueError, RuntimeError):
            together = torch.full_like(alone, torch.nan)
    # Rounding takes some of the digits; a token that sees another sequence changes the first ones.
    if (together - alone).float().norm() <= torch.finfo(alone.dtype).eps ** 0.5 * alone.float().norm():
        return True
    llm.set_attn_implementation(standard)
    return False


def packed_arguments(lengths: list[int], device: torch.device) -> dict[str, object]:
    """What an LLM that `pack_attention` has prepared takes beside the [1, tokens, hidden] embeddings of `lengths`."""
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    return {
        "position_ids": positions[None],
        # Without it transformers would see the positions begin anew, and build a mask of tokens x tokens.
        "attention_mask": torch.ones_like(positions)[None],
        "segment_lengths": lengths,
    }
