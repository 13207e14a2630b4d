"""What both tables in miniature are made of: steps that are done once, and models fine-tuned on texts."""

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
    """Let `work` fill a folder, unless that is done.

    The seconds that it took, of clock and of CPU, are kept in it; of work that was interrupted, those since then.
    """
    if folder.exists():
        return
    print(f"== {folder}", flush=True)
    started, cpu_started = time.monotonic(), _cpu_seconds()
    with atomic_folder(folder) as partial:
        work(partial)
        seconds, cpu_seconds = time.monotonic() - started, _cpu_seconds() - cpu_started
        write_json(partial / COST, {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)})
    # Optimizers and models hold each other in cycles, and the next step needs their memory.
    gc.collect()
    print(f"== {folder}: {seconds:.1f} s, {cpu_seconds:.1f} s of CPU", flush=True)


def _cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def costs(work: Path) -> dict[str, dict[str, float]]:
    """What `step` has kept in every folder below `work`, by the folder's path there."""
    return {str(path.parent.relative_to(work)): read_json(path) for path in sorted(work.rglob(COST))}


def training_order(texts: Sequence[Text], steps: int, batch_size: int, seed: int) -> list[Text]:
    """`steps` batches of texts drawn without replacement, end to end; those of one batch are of like length."""
    rng = random.Random(seed)
    drawn = sorted(rng.sample(texts, steps * batch_size), key=lambda text: len(text.read + text.learned))
    batches = [drawn[start : start + batch_size] for start in range(0, len(drawn), batch_size)]
    rng.shuffle(batches)
    return [text for batch in batches for text in batch]


def fine_tune(model_name: str, texts: Sequence[Text], batch_size: int, lr: float, folder: Path) -> None:
    """Fine-tune all weights on what texts say to be learned, once and in order, and write the model with its tokenizer.

    Args:
        model_name: hub id or local folder of a causal language model.
        texts: whole batches, end to end.
        batch_size: texts of a step.
        lr: the highest learning rate, of AdamW with warm-up and cosine decay.
        folder: to write a Hugging Face folder to.
    """
    model = load_llm(model_name, None, torch.float32, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    fit(model, causal_batches(iter(texts), tokenizer, batch_size), lr, len(texts) // batch_size, "fine-tuning")
    del model.forward
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
