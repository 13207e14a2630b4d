"""Answers by vLLM: encoder, mapping and the LLM's embedding table stay here, vLLM reads what they give."""

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
from mindmerger.config import EvaluationFlags
from mindmerger.evaluation.answerer import Subject

# Of the GPU memory that the encoder leaves.
_SHARE_OF_MEMORY = 0.9
# Rows that encoder and mapping read at once: they have the memory that vLLM leaves.
_ROWS_READ = 8


def check_vllm(flags: EvaluationFlags, process: Process, rows: list[Tokens]) -> int:
    """Whether vLLM can answer `rows`, before anything loads.

    Returns:
        The longest sequence that it is to hold, in tokens.

    Raises:
        InputError: vLLM is not installed, there are several ranks, another device than vLLM's is named, or a row is
            longer than the LLM's context.
    """
    require("vllm", "requirements-vllm.txt, in an environment of its own")
    if process.world_size > 1:
        raise InputError("--backend vllm batches all problems by itself: leave torchrun out")
    if process.device.index or (process.device.type == "cpu" and torch.cuda.is_available()):
        raise InputError(
            "--backend vllm runs on the first GPU that it sees: choose it by CUDA_VISIBLE_DEVICES, leave --device out"
        )
    longest = max(map(len, rows), default=0)
    config = base_config(flags.llm_path, flags.llm_revision, flags.trust_remote_code).get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or longest + flags.max_gen_len
    if longest >= limit:
        raise InputError(
            f"--backend vllm: a problem has {longest} tokens and {flags.llm_path} a context of {limit}: lower "
            "--max_seq_len or --max_prompt_len"
        )
    return min(limit, longest + flags.max_gen_len)


class VllmSubject(Subject):
    """A subject whose LLM runs in vLLM, which is sent prompt embeddings and batches them continuously.

    Args:
        subject: loaded, on the CPU; of its LLM only the embedding table is kept.
        flags: of the evaluation.
        dtype: of the LLM.
        device: for encoder, mapping and embedding table.
        max_model_len: tokens of the longest sequence, answer included.

    Raises:
        InputError: vLLM does not know the LLM's architecture, or lacks memory.
    """

    def __init__(
        self, subject: Subject, flags: EvaluationFlags, dtype: torch.dtype, device: torch.device, max_model_len: int
    ):
        super().__init__(subject.llm, subject.tokenizer, subject.model)
        self.llm = _EmbeddingTable(subject.llm).to(device)
        if self.model is not None:
            self.model.llm = self.llm
            self.model.to(device)

        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # Of a CPU vLLM would keep a core for its scheduler, half of two, though it has nothing to schedule meanwhile.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        from vllm import LLM, SamplingParams

        self._sampling_params = SamplingParams
        options: dict[str, Any] = {}
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            options["gpu_memory_utilization"] = _SHARE_OF_MEMORY * free / total
        try:
            self._engine = LLM(
                flags.llm_path,
                revision=flags.llm_revision,
                trust_remote_code=flags.trust_remote_code,
                dtype=str(dtype).removeprefix("torch."),
                enable_prompt_embeds=True,
                # Nothing but the bos is common to two problems.
                enable_prefix_caching=False,
                skip_tokenizer_init=True,
                max_model_len=max_model_len,
                # On a CPU compiling takes longer than it saves.
                enforce_eager=device.type == "cpu",
                **options,
            )
        except (ValueError, RuntimeError) as error:
            raise InputError(f"vLLM could not load {flags.llm_path}: {first_line(error)}") from error

    def generate(  # type: ignore[override]
        self, rows: list[Tokens], max_new_tokens: int, slots: int
    ) -> Iterator[list[tuple[int, str, bool]]]:
        """As for any subject, but vLLM is handed `slots` rows at a time, and gives their answers together."""
        greedily = self._sampling_params(
            temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=sorted(self.eos_token_ids), detokenize=False
        )
        for start in range(0, len(rows), slots):
            prompts = self._prompts(rows[start : start + slots])
            outputs = self._engine.generate(prompts, greedily, use_tqdm=False)
            answers = enumerate((list(output.outputs[0].token_ids) for output in outputs), start)
            yield [(place, self.text(ids), ids[-1] in self.eos_token_ids) for place, ids in answers]

    def _prompts(self, rows: list[Tokens]) -> list[dict[str, torch.Tensor]]:
        """vLLM's input for each row, {"prompt_embeds": [length, hidden] on the CPU}."""
        prompts = []
        for start in range(0, len(rows), _ROWS_READ):
            sequence = self.read(rows[start : start + _ROWS_READ])
            masks = sequence.mask.bool()
            prompts += [{"prompt_embeds": row[mask].cpu()} for row, mask in zip(sequence.embeds, masks, strict=True)]
        return prompts


class _EmbeddingTable(nn.Module):
    """What is left of an LLM whose layers run elsewhere."""

    def __init__(self, llm: nn.Module):
        super().__init__()
        self.embedding = llm.get_input_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device
