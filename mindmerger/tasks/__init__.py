"""Languages, prompts and tasks. A module here that defines `TRAINING` or `EVALUATION` tasks adds them to the tables.

The prompts are exactly those of the published checkpoints.
"""

import importlib
import pkgutil

from common.errors import InputError
from mindmerger.tasks.languages import ENGLISH, LANGUAGES, UNKNOWN, Language, find_language, select_languages
from mindmerger.tasks.math import math_prompt
from mindmerger.tasks.task import NO_PROMPT, Example, Prompt, Task
from mindmerger.tasks.translation import translation_prompt
from mindmerger.tasks.x_csqa import x_csqa_prompt
from mindmerger.tasks.xnli import xnli_prompt

__all__ = ["ENGLISH", "EVALUATION_TASKS", "LANGUAGES", "NO_PROMPT", "TRAINING_TASKS", "UNKNOWN", "Example", "Language"]
__all__ += ["Prompt", "Task", "find_language", "find_task", "math_prompt", "prompt_template", "select_languages"]
__all__ += ["translation_prompt", "x_csqa_prompt", "xnli_prompt"]

_MODULES = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
TRAINING_TASKS: dict[str, Task] = {t.name: t for module in _MODULES for t in getattr(module, "TRAINING", ())}
EVALUATION_TASKS: dict[str, Task] = {t.name: t for module in _MODULES for t in getattr(module, "EVALUATION", ())}


def find_task(name: str, tasks: dict[str, Task]) -> Task:
    """Find the task of this name in `tasks`.

    Raises:
        InputError: there is no such task.
    """
    if name not in tasks:
        raise InputError(f"--task {name!r} is not one of: {', '.join(tasks)}")
    return tasks[name]


def prompt_template(task: str, stage: str) -> str:
    """Prompt of a training stage with placeholders for the texts of an example, for the config."""
    if stage == "mapping":
        return translation_prompt("{sentence}", Language("{source language}", "", ""), ENGLISH).text
    return TRAINING_TASKS[task].template
