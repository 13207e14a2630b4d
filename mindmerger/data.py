"""Readers of the published `datas` layout: files to examples, every row checked before any model loads."""

import json
import random
import reprlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError
from mindmerger.evaluation.answers import parse_answer
from mindmerger.tasks import (
    EVALUATION_TASKS,
    LANGUAGES,
    Language,
    Prompt,
    Task,
    find_language,
    math_prompt,
    translation_prompt,
    x_csqa_prompt,
    xnli_prompt,
)

# Where a `datas` folder says which data sets its files stem from.
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Example:
    """One row.

    Attributes:
        source: what the multilingual encoder reads.
        prompt: what the LLM reads after the boundary vector, where augmentation is on.
        target: what the LLM is to say; at evaluation, the gold answer.
        language: the source's.
        labels: the words that a classification decides between; empty where an answer is generated.
        place: file and line.
    """

    source: Prompt
    prompt: Prompt
    target: str
    language: Language
    labels: tuple[str, ...] = ()
    place: str = ""


def read_training(
    data_dir: Path, task: Task, stage: str, languages: tuple[Language, ...] | None, train_num: int
) -> list[Example]:
    """The rows of one stage, at most `train_num` of each language, in the order of the files.

    Args:
        data_dir: a folder in the published layout.
        task: one of `TRAINING_TASKS`.
        stage: "mapping" (translation pairs) or "augmentation" (translated task queries).
        languages: those to read; None reads the task's own from parallel files, and from a JSON list whatever
            languages it holds. The mapping stage has no pairs from English to itself and leaves English out.
        train_num: rows per language.

    Raises:
        InputError: a missing file, a malformed row (file and line are named), a language without rows.
    """
    queries = data_dir / "query_translation"
    if stage == "mapping":
        chosen = [language for language in languages or task.languages if language.code != "en"]
        rows = {language: _read_pairs(data_dir, language, train_num) for language in chosen}
    elif task.name == "x-csqa":
        chosen = list(languages or (*task.languages, LANGUAGES["English"]))
        rows = {
            language: _read_x_csqa(queries / "x-csqa" / f"train_{language.code}.jsonl", language) for language in chosen
        }
    else:
        if task.name == "xnli":
            rows = _by_language(queries / "xnli_dev.json", "language", _xnli_example)
        else:
            rows = _by_language(queries / "math.json", "lang", _math_example)
        chosen = list(languages or rows)

    missing = [language.name for language in chosen if not rows.get(language)]
    if missing or not chosen:
        raise InputError(
            f"{data_dir} has no {stage} rows of task {task.name} in {', '.join(missing) or 'any language'}: "
            "add them, or name the languages to use with --languages"
        )
    return [example for language in chosen for example in rows[language][:train_num]]


def read_evaluation(
    data_dir: Path, task: Task, languages: tuple[Language, ...], max_problems: int | None = None
) -> dict[Language, list[Example]]:
    """The problems of one evaluation task, by language, at most `max_problems` of each.

    Raises:
        InputError: a missing file, a malformed row (file and line are named), a gold answer that is none.
    """
    folder = data_dir / "evaluation" / task.name
    if task.name == "mgsm":
        rows = {language: _read_mgsm(folder / f"mgsm_{language.code}.tsv", language) for language in languages}
    elif task.name == "msvamp":
        rows = {language: _read_msvamp(folder / f"test_{language.name}.jsonl", language) for language in languages}
    elif task.name == "x-csqa":
        rows = {language: _read_x_csqa(folder / language.code / "dev.jsonl", language) for language in languages}
    else:
        rows = _by_language(folder / "test.json", "language", _xnli_example)
    for language in languages:
        if not rows.get(language):
            raise InputError(f"{folder} has no problems in {language.name}: leave it out of --languages")
    return {language: rows[language][:max_problems] for language in languages}


