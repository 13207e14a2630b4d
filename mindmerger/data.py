"""Readers of the published `datas` layout, which check every row before any model loads."""

import itertools
import random
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from common.errors import InputError
from mindmerger.tasks.languages import Language
from mindmerger.tasks.task import Example, Task
from mindmerger.tasks.translation import read_pairs

# File of a `datas` folder that lists the data sets of its files.
MANIFEST = "manifest.json"


def read_training(
    data_dir: Path,
    task: Task,
    stage: str,
    languages: tuple[Language, ...] | None,
    train_num: int,
    with_prompts: bool = True,
) -> Iterator[Example]:
    """Read the rows of one stage, in the order of the files.

    Args:
        data_dir: a folder in the published layout.
        task: one of `TRAINING_TASKS`.
        stage: "mapping" (translation pairs) or "augmentation" (translated task queries).
        languages: languages to read; None for the task's languages in parallel files, and for all languages in a JSON
            list. The mapping stage skips English, which has no pairs.
        train_num: maximum rows of each language.
        with_prompts: True to build the prompts of the mapping stage.

    Raises:
        InputError: a file is missing, a row is malformed (file and line are named), or a language has no rows.
    """
    rows: dict[Language, Iterable[Example]]
    if stage == "mapping":
        chosen = [language for language in languages or task.languages if language.code != "en"]
        rows = {
            language: itertools.islice(read_pairs(data_dir, language, with_prompts), train_num) for language in chosen
        }
    else:
        rows = task.read(data_dir, languages)
        chosen = list(languages or rows)
    missing = []
    for language in chosen:
        count = 0
        for count, example in enumerate(rows.get(language, ()), start=1):
            # Rows beyond train_num are also checked.
            if count <= train_num:
                yield example
        if count == 0:
            missing.append(language.name)
    if missing or not chosen:
        raise InputError(
            f"{data_dir} has no {stage} rows of task {task.name} in {', '.join(missing) or 'any language'}: "
            "add them, or name the languages to use with --languages"
        )


def read_evaluation(
    data_dir: Path, task: Task, languages: tuple[Language, ...], max_problems: int | None = None
) -> dict[Language, list[Example]]:
    """Read the problems of one evaluation task by language, at most `max_problems` of each.

    Raises:
        InputError: a file is missing, or a row or its gold answer is malformed (the message names file and line).
    """
    rows = {language: list(examples) for language, examples in task.read(data_dir, languages).items()}
    for language in languages:
        if not rows.get(language):
            folder = data_dir / "evaluation" / task.name
            raise InputError(f"{folder} has no problems in {language.name}: leave it out of --languages")
    return {language: rows[language][:max_problems] for language in languages}


def hold_out(count: int, dev_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split row numbers 0 to `count` - 1 at random into `dev_size` for validation and the rest for training.

    Returns:
        Two int64 arrays, the same for the same seed.

    Raises:
        InputError: no row is left for training.
    """
    if dev_size >= count:
        raise InputError(
            f"--dev_size {dev_size} holds out all of the {count} training rows: lower it, or raise --train_num"
        )
    order = array("q", range(count))
    random.Random(seed).shuffle(order)
    shuffled = np.frombuffer(order, np.int64)
    return shuffled[:dev_size], shuffled[dev_size:]
