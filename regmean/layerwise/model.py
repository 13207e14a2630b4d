"""A model run step by step with the weights of one step in memory: what comes before its decoder layers, each of the
layers, and what comes after them.

The model is built without weights. A step's weights are read from their files when its turn comes. The arguments of
each layer beside the hidden states (masks, positions, rotary tables) are those that the model's own forward passes.
"""

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from common.errors import InputError
from regmean.architectures import parameter_tensors
from regmean.calibration import Calibration, collate
from regmean.model_folder import Checkpoint
from regmean.tensor_file import TensorInfo

BEFORE = -1  # number of the step before the first layer


def build_without_weights(
    auto_class: Any, config: PretrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Build a model whose parameters have shapes only (on the meta device); its buffers are on `device`."""

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        # A parameter that is tied to one on meta stays the same object.
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(on_meta)
    try:
        with torch.device(device), no_init_weights():
            model = auto_class.from_config(config, dtype=dtype).eval()
            model.tie_weights()  # which is left out with the initialisation
            return model
    finally:
        handle.remove()


def stored_dtype(checkpoint: Checkpoint, config: PretrainedConfig, dtype: str) -> torch.dtype:
    """The torch dtype of this name; for "auto" the one that the config names, else that of the largest tensor."""
    if dtype == "auto":
        largest = max(checkpoint.tensors.values(), key=lambda info: info.size)
        dtype = getattr(config, "dtype", None) or {"BF16": "bfloat16", "F16": "float16"}.get(
            largest.file_dtype, "float32"
        )
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The model's list of layers, and its name: the largest list with as many modules as the config has layers.

    Raises:
        InputError: there is none.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not found:
        raise InputError(f"a {model.config.model_type} model has no list of its {count} layers")
    return max(found, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))


@dataclass
class Batch:
    """Examples of one forward pass.

    Attributes:
        examples: their indices.
        ids, mask: int64 of shape (examples, length).
        real: positions of the tokens that are not padding in the flattened batch; None without padding.
        calls: arguments of each layer beside the hidden states, once `LayerwiseModel.forward` has run the first step.
    """

    examples: list[int]
    ids: torch.Tensor
    mask: torch.Tensor
    real: torch.Tensor | None = None
    calls: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)

    @classmethod
    def of(cls, examples: list[int], calibration: Calibration) -> "Batch":
        """The batch of these examples."""
        ids, mask = collate([calibration.examples[index] for index in examples])
        real = mask.flatten().nonzero().flatten()
        return cls(examples, ids, mask, real if len(real) < mask.numel() else None)

    def rows(self, states: torch.Tensor) -> torch.Tensor:
        """Rows (tokens, width) of `states`, (examples, length, width), without padding."""
        rows = states.reshape(-1, states.shape[-1])
        return rows if self.real is None else rows.index_select(0, self.real.to(rows.device))


class LayerwiseModel:
    """A model without weights, and the files that hold them.

    Attributes:
        model: the model, with parameters on the meta device. Its modules may get hooks.
        prefix: name of the list of layers.
        layers: the list.
        tensors: the stored tensor of each parameter, by name.

    Args:
        tensors: the stored tensors by parameter; default: none.
        tuple_length: length of the tuple that a layer returns; None if it returns the hidden states alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        tuple_length: int | None,
        tensors: dict[str, TensorInfo] | None = None,
    ):
        self.model, self.device, self.tensors = model, device, tensors or {}
        self.prefix, self.layers = decoder_layers(model)
        self.head = model.get_output_embeddings()
        self._tuple_length = tuple_length
        # Tied parameters are one object of several names, and may be stored under any of them.
        self._names: dict[str, list[str]] = {}
        first: dict[int, str] = {}
        for name, value in model.state_dict(keep_vars=True).items():
            self._names.setdefault(first.setdefault(id(value), name), []).append(name)

    def names(self, step: int) -> list[str]:
        """Names of the step's parameters and stored buffers. The steps before and after the layers have the same."""
        if BEFORE < step < len(self.layers):
            return [name for name in self._names if name.startswith(f"{self.prefix}.{step}.")]
        # A forward pass ends before the head, whose weight may be the embedding table.
        head = tuple(f"{name}." for name, module in self.model.named_modules() if module is self.head)
        outer = {name: names for name, names in self._names.items() if not name.startswith(f"{self.prefix}.")}
        return [name for name, names in outer.items() if not all(each.startswith(head) for each in names)]

    def weights(self, step: int) -> dict[str, torch.Tensor]:
        """Read the weights of a step that have a stored tensor, by parameter, onto the device.

        Raises:
            InputError: a file cannot be read.
        """
        shapes = self.model.state_dict()
        return {name: self._read(name, shapes[name]) for name in self.names(step) if self.stored(name)}

    def stored(self, name: str) -> TensorInfo | None:
        """The stored tensor of a parameter, perhaps by the name of one that is tied to it; None if there is none."""
        return next((self.tensors[other] for other in self._names[name] if other in self.tensors), None)

    def _read(self, name: str, like: torch.Tensor) -> torch.Tensor:
        info = self.stored(name)
        values = torch.from_numpy(info.read())
        if info.dtype == "BF16":
            values = values.view(torch.bfloat16)
        return values.reshape(like.shape).to(self.device, like.dtype)

    @torch.no_grad()
    def forward(
        self, step: int, weights: dict[str, torch.Tensor], batch: Batch, hidden: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Run one step of the forward pass.

        Args:
            weights: the step's, as from `weights`.
            hidden: hidden states that the step starts from, (examples, length, width); None before the layers.

        Returns:
            The hidden states after the step. After the layers: the input of the output head, or the model's output
            if it has no head.
        """
        if step == BEFORE:
            return self._before(weights, batch)
        if step < len(self.layers):
            args, kwargs = _moved(batch.calls[step], self.device)
            names = f"{self.prefix}.{step}."
            local = {name.removeprefix(names): value for name, value in weights.items()}
            output = functional_call(self.layers[step], local, (hidden, *args), kwargs)
            return output[0] if isinstance(output, tuple) else output
        return self._after(weights, batch, hidden)

    def _before(self, weights: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        batch.calls.clear()
        seen: dict[int, torch.Tensor] = {}
        first: list[torch.Tensor] = []

        def record(hidden: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
            first.append(hidden) if not first else None
            batch.calls.append(_moved((args, kwargs), torch.device("cpu"), seen))
            if len(batch.calls) == len(self.layers):
                raise EndForward(hidden)
            return hidden

        self._run(weights, batch, record)
        return first[0]

    def _after(self, weights: dict[str, torch.Tensor], batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        return self._run(weights, batch, lambda *args: hidden)

    def _run(self, weights: dict[str, torch.Tensor], batch: Batch, layer: Callable) -> torch.Tensor:
        """Run the model with `layer` in place of each layer: it gets the hidden states and the other arguments."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            output = layer(hidden, args, kwargs)
            return output if self._tuple_length is None else (output, *[None] * (self._tuple_length - 1))

        inputs = {"input_ids": batch.ids.to(self.device), "attention_mask": batch.mask.to(self.device)}
        with _forward_of(self.layers, forward), ending_at(self.head):
            try:
                output = functional_call(self.model, weights, (), inputs | {"use_cache": False})
            except EndForward as end:
                return end.states
        return output[0]


class EndForward(Exception):
    """Raised to end a forward pass; `states` are the hidden states there."""

    def __init__(self, states: torch.Tensor):
        self.states = states


@contextmanager
def _forward_of(layers: nn.ModuleList, forward: Callable) -> Iterator[None]:
    """Replace the forward function of all layers, which keep their attributes."""
    try:
        for layer in layers:
            layer.forward = forward
        yield
    finally:
        for layer in layers:
            with suppress(AttributeError):
                del layer.forward


@contextmanager
def ending_at(head: nn.Module | None) -> Iterator[None]:
    """End forward passes before the output head, with `EndForward`."""

    def end(module: nn.Module, args: tuple) -> None:
        raise EndForward(args[0])

    handle = head.register_forward_pre_hook(end) if head is not None else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _moved(value: Any, device: torch.device, seen: dict[int, Any] | None = None) -> Any:
    """`value` with all tensors in it on `device`; tensors in `seen`, by identity, are moved once."""
    if isinstance(value, torch.Tensor):
        if seen is None:
            return value.to(device)
        # The tensor itself is kept too: its identity could otherwise be used again.
        return seen.setdefault(id(value), (value, value.to(device)))[1]
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_moved(item, device, seen) for item in value)
    if isinstance(value, list):
        return [_moved(item, device, seen) for item in value]
    if isinstance(value, dict):
        return {key: _moved(item, device, seen) for key, item in value.items()}
    return value


