"""Grams as published against compute_gram.py: time, and memory beside the loaded model.

Rows: `gram`, of a model on texts of 40 to 256 tokens, 32 to a batch as published; `gram_layer`, the same of one layer
of Llama-3-8B's shape with random weights; `gram_file`, the size of the file that the first row writes. The published
way counts padding, so its Grams differ; ours are compared with float64 sums over the inputs of one text at a time.

    python -m benchmarks.gram --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks import regmean_inputs, side_by_side
from benchmarks.published_regmean import published_grams
from benchmarks.side_by_side import measured
from common.ranks import start_process
from regmean.compute import compute_grams
from regmean.config import GramFlags
from regmean.gram_file import FILE_NAME, PUBLISHED_NAME, GramFile
from regmean.model_folder import locate_model

TEXTS = "texts.jsonl"
DIFFERENCE = "difference.json"


def load(model_path: str) -> PreTrainedModel:
    """Load the model in float32, including its memory-mapped pages, before time is measured."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.sum()
    return model


def baseline_side(model_path: str, work: Path) -> None:
    model = load(model_path)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    with measured():
        grams = published_grams(model, tokenizer, regmean_inputs.read_texts(work / TEXTS), max_length=256)
        torch.save(grams, work / PUBLISHED_NAME)


def our_side(model_path: str, work: Path) -> None:
    import datasets  # noqa: F401  imported before time is measured

    model = load(model_path)
    flags = GramFlags(
        model=model_path,
        dataset=str(work / TEXTS),
        text_column="text",
        dtype="float32",
        device="cpu",
        output_dir=str(work),
        overwrite=True,
    )
    process = start_process("cpu")
    with measured():
        compute_grams(flags, process, model=model)


@torch.no_grad()
def compare_side(model_path: str, work: Path) -> None:
    """Write the largest relative difference, in the Frobenius norm, of a Gram from its float64 sum."""
    model = load(model_path)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    file = GramFile(work / FILE_NAME)
    sums: dict[str, np.ndarray] = {}

    def hook_of(name: str):
        def hook(module: torch.nn.Module, inputs: tuple) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).double().numpy()
            sums[name] = sums.get(name, 0.0) + x.T @ x

        return hook

    for name in file.grams:
        model.get_submodule(name).register_forward_pre_hook(hook_of(name))
    for text in regmean_inputs.read_texts(work / TEXTS):
        model(**tokenizer(text, truncation=True, max_length=256, return_tensors="pt"))
    differences = {
        name: float(np.linalg.norm(file.read(name) - total) / np.linalg.norm(total)) for name, total in sums.items()
    }
    (work / DIFFERENCE).write_text(json.dumps(max(differences.values())))


SIDES = {"baseline": baseline_side, "ours": our_side, "compare": compare_side}


def measure(name: str, model: str, work: Path, texts: int, rounds: int) -> None:
    """Print the row `name`, of `texts` texts."""
    regmean_inputs.write_texts(work / TEXTS, AutoTokenizer.from_pretrained(model), texts)

    def run(side: str) -> side_by_side.Cost:
        return side_by_side.run(["-m", "benchmarks.gram", "--model", model, "--work", str(work), "--side", side])

    baseline, ours = side_by_side.in_turn(lambda: run("baseline"), lambda: run("ours"), rounds)
    run("compare")
    difference = json.loads((work / DIFFERENCE).read_text())
    tokens = next(iter(GramFile(work / FILE_NAME).grams.values())).tokens
    side_by_side.report(name, baseline, ours, difference, compared_with="padding-free float64 sums", tokens=tokens)


def gram(args: argparse.Namespace, work: Path) -> None:
    measure("gram", str(locate_model(args.model)), work, 32 if args.quick else 96, args.rounds)
    sizes = [(work / name).stat().st_size for name in (PUBLISHED_NAME, FILE_NAME)]
    # The difference is that of a Gram read back to the sum that was written: `test_a_gram_comes_back_exactly`.
    line = {"benchmark": "gram_file", "baseline_bytes": sizes[0], "ours_bytes": sizes[1]}
    print(json.dumps(line | {"ratio": round(sizes[0] / sizes[1], 2), "machine": side_by_side.machine()}), flush=True)


def gram_layer(args: argparse.Namespace, work: Path) -> None:
    shape = (1024, 3584) if args.quick else (4096, 14336)
    model = regmean_inputs.make_layer(work / "layer", *shape, torch.float32)
    measure("gram_layer", str(model), work, 32, args.rounds)


ROWS = {"gram": gram, "gram_layer": gram_layer}


def main() -> None:
    args = regmean_inputs.parser(__doc__, ROWS).parse_args()
    if args.side:
        SIDES[args.side](args.model, args.work)
        return
    regmean_inputs.run_rows(args, ROWS)


if __name__ == "__main__":
    main()
