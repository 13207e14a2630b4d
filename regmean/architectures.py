"""Classes of transformers that read a model folder, and the stored tensors that make up each parameter, found with
transformers' own conversion of names and shapes.

Conversions join, split and reorder tensors by rows: all but the last dimension, or a vector's elements. They are run
on row numbers instead of weights, which shows where each row of a parameter is stored. Those that exchange the last two
dimensions of a tensor are apart.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from inspect import signature
from itertools import chain
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)
from transformers.initialization import no_init_weights

from common.errors import InputError
from common.models import base_config, load_model
from regmean.experts import parameter_of
from regmean.model_folder import Checkpoint
from regmean.slices import slice_name
from regmean.tensor_file import JoinedTensor, TensorInfo, TransposedTensor, decode

# Auto classes of encoders, by the end of the name of the class that wrote the folder. Others are built without a head.
ENCODERS = {
    "ForMaskedLM": AutoModelForMaskedLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
    "ForPreTraining": AutoModelForPreTraining,
}


def auto_class(checkpoint: Checkpoint, config: PretrainedConfig) -> Any:
    """The auto class that builds a model: a causal language model, also of images, or an encoder.

    Raises:
        InputError: the model is neither.
    """
    kind = f"--model {checkpoint.name}: a {config.model_type} model"
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{kind} has an encoder and a decoder; causal language models and text encoders have Grams")
    written_by = next(iter(config.architectures or ()), "")
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        causal = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__ if is_causal else ""
        # Some configs name no class; the tensors then show a language model's head.
        has_head = any(re.search(r"\bpredictions\.|lm_head|pred_layer", name) for name in checkpoint.tensors)
        if not causal or (written_by != causal and (written_by or not has_head)):
            return next((of_end for end, of_end in ENCODERS.items() if written_by.endswith(end)), AutoModel)
    elif not is_causal and _reads_text_alone(config):
        return AutoModelForImageTextToText
    elif not is_causal and type(config).__module__.startswith("transformers."):
        raise InputError(f"{kind} is no causal language model and no text encoder, and has no Grams of texts")
    return AutoModelForCausalLM


def _reads_text_alone(config: PretrainedConfig) -> bool:
    """True for models of images and text whose first argument is token ids; of others it is an image."""
    model_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    return model_class is not None and list(signature(model_class.forward).parameters)[1] == "input_ids"


def config_of(checkpoint: Checkpoint, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a model as transformers reads it, untied where an adapter unties the output head.

    Raises:
        InputError: transformers cannot read it.
    """
    config = base_config(str(checkpoint.folder), trust_remote_code=trust_remote_code)
    if checkpoint.untied:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return config


