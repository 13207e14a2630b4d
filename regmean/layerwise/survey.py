"""Check that a model can be run layer by layer, and a survey of its layers: which kinds there are, and which linear
layers in them share an input.

Both come from a small random model of the same config, with two layers of each kind. It is run as a whole and step by
step: a model whose layers exchange more than the hidden states, and arguments that all of them have, differs.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PretrainedConfig, PreTrainedModel

from common.errors import InputError, first_line
from regmean.calibration import Calibration
from regmean.hooks import LinearInputs, linear_layers
from regmean.layerwise.model import (
    BEFORE,
    Batch,
    EndForward,
    LayerwiseModel,
    build_without_weights,
    decoder_layers,
    ending_at,
)
from regmean.token_counts import Table, find_tables

CPU = torch.device("cpu")
TEXTS = [[5, 3, 7, 4, 6, 3, 5], [4, 6, 3, 5, 7, 4, 6], [3, 5, 4, 7]]  # with padding; the first two alone have none
TOLERANCE = 1e-4  # relative difference of the final states
VOCABULARY, FEED_FORWARD = 96, 64  # sizes of the small model
FEED_FORWARD_SIZES = re.compile(r"intermediate_size$|^ffn_(hidden_)?(dim|size)$|^n_inner$|^(decoder|encoder)_ffn_dim$")
TOKEN = re.compile(r"_token_id$|_token_index$")


@dataclass(frozen=True)
class Survey:
    """Findings on a model type.

    Attributes:
        tuple_length: length of the tuple that a layer returns; None if it returns the hidden states alone.
        kinds: number of the kind of each layer.
        groups: for each kind, the linear layers that share an input, by names within the layer, in the order of calls.
        before, after: the same for linear layers before and after the model's layers, by full names.
        irregular: names, within a layer or full, of linear layers whose inputs are not the tokens in order, or that
            are called more than once.
        prefix: name of the list of layers.
        tables: embedding tables that tokens read, with the number of rows of the small model.
        depends_on_padding: True if states of tokens do, so that batches must not contain padding.
    """

    tuple_length: int | None
    kinds: list[int]
    groups: list[list[list[str]]]
    before: list[list[str]]
    after: list[list[str]]
    irregular: set[str]
    prefix: str
    tables: list[Table]
    depends_on_padding: bool = False

    def groups_of(self, step: int) -> list[list[str]]:
        """Full names of the linear layers of a step, in groups that share an input, in the order of calls."""
        if step == BEFORE:
            return self.before
        if step == len(self.kinds):
            return self.after
        return [[f"{self.prefix}.{step}.{name}" for name in group] for group in self.groups[self.kinds[step]]]

    def is_irregular(self, name: str) -> bool:
        """True if a linear layer's inputs are not the tokens in order, each once."""
        local = re.sub(rf"^{re.escape(self.prefix)}\.\d+\.", "", name)
        return local in self.irregular


def survey(auto_class: Any, config: PretrainedConfig, name: str) -> Survey:
    """Survey the models of a config.

    Args:
        auto_class: of transformers.
        name: of the model, for messages.

    Raises:
        InputError: such a model cannot be run layer by layer; the message gives the reason.
    """
    reason = ""
    for small in _narrowed(config):
        try:
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)
                return _survey(auto_class, small)
        except InputError as error:
            raise InputError(f"model {name} cannot be run layer by layer: {error}") from error
        except Exception as error:  # model code may raise anything on sizes that do not fit together
            reason = f"{type(error).__name__}: {first_line(error)}"
    raise InputError(f"model {name} ({config.model_type}) cannot be run layer by layer: {reason}")


