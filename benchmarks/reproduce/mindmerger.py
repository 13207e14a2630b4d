"""MindMerger's published tables in miniature: real models and questions, with and without the mapping.

    python -m benchmarks.reproduce.mindmerger --llm_path LLM --mt_path MT --data_dir ./datas \\
        --work_dir runs/reproduce_mindmerger

The LLM is first fine-tuned on English problems with solutions, like MetaMath, in the prompt of the evaluation. Then the
mapping is trained in both stages from each start, aligned and scaled. Every problem is used in one language and for one
purpose only (the LLM's fine-tuning, the mapping stage or the augmentation stage), so that held-out problems are unseen.

Dev perplexity is shown with that of sources shuffled among the targets: if both are equal, the LLM has learned the form
of targets, and nothing of the source. As in all training here, the mapping with the best perplexity on these rows is
kept. Translations after the mapping stage are measured by the fraction of numbers that they contain, and by chrF.
Accuracies have 95% intervals, by Wilson for a language; gains over the LLM alone, over all languages except English, by
bootstrap over problems, which are the same in every language.

Finished steps are not repeated: an interrupted run is continued by the same command without `--overwrite`, and
`--seeds` may grow. Seeds are those of the stages; there is one LLM. Figures go to `results/reproduce/mindmerger.json`,
curves to `docs/reproduce_mindmerger.png`; the last line printed is the same as one JSON object.
"""

import functools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from shlex import quote
from typing import Any, Literal
from zlib import crc32

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.aligned_start import StartFlags, draw_curves, train
from benchmarks.launch import launch
from benchmarks.reproduce.bootstrap import ratio_interval
from benchmarks.reproduce.scoring import score_texts
from benchmarks.reproduce.steps import costs, fine_tune, step, training_order
from benchmarks.reproduce.tables import cost_table, markdown
from benchmarks.reproduce.texts import Text
from benchmarks.side_by_side import machine
from common.cli import flag, parse_flags
from common.errors import InputError, exit_with_message
from common.io import atomic_path, read_json, write_json, write_text
from common.logging import quiet_libraries
from common.ranks import start_process
from common.runs import open_run
from mindmerger.config import require_positive
from mindmerger.data import Example, hold_out, read_evaluation, read_training
from mindmerger.evaluation.metrics import SCORES
from mindmerger.evaluation.report import read_predictions
from mindmerger.frozen_models import load_llm
from mindmerger.tasks import EVALUATION_TASKS, LANGUAGES, TRAINING_TASKS, Language, math_prompt, select_languages
from mindmerger.tasks.answers import parse_answer
from regmean.model_folder import open_checkpoint

RESULTS = Path("results/reproduce/mindmerger.json")
PICTURE = Path("docs/reproduce_mindmerger.png")
RESULT = "result.json"
STAGES = ("mapping", "augmentation")
TASKS = ("mgsm", "msvamp")
TASK = TRAINING_TASKS["math"]
RANKS = 2
ENGLISH = LANGUAGES["English"]
# Each start needs its own learning rate in the mapping stage: docs/aligned_start.md.
STARTS = {
    "aligned": {"mapping": "--mapping_init aligned --lr 5e-5", "augmentation": "--lr 1e-4"},
    "scaled": {"mapping": "--mapping_init scaled --lr 5e-4", "augmentation": "--lr 5e-4"},
}
BOTH_STARTS = {"mapping": "--boundary_lr 5e-3 --warmup_ratio 0.025", "augmentation": ""}
BATCH_SIZES = {"mapping": 4, "augmentation": 8}
ROWS_BETWEEN_EVALUATIONS = 160
LLM_PROBLEMS = "llm_problems.json"
ALL_ROWS = 10**9
LLM_BATCH_SIZE = 8
QUESTION_TOKENS = 200  # of a source or a target of the mapping stage
MAX_TOKENS = 400  # of a source, prompt or target of the augmentation stage, and of an answer's prompt
ANSWER_TOKENS = 200


