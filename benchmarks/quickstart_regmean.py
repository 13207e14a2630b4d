"""The quickstart's RegMean half for three seeds: specialists fine-tuned again from the shipped base, merged, compared.

    python -m benchmarks.quickstart_regmean --work_dir runs/quickstart_regmean

All steps use the quickstart's scripts and settings; results of an earlier run are kept. The dev exercises choose each
method's alpha, by the mean of the seeds; `--split dev` leaves the test exercises out. The last line is one JSON object:
accuracies from 0 to 1, means over both tasks, and means over the seeds.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from common.io import read_json, write_text
from quickstart.compare_merges import METHODS
from quickstart.exercises import TASKS

BASE = Path("quickstart/models/regmean/base")
ALPHAS = {"regmean": [0.1, 0.5, 0.9, 0.99, 1.0]}
OTHER_ALPHAS = [0.9, 0.99]


def run(*words: str | Path) -> None:
    """Run Python with these arguments in a process of its own."""
    subprocess.run([sys.executable, *map(str, words)], check=True)


def merge_seed(seed: int, work: Path, methods: Iterable[str] = METHODS) -> None:
    """Fine-tune one seed's specialists into `work/models`, and merge them into `work/merges`."""
    models, merges, grams = work / "models", work / "merges", work / "grams"
    if not (models / "base").exists():
        shutil.copytree(BASE, models / "base")
    if not all((models / task).exists() for task in TASKS):
        run("-m", "quickstart.specialists", models, "--seed", str(seed))
    specialists = [models / task for task in TASKS]
    for task, model in zip(TASKS, specialists, strict=True):
        config = f"quickstart/gram_{task}.yaml"
        if not (grams / task / "gram.safetensors").exists():
            run("compute_gram.py", "--config", config, "--model", model, "--output_dir", grams / task)
    pair = ["--models", *specialists]
    if not (merges / "avg").exists():
        run("merge_model.py", "--config", "quickstart/merge_avg.yaml", *pair, "--output_dir", merges / "avg")
    for name in methods:
        method, embeddings = name.removesuffix("_counts"), "counts" if name.endswith("_counts") else "average"
        inputs = ["--grams", *(grams / task for task in TASKS)]
        if method != "regmean":
            inputs = ["--calibration", *(write_calibration(task, work) for task in TASKS)]
        missing = [a for a in ALPHAS.get(name, OTHER_ALPHAS) if not (merges / name / f"alpha_{a:g}").exists()]
        if missing:
            output = merges / name / (f"alpha_{missing[0]:g}" if len(missing) == 1 else "alpha")
            run("merge_model.py", "--config", f"quickstart/merge_{method}.yaml", *pair, *inputs,
                "--embeddings", embeddings, "--alpha", *missing, "--output_dir", output)  # fmt: skip


def write_calibration(task: str, work: Path) -> Path:
    """Write the settings of a task's Grams without the model, which is another one here; return the file."""
    lines = Path(f"quickstart/gram_{task}.yaml").read_text(encoding="utf-8").splitlines(keepends=True)
    path = work / f"{task}.yaml"
    write_text(path, "".join(line for line in lines if not line.startswith("model:")))
    return path


def compared(work: Path, split: str, test_num: int) -> dict[str, Any]:
    """Results of `quickstart.compare_merges` for one seed's models."""
    name = f"{work.parent.name}-{work.name}-{split}"
    run("-m", "quickstart.compare_merges", "--models", work / "models", "--merges", work / "merges",
        "--save_name", name, "--split", split, "--test_num", str(test_num))  # fmt: skip
    return read_json(Path("results") / name / "scores.json")


def means(scores: dict[str, Any]) -> dict[str, float]:
    """Mean accuracy over both tasks of each merge, and of the specialists, each on its own task."""
    figures = {"base": mean(scores["base"].values())}
    figures["specialists"] = mean(scores["specialists"][task][task] for task in TASKS)
    figures["average"] = mean(scores["average"].values())
    for method in METHODS:
        figures |= {f"{method} {alpha}": mean(tasks.values()) for alpha, tasks in scores.get(method, {}).items()}
    return {name: round(figure, 4) for name, figure in figures.items()}


def table(title: str, by_seed: dict[int, dict[str, float]]) -> dict[str, float]:
    """Print the figures of one split; return their means over the seeds."""
    print(f"\n{title:<32}" + "".join(f"{f'seed {seed}':>8}" for seed in by_seed) + f"{'mean':>8}")
    names = next(iter(by_seed.values()))
    overall = {name: round(mean(figures[name] for figures in by_seed.values()), 4) for name in names}
    for name, value in overall.items():
        cells = [*(figures[name] for figures in by_seed.values()), value]
        print(f"{name:<32}" + "".join(f"{100 * cell:>8.1f}" for cell in cells))
    return overall


def best(dev: dict[str, float]) -> dict[str, str]:
    """Names of each method's best merge on the dev exercises; the smaller alpha of equals."""
    of_method = {method: [name for name in dev if name.rpartition(" ")[0] == method] for method in METHODS}
    return {method: max(names, key=dev.__getitem__) for method, names in of_method.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--test_num", type=int, default=500, help="exercises of each task")
    flags = parser.parse_args()
    run("-m", "quickstart.exercises", "quickstart/build/texts")
    for seed in flags.seeds:
        merge_seed(seed, flags.work_dir / f"seed{seed}")
    result: dict[str, Any] = {"benchmark": "quickstart_regmean", "test_num": flags.test_num}
    for split in dict.fromkeys(("dev", flags.split)):
        by_seed = {s: means(compared(flags.work_dir / f"seed{s}", split, flags.test_num)) for s in flags.seeds}
        result[split] = {"seeds": by_seed, "mean": table(f"mean of both tasks, %, {split}", by_seed)}
    result["best_on_dev"] = best(result["dev"]["mean"])
    print(f"\nbest on dev: {', '.join(result['best_on_dev'].values())}")
    print(json.dumps(result | {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}))


if __name__ == "__main__":
    main()