def hold_out(count: int, dev_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split row numbers 0 to `count` - 1, shuffled, into `dev_size` for validation and the rest for training.

    Returns:
        Two int64 arrays, the same for the same seed.

    Raises:
        InputError: nothing would be left to train on.
    """
    if dev_size >= count:
        raise InputError(
            f"--dev_size {dev_size} holds out all of the {count} training rows: lower it, or raise --train_num"
        )
    order = array("q", range(count))
    random.Random(seed).shuffle(order)
    shuffled = np.frombuffer(order, np.int64)
    return shuffled[:dev_size], shuffled[dev_size:]


def _read_text(path: Path) -> str:
    try:
        # Not read_text, which would take a lone carriage return inside a sentence for the end of a line.
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file (--data_dir names the folder in the published layout)") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error


def _text_lines(path: Path) -> list[str]:
    text = _read_text(path)
    # Only line feeds end a row: a sentence may well hold U+2028 or U+0085, at which splitlines() would split it.
    lines = text.replace("\r\n", "\n").split("\n")
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise InputError(f"{path}: the file is empty")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise InputError(f"{path}, line {number}: the line is empty")
    return lines


def _read_pairs(data_dir: Path, language: Language, train_num: int) -> list[Example]:
    folder = data_dir / "bilingual_pairs" / f"en-{language.code}"
    source_path, target_path = folder / f"train_100k.{language.code}", folder / "train_100k.en"
    sources, targets = _text_lines(source_path), _text_lines(target_path)
    if len(sources) != len(targets):
        raise InputError(
            f"{source_path} has {len(sources)} lines but {target_path} has {len(targets)}: "
            "line n of one must translate line n of the other"
        )
    english = LANGUAGES["English"]
    return [
        Example(
            Prompt("", source.strip(), ""),
            translation_prompt(source.strip(), language, english),
            target.strip(),
            language,
            place=f"{source_path}, line {number}",
        )
        for number, (source, target) in enumerate(zip(sources[:train_num], targets[:train_num], strict=True), start=1)
    ]


def _read_mgsm(path: Path, language: Language) -> list[Example]:
    examples = []
    for number, line in enumerate(_text_lines(path), start=1):
        fields = line.split("\t")
        if len(fields) != 2 or not fields[0].strip():
            raise InputError(f"{path}, line {number}: expected question<TAB>answer, found {len(fields)} field(s)")
        examples.append(_math_problem(fields[0].strip(), fields[1], language, f"{path}, line {number}"))
    return examples


def _read_msvamp(path: Path, language: Language) -> list[Example]:
    return [
        _math_problem(_string(row, "m_query", place), _string(row, "response", place), language, place)
        for place, row in _json_lines(path)
    ]


def _math_problem(question: str, answer: str, language: Language, place: str) -> Example:
    if parse_answer(answer) is None:
        raise InputError(f"{place}: the answer {reprlib.repr(answer)} is not a number")
    return Example(Prompt("", question, ""), math_prompt(question), answer.strip(), language, place=place)


def _math_example(row: dict[str, Any], language: Language, place: str) -> Example:
    question = _string(row, "query", place)
    return Example(
        Prompt("", question, ""), math_prompt(question), _string(row, "response", place), language, place=place
    )


def _xnli_example(row: dict[str, Any], language: Language, place: str) -> Example:
    prompt = xnli_prompt(_string(row, "sentence1", place), _string(row, "sentence2", place))
    label = _string(row, "label", place)
    labels = EVALUATION_TASKS["xnli"].labels
    # The words are scored as the file spells them: a model was trained on Entailment or on entailment.
    spelled = tuple(word.capitalize() for word in labels) if label[:1].isupper() else labels
    if label not in spelled:
        raise InputError(f"{place}: label {reprlib.repr(label)} is not one of {', '.join(spelled)}")
    return Example(prompt, prompt, label, language, spelled, place)


def _read_x_csqa(path: Path, language: Language) -> list[Example]:
    letters = EVALUATION_TASKS["x-csqa"].labels
    examples = []
    for place, row in _json_lines(path):
        question = row.get("question")
        choices = question.get("choices") if isinstance(question, dict) else None
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise InputError(
                f'{place}: expected {{"question": {{"stem": ..., "choices": [{{"label", "text"}}, ...]}}}}'
            )
        if [choice.get("label") for choice in choices] != list(letters[: len(choices)]):
            raise InputError(f"{place}: the choices' labels must be {', '.join(letters)}, in this order")
        prompt = x_csqa_prompt(_string(question, "stem", place), [_string(choice, "text", place) for choice in choices])
        key = _string(row, "answerKey", place)
        labels = letters[: len(choices)]
        if key not in labels:
            raise InputError(f"{place}: answerKey {reprlib.repr(key)} is none of the {len(choices)} choices")
        examples.append(Example(prompt, prompt, key, language, labels, place))
    return examples


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line, where place is what an error message names."""
    for number, line in enumerate(_text_lines(path), start=1):
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of 5000 digits
            raise InputError(f"{place}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{place}: expected a JSON object")
        yield place, row


def _by_language(
    path: Path, language_key: str, make_example: Callable[[dict[str, Any], Language, str], Example]
) -> dict[Language, list[Example]]:
    """The rows of a JSON list, each naming its language, sorted by language."""
    try:
        rows = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5000 digits
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a JSON list of objects")
    examples: dict[Language, list[Example]] = {}
    for number, row in enumerate(rows, start=1):
        place = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise InputError(f"{place}: expected a JSON object")
        try:
            language = find_language(_string(row, language_key, place))
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
        examples.setdefault(language, []).append(make_example(row, language, place))
    return examples


def _string(row: dict[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{place}: {key!r} must be a text, found {reprlib.repr(value)}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"{place}: {key!r} holds half of a surrogate pair, which is no character")
    return value
