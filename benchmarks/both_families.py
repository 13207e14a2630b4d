"""Both families at once in the small world: a mapping for one specialist, in front of its RegMean merge with another.

    python -m benchmarks.both_families --work_dir runs/both_families

A mapping is trained in front of the word problems' specialist, on word problems in six languages, without a prompt
after it: the mapped states are the question, and the boundary starts as the line break after a question. It is then
set in front of the merge with the programs' specialist, which no mapping was trained for, and compared there with an
aligned start that is fitted again to the merge. All models answer both tasks in every language, with and without a
mapping. Finished seeds are not repeated. The last line is one JSON object with accuracies from 0 to 1.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import mean

import torch

from benchmarks.quickstart_regmean import merge_seed, run
from common.cli import parse_flags
from common.io import read_json, write_json
from common.logging import quiet_libraries, say
from common.ranks import Process
from mindmerger.build import train
from mindmerger.checkpoint import write_mapping
from mindmerger.config import Limits, ModelPair, TrainingFlags
from mindmerger.data import Example
from mindmerger.evaluation.answerer import prepare_answerer
from mindmerger.frozen_models import load_llm
from mindmerger.init.aligned import AlignedStart, Texts
from mindmerger.modeling import mapping_config
from mindmerger.tasks import TRAINING_TASKS, Language, Prompt, Task
from mindmerger.tasks.answers import parse_answer
from mindmerger.tokenization import load_example_tokenizer
from quickstart.exercises import LARGEST_NUMBER
from quickstart.programs import programs
from quickstart.world import WORLD_LANGUAGES, Split, problems

MT = "quickstart/models/mt"
LIMITS = Limits(512, 512, 64)
ROWS, SENTENCES = 600, 300
# An exercise: (question by ISO code, solution, function that grades an answer).
Exercise = tuple[Callable[[str], str], str, Callable[[str], bool]]


def exercises(task: str, split: Split, seed: int) -> Iterator[Exercise]:
    """Endless stream of exercises of "problems" or "programs", the same ones in every language."""
    if task == "problems":
        for problem in problems(split, seed, LARGEST_NUMBER):
            gold = problem.answer
            yield problem.question, problem.solution, lambda text, gold=gold: parse_answer(text) == gold
    for program in programs(split, seed):
        questions = program.translations | {"en": program.question}
        yield questions.__getitem__, program.solution, program.is_right


def example(question: str, solution: str, language: Language, number: int) -> Example:
    """An example whose prompt is the one that the specialists were trained with."""
    source, prompt = Prompt("", question, ""), Prompt("", question, "\n")
    return Example(source, prompt, solution, language, location=f"{language.name}, line {number}")


def read_rows(_: Path, languages: tuple[Language, ...] | None) -> dict[Language, list[Example]]:
    """Training rows of word problems, others in each language."""
    return {
        language: [
            example(question(language.code), solution, language, line)
            for line, (question, solution, _) in enumerate(islice(exercises("problems", "train", 500 + n), ROWS), 1)
        ]
        for n, language in enumerate(languages or WORLD_LANGUAGES)
    }


def aligned(llm: Path, folder: Path, process: Process) -> Path:
    """Fit an aligned start for `llm` to English word problems, and return its folder."""
    models = ModelPair(str(llm), MT)
    tokenizer = load_example_tokenizer(models, LIMITS, False)
    config = mapping_config(models, tokenizer.llm_tokenizer.bos_token_id)
    config.augmentation = False
    english = [question("en") for question, *_ in islice(exercises("problems", "train", 500), SENTENCES)]
    start = AlignedStart(models, config, tokenizer, torch.float32, True, 50)
    fitted, _ = start.load_or_fit(lambda _: Texts(english, []), folder / "mean", process)
    table = load_llm(str(llm), None, torch.float32, False).get_input_embeddings().weight
    fitted["end_boundary"] = table[tokenizer.label_ids("\n")].view(1, 1, -1)
    write_mapping(folder, config.to_dict(), fitted)
    return folder


def trained(llm: Path, start: Path, name: str, seed: int) -> Path:
    """Train a mapping in front of `llm` on word problems by the quickstart's settings, and return its folder."""
    TRAINING_TASKS["small-problems"] = Task("small-problems", WORLD_LANGUAGES, read_rows)
    words = {"llm_path": llm, "task": "small-problems", "save_name": name, "init_checkpoint": start, "seed": seed}
    words |= {"train_num": ROWS, "epoch_num": 2, "data_dir": Path("outputs") / name, "device": "cpu"}
    words |= {"augmentation": False}
    given = [f"--{key}={value}" for key, value in words.items()]
    train(parse_flags(TrainingFlags, ["--config", "quickstart/augmentation.yaml", *given]))
    return Path("outputs") / name / "augmentation"


