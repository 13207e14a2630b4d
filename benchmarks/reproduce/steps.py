"""Shared parts of both tables in miniature: steps that run once, and models fine-tuned on texts."""

import gc
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.reproduce.texts import Text
from common.io import atomic_folder, read_json, write_json
from mindmerger.frozen_models import load_llm
from quickstart.fit import causal_batches, fit

COST = "cost.json"


def step(folder: Path, work: Callable[[Path], None]) -> None:
    """Fill a folder by `work`, unless this is done.

    The folder records wall-clock and CPU seconds; after an interruption, only those since then.
    """
    if folder.exists():
        return
    print(f"== {folder}", flush=True)
    started, cpu_started = time.monotonic(), _cpu_seconds()
    with atomic_folder(folder) as partial:
        work(partial)
        seconds, cpu_seconds = time.monotonic() - started, _cpu_seconds() - cpu_started
        write_json(partial / COST, {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)})
    # Optimizers and models are in reference cycles, and the next step needs their memory.
    gc.collect()
    print(f"== {folder}: {seconds:.1f} s, {cpu_seconds:.1f} s of CPU", flush=True)


def _cpu_seconds() -> float:
    """CPU seconds of this process and of children that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def costs(work: Path) -> dict[str, dict[str, float]]:
    """Records of `step` in all folders below `work`, by relative path."""
    return {str(path.parent.relative_to(work)): read_json(path) for path in sorted(work.rglob(COST))}


def training_order(texts: Sequence[Text], steps: int, batch_size: int, seed: int) -> list[Text]:
    """Draw `steps` batches of texts without replacement, concatenated; texts of a batch have similar lengths."""
    rng = random.Random(seed)
    drawn = sorted(rng.sample(texts, steps * batch_size), key=lambda text: len(text.read + text.learned))
    batches = [drawn[start : start + batch_size] for start in range(0, len(drawn), batch_size)]
    rng.shuffle(batches)
    return [text for batch in batches for text in batch]


def fine_tune(
    model_name: str,
    texts: Sequence[Text],
    batch_size: int,
    lr: float,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Fine-tune all weights on the learned part of texts, once and in order; write the model with its tokenizer.

    Args:
        model_name: hub id or local folder of a causal language model.
        texts: whole batches, concatenated.
        batch_size: texts of a step.
        lr: the highest learning rate, of AdamW with warm-up and cosine decay.
        folder: output, a Hugging Face folder.
        dtype: of the forward pass; weights are float32.
    """
    model = load_llm(model_name, None, torch.float32, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model.forward = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)(model.forward)
    fit(model, causal_batches(iter(texts), tokenizer, batch_size), lr, len(texts) // batch_size, "fine-tuning")
    del model.forward
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