@dataclass
class MiniatureFlags:
    """Fine-tune an LLM on English problems, train mappings from two starts, and evaluate in several languages."""

    llm_path: str | None = flag(None, "hub id or local folder of the model that becomes the LLM")
    mt_path: str | None = flag(None, "hub id or local folder of the multilingual model")
    data_dir: str = flag("./datas", "folder in the published layout")
    work_dir: str = flag("runs/reproduce_mindmerger", "folder for the LLM and for the results of each step")
    languages: str = flag("de,es,fr,ru,sw", "comma-separated, without English")
    msvamp_languages: str | None = flag(None, "those of them for MSVAMP; default: all")
    encoder_layer: int | None = flag(None, "layer of a decoder-only multilingual model that feeds the mapping")
    seeds: int = flag(3, "runs from each start")
    llm_steps: int = flag(120, "steps of fine-tuning the LLM, 8 problems each")
    llm_lr: float = flag(1e-4, "highest learning rate of fine-tuning the LLM")
    mapping_num: int = flag(170, "pairs of each language, the held-out ones among them")
    augmentation_num: int = flag(90, "problems of each language and of English, the held-out ones among them")
    dev_size: int = flag(50, "rows held out in each stage")
    translations: int = flag(6, "held-out pairs of each language to translate")
    test_num: int = flag(50, "problems of each benchmark and language to answer")
    dtype: Literal["bfloat16", "float32"] = flag(
        "bfloat16", "of forward passes; float32 is faster without AVX-512 or AMX"
    )
    overwrite: bool = flag(False, "replace a run of other settings in --work_dir")

    def __post_init__(self) -> None:
        for name in ("llm_path", "mt_path"):
            if getattr(self, name) is None:
                raise InputError(f"--{name} is missing")
        for name in ("seeds", "llm_steps", "mapping_num", "augmentation_num", "dev_size", "translations", "test_num"):
            require_positive(self, name)
        if not Path(self.work_dir).name:
            raise InputError(f"--work_dir {self.work_dir} names no folder")
        languages = select_languages(self.languages)
        if ENGLISH in languages:
            raise InputError(f"--languages {self.languages}: English is there in any case, leave it out")
        if others := set(self.asked_in("msvamp")) - {*languages, ENGLISH}:
            raise InputError(f"--msvamp_languages {self.msvamp_languages}: {others.pop().name} is not in --languages")

    def asked_in(self, task: str) -> tuple[Language, ...]:
        """Languages of a benchmark, English last."""
        named = self.msvamp_languages if task == "msvamp" else None
        return (*select_languages(named or self.languages), ENGLISH)

    def settings(self) -> dict[str, Any]:
        """Settings that identify a run."""
        asked = [
            [task, problem.language.name, problem.source.text, problem.target]
            for task in TASKS
            for problems in read_problems(self, task).values()
            for problem in problems
        ]
        rows = [
            [row.language.name, row.source.text, row.target]
            for stage in STAGES
            for row in read_training(
                Path(self.data_dir), TASK, stage, (*select_languages(self.languages), ENGLISH), ALL_ROWS
            )
        ]
        own = {"llm_path", "mt_path", "data_dir", "work_dir", "seeds", "overwrite"}
        return {
            "llm": open_checkpoint(self.llm_path).fingerprint(),
            "mt": open_checkpoint(self.mt_path).fingerprint(),
            "data": sha256(json.dumps([asked, rows]).encode()).hexdigest(),
            "training": {"starts": STARTS, "both": BOTH_STARTS, "batch_sizes": BATCH_SIZES},
            **{name: value for name, value in vars(self).items() if name not in own},
        }


def read_problems(flags: MiniatureFlags, task: str) -> dict[Language, list[Example]]:
    """Read the problems of a benchmark, the same ones in every language.

    Raises:
        InputError: missing or malformed files, or problem n differs between languages.
    """
    found = read_evaluation(Path(flags.data_dir), EVALUATION_TASKS[task], flags.asked_in(task), flags.test_num)
    answers = {language: [parse_answer(row.target) for row in rows] for language, rows in found.items()}
    for language, own in answers.items():
        if own != answers[ENGLISH]:
            raise InputError(f"{found[language][0].location}: not the problems of the English file, in the same order")
    return found


