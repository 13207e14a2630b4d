"""The published `datas` layout: files to examples, every row checked before any model loads."""

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

# Where a `datas` folder says which data sets its files stem from.
MANIFEST = "manifest.json"


def read_training(
    data_dir: Path,
    task: Task,
    stage: str,
    languages: tuple[Language, ...] | None,
    train_num: int,
    with_prompts: bool = True,
) -> Iterator[Example]:
    """The rows of one stage, at most `train_num` of each language, in the order of the files, read one by one.

    Args:
        data_dir: a folder in the published layout.
        task: one of `TRAINING_TASKS`.
        stage: "mapping" (translation pairs) or "augmentation" (translated task queries).
        languages: those to read; None reads the task's own from parallel files, and from a JSON list whatever
            languages it holds. The mapping stage has no pairs from English to itself and leaves English out.
        train_num: rows per language.
        with_prompts: whether the mapping stage's rows get their prompts.

    Raises:
        InputError: a missing file, a malformed row (file and line are named); at the end, a language without rows.
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
            # Those beyond train_num are checked, too.
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
    """The problems of one evaluation task, by language, at most `max_problems` of each.

    Raises:
        InputError: a missing file, a malformed row (file and line are named), a gold answer that is none.
    """
    rows = {language: list(examples) for language, examples in task.read(data_dir, languages).items()}
    for language in languages:
        if not rows.get(language):
            folder = data_dir / "evaluation" / task.name
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
