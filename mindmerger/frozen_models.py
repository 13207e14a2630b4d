"""Loading of the two frozen models from hub ids or local folders, by their configs, and the encoder's masks."""

import copy
import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence
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

from common.errors import InputError, first_line
from common.models import base_config, load_model, model_on_meta
from mindmerger.packing import are_close

if TYPE_CHECKING:
    from mindmerger.config import ModelPair

# Forms in which an encoder gets the mask of a padded batch; see `find_masking`.
Masking = Literal["causal", "additive", "padding", "alone"]
# LLMs that keep their states in a cache class of their own, or in their modules.
_OWN_CACHE = ("minimax", "recurrent_gemma", "xlstm")
# Rotary positions that change their frequencies for all rows of a batch once one is longer than a limit.
_SWITCHING_ROPES = ("dynamic", "longrope")


def load_llm(path: str, revision: str | None, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """Load a causal language model, in eval mode.

    Raises:
        InputError: `path` has no such model, or not all of its weights.
    """
    return load_model(AutoModelForCausalLM, path, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)


def check_llm(models: "ModelPair") -> None:
    """Raise InputError for an LLM that is unsupported by its config; `probe.py` tests the loaded model.

    Raises:
        InputError: the LLM takes no `inputs_embeds`, needs token ids beside them, or has a cache class of its own.
    """
    config = base_config(models.llm_path, models.llm_revision, models.trust_remote_code)
    named = f"{models.llm_path} (model type {config.model_type})"
    if getattr(config.get_text_config(), "hidden_size_per_layer_input", 0):
        raise InputError(f"{named} embeds token ids in each layer, and mapped states have no ids: use another LLM")
    llm_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if llm_class is None:
        return
    if "inputs_embeds" not in inspect.signature(llm_class.forward).parameters:
        raise InputError(f"{named} takes token ids only, no embeddings: use another LLM")
    if config.model_type in _OWN_CACHE or cache_name(llm_class) is None:
        raise InputError(f"{named} does not keep its states in a cache class of transformers: use another LLM")


@functools.cache
def cache_name(llm_class: type[PreTrainedModel]) -> str | None:
    """Name of the cache argument of a class of LLMs, which differs for recurrent ones; None if it has none."""
    parameters = inspect.signature(llm_class.forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in parameters), None)


def check_context(models: "ModelPair", tokens: int) -> None:
    """Raise InputError if sequences of `tokens` exceed the LLM's positions.

    Rotary positions have no limit, except those that switch to other frequencies (Phi-3), where one long row would
    change all rows of its batch. For other positions the limit is the config's: most are tables of that size (GPT-2),
    and a longer row would fail in the middle of a run.

    Raises:
        InputError: the sequences are too long; the message names the flags that shorten rows.
    """
    config = base_config(models.llm_path, models.llm_revision, models.trust_remote_code).get_text_config()
    limit, ropes = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
    # The config has one for all layers, or one for each type of layer.
    each = [ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]
    switching = [rope for rope in each if rope.get("rope_type") in _SWITCHING_ROPES]
    flags = "lower --max_seq_len, --max_prompt_len or --max_gen_len"
    for rope in switching:
        switch = rope.get("original_max_position_embeddings") or limit
        if switch and switch < tokens:
            raise InputError(
                f"the longest row has {tokens} tokens, and {models.llm_path} computes other positions for all rows of "
                f"a batch if one has more than {switch}: {flags}"
            )
    if limit and 0 < limit < tokens and not ropes:
        raise InputError(f"the longest row has {tokens} tokens, and {models.llm_path} has {limit} positions: {flags}")


def is_decoder_only(config: PretrainedConfig) -> bool:
    """True if a multilingual model is a causal language model, whose states depend on preceding tokens only."""
    return (
        not config.is_encoder_decoder
        and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    )


