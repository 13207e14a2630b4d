"""Evaluation: answers to problems by generation or likelihood, their grades, and accuracies by language."""

import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import InputError, Stopped, is_out_of_memory
from common.io import read_json
from common.logging import progress, quiet_libraries, say
from common.ranks import Process, start_process
from common.runs import RunFolder, open_run
from common.signals import StopSignals
from mindmerger.batching import Tokens, plan_once
from mindmerger.checkpoint import (
    CONFIG,
    SAFETENSORS,
    mapping_file,
    switched_languages,
    warn_of_scale,
    write_verdicts,
)
from mindmerger.config import EvaluationFlags
from mindmerger.data import Example, read_evaluation
from mindmerger.evaluation.answerer import Answerer, AnswererParts, Output, pick_dtype, prepare_answerer
from mindmerger.evaluation.metrics import SCORES, score, table
from mindmerger.evaluation.paired import judge_answers, summary
from mindmerger.evaluation.report import (
    PREDICTIONS,
    append_predictions,
    compare_with_alone,
    drop_cut_lines,
    find_alone,
    read_predictions,
    write_report,
)
from mindmerger.evaluation.vllm_answerer import VllmAnswerer, check_vllm
from mindmerger.frozen_models import check_context
from mindmerger.tasks import EVALUATION_TASKS, Task, find_task, select_languages
from mindmerger.tokenization import ExampleTokenizer


@dataclass(frozen=True)
class ProblemSet:
    """Problems of one task, and settings of answers and grades.

    Attributes:
        task: task with the grader of answers.
        examples, tokens: examples and token ids of all problems, by index.
        by_likelihood: True if labels are scored instead of generated.
        max_gen_len: maximum tokens of a generated answer.
        slots: maximum number of problems at once.
        answer_parser: name of a parser of numbers in `PARSERS`.
    """

    task: Task
    examples: list[Example]
    tokens: list[Tokens]
    by_likelihood: bool
    max_gen_len: int
    slots: int
    answer_parser: str

    def longest_input(self, tokenizer: ExampleTokenizer) -> int:
        """Tokens of the longest possible input of the LLM, answer included, except its last token."""
        answer = self.max_gen_len
        if self.by_likelihood:
            words = {word for example in self.examples for word in example.labels}
            answer = max(len(tokenizer.label_ids(word)) for word in words)
        return max(map(len, self.tokens)) + answer - 1

    def record(self, output: Output) -> dict[str, Any]:
        """Grade an answer and build its record for `predictions/`."""
        example = self.examples[output.problem]
        parsed, right = self.task.grade(example, output.text, self.answer_parser)
        return {
            "language": example.language.name,
            "question": example.source.text,
            "output": output.text,
            "parsed": parsed,
            "gold": example.target,
            "right": right,
            "problem": output.problem,
            "cut": list(self.tokens[output.problem].cut),
            "stopped": output.stopped,
        }


def evaluate(flags: EvaluationFlags) -> None:
    """Evaluate on every task of `--task` and write `results/{save_name}/{task}/`, or `{save_name}-baseline`.

    Raises:
        InputError: flags, files or earlier results in that folder are invalid (raised before any model loads), a
            single problem is out of memory, or the disk is full.
        Stopped: a signal was received; the answers so far are saved.
    """
    process = start_process(flags.device)
    quiet_libraries()
    tasks = [find_task(name, EVALUATION_TASKS) for name in dict.fromkeys(flags.task.split(","))]
    examples = _read_problems(flags, tasks)
    checkpoint = None if flags.baseline else Path(flags.init_checkpoint)
    alone = frozenset() if checkpoint is None else switched_languages(checkpoint, flags.switch, process)
    parts = prepare_answerer(flags.models, checkpoint, flags.limits, flags.augmentation, alone, flags.prompt)
    if checkpoint is not None:
        warn_of_scale(parts.models, checkpoint, process)
    dtype = pick_dtype(flags.dtype, process.device)
    settings = {**parts.settings(), **_settings(flags, dtype)}
    root = Path("results") / (f"{flags.save_name}-baseline" if flags.baseline else flags.save_name)

    with contextlib.ExitStack() as stack:
        runs, left = {}, {}
        for task in tasks:
            rows = examples[task.name]
            own = settings | {"problems_sha256": _fingerprint(rows)} | _switched(rows, alone)
            if flags.switch == "decide":
                _check_decision(checkpoint, find_alone(root.parent, task.name, own), task.name, own)
            run = runs[task.name] = stack.enter_context(open_run(root / task.name, own, flags.overwrite, process))
            if not run.is_finished:
                tokens, by_likelihood = parts.tokenizer(rows, with_targets=False), flags.by_likelihood(task)
                left[task.name] = ProblemSet(
                    task, rows, tokens, by_likelihood, flags.max_gen_len, flags.eval_batch_size, flags.answer_parser
                )
        answerer = _load(parts, list(left.values()), flags.backend, dtype, process) if left else None
        for name, run in runs.items():
            if name in left:
                _evaluate_task(answerer, left[name], run, process)
            if process.is_main:
                _report(name, run)
        if flags.switch == "decide" and process.is_main:
            _decide(checkpoint, list(runs.values()), process)
    # Not after an error: other ranks may wait in a collective, and closing would wait for them.
    process.close()


