"""RegMean's merge as published, by `lstsq(driver="gels")`, against merge_model.py: whole processes with imports.

Rows: `merge`, of a model and a copy of it with seeded noise in place of fine-tuning, with Grams of real texts;
`merge_layer`, the same of one layer of Llama-3-8B's shape in bfloat16. The difference is the regression's objective
above its float64 minimum, as a fraction of the objective at the mean; the maximum over layers.

    python -m benchmarks.merge --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks import host, regmean_inputs, side_by_side
from regmean.gram_file import FILE_NAME, PUBLISHED_NAME, GramFile
from regmean.model_folder import locate_model, open_checkpoint

ALPHA = 0.1
ROWS_COMPARED = 256  # of a weight; its rows are independent problems
DIFFERENCE = "difference.json"


def write_grams(model: Path, texts: Path) -> None:
    """Write the model's Grams over the texts, in both forms, to its folder."""
    words = ["compute_gram.py", "--model", str(model), "--dataset", str(texts), "--text_column", "text"]
    side_by_side.run([*words, "--dtype", "float32", "--device", "cpu", "--output_dir", str(model)])
    file = GramFile(model / FILE_NAME)
    means = {}
    for gram in file.grams.values():
        mean = torch.from_numpy(file.read(gram.name)).div_(gram.tokens)
        # As published: one Gram per module.
        means |= {module: mean.clone() for module in gram.modules}
    torch.save(means, model / PUBLISHED_NAME)


def compare(models: list[Path], merges: dict[str, Path]) -> dict[str, float]:
    """Largest excess of a layer's objective above its minimum, as a fraction of the mean's, for each merge."""
    files = [GramFile(model / FILE_NAME) for model in models]
    parents = [open_checkpoint(str(model)).tensors for model in models]
    merged = {name: open_checkpoint(str(folder)).tensors for name, folder in merges.items()}
    above = dict.fromkeys(merges, 0.0)
    for gram in files[0].grams.values():
        scaled = []
        for file in files:
            system = file.read(gram.name).astype(np.float64) * (ALPHA / file.grams[gram.name].tokens)
            np.fill_diagonal(system, system.diagonal() / ALPHA)
            scaled.append(system)
        total = (scaled[0] + scaled[1]) / 2
        for module in gram.modules:
            shape = parents[0][f"{module}.weight"].shape
            rows = min(ROWS_COMPARED, shape[0])

            def read(tensors: dict, name: str = f"{module}.weight", shape: tuple = (rows, shape[1])) -> np.ndarray:
                return tensors[name].read_floats(0, shape[0] * shape[1]).reshape(shape).astype(np.float64)

            a, b = (read(tensors) for tensors in parents)
            half = (a - b) / 2
            best = (a + b) / 2 + np.linalg.solve(total, (half @ (scaled[0] - scaled[1]) / 2).T).T
            at_mean = np.vdot(half, half @ total)
            for name, tensors in merged.items():
                error = read(tensors) - best
                above[name] = max(above[name], float(np.vdot(error, error @ total) / at_mean))
    return above


def compare_side(work: Path) -> None:
    merges = {side: work / side for side in ("baseline", "ours")}
    (work / DIFFERENCE).write_text(json.dumps(compare([work / "A", work / "B"], merges)))


def measure(name: str, model: Path, work: Path, texts: int, rounds: int) -> None:
    """Print the row `name`; `model` is a folder of one weight file."""
    shutil.copytree(model, work / "A")
    pair = [work / "A", regmean_inputs.make_sibling(work / "A", work / "B")]
    regmean_inputs.write_texts(work / "texts.jsonl", AutoTokenizer.from_pretrained(model), texts)
    for folder in pair:
        write_grams(folder, work / "texts.jsonl")
    models, grams = ["--models", *map(str, pair)], ["--grams", *map(str, pair)]
    pickles = ["--grams", *(str(folder / PUBLISHED_NAME) for folder in pair)]
    published = ["-m", "benchmarks.published_regmean", "merge", *models, *pickles, "--driver", "gels"]
    # The published way computes and saves in float32, for models of any dtype.
    own = ["merge_model.py", "--method", "regmean", *models, *grams, "--device", "cpu", "--dtype", "float32"]

    def run(words: list[str], out: str, option: str) -> side_by_side.Cost:
        shutil.rmtree(work / out, ignore_errors=True)
        return side_by_side.run([*words, "--alpha", str(ALPHA), option, str(work / out)])

    baseline, ours = side_by_side.in_turn(
        lambda: run(published, "baseline", "--out"), lambda: run(own, "ours", "--output_dir"), rounds
    )
    side_by_side.run(["-m", "benchmarks.merge", "--side", "compare", "--work", str(work)])
    above = json.loads((work / DIFFERENCE).read_text())
    side_by_side.report(
        name,
        baseline,
        ours,
        above["ours"],
        compared_with="objective at the float64 minimum, as a share of the mean's",
        baseline_difference=above["baseline"],
    )


def merge(args: argparse.Namespace, work: Path) -> None:
    measure("merge", locate_model(args.model), work, 16 if args.quick else 48, args.rounds)


def merge_layer(args: argparse.Namespace, work: Path) -> None:
    shape = (1024, 3584) if args.quick else (4096, 14336)
    model = regmean_inputs.make_layer(work / "layer", *shape, torch.bfloat16)
    measure("merge_layer", model, work, 16, args.rounds)


ROWS = {"merge": merge, "merge_layer": merge_layer}


def main() -> None:
    parser = regmean_inputs.parser(__doc__, ROWS)
    parser.add_argument("--host_only", action="store_true", help="one layer without solving, as in benchmarks.host")
    args = parser.parse_args()
    if args.host_only:
        host.measure("merge", None, args.rounds, args.quick)
        return
    if args.side:
        compare_side(args.work)
        return
    regmean_inputs.run_rows(args, ROWS)


if __name__ == "__main__":
    main()
