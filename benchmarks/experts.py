"""RegMean of mixtures of experts, in the small world: average, RegMean with averaged experts, RegMean with solved ones.

    python -m benchmarks.experts --work_dir runs/experts

The quickstart's base becomes a Mixtral of four experts, two for each token: copies of its feed-forward layer, with a
random router that is trained with all other weights. Two specialists are fine-tuned from it for each seed. Costs are
those of a dense model with as many active parameters beside it: seconds, and the largest resident memory, of whole
processes. Results of an earlier run are kept. The last line is one JSON object.
"""

import argparse
import copy
import json
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from benchmarks import side_by_side
from benchmarks.quickstart_regmean import BASE, run
from common.io import read_json
from common.logging import quiet_libraries
from quickstart.exercises import TASKS
from quickstart.fit import causal_batches, fit, save, small_llama
from quickstart.specialists import BATCH_SIZE, LR, PHASES, STEPS, base_lessons, task_lessons
from regmean.gram_file import GramFile, write_grams

EXPERTS, ACTIVE = 4, 2
ALPHAS = [0.9, 0.99]


def upcycled(dense: LlamaForCausalLM) -> MixtralForCausalLM:
    """A mixture whose experts are copies of the dense model's feed-forward layers; its router is random."""
    settings = dense.config.to_dict() | {"num_local_experts": EXPERTS, "num_experts_per_tok": ACTIVE}
    for name in ("architectures", "model_type", "dtype"):
        settings.pop(name, None)
    model = MixtralForCausalLM(MixtralConfig(**settings, sliding_window=None))
    model.load_state_dict(dense.state_dict(), strict=False)
    with torch.no_grad():
        for layer, of_dense in zip(model.model.layers, dense.model.layers, strict=True):
            up = torch.cat([of_dense.mlp.gate_proj.weight, of_dense.mlp.up_proj.weight])
            layer.mlp.experts.gate_up_proj.copy_(up.expand(EXPERTS, -1, -1))
            layer.mlp.experts.down_proj.copy_(of_dense.mlp.down_proj.weight.expand(EXPERTS, -1, -1))
    return model


def train(model: PreTrainedModel, lessons: Any, tokenizer: Any, lr: float, name: str) -> PreTrainedModel:
    """Train a mixture with the loss that spreads tokens over its experts."""
    model.config.output_router_logits = True
    fit(model, causal_batches(lessons, tokenizer, BATCH_SIZE), lr, STEPS, name)
    model.config.output_router_logits = False
    return model


def train_models(work: Path, seeds: list[int]) -> None:
    """Write `base` and each seed's `base`, `problems` and `programs`."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    torch.manual_seed(0)
    if not (work / "base").exists():
        model = upcycled(LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float32))
        seed, _, lr, *shares = PHASES[-1]
        save(train(model, base_lessons(*shares, seed + 1), tokenizer, lr, "base"), tokenizer, work / "base")
    base = MixtralForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
    for seed in seeds:
        models = work / f"seed{seed}" / "models"
        for task in TASKS:
            if not (models / task).exists():
                model = train(copy.deepcopy(base), task_lessons(task, 100 + seed), tokenizer, LR, f"{task} {seed}")
                save(model, tokenizer, models / task)
        if not (models / "base").exists():
            shutil.copytree(work / "base", models / "base")


def without_experts(source: Path, target: Path) -> None:
    """Copy a Gram file without the Grams of experts."""
    file = GramFile(source / "gram.safetensors")
    target.mkdir(parents=True, exist_ok=True)
    rest = [gram for gram in file.grams.values() if not gram.pool]
    write_grams(target / "gram.safetensors", rest, file.read, file.provenance, file.counts.values())


def merge_seed(work: Path) -> None:
    """Grams and merges of one seed's specialists; `averaged` and `solved` have RegMean's with such experts."""
    models = [work / "models" / task for task in TASKS]
    for task, model in zip(TASKS, models, strict=True):
        solved, averaged = (work / "grams" / kind / task for kind in ("solved", "averaged"))
        if not solved.exists():
            config = ("--config", f"quickstart/gram_{task}.yaml")
            run("compute_gram.py", *config, "--model", model, "--output_dir", solved)
        without_experts(solved, averaged)
    for kind in ("averaged", "solved"):
        merges = work / kind
        if not (merges / "avg").exists():
            config = ("--config", "quickstart/merge_avg.yaml")
            run("merge_model.py", *config, "--models", *models, "--output_dir", merges / "avg")
        if not (merges / "regmean").exists():
            grams = [work / "grams" / kind / task for task in TASKS]
            run("merge_model.py", "--config", "quickstart/merge_regmean.yaml", "--models", *models, "--grams", *grams,
                "--alpha", *ALPHAS, "--output_dir", merges / "regmean" / "alpha")  # fmt: skip


def accuracies(work: Path, test_num: int) -> dict[str, float]:
    """Mean accuracy over both tasks of one seed's merges, and of the specialists, each on its own task."""
    figures: dict[str, float] = {}
    for kind in ("averaged", "solved"):
        name = f"experts-{work.name}-{kind}"
        run("-m", "quickstart.compare_merges", "--models", work / "models", "--merges", work / kind,
            "--save_name", name, "--test_num", test_num)  # fmt: skip
        scores = read_json(Path("results") / name / "scores.json")
        figures["specialists"] = mean(scores["specialists"][task][task] for task in TASKS)
        figures["average"] = mean(scores["average"].values())
        for alpha, tasks in scores["regmean"].items():
            figures[f"experts {kind}, alpha {alpha}"] = mean(tasks.values())
    return figures