def write_data(flags: MiniatureFlags, folder: Path) -> None:
    """Write the training data, with every problem in one file and one language; half of them are English.

    Pairs, and problems that the LLM is not fine-tuned on, have the published layout; `llm_problems.json` has the
    problems for fine-tuning, as `Text`s of question and solution in training order.

    Raises:
        InputError: missing or malformed data, file and line named, or too little of it.
    """
    languages, data = select_languages(flags.languages), Path(flags.data_dir)
    owners = [*languages, *[ENGLISH] * len(languages)]

    def words(text: str) -> str:
        # The two files differ in white space.
        return " ".join(text.split())

    def owner(question: str) -> Language:
        return owners[crc32(question.encode()) % len(owners)]

    problems = list(read_training(data, TASK, "augmentation", (*languages, ENGLISH), ALL_ROWS))
    questions = {row.target: words(row.source.text) for row in problems if row.language == ENGLISH}
    own = [row for row in problems if row.target in questions and owner(questions[row.target]) == row.language]

    known, paired = set(questions.values()), set()
    pairs = list(read_training(data, TASK, "mapping", languages, ALL_ROWS))
    for language in languages:
        kept = [row for row in pairs if row.language == language and owner(words(row.target)) == language]
        kept = [row for row in kept if words(row.target) in known][: flags.mapping_num]
        _require("--mapping_num", flags.mapping_num, kept, f"pairs of {language.name}")
        paired.update(words(row.target) for row in kept)
        pair = folder / "bilingual_pairs" / f"en-{language.code}"
        write_text(pair / f"train_100k.{language.code}", "".join(f"{row.source.text}\n" for row in kept))
        write_text(pair / "train_100k.en", "".join(f"{row.target}\n" for row in kept))

    english = [Text(row.source.text, row.target) for row in own if row.language == ENGLISH]
    _require("--llm_steps", flags.llm_steps * LLM_BATCH_SIZE, english, "English problems")
    llm_problems = training_order(english, flags.llm_steps, LLM_BATCH_SIZE, seed=0)
    write_json(folder / LLM_PROBLEMS, llm_problems)

    learned = {problem.learned for problem in llm_problems}
    left = [row for row in own if row.target not in learned and questions[row.target] not in paired]
    for language in (*languages, ENGLISH):
        rows = [row for row in left if row.language == language]
        _require("--augmentation_num", flags.augmentation_num, rows, f"problems of {language.name}")
    rows = [{"query": row.source.text, "response": row.target, "lang": row.language.name} for row in left]
    write_json(folder / "query_translation" / "math.json", rows)


def _require(flag_name: str, wanted: int, found: Sequence[object], what: str) -> None:
    if len(found) < wanted:
        raise InputError(f"{flag_name} needs {wanted:,} {what}, and there are {len(found):,}")


def write_llm(flags: MiniatureFlags, data: Path, folder: Path) -> None:
    """Fine-tune the LLM on its problems, in the prompt of the evaluation."""
    tokenizer = AutoTokenizer.from_pretrained(flags.llm_path)
    texts = [as_read(Text(*row), tokenizer) for row in read_json(data / LLM_PROBLEMS)]
    fine_tune(flags.llm_path, texts, LLM_BATCH_SIZE, flags.llm_lr, folder / "model", getattr(torch, flags.dtype))


