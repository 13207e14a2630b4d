"""What Grams and merges take at any size, before anything loads: `--plan` of both scripts.

The model is built from its config on the meta device (`tools/estimate.py`); which layers share an input is
found there as a run finds it, from the tensors themselves.
"""

import math
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import nn
from transformers import PreTrainedModel

from common.devices import Device
from common.errors import InputError
from common.logging import quiet_libraries
from regmean.compute import RESERVED, plan_passes
from regmean.config import GramFlags, MergeFlags
from regmean.gram import PANEL
from regmean.gram_file import packed_size
from regmean.hooks import LinearInputs, input_width, linear_layers, untied_head
from regmean.merge import array_bytes
from regmean.solve import BLOCK_ELEMENTS
from tools.estimate import (
    Cost,
    amount,
    causal_lm_on_meta,
    cost_of,
    cost_of_layers,
    duration,
    fits,
    gb,
    parameters,
    plan_device,
    show,
    weight_bytes,
)

# Of a disk, in bytes per second, as good local ones give.
DISK = 1e9


@dataclass(frozen=True)
class LayerInput:
    """A distinct input of a model's linear layers.

    Attributes:
        layers: names of those that read it.
        width: its features.
        outputs: of all these layers together.
    """

    layers: list[str]
    width: int
    outputs: int

    @property
    def sum_bytes(self) -> int:
        """Of its float32 sum in memory."""
        return 4 * self.width**2

    @property
    def file_bytes(self) -> int:
        """Of its Gram in a file."""
        return 4 * packed_size(self.width)


@dataclass(frozen=True)
class GramPlan:
    """The Grams of one model; sizes in bytes, for each device.

    Attributes:
        parameters: of the model.
        inputs: how many distinct ones its layers have.
        weights: the model in its dtype, without an output head of its own.
        sums: of all inputs.
        passes: over the texts; None where not even the widest sum fits.
        pass_sums: the most that one pass holds.
        activations: of a batch.
        tokens: at most.
        flops: of all passes, on all devices.
        snapshots: on disk while it runs, two for each device.
        file: on disk, for good.
    """

    parameters: int
    inputs: int
    weights: float
    sums: float
    passes: int | None
    pass_sums: float
    activations: float
    tokens: int
    flops: float
    snapshots: float
    file: float

    @property
    def peak(self) -> float:
        """The most that a device has to hold."""
        return self.weights + self.pass_sums + self.activations


@dataclass(frozen=True)
class MergeCost:
    """A merge; sizes in bytes.

    Attributes:
        parameters: of each model.
        systems: solved by RegMean.
        arrays: in memory at once, on the device that solves.
        read, written: from and to the disk.
        flops: of all systems.
    """

    parameters: int
    systems: int
    arrays: float
    read: float
    written: float
    flops: float


def plan_grams(flags: GramFlags) -> None:
    """Print what the Grams of a model take.

    Raises:
        InputError: a config that is not there, or of a model that cannot be run without data.
    """
    quiet_libraries()
    device = plan_device(flags.plan, flags.device)
    model = _model(flags.model, flags.revision, flags.dtype, flags.trust_remote_code)
    plan = gram_plan(flags, model, device)
    seconds = plan.flops / device.flops(model.dtype.itemsize) / device.count
    dtype = str(model.dtype).removeprefix("torch.")
    passes = {None: "no number of passes fits", 1: "1 pass"}.get(plan.passes, f"{plan.passes} passes")
    lines = [
        ("parameters", amount(plan.parameters)),
        ("weights", f"{gb(plan.weights)} ({dtype}), whole on every device"),
        ("sums", f"{gb(plan.sums)} of {plan.inputs} distinct inputs: {passes}, at most {gb(plan.pass_sums)} at once"),
        ("activations", f"at most {gb(plan.activations)}: batch of {flags.batch_tokens(device.type)} tokens"),
        ("memory", fits(plan.peak, device)),
    ]
    if plan.passes:
        lines += [
            ("work", f"{amount(plan.flops)}FLOP: at most {plan.tokens:,} tokens"),
            ("time", f"{duration(seconds)}, loading and writing not counted"),
        ]
    joined = f", then {gb(plan.file)} to join the passes" if plan.passes and plan.passes > 1 else ""
    lines.append(("disk", f"{gb(plan.file)}, and while it runs {gb(plan.snapshots)} for each device{joined}"))
    show(f"Grams of {flags.model}", device, lines)


