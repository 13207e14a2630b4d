"""Tiny random models, their tokenizer and their texts; nothing is downloaded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = [f"w{number}" for number in range(20)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }}{% endfor %}</s>"
)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Isolate from the hub, the shared cache and LOCAL_RANK, which `start_process` sets and the harness reads."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with bos added to plain text, a chat template that writes its own, and padding left."""
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[4:],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def make_llama(seed: int = 0, tied: bool = False, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def make_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Save a model with its tokenizer under a name; return the folder."""

    def save_model(model: PreTrainedModel, name: str) -> Path:
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
        return tmp_path / name

    return save_model


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """40 plain texts of 1 to 20 words, as JSON lines with the column `text`."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "texts.jsonl"
    with path.open("w") as file:
        for length in torch.randint(1, 21, (40,), generator=generator).tolist():
            words = [WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist()]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path
