"""The two frozen models, loaded from a hub id or a local folder and told apart by their configs."""

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
from transformers.modeling_layers import GradientCheckpointingLayer

from common.errors import InputError, first_line
from common.models import base_config, load_model, model_on_meta
from mindmerger.packing import are_close

if TYPE_CHECKING:
    from mindmerger.config import ModelPair

# How an encoder is given the mask of a padded batch; see `find_masking`.
Masking = Literal["causal", "additive", "padding", "alone"]
# LLMs that keep their states in a cache of a class of their own, or in their modules.
_OWN_CACHE = ("minimax", "recurrent_gemma", "xlstm")
# Rotary positions that turn otherwise from some position on, and then for all tokens of a batch.
_SWITCHING_ROPES = ("dynamic", "longrope")


def load_llm(path: str, revision: str | None, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """A causal language model, in eval mode.

    Raises:
        InputError: `path` holds none, or not all of its weights.
    """
    return load_model(AutoModelForCausalLM, path, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)


def check_llm(models: "ModelPair") -> None:
    """Refuse an LLM that cannot be served, as far as its config tells; `probe.py` tries the rest on the model.

    Raises:
        InputError: it takes no embeddings, or none but those of tokens, or no cache of transformers.
    """
    config = base_config(models.llm_path, models.llm_revision, models.trust_remote_code)
    named = f"{models.llm_path} (model type {config.model_type})"
    if getattr(config.get_text_config(), "hidden_size_per_layer_input", 0):
        raise InputError(f"{named} embeds token ids anew in each layer, and a mapped state has none: take another LLM")
    llm_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if llm_class is None:
        return
    if "inputs_embeds" not in inspect.signature(llm_class.forward).parameters:
        raise InputError(f"{named} reads token ids alone, no embeddings: take another LLM")
    if config.model_type in _OWN_CACHE or cache_name(llm_class) is None:
        raise InputError(f"{named} does not keep its states in a cache of transformers' own: take another LLM")


@functools.cache
def cache_name(llm_class: type[PreTrainedModel]) -> str | None:
    """The name by which a class of LLMs is given its cache: recurrent ones have another; None for none."""
    parameters = inspect.signature(llm_class.forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in parameters), None)


def check_context(models: "ModelPair", tokens: int) -> None:
    """Refuse sequences of `tokens` to an LLM with a table of fewer positions, as GPT-2.

    Rotary positions go on beyond what was trained, for what that is worth, except those that switch to other
    frequencies, as Phi-3's: rows beyond would change all rows of their batch. Any others are taken to end at the
    config's limit, since most do, and would fail in the middle of a run.

    Raises:
        InputError: it has fewer; the message names the flags that shorten rows.
    """
    config = base_config(models.llm_path, models.llm_revision, models.trust_remote_code).get_text_config()
    limit, ropes = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
    # One for all layers, or one for each type of layer.
    each = [ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]
    switching = [rope for rope in each if rope.get("rope_type") in _SWITCHING_ROPES]
    flags = "lower --max_seq_len, --max_prompt_len or --max_gen_len"
    for rope in switching:
        switch = rope.get("original_max_position_embeddings") or limit
        if switch and switch < tokens:
            raise InputError(
                f"the longest row takes {tokens} tokens, and {models.llm_path} reads all rows of a batch otherwise "
                f"where one has more than {switch}: {flags}"
            )
    if limit and 0 < limit < tokens and not ropes:
        raise InputError(
            f"the longest row takes {tokens} tokens, and {models.llm_path} knows {limit} positions: {flags}"
        )


def is_decoder_only(config: PretrainedConfig) -> bool:
    """True if a multilingual model is a causal language model: each state has seen only what stands before it."""
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
    whole = model_on_meta(AutoModel, path, config)
    encoder_class = type(whole.get_encoder())
    if not issubclass(encoder_class, PreTrainedModel):
        raise InputError(f"{path}: the encoder of the type {config.model_type!r} cannot be loaded by itself")
    prefix = rf"^((model|{whole.base_model_prefix})\.)?"
    renamed = {rf"{prefix}encoder\.": "", rf"{prefix}shared\.": "embed_tokens."}
    # No file holds what the whole model computes, as Marian's table of sinusoids.
    computed = [re.sub(r"^model\.encoder\.", "", name) for name in whole._keys_to_ignore_on_load_missing or ()]
    return load_model(encoder_class, path, config=own_config, key_mapping=renamed, computed=computed, **options)


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
    # Of a few families there are two classes.
    has_pooling = isinstance(known, type) and "add_pooling_layer" in inspect.signature(known).parameters
    return {"add_pooling_layer": False} if has_pooling else {}


