"""A training step reads no value from the device: it runs on the meta device, where a read raises."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from mindmerger import packing
from mindmerger.batching import Batch, lay_out
from mindmerger.data import Example
from mindmerger.modeling import MindMergerForCausalLM
from mindmerger.packing import packed_arguments
from tests.mindmerger.conftest import ENCODERS
from tests.mindmerger.test_modeling import LLMS, Build

META = torch.device("meta")


def on_meta(
    build: Build, examples: list[Example], mt: str, llm: PretrainedConfig | None
) -> tuple[MindMergerForCausalLM, Batch]:
    """A model that reads packed rows, and a batch for it."""
    model, tokenizer = build(mt=mt)
    if llm is not None:
        llm = copy.deepcopy(llm)
        llm.vocab_size, llm.pad_token_id, llm.bos_token_id, llm.eos_token_id = 420, 0, 1, 2
        model.llm = AutoModelForCausalLM.from_config(llm).eval().requires_grad_(False)
    assert model.pack_rows(tokenizer.source_pad_id)
    batch = lay_out(tokenizer(examples), 1, tokenizer.source_pad_id, packed=True)
    return model.to(META), batch.to(META)


@pytest.mark.parametrize(
    ("mt", "llm"), [*((mt, None) for mt in ENCODERS), *(("mt5", llm) for llm in LLMS if llm != "gemma2")]
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_step_reads_no_value(
    build: Build, examples: list[Example], mt: str, llm: str | None, checkpointed: bool
) -> None:
    from mindmerger.frozen_models import recompute_layers

    model, batch = on_meta(build, examples, mt, LLMS.get(llm))
    if checkpointed:
        recompute_layers(model.llm)
    loss = model(batch=batch, num_items_in_batch=7.0).loss
    loss = loss * torch.where(loss.isfinite(), 1.0, torch.nan)
    loss.backward()
    assert all(parameter.grad.is_meta for parameter in model.mapping.parameters())


def waits() -> dict[str, Callable[[MindMergerForCausalLM, Batch], object]]:
    """Operations on a batch that make the host wait."""

    def llm(model: MindMergerForCausalLM, batch: Batch, **arguments: object) -> object:
        embeds = model.llm.get_input_embeddings()(batch.token_ids)
        return model.llm(inputs_embeds=embeds, position_ids=batch.position_ids, use_cache=False, **arguments)

    mask = lambda batch: batch.source_mask  # noqa: E731
    return {
        "the longest row": lambda _, batch: int(mask(batch).sum(dim=1).max()),
        "labels by a mask": lambda _, batch: batch.labels[batch.labels != -100],
        "embeddings by a mask": lambda _, batch: batch.source_ids[mask(batch).bool()],
        "nonzero": lambda _, batch: mask(batch).nonzero(),
        "lengths of segments": lambda _, batch: mask(batch).sum(dim=1).tolist(),
        "a 2-D mask of the LLM": lambda model, batch: llm(
            model,
            batch,
            **packed_arguments(batch.lengths, batch.cumulative_lengths)
            | {"attention_mask": torch.ones_like(batch.token_ids)},
        ),
        "no mask of the LLM": lambda model, batch: llm(
            model, batch, **packed_arguments(batch.lengths, batch.cumulative_lengths) | {"attention_mask": None}
        ),
        "a 2-D mask of the encoder": lambda model, batch: model.encoder(
            input_ids=batch.source_ids, attention_mask=batch.source_mask
        ),
    }


@pytest.mark.parametrize("wait", waits())
def test_each_of_the_former_waits_raises_there(build: Build, examples: list[Example], wait: str) -> None:
    # XLM-R's attention is PyTorch's own, before which transformers checks a 2-D mask for padding.
    model, batch = on_meta(build, examples, "xlm_roberta", None)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"meta|Meta"):
        waits()[wait](model, batch)


def test_on_a_gpu_attention_is_one_call(
    build: Build, examples: list[Example], monkeypatch: pytest.MonkeyPatch, models: dict[str, Path]
) -> None:
    """The kernel does not exist on a CPU: a substitute with its signature computes the result in float64."""
    calls: list[tuple[int, int]] = []

    def stand_in(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and type(max_q) is type(max_k) is int
        assert enable_gqa == (query.shape[1] != key.shape[1]) and window_size[1] == 0
        assert max_q == max_k == int(cu_seq_q.diff().max())
        calls.append(window_size)
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        outputs = []
        for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
            q, k, v = (tensor[start:end].double().transpose(0, 1) for tensor in (query, key, value))
            scores = q @ k.mT * (scale or query.shape[-1] ** -0.5)
            back = torch.arange(end - start)[:, None] - torch.arange(end - start)
            hidden = back < 0
            if window_size[0] >= 0:
                hidden |= back > window_size[0]
            outputs.append((scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v).transpose(0, 1))
        return torch.cat(outputs).to(query.dtype)

    for family, windows in (("qwen3", {(-1, 0)}), ("mistral", {(15, 0)}), ("gemma3", {(15, 0), (-1, 0)})):
        config = copy.deepcopy(LLMS[family])
        config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id = 420, 0, 1, 2
        if family == "gemma3":
            config.layer_types = ["sliding_attention", "full_attention"]
        model, tokenizer = build()
        model.llm = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        assert model.pack_rows()
        batch = lay_out(tokenizer(examples), 1, packed=True)
        expected = model(batch=batch)
        with monkeypatch.context() as patch:
            patch.setattr(packing, "varlen_attn", stand_in)
            patch.setattr(packing, "_has_kernel", lambda query: True)
            found = model(batch=batch)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert set(calls) == windows and len(calls) == config.num_hidden_layers
        calls.clear()


def test_the_kernel_is_for_half_precision_on_a_gpu() -> None:
    assert not packing._has_kernel(nn.Parameter(torch.zeros(1, 2, 3, 64)))
    assert not packing._has_kernel(torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16))