def as_read(problem: Text, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Input of the LLM alone: bos, prompt, solution; the tokenizer may add the bos."""
    brings_bos = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    bos = "" if brings_bos else tokenizer.bos_token or ""
    return Text(bos + math_prompt(problem.read).text, problem.learned)


def stage_flags(flags: MiniatureFlags, stage: str) -> StartFlags:
    """Flags of a stage that both starts have in common."""
    of_mapping = stage == "mapping"
    work = Path(flags.work_dir)
    return StartFlags(
        llm_path=str(work / "llm" / "model"),
        mt_path=flags.mt_path,
        data_dir=str(work / "data"),
        languages=flags.languages if of_mapping else f"{flags.languages},{ENGLISH.code}",
        train_num=flags.mapping_num if of_mapping else flags.augmentation_num,
        dev_size=flags.dev_size,
        train_batch_size=BATCH_SIZES[stage],
        dtype=flags.dtype,
        eval_steps=ROWS_BETWEEN_EVALUATIONS // BATCH_SIZES[stage],
        max_len=QUESTION_TOKENS if of_mapping else MAX_TOKENS,
        eval_batch_size=12,
        ranks=RANKS,
        translations=flags.translations if of_mapping else 0,
    )


def held_out(flags: MiniatureFlags, stage: str, seed: int) -> dict[str, list[Example]]:
    """Rows that a stage holds out, by language.

    Raises:
        InputError: there are none of some language.
    """
    shared = stage_flags(flags, stage)
    languages = select_languages(shared.languages)
    rows = list(read_training(Path(shared.data_dir), TASK, stage, languages, shared.train_num))
    dev = [rows[row] for row in hold_out(len(rows), shared.dev_size, seed)[0]]
    found = {language.name: [row for row in dev if row.language == language] for language in languages}
    if missing := [name for name, own in found.items() if not own]:
        raise InputError(f"--dev_size {flags.dev_size} holds out no {stage} row of {missing[0]} with seed {seed}")
    return found


def train_stage(
    flags: MiniatureFlags, stage: str, start: str, seed: int, name: str, folder: Path, more: str = ""
) -> None:
    """Train one stage in outputs/`name`, with more flags of training; write the result of `train`."""
    shared = stage_flags(flags, stage)
    words = f"{STARTS[start][stage]} {BOTH_STARTS[stage]} --max_prompt_len {shared.max_len} {more}"
    if flags.encoder_layer is not None and stage == "mapping":
        words += f" --encoder_layer {flags.encoder_layer}"
    write_json(folder / RESULT, train(shared, stage, name, words, seed))


def read_alone(flags: MiniatureFlags, seed: int, folder: Path) -> None:
    """Write the LLM's perplexity, by language, on the augmentation stage's held-out rows, given the prompt.

    The LLM must be supported by `token_scores`.
    """
    llm_path = stage_flags(flags, "augmentation").llm_path
    llm = load_llm(llm_path, None, getattr(torch, flags.dtype), trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(llm_path)
    found: dict[str, float] = {}
    for language, rows in held_out(flags, "augmentation", seed).items():
        # Targets of the stage also end with eos.
        problems = [Text(row.source.text, row.target + tokenizer.eos_token) for row in rows]
        scores = score_texts(llm, tokenizer, [as_read(problem, tokenizer) for problem in problems])
        found[language] = math.exp(sum(scores["loss"]) / sum(scores["tokens"]))
    write_json(folder / RESULT, found)


def ask(flags: MiniatureFlags, name: str, words: str, folder: Path) -> None:
    """Evaluate on both benchmarks; write the scores, and for each language the right answers as booleans."""
    found = {}
    for task in TASKS:
        languages = ",".join(language.code for language in flags.asked_in(task))
        launch(
            "run_evaluation.py",
            f"--task {task} --save_name {name} --llm_path {quote(stage_flags(flags, 'augmentation').llm_path)} "
            f"--data_dir {quote(flags.data_dir)} --languages {languages} --test_num {flags.test_num} "
            f"--max_seq_len {MAX_TOKENS} --max_prompt_len {MAX_TOKENS} --max_gen_len {ANSWER_TOKENS} "
            f"--dtype {flags.dtype} {words}",
        )
        results = Path("results") / (f"{name}-baseline" if "--baseline" in words else name) / task
        scores, right = read_json(results / SCORES), {}
        for record in read_predictions(results):
            right.setdefault(record["language"], []).append(record["right"])
        found[task] = scores | {"right": right}
    write_json(folder / RESULT, found)


def gain(alone: dict[str, list[bool]], merged: list[dict[str, list[bool]]]) -> dict[str, float]:
    """Mean accuracy of mappings minus that of the LLM alone, over all languages except English.

    Args:
        alone: right answers by language, as booleans; problem n is the same in every language.
        merged: the same for each mapping.

    Returns:
        `value`, from -1 to 1, and `low` and `high`, the 95% interval over problems.
    """
    languages = [language for language in alone if language != ENGLISH.name]

    def share(right: dict[str, list[bool]]) -> np.ndarray:
        return np.mean([right[language] for language in languages], axis=0)

    gained = np.mean([share(right) for right in merged], axis=0) - share(alone)
    low, high = ratio_interval(gained, np.ones_like(gained))
    return {"value": float(gained.mean()), "low": low, "high": high}


@contextmanager
def open_miniature(flags: MiniatureFlags) -> Iterator[tuple[Path, str]]:
    """Lock `--work_dir` until the block ends, write data and LLM there, and yield it and the name of the run's outputs.

    Raises:
        InputError: a `--work_dir` of other settings, or too little data.
    """
    work, settings = Path(flags.work_dir), flags.settings()
    with open_run(work, settings, flags.overwrite, start_process("cpu")) as run:
        run.start()
        step(work / "data", functools.partial(write_data, flags))
        for seed in range(flags.seeds):
            for stage in STAGES:
                held_out(flags, stage, seed)
        step(work / "llm", functools.partial(write_llm, flags, work / "data"))
        # Outputs are outside of work_dir and identify the LLM by its path: other settings get other names.
        yield work, f"{work.name}-{crc32(json.dumps(settings, sort_keys=True).encode()):08x}"


def reproduce(flags: MiniatureFlags) -> dict[str, Any]:
    """Run all unfinished steps.

    Returns:
        The content of `results/reproduce/mindmerger.json`: `settings`; for the LLM `alone` its scores by benchmark,
        `asked`, and for each seed its `perplexity` by language on the augmentation stage's held-out rows; `starts`: for
        each start and seed `mapping` and `augmentation`, the results of `train`, and the scores by benchmark, `asked`;
        `gains` of each start by benchmark; and for each of the `steps` its `seconds` and its `cpu_seconds`.

    Raises:
        InputError: no such model or data, too little data, a `--work_dir` of other settings, or a script failed.
    """
    quiet_libraries()
    with open_miniature(flags) as (work, run_name):
        step(work / "asked", functools.partial(ask, flags, run_name, "--baseline"))
        alone = read_json(work / "asked" / RESULT)

        starts: dict[str, list[dict[str, Any]]] = {start: [] for start in STARTS}
        perplexities = []
        for seed in range(flags.seeds):
            step(work / f"alone_{seed}", functools.partial(read_alone, flags, seed))
            perplexities.append(read_json(work / f"alone_{seed}" / RESULT))
            for start, of_seeds in starts.items():
                name, found = f"{run_name}-{start}-{seed}", {}
                words = f"--mt_path {quote(flags.mt_path)} --init_checkpoint outputs/{name}/augmentation"
                steps = {stage: functools.partial(train_stage, flags, stage, start, seed, name) for stage in STAGES}
                steps["asked"] = functools.partial(ask, flags, name, words)
                for kind, work_of_step in steps.items():
                    done = work / f"{start}_{seed}_{kind}"
                    step(done, work_of_step)
                    found[kind] = read_json(done / RESULT)
                of_seeds.append(found)

    result = {
        "benchmark": "reproduce_mindmerger",
        "settings": flags.settings() | {"seeds": flags.seeds},
        "alone": {"asked": alone, "perplexity": perplexities},
        "starts": starts,
        "gains": {
            start: {
                task: gain(alone[task]["right"], [run["asked"][task]["right"] for run in of_seeds]) for task in TASKS
            }
            for start, of_seeds in starts.items()
        },
        "steps": costs(work),
        "machine": machine(),
    }
    write_json(RESULTS, result)
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown tables of both stages and both benchmarks."""

    def share(entry: dict[str, float], key: str, sign: str = "") -> str:
        value, low, high = (100 * entry[name] for name in (key, "low", "high"))
        return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"

    parts = []
    for stage in STAGES:
        measured = [
            (f"{start} start, {point}, seed {seed}", run[stage][key])
            for start, of_seeds in result["starts"].items()
            for seed, run in enumerate(of_seeds)
            for key, point in (("start", "no pair seen"), ("end", "trained"))
            if key in run[stage]
        ]
        languages = list(measured[0][1]["languages"])
        head = [f"{stage} stage: dev perplexity (sources shuffled)", *languages]
        lines = []
        for name, found in measured:
            of_languages = [found["languages"][language] for language in languages]
            line = [name, *(f"{one['perplexity']:.2f} ({one['shuffled']:.2f})" for one in of_languages)]
            if stage == "mapping":
                line += [f"{100 * found['mean']['numbers_kept']:.0f}%", f"{found['mean']['chrf']:.0f}"]
            lines.append(line)
        if stage == "augmentation":
            for seed, alone in enumerate(result["alone"]["perplexity"]):
                lines.append([f"the LLM alone, seed {seed}", *(f"{alone[language]:.2f}" for language in languages)])
        parts.append(markdown([*head, "numbers kept", "chrF"] if stage == "mapping" else head, lines))

    for task in TASKS:
        asked = {"the LLM alone": result["alone"]["asked"][task]}
        for start, of_seeds in result["starts"].items():
            asked |= {f"{start} start, seed {seed}": run["asked"][task] for seed, run in enumerate(of_seeds)}
        languages = list(result["alone"]["asked"][task]["languages"])
        lines = [
            [name, *(share(scores["languages"][language], "accuracy") for language in languages)]
            for name, scores in asked.items()
        ]
        parts.append(markdown([f"{task}, % right (95% interval)", *languages], lines))
    lines = [[start, *(share(gains[task], "value", "+") for task in TASKS)] for start, gains in result["gains"].items()]
    parts.append(markdown(["gain over the LLM alone, points, without English", *TASKS], lines))
    return "\n\n".join(parts)


def draw(result: dict[str, Any]) -> None:
    """Draw the curves of both stages."""
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    for axes, stage in zip(figure.subplots(1, 2), STAGES, strict=True):
        draw_curves(axes, {start: [run[stage] for run in of_seeds] for start, of_seeds in result["starts"].items()})
        axes.set_title(f"{stage} stage")
    # Same as in the first panel, where it covers no curves.
    axes.get_legend().remove()
    with atomic_path(PICTURE) as partial:
        figure.savefig(partial, format="png", dpi=130)


def main() -> None:
    result = reproduce(parse_flags(MiniatureFlags))
    draw(result)
    print(f"\n{cost_table(result['steps'])}")
    print(f"\n{table(result)}\n\n{RESULTS}, {PICTURE}")
    print(json.dumps(result))


if __name__ == "__main__":
    exit_with_message(main)