class States:
    """Hidden states of batches between two steps, in host memory or in a file that is removed with the process.

    Args:
        shapes: (examples, length) of each batch.
        folder: of the file; None for host memory.

    Raises:
        InputError: the folder has no room for all states.
    """

    def __init__(self, shapes: list[tuple[int, int]], width: int, dtype: torch.dtype, folder: Path | None):
        sizes = [examples * length * width for examples, length in shapes]
        nbytes = max(1, sum(sizes)) * dtype.itemsize
        if folder is None:
            memory = mmap.mmap(-1, nbytes)
        else:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder) as file:
                    os.posix_fallocate(file.fileno(), 0, nbytes)
                    memory = mmap.mmap(file.fileno(), nbytes)
            except OSError as error:
                raise InputError(
                    f"--offload_dir {folder}: {nbytes / 1e9:.1f} GB of hidden states: {error.strerror or error}"
                ) from error
        flat = torch.frombuffer(memory, dtype=dtype)
        self._parts = [
            part.view(*shape, width) for part, shape in zip(flat[: sum(sizes)].split(sizes), shapes, strict=True)
        ]

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._parts[index]

    def __setitem__(self, index: int, states: torch.Tensor) -> None:
        self._parts[index].copy_(states)


@dataclass
class Course:
    """Calibration texts on their way through a model.

    Attributes:
        batches, numbers: the batches, and the number of each among all of this rank.
        states: hidden states of each batch before the next step.
        routes: for batches whose last step has experts, those that each token is routed to, bool (tokens, experts).
    """

    model: LayerwiseModel
    batches: list[Batch]
    numbers: list[int]
    states: States
    routes: dict[int, torch.Tensor] = field(default_factory=dict)

    def forward(self, step: int, weights: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        """The states of a batch after a step."""
        hidden = None if step == BEFORE else self.states[index].to(self.model.device)
        return self.model.forward(step, weights, self.batches[index], hidden)

    def advance(self, step: int, weights: dict[str, torch.Tensor], index: int) -> None:
        """Move a batch through a step.

        Raises:
            InputError: a state is NaN or infinite.
        """
        states = self.forward(step, weights, index)
        if step == len(self.model.layers):
            return
        if not states.isfinite().all():
            examples = ", ".join(map(str, self.batches[index].examples[:8]))
            raise InputError(
                f"states after step {step + 1} are NaN or infinite in calibration text(s) {examples} (from 0): take a "
                "wider --dtype (bfloat16 or float32)"
            )
        self.states[index] = states


def open_layerwise(
    checkpoint: Checkpoint, model: PreTrainedModel, device: torch.device, tuple_length: int | None
) -> LayerwiseModel:
    """A `LayerwiseModel` of a folder; `model` is built without weights.

    Raises:
        InputError: a parameter of the model is in none of the folder's files.
    """
    found = parameter_tensors(model, checkpoint.tensors)
    opened = LayerwiseModel(model, device, tuple_length, found)
    parameters = dict(model.named_parameters())
    names = {name for step in range(BEFORE, len(opened.layers)) for name in opened.names(step)}
    if lost := sorted(name for name in names & parameters.keys() if opened.stored(name) is None):
        raise InputError(
            f"model {checkpoint.name}: no tensors of its files were found for {', '.join(lost[:3])}; "
            "load it with transformers, save it, and take the saved folder"
        )
    return opened
