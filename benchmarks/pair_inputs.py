"""Inputs of the benchmarks of MindMerger: two models, and an untrained mapping between them."""

from dataclasses import dataclass

import torch

from common.cli import flag
from common.errors import InputError
from mindmerger.batching import Batch
from mindmerger.config import ModelFlags
from mindmerger.init.scaled import embedding_scale
from mindmerger.modeling import MindMergerForCausalLM, mapping_config


@dataclass
class PairFlags:
    """Flags shared by the benchmarks of MindMerger."""

    llm_path: str | None = flag(None, "LLM")
    mt_path: str | None = flag(None, "multilingual model")
    data_dir: str = flag("./datas", "folder in the published data layout")
    rounds: int = flag(3, "runs of each side")

    def __post_init__(self) -> None:
        if self.llm_path is None or self.mt_path is None:
            raise InputError("--llm_path and --mt_path are needed: the two models to join")


def unlearned_model(
    flags: PairFlags,
    llm_bos_token_id: int | None,
    batch: Batch,
    dtype: torch.dtype = torch.float32,
) -> MindMergerForCausalLM:
    """Load the two models in `dtype`, with a seeded random float32 mapping at the scale of the LLM's embeddings.

    Args:
        flags: paths of the models.
        llm_bos_token_id: first token of every sequence.
        batch: rows for measuring the encoder's scale.
        dtype: of the frozen weights.
    """
    names = ModelFlags(llm_path=flags.llm_path, mt_path=flags.mt_path)
    torch.manual_seed(0)
    model = MindMergerForCausalLM.from_base_models(mapping_config(names.models, llm_bos_token_id), dtype)
    mean, scale = embedding_scale(model, batch)
    with torch.no_grad():
        model.mapping.end_boundary.add_(mean)
        model.mapping.mlp.linear2.weight.mul_(scale)
        model.mapping.mlp.linear2.bias.mul_(scale)
    return model
