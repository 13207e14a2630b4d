"""`benchmarks.both_families` on the shipped specialists, with few exercises and without training."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from benchmarks import both_families
from benchmarks.both_families import ROWS, accuracies, aligned, exercises, read_rows
from common.ranks import Process
from mindmerger.tasks import LANGUAGES
from quickstart.world import WORLD_LANGUAGES
from tests.conftest import REPOSITORY

MODELS = Path("quickstart/models/regmean")


def test_training_rows_are_solved_problems_in_every_language() -> None:
    rows = read_rows(Path("nowhere"), None)
    assert list(rows) == list(WORLD_LANGUAGES) and {len(examples) for examples in rows.values()} == {ROWS}
    for examples in rows.values():
        assert all(row.prompt.text == row.source.text + "\n" for row in examples)
    (question, solution, is_right), *_ = islice(exercises("problems", "dev", 0), 1)
    assert is_right(solution) and not is_right("The answer is: 0") and question("de") != question("en")


def test_specialists_know_their_task_in_english_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(both_families, "WORLD_LANGUAGES", (LANGUAGES["German"], LANGUAGES["English"]))
    start = aligned(MODELS / "problems", tmp_path / "start", Process(0, 1, torch.device("cpu")))
    assert (start / "model.safetensors").exists()
    alone = accuracies(MODELS / "problems", None, "dev", 5)
    mapped = accuracies(MODELS / "problems", start, "dev", 5)
    assert alone["problems"]["English"] >= 0.6 and max(alone["programs"].values()) == 0
    assert {task: list(found) for task, found in mapped.items()} == {task: list(found) for task, found in alone.items()}
    assert mapped != alone
