"""Layer-sequential work against today's: Grams layer by layer, and the merges `regmean++` and `regmean_asym`.

Rows: `grams`, of `compute_gram.py --layerwise off` and `on`; `merges`, of the Grams of both models and merge_model.py's
RegMean against one layer-sequential merge by each method; `merges_counts`, the same with embeddings by token counts;
`two_layers`, the same of two bfloat16 layers of Llama-3-8B's shape, for the memory; `published`, a RegMean++ with all
models in memory against merge_model.py's. Costs are those beside the imports. `multiply_adds`, per token of a model,
are those of forward passes and of products of inputs; `bound` is their ratio. `states_bytes` are hidden states.

    python -m benchmarks.sequential --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from benchmarks import regmean_inputs, side_by_side
from benchmarks.published_regmean import published_regmean_plus_plus
from benchmarks.side_by_side import measured
from common.ranks import start_process
from regmean.compute import compute_grams
from regmean.config import GramFlags, MergeFlags
from regmean.gram_file import FILE_NAME, GramFile
from regmean.layerwise.asymmetric import has_few_outputs
from regmean.layerwise.merge import merge_layer_by_layer
from regmean.layerwise.sequential import SAMPLED
from regmean.merge import merge
from regmean.model_folder import locate_model

ALPHA = 0.1
TEXTS = "texts.jsonl"


def gram_flags(model: Path, work: Path, dtype: str, layerwise: str, out: Path) -> GramFlags:
    texts = {"dataset": str(work / TEXTS), "text_column": "text"}
    return GramFlags(
        model=str(model), **texts, dtype=dtype, device="cpu", layerwise=layerwise, output_dir=str(out), overwrite=True
    )


def merge_flags(method: str, work: Path, dtype: str, embeddings: str, **options: Any) -> MergeFlags:
    models = [str(work / name) for name in "AB"]
    out = work / method
    shutil.rmtree(out, ignore_errors=True)
    return MergeFlags(
        method=method,
        models=models,
        alpha=[ALPHA],
        embeddings=embeddings,
        dtype=dtype,
        device="cpu",
        output_dir=str(out),
        **options,
    )


def grams_side(layerwise: str, work: Path, dtype: str, embeddings: str) -> None:
    process = start_process("cpu")
    with measured():
        compute_grams(gram_flags(work / "A", work, dtype, layerwise, work / f"grams_{layerwise}"), process)


def regmean_side(work: Path, dtype: str, embeddings: str) -> None:
    process = start_process("cpu")
    flags = merge_flags("regmean", work, dtype, embeddings, grams=[str(work / "gA"), str(work / "gB")])
    with measured():
        for name in "AB":
            compute_grams(gram_flags(work / name, work, dtype, "off", work / f"g{name}"), process)
        merge(flags, "benchmark")


def sequential_side(method: str, work: Path, dtype: str, embeddings: str) -> None:
    process = start_process("cpu")
    flags = merge_flags(method, work, dtype, embeddings, calibration=[str(work / "texts.yaml")] * 2)
    with measured():
        merge_layer_by_layer(flags, process, "benchmark")


def published_side(work: Path, dtype: str, embeddings: str) -> None:
    texts = regmean_inputs.read_texts(work / TEXTS)
    with measured():
        published_regmean_plus_plus([str(work / name) for name in "AB"], [texts] * 2, ALPHA, work / "published")


SIDES = {
    "off": partial(grams_side, "off"),
    "on": partial(grams_side, "on"),
    "regmean": regmean_side,
    "regmean++": partial(sequential_side, "regmean++"),
    "regmean_asym": partial(sequential_side, "regmean_asym"),
    "published": published_side,
}


def prepare(model: Path, work: Path, texts: int) -> None:
    """Put a model, its sibling and texts into `work`."""
    shutil.copytree(model, work / "A")
    regmean_inputs.make_sibling(work / "A", work / "B")
    regmean_inputs.write_texts(work / TEXTS, AutoTokenizer.from_pretrained(model), texts)
    (work / "texts.yaml").write_text(f"dataset: {work / TEXTS}\ntext_column: text\n")


def compare(baseline: str, ours: str, work: Path, dtype: str, embeddings: str, rounds: int) -> tuple:
    """Costs of two sides."""

    def run(side: str) -> side_by_side.Cost:
        words = ["-m", "benchmarks.sequential", "--work", str(work), "--side", side]
        return side_by_side.run([*words, "--dtype", dtype, "--embeddings", embeddings])

    return side_by_side.in_turn(lambda: run(baseline), lambda: run(ours), rounds)


def multiply_adds(model: Path) -> dict[str, dict[str, int]]:
    """Per token of a model: forward passes up to the last input that is read, and products of a layer's inputs."""
    config = AutoConfig.from_pretrained(model)
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads = config.num_attention_heads * (getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    keys = heads * config.num_key_value_heads // config.num_attention_heads
    # Of each group of linear layers; the first three are run before the inputs of the fourth are there.
    work = [hidden * (heads + 2 * keys), heads * hidden, 2 * hidden * inner, inner * hidden]
    squares = layers * (2 * hidden**2 + heads**2 + inner**2)
    whole, until_last = layers * sum(work), layers * sum(work[:3])
    each = layers * sum(sum(work[:count]) for count in range(4))
    # Layers of few outputs: T = X W_i - H M and H^T T in place of H^T X and X^T X.
    asymmetric = {"H^T H": squares // 2, "H^T X": squares, "X^T X": squares // 2}
    if has_few_outputs(hidden, inner, torch.device("cpu")):
        asymmetric["H^T X"] -= layers * inner**2
        asymmetric["X^T X"] -= layers * inner**2 // 2
        asymmetric["T and H^T T"] = 3 * layers * hidden * inner
    counts = {
        "regmean": {"forward": whole - work[3], "X^T X": squares // 2},
        "regmean++": {"forward": until_last + whole + whole // SAMPLED, "H^T H": squares // 2},
        "regmean_asym": {"forward": 2 * (each + whole) - until_last, **asymmetric},
    }
    return {method: parts | {"sum": sum(parts.values())} for method, parts in counts.items()}


def states_bytes(method: str, work: Path, itemsize: int) -> int:
    """Bytes of the hidden states of both models' texts, without padding."""
    tokens = next(iter(GramFile(work / "gA" / FILE_NAME).grams.values())).tokens
    copies = 2 * (2 if method == "regmean_asym" else 1)
    return copies * tokens * AutoConfig.from_pretrained(work / "A").hidden_size * itemsize


def methods(args: argparse.Namespace, work: Path, names: list[str], dtype: str, embeddings: str) -> None:
    """Print a row for each method, against RegMean with its Grams."""
    counts = multiply_adds(work / "A")
    for method in names:
        baseline, ours = compare("regmean", method, work, dtype, embeddings, args.rounds)
        side_by_side.report(
            f"{method}, embeddings {embeddings}",
            baseline,
            ours,
            None,
            ratio=round(ours.seconds / baseline.seconds, 2),
            states_bytes=states_bytes(method, work, getattr(torch, dtype).itemsize),
            multiply_adds={name: counts[name] for name in ("regmean", method)},
            bound=round(counts[method]["sum"] / counts["regmean"]["sum"], 2),
        )


def grams(args: argparse.Namespace, work: Path) -> None:
    prepare(locate_model(args.model), work, 16 if args.quick else 48)
    baseline, ours = compare("off", "on", work, "float32", "average", args.rounds)
    files = [GramFile(work / f"grams_{name}" / FILE_NAME) for name in ("off", "on")]
    difference = 0.0
    for name in files[0].grams:
        whole, by_layer = (file.read(name) for file in files)
        difference = max(difference, float(np.linalg.norm(whole - by_layer) / np.linalg.norm(whole)))
    ratio = round(ours.seconds / baseline.seconds, 2)
    side_by_side.report("grams", baseline, ours, difference, compared_with="whole model's sums", ratio=ratio)


def merges(args: argparse.Namespace, work: Path, embeddings: str = "average") -> None:
    prepare(locate_model(args.model), work, 16 if args.quick else 48)
    methods(args, work, ["regmean++", "regmean_asym"], "float32", embeddings)


def two_layers(args: argparse.Namespace, work: Path) -> None:
    shape = (1024, 3584) if args.quick else (4096, 14336)
    model = regmean_inputs.make_layer(work / "layers", *shape, torch.bfloat16, layers=2)
    prepare(model, work, 4)
    methods(args, work, ["regmean++", "regmean_asym"], "bfloat16", "average")


def published(args: argparse.Namespace, work: Path) -> None:
    prepare(locate_model(args.model), work, 16 if args.quick else 48)
    baseline, ours = compare("published", "regmean++", work, "float32", "average", args.rounds)
    theirs, merged, *parents = (
        load_file(work / name / "model.safetensors") for name in ("published", "regmean++", *"AB")
    )
    difference = max(
        float((merged[name] - theirs[name]).norm() / (parents[0][name].float() - parents[1][name].float()).norm())
        for name in theirs
    )
    side_by_side.report("published", baseline, ours, difference, compared_with="|W - published| / |W_A - W_B|")


ROWS = {
    "grams": grams,
    "merges": merges,
    "merges_counts": partial(merges, embeddings="counts"),
    "two_layers": two_layers,
    "published": published,
}


def main() -> None:
    parser = regmean_inputs.parser(__doc__, ROWS)
    for name in ("dtype", "embeddings"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        SIDES[args.side](args.work, args.dtype, args.embeddings)
        return
    regmean_inputs.run_rows(args, ROWS)


if __name__ == "__main__":
    main()