def _check_decision(checkpoint: Path, alone: Path | None, task: str, settings: dict[str, Any]) -> None:
    """Raise InputError if the mapping cannot carry verdicts, or there is no evaluation of the LLM alone to compare."""
    mapping = mapping_file(checkpoint)
    if mapping.suffix != ".safetensors" or not (mapping.parent / CONFIG).is_file():
        raise InputError(
            f"--switch decide: {checkpoint} is no {SAFETENSORS} with a {CONFIG} beside it, where verdicts stand: name "
            "the folder of a training stage"
        )
    if alone is None:
        flags = "--baseline --prompt chat" if "chat_template" in settings else "--baseline"
        raise InputError(
            f"--switch decide: results/ has no finished evaluation of the LLM alone on these problems of {task}: run "
            f"it first, with {flags} and the same --llm_path, --max_gen_len, --classification and --answer_parser"
        )


def _read_problems(flags: EvaluationFlags, tasks: list[Task]) -> dict[str, list[Example]]:
    """Problems of each task, by its name."""
    languages, examples = select_languages(flags.languages), {}
    for task in tasks:
        rows = read_evaluation(Path(flags.data_dir), task, languages or task.languages, flags.test_num)
        examples[task.name] = list(itertools.chain.from_iterable(rows.values()))
    return examples


def _switched(rows: list[Example], alone: frozenset[str]) -> dict[str, list[str]]:
    """Setting of the languages of `rows` that the LLM answers alone; none without such languages."""
    switched = sorted({row.language.name for row in rows} & alone)
    return {"answered_alone": switched} if switched else {}


def _report(task: str, run: RunFolder) -> None:
    """Compare the scores of `task` with the LLM alone, and log them."""
    compare_with_alone(run.folder, run.settings)
    say(run.process, f"\n{task}: {run.folder}\n{table(read_json(run.folder / SCORES)).expandtabs(14)}")
    if switched := run.settings.get("answered_alone"):
        say(run.process, f"answered by the LLM alone, which the mapping harms (--switch off): {', '.join(switched)}")


def _decide(checkpoint: Path, runs: list[RunFolder], process: Process) -> None:
    """Write verdicts by language from the comparisons of all runs."""
    judged = judge_answers(read_json(run.folder / SCORES)["languages"] for run in runs)
    write_verdicts(mapping_file(checkpoint), judged)
    say(process, f"{checkpoint}: the mapping, against the LLM alone: {summary(judged)}")


def _load(parts: AnswererParts, sets: list[ProblemSet], backend: str, dtype: torch.dtype, process: Process) -> Answerer:
    """Load the answerer of `backend`, after a check that no problem is too long for its LLM."""
    if backend == "vllm":
        longest = max(len(row) for problems in sets for row in problems.tokens)
        max_model_len = check_vllm(parts.models, longest, sets[0].max_gen_len, process)
        answerer = parts.load(dtype, torch.device("cpu"), generates=False)
        return VllmAnswerer(answerer, parts.models, dtype, process.device, max_model_len)
    check_context(parts.models, max(problems.longest_input(parts.tokenizer) for problems in sets))
    return parts.load(dtype, process.device)


