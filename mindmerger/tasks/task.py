"""What a task is made of: prompts, rows, and how an answer is graded."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from mindmerger.tasks.languages import Language


@dataclass(frozen=True)
class Prompt:
    """A text of which only the middle may be cut: template, query, template."""

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
    """One row.

    Attributes:
        source: text for the multilingual encoder.
        prompt: text for the LLM after the boundary vector, where augmentation is on.
        target: text that the LLM is to generate; at evaluation, the gold answer.
        language: the source's.
        labels: the words that a classification decides between; empty where an answer is generated.
        location: file and line.
        number: the gold answer's number, of an evaluation problem that asks for one.
    """

    source: Prompt
    prompt: Prompt
    target: str
    language: Language
    labels: tuple[str, ...] = ()
    location: str = ""
    number: Fraction | None = None


# From the data folder and the chosen languages (None: the reader's default) to the rows of each language. Rows may
# be read while they are iterated over.
Reader = Callable[[Path, tuple[Language, ...] | None], dict[Language, Iterable[Example]]]
# From a problem, an answer and the name of an answer parser to (the answer's number or label, whether it is right).
Grader = Callable[[Example, str, str], tuple[Any, bool]]


def grade_label(example: Example, output: str, _: str) -> tuple[str | None, bool]:
    """(the label that the answer is, None for any other text; whether it is the gold one)."""
    label = output.strip()
    return (label if label in example.labels else None), label == example.target


@dataclass(frozen=True)
class Task:
    """What one value of `--task` stands for, in training or in evaluation.

    Attributes:
        name: as on the command line.
        languages: those the task comes in, in the published order; a training task's mapping stage translates from
            them.
        read: reader of its files.
        labels: the words between which a classification decides; empty where an answer is generated.
        template: of a training task, its prompt with placeholders where an example's own words go.
        grade: grader of an answer.
    """

    name: str
    languages: tuple[Language, ...]
    read: Reader
    labels: tuple[str, ...] = ()
    template: str = ""
    grade: Grader = grade_label
