"""Inputs of a model's linear layers, collected during a forward pass by hooks that one object owns.

Experts whose weights are slices of one parameter have no modules of their own: experts.py runs them in its place.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common.errors import InputError
from regmean.experts import ExpertLayer, expert_layers, run_experts, token_count

Layer = nn.Module | ExpertLayer
# Names of tables with one row for each position of a text.
POSITIONS = re.compile(r"(^|\.)(position_embeddings|positions_embed|embed_positions|pos_encoding|wpe)(\.weight)?$")


def linear_layers(model: PreTrainedModel) -> dict[str, Layer]:
    """All linear layers by name, projections of experts among them. Of those whose weight is the embedding table, only
    the output head is included.
    """
    table, head = getattr(model.get_input_embeddings(), "weight", None), model.get_output_embeddings()
    layers: dict[str, Layer] = {}
    for name, module in model.named_modules():
        if is_linear(module) and (module.weight is not table or module is head):
            layers[name] = module
        layers |= expert_layers(name, module)
    return layers


def is_linear(module: nn.Module) -> bool:
    """True for linear layers, among them a mixture's router that keeps its weight (experts, inputs) itself."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("Router") and isinstance(weight, nn.Parameter) and weight.ndim == 2


def share_modules(model: PreTrainedModel) -> None:
    """Replace linear layers that share one weight, as in blocks that a model runs several times, by one module.

    The module is then called for each of them, and its Gram is the sum over all calls.
    """
    first: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | Conv1D) and not module.weight.is_meta:
            same = first.setdefault(id(module.weight), module)
            if same is not module and same.bias is module.bias and type(same) is type(module):
                model.set_submodule(name, same)


def untied_head(model: PreTrainedModel) -> nn.Module | None:
    """The output head if it has a weight of its own, else None."""
    head = model.get_output_embeddings()
    return None if head is None or head.weight is model.get_input_embeddings().weight else head


def is_conv1d(layer: Layer) -> bool:
    """True for layers that store their weight as (in, out), as GPT-2's, and not as (out, in)."""
    return layer.is_transposed if isinstance(layer, ExpertLayer) else isinstance(layer, Conv1D)


def input_width(layer: Layer) -> int:
    """Input features of a linear layer."""
    return layer.weight.shape[0 if is_conv1d(layer) else 1]


def nominal_positions(model: PreTrainedModel) -> int | None:
    """Number of positions in the config, which is no limit of models with rotary positions."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def table_positions(model: PreTrainedModel) -> int | None:
    """Number of tokens that fit into the model's table of positions; None if it has no such table."""
    for name, table in (*model.named_parameters(), *model.named_buffers()):
        if not POSITIONS.search(name):
            continue
        limit = nominal_positions(model) or len(table)
        # A few rows may come before those that the config counts. Tables of images and sounds have other sizes.
        if limit <= len(table) <= limit + 4:
            padding = getattr(model.get_submodule(name.rpartition(".")[0]), "padding_idx", None)
            return min(limit, len(table) - (0 if padding is None else padding + 1))
    return None


