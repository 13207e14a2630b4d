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
    except Exception as error:  # a damaged file raises whatever its readers stumble over
        raise InputError(f"no {what} could be loaded from {path}: {first_line(error)}") from error


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
