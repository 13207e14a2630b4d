"""Functions of the task files in `configs/lm_eval`: rows of a local `datas` folder, and their grading."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from mindmerger.data import read_evaluation
from mindmerger.tasks import EVALUATION_TASKS, find_language
from mindmerger.tasks.answers import is_same_number, parse_answer


def load(task_name: str, language: str, data_dir: str = "./datas", **_: Any) -> dict[str, Dataset]:
    """Read the problems of a task in one language, as split "test".

    Args:
        task_name: one of `EVALUATION_TASKS`.
        language: ISO code of the language.
        data_dir: folder in the published layout; set by `--metadata '{"data_dir": "FOLDER"}'`.

    Returns:
        Rows of `question` (input of the encoder), `prompt` (input of the LLM), `stem` (the part of both that may be
        cut), `answer` and `choices`.

    Raises:
        InputError: a file is missing, or a row is malformed.
    """
    chosen = find_language(language)
    examples = read_evaluation(Path(data_dir), EVALUATION_TASKS[task_name], (chosen,))[chosen]
    rows = [
        {
            "question": example.source.text,
            "prompt": example.prompt.text,
            "stem": example.source.query,
            "answer": example.target,
            "choices": list(example.labels),
        }
        for example in examples
    ]
    return {"test": Dataset.from_list(rows)}


def judge_number(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Grade one answer by the default parser of `run_evaluation.py`."""
    return {"acc": float(is_same_number(parse_answer(results[0]), parse_answer(doc["answer"])))}