def _narrowed(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yield smaller and smaller changes of the config, in case that sizes depend on each other."""
    for heads, feed_forward in ((True, True), (False, True), (False, False)):
        small = copy.deepcopy(config)
        for part in {id(part): part for part in (small, small.get_text_config())}.values():
            free = 7  # ids above this are not in the texts
            for key, value in part.to_dict().items():
                if TOKEN.search(key) and value is not None:
                    free += 1
                    setattr(part, key, [free] if isinstance(value, list) else free)
                if feed_forward and FEED_FORWARD_SIZES.search(key) and isinstance(value, int):
                    setattr(part, key, min(value, FEED_FORWARD))
            part.vocab_size = VOCABULARY
        if heads:
            _cut_heads(small.get_text_config())
        yield small


def _cut_heads(config: PretrainedConfig) -> None:
    """Divide the numbers of heads, and the hidden size with them, by the number of heads of keys."""
    heads = getattr(config, "num_attention_heads", None)
    keys = getattr(config, "num_key_value_heads", None) or heads
    hidden = getattr(config, "hidden_size", None)
    if all(isinstance(value, int) for value in (heads, keys, hidden)) and not (heads % keys or hidden % keys):
        factor = keys if keys < heads else max(1, keys // 2)
        config.num_attention_heads, config.hidden_size = heads // factor, hidden // factor
        if getattr(config, "num_key_value_heads", None):
            config.num_key_value_heads = keys // factor


def _survey(auto_class: Any, config: PretrainedConfig) -> Survey:
    model = build_without_weights(auto_class, config, torch.float32, CPU)
    prefix, layers = decoder_layers(model)
    kinds = _kinds(layers)
    kept = [index for index, kind in enumerate(kinds) if kinds[:index].count(kind) < 2]
    first = [kept.index(kinds.index(kind)) for kind in range(max(kinds) + 1)]
    for index in reversed(range(len(layers))):
        if index not in kept:
            del layers[index]
    model.config.get_text_config().num_hidden_layers = len(layers)
    weights = _random_weights(model)
    texts = Calibration(TEXTS, [0, 1, 2], 0, 0)
    batches = [Batch.of(examples, texts) for examples in ([0, 1, 2], [0, 1])]
    found = Survey(_tuple_length(model, layers, weights, batches[0]), kinds, [], [], [], set(), prefix, [])
    stepwise = LayerwiseModel(model, CPU, found.tuple_length)
    for batch in batches:
        whole = _whole(model, weights, batch)
        difference = (_stepwise(stepwise, weights, batch) - whole).norm() / whole.norm()
        if not difference <= TOLERANCE:
            raise InputError(f"layers of a {config.model_type} model exchange more than their hidden states")
    padded, alone = (_whole(model, weights, batch) for batch in (batches[0], Batch.of([2], texts)))
    depends = bool((padded[-len(alone) :] - alone).norm() > TOLERANCE * alone.norm())
    found = replace(_with_groups(found, model, weights, batches[0], first), depends_on_padding=depends)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return replace(found, tables=find_tables(model, texts))


def _kinds(layers: nn.ModuleList) -> list[int]:
    """Number of each layer's kind: layers of a kind have the same modules, shapes and simple attributes."""
    kinds: dict[str, int] = {}
    return [kinds.setdefault(_description(layer, index), len(kinds)) for index, layer in enumerate(layers)]


def _description(layer: nn.Module, index: int) -> str:
    parts = []
    for name, module in layer.named_modules():
        simple = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and not (value == index and "idx" in key)
        }
        shapes = [(own, tuple(value.shape)) for own, value in module.named_parameters(recurse=False)]
        parts.append(f"{name} {type(module).__name__} {sorted(simple.items())} {shapes}")
    return "\n".join(parts)


def _random_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Random values of the parameters, such that states stay of the same size from layer to layer."""
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape)
        if parameter.ndim == 1:
            weights[name] = 0.1 * noise + (1 if name.endswith("weight") else 0)
        else:
            weights[name] = noise / parameter.shape[-1] ** 0.5
    return weights


def _tuple_length(model: PreTrainedModel, layers: nn.ModuleList, weights: dict, batch: Batch) -> int | None:
    outputs: list[Any] = []
    handle = layers[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        _whole(model, weights, batch)
    finally:
        handle.remove()
    if len(outputs) != 1:
        raise InputError(f"a {model.config.model_type} model runs a layer {len(outputs)} times")
    return len(outputs[0]) if isinstance(outputs[0], tuple) else None


@torch.no_grad()
def _whole(model: PreTrainedModel, weights: dict, batch: Batch) -> torch.Tensor:
    """Final states of the real tokens, by the model's own forward pass."""
    with ending_at(model.get_output_embeddings()):
        try:
            inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
            return _real(functional_call(model, weights, (), inputs)[0], batch)
        except EndForward as end:
            return _real(end.states, batch)


def _stepwise(model: LayerwiseModel, weights: dict, batch: Batch) -> torch.Tensor:
    hidden = None
    for step in range(BEFORE, len(model.layers) + 1):
        names = {*model.names(step)}
        hidden = model.forward(step, {k: v for k, v in weights.items() if k in names}, batch, hidden)
        if step < len(model.layers) and (hidden.ndim != 3 or hidden.shape[:2] != batch.ids.shape):
            raise InputError(f"its layers exchange states of shape {list(hidden.shape)}, not (texts, tokens, features)")
    return _real(hidden, batch)


def _real(states: torch.Tensor, batch: Batch) -> torch.Tensor:
    # A classifier's output has one row for each text.
    return batch.rows(states) if states.shape[:2] == batch.ids.shape else states


def _with_groups(found: Survey, model: PreTrainedModel, weights: dict, batch: Batch, first: list[int]) -> Survey:
    """Add the groups of linear layers that share an input. `first` has the index of each kind's first layer."""
    names = linear_layers(model)
    with LinearInputs(names, model.get_output_embeddings(), lambda name, rows: None) as inputs:

        def run(**arguments: Any) -> Any:
            return functional_call(model, weights, (), arguments)

        inputs.run(run, batch.ids, batch.mask)
        inputs.part()
        inputs.run(run, batch.ids, batch.mask)
        calls = list(inputs.called)
    of_input: dict[str, list[str]] = {}
    for name in dict.fromkeys(calls):
        of_input.setdefault(inputs.shared_name.get(name, name), []).append(name)
    irregular = {name for name, count in Counter(calls).items() if count > 1} | inputs.unaligned
    start = re.compile(rf"^{re.escape(found.prefix)}\.(\d+)\.")
    groups: list[list[list[str]]] = [[] for _ in first]
    before, after, reached = [], [], False
    for sharing in of_input.values():
        places = {match and int(match[1]) for match in map(start.match, sharing)}
        if len(places) > 1:
            raise InputError(f"{', '.join(sharing)} of different layers read the same input")
        place = places.pop()
        if place is None:
            (after if reached else before).append(sharing)
            continue
        reached = True
        if place in first:
            groups[first.index(place)].append([start.sub("", name) for name in sharing])
    local = {start.sub("", name) for name in irregular}
    return replace(found, groups=groups, before=before, after=after, irregular=local)
