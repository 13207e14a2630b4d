"""The two frozen models, loaded from a hub id or a local folder and told apart by their configs."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.checkpoint import checkpoint
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTextEncoding,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer

from common.errors import InputError
from common.models import base_config, load_model
from mindmerger.packing import are_close

if TYPE_CHECKING:
    from mindmerger.config import ModelPair

# How an encoder is given the mask of a padded batch; see `find_masking`.
Masking = Literal["causal", "additive", "padding"]


def load_llm(path: str, revision: str | None, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """A causal language model, in eval mode.

    Raises:
        InputError: `path` holds none, or not all of its weights.
    """
    return load_model(AutoModelForCausalLM, path, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)


def check_context(models: "ModelPair", tokens: int) -> None:
    """Refuse sequences of `tokens` to an LLM with a table of fewer positions, as GPT-2.

    Rotary positions go on beyond what was trained, for what that is worth; any others are taken to end at the config's
    limit, since most do, and would fail in the middle of a run.

    Raises:
        InputError: it has fewer; the message names the flags that shorten rows.
    """
    config = base_config(models.llm_path, models.llm_revision, models.trust_remote_code).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit and 0 < limit < tokens and not getattr(config, "rope_parameters", None):
        raise InputError(
            f"the longest row takes {tokens} tokens, and {models.llm_path} knows {limit} positions: lower "
            "--max_seq_len, --max_prompt_len or --max_gen_len"
        )


def is_decoder_only(config: PretrainedConfig) -> bool:
    """Whether a multilingual model is a causal language model: each state has seen only what stands before it."""
    return (
        not config.is_encoder_decoder
        and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    )


def check_encoder_layer(layer: int, path: str, config: PretrainedConfig) -> None:
    """Raise InputError unless the model of this config can end after so many layers."""
    if not is_decoder_only(config):
        raise InputError(f"--encoder_layer is for decoder-only models, and {path} is none: leave it out")
    layers = config.get_text_config().num_hidden_layers
    if not 1 <= layer <= layers:
        raise InputError(f"--encoder_layer {layer} must be from 1 to {layers}, the layers of {path}")


def load_encoder(
    path: str,
    revision: str | None,
    dtype: torch.dtype,
    trust_remote_code: bool,
    layers: int | None = None,
) -> PreTrainedModel:
    """A multilingual model as an encoder, in eval mode: of an encoder-decoder, the encoder alone is read.

    The kind is told by the model's config: encoder-decoder (mT5, NLLB, M2M100, ...), encoder-only (XLM-R, ...),
    or decoder-only, whose last hidden states serve.

    Args:
        path, revision: hub id or local folder.
        dtype: of the weights.
        trust_remote_code: run the code that the model's repository brings.
        layers: of a decoder-only model, how many of its first layers to read; then comes its final norm.

    Raises:
        InputError: `path` holds no such model, or not all of its encoder's weights.
    """
    config = base_config(path, revision, trust_remote_code)
    options: dict[str, Any] = {"revision": revision, "dtype": dtype}
    if layers is not None:
        cut_layers(layers, path, config)
        options["config"] = config
    if not config.is_encoder_decoder:
        options |= without_pooling(config)
        return load_model(AutoModel, path, trust_remote_code=trust_remote_code, **options)
    own_config = encoder_config(config)
    if own_config is config and type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return load_model(AutoModelForTextEncoding, path, trust_remote_code=trust_remote_code, **options)

    if type(config) not in MODEL_MAPPING:
        raise InputError(f"{path}: an encoder of the type {config.model_type!r} is not known here")
    # No auto class reads the encoder half of the other families; their encoders are models of their own.
    # The class alone is wanted: no memory, no random weights, and no ZeRO-3 to hand them to.
    with torch.device("meta"), no_init_weights():
        encoder_class = type(MODEL_MAPPING[type(config)](config).get_encoder())
    renamed = {r"^(model\.)?encoder\.": "", r"^(model\.)?shared\.": "embed_tokens."}
    return load_model(encoder_class, path, config=own_config, key_mapping=renamed, **options)


def encoder_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of a multilingual model's encoder: in some families (T5Gemma) a part of the model's."""
    return (getattr(config, "encoder", None) or config) if config.is_encoder_decoder else config


def cut_layers(layers: int, path: str, config: PretrainedConfig) -> None:
    """Have a decoder-only model of this config end after so many layers."""
    check_encoder_layer(layers, path, config)
    text_config = config.get_text_config()
    # Under this name or an older one that it stands for.
    text_config.num_hidden_layers = layers
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = text_config.layer_types[:layers]


def without_pooling(config: PretrainedConfig) -> dict[str, bool]:
    known = MODEL_MAPPING.get(type(config), None)
    has_pooling = known is not None and "add_pooling_layer" in inspect.signature(known).parameters
    return {"add_pooling_layer": False} if has_pooling else {}


def find_masking(encoder: PreTrainedModel, pad_id: int) -> Masking:
    """The first form of mask under which padding changes no state of two short sources, tried on the encoder itself.

    A causal encoder needs none, since padding stands on the right. Most others take an additive 4-D mask, which
    transformers returns unread where it reads a value of a 2-D one, for which the host waits.

    Args:
        encoder: in eval mode.
        pad_id: pads the sources.
    """
    count = encoder.get_input_embeddings().num_embeddings
    ids = 3 + torch.arange(8, device=encoder.device) * ((count - 3) // 8)
    sources = [ids[:5], ids[5:]]
    with torch.no_grad():
        alone = [encoder(input_ids=source[None]).last_hidden_state[0] for source in sources]
        padded = torch.full((2, 5), pad_id, device=encoder.device)
        mask = torch.zeros_like(padded)
        for row, source in enumerate(sources):
            padded[row, : len(source)], mask[row, : len(source)] = source, 1
        for masking in ("causal", "additive"):
            try:
                states = encode(encoder, padded, mask, masking)
            # Each family refuses a mask that it does not take in its own way.
            except (TypeError, ValueError, RuntimeError, IndexError):
                continue
            if all(are_close(states[row, : len(own)], own) for row, own in enumerate(alone)):
                return masking
    return "padding"


def encode(
    encoder: PreTrainedModel, source_ids: torch.Tensor, source_mask: torch.Tensor, masking: Masking = "padding"
) -> torch.Tensor:
    """The encoder's last states, [rows, columns, mt_hidden_size].

    Args:
        encoder: as `load_encoder` gives it.
        source_ids, source_mask: [rows, columns], padded on the right.
        masking: the form in which the encoder is given the mask.
    """
    if masking == "causal":
        # With an empty cache: without one transformers reads the positions, in search of packed sequences.
        arguments = {"past_key_values": DynamicCache(config=encoder.config.get_text_config()), "use_cache": True}
    elif masking == "additive":
        hidden = (1 - source_mask[:, None, None]).to(encoder.dtype)
        arguments = {"attention_mask": hidden * torch.finfo(encoder.dtype).min}
    else:
        arguments = {"attention_mask": source_mask}
    return encoder(input_ids=source_ids, **arguments).last_hidden_state


def recompute_layers(llm: PreTrainedModel) -> None:
    """Have the LLM's layers computed again in the backward pass, instead of keeping their activations.

    Hugging Face's own switch does nothing in eval mode, in which the LLM stays.

    Raises:
        InputError: the LLM's layers are not transformers' own kind.
    """
    layers = [layer for layer in llm.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(f"--gradient_checkpointing: {type(llm).__name__} has no layers that can be recomputed")
    for layer in layers:
        layer.forward = _recomputed(layer.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
