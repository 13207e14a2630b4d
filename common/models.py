"""Hugging Face models, tokenizers and configs, from a hub id or a local folder: whole, or a clear error."""

import copy
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from common.errors import InputError, first_line, within_memory
from common.io import read_shard_index

TOO_LARGE = (
    "out of memory while the model loads: use 16 bits (--dtype; in training bf16 in --deepspeed_config), in training "
    "several GPUs under ZeRO-3 (configs/deepspeed/zero3_bf16.json), or larger devices; --plan shows what fits"
)


def base_config(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a hub id or local folder, without its weights.

    Raises:
        InputError: there is none.
    """
    return _loaded("model config", AutoConfig, path, revision=revision, trust_remote_code=trust_remote_code)


def load_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or local folder.

    Raises:
        InputError: there is none.
    """
    return _loaded("tokenizer", AutoTokenizer, path, revision=revision, trust_remote_code=trust_remote_code)


def _loaded(what: str, auto_class: Any, path: str, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(path, **options)
    except Exception as error:  # a damaged file may raise anything
        raise InputError(f"no {what} could be loaded from {path}: {first_line(error)}") from error


def model_on_meta(auto_class: Any, path: str, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """Build a model as shapes without data.

    Args:
        auto_class: of transformers, as `AutoModelForCausalLM`.
        path: origin of the config, for messages.
        options: of `from_config`.

    Raises:
        InputError: the config does not fit the class.
    """
    try:
        with torch.device("meta"), no_init_weights():
            return auto_class.from_config(copy.deepcopy(config), **options)
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"the config in {path} makes no {auto_class.__name__}: {first_line(error)}") from error


def load_model(
    model_class: Any, path: str, needs_head: bool = True, computed: Collection[str] = (), **options: Any
) -> PreTrainedModel:
    """Load a model in eval mode and check that all of its weights were found.

    Args:
        model_class: a class of transformers, or an auto class.
        path: hub id or local folder.
        needs_head: True if a separate output head must have been found, too.
        computed: patterns of names of weights that the model computes and no file holds.
        options: of `from_pretrained`.

    Raises:
        InputError: `path` holds no such model, lacks weights, which would start at random, or does not fit into memory.
    """
    for index in Path(path).glob("*.index.json"):
        # transformers itself would read files outside the model's folder that an index lists.
        read_shard_index(index)
    try:
        with within_memory(f"{path}: {TOO_LARGE}"):
            model, info = model_class.from_pretrained(path, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        raise InputError(
            f"no model could be loaded from {path} as {model_class.__name__}: {first_line(error)}"
        ) from error
    missing = {name for name in info["missing_keys"] if not any(re.search(pattern, name) for pattern in computed)}
    if not needs_head:
        head = model.get_output_embeddings()
        names = [name for name, module in model.named_modules() if module is head]
        missing -= {f"{name}.{own}" for name in names for own, _ in head.named_parameters()}
    if missing:
        raise InputError(
            f"{path} lacks weights of {type(model).__name__}, which would start at random: "
            + ", ".join(sorted(missing)[:5])
        )
    return model.eval()
