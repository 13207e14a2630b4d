"""MindMerger's published tables in miniature: real models, real questions, with the mapping and without.

    python -m benchmarks.reproduce.mindmerger --llm_path LLM --mt_path MT --data_dir DATAS \\
        --work_dir runs/reproduce_mindmerger

LLM is first fine-tuned on English problems with their solutions, in the prompt that it is asked in later, as MetaMath
is; then the mapping goes through both stages from each start, aligned and scaled. Every problem is in one language
alone, an English half for the LLM, the others divided: nothing that is held out was met before in another language.

Dev perplexity stands beside that of sources shuffled among the targets: where both are the same the LLM has learned
what targets look like, and nothing of the source. Translations after the mapping stage: the share of numbers that are
in them, and chrF. Accuracies have 95% intervals, Wilson's for a language; gains over the LLM alone, over all languages
but English, those of the bootstrap over problems, which are the same ones in every language.

What is done stays done: an interrupted run is continued by the same command, and `--seeds` may grow. The seed is that
of the stages; the LLM is one. Figures go to `results/reproduce/mindmerger.json`, curves to
`docs/reproduce_mindmerger.png`; the last line printed is the same as one JSON object.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.aligned_start import StartFlags, control, curve, draw_curves, train
from benchmarks.launch import launch
from benchmarks.reproduce.bootstrap import ratio_interval
from benchmarks.reproduce.scoring import score_texts
from benchmarks.reproduce.steps import costs, fine_tune, step, training_order
from benchmarks.reproduce.texts import Text
from benchmarks.side_by_side import machine
from common import runs
from common.distributed import start_process
from common.errors import InputError, exit_with_message
from common.files import atomic_path, read_json, sha256, write_json, write_text
from common.flags import flag, parse_flags
from common.locks import locked
from common.logging import quiet_libraries
from mindmerger.base_models import load_llm
from mindmerger.data import Example, hold_out, read_training
from mindmerger.evaluation import read_answers
from mindmerger.report import SCORES
from mindmerger.tasks import LANGUAGES, TRAINING_TASKS, Language, select_languages
from regmean.checkpoint import open_checkpoint

RESULTS = Path("results/reproduce/mindmerger.json")
PICTURE = Path("docs/reproduce_mindmerger.png")
RESULT = "result.json"
STAGES = ("mapping", "augmentation")
TASKS = ("mgsm", "msvamp")
ENGLISH = LANGUAGES["English"]
# Each start wants its own learning rate (docs/aligned_start.md): flags of the mapping stage, of the augmentation stage.
STARTS = {
    "aligned": ("--mapping_init aligned --lr 1e-4", "--lr 1e-4"),
    "scaled": ("--mapping_init scaled --lr 5e-4", "--lr 5e-4"),
}
LLM_BATCH_SIZE = 8
QUESTION_TOKENS = 200  # of a source or a target of the mapping stage
MAX_TOKENS = 400  # of a source, prompt or target of the augmentation stage, and of an answer's prompt
ANSWER_TOKENS = 200


@dataclass
class MiniatureFlags:
    """Fine-tune an LLM on English problems, train mappings to it from two starts, and ask in several languages."""

    llm_path: str | None = flag(None, "hub id or local folder of the model that becomes the LLM")
    mt_path: str | None = flag(None, "hub id or local folder of the multilingual model")
    data_dir: str = flag("./datas", "folder in the published layout")
    work_dir: str = flag("runs/reproduce_mindmerger", "folder for the LLM and for what each step has found")
    languages: str = flag("de,es,fr,ru,sw", "comma-separated, without English")
    msvamp_languages: str | None = flag(None, "those of them that MSVAMP is asked in; default: all")
    encoder_layer: int | None = flag(None, "layer of a decoder-only multilingual model that the mapping reads")
    seeds: int = flag(3, "runs from each start")
    llm_steps: int = flag(120, "of fine-tuning the LLM, 8 problems each")
    llm_lr: float = flag(1e-4, "highest learning rate of fine-tuning the LLM")
    mapping_num: int = flag(170, "pairs of each language, the held-out ones among them")
    augmentation_num: int = flag(90, "problems of each language and of English, the held-out ones among them")
    dev_size: int = flag(50, "rows held out in each stage")
    train_batch_size: int = flag(16, "rows of a step")
    translations: int = flag(6, "held-out pairs of each language to translate")
    test_num: int = flag(50, "problems of each benchmark and language to answer")
    overwrite: bool = flag(False, "start anew where --work_dir holds a run of other settings")

    def __post_init__(self) -> None:
        for name in ("llm_path", "mt_path"):
            if getattr(self, name) is None:
                raise InputError(f"--{name} is missing")
        if ENGLISH in select_languages(self.languages):
            raise InputError(f"--languages {self.languages}: English is there in any case, leave it out")

    def settings(self) -> dict[str, Any]:
        """All that makes two runs the same."""
        data = Path(self.data_dir)
        files = [data / "query_translation" / "math.json", *sorted((data / "bilingual_pairs").rglob("train_100k.*"))]
        own = {"llm_path", "mt_path", "data_dir", "work_dir", "seeds", "overwrite"}
        return {
            "llm": open_checkpoint(self.llm_path).fingerprint(),
            "mt": open_checkpoint(self.mt_path).fingerprint(),
            "data": {str(file.relative_to(data)): sha256(file) for file in files},
            **{name: value for name, value in vars(self).items() if name not in own},
        }


def write_data(flags: MiniatureFlags, folder: Path) -> None:
    """Write the training data in its own layout, every problem in one language alone, half of them in English.

    Raises:
        InputError: missing or malformed data, file and line named.
    """
    languages, task, data = select_languages(flags.languages), TRAINING_TASKS["math"], Path(flags.data_dir)
    owners = [*languages, *[ENGLISH] * len(languages)]

    def words(text: str) -> str:
        # The two files put blanks differently.
        return " ".join(text.split())

    def owner(question: str) -> Language:
        return owners[crc32(question.encode()) % len(owners)]

    problems = read_training(data, task, "augmentation", (*languages, ENGLISH), train_num=10**9)
    questions = {row.target: words(row.source.text) for row in problems if row.language == ENGLISH}
    own = [row for row in problems if row.target in questions and owner(questions[row.target]) == row.language]
    rows = [{"query": row.source.text, "response": row.target, "lang": row.language.name} for row in own]
    write_json(folder / "query_translation" / "math.json", rows)

    known = set(questions.values())
    pairs = read_training(data, task, "mapping", languages, train_num=10**9)
    for language in languages:
        english = [(row, words(row.target)) for row in pairs if row.language == language]
        kept = [row for row, question in english if question in known and owner(question) == language]
        pair = folder / "bilingual_pairs" / f"en-{language.code}"
        write_text(pair / f"train_100k.{language.code}", "".join(f"{row.source.text}\n" for row in kept))
        write_text(pair / "train_100k.en", "".join(f"{row.target}\n" for row in kept))


def write_llm(flags: MiniatureFlags, data: Path, folder: Path) -> None:
    """Fine-tune the LLM on English problems, in the prompt that it is asked in.

    Raises:
        InputError: there are fewer than the steps want.
    """
    tokenizer = AutoTokenizer.from_pretrained(flags.llm_path)
    problems = read_training(data, TRAINING_TASKS["math"], "augmentation", (ENGLISH,), train_num=10**9)
    texts = [as_text(row, tokenizer) for row in problems]
    wanted = flags.llm_steps * LLM_BATCH_SIZE
    if wanted > len(texts):
        raise InputError(
            f"--llm_steps {flags.llm_steps} want {wanted:,} English problems, and there are {len(texts):,}"
        )
    drawn = training_order(texts, flags.llm_steps, LLM_BATCH_SIZE, seed=0)
    fine_tune(flags.llm_path, drawn, LLM_BATCH_SIZE, flags.llm_lr, folder / "model")


def stage_flags(flags: MiniatureFlags, stage: str) -> StartFlags:
    """What both starts share in a stage."""
    of_mapping = stage == "mapping"
    work = Path(flags.work_dir)
    return StartFlags(
        llm_path=str(work / "llm" / "model"),
        mt_path=flags.mt_path,
        data_dir=str(work / "data"),
        languages=flags.languages if of_mapping else f"{flags.languages},{ENGLISH.code}",
        train_num=flags.mapping_num if of_mapping else flags.augmentation_num,
        dev_size=flags.dev_size,
        train_batch_size=flags.train_batch_size,
        dtype="bfloat16",
        eval_steps=10,
        max_len=QUESTION_TOKENS if of_mapping else MAX_TOKENS,
        eval_batch_size=12,
        translations=flags.translations if of_mapping else 0,
    )


def train_stage(flags: MiniatureFlags, stage: str, start: str, seed: int, name: str, folder: Path) -> None:
    """Train one stage; writes its curve, and what its best mapping makes of the held-out rows.

    Before the first pair an aligned start is a mapping like any other, and measured like one.
    """
    shared, words = stage_flags(flags, stage), dict(zip(STAGES, STARTS[start], strict=True))[stage]
    words += f" --stage_name {stage} --max_prompt_len {shared.max_len}"
    if flags.encoder_layer is not None and stage == "mapping":
        words += f" --encoder_layer {flags.encoder_layer}"
    if flags.overwrite:
        words += " --overwrite"
    trained = train(shared, name, words, seed)
    found = {"curve": curve(trained / stage, flags.train_batch_size), "end": control(shared, trained / stage, seed)}
    if stage == "mapping" and (trained / "aligned_start").exists():
        found["start"] = control(shared, trained / "aligned_start", seed)
    write_json(folder / RESULT, found)


def read_alone(flags: MiniatureFlags, seed: int, folder: Path) -> None:
    """Write the perplexity, by language, of the augmentation stage's held-out rows to the LLM that reads the prompt."""
    shared = stage_flags(flags, "augmentation")
    examples = read_training(
        Path(shared.data_dir),
        TRAINING_TASKS["math"],
        "augmentation",
        select_languages(shared.languages),
        shared.train_num,
    )
    dev, _ = hold_out(examples, shared.dev_size, seed)
    llm = load_llm(shared.llm_path, None, torch.float32, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(shared.llm_path)
    found: dict[str, float] = {}
    for language in sorted({row.language.name for row in dev}):
        texts = [as_text(row, tokenizer) for row in dev if row.language.name == language]
        # An eos closes every target of the stage, too.
        scores = score_texts(llm, tokenizer, [Text(text.read, text.learned + tokenizer.eos_token) for text in texts])
        found[language] = math.exp(sum(scores["loss"]) / sum(scores["tokens"]))
    write_json(folder / RESULT, found)


def as_text(row: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    """A problem as the LLM reads it alone: bos, prompt, solution."""
    return Text((tokenizer.bos_token or "") + row.prompt.text, row.target)


def ask(flags: MiniatureFlags, name: str, words: str, folder: Path) -> None:
    """Answer both benchmarks; writes their scores, and of each language in turn which problems were answered right."""
    found = {}
    for task, languages in (("mgsm", flags.languages), ("msvamp", flags.msvamp_languages or flags.languages)):
        launch(
            "run_evaluation.py",
            f"--task {task} --save_name {name} --llm_path {stage_flags(flags, 'augmentation').llm_path} "
            f"--data_dir {flags.data_dir} --languages {languages},{ENGLISH.code} --test_num {flags.test_num} "
            f"--max_seq_len {MAX_TOKENS} --max_prompt_len {MAX_TOKENS} --max_gen_len {ANSWER_TOKENS} --dtype bfloat16 "
            + words
            + " --overwrite" * flags.overwrite,
        )
        results = Path("results") / (f"{name}-baseline" if "--baseline" in words else name) / task
        scores, right = read_json(results / SCORES), {}
        for record in sorted(read_answers(results), key=lambda record: record["problem"]):
            right.setdefault(record["language"], []).append(record["right"])
        found[task] = scores | {"right": right}
    write_json(folder / RESULT, found)


def gain(alone: dict[str, list[bool]], merged: list[dict[str, list[bool]]]) -> dict[str, float]:
    """Mean accuracy of mappings less that of the LLM alone, over all languages but English.

    Args:
        alone: by language, which problems were answered right; problem n is the same in every language.
        merged: the same of each mapping.

    Returns:
        `value`, from -1 to 1, and `low` and `high`, the 95% interval over problems.
    """
    languages = [language for language in alone if language != ENGLISH.name]

    def share(right: dict[str, list[bool]]) -> np.ndarray:
        return np.mean([right[language] for language in languages], axis=0)

    gained = np.mean([share(right) for right in merged], axis=0) - share(alone)
    low, high = ratio_interval(gained, np.ones_like(gained))
    return {"value": float(gained.mean()), "low": low, "high": high}


def reproduce(flags: MiniatureFlags) -> dict[str, Any]:
    """Do whatever is not done yet.

    Returns:
        What `results/reproduce/mindmerger.json` holds: `settings`; of the LLM `alone` its scores by benchmark, `asked`,
        and for each seed its `perplexity` by language on the augmentation stage's held-out rows; `starts`: of each
        start and seed `mapping` and `augmentation` (`curve`, and `end` and `start` as `mapping_control.measure` returns
        them, with the mean over languages) and the scores by benchmark, `asked`;
        `gains` of each start by benchmark; and of each of the `steps` its `seconds` and its `cpu_seconds`.

    Raises:
        InputError: no such model or data, or a `--work_dir` of other settings.
        subprocess.CalledProcessError: a script has failed.
    """
    quiet_libraries()
    work, settings = Path(flags.work_dir), flags.settings()
    with locked(work):
        runs.is_finished(work, settings, flags.overwrite)
        runs.start(work, settings, flags.overwrite, start_process("cpu"))
        step(work / "data", functools.partial(write_data, flags))
        step(work / "llm", functools.partial(write_llm, flags, work / "data"))
        step(work / "asked", functools.partial(ask, flags, work.name, "--baseline"))
        alone = read_json(work / "asked" / RESULT)

        starts: dict[str, list[dict[str, Any]]] = {start: [] for start in STARTS}
        perplexities = []
        for seed in range(flags.seeds):
            home = work / f"seed{seed}"
            step(home / "alone", functools.partial(read_alone, flags, seed))
            perplexities.append(read_json(home / "alone" / RESULT))
            for start, of_seeds in starts.items():
                name, found = f"{work.name}-{start}-{seed}", {}
                for stage in STAGES:
                    step(home / start / stage, functools.partial(train_stage, flags, stage, start, seed, name))
                    found[stage] = read_json(home / start / stage / RESULT)
                words = f"--mt_path {flags.mt_path} --init_checkpoint outputs/{name}/augmentation"
                step(home / start / "asked", functools.partial(ask, flags, name, words))
                of_seeds.append(found | {"asked": read_json(home / start / "asked" / RESULT)})

    result = {
        "benchmark": "reproduce_mindmerger",
        "settings": settings | {"seeds": flags.seeds},
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
    """Both stages and both benchmarks as Markdown."""

    def rows(head: list[str], lines: list[list[str]]) -> str:
        return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))

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
        told = stage == "mapping" and "chrf" in measured[0][1]["mean"]
        lines = []
        for name, found in measured:
            of_languages = [found["languages"][language] for language in languages]
            line = [name, *(f"{one['perplexity']:.2f} ({one['shuffled']:.2f})" for one in of_languages)]
            if told:
                line += [f"{100 * found['mean']['numbers_kept']:.0f}%", f"{found['mean']['chrf']:.0f}"]
            lines.append(line)
        if stage == "augmentation":
            for seed, alone in enumerate(result["alone"]["perplexity"]):
                lines.append([f"the LLM alone, seed {seed}", *(f"{alone[language]:.2f}" for language in languages)])
        parts.append(rows([*head, "numbers kept", "chrF"] if told else head, lines))

    for task in TASKS:
        asked = {"the LLM alone": result["alone"]["asked"][task]}
        for start, of_seeds in result["starts"].items():
            asked |= {f"{start} start, seed {seed}": run["asked"][task] for seed, run in enumerate(of_seeds)}
        languages = list(result["alone"]["asked"][task]["languages"])
        lines = [
            [name, *(share(scores["languages"][language], "accuracy") for language in languages)]
            for name, scores in asked.items()
        ]
        parts.append(rows([f"{task}, % right (95% interval)", *languages], lines))
    lines = [[start, *(share(gains[task], "value", "+") for task in TASKS)] for start, gains in result["gains"].items()]
    parts.append(rows(["gain over the LLM alone, points, without English", *TASKS], lines))
    return "\n\n".join(parts)


def draw(result: dict[str, Any]) -> None:
    """The curves of both stages."""
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    for axes, stage in zip(figure.subplots(1, 2), STAGES, strict=True):
        draw_curves(axes, {start: [run[stage] for run in of_seeds] for start, of_seeds in result["starts"].items()})
        axes.set_title(f"{stage} stage")
    with atomic_path(PICTURE) as partial:
        figure.savefig(partial, format="png", dpi=130)


def main() -> None:
    result = reproduce(parse_flags(MiniatureFlags))
    draw(result)
    print("\nseconds  of CPU  step")
    for name, cost in result["steps"].items():
        print(f"{cost['seconds']:>7.1f}{cost['cpu_seconds']:>8.1f}  {name}")
    print(f"\n{table(result)}\n\n{RESULTS}, {PICTURE}")
    print(json.dumps(result))


if __name__ == "__main__":
    exit_with_message(main)
