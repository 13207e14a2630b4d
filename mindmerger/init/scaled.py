"""The scaled start: a random mapping whose vectors have the RMS of the LLM's embeddings."""

import torch
from torch import nn

from mindmerger.batching import Batch
from mindmerger.modeling import MindMergerForCausalLM


@torch.no_grad()
def embedding_scale(model: MindMergerForCausalLM, batch: Batch) -> tuple[torch.Tensor, float]:
    """Mean of the LLM's embeddings, and the factor that brings the mapping's output to their RMS.

    A frozen LLM was trained on vectors of its embedding table. PyTorch's initialisation, meant for hidden layers, gives
    vectors of many times their length.

    Args:
        model: model with a new mapping.
        batch: rows on the model's device, whose sources are mapped.

    Returns:
        ([llm_hidden_size], float32; root mean square of the embeddings over that of the mapped vectors).
    """
    mean, embedding_rms = mean_embedding(model.llm.get_input_embeddings(), batch.token_ids.device)
    vectors, _ = model.map_sources(batch)
    return mean, embedding_rms / float(vectors.float().square().mean().sqrt())


@torch.no_grad()
def mean_embedding(embedding: nn.Module, device: torch.device) -> tuple[torch.Tensor, float]:
    """Mean of an LLM's embedding table, [llm_hidden_size] in float32, and root mean square of all its values."""
    total, squares = 0.0, 0.0
    for ids in torch.arange(embedding.num_embeddings, device=device).split(8192):
        # Called, not read from the table: some models scale embeddings, and ZeRO-3 gathers the table only in a call.
        vectors = embedding(ids).float()
        total = total + vectors.sum(dim=0)
        squares += float(vectors.square().sum())
    return total / embedding.num_embeddings, (squares / (embedding.num_embeddings * len(total))) ** 0.5