def cost(*words: str | Path) -> dict[str, float]:
    """Seconds and largest resident MB of a Python process."""
    found = side_by_side.run([*map(str, words)])
    return {"seconds": round(found.seconds, 2), "mb": round(found.peak_bytes / 1e6)}


def costs(work: Path, mixtures: list[Path]) -> dict[str, dict[str, dict[str, float]]]:
    """Cost of Grams and merge for the mixtures, and for two dense models with as many active parameters."""
    tokenizer, found = AutoTokenizer.from_pretrained(BASE), {}
    dense = [work / "dense" / name for name in "AB"]
    for seed, folder in enumerate(dense):
        torch.manual_seed(seed)
        save(small_llama(tokenizer, 96, ACTIVE * 256, 3, 256), tokenizer, folder)
    found["imports"] = {"grams": cost("-c", "import regmean.compute"), "merge": cost("-c", "import regmean.regmean")}
    for kind, models in (("dense", dense), ("mixture", mixtures)):
        shutil.rmtree(work / "cost", ignore_errors=True)
        grams = [work / "cost" / task for task in TASKS]
        of_grams = [
            cost(
                "compute_gram.py", "--config", f"quickstart/gram_{task}.yaml", "--model", model, "--output_dir", output
            )
            for task, model, output in zip(TASKS, models, grams, strict=True)
        ]
        merging = ("--models", *models, "--grams", *grams, "--alpha", "0.9", "--output_dir", work / "cost" / "merge")
        merge = cost("merge_model.py", "--config", "quickstart/merge_regmean.yaml", *merging)
        size = sum((output / "gram.safetensors").stat().st_size for output in grams) / 2e6
        found[kind] = {"grams": of_grams[0], "merge": merge, "file_mb": round(size, 2)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--test_num", type=int, default=250, help="exercises of each task")
    flags = parser.parse_args()
    quiet_libraries()
    run("-m", "quickstart.exercises", "quickstart/build/texts")
    train_models(flags.work_dir, flags.seeds)
    by_seed = {}
    for seed in flags.seeds:
        merge_seed(flags.work_dir / f"seed{seed}")
        by_seed[seed] = accuracies(flags.work_dir / f"seed{seed}", flags.test_num)
    names = next(iter(by_seed.values()))
    means = {name: round(mean(figures[name] for figures in by_seed.values()), 4) for name in names}
    for name, value in means.items():
        print(f"{name:<32}" + "".join(f"{100 * of[name]:>8.1f}" for of in by_seed.values()) + f"{100 * value:>8.1f}")
    of_first = [flags.work_dir / f"seed{flags.seeds[0]}" / "models" / task for task in TASKS]
    result = {"benchmark": "experts", "seeds": by_seed, "mean": means, "costs": costs(flags.work_dir, of_first)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
