"""Control of a trained mapping: dev perplexity with its own and with shuffled sources.

For translations, the fraction of numbers that they contain, and chrF (Popovic 2015, by sacrebleu).

    python -m benchmarks.mapping_control --init_checkpoint outputs/MergeMinds/mapping --data_dir ./datas \\
        --languages de,es,fr --train_num 100000 --dev_size 3000

with the languages, sizes and seed of the training run, so that the same dev rows are held out. If both perplexities are
equal, the mapping transfers nothing of the source. The last line is one JSON object.
"""

import json
import math
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from transformers import set_seed

from common.cli import flag, parse_flags
from common.errors import InputError, exit_with_message
from common.logging import quiet_libraries
from common.models import base_config, load_tokenizer
from common.optional import require
from common.ranks import start_process
from mindmerger.batching import Tokens, lay_out, plan_once
from mindmerger.data import Example, hold_out, read_training
from mindmerger.evaluation.answerer import Answerer, pick_dtype
from mindmerger.evaluation.decoding import greedy
from mindmerger.modeling import MindMergerConfig, MindMergerForCausalLM
from mindmerger.tasks import TRAINING_TASKS, find_task, select_languages
from mindmerger.tokenization import ExampleTokenizer

Row = TypeVar("Row", Tokens, Example)


@dataclass
class ControlFlags:
    """Measure perplexity of a mapping's dev rows, with their own sources and with sources shuffled among targets."""

    init_checkpoint: str | None = flag(None, "folder of a mapping")
    data_dir: str = flag("./datas", "folder in the published data layout")
    languages: str | None = flag(None, "comma-separated, as in training")
    train_num: int = flag(100_000, "rows per language, as in training")
    dev_size: int = flag(3000, "rows held out, as in training")
    seed: int = flag(0, "as in training")
    max_seq_len: int = flag(512, "tokens of a source, as in training")
    max_gen_len: int = flag(512, "tokens of a prompt or a target, as in training")
    eval_batch_size: int = flag(12, "rows of a batch")
    translations: int = flag(5, "dev rows of each language to translate greedily")
    shown: int = flag(2, "translations of each language to print")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "of all weights; auto: bfloat16 on a GPU")
    device: str = flag("auto", "auto (GPU if there is one), cpu, cuda")

    def __post_init__(self) -> None:
        if self.init_checkpoint is None:
            raise InputError("--init_checkpoint is needed: the mapping to measure")
        if self.translations:
            require("sacrebleu", "requirements-dev.txt")


@torch.inference_mode()
def perplexity(model: MindMergerForCausalLM, rows: list[Tokens], batch_size: int, source_pad_id: int) -> float:
    """exp of the mean loss over all target tokens."""
    (plan,) = plan_once([len(row) for row in rows], batch_size, ranks=1)
    loss = 0.0
    for numbers in plan:
        chosen = [rows[number] for number in numbers]
        batch = lay_out(chosen, model.config.llm_bos_token_id, source_pad_id, packed=model.packs).to(model.llm.device)
        loss += float(model(batch=batch, num_items_in_batch=1.0).loss)
    return math.exp(loss / sum(len(row.target) for row in rows))


