"""The shipped models have the abilities that the quickstart needs; so have models trained again from the seed."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from mindmerger.tasks import math_prompt
from mindmerger.tasks.answers import parse_answer
from quickstart import pretrain
from quickstart.world import WORLD_LANGUAGES, problems

SHIPPED = Path("quickstart/models")


@torch.inference_mode()
def solved(folder: Path, code: str, count: int = 25) -> float:
    """Fraction of dev problems in this language that the LLM solves without a mapping."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chosen = list(islice(problems("dev", 5), count))
    prompts = [math_prompt(problem.question(code)).text for problem in chosen]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=48, do_sample=False
    )
    answers = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return sum(parse_answer(a) == problem.answer for a, problem in zip(answers, chosen, strict=True)) / count


@torch.inference_mode()
def translated(folder: Path, count: int = 8) -> float:
    """Fraction of dev problems, in any language, whose translation into English has every word and digit right."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    right = 0
    for language in WORLD_LANGUAGES:
        chosen = list(islice(problems("dev", 5), count))
        inputs = tokenizer([problem.question(language.code) for problem in chosen], return_tensors="pt", padding=True)
        output = model.generate(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=60, do_sample=False
        )
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        right += sum(text == problem.question("en") for text, problem in zip(texts, chosen, strict=True))
    return right / (count * len(WORLD_LANGUAGES))


def test_the_llm_solves_english_problems_and_no_others() -> None:
    assert solved(SHIPPED / "llm", "en") >= 0.85
    # It can read the numbers and sometimes guesses the right operation.
    assert solved(SHIPPED / "llm", "de") <= 0.3


def test_the_mt5_translates() -> None:
    assert translated(SHIPPED / "mt") >= 0.5


@pytest.mark.slow
def test_training_anew_from_the_seed_reaches_the_same_quality(tmp_path: Path) -> None:
    pretrain.make_llm(tmp_path / "llm", seed=0)
    pretrain.make_mt(tmp_path / "mt", seed=0)
    assert solved(tmp_path / "llm", "en", 200) >= solved(SHIPPED / "llm", "en", 200) - 0.05
    assert translated(tmp_path / "mt", 50) >= translated(SHIPPED / "mt", 50) - 0.08


def test_both_models_come_out_of_their_recipes_as_whole_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "LLM_ROUNDS", ((1e-3, 2, pretrain.FIRST_MIX), (1e-3, 2, pretrain.LAST_MIX)))
    monkeypatch.setattr(pretrain, "MT_ROUND", (1e-3, 2))
    monkeypatch.setattr(pretrain, "TOKENIZER_PROBLEMS", 100)
    pretrain.make_llm(tmp_path / "llm", seed=0)
    pretrain.make_mt(tmp_path / "mt", seed=0)
    for name, model_class in (("llm", AutoModelForCausalLM), ("mt", AutoModelForSeq2SeqLM)):
        shipped = model_class.from_pretrained(SHIPPED / name)
        model = model_class.from_pretrained(tmp_path / name)
        assert type(model) is type(shipped)
        assert model.dtype == shipped.dtype == torch.float16
        assert all(parameter.isfinite().all() for parameter in model.parameters())
