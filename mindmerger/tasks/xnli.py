"""XNLI (Conneau et al., EMNLP 2018): entailment between a premise and a hypothesis."""

import reprlib
from typing import Any

from common.errors import InputError
from mindmerger.tasks.languages import ENGLISH, Language, named
from mindmerger.tasks.readers import one_list, string
from mindmerger.tasks.task import Example, Prompt, Task

_LANGUAGES = named(
    "Swahili Urdu Hindi Thai Arabic Turkish Greek Vietnamese Chinese Russian Bulgarian German French Spanish"
)
_LABELS = ("entailment", "neutral", "contradiction")


def xnli_prompt(premise: str, hypothesis: str) -> Prompt:
    """Prompt with the premise, the longer of the two texts, as the query, which may be cut."""
    return Prompt("Premise: ", premise, f"\nHypothesis: {hypothesis}\nLabel:")


def _pair(row: dict[str, Any], language: Language, location: str) -> Example:
    prompt = xnli_prompt(string(row, "sentence1", location), string(row, "sentence2", location))
    label = string(row, "label", location)
    # The words are scored in the spelling of the file, since a model was trained on Entailment or on entailment.
    spelled = tuple(word.capitalize() for word in _LABELS) if label[:1].isupper() else _LABELS
    if label not in spelled:
        raise InputError(f"{location}: label {reprlib.repr(label)} is not one of {', '.join(spelled)}")
    return Example(prompt, prompt, label, language, spelled, location)


_TRAINING_FILE = one_list("query_translation/xnli_dev.json", "language", _pair)
_EVALUATION_FILE = one_list("evaluation/xnli/test.json", "language", _pair)
TRAINING = (Task("xnli", _LANGUAGES, _TRAINING_FILE, _LABELS, xnli_prompt("{premise}", "{hypothesis}").text),)
EVALUATION = (Task("xnli", (*_LANGUAGES, ENGLISH), _EVALUATION_FILE, _LABELS),)
