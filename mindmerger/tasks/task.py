"""Prompts, examples and the definition of a task."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from mindmerger.tasks.languages import Language


@dataclass(frozen=True)
class Prompt:
    """A text of template, query, template, of which only the query may be cut."""

    before: str
    query: str
    after: str

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.before + self.query + self.after


NO_PROMPT = Prompt("", "", "")


@dataclass(frozen=True)
class Example:
    """One row of a data file.

    Attributes:
        source: input text of the multilingual encoder.
        prompt: input text of the LLM after the boundary vector, with augmentation.
        target: text that the LLM should generate; at evaluation, the gold answer.
        language: language of the source.
        labels: label words of a classification; empty if an answer is generated.
        location: file and line.
        number: number of the gold answer, for an evaluation problem with a numeric answer.
        turn: text of the user's turn, with `--prompt chat`; None for `prompt`.
    """

    source: Prompt
    prompt: Prompt
    target: str
    language: Language
    labels: tuple[str, ...] = ()
    location: str = ""
    number: Fraction | None = None
    turn: Prompt | None = None


# Function from the data folder and the languages (None: the reader's default) to the rows of each language, which may
# be read lazily.
Reader = Callable[[Path, tuple[Language, ...] | None], dict[Language, Iterable[Example]]]
# Function from a problem, an answer and the name of a parser to (number or label of the answer, True if it is right).
Grader = Callable[[Example, str, str], tuple[Any, bool]]


def grade_label(example: Example, output: str, _: str) -> tuple[str | None, bool]:
    """Grade an answer that should be a label: the label or None, and True if it is the gold one."""
    label = output.strip()
    return (label if label in example.labels else None), label == example.target


@dataclass(frozen=True)
class Task:
    """A task of training or evaluation, one value of `--task`.

    Attributes:
        name: name on the command line.
        languages: languages of the task, in the published order; the mapping stage of a training task translates
            from them.
        read: reader of its files.
        labels: label words of a classification; empty if an answer is generated.
        template: prompt of a training task with placeholders for the texts of an example.
        grade: grader of an answer.
    """

    name: str
    languages: tuple[Language, ...]
    read: Reader
    labels: tuple[str, ...] = ()
    template: str = ""
    grade: Grader = grade_label
