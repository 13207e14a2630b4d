"""Right-padded tensors of rows, as input of the published code and of the documented Python call."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mindmerger.batching import IGNORED, Tokens, pad


@dataclass
class PaddedBatch:
    """Right-padded int64 token ids, named as the arguments of `MindMergerForCausalLM`.

    Attributes:
        input_ids, attention_mask: the source, [batch, source length]; the mask is 1 for a token, 0 for padding.
        prompt_ids, prompt_attention_mask: [batch, prompt length]; length 0 without augmentation.
        labels: the target, [batch, target length], padded with -100; length 0 for generation.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    prompt_ids: torch.Tensor
    prompt_attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> "PaddedBatch":
        """Copy the batch to `device`."""
        return PaddedBatch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def collate(rows: Sequence[Tokens], source_pad_id: int) -> PaddedBatch:
    """Pad `rows` to the longest of each kind. Some encoders identify padding by their own padding id only."""
    input_ids, attention_mask = pad([row.source for row in rows], source_pad_id)
    prompt_ids, prompt_attention_mask = pad([row.prompt for row in rows], 0)
    labels, _ = pad([row.target for row in rows], IGNORED)
    return PaddedBatch(input_ids, attention_mask, prompt_ids, prompt_attention_mask, labels)
