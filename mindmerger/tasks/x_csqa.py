"""X-CSQA (Lin et al., ACL 2021): commonsense questions with up to five choices."""

import reprlib
from collections.abc import Iterator
from pathlib import Path

from common.errors import InputError
from mindmerger.tasks.languages import ENGLISH, Language, named
from mindmerger.tasks.readers import json_lines, one_file_each, string
from mindmerger.tasks.task import Example, Prompt, Task

_LANGUAGES = named(
    "Urdu Hindi Swahili Japanese Vietnamese Polish Chinese Flemish Russian Italian German Portuguese French Spanish"
    " Arabic"
)
_LETTERS = tuple("ABCDE")


def x_csqa_prompt(stem: str, choices: list[str]) -> Prompt:
    """Prompt with the options in the template, so that none is ever cut."""
    options = "\t".join(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices))
    return Prompt("", stem, f"\nOptions:{options}\nAnswer:")


def _questions(path: Path, language: Language) -> Iterator[Example]:
    for location, row in json_lines(path):
        question = row.get("question")
        choices = question.get("choices") if isinstance(question, dict) else None
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise InputError(
                f'{location}: expected {{"question": {{"stem": ..., "choices": [{{"label", "text"}}, ...]}}}}'
            )
        labels = _LETTERS[: len(choices)]
        if [choice.get("label") for choice in choices] != list(labels):
            raise InputError(f"{location}: the choices' labels must be {', '.join(_LETTERS)}, in this order")
        stem = string(question, "stem", location)
        prompt = x_csqa_prompt(stem, [string(choice, "text", location) for choice in choices])
        key = string(row, "answerKey", location)
        if key not in labels:
            raise InputError(f"{location}: answerKey {reprlib.repr(key)} is not one of the {len(choices)} choices")
        yield Example(prompt, prompt, key, language, labels, location)


_TRAINING_FILES = one_file_each(
    "query_translation/x-csqa/train_{language.code}.jsonl", _questions, (*_LANGUAGES, ENGLISH)
)
_EVALUATION_FILES = one_file_each("evaluation/x-csqa/{language.code}/dev.jsonl", _questions)
TRAINING = (Task("x-csqa", _LANGUAGES, _TRAINING_FILES, _LETTERS, x_csqa_prompt("{stem}", ["{choice}"]).text),)
EVALUATION = (Task("x-csqa", (*_LANGUAGES, ENGLISH), _EVALUATION_FILES, _LETTERS),)
