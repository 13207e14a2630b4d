"""Answers by vLLM from prompt embeddings, which encoder, mapping and the LLM's embedding table compute here."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from common.errors import InputError, first_line
from common.models import base_config
from common.optional import require
from common.ranks import Process
from mindmerger.batching import Tokens
from mindmerger.config import ModelPair
from mindmerger.evaluation.answerer import Answerer, Output

# Fraction for vLLM of the GPU memory that is free once the encoder is loaded.
_MEMORY_FRACTION = 0.9
# Rows of a batch of encoder and mapping, which use the memory that vLLM leaves.
_ROWS_AT_ONCE = 8


def check_vllm(models: ModelPair, longest: int, max_gen_len: int, process: Process) -> int:
    """Check, before anything loads, that vLLM can answer problems of at most `longest` tokens.

    Returns:
        Maximum tokens of a sequence, answer included.

    Raises:
        InputError: vLLM is not installed, there are several ranks, --device is not vLLM's, or a row is longer than the
            LLM's context.
    """
    require("vllm", "requirements-vllm.txt, in an environment of its own")
    if process.world_size > 1:
        raise InputError("--backend vllm batches all problems by itself: leave torchrun out")
    if process.device.index or (process.device.type == "cpu" and torch.cuda.is_available()):
        raise InputError(
            "--backend vllm runs on the first visible GPU: choose it by CUDA_VISIBLE_DEVICES, leave --device out"
        )
    config = base_config(models.llm_path, models.llm_revision, models.trust_remote_code).get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or longest + max_gen_len
    if longest >= limit:
        raise InputError(
            f"--backend vllm: a problem has {longest} tokens, and {models.llm_path} has a context of {limit}: lower "
            "--max_seq_len or --max_prompt_len"
        )
    return min(limit, longest + max_gen_len)


class VllmAnswerer(Answerer):
    """An answerer whose LLM runs in vLLM, with prompt embeddings and continuous batching.

    Args:
        answerer: loaded answerer on the CPU; of its LLM only the embedding table is kept.
        models: names of the models.
        dtype: dtype of the LLM.
        device: device of encoder, mapping and embedding table.
        max_model_len: maximum tokens of a sequence, answer included.

    Raises:
        InputError: vLLM does not support the LLM, or is out of memory.
    """

    def __init__(
        self, answerer: Answerer, models: ModelPair, dtype: torch.dtype, device: torch.device, max_model_len: int
    ):
        super().__init__(answerer.llm, answerer.tokenizer, answerer.model)
        self.llm = _EmbeddingTable(answerer.llm).to(device)
        if self.model is not None:
            self.model.llm = self.llm
            self.model.to(device)

        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # On a CPU, vLLM would reserve a core for its scheduler, which is idle while the model runs.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        from vllm import LLM, SamplingParams

        self._sampling_params = SamplingParams
        options: dict[str, Any] = {}
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            options["gpu_memory_utilization"] = _MEMORY_FRACTION * free / total
        try:
            self._engine = LLM(
                models.llm_path,
                revision=models.llm_revision,
                trust_remote_code=models.trust_remote_code,
                dtype=str(dtype).removeprefix("torch."),
                enable_prompt_embeds=True,
                # Problems have no common prefix but the bos.
                enable_prefix_caching=False,
                skip_tokenizer_init=True,
                max_model_len=max_model_len,
                # On a CPU compiling takes longer than it saves.
                enforce_eager=device.type == "cpu",
                **options,
            )
        except (ValueError, RuntimeError) as error:
            raise InputError(f"vLLM could not load {models.llm_path}: {first_line(error)}") from error

    def generate(  # type: ignore[override]
        self, rows: dict[int, Tokens], max_new_tokens: int, slots: int
    ) -> Iterator[list[Output]]:
        """Generate greedy answers like `Answerer.generate`, but yield them in batches of `slots` problems."""
        greedily = self._sampling_params(
            temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=sorted(self.eos_token_ids), detokenize=False
        )
        problems = list(rows)
        for start in range(0, len(problems), slots):
            batch = problems[start : start + slots]
            prompts = self._prompts([rows[problem] for problem in batch])
            answers = self._engine.generate(prompts, greedily, use_tqdm=False)
            ids = [list(answer.outputs[0].token_ids) for answer in answers]
            yield [self.output(*answer) for answer in zip(batch, ids, strict=True)]

    def _prompts(self, rows: list[Tokens]) -> list[dict[str, torch.Tensor]]:
        """Compute vLLM's input for each row, {"prompt_embeds": [length, hidden] on the CPU}."""
        prompts = []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            sequence = self.embed(rows[start : start + _ROWS_AT_ONCE])
            masks = sequence.mask.bool()
            prompts += [{"prompt_embeds": row[mask].cpu()} for row, mask in zip(sequence.embeds, masks, strict=True)]
        return prompts


class _EmbeddingTable(nn.Module):
    """Embedding table of an LLM whose layers run in vLLM."""

    def __init__(self, llm: nn.Module):
        super().__init__()
        self.embedding = llm.get_input_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device
