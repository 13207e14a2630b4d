from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from common.logging import progress
from common.ranks import Process
from quickstart.compare_merges import answers
from quickstart.exercises import TASKS
from quickstart.specialists import make_tokenizer, task_lessons, train_all
from tests.conftest import REPOSITORY

SHIPPED = REPOSITORY / "quickstart" / "models" / "regmean"
ASKED = 40


def accuracy(folder: Path, task: str) -> float:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = list(islice(TASKS[task]("dev", 0), ASKED))
    bar = progress(Process(0, 1, model.device), total=len(asked))
    outputs = answers(model, AutoTokenizer.from_pretrained(folder), asked, bar)
    return sum(exercise.is_right(output) for exercise, output in zip(asked, outputs, strict=True)) / ASKED


def test_the_tokenizer_spells_everything_back():
    tokenizer = make_tokenizer()
    for task in TASKS:
        for read, learned in islice(task_lessons(task, 5), 50):
            ids = tokenizer(read + learned).input_ids
            assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
            assert tokenizer.decode(ids[1:]) == read + learned
            # Question and answer tokenized separately, as for a model, have the same tokens as both together.
            assert ids == tokenizer(read).input_ids + tokenizer(learned, add_special_tokens=False).input_ids
            assert all(token not in tokenizer.get_vocab() for token in ("12", "Ġ12"))


def test_shipped_models_are_small():
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_500_000


@pytest.mark.parametrize("task", TASKS)
def test_shipped_specialists_master_their_task_alone(task: str):
    assert accuracy(SHIPPED / task, task) > 0.75
    assert all(accuracy(SHIPPED / other, task) < 0.3 for other in TASKS if other != task)


@pytest.mark.slow
def test_training_from_the_seed_gives_as_good_models(tmp_path: Path):
    train_all(tmp_path, seed=0)
    for task in TASKS:
        assert accuracy(tmp_path / task, task) > accuracy(SHIPPED / task, task) - 0.1
