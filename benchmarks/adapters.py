"""Two LoRA specialists of one real model, merged from their adapters: quality, and cost beside merging by peft first.

    pip install -r requirements-peft.txt
    python -m benchmarks.adapters --model MODEL --math_data math.json --work_dir runs/adapters

The specialists, their texts and the scores are those of `benchmarks/reproduce/regmean.py`, with adapters of all linear
layers in place of whole fine-tuned models. `average` and RegMean read the adapters. The cost is that of the average in
float32, as whole processes with imports; the baseline loads, merges and saves both specialists by peft before it.
Finished steps are not repeated. Figures go to `results/adapters.json`.
"""

import functools
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import side_by_side
from benchmarks.average import largest_difference
from benchmarks.reproduce.regmean import (
    DOMAINS,
    FIGURES,
    ReproduceFlags,
    per_text,
    read_all_texts,
    scores_of,
    write_all_grams,
    write_all_texts,
)
from benchmarks.reproduce.steps import costs, step, training_order
from benchmarks.reproduce.tables import markdown
from benchmarks.reproduce.texts import Text, write_jsonl
from common.cli import flag, parse_flags
from common.errors import exit_with_message
from common.io import write_json
from common.locks import locked
from common.logging import quiet_libraries
from mindmerger.frozen_models import load_llm
from quickstart.fit import causal_batches, fit

RESULTS = Path("results/adapters.json")
ALPHA = 0.9
RANK = 16
BY_PEFT = "by peft"  # in place of flags: adapters and output folders of the baseline's first part


@dataclass
class AdapterFlags(ReproduceFlags):
    """Train two adapters of a model, merge them, and compare all on held-out texts."""

    work_dir: str = flag("runs/adapters", "folder for adapters, Grams, merges and scores")
    steps: int = flag(24, "steps of training an adapter")
    lr: float = flag(1e-3, "highest learning rate, of AdamW with warm-up and cosine decay")
    dtype: str = flag("float32", "of forward passes; bfloat16 is faster on a CPU with bfloat16 instructions")
    num_examples: int = flag(64, "training texts that a Gram is computed from")
    test_num: int = flag(60, "held-out texts of each domain")
    rounds: int = flag(3, "runs of the cost's two sides")


def specialist(flags: AdapterFlags, texts: Sequence[Text], folder: Path) -> None:
    """Train an adapter; write it, and its texts in the form that `compute_gram.py` reads."""
    import peft

    drawn = training_order(texts, flags.steps, flags.batch_size, seed=0)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(flags.model)
    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_llm(flags.model, None, torch.float32, trust_remote_code=False), settings)
    fit(model, causal_batches(iter(drawn), tokenizer, flags.batch_size), flags.lr, flags.steps, "training")
    model.save_pretrained(folder / "model")
    write_jsonl(folder / "texts.jsonl", drawn)


def merge_by_peft(base: str, adapters: Sequence[str]) -> None:
    """Merge each adapter into the base with peft, and save it beside the adapter."""
    import peft

    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        model.merge_and_unload().save_pretrained(f"{adapter}_whole")
        AutoTokenizer.from_pretrained(base).save_pretrained(f"{adapter}_whole")


def merge_words(models: Sequence[str | Path], output: Path, *words: str) -> list[str]:
    """Words of `merge_model.py`, written to `output` in place of what is there."""
    shutil.rmtree(output, ignore_errors=True)
    return ["merge_model.py", "--models", *map(str, models), "--device", "cpu", "--output_dir", str(output), *words]


def compare_costs(flags: AdapterFlags, adapters: list[Path], work: Path) -> dict[str, Any]:
    """Cost of the average of both adapters, and of merging each by peft before the average."""
    whole = [Path(f"{adapter}_whole") for adapter in adapters]

    def baseline() -> side_by_side.Cost:
        for folder in whole:
            shutil.rmtree(folder, ignore_errors=True)
        words = ["-m", "benchmarks.adapters", BY_PEFT, flags.model, *map(str, adapters)]
        parts = [side_by_side.run(words), side_by_side.run(merge_words(whole, work / "by_peft", "--method", "avg"))]
        return side_by_side.Cost(sum(part.seconds for part in parts), max(part.peak_bytes for part in parts))

    def ours() -> side_by_side.Cost:
        return side_by_side.run(merge_words(adapters, work / "average", "--method", "avg"))

    before, after = side_by_side.in_turn(baseline, ours, flags.rounds)
    return {
        "by_peft_first": vars(before) | {"copies_bytes": sum(f.stat().st_size for w in whole for f in w.rglob("*"))},
        "ours": vars(after),
        "largest_relative_difference": largest_difference(work / "average", work / "by_peft"),
    }


def run(flags: AdapterFlags) -> dict[str, Any]:
    """Run all unfinished steps; return figures of each model, and the costs."""
    work = Path(flags.work_dir)
    tokenizer = AutoTokenizer.from_pretrained(flags.model)
    step(work / "texts", lambda folder: write_all_texts(folder, flags, tokenizer))
    texts = read_all_texts(work / "texts", flags.test_num, flags.steps * flags.batch_size)
    for domain in DOMAINS:
        step(work / domain, functools.partial(specialist, flags, texts.training[domain]))
    adapters = [work / domain / "model" for domain in DOMAINS]
    grams = write_all_grams(flags, work)
    cost = compare_costs(flags, adapters, work)
    words = ["--method", "regmean", "--grams", *grams, "--alpha", str(ALPHA)]
    regmean = side_by_side.run(merge_words(adapters, work / "regmean", *words))
    folders = {"base": flags.model} | {f"{domain} adapter": work / domain / "model_whole" for domain in DOMAINS}
    folders |= {"average": work / "average", f"RegMean, alpha {ALPHA:g}": work / "regmean"}
    scores = {
        name: scores_of(flags, folder, work / f"scores_{number}", texts)
        for number, (name, folder) in enumerate(folders.items())
    }
    figures = {}
    for name, own in scores.items():
        sums = {figure: [values.sum() for values in per_text(own, figure)] for figure in FIGURES}
        figures[name] = {figure: float(numerator / denominator) for figure, (numerator, denominator) in sums.items()}
    settings = {name: getattr(flags, name) for name in ("steps", "batch_size", "lr", "num_examples", "test_num")}
    return {
        "benchmark": "adapters",
        "settings": settings | {"rank": RANK, "alpha": ALPHA},
        "models": figures,
        "cost": cost | {"regmean": vars(regmean)},
        "steps": costs(work),
        "machine": side_by_side.machine(),
    }


def table(figures: dict[str, dict[str, float]]) -> str:
    """Format figures as Markdown."""
    rows = [
        [name, *(f"{100 * own[f] if FIGURES[f][-1] else own[f]:.3f}" for f in FIGURES)] for name, own in figures.items()
    ]
    return markdown(["model", *(names[0] for names in FIGURES.values())], rows)


def main() -> None:
    if sys.argv[1:2] == [BY_PEFT]:
        merge_by_peft(sys.argv[2], sys.argv[3:])
        return
    quiet_libraries()
    flags = parse_flags(AdapterFlags)
    with locked(Path(flags.work_dir)):
        result = run(flags)
    write_json(RESULTS, result)
    print(f"\n{table(result['models'])}\n\n{RESULTS}")
    print(json.dumps(result))


if __name__ == "__main__":
    exit_with_message(main)
