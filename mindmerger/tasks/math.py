"""Mathematical word problems: trained on questions and solutions (MetaMathQA), evaluated on MGSM and MSVAMP."""

import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import InputError
from mindmerger.tasks.answers import PARSERS, is_same_number, parse_answer
from mindmerger.tasks.languages import Language, named
from mindmerger.tasks.readers import json_lines, one_file_each, one_list, string, text_lines
from mindmerger.tasks.task import Example, Prompt, Task

_LANGUAGES = "Bengali Thai Swahili Japanese Chinese German French Russian Spanish"


def math_prompt(question: str) -> Prompt:
    """Prompt of MetaMath."""
    return Prompt(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n",
        question,
        "\n\n### Response: Let's think step by step.",
    )


def grade_number(example: Example, output: str, answer_parser: str) -> tuple[float | None, bool]:
    """Parse and grade an answer: its number or None, and True if it is the gold one."""
    number = PARSERS[answer_parser](output)
    return (None if number is None else float(number)), is_same_number(number, example.number)


def _solution(row: dict[str, Any], language: Language, location: str) -> Example:
    question = string(row, "query", location)
    target = string(row, "response", location)
    source = Prompt("", question, "")
    return Example(source, math_prompt(question), target, language, location=location, turn=source)


def _mgsm(path: Path, language: Language) -> Iterator[Example]:
    for number, line in enumerate(text_lines(path), start=1):
        location = f"{path}, line {number}"
        fields = line.split("\t")
        if len(fields) != 2 or not fields[0].strip():
            raise InputError(f"{location}: expected question<TAB>answer, found {len(fields)} field(s)")
        yield _problem(fields[0].strip(), fields[1], language, location)


def _msvamp(path: Path, language: Language) -> Iterator[Example]:
    for location, row in json_lines(path):
        yield _problem(string(row, "m_query", location), string(row, "response", location), language, location)


def _problem(question: str, answer: str, language: Language, location: str) -> Example:
    target = answer.strip()
    number = parse_answer(target)
    if number is None:
        raise InputError(f"{location}: the answer {reprlib.repr(answer)} is not a number")
    source = Prompt("", question, "")
    return Example(source, math_prompt(question), target, language, location=location, number=number, turn=source)


_TRAINING_FILE = one_list("query_translation/math.json", "lang", _solution)
_MGSM_FILES = one_file_each("evaluation/mgsm/mgsm_{language.code}.tsv", _mgsm)
_MSVAMP_FILES = one_file_each("evaluation/msvamp/test_{language.name}.jsonl", _msvamp)
TRAINING = (Task("math", named(_LANGUAGES), _TRAINING_FILE, template=math_prompt("{question}").text),)
EVALUATION = (
    Task("mgsm", named(f"Telugu {_LANGUAGES} English"), _MGSM_FILES, grade=grade_number),
    Task("msvamp", named(f"{_LANGUAGES} English"), _MSVAMP_FILES, grade=grade_number),
)
