"""Attention of packed rows: sequences end to end in one row, each attending only to itself.

A third of the tokens of a padded micro batch of questions are padding. A packed one has none, and only attention needs
the edges of the sequences.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Name of the attention below among transformers' attention implementations.
PACKED = "mindmerger_packed"
# Types of layers, by transformers' names, in which tokens interact only through attention.
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Arguments that change the result of attention, and that `packed_attention` does not implement.
_FOREIGN = ("softcap", "position_bias", "s_aux")
# Largest head width of `varlen_attn`'s CUDA kernel (FlashAttention 2), which takes 16-bit numbers only.
_LARGEST_HEAD = 256


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segment_lengths: list[int] | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment of one row; a function for transformers' `AttentionInterface`.

    Args:
        module: the attention layer.
        query: [1, heads, tokens, head width].
        key, value: [1, key-value heads, tokens, head width].
        attention_mask: not used where there are segments.
        scaling: factor of the scores; default 1 / sqrt(head width).
        sliding_window: number of tokens that a token attends to, itself included; None for all before it.
        segment_lengths: tokens of each segment, in order; None for a padded batch.
        cu_seq_lens_q, max_length_q: int32 edges of the segments and the longest length, by transformers' names.

    Returns:
        ([1, tokens, heads, head width], None).

    Raises:
        ValueError: an argument that this attention does not implement.
    """
    if segment_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if foreign := [name for name in _FOREIGN if kwargs.get(name) is not None]:
        raise ValueError(f"packed attention does not implement {', '.join(foreign)}")
    if _has_kernel(query):
        return _in_one_call(query, key, value, scaling, sliding_window, cu_seq_lens_q, max_length_q), None
    return _by_segment(query, key, value, scaling, sliding_window, segment_lengths), None


def _has_kernel(query: torch.Tensor) -> bool:
    """True if `varlen_attn` has a kernel for such tensors."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    width = query.shape[-1]
    return width <= _LARGEST_HEAD and width % 8 == 0 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _in_one_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    edges: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """Compute all segments by one kernel; arguments and result as in `packed_attention`."""
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output = varlen_attn(
        query,
        key,
        value,
        edges,
        edges,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return output[None]


def _by_segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    lengths: list[int],
) -> torch.Tensor:
    """Compute each segment by PyTorch's attention; arguments and result as in `packed_attention`."""
    grouped, dtype = key.shape[1] != query.shape[1], query.dtype
    if query.device.type == "cpu" and dtype is torch.bfloat16:
        # On a CPU this kernel is three times as slow as the one for float32, and less accurate.
        query, key, value = query.float(), key.float(), value.float()
    outputs = []
    for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True):
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
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def pack_attention(llm: PreTrainedModel) -> bool:
    """Set an LLM's attention to `packed_attention` if it gives the same logits for packed and for single sequences.

    The test runs the model, since a config does not show everything that matters (positions counted from the row's
    first column, recurrent states).

    Args:
        llm: LLM in eval mode.

    Returns:
        True if the LLM now takes packed rows; otherwise it is unchanged.
    """
    config = llm.config.get_text_config()
    # Private: transformers sets it by `set_attn_implementation`, and has no public name to read it by.
    standard = config._attn_implementation
    if standard != "sdpa" or not set(getattr(config, "layer_types", None) or ()) <= _LAYER_TYPES:
        return False
    embedding = llm.get_input_embeddings()
    ids = torch.arange(8, device=llm.device) * (embedding.num_embeddings // 8)
    segments = [ids[:5], ids[5:]]
    arguments = packed_arguments([5, 3], torch.tensor([0, 5, 8], dtype=torch.int32, device=llm.device))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]], device=llm.device)
    with torch.no_grad():
        each = [llm(inputs_embeds=embedding(segment[None]), use_cache=False).logits for segment in segments]
        alone = torch.cat(each, dim=1)
        llm.set_attn_implementation(PACKED)
        try:
            together = llm(
                inputs_embeds=embedding(ids[None]), position_ids=positions, use_cache=False, **arguments
            ).logits
        # Models from outside transformers raise different errors for unknown arguments.
        except (TypeError, ValueError, RuntimeError):
            together = torch.full_like(alone, torch.nan)
    if are_close(together, alone):
        return True
    llm.set_attn_implementation(standard)
    return False


def packed_arguments(lengths: list[int], cumulative_lengths: torch.Tensor) -> dict[str, Any]:
    """Further arguments of an LLM prepared by `pack_attention`, for packed sequences of `lengths`."""
    return {
        # transformers uses a 4-D mask as it is. Without one it would find the edges in the positions and build a mask
        # of tokens x tokens. From a 2-D mask it reads a value, for which the host waits.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=cumulative_lengths.device),
        "segment_lengths": lengths,
        "cu_seq_lens_q": cumulative_lengths,
        "cu_seq_lens_k": cumulative_lengths,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def are_close(outputs: torch.Tensor, reference: torch.Tensor) -> bool:
    """True if two results differ only by rounding; attention to other tokens changes the leading digits."""
    difference = (outputs - reference).float().norm()
    return bool(difference <= torch.finfo(reference.dtype).eps ** 0.5 * reference.float().norm())
