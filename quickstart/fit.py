"""Training loop of the quickstart's small models, and their LLaMA."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)

from common.logging import progress
from common.ranks import Process
from mindmerger.batching import IGNORED

# Training texts: (text that is only read, text that is learned).
Lessons = Iterator[tuple[str, str]]

WARMUP_SHARE = 0.1
LARGEST_GRADIENT = 1.0


def small_llama(
    tokenizer: PreTrainedTokenizerBase, hidden: int, intermediate: int, layers: int, positions: int
) -> LlamaForCausalLM:
    """A LLaMA of four heads for `tokenizer`, with weights from torch's generator in its current state."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def fit(
    model: PreTrainedModel, batches: Iterator[dict[str, torch.Tensor]], lr: float, steps: int, name: str
) -> PreTrainedModel:
    """Train every weight of `model` in place: AdamW, linear warm-up and cosine decay, gradients clipped.

    Args:
        model: any model whose forward returns an object with a `loss`.
        batches: the forward's keyword arguments of each step, on the model's device; at least `steps` of them.
        lr: the highest learning rate.
        steps: number of batches.
        name: for the progress bar.

    Returns:
        `model`, in eval mode.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP_SHARE * steps), steps)
    model.train()
    bar = progress(Process(0, 1, model.device), islice(batches, steps), total=steps, desc=name, unit="step")
    for batch in bar:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def causal_batches(
    lessons: Lessons, tokenizer: PreTrainedTokenizerBase, size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of training texts of a causal language model, for `fit`.

    Args:
        lessons: at least `size` for each batch.
        tokenizer: must add a text's first special tokens and no last one.
        size: lessons of a batch.

    Yields:
        `input_ids`, `attention_mask`, `labels`: int64 [size, longest], right-padded; the labels are the learned tokens
        and an eos, -100 elsewhere.
    """
    while True:
        rows = []
        for read, learned in islice(lessons, size):
            ids = tokenizer(learned, add_special_tokens=False).input_ids
            rows.append((tokenizer(read).input_ids, [*ids, tokenizer.eos_token_id]))
        yield {
            "input_ids": padded([read + learned for read, learned in rows], tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(read + learned) for read, learned in rows], 0),
            "labels": padded([[IGNORED] * len(read) + learned for read, learned in rows], IGNORED),
        }


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    """int64 [rows, longest], padded with `value` on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a whole Hugging Face folder in half precision, which halves the download."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
