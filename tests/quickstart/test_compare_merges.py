import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import quickstart.compare_merges
from common.errors import InputError
from common.io import read_json
from mindmerger.evaluation.metrics import wilson_interval
from quickstart.compare_merges import CompareFlags, answers, compare, model_folders
from quickstart.exercises import TASKS, Exercise
from quickstart.specialists import make_tokenizer

NAMES = ["base", "problems", "programs", "avg", "regmean_1e-05", "regmean_0.5", "regmean_1"]
NAMES += ["regmean++_counts_0.99", "regmean_asym_0.5"]


class Bar:
    def __init__(self, *_, **__):
        self.count = 0

    def update(self, count: int) -> None:
        self.count += count

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make_model(tokenizer, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def flags(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompareFlags:
    """Random models in a working folder of their own, with short answers; a folder of an unfinished merge."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart.compare_merges, "MAX_NEW_TOKENS", 4)
    for seed, name in enumerate(NAMES):
        method, _, alpha = name.rpartition("_")
        folder = (
            tmp_path / ("models" if name in NAMES[:3] else "merges") / (f"{method}/alpha_{alpha}" if method else name)
        )
        make_model(tokenizer, seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (tmp_path / "merges/regmean_asym/alpha_0.9.steps").mkdir()
    return CompareFlags(models="models", merges="merges", split="dev", test_num=4)


def test_answers_are_what_generate_says(tokenizer):
    """Answers do not depend on order and padding; the oracle generates one by one."""
    model, bar = make_model(tokenizer, 3), Bar()
    asked = list(islice(TASKS["problems"]("dev", 0), 3)) + list(islice(TASKS["programs"]("dev", 0), 3))
    expected = []
    for exercise in asked:
        ids = tokenizer(exercise.prompt, return_tensors="pt").input_ids
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
        expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    assert answers(model, tokenizer, asked, bar) == expected
    assert len(set(expected)) > 1
    assert bar.count == len(asked)


def test_scores_count_what_is_right(flags, monkeypatch):
    """The problems' specialist is right on every problem; all others are right on the first one only."""

    def told(model, tokenizer, exercises: list[Exercise], bar) -> list[str]:
        if torch.equal(model.lm_head.weight, make_model(tokenizer, NAMES.index("problems")).lm_head.weight):
            return [exercise.solution if "answer" in exercise.solution else "" for exercise in exercises]
        return [exercises[0].solution.split()[-1], *("no idea" for _ in exercises[1:])]

    monkeypatch.setattr(quickstart.compare_merges, "answers", told)
    scores = compare(flags)
    assert scores["specialists"] == {
        "problems": {"problems": 1.0, "programs": 0.0},
        "programs": {"problems": 0.25, "programs": 0.0},
    }
    assert scores["base"] == scores["average"] == {"problems": 0.25, "programs": 0.0}
    assert list(scores["regmean"]) == ["1e-05", "0.5", "1"]
    assert scores["regmean++_counts"] == {"0.99": {"problems": 0.25, "programs": 0.0}}
    assert list(scores["regmean_asym"]) == ["0.5"] and "regmean_counts" not in scores
    low, high = wilson_interval(1, 4)
    assert scores["counts"]["avg"]["problems"] == {"right": 1, "count": 4, "low": low, "high": high}
    assert read_json(Path("results/quickstart-regmean/scores.json")) == scores
    lines = Path("results/quickstart-regmean/predictions/problems.jsonl").read_text().splitlines()
    assert [json.loads(line)["right"] for line in lines] == [True] * 4 + [False] * 4


def test_results_are_kept_for_the_same_models_only(flags, tokenizer, monkeypatch):
    first = compare(flags)

    with monkeypatch.context() as patch:
        patch.setattr(quickstart.compare_merges, "load_llm", None)
        assert compare(flags) == first
        with pytest.raises(InputError, match="exercises was"):
            compare(replace(flags, test_num=5))

    make_model(tokenizer, 99).save_pretrained("merges/avg")
    with pytest.raises(InputError, match="models was"):
        compare(flags)
    flags.overwrite = True
    compare(flags)
    flags.overwrite = False
    compare(flags)


def test_an_interrupted_comparison_is_done_again(flags, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quickstart.compare_merges, "summary", stop)
        compare(flags)
    assert compare(flags)["counts"]


def test_missing_models_are_named(flags):
    assert list(model_folders(Path("models"), Path("merges"))) == NAMES
    with pytest.raises(InputError, match="elsewhere/avg"):
        model_folders(Path("models"), Path("elsewhere"))
    shutil.rmtree("merges/regmean")
    with pytest.raises(InputError, match="merges/regmean"):
        model_folders(Path("models"), Path("merges"))
    Path("models/base/model.safetensors").unlink()
    with pytest.raises(InputError, match="models/base"):
        model_folders(Path("models"), Path("merges"))
