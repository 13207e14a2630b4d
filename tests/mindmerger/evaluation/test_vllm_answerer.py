"""`run_evaluation.py --backend vllm`: refused flags, and its answers if vLLM is installed."""

import sys
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.cli import parse_flags
from common.errors import InputError
from common.models import load_tokenizer
from mindmerger.batching import Tokens, lay_out
from mindmerger.checkpoint import SAFETENSORS, write_verdicts
from mindmerger.config import EvaluationFlags, ModelFlags
from mindmerger.evaluation import vllm_answerer as vllm_backend
from mindmerger.evaluation.report import read_predictions
from mindmerger.evaluation.run import evaluate
from mindmerger.init.scaled import embedding_scale
from mindmerger.modeling import MindMergerForCausalLM, mapping_config
from quickstart.world import WORLD_LANGUAGES, problems
from tests.conftest import REPOSITORY
from tests.mindmerger.datas import write_datas, write_lines

MODELS = REPOSITORY / "quickstart/models"


def evaluate_words(*words: object) -> None:
    evaluate(parse_flags(EvaluationFlags, [str(word) for word in words]))


def answers(save_name: str) -> dict[str, list[tuple[str, bool]]]:
    rows = {}
    for record in read_predictions(Path("results", save_name, "mgsm")):
        rows.setdefault(record["language"], []).append((record["output"], record["stopped"]))
    return rows


def test_what_vllm_does_not_do_is_refused(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_datas(Path("datas"))
    words = ("--llm_path", models["llama"], "--baseline", "--backend", "vllm")
    with pytest.raises(InputError, match="xnli is scored by likelihood: add --classification generation"):
        evaluate_words(*words, "--task", "mgsm,xnli")
    if find_spec("vllm") is None:
        with pytest.raises(InputError, match=r"vllm is not installed: pip install -r requirements-vllm\.txt"):
            evaluate_words(*words)
    monkeypatch.setattr(vllm_backend, "require", lambda *_: None)
    monkeypatch.setattr(vllm_backend, "base_config", lambda *_: _Config())
    with pytest.raises(InputError, match=r"a problem has \d+ tokens, and .* a context of 90: lower"):
        evaluate_words(*words)
    assert not any(Path("results").rglob("predictions"))


class _Config:
    max_position_embeddings = 90

    def get_text_config(self) -> "_Config":
        return self


@pytest.fixture
def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The quickstart's models with an untrained mapping, and ten problems in each of its languages."""
    monkeypatch.chdir(tmp_path)
    asked = list(islice(problems("test", 0), 10))
    for language in WORLD_LANGUAGES:
        lines = [f"{problem.question(language.code)}\t{problem.answer}" for problem in asked]
        write_lines(tmp_path / f"datas/evaluation/mgsm/mgsm_{language.code}.tsv", lines)
    tokenizer = load_tokenizer(str(MODELS / "llm"))
    flags = ModelFlags(llm_path=str(MODELS / "llm"), mt_path=str(MODELS / "mt"))
    torch.manual_seed(0)
    model = MindMergerForCausalLM.from_base_models(mapping_config(flags.models, tokenizer.bos_token_id))
    mean, scale = embedding_scale(model, lay_out([Tokens(range(3, 60), [], [])], tokenizer.bos_token_id))
    with torch.no_grad():
        model.mapping.mlp.linear2.weight *= scale
        model.mapping.mlp.linear2.bias *= scale
        model.mapping.end_boundary.copy_(mean)
    model.config.augmentation = True
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path


class _Engine:
    """Substitute for vLLM's `LLM`, by transformers, row by row."""

    def __init__(self, model: str, *, dtype: str, **_: Any):
        self._llm = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))

    def generate(self, prompts: list[dict[str, torch.Tensor]], params: SimpleNamespace, use_tqdm: bool) -> list:
        return [self._answer(prompt["prompt_embeds"], params) for prompt in prompts]

    def _answer(self, embeds: torch.Tensor, params: SimpleNamespace) -> SimpleNamespace:
        ids = self._llm.generate(
            inputs_embeds=embeds.unsqueeze(0),
            attention_mask=torch.ones(1, len(embeds), dtype=torch.int64),
            do_sample=params.temperature > 0,
            max_new_tokens=params.max_tokens,
            eos_token_id=params.stop_token_ids,
        )
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids[0].tolist())])


def test_an_engine_that_is_sent_every_row_alone_gives_the_same_answers(
    small_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = SimpleNamespace(LLM=_Engine, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setattr(vllm_backend, "require", lambda *_: None)
    for name in ("VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL", "VLLM_CPU_NUM_OF_RESERVED_CPU"):
        monkeypatch.setenv(name, "0")
    write_verdicts(Path("checkpoint", SAFETENSORS), {"English": {"verdict": "harms"}})
    words = ("--init_checkpoint", "checkpoint", "--languages", "de,en", "--max_gen_len", 24, "--dtype", "float32")
    evaluate_words(*words, "--save_name", "transformers")
    evaluate_words(*words, "--save_name", "vllm", "--backend", "vllm", "--eval_batch_size", 12)
    expected = answers("transformers")
    assert sum(map(len, expected.values())) == 20
    assert len({answer for rows in expected.values() for answer in rows}) > 5
    assert answers("vllm") == expected
    # The small LLM solves problems in English alone, and none through a mapping that was not trained.
    assert sum(record["right"] for record in read_predictions(Path("results/vllm/mgsm"), "en")) == 10


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (requirements-vllm.txt)")
@pytest.mark.parametrize("who", [("--init_checkpoint", "checkpoint"), ("--baseline", "--llm_path", MODELS / "llm")])
def test_vllm_answers_as_transformers_does(
    small_world: Path, monkeypatch: pytest.MonkeyPatch, who: tuple[object, ...]
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    languages = ",".join(language.code for language in WORLD_LANGUAGES)
    words = (*who, "--languages", languages, "--max_gen_len", 48, "--dtype", "float32", "--save_name")
    suffix = "-baseline" if "--baseline" in who else ""
    evaluate_words(*words, "transformers")
    try:
        evaluate_words(*words, "vllm", "--backend", "vllm")
    finally:
        for child in psutil.Process().children(recursive=True):
            if child.name().startswith("VLLM"):
                child.kill()
    expected, given = answers(f"transformers{suffix}"), answers(f"vllm{suffix}")
    assert sum(map(len, expected.values())) == 60
    assert given == expected
    # Answers are not empty and not all the same.
    assert len({answer for rows in expected.values() for answer in rows}) > 10