def gram_plan(flags: GramFlags, model: PreTrainedModel, device: Device) -> GramPlan:
    """What the Grams of a model on the meta device take."""
    inputs = layer_inputs(model)
    widths = [layer_input.width for layer_input in inputs]
    head = untied_head(model)
    # The head is gone when sums come.
    weights = weight_bytes(model) - (0 if head is None else weight_bytes(head))
    by_name = {name: layer_input for layer_input in inputs for name in layer_input.layers}
    try:
        memory = int((device.memory - weights) * (1 - RESERVED))
        passes = plan_passes([layer_input.layers for layer_input in inputs], widths, memory)
    except InputError:
        passes = None

    def sums_of(names: list[str]) -> int:
        return sum({by_name[name].layers[0]: by_name[name].sum_bytes for name in names}.values())

    pass_sums = max(map(sums_of, passes)) if passes else max(layer_input.sum_bytes for layer_input in inputs)
    batch_tokens = flags.batch_tokens(device.type)
    length = min(flags.max_length, batch_tokens)
    batch = batch_cost(model, max(1, batch_tokens // length), length, device)
    tokens = flags.num_examples * flags.max_length
    forward = batch.flops / (batch_tokens // length * length)
    forwards = _forward_passes(inputs, passes, linear_layers(model), head) if passes else 1.0
    return GramPlan(
        parameters=parameters(model),
        inputs=len(inputs),
        weights=weights,
        sums=sum(layer_input.sum_bytes for layer_input in inputs),
        passes=None if passes is None else len(passes),
        pass_sums=pass_sums,
        activations=batch.peak_bytes,
        tokens=tokens,
        # Of a symmetric product one half is computed.
        flops=tokens * (forward * forwards + sum(width**2 for width in widths)),
        snapshots=pass_sums,  # two, of half of it each
        file=sum(layer_input.file_bytes for layer_input in inputs),
    )


def _forward_passes(
    inputs: list[LayerInput], passes: list[list[str]], layers: dict[str, nn.Module], head: nn.Module | None
) -> float:
    """How many whole forward passes `passes` are worth, each of which ends at its last layer."""
    before: dict[str, int] = {}
    done = 0
    for layer_input in inputs:
        before |= dict.fromkeys(layer_input.layers, done)
        if layers[layer_input.layers[0]] is not head:
            done += layer_input.width * layer_input.outputs
    return sum(before[names[-1]] for names in passes) / done


def layer_inputs(model: PreTrainedModel) -> list[LayerInput]:
    """Every distinct input of a meta model's linear layers, in the model's order.

    Raises:
        InputError: where data goes depends on the data, as with experts.
    """
    layers = linear_layers(model)
    inputs = LinearInputs(layers, model.get_output_embeddings(), lambda name, x: None)
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    try:
        with inputs:
            cost_of(lambda: inputs.run(model, ids, torch.ones_like(ids)), model)
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(f"what the layers of a {model.config.model_type} read depends on the data: no plan") from error
    return [
        LayerInput(
            names,
            input_width(layers[names[0]]),
            sum(layers[name].weight.numel() // input_width(layers[name]) for name in names),
        )
        for names in inputs.groups()
    ]


def batch_cost(model: PreTrainedModel, rows: int, length: int, device: Device) -> Cost:
    """Cost of one batch through a meta model, with copies of what its layers read, but without their sums."""

    def receive(name: str, x: torch.Tensor) -> None:
        kept = x.reshape(-1, x.shape[-1]).clone()  # the rows that are no padding
        if device.type == "cpu":
            kept = kept.float()
        elif kept.dtype != torch.float32:
            torch.empty(PANEL, kept.shape[1], device="meta")

    inputs = LinearInputs(linear_layers(model), model.get_output_embeddings(), receive)
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    mask = torch.ones_like(ids)
    with inputs:
        return cost_of_layers(lambda: inputs.run(model, ids, mask), model)


def plan_merging(flags: MergeFlags) -> None:
    """Print what a merge takes.

    Raises:
        InputError: a config that is not there, or models that differ in size.
    """
    quiet_libraries()
    device = plan_device(flags.plan, flags.device)
    plan = merge_cost(flags)
    seconds = plan.flops / device.single_flops
    lines = [
        ("parameters", f"{amount(plan.parameters)} each"),
        ("work", f"{plan.systems} systems, {amount(plan.flops)}FLOP in float32"),
        ("memory", f"{fits(plan.arrays, device)} (arrays; never a model)"),
        ("disk", f"{gb(plan.read)} to read, {gb(plan.written)} to write"),
        ("time", f"{duration(seconds)}, and {duration((plan.read + plan.written) / DISK)} of disk at {gb(DISK)}/s"),
    ]
    show(f"{flags.method} of {len(flags.models)} models", replace(device, count=1), lines)


def merge_cost(flags: MergeFlags) -> MergeCost:
    """What a merge takes, by RegMean with Grams of all inputs."""
    models = [
        _model(name, revision, "auto")
        for name, revision in zip_longest(flags.models, flags.revisions[: len(flags.models)])
    ]
    sizes = {name: parameters(model) for name, model in zip(flags.models, models, strict=True)}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        raise InputError(f"models of different sizes do not merge; parameters: {listed}")
    total = parameters(models[0])
    read = float(sum(model.dtype.itemsize * total for model in models))
    written = float(len(flags.output_dirs()) * total * _dtype(flags.dtype, models[0].dtype).itemsize)
    if flags.method == "avg":
        return MergeCost(total, 0, array_bytes(len(models), [], alphas=0), read, written, 0.0)
    inputs, count, alphas = layer_inputs(models[0]), len(models), len(flags.alpha)
    flops = 0.0
    for layer_input in inputs:
        width = layer_input.width
        # Of three models or more every Gram is read anew for each block of outputs.
        blocks = math.ceil(layer_input.outputs / max(1, BLOCK_ELEMENTS // width)) if count > 2 else 1
        read += count * layer_input.file_bytes * blocks
        # For each alpha a factor, and for each output a solution; for each output besides a right-hand side, and half
        # a product for the objective: of each model, but of two together.
        flops += alphas * (width**3 / 3 + 2 * layer_input.outputs * width**2)
        flops += 3 * layer_input.outputs * width**2 * (1 if count == 2 else count)
    arrays = array_bytes(count, [(layer_input.width, layer_input.outputs) for layer_input in inputs], alphas)
    return MergeCost(total, len(inputs), arrays, read, written, flops)


def _model(path: str, revision: str | None, dtype: str, trust_remote_code: bool = False) -> PreTrainedModel:
    return causal_lm_on_meta(path, revision, _dtype(dtype, None), trust_remote_code)


def _dtype(name: str, default: torch.dtype | None) -> torch.dtype | None:
    return default if name == "auto" else getattr(torch, name)
