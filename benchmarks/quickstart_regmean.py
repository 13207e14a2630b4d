"""The quickstart's RegMean half for three seeds: specialists fine-tuned again from the shipped base, merged, compared.

    python -m benchmarks.quickstart_regmean --work_dir runs/quickstart_regmean

All steps use the quickstart's scripts and settings; results of an earlier run are kept. `--split dev` is for tuning:
the test exercises are for the README's figures. The last line is one JSON object: accuracies from 0 to 1, means over
both tasks, and means over the seeds.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from common.io import read_json
from quickstart.exercises import TASKS

BASE = Path("quickstart/models/regmean/base")


def run(*words: str | Path) -> None:
    """Run Python with these arguments in a process of its own."""
    subprocess.run([sys.executable, *map(str, words)], check=True)


def merge(seed: int, work: Path) -> None:
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
    if not (merges / "regmean").exists():
        pair += ["--grams", *(grams / task for task in TASKS)]
        run(
            "merge_model.py",
            "--config",
            "quickstart/merge_regmean.yaml",
            *pair,
            "--output_dir",
            merges / "regmean/alpha",
        )


def compared(seed: int, work: Path, split: str, test_num: int) -> dict[str, Any]:
    """Results of `quickstart.compare_merges` for one seed's models."""
    merge(seed, work)
    name = f"{work.parent.name}-{work.name}-{split}"
    run("-m", "quickstart.compare_merges", "--models", work / "models", "--merges", work / "merges",
        "--save_name", name, "--split", split, "--test_num", str(test_num))  # fmt: skip
    return read_json(Path("results") / name / "scores.json")


def means(scores: dict[str, Any]) -> dict[str, float]:
    """Mean accuracy over both tasks of each merge, and of the specialists, each on its own task."""
    figures = {"base": mean(scores["base"].values())}
    figures["specialists"] = mean(scores["specialists"][task][task] for task in TASKS)
    figures["average"] = mean(scores["average"].values())
    figures |= {f"regmean {alpha}": mean(tasks.values()) for alpha, tasks in scores["regmean"].items()}
    return {name: round(figure, 4) for name, figure in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--test_num", type=int, default=500, help="exercises of each task")
    flags = parser.parse_args()
    run("-m", "quickstart.exercises", "quickstart/build/texts")
    by_seed = [means(compared(s, flags.work_dir / f"seed{s}", flags.split, flags.test_num)) for s in flags.seeds]

    print(f"\n{'mean of both tasks, %':<24}" + "".join(f"{f'seed {seed}':>8}" for seed in flags.seeds) + f"{'mean':>8}")
    overall = {name: round(mean(figures[name] for figures in by_seed), 4) for name in by_seed[0]}
    for name, value in overall.items():
        print(f"{name:<24}" + "".join(f"{100 * figures[name]:>8.1f}" for figures in by_seed) + f"{100 * value:>8.1f}")
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    result = {"benchmark": "quickstart_regmean", "split": flags.split, "test_num": flags.test_num}
    print(json.dumps(result | {"seeds": dict(zip(flags.seeds, by_seed, strict=True)), "mean": overall,
                               "machine": machine}))  # fmt: skip


if __name__ == "__main__":
    main()