@dataclass(eq=False)
class LinearInputs:
    """Context manager whose hooks pass each distinct input of a model's linear layers to `receive`.

    Layers share an input if they read the same tensor. The input has the name of the first layer that reads it in a
    forward pass. Experts share none, and count as called when their module is, with tokens or without.

    Attributes:
        layers: the layers to watch, by name.
        head: the output head, or None; a forward pass ends where the head would turn states into logits.
        receive: called with the name and the input's rows, (tokens, width), once for each distinct input.
        same_calls: True if every forward pass calls the same layers in the same order. All passes but the first then
            end at the last of these calls, and nothing after it is computed.
        shared_name: the name of the input of each layer that a token has reached.
        alone: layers whose inputs are never shared.
        called: the layers that the last forward pass called, in order.
        unaligned: the layers with other rows.
        tokens: while an expert's input is received, its rows' positions in the flattened batch; else None.
    """

    layers: dict[str, Layer]
    head: nn.Module | None
    receive: Callable[[str, torch.Tensor], None]
    same_calls: bool = False
    shared_name: dict[str, str] = field(default_factory=dict)
    alone: set[str] = field(default_factory=set)
    called: list[str] = field(default_factory=list)
    unaligned: set[str] = field(default_factory=set)
    tokens: torch.Tensor | None = None

    @property
    def aligned(self) -> bool:
        """True if the rows of every input so far were the batch's tokens in order."""
        return not self.unaligned

    def __enter__(self) -> Self:
        self._order: list[str] = []
        experts: dict[nn.Module, dict[tuple[str, int], str]] = {}
        with ExitStack() as hooks:
            for name, layer in self.layers.items():
                if isinstance(layer, ExpertLayer):
                    experts.setdefault(layer.experts, {})[layer.parameter, layer.number] = name
                    continue
                hooks.enter_context(layer.register_forward_pre_hook(self._hook(name), with_kwargs=True))
            for module, names in experts.items():
                module.forward = self._forward_of(module, names)
                hooks.callback(delattr, module, "forward")
            if self.head is not None:
                hooks.enter_context(self.head.register_forward_pre_hook(_end_forward))
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hooks.close()

    def groups(self) -> list[list[str]]:
        """Groups of layers that share an input, in the model's order."""
        sharing: dict[str, list[str]] = {}
        for name in self.layers:
            # A layer that no token has reached yet is a group of its own.
            sharing.setdefault(self.shared_name.get(name, name), []).append(name)
        return list(sharing.values())

    def part(self) -> None:
        """Stop sharing inputs between layers that the last forward pass called a different number of times."""
        calls = Counter(self.called)
        self.alone = {name for name, shared in self.shared_name.items() if calls[name] != calls[shared]}
        self.shared_name.clear()

    @torch.no_grad()
    def run(self, model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, real: torch.Tensor | None = None) -> None:
        """Run one forward pass of the layers' model, without logits, cache or gradient.

        `ids` and `mask` (0 at padding) are int64 of shape (examples, length); `real` has the positions, in the
        flattened batch, of the tokens that are not padding, or is None if there is no padding.

        Raises:
            InputError: a layer's rows are not the batch's tokens, so that padding rows cannot be identified.
        """
        self._received: dict[tuple, list[str]] = {}
        self.called = []
        self._shapes, self._real = (mask.shape, (mask.numel(),)), real
        with suppress(_AllRead):
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        self._received.clear()
        if self.same_calls:
            self._order = self._order or self.called

    def _hook(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if x.numel() == 0:
                return
            self._hand_over(name, x)
            self._called([name])

        return hook

    def _called(self, names: Iterable[str]) -> None:
        self.called += names
        if self.called == self._order:
            raise _AllRead

    def _forward_of(self, experts: nn.Module, names: dict[tuple[str, int], str]) -> Callable:
        """A forward function of a layer's experts that hands over the inputs of projections with these names."""

        def receive(parameter: str, number: int, rows: torch.Tensor, tokens: torch.Tensor) -> None:
            if name := names.get((parameter, number)):
                self.shared_name[name] = name
                self.tokens = tokens
                self.receive(name, rows)
                self.tokens = None

        def forward(hidden_states: torch.Tensor, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
            tokens, real = token_count(experts, hidden_states), None
            aligned = tokens == self._shapes[1][0]
            if not aligned:
                self.unaligned.update(names.values())
            if self._real is not None:
                if not aligned:
                    raise InputError(f"{next(iter(names.values()))} reads {tokens} rows: padding cannot be identified")
                real = torch.zeros(tokens, dtype=torch.bool, device=hidden_states.device)
                real[self._real] = True
            states = run_experts(experts, receive, real, hidden_states, *args, **kwargs)
            self._called(names.values())
            return states

        return forward

    def _hand_over(self, name: str, x: torch.Tensor) -> None:
        # A weak reference keeps the storage's identity from being used again, without keeping its data: another
        # tensor that the allocator puts at the same address is never taken for this one. The count of changes in place
        # has no public name.
        storage = StorageWeakRef(x.untyped_storage())
        aligned = x.shape[:-1] in self._shapes
        if not aligned:
            self.unaligned.add(name)
        key = (storage, x.storage_offset(), x.shape, x.stride(), x._version, name if name in self.alone else None)
        names = self._received.setdefault(key, [])
        shared = self.shared_name.setdefault(name, names[0] if names else name)
        if shared in names:
            return
        if shared != name:
            raise InputError(
                f"layer {name} read the same tensor as {shared} until now and no longer does; "
                "models that rewire their layers from input to input are not supported"
            )
        names.append(name)
        rows = x.reshape(-1, x.shape[-1])
        if self._real is not None:
            if not aligned:
                raise InputError(f"layer {name} reads {tuple(x.shape)}, where padding rows cannot be identified")
            rows = rows.index_select(0, self._real)
        self.receive(name, rows)


class _AllRead(Exception):
    """Raised to end a forward pass before anything is computed that no layer reads, such as logits."""


def _end_forward(module: nn.Module, args: tuple) -> None:
    raise _AllRead