def check_encoder_layer(layer: int, path: str, config: PretrainedConfig) -> None:
    """Raise InputError unless a model of this config can be cut to `layer` layers."""
    if not is_decoder_only(config):
        raise InputError(f"--encoder_layer is for decoder-only models, and {path} is not one: leave it out")
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
    """Load a multilingual model as an encoder, in eval mode; of an encoder-decoder, only the encoder is loaded.

    The config decides the kind: encoder-decoder (mT5, NLLB, M2M100, ...), encoder-only (XLM-R, ...), or decoder-only,
    whose last hidden states are used.

    Args:
        path, revision: hub id or local folder, and its revision.
        dtype: dtype of the weights.
        trust_remote_code: True to run code from the model's repository.
        layers: number of first layers to keep of a decoder-only model, before its final norm; None for all.

    Raises:
        InputError: `path` has no such model, or not all of the encoder's weights.
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
        raise InputError(f"{path}: encoders of type {config.model_type!r} are not supported")
    return _load_half(path, config, own_config, options)


def _load_half(
    path: str, config: PretrainedConfig, own_config: PretrainedConfig, options: dict[str, Any]
) -> PreTrainedModel:
    """The encoder of a model of two halves, by the encoder's own class, for which there is no auto class."""
    # The class alone is needed: no memory, no random weights, and none of ZeRO-3's partitions.
    with torch.device("meta"), no_init_weights():
        whole = MODEL_MAPPING[type(config)](copy.deepcopy(config))
    encoder_class = type(whole.get_encoder())
    if not issubclass(encoder_class, PreTrainedModel):
        raise InputError(f"{path}: encoders of type {config.model_type!r} cannot be loaded alone")
    prefix = rf"^((model|{whole.base_model_prefix})\.)?"
    renamed = {rf"{prefix}(text_)?encoder\.": "", rf"{prefix}shared\.": "embed_tokens."}
    # Computed tensors, as Marian's table of sinusoids, are in no file. Private: transformers lists them only there.
    computed = [re.sub(r"^model\.encoder\.", "", name) for name in whole._keys_to_ignore_on_load_missing or ()]
    return load_model(encoder_class, path, config=own_config, key_mapping=renamed, computed=computed, **options)


def encoder_config(config: PretrainedConfig) -> PretrainedConfig:
    """Config of a multilingual model's encoder, which in some families (T5Gemma) is a part of the model's."""
    return (getattr(config, "encoder", None) or config) if config.is_encoder_decoder else config


def cut_layers(layers: int, path: str, config: PretrainedConfig) -> None:
    """Edit the config of a decoder-only model so that it has only `layers` layers."""
    check_encoder_layer(layers, path, config)
    text_config = config.get_text_config()
    # Configs with an older name map this one to it.
    text_config.num_hidden_layers = layers
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = text_config.layer_types[:layers]


def without_pooling(config: PretrainedConfig) -> dict[str, bool]:
    known = MODEL_MAPPING.get(type(config), None)
    # A few families have two classes.
    has_pooling = isinstance(known, type) and "add_pooling_layer" in inspect.signature(known).parameters
    return {"add_pooling_layer": False} if has_pooling else {}


def encoder_shape(models: "ModelPair") -> tuple[int, int | None]:
    """Width of the encoder's states, and number of its learned positions (or None), from its config only."""
    path = models.mt_path
    config = base_config(path, models.mt_revision, models.trust_remote_code)
    if models.encoder_layer is not None:
        cut_layers(models.encoder_layer, path, config)
    whole = model_on_meta(AutoModel, path, config, trust_remote_code=models.trust_remote_code)
    encoder = whole.get_encoder() if config.is_encoder_decoder else whole
    own_config = encoder_config(config).get_text_config()
    try:
        width = encoder(input_ids=torch.zeros(1, 8, dtype=torch.long, device="meta")).last_hidden_state.shape[-1]
    except Exception:  # some models read values, which meta tensors do not have
        width = own_config.hidden_size
    tables = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in encoder.named_modules()
        if isinstance(module, torch.nn.Embedding) and name.endswith(("position_embeddings", "embed_positions", "wpe"))
    ]
    limit = getattr(own_config, "max_position_embeddings", None)
    # Some tables have a few more rows than positions.
    return width, min([*tables, limit or tables[0]]) if tables else None


