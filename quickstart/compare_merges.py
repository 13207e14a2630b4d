"""Evaluation of two specialists and their merges: `python -m quickstart.compare_merges`.

Base, specialists and merges answer the exercises of both tasks, greedily; `results/{save_name}/` gets `scores.json` and
every answer in `predictions/`.
"""

import hashlib
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from common.cli import flag, parse_flags
from common.errors import InputError, exit_with_message
from common.io import read_json, sha256, write_json, write_text
from common.logging import progress, quiet_libraries, say
from common.ranks import Process, start_process
from common.runs import open_run
from mindmerger.batching import Tokens, lay_out, plan_once
from mindmerger.evaluation.decoding import greedy
from mindmerger.evaluation.metrics import SCORES, wilson_interval
from mindmerger.frozen_models import load_llm
from mindmerger.modeling import InputEmbeds
from quickstart.exercises import TASKS, Exercise

BATCH_SIZE = 128
MAX_NEW_TOKENS = 64  # twice the longest solution
# Folders of merges with an alpha, and their names in tables.
METHODS = {
    "regmean": "RegMean",
    "regmean_counts": "RegMean, counts",
    "regmean++": "RegMean++",
    "regmean++_counts": "RegMean++, counts",
    "regmean_asym": "asymmetric",
    "regmean_asym_counts": "asymmetric, counts",
}


@dataclass
class CompareFlags:
    """Evaluate two specialists, their base and their merges on the exercises of both tasks."""

    models: str = flag("quickstart/models/regmean", "folder of base, problems and programs")
    merges: str = flag("quickstart/build/merges", "folder of avg and METHOD/alpha_ALPHA, as merge_model.py wrote them")
    save_name: str = flag("quickstart-regmean", "results go to results/{save_name}")
    split: str = flag("test", "test, or dev for tuning")
    test_num: int = flag(250, "exercises of each task")
    overwrite: bool = flag(False, "replace earlier results of other models")

    def __post_init__(self) -> None:
        if self.split not in ("dev", "test"):
            raise InputError("--split is dev or test")
        if self.test_num < 1:
            raise InputError("--test_num must be at least 1")


