"""Tiny random models of every kind, made once per session, and one small set of rows."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from common.logging import quiet_libraries
from common.models import base_config, load_tokenizer
from mindmerger.config import ModelPair
from mindmerger.data import Example
from mindmerger.modeling import MindMergerForCausalLM, mapping_config
from mindmerger.tasks import LANGUAGES, Prompt, math_prompt
from mindmerger.tokenization import ExampleTokenizer
from tests import tiny_models
from tests.mindmerger.datas import write_datas

ENCODERS = ("mt5", "nllb", "xlm_roberta", "qwen")


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    """Silence the libraries in test reports, as scripts do on the terminal."""
    quiet_libraries()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the tiny models, by name."""
    folder = tmp_path_factory.mktemp("models")
    makers: dict[str, Callable[[Path], None]] = {
        "llama": tiny_models.tiny_llama,
        "mt5": tiny_models.tiny_mt5,
        "nllb": tiny_models.tiny_nllb,
        "xlm_roberta": tiny_models.tiny_xlm_roberta,
        "qwen": tiny_models.tiny_qwen,
    }
    for name, make in makers.items():
        make(folder / name)
    return {name: folder / name for name in makers}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's working folder, with a `datas` folder."""
    folder = tmp_path_factory.mktemp("work")
    write_datas(folder / "datas")
    return folder


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    """Rows of very different lengths, in several languages."""
    texts = [
        ("German", "Wie viele Äpfel hat Anna?", "3 + 4 = 7.\nThe answer is: 7"),
        ("Swahili", "Tufaha ngapi?", "The answer is: 2"),
        (
            "Chinese",
            "安娜有3个苹果，又买了4个，给了别人2个。现在有多少个？",
            "3 + 4 = 7. 7 - 2 = 5.\nThe answer is: 5",
        ),
        ("English", "How many apples does Anna have after she has eaten two of five?", "5 - 2 = 3.\nThe answer is: 3"),
        ("German", "Und jetzt?", "1"),
    ]
    return [
        Example(Prompt("", query, ""), math_prompt(query), target, LANGUAGES[language])
        for language, query, target in texts
    ]


@pytest.fixture
def ignore(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Function that makes every Llama ignore some arguments of its forward pass."""

    def ignore_arguments(*names: str) -> None:
        forward = LlamaForCausalLM.forward

        @functools.wraps(forward)
        def partly(self: LlamaForCausalLM, **given: object) -> object:
            return forward(self, **{name: value for name, value in given.items() if name not in names})

        monkeypatch.setattr(LlamaForCausalLM, "forward", partly)

    return ignore_arguments


@pytest.fixture
def build(models: dict[str, Path]) -> Callable[..., tuple[MindMergerForCausalLM, ExampleTokenizer]]:
    """Function that builds (model, tokenizer) of an LLM and an encoder by name, with a mapping of large weights."""

    def build_pair(
        llm: str = "llama", mt: str = "mt5", augmentation: bool = True, **limits: int
    ) -> tuple[MindMergerForCausalLM, ExampleTokenizer]:
        llm_path, mt_path = str(models[llm]), str(models[mt])
        llm_tokenizer = load_tokenizer(llm_path)
        config = mapping_config(ModelPair(llm_path=llm_path, mt_path=mt_path), llm_tokenizer.bos_token_id)
        torch.manual_seed(1)
        model = MindMergerForCausalLM.from_base_models(config)
        torch.nn.init.normal_(model.mapping.end_boundary)
        limits = {"max_seq_len": 200, "max_prompt_len": 300, "max_gen_len": 60} | limits
        tokenizer = ExampleTokenizer(
            load_tokenizer(mt_path), base_config(mt_path), llm_tokenizer, augmentation=augmentation, **limits
        )
        return model, tokenizer

    return build_pair