def llm_width(models: "ModelPair") -> int:
    """Width of the LLM's embeddings, from its config only; its hidden states may be wider (OPT-350m)."""
    config = base_config(models.llm_path, models.llm_revision, models.trust_remote_code)
    options = {"trust_remote_code": models.trust_remote_code}
    llm = model_on_meta(AutoModelForCausalLM, models.llm_path, config, **options)
    return llm.get_input_embeddings().weight.shape[1]


def find_masking(
    encoder: PreTrainedModel,
    pad_id: int,
    forms: Sequence[Masking] = ("causal", "additive", "padding", "alone"),
) -> Masking:
    """Find the first form of mask under which padding changes no state of two short sources, by running the encoder.

    A causal encoder needs no mask, since padding is on the right. Most others take an additive 4-D mask, which
    transformers uses as it is; from a 2-D mask it reads a value, for which the host waits. If every mask fails
    (CANINE), sources are encoded one at a time.

    Args:
        encoder: encoder in eval mode.
        pad_id: padding id of the sources.
        forms: forms to try, in this order.

    Raises:
        InputError: the encoder cannot run, or its states of a source differ between two runs.
    """
    count = getattr(encoder.config.get_text_config(), "vocab_size", None) or 1024
    ids = 3 + torch.arange(8, device=encoder.device) * ((count - 3) // 8)
    sources = [ids[:5], ids[5:]]
    padded = torch.full((2, 16), pad_id, device=encoder.device)
    mask = torch.zeros_like(padded)
    for row, source in enumerate(sources):
        padded[row, : len(source)], mask[row, : len(source)] = source, 1
    with torch.no_grad():
        # Families raise different errors for arguments that they do not take.
        try:
            alone = [encoder(input_ids=source[None]).last_hidden_state[0] for source in sources]
        except Exception as error:
            raise InputError(f"the encoder {encoder.name_or_path} cannot run: {first_line(error)}") from error
        for masking in forms:
            if masking == "causal" and not is_decoder_only(encoder.config):
                continue
            try:
                states = encode(encoder, padded, mask, masking)
            except Exception:
                continue
            if all(are_close(states[row, : len(own)], own) for row, own in enumerate(alone)):
                return masking
    raise InputError(
        f"the encoder {encoder.name_or_path} ({type(encoder).__name__}) gives different states for the same source in "
        "two runs: use another encoder"
    )


def encode(
    encoder: PreTrainedModel, source_ids: torch.Tensor, source_mask: torch.Tensor, masking: Masking = "padding"
) -> torch.Tensor:
    """Compute the encoder's last states, [rows, columns, mt_hidden_size].

    Args:
        encoder: encoder from `load_encoder`.
        source_ids, source_mask: [rows, columns], padded on the right.
        masking: form of the mask; "alone" encodes sources one at a time, without a mask.
    """
    if masking == "alone":
        lengths = source_mask.sum(dim=1).tolist()
        rows = [ids[None, :length] for ids, length in zip(source_ids, lengths, strict=True)]
        return pad_sequence([encoder(input_ids=row).last_hidden_state[0] for row in rows], batch_first=True)
    if masking == "causal":
        # Without a cache, transformers would read the positions to detect packed sequences.
        arguments = {"past_key_values": DynamicCache(config=encoder.config.get_text_config()), "use_cache": True}
    elif masking == "additive":
        hidden = (1 - source_mask[:, None, None]).to(encoder.dtype)
        arguments = {"attention_mask": hidden * torch.finfo(encoder.dtype).min}
    else:
        arguments = {"attention_mask": source_mask}
    return encoder(input_ids=source_ids, **arguments).last_hidden_state


def recompute_layers(llm: PreTrainedModel) -> None:
    """Recompute the LLM's layers in the backward pass instead of keeping their activations.

    `gradient_checkpointing_enable` has no effect in eval mode, in which the LLM stays.

    Raises:
        InputError: the LLM has no layers of transformers' `GradientCheckpointingLayer`.
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
