"""A model's config, from a hub id or a local folder, without its weights."""

from transformers import AutoConfig, PretrainedConfig

from common.errors import InputError, first_line


def base_config(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a hub id or local folder, without its weights.

    Raises:
        InputError: there is none.
    """
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged config raises whatever its readers stumble over
        reason = first_line(error) or type(error).__name__
        raise InputError(f"no model config could be loaded from {path}: {reason}") from error
