"""Ask, generate or score, judge: accuracies per language of an LLM with a mapping, or alone."""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from common import runs
from common.errors import InputError
from common.io import read_json, sha256, writing
from common.locks import locked
from common.logging import progress, quiet_libraries, say
from common.ranks import Process, is_out_of_memory, start_process
from common.signals import Stopped, StopSignals
from mindmerger.batching import Tokens, plan_once
from mindmerger.checkpoint import mapping_file
from mindmerger.config import EvaluationFlags
from mindmerger.data import Example, read_evaluation
from mindmerger.evaluation.answerer import Subject, load_subject, pick_dtype, prepare
from mindmerger.evaluation.answers import PARSERS, is_same_number, parse_answer
from mindmerger.evaluation.metrics import SCORES, score, table
from mindmerger.evaluation.report import write_report
from mindmerger.evaluation.vllm_answerer import VllmSubject, check_vllm
from mindmerger.frozen_models import check_context
from mindmerger.tasks import EVALUATION_TASKS, Task, find_task, select_languages
from mindmerger.tokenization import ExampleTokenizer

ANSWERS = "answers"


def evaluate(flags: EvaluationFlags) -> None:
    """Evaluate on every task of `--task`; results in `results/{save_name}/{task}/`, or `{save_name}-baseline`.

    Raises:
        InputError: before any model loads, whatever is wrong with flags, files, or earlier results in that folder;
            later, too little memory for a single problem, or a full disk.
        Stopped: by a signal; what was answered is on disk.
    """
    process = start_process(flags.device)
    quiet_libraries()
    with contextlib.ExitStack() as locks:
        _evaluate(flags, process, locks)
    # Not after an error: peers that wait in a collective would keep this process, and its message, waiting too.
    process.close()


def _evaluate(flags: EvaluationFlags, process: Process, locks: contextlib.ExitStack) -> None:
    tasks = [find_task(name, EVALUATION_TASKS) for name in flags.task.split(",")]
    languages = select_languages(flags.languages)
    problems = {
        task.name: [
            example
            for rows in read_evaluation(
                Path(flags.data_dir), task, languages or task.languages, flags.test_num
            ).values()
            for example in rows
        ]
        for task in tasks
    }
    tokenizer, config = prepare(flags)
    dtype = pick_dtype(flags.dtype, process.device)

    root = Path("results") / (f"{flags.save_name}-baseline" if flags.baseline else flags.save_name)
    if process.is_main:
        for name in problems:
            locks.enter_context(locked(root / name))
    settings = {task.name: _settings(flags, problems[task.name], dtype) for task in tasks}
    finished = {task.name: runs.is_finished(root / task.name, settings[task.name], flags.overwrite) for task in tasks}
    tokens = {
        name: tokenizer(examples, with_targets=False) for name, examples in problems.items() if not finished[name]
    }
    rows = [row for those in tokens.values() for row in those]
    if flags.backend == "vllm":
        max_model_len = check_vllm(flags, process, rows)
    else:
        # Nothing is read after an answer's last token.
        longest = [
            max(map(len, tokens[task.name])) + _longest_answer(flags, task, problems[task.name], tokenizer) - 1
            for task in tasks
            if task.name in tokens
        ]
        check_context(flags.models, max(longest, default=0))
    subject = None
    for task in tasks:
        folder = root / task.name
        if not finished[task.name]:
            if subject is None and flags.backend == "vllm":
                subject = load_subject(flags, tokenizer, config, dtype, torch.device("cpu"))
                subject = VllmSubject(subject, flags, dtype, process.device, max_model_len)
            elif subject is None:
                subject = load_subject(flags, tokenizer, config, dtype, process.device)
            runs.start(folder, settings[task.name], flags.overwrite, process)
            started = time.monotonic()
            answer_all(subject, task, problems[task.name], tokens[task.name], flags, folder, process)
            if process.is_main:
                records = sorted(read_answers(folder), key=lambda record: record["problem"])
                asked = len(problems[task.name])
                if len(records) < asked:
                    raise InputError(
                        f"{folder} shows {len(records)} of {asked} answers: a shared file system may be behind with "
                        "what another machine has written; the same command goes on from what is there"
                    )
                scores = score(task.name, records)
                write_report(folder, scores, records)
                seconds = round(time.monotonic() - started, 1)
                result = {"average": scores["average"], "seconds": seconds, **process.peak_memory()}
                runs.finish(folder, settings[task.name], result)
            process.barrier()
        say(process, f"\n{task.name}: {folder}\n{table(read_json(folder / SCORES)).expandtabs(14)}")


def answer_all(
    subject: Subject,
    task: Task,
    examples: list[Example],
    tokens: list[Tokens],
    flags: EvaluationFlags,
    folder: Path,
    process: Process,
) -> None:
    """Answer and judge the problems that no earlier run has; this rank's share goes to its file of JSON lines."""
    done = {record["problem"] for record in read_answers(folder)}
    # Every rank has read what is done before any rank adds to it.
    process.barrier()
    left = [number for number in range(len(examples)) if number not in done]
    if done:
        say(process, f"{task.name}: {len(done)} of {len(examples)} problems were answered before")
    lengths = [len(tokens[number]) for number in left]
    share = plan_once(lengths, batch_size=1, ranks=process.world_size)[process.rank]
    left = [left[row] for rows in share for row in rows]

    bar = progress(process, total=len(left), desc=task.name, unit="problem")
    path = folder / ANSWERS / f"rank_{process.rank}.jsonl"
    right, count = 0, 0
    (folder / ANSWERS).mkdir(exist_ok=True)
    with writing(path), path.open("a", encoding="utf-8") as file, StopSignals() as signals:
        # The line that an earlier run was writing when it was killed has no end.
        file.write("\n" if file.tell() else "")
        for answers in _ask(subject, task, examples, tokens, left, flags, process):
            for number, output, stopped in answers:
                record = judge(examples[number], output, flags.answer_parser)
                record |= {"problem": number, "cut": list(tokens[number].cut), "stopped": stopped}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                right, count = right + record["right"], count + 1
            if answers:
                file.flush()
                bar.set_postfix(accuracy=f"{100 * right / count:.1f}")
                bar.update(len(answers))
            if signals.received and count < len(left):
                raise Stopped(f"{signals.received}: the answers so far are in {path}; the same command continues")
    bar.close()
    process.barrier()


