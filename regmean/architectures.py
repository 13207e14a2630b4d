"""Models as transformers builds them: which class reads a folder, and which of the folder's tensors make up which
parameters, by transformers' own conversion of names and shapes.

Conversions join, split and reorder tensors by rows: all but the last dimension, or a vector's elements. So they are
run on numbers of rows in place of weights, which shows where every row of a parameter is stored.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.initialization import no_init_weights

from common.errors import InputError
from common.models import base_config
from regmean.model_folder import Checkpoint
from regmean.tensor_file import JoinedTensor, TensorInfo

# What encoders are built as, by the end of the name of the class that wrote the folder.
ENCODERS = {
    "ForMaskedLM": AutoModelForMaskedLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
    "Model": AutoModel,
}


def auto_class(name: str, config: PretrainedConfig) -> Any:
    """The auto class that builds the model `name`: a causal language model, or an encoder with or without a head.

    Raises:
        InputError: the model is neither.
    """
    kind = f"--model {name}: a {config.model_type} model"
    if config.is_encoder_decoder:
        raise InputError(f"{kind} has an encoder and a decoder; causal language models and text encoders have Grams")
    written_by = next(iter(config.architectures or ()), "")
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        causal = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__ if is_causal else ""
        found = [of_end for end, of_end in ENCODERS.items() if written_by.endswith(end) and written_by != causal]
        if found:
            return found[0]
    if not is_causal and type(config).__module__.startswith("transformers."):
        raise InputError(f"{kind} is no causal language model and no text encoder, and has no Grams of texts")
    return AutoModelForCausalLM


def build_on_meta(checkpoint: Checkpoint) -> PreTrainedModel | None:
    """The model of a folder as shapes without data; None where transformers has no class for it."""
    try:
        config = base_config(str(checkpoint.folder))
        with torch.device("meta"), no_init_weights():
            return auto_class(checkpoint.name, config).from_config(config)
    except Exception:  # a config of any origin makes a model's code fail in any way
        return None


def parameter_rows(model: PreTrainedModel, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, np.ndarray]]:
    """Of each parameter that stored tensors make up: its name, and of each of its rows the number of the stored row.

    Stored rows are numbered through all tensors in their order, as `_row_starts` has them. A parameter is left out
    where conversion changes more than the order of rows.
    """
    state, starts = model.state_dict(), dict(zip(tensors, _row_starts(tensors.values()), strict=False))
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    sources: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
    for stored in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
        if name not in state and stored in state:
            name, pattern = rename_source_key(stored, [], [], model.base_model_prefix, state)
        if name in state:
            sources[name].append((stored, pattern))
    for name, of_parameter in sources.items():
        stored, pattern = of_parameter[0]
        transform = WeightRenaming(stored, name) if pattern is None else deepcopy(converter_of[pattern])
        for stored, pattern in of_parameter:
            rows = torch.arange(starts[stored], starts[stored] + _row_count(tensors[stored].shape))
            transform.add_tensor(name, stored, pattern or stored, rows.reshape(_row_shape(tensors[stored].shape)))
        try:
            converted = transform.convert(name, model=model, config=model.config)
        except Exception:  # an operation that does not take rows of one element
            continue
        for parameter, values in converted.items():
            values = values[0] if isinstance(values, list) else values
            if parameter in state and values.shape == _row_shape(state[parameter].shape):
                yield parameter, values.numpy().reshape(-1)


def layer_tensors(
    name: str, model: PreTrainedModel, layers: Iterable[str], tensors: Mapping[str, TensorInfo]
) -> dict[str, set[str]]:
    """Of each stored tensor that holds nothing but weights of linear layers: these layers.

    Raises:
        InputError: some layers' weights are not found in the tensors of the model `name`.
    """
    names, starts = list(tensors), _row_starts(tensors.values())
    left = Counter({stored: _row_count(info.shape) for stored, info in tensors.items()})
    owners: dict[str, set[str]] = defaultdict(set)
    missing = {f"{layer}.weight": layer for layer in layers}
    for parameter, rows in parameter_rows(model, tensors):
        if (layer := missing.pop(parameter, None)) is not None:
            found, counts = np.unique(np.searchsorted(starts, rows, "right") - 1, return_counts=True)
            for index, count in zip(found.tolist(), counts.tolist(), strict=True):
                owners[names[index]].add(layer)
                left[names[index]] -= count
    if missing:
        listed = ", ".join(list(missing.values())[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InputError(
            f"--model {name}: no tensors of its files were found for layers of {type(model).__name__}: {listed}; "
            f"load it with transformers {transformers.__version__}, save it, and take the saved folder"
        )
    return {stored: theirs for stored, theirs in owners.items() if not left[stored]}


def in_layout_of(first: Checkpoint, other: Checkpoint, model: PreTrainedModel) -> tuple[Checkpoint, set[str]]:
    """`other` with its tensors under the names and in the shapes of `first`, as far as both store the same parameters
    of `model`; and the names in either that are no parameters of it.
    """
    theirs, starts = list(other.tensors.values()), _row_starts(other.tensors.values())
    own_starts = _row_starts(first.tensors.values())
    place = np.full(own_starts[-1], -1)  # of each row of `first` the row of `other`
    own = dict(parameter_rows(model, first.tensors))
    used = np.zeros(starts[-1], bool)
    for name, rows in parameter_rows(model, other.tensors):
        used[rows] = True
        if name in own:
            place[own[name]] = rows
    tensors, taken = {}, set()
    for start, (name, info) in zip(own_starts, first.tensors.items(), strict=False):
        rows = place[start : start + _row_count(info.shape)]
        joined = _joined(name, info, rows, theirs, starts) if len(rows) and rows.min() >= 0 else None
        if joined is not None:
            tensors[name] = joined
            taken |= {theirs[index].name for index in np.unique(np.searchsorted(starts, rows, "right") - 1)}
    tensors |= {name: info for name, info in other.tensors.items() if name not in taken and name not in tensors}
    own_used = np.zeros(own_starts[-1], bool)
    for rows in own.values():
        own_used[rows] = True
    unused = {info.name for info, start in zip(theirs, starts, strict=False) if not used[start : start + 1].any()}
    unused |= {
        name for name, start in zip(first.tensors, own_starts, strict=False) if not own_used[start : start + 1].any()
    }
    return replace(other, tensors=tensors), unused


def _joined(
    name: str, info: TensorInfo, rows: np.ndarray, stored: list[TensorInfo], starts: np.ndarray
) -> TensorInfo | None:
    """The tensor of `rows`, in the shape of `info`; None where the stored tensors differ in dtype or width."""
    owner = np.searchsorted(starts, rows, "right") - 1
    firsts = np.concatenate([[0], np.flatnonzero((np.diff(rows) != 1) | (np.diff(owner) != 0)) + 1])
    width = info.size // len(rows)
    parts = []
    for begin, end in zip(firsts, [*firsts[1:], len(rows)], strict=True):
        source, row = stored[owner[begin]], rows[begin] - starts[owner[begin]]
        parts.append((source, int(row) * width, int(row + end - begin) * width))
    sources = {source.name: source for source, _, _ in parts}.values()
    if {source.dtype for source in sources} != {stored[owner[0]].dtype} or any(
        source.size != _row_count(source.shape) * width for source in sources
    ):
        return None
    if len(parts) == 1 and parts[0][0].shape == info.shape:
        return parts[0][0]
    return JoinedTensor(parts[0][0].path, name, parts[0][0].dtype, info.shape, 0, tuple(parts))


def _row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], 1) if len(shape) > 1 else tuple(shape)


def _row_count(shape: tuple[int, ...]) -> int:
    return int(np.prod(_row_shape(shape), dtype=np.int64))


def _row_starts(tensors: Iterable[TensorInfo]) -> np.ndarray:
    """The number of each tensor's first row, and that of all rows."""
    return np.cumsum([0, *(_row_count(info.shape) for info in tensors)])