def load_updated(checkpoint: Checkpoint, model_class: Any, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """Load a model with all of its weights but those of an output head apart, which may be missing.

    Raises:
        InputError: weights are missing, or an adapter changes some that the class does not have.
    """
    changed, used = checkpoint.changed(), set()
    options |= {"config": config} if checkpoint.untied else {}
    # An adapter stored beside the weights is not part of the model; this folder has none.
    options |= {"needs_head": False, "adapter_kwargs": {"subfolder": "no adapter"}}
    model = load_model(model_class, str(checkpoint.folder), **options)
    state = model.state_dict() if changed else {}
    for name, info in parameter_tensors(model, checkpoint.tensors).items() if changed else ():
        parts = {info.name, *(part.name for part, _, _ in getattr(info, "parts", ()))}
        if parts & changed:
            state[name].copy_(torch.from_numpy(decode(info.read(), info.dtype)).view(state[name].shape))
            used |= parts
    if unused := sorted(changed - used):
        raise InputError(f"model {checkpoint.name} changes {unused[0]}, which {type(model).__name__} does not have")
    return model


def build_on_meta(checkpoint: Checkpoint) -> PreTrainedModel | None:
    """Build the model of a folder as shapes without data; None if transformers has no class for it."""
    try:
        config = config_of(checkpoint)
        with torch.device("meta"), no_init_weights():
            return auto_class(checkpoint, config).from_config(config)
    except Exception:  # model code may raise anything on an unknown config
        return None


def parameter_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """The parameter that transformers reads each stored name into, and the pattern of its conversion if it has one."""
    state, transforms, found = model.state_dict(), get_model_conversion_mapping(model), {}
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    for stored in names:
        found[stored] = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
        if found[stored][0] not in state and stored in state:
            found[stored] = rename_source_key(stored, [], [], model.base_model_prefix, state)
    return found


def parameter_rows(model: PreTrainedModel, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name of each parameter made of stored tensors, and the number of the stored row for each of its rows.

    Stored rows are numbered across all tensors in order, see `_row_starts`. A parameter is left out if conversion
    changes more than the order of rows.
    """
    state, starts = model.state_dict(), dict(zip(tensors, _row_starts(tensors.values()), strict=False))
    for name, transform, sources in _conversions(model, state, tensors):
        numbers = {stored: starts[stored] + np.arange(_row_count(tensors[stored].shape)) for stored, _ in sources}
        if operation := _transposition(transform):
            (stored,) = numbers
            if operation.check_dims and tensors[stored].shape == tuple(state[name].shape):
                yield name, numbers[stored]
            continue
        for stored, pattern in sources:
            rows = torch.from_numpy(numbers[stored]).reshape(_row_shape(tensors[stored].shape))
            transform.add_tensor(name, stored, pattern or stored, rows)
        try:
            converted = transform.convert(name, model=model, config=model.config)
        except Exception:  # an operation that does not take rows of one element
            continue
        for parameter, values in converted.items():
            values = values[0] if isinstance(values, list) else values
            if parameter in state and values.shape == _row_shape(state[parameter].shape):
                yield parameter, values.numpy().reshape(-1)


def transposed_tensors(model: PreTrainedModel, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """The stored tensor of each parameter that is stored with its last two dimensions exchanged."""
    state, found = model.state_dict(), {}
    for name, transform, sources in _conversions(model, state, tensors):
        stored, shape = sources[0][0], tuple(state[name].shape)
        if _transposition(transform) and tensors[stored].shape == (*shape[:-2], *shape[:-3:-1]) != shape:
            found[name] = stored
    return found


def _conversions(
    model: PreTrainedModel, state: Collection[str], tensors: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, WeightTransform, list[tuple[str, str | None]]]]:
    """Yield the name of a parameter, the conversion to it, and the stored names that it is made of with their patterns
    of the conversion.
    """
    converters = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    sources: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
    for stored, (name, pattern) in parameter_names(model, sorted(tensors, key=dot_natural_key)).items():
        if name in state:
            sources[name].append((stored, pattern))
    for name, of_parameter in sources.items():
        stored, pattern = of_parameter[0]
        yield name, WeightRenaming(stored, name) if pattern is None else deepcopy(converter_of[pattern]), of_parameter


def _transposition(transform: WeightTransform) -> Transpose | None:
    """The operation of a conversion that exchanges two dimensions of a tensor and does no more."""
    operations = getattr(transform, "operations", None) or [None]
    return operations[0] if len(operations) == 1 and isinstance(operations[0], Transpose) else None


def layer_tensors(
    name: str, model: PreTrainedModel, layers: Iterable[str], optional: set[str], tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, set[str]], set[str]]:
    """Match linear layers with stored tensors of the model `name`.

    Returns:
        The layers of each stored tensor that holds only weights of linear layers, or of each slice of a tensor that
        holds all experts; and the `optional` layers that are not stored.

    Raises:
        InputError: the weight of a layer that is not optional is not found.
    """
    names, infos, starts = list(tensors), list(tensors.values()), _row_starts(tensors.values())
    left: Counter[str] = Counter()
    owners: dict[str, set[str]] = defaultdict(set)
    parameters, missing = model.state_dict(), defaultdict(list)
    for layer in layers:
        weight = f"{layer}.weight"
        missing[weight if weight in parameters else parameter_of(layer)].append(layer)
    for parameter, rows in parameter_rows(model, tensors):
        sharing = missing.pop(parameter, [])
        for layer, own in zip(sharing, np.split(rows, len(sharing)) if sharing else (), strict=True):
            found, firsts, counts = np.unique(
                np.searchsorted(starts, own, "right") - 1, return_index=True, return_counts=True
            )
            for index, first, count in zip(found.tolist(), firsts.tolist(), counts.tolist(), strict=True):
                stored, size = names[index], _row_count(infos[index].shape)
                if len(infos[index].shape) > 2:
                    size //= infos[index].shape[0]
                    stored = slice_name(stored, int(own[first] - starts[index]) // size)
                owners[stored].add(layer)
                left[stored] = left.get(stored, size) - count
    for parameter, stored in transposed_tensors(model, tensors).items():
        sharing = missing.pop(parameter, [])
        for number, layer in enumerate(sharing):
            owners[stored if len(tensors[stored].shape) == 2 else slice_name(stored, number)].add(layer)
    lost = [layer for sharing in missing.values() for layer in sharing if layer not in optional]
    if lost:
        listed = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise InputError(
            f"--model {name}: no tensors of its files were found for layers of {type(model).__name__}: {listed}; "
            f"load it with transformers {transformers.__version__}, save it, and take the saved folder"
        )
    return {stored: theirs for stored, theirs in owners.items() if not left[stored]}, set(chain(*missing.values()))


def parameter_tensors(model: PreTrainedModel, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The stored tensor of each parameter of `model`, by name, joined from the parts of tensors that it consists of."""
    infos, starts, shapes = list(tensors.values()), _row_starts(tensors.values()), model.state_dict()
    found: dict[str, TensorInfo] = {}
    for name, rows in parameter_rows(model, tensors):
        shape = tuple(shapes[name].shape)
        info = _joined(TensorInfo(infos[0].path, name, "", shape, 0), rows, infos, starts) if rows.size else None
        if info is not None:
            found[name] = info
    turned = transposed_tensors(model, tensors).items()
    return found | {name: TransposedTensor.of(tensors[stored]) for name, stored in turned}


def in_layout_of(first: Checkpoint, other: Checkpoint, model: PreTrainedModel) -> tuple[Checkpoint, set[str]]:
    """Rename and reshape the tensors of `other` as in `first`, where both store the same parameters of `model`; also
    return the names in either that are not parameters of `model`.
    """
    own_infos, infos = list(first.tensors.values()), list(other.tensors.values())
    own_starts, starts = _row_starts(own_infos), _row_starts(infos)
    place = np.full(own_starts[-1], -1)  # row of `other` for each row of `first`
    own, theirs = (dict(parameter_rows(model, checkpoint.tensors)) for checkpoint in (first, other))
    for name in own.keys() & theirs.keys():
        place[own[name]] = theirs[name]
    tensors, taken = {}, set()
    for info, rows in zip(own_infos, np.split(place, own_starts[1:-1]), strict=True):
        joined = _joined(info, rows, infos, starts) if rows.size and rows.min() >= 0 else None
        if joined is not None:
            tensors[info.name] = joined
            taken |= _names(rows, infos, starts)
    turned = [transposed_tensors(model, checkpoint.tensors) for checkpoint in (first, other)]
    if turned[0].keys() != turned[1].keys():
        tensors |= _turned(turned[0], *(parameter_tensors(model, of.tensors) for of in (first, other)))
        taken |= set(turned[1].values())
    tensors |= {name: info for name, info in other.tensors.items() if name not in taken and name not in tensors}
    used = {name for rows in own.values() for name in _names(rows, own_infos, own_starts)}
    used |= {name for rows in theirs.values() for name in _names(rows, infos, starts)}
    used |= {name for found in turned for name in found.values()}
    return replace(other, tensors=tensors), {*first.tensors, *other.tensors} - used


def _turned(
    own_turned: dict[str, str], own: dict[str, TensorInfo], theirs: dict[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """Tensors of parameters that one of two models stores with the last two dimensions exchanged, as the first does."""
    found = {stored: TransposedTensor.of(theirs[name]) for name, stored in own_turned.items() if name in theirs}
    others = [name for name, info in theirs.items() if isinstance(info, TransposedTensor) and name in own]
    return found | {own[name].name: theirs[name] for name in others if name not in own_turned}


def _names(rows: np.ndarray, infos: list[TensorInfo], starts: np.ndarray) -> set[str]:
    """Names of the tensors that contain these rows."""
    return {infos[index].name for index in np.unique(np.searchsorted(starts, rows, "right") - 1)}


def _joined(info: TensorInfo, rows: np.ndarray, stored: list[TensorInfo], starts: np.ndarray) -> TensorInfo | None:
    """Join `rows` into a tensor of the shape of `info`; None if the stored tensors differ in dtype or width."""
    owner = np.searchsorted(starts, rows, "right") - 1
    firsts = np.concatenate([[0], np.flatnonzero((np.diff(rows) != 1) | (np.diff(owner) != 0)) + 1])
    width = info.size // len(rows)
    parts = []
    for begin, end in zip(firsts, [*firsts[1:], len(rows)], strict=True):
        source, row = stored[owner[begin]], rows[begin] - starts[owner[begin]]
        parts.append((source, int(row) * width, int(row + end - begin) * width))
    sources = {source.name: source for source, _, _ in parts}.values()
    dtypes = {source.dtype for source in sources}
    # Of a tensor's parts, an adapter may have updated some.
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else "F32"
    if not dtypes <= {dtype, "BF16", "F16"} or any(
        source.size != _row_count(source.shape) * width for source in sources
    ):
        return None
    if len(parts) == 1 and parts[0][0].shape == info.shape:
        return parts[0][0]
    return JoinedTensor(parts[0][0].path, info.name, dtype, info.shape, 0, tuple(parts))


def _row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], 1) if len(shape) > 1 else tuple(shape)


def _row_count(shape: tuple[int, ...]) -> int:
    return int(np.prod(_row_shape(shape), dtype=np.int64))


def _row_starts(tensors: Iterable[TensorInfo]) -> np.ndarray:
    """Number of the first row of each tensor, and the number of all rows."""
    return np.cumsum([0, *(_row_count(info.shape) for info in tensors)])
