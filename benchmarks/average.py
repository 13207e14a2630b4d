"""Plain average of two models: other programs against merge_model.py, as whole processes with imports.

With `--mergekit`, the path of an installed `mergekit-yaml` (`pip install mergekit==0.1.5`, in an environment of its
own), the baseline is mergekit's `linear`; without, both models are loaded by transformers, averaged and saved.

    python -m benchmarks.average --model HuggingFaceTB/SmolLM2-135M-Instruct --mergekit ENVIRONMENT/bin/mergekit-yaml
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import yaml

from benchmarks import regmean_inputs, side_by_side
from regmean.model_folder import locate_model, open_checkpoint

# Replaces this process by a program of another environment.
EXECUTE = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"


def plain_side(models: list[str], out: str) -> None:
    """Load, average, save."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first, second = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for model in models)
    theirs = second.state_dict()
    first.load_state_dict({name: (value + theirs[name]) / 2 for name, value in first.state_dict().items()})
    first.save_pretrained(out)
    AutoTokenizer.from_pretrained(models[0]).save_pretrained(out)


def largest_difference(a: Path, b: Path) -> float:
    """Largest difference of the tensors of two model folders, relative to each tensor's maximum; 0 if bits agree."""
    first, second = (open_checkpoint(str(folder)).tensors for folder in (a, b))
    if first.keys() != second.keys():
        raise SystemExit(f"{a} and {b} hold different tensors: {sorted(first.keys() ^ second.keys())}")
    largest = 0.0
    for name, info in first.items():
        ours, theirs = info.read_floats(), second[name].read_floats()
        if ours.tobytes() != theirs.tobytes():
            # 0 and -0 are equal numbers with different bits.
            largest = max(largest, float(abs(ours - theirs).max() / (abs(theirs).max() or 1.0)), 1e-45)
    return largest


def measure(args: argparse.Namespace, work: Path) -> None:
    model = locate_model(args.model)
    models = [str(model), str(regmean_inputs.make_sibling(model, work / "B"))]
    settings = work / "linear.yaml"
    entries = [{"model": name, "parameters": {"weight": 1.0}} for name in models]
    settings.write_text(yaml.safe_dump({"merge_method": "linear", "models": entries, "dtype": "float32"}))

    def baseline() -> side_by_side.Cost:
        shutil.rmtree(work / "baseline", ignore_errors=True)
        if args.mergekit:
            return side_by_side.run(["-c", EXECUTE, args.mergekit, str(settings), str(work / "baseline")])
        return side_by_side.run(
            ["-m", "benchmarks.average", "--side", ",".join(models), "--work", str(work / "baseline")]
        )

    def ours() -> side_by_side.Cost:
        shutil.rmtree(work / "ours", ignore_errors=True)
        words = ["merge_model.py", "--method", "avg", "--dtype", "float32", "--models", *models]
        return side_by_side.run([*words, "--output_dir", str(work / "ours")])

    costs = side_by_side.in_turn(baseline, ours, args.rounds)
    difference = largest_difference(work / "ours", work / "baseline")
    against = "mergekit's linear" if args.mergekit else "transformers: load, average, save"
    side_by_side.report("average", *costs, difference, against=against)


def main() -> None:
    parser = regmean_inputs.parser(__doc__, {})
    parser.add_argument("--mergekit", help="path of mergekit-yaml")
    args = parser.parse_args()
    if args.side:
        plain_side(args.side.split(","), str(args.work))
        return
    with tempfile.TemporaryDirectory() as work:
        measure(args, Path(work))


if __name__ == "__main__":
    main()
