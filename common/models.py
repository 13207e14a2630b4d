"""Hugging Face models, tokenizers and configs, from a hub id or a local folder: whole, or a clear error."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from common.errors import InputError, first_line
from common.io import read_shard_index


def base_config(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a hub id or local folder, without its weights.

    Raises:
        InputError: there is none.
    """
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged config raises whatever its readers stumble over
        raise InputError(f"no model config could be loaded from {path}: {first_line(error)}") from error


def load_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or local folder.

    Raises:
        InputError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged tokenizer raises whatever its readers stumble over
        raise InputError(f"no tokenizer could be loaded from {path}: {first_line(error)}") from error


def load_model(model_class: Any, path: str, needs_head: bool = True, **options: Any) -> PreTrainedModel:
    """A model in eval mode, all of whose weights were found.

    Args:
        model_class: a class of transformers, or an auto class.
        path: hub id or local folder.
        needs_head: whether an output head of its own must have been found, too.
        options: of `from_pretrained`.

    Raises:
        InputError: `path` holds no such model, or lacks some of its weights, which would start at random.
    """
    for index in Path(path).glob("*.index.json"):
        # transformers itself would follow an index out of the model's folder.
        read_shard_index(index)
    try:
        model, info = model_class.from_pretrained(path, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        raise InputError(
            f"no model could be loaded from {path} as {model_class.__name__}: {first_line(error)}"
        ) from error
    missing = set(info["missing_keys"])
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