def _evaluate_task(answerer: Answerer, problems: ProblemSet, run: RunFolder, process: Process) -> None:
    """Answer the remaining problems of one task, and write its scores."""
    run.start()
    started, folder = time.monotonic(), run.folder
    answer_all(answerer, problems, folder, process)
    if process.is_main:
        records, count = read_predictions(folder), len(problems.examples)
        if len(records) < count:
            raise InputError(
                f"{folder} has {len(records)} of {count} answers: a shared file system may not show yet what another "
                "machine has written; the same command continues"
            )
        scores = score(problems.task.name, records)
        write_report(folder, scores)
        seconds = round(time.monotonic() - started, 1)
        run.finish({"average": scores["average"], "seconds": seconds, **process.peak_memory()})
    process.barrier()


def answer_all(answerer: Answerer, problems: ProblemSet, folder: Path, process: Process) -> None:
    """Answer and grade this rank's part of the problems that have no answer yet."""
    if process.is_main:
        drop_cut_lines(folder)
    process.barrier()
    done = {record["problem"] for record in read_predictions(folder)}
    # No rank writes answers before all ranks have read the existing ones.
    process.barrier()
    name, count = problems.task.name, len(problems.examples)
    if done:
        say(process, f"{name}: {len(done)} of {count} problems already have answers")
    left = [problem for problem in range(count) if problem not in done]
    lengths = [len(problems.tokens[problem]) for problem in left]
    batches = plan_once(lengths, batch_size=1, ranks=process.world_size)[process.rank]
    own = [left[row] for batch in batches for row in batch]

    answered = right = 0
    with StopSignals() as signals, progress(process, total=len(own), desc=name, unit="problem") as bar:
        for outputs in _answers(answerer, problems, own, process):
            records = [problems.record(output) for output in outputs]
            append_predictions(folder, records, process.rank)
            if records:
                answered, right = answered + len(records), right + sum(record["right"] for record in records)
                bar.set_postfix(accuracy=f"{100 * right / answered:.1f}")
                bar.update(len(records))
            if signals.received and answered < len(own):
                where = folder / PREDICTIONS
                raise Stopped(f"{signals.received}: the answers so far are in {where}; the same command continues")
    process.barrier()


def _answers(answerer: Answerer, problems: ProblemSet, own: list[int], process: Process) -> Iterator[list[Output]]:
    """Answer these problems, and yield answers as they end.

    When out of memory, active problems are answered again, with half as many at once.
    """
    left, slots = {problem: problems.tokens[problem] for problem in own}, problems.slots
    while left:
        try:
            if problems.by_likelihood:
                labels = {problem: problems.examples[problem].labels for problem in left}
                steps = answerer.choose(dict(left), labels, slots)
            else:
                steps = answerer.generate(dict(left), problems.max_gen_len, slots)
            for outputs in steps:
                for output in outputs:
                    del left[output.problem]
                yield outputs
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            tried = min(slots, len(left))
            if tried == 1:
                raise InputError(_too_large(problems, next(iter(left)))) from error
            slots = tried // 2
            say(process, f"out of memory with {tried} problems at once: continuing with {slots}")


def _too_large(problems: ProblemSet, problem: int) -> str:
    tokens = problems.tokens[problem]
    return (
        f"out of memory with a single problem, {problems.examples[problem].location}, of {len(tokens)} tokens: "
        f"use a --max_gen_len below {problems.max_gen_len}, a --max_seq_len below {len(tokens.source)}, a "
        f"--max_prompt_len below {len(tokens.prompt)}, or a --dtype of 16 bits"
    )


def _settings(flags: EvaluationFlags, dtype: torch.dtype) -> dict[str, Any]:
    """Settings of prompts and grades that identify results."""
    settings = {
        **asdict(flags.limits),
        "answer_parser": flags.answer_parser,
        "classification": flags.classification,
        "dtype": str(dtype).removeprefix("torch."),
    }
    # Not recorded for transformers, so that finished runs from before this flag still match.
    return settings if flags.backend == "transformers" else settings | {"backend": flags.backend}


def _fingerprint(examples: list[Example]) -> str:
    texts = json.dumps([[e.language.name, e.source.text, e.target] for e in examples], ensure_ascii=False)
    return hashlib.sha256(texts.encode()).hexdigest()