def accuracies(llm: Path, mapping: Path | None, split: Split, count: int) -> dict[str, dict[str, float]]:
    """Accuracy of `llm`, alone or behind a mapping, by task and language."""
    parts = prepare_answerer(ModelPair(str(llm), mapping and MT), mapping, LIMITS, None)
    answerer = parts.load(torch.float32, torch.device("cpu"))
    found: dict[str, dict[str, float]] = {}
    for task in ("problems", "programs"):
        asked = list(islice(exercises(task, split, 0), count))
        for language in WORLD_LANGUAGES:
            rows = parts.tokenizer([example(q(language.code), "", language, 0) for q, *_ in asked], with_targets=False)
            steps = answerer.generate(dict(enumerate(rows)), LIMITS.max_gen_len, 128)
            right = sum(asked[answer.problem][2](answer.text) for answers in steps for answer in answers)
            found.setdefault(task, {})[language.name] = right / count
    return found


def measure(seed: int, work: Path, split: Split, count: int) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracies of one seed by model, task and language; training, merging and results are kept in `work`."""
    result = work / f"{split}-{count}.json"
    if not result.exists():
        process = Process(0, 1, torch.device("cpu"))
        merge_seed(seed, work, ["regmean"])
        one, other, merged = work / "models/problems", work / "models/programs", work / "merges/regmean/alpha_0.9"
        start = aligned(one, work / "start", process)
        mapping = trained(one, start, f"both-{work.parent.name}-{seed}", seed)
        models = {
            "word problems' specialist": (one, None),
            "... aligned start": (one, start),
            "... mapping trained for it": (one, mapping),
            "programs' specialist": (other, None),
            "RegMean merge, alpha 0.9": (merged, None),
            "... mapping trained for the specialist": (merged, mapping),
            "... aligned start of the specialist": (merged, start),
            "... aligned start fitted to the merge": (merged, aligned(merged, work / "merge_start", process)),
        }
        figures = {}
        for name, (llm, path) in models.items():
            say(process, f"seed {seed}: {name}")
            figures[name] = accuracies(llm, path, split, count)
        write_json(result, figures)
    return read_json(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--test_num", type=int, default=100, help="exercises of each task and language")
    flags = parser.parse_args()
    quiet_libraries()
    run("-m", "quickstart.exercises", "quickstart/build/texts")
    by_seed = []
    for seed in flags.seeds:
        if len(flags.seeds) > 1:  # a process each, since DeepSpeed starts once
            words = ("--work_dir", flags.work_dir, "--seeds", str(seed), "--split", flags.split)
            run("-m", "benchmarks.both_families", *words, "--test_num", str(flags.test_num))
        by_seed.append(measure(seed, flags.work_dir / f"seed{seed}", flags.split, flags.test_num))

    languages = [language.name for language in WORLD_LANGUAGES]
    for task in ("problems", "programs"):
        print(f"\n| {task}, % | {' | '.join(languages)} |\n|{' --- |' * (len(languages) + 1)}")
        for name in by_seed[0]:
            cells = [mean(figures[name][task][language] for figures in by_seed) for language in languages]
            print(f"| {name} | {' | '.join(f'{100 * cell:.1f}' for cell in cells)} |")
    result = {"benchmark": "both_families", "split": flags.split, "test_num": flags.test_num}
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(json.dumps(result | {"seeds": dict(zip(flags.seeds, by_seed, strict=True)), "machine": machine}))


if __name__ == "__main__":
    main()
