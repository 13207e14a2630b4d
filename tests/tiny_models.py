"""Tiny random models: Hugging Face checkpoints of the same classes as real models.

They are untrained and let every script run in seconds.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    M2M100Config,
    MT5Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    XLMRobertaConfig,
)

from mindmerger.tasks import LANGUAGES
from quickstart.world import WORLD_LANGUAGES, problems

# With the usual 0.02, outputs of such small models do not depend on their inputs.
_LIVELY = 0.3


def tiny_tokenizer(opening: list[str], closing: list[str], more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with some words of the small world as tokens.

    Args:
        opening, closing: special tokens around every text.
        more: further special tokens.
    """
    specials = ["<pad>", "<s>", "</s>", "<unk>", *more]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(specials),
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join([*opening, "$A", *closing]),
        special_tokens=[(token, backend.token_to_id(token)) for token in {*opening, *closing}],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_llama(folder: Path) -> None:
    """An LLM of the LLaMA architecture: hidden 32, two layers."""
    tokenizer = tiny_tokenizer(["<s>"], [])
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=_LIVELY,
        **_ids(tokenizer),
    )
    _save(folder, AutoModelForCausalLM.from_config, config, tokenizer)


def tiny_mt5(folder: Path) -> None:
    """A multilingual encoder-decoder of the mT5 architecture: d_model 24."""
    tokenizer = tiny_tokenizer([], ["</s>"])
    config = MT5Config(
        d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=3, decoder_start_token_id=0, **_ids(tokenizer)
    )
    _save(folder, AutoModelForSeq2SeqLM.from_config, config, tokenizer)


def tiny_nllb(folder: Path) -> None:
    """A multilingual encoder-decoder of the M2M100 architecture, with NLLB's language tokens."""
    codes = tuple(language.nllb for language in LANGUAGES.values())
    tokenizer = tiny_tokenizer(["eng_Latn"], ["</s>"], codes)
    config = M2M100Config(
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        decoder_start_token_id=2,
        scale_embedding=True,
        init_std=_LIVELY,
        **_ids(tokenizer),
    )
    _save(folder, AutoModelForSeq2SeqLM.from_config, config, tokenizer)


def tiny_xlm_roberta(folder: Path) -> None:
    """A multilingual encoder of the XLM-R architecture."""
    tokenizer = tiny_tokenizer(["<s>"], ["</s>"])
    # Learned positions are counted from after the padding id: two of them are never used.
    tokenizer.model_max_length = 512
    config = XLMRobertaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=514,
        type_vocab_size=1,
        initializer_range=_LIVELY,
        **_ids(tokenizer),
    )
    _save(folder, AutoModelForMaskedLM.from_config, config, tokenizer)


def tiny_qwen(folder: Path) -> None:
    """A decoder-only multilingual model of the Qwen2 architecture."""
    tokenizer = tiny_tokenizer([], [])
    config = Qwen2Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=_LIVELY,
        **_ids(tokenizer),
    )
    _save(folder, AutoModelForCausalLM.from_config, config, tokenizer)


def _texts() -> Iterator[str]:
    for problem in islice(problems("train", 0), 20):
        yield problem.solution
        for language in WORLD_LANGUAGES:
            yield problem.question(language.code)


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _save(folder: Path, from_config: object, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model: PreTrainedModel = from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
