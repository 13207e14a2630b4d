"""The two tasks of the specialists, and the texts that their Grams are computed from.

`python -m quickstart.exercises FOLDER` writes those texts, one JSON line each, as `compute_gram.py` reads them.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from common.io import write_text
from mindmerger.tasks.answers import parse_answer
from quickstart.programs import programs
from quickstart.world import Split, problems

LARGEST_NUMBER = 20  # in a question, so that a small model can learn the arithmetic in minutes


@dataclass(frozen=True)
class Exercise:
    """A question in English.

    Attributes:
        question: text of the question.
        solution: a right answer.
        gold: the expected result, for a reader.
        is_right: function that grades an answer.
    """

    question: str
    solution: str
    gold: str
    is_right: Callable[[str], bool]

    @property
    def prompt(self) -> str:
        """Input of a model."""
        return self.question + "\n"


def word_problems(split: Split, seed: int) -> Iterator[Exercise]:
    """Endless stream of problems; an answer is right if it ends in the right number."""
    for problem in problems(split, seed, LARGEST_NUMBER):
        yield Exercise(
            problem.question("en"),
            problem.solution,
            str(problem.answer),
            lambda text, gold=problem.answer: parse_answer(text) == gold,
        )


def python_functions(split: Split, seed: int) -> Iterator[Exercise]:
    """Endless stream of functions to write; an answer is right if it passes the asserts."""
    for program in programs(split, seed):
        yield Exercise(program.question, program.solution, "\n".join(program.asserts), program.is_right)


TASKS: dict[str, Callable[[Split, int], Iterator[Exercise]]] = {
    "problems": word_problems,
    "programs": python_functions,
}


def texts(task: str, count: int, seed: int) -> list[str]:
    """Question and solution of `count` exercises from a specialist's training set."""
    return [exercise.prompt + exercise.solution for exercise in islice(TASKS[task]("train", seed), count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000, help="texts of each task")
    flags = parser.parse_args()
    for task in TASKS:
        lines = (json.dumps({"text": text}) + "\n" for text in texts(task, flags.count, seed=0))
        write_text(flags.folder / f"{task}.jsonl", "".join(lines))


if __name__ == "__main__":
    main()