def compare(flags: CompareFlags) -> dict[str, Any]:
    """Evaluate all models, or return the results of an earlier run on the same models.

    Returns:
        The content of `scores.json`; see `summary`.

    Raises:
        InputError: a model is missing, or the results are those of other models and `--overwrite` is off.
    """
    process = start_process()
    quiet_libraries()
    folders = model_folders(Path(flags.models), Path(flags.merges))
    exercises = {task: list(islice(stream(flags.split, 0), flags.test_num)) for task, stream in TASKS.items()}
    results = Path("results") / flags.save_name
    texts = [exercise.prompt + exercise.gold for asked in exercises.values() for exercise in asked]
    settings = {
        "models": {name: sha256(folder / "model.safetensors") for name, folder in folders.items()},
        "exercises": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    with open_run(results, settings, flags.overwrite, process) as run:
        if not run.is_finished:
            run.start()
            scores = summary(evaluate(folders, exercises, results, process), flags.test_num)
            write_json(results / SCORES, scores)
            run.finish({name: scores[name] for name in METHODS if name in scores} | process.peak_memory())
    scores = read_json(results / SCORES)
    say(process, f"\n{results}\n{table(scores)}")
    return scores


def model_folders(models: Path, merges: Path) -> dict[str, Path]:
    """Folders of all models by name: base, the specialists by task, avg, then METHOD_ALPHA by method and alpha.

    Raises:
        InputError: one of them, or every RegMean merge, is missing.
    """
    folders = {name: models / name for name in ("base", *TASKS)} | {"avg": merges / "avg"}
    for method in METHODS:
        # An unfinished merge has a name that does not end in a number.
        by_alpha = {path.name.removeprefix("alpha_"): path for path in (merges / method).glob("alpha_*[0-9]")}
        folders |= {f"{method}_{alpha}": by_alpha[alpha] for alpha in sorted(by_alpha, key=float)}
    for folder in folders.values():
        if not (folder / "model.safetensors").exists():
            raise InputError(f"{folder}: no model here")
    if "regmean" not in {name.rpartition("_")[0] for name in folders}:
        raise InputError(f"{merges / 'regmean'}: no models alpha_ALPHA here")
    return folders


def evaluate(
    folders: dict[str, Path], exercises: dict[str, list[Exercise]], results: Path, process: Process
) -> dict[str, dict[str, int]]:
    """Count right answers by model and task; write all answers to `predictions/{model}.jsonl`."""
    right: dict[str, dict[str, int]] = {}
    bar = progress(process, total=len(folders) * sum(map(len, exercises.values())), desc="answers", unit="exercise")
    for name, folder in folders.items():
        model = load_llm(str(folder), None, torch.float32, trust_remote_code=False).to(process.device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        records = []
        for task, asked in exercises.items():
            for exercise, output in zip(asked, answers(model, tokenizer, asked, bar), strict=True):
                record = {"task": task, "question": exercise.question, "output": output, "gold": exercise.gold}
                records.append(record | {"right": exercise.is_right(output)})
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_text(results / "predictions" / f"{name}.jsonl", lines)
        right[name] = {task: sum(r["right"] for r in records if r["task"] == task) for task in exercises}
    bar.close()
    return right


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, exercises: list[Exercise], bar: Any
) -> list[str]:
    """The model's greedy answer to each exercise; `bar` counts them."""
    ids = [tokenizer(exercise.prompt).input_ids for exercise in exercises]
    outputs = [""] * len(ids)
    for rows in plan_once([len(row) for row in ids], BATCH_SIZE, ranks=1)[0]:
        batch = lay_out([Tokens([], ids[row], [], mapped=False) for row in rows], None).to(model.device)
        with torch.inference_mode():
            sequence = InputEmbeds(model.get_input_embeddings()(batch.token_ids), batch.mask)
        for row, new in zip(rows, greedy(model, sequence, MAX_NEW_TOKENS, {tokenizer.eos_token_id}), strict=True):
            outputs[row] = tokenizer.decode(new, skip_special_tokens=True)
        bar.update(len(rows))
    return outputs


def summary(right: dict[str, dict[str, int]], count: int) -> dict[str, Any]:
    """Accuracies from 0 to 1.

    Args:
        right: number of right answers by model and task.
        count: number of exercises of each task.

    Returns:
        `base`: by task; `specialists`: by name and task; `average`: by task; each of METHODS that has merges: by alpha
        and task; `counts`: by name and task, `right`, `count`, and `low` and `high`, the 95% Wilson interval.
    """
    accuracies = {name: {task: n / count for task, n in tasks.items()} for name, tasks in right.items()}
    counts: dict[str, dict[str, Any]] = {}
    for name, tasks in right.items():
        counts[name] = {}
        for task, n in tasks.items():
            low, high = wilson_interval(n, count)
            counts[name][task] = {"right": n, "count": count, "low": low, "high": high}
    merges: dict[str, dict[str, dict[str, float]]] = {}
    for name, tasks in accuracies.items():
        method, _, alpha = name.rpartition("_")
        if method in METHODS:
            merges.setdefault(method, {})[alpha] = tasks
    return {
        "base": accuracies["base"],
        "specialists": {name: accuracies[name] for name in TASKS},
        "average": accuracies["avg"],
        **merges,
        "counts": counts,
    }


def table(scores: dict[str, Any]) -> str:
    """The scores as aligned lines, accuracies in percent with their intervals."""
    lines = ["\t".join(("", *TASKS, "mean"))]
    for name, tasks in scores["counts"].items():
        shares = [entry["right"] / entry["count"] for entry in tasks.values()]
        cells = [
            f"{100 * share:.1f} ({100 * entry['low']:.0f}-{100 * entry['high']:.0f})"
            for share, entry in zip(shares, tasks.values(), strict=True)
        ]
        lines.append("\t".join((name, *cells, f"{100 * sum(shares) / len(shares):.1f}")))
    return "\n".join(lines).expandtabs(16)


def main() -> None:
    compare(parse_flags(CompareFlags))


if __name__ == "__main__":
    exit_with_message(main)