def encoder_shape(models: "ModelPair") -> tuple[int, int | None]:
    """Width of the encoder's states, and how many positions its table has, None without one, by its config alone."""
    path = models.mt_path
    config = base_config(path, models.mt_revision, models.trust_remote_code)
    if models.encoder_layer is not None:
        cut_layers(models.encoder_layer, path, config)
    whole = model_on_meta(AutoModel, path, config, trust_remote_code=models.trust_remote_code)
    encoder = whole.get_encoder() if config.is_encoder_decoder else whole
    own_config = encoder_config(config).get_text_config()
    try:
        width = encoder(input_ids=torch.zeros(1, 8, dtype=torch.long, device="meta")).last_hidden_state.shape[-1]
    except Exception:  # some read values, which shapes have none of
        width = own_config.hidden_size
    tables = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in encoder.named_modules()
        if isinstance(module, torch.nn.Embedding) and name.endswith(("position_embeddings", "embed_positions", "wpe"))
    ]
    limit = getattr(own_config, "max_position_embeddings", None)
    # Some tables have a few rows more than are counted.
    return width, min([*tables, limit or tables[0]]) if tables else None


def llm_width(models: "ModelPair") -> int:
    """Width of the LLM's embeddings, by its config alone; its hidden states may be wider, as OPT-350m's."""
    config = base_config(models.llm_path, models.llm_revision, models.trust_remote_code)
    options = {"trust_remote_code": models.trust_remote_code}
    llm = model_on_meta(AutoModelForCausalLM, models.llm_path, config, **options)
    return llm.get_input_embeddings().weight.shape[1]


def find_masking(
    encoder: PreTrainedModel,
    pad_id: int,
    forms: Sequence[Masking] = ("causal", "additive", "padding", "alone"),
) -> Masking:
    """The first form of mask under which padding changes no state of two short sources, tried on the encoder itself.

    A causal encoder needs none, since padding stands on the right. Most others take an additive 4-D mask, which
    transformers returns unread where it reads a value of a 2-D one, for which the host waits. Where every mask fails,
    as CANINE's, sources are read one at a time.

    Args:
        encoder: in eval mode.
        pad_id: pads the sources.
        forms: those to try.

    Raises:
        InputError: the encoder cannot run, or its states of a source differ from one time to the next.
    """
    count = getattr(encoder.config.get_text_config(), "vocab_size", None) or 1024
    ids = 3 + torch.arange(8, device=encoder.device) * ((count - 3) // 8)
    sources = [ids[:5], ids[5:]]
    padded = torch.full((2, 5), pad_id, device=encoder.device)
    mask = torch.zeros_like(padded)
    for row, source in enumerate(sources):
        padded[row, : len(source)], mask[row, : len(source)] = source, 1
    with torch.no_grad():
        # Each family refuses what it does not take in its own way.
        try:
            alone = [encoder(input_ids=source[None]).last_hidden_state[0] for source in sources]
        except Exception as error:
            raise InputError(f"the encoder {encoder.name_or_path} cannot run: {first_line(error)}") from error
        for masking in forms:
            try:
                states = encode(encoder, padded, mask, masking)
            except Exception:
                continue
            if all(are_close(states[row, : len(own)], own) for row, own in enumerate(alone)):
                return masking
    raise InputError(
        f"the encoder {encoder.name_or_path} ({type(encoder).__name__}) gives a source other states from one time to "
        "the next: take another"
    )


def encode(
    encoder: PreTrainedModel, source_ids: torch.Tensor, source_mask: torch.Tensor, masking: Masking = "padding"
) -> torch.Tensor:
    """The encoder's last states, [rows, columns, mt_hidden_size].

    Args:
        encoder: as `load_encoder` gives it.
        source_ids, source_mask: [rows, columns], padded on the right.
        masking: the form in which the encoder is given the mask; alone: sources one at a time, without any.
    """
    if masking == "alone":
        lengths = source_mask.sum(dim=1).tolist()
        rows = [ids[None, :length] for ids, length in zip(source_ids, lengths, strict=True)]
        return pad_sequence([encoder(input_ids=row).last_hidden_state[0] for row in rows], batch_first=True)
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