def shuffled_sources(rows: list[Row], seed: int) -> list[Row]:
    """Combine each target with the source of another row."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    # In a cycle through the shuffled rows, no row keeps its own source.
    partner = {row: order[(place + 1) % len(order)] for place, row in enumerate(order)}
    return [replace(row, source=rows[partner[number]].source) for number, row in enumerate(rows)]


@torch.inference_mode()
def translate(model: MindMergerForCausalLM, tokenizer: ExampleTokenizer, rows: list[Tokens], size: int) -> list[str]:
    """Translate each source greedily, with at most twice the tokens of the longest target."""
    texts = [""] * len(rows)
    longest = 2 * max(len(row.target) for row in rows)
    eos = {tokenizer.llm_tokenizer.eos_token_id, *tokenizer.closing[-1:]}
    (plan,) = plan_once([len(row) for row in rows], size, ranks=1)
    for numbers in plan:
        sequence = Answerer(model.llm, tokenizer, model).embed([replace(rows[number], target=[]) for number in numbers])
        for number, ids in zip(numbers, greedy(model.llm, sequence, longest, eos), strict=True):
            texts[number] = tokenizer.llm_tokenizer.decode(ids, skip_special_tokens=True).strip()
    return texts


def numbers_kept(written: list[str], meant: list[str]) -> float:
    """Fraction of the numbers in `meant` that are in the text written for it, counted with multiplicity."""
    kept = wanted = 0
    for text, target in zip(written, meant, strict=True):
        numbers = Counter(re.findall(r"\d+", target))
        kept += (numbers & Counter(re.findall(r"\d+", text))).total()
        wanted += numbers.total()
    return kept / wanted if wanted else math.nan


def measure(flags: ControlFlags) -> dict[str, dict[str, Any]]:
    """Load the mapping and measure it on the dev rows of its training run; print some translations.

    Returns:
        By language: `rows`, `tokens` of their targets, `perplexity`, `shuffled` (the perplexity with another row's
        source), and if there are translations, `numbers_kept` (0 to 1), `chrf` (0 to 100) and the texts,
        `translations`.
    """
    quiet_libraries()
    set_seed(flags.seed)
    config = MindMergerConfig.from_pretrained(flags.init_checkpoint)
    task = find_task(config.task, TRAINING_TASKS)
    languages = select_languages(flags.languages)
    examples = list(read_training(Path(flags.data_dir), task, config.stage, languages, flags.train_num))
    dev = [examples[row] for row in hold_out(len(examples), flags.dev_size, flags.seed)[0]]
    tokenizer = ExampleTokenizer(
        load_tokenizer(config.mt_path, config.mt_revision),
        base_config(config.mt_path, config.mt_revision),
        load_tokenizer(config.llm_path, config.llm_revision),
        augmentation=config.augmentation,
        chats=config.prompt_format == "chat",
        max_seq_len=flags.max_seq_len,
        max_prompt_len=flags.max_gen_len,
        max_gen_len=flags.max_gen_len,
    )
    device = start_process(flags.device).device
    dtype = pick_dtype(flags.dtype, device)
    model = MindMergerForCausalLM.from_pretrained(flags.init_checkpoint, dtype=dtype).to(device)
    model.pack_rows(tokenizer.source_pad_id)

    by_language: dict[str, list[Example]] = {}
    for example in dev:
        by_language.setdefault(example.language.name, []).append(example)
    pad_id, size, result = tokenizer.source_pad_id, flags.eval_batch_size, {}
    for language, own in by_language.items():
        rows = tokenizer(own)
        result[language] = {
            "rows": len(own),
            "tokens": sum(len(row.target) for row in rows),
            "perplexity": round(perplexity(model, rows, size, pad_id), 3),
            "shuffled": round(perplexity(model, shuffled_sources(rows, flags.seed), size, pad_id), 3),
        }
        if flags.translations:
            import sacrebleu

            told = own[: flags.translations]
            written, meant = translate(model, tokenizer, rows[: len(told)], size), [row.target for row in told]
            result[language]["numbers_kept"] = round(numbers_kept(written, meant), 3)
            result[language]["chrf"] = round(sacrebleu.corpus_chrf(written, [meant]).score, 1)
            result[language]["translations"] = [
                {"source": example.source.text, "meant": example.target, "written": text}
                for example, text in zip(told, written, strict=True)
            ]
            for shown in result[language]["translations"][: flags.shown]:
                print("\n" + "\n".join([language, *(f"{name}: {text}" for name, text in shown.items())]))
        print(f"\n{language} { ({key: value for key, value in result[language].items() if key != 'translations'}) }")
    return result


def main() -> None:
    flags = parse_flags(ControlFlags)
    result = measure(flags)
    print(json.dumps({"benchmark": "mapping_control", "checkpoint": flags.init_checkpoint, "languages": result}))


if __name__ == "__main__":
    exit_with_message(main)