def _ask(
    subject: Subject,
    task: Task,
    examples: list[Example],
    tokens: list[Tokens],
    left: list[int],
    flags: EvaluationFlags,
    process: Process,
) -> Iterator[list[tuple[int, str, bool]]]:
    """Answers to the problems of these numbers, as they come: (number, output, whether it ended by itself).

    Where memory is too little, what was begun is asked again, half as many problems at once.
    """
    by_likelihood = flags.by_likelihood(task)
    slots = flags.eval_batch_size
    while left:
        rows = [tokens[number] for number in left]
        answered: set[int] = set()
        try:
            if by_likelihood:
                steps = _choose(subject, [examples[number] for number in left], rows, slots)
            else:
                steps = subject.generate(rows, flags.max_gen_len, slots)
            for answers in steps:
                answered.update(place for place, *_ in answers)
                yield [(left[place], output, stopped) for place, output, stopped in answers]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            tried = min(slots, len(left) - len(answered))
            if tried == 1:
                first = next(number for place, number in enumerate(left) if place not in answered)
                raise InputError(_too_large(flags, examples[first], tokens[first])) from error
            slots = tried // 2
            say(process, f"out of memory with {tried} problems at once: going on with {slots}")
        left = [number for place, number in enumerate(left) if place not in answered]


def _longest_answer(flags: EvaluationFlags, task: Task, examples: list[Example], tokenizer: ExampleTokenizer) -> int:
    """Tokens that an answer may have."""
    if flags.by_likelihood(task):
        return max(len(tokenizer.label_ids(word)) for word in {word for example in examples for word in example.labels})
    return flags.max_gen_len


def _too_large(flags: EvaluationFlags, problem: Example, read: Tokens) -> str:
    return (
        f"out of memory with the one problem of {problem.place}, {len(read)} tokens long: take a --max_gen_len below "
        f"{flags.max_gen_len}, a --max_seq_len below {len(read.source)} or a --max_prompt_len below "
        f"{len(read.prompt)}, or a narrower --dtype"
    )


def judge(example: Example, output: str, answer_parser: str) -> dict[str, Any]:
    """One answer, read and compared with the gold one."""
    if example.labels:
        parsed = output.strip() if output.strip() in example.labels else None
        right = parsed == example.target
    else:
        number = PARSERS[answer_parser](output)
        right = is_same_number(number, parse_answer(example.target))
        parsed = None if number is None else float(number)
    return {
        "language": example.language.name,
        "question": example.source.text,
        "output": output,
        "parsed": parsed,
        "gold": example.target,
        "right": right,
    }


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """The answers that all ranks have written so far; lines cut short by a kill are passed over."""
    records: dict[int, dict[str, Any]] = {}
    for path in sorted((folder / ANSWERS).glob("rank_*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                record = json.loads(line)
                records[record["problem"]] = record
            except (json.JSONDecodeError, TypeError, KeyError):
                continue
    return list(records.values())


def _choose(
    subject: Subject, examples: list[Example], rows: list[Tokens], slots: int
) -> Iterator[list[tuple[int, str, bool]]]:
    """(place in `rows`, most likely label of its own, True) of each row, in batches of `slots`."""
    for start in range(0, len(rows), slots):
        batch = examples[start : start + slots]
        words = list(dict.fromkeys(label for example in batch for label in example.labels))
        scores, _ = subject.log_likelihoods(rows[start : start + slots], words)
        chosen = []
        for place, (example, row) in enumerate(zip(batch, scores.tolist(), strict=True), start):
            label = max(example.labels, key=lambda label, row=row: row[words.index(label)])
            chosen.append((place, label, True))
        yield chosen


def _settings(flags: EvaluationFlags, examples: list[Example], dtype: torch.dtype) -> dict[str, Any]:
    """What makes two evaluations the same one: models, mapping, problems and how they are put and judged."""
    texts = json.dumps([[e.language.name, e.source.text, e.target] for e in examples], ensure_ascii=False)
    return {
        "llm_path": flags.llm_path,
        "llm_revision": flags.llm_revision,
        "mt_path": None if flags.baseline else flags.mt_path,
        "mt_revision": None if flags.baseline else flags.mt_revision,
        "encoder_layer": flags.encoder_layer,
        "mapping_sha256": None if flags.baseline else sha256(mapping_file(Path(flags.init_checkpoint))),
        "augmentation": flags.augmentation,
        "problems_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        "max_seq_len": flags.max_seq_len,
        "max_prompt_len": flags.max_prompt_len,
        "max_gen_len": flags.max_gen_len,
        "answer_parser": flags.answer_parser,
        "classification": flags.classification,
        "dtype": str(dtype).removeprefix("torch."),
        # Only where it is another, for the records of runs that were finished before there was one.
        **({} if flags.backend == "transformers" else {"backend": flags.backend}),
    }
