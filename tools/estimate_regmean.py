"""Estimates of Grams and merges at any size, without loading models: `--plan` of both scripts.

The model is built from its config on the meta device (`tools/estimate.py`). Layers with the same input are found from
the tensors, as in a run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, groupby, zip_longest
from pathlib import Path

import torch
from transformers import PreTrainedModel

from common.devices import HERE
from common.errors import InputError
from common.logging import quiet_libraries
from common.models import base_config
from regmean.adapter_folder import config_name
from regmean.architectures import auto_class
from regmean.average import AVERAGERS
from regmean.compute import BATCH_MARGIN, LIBRARIES, memory_for_sums, plan_passes
from regmean.config import SEQUENTIAL, GramFlags, MergeFlags
from regmean.experts import ExpertLayer, parameter_of
from regmean.gram import PANEL
from regmean.gram_file import packed_size
from regmean.hooks import Layer, LinearInputs, input_width, linear_layers, untied_head
from regmean.layerwise.model import decoder_layers
from regmean.layerwise.sequential import SAMPLED
from regmean.layerwise.sums import SUMS_PART
from regmean.merge import array_bytes
from regmean.model_folder import Checkpoint
from regmean.read_ahead import READERS
from regmean.solve import BLOCK_ELEMENTS, GPU_BLOCK_ELEMENTS, GPU_SQUARES
from tools.estimate import (
    Cost,
    Device,
    Estimate,
    cost_of,
    cost_of_layers,
    duration,
    find_device,
    gb,
    on_meta,
    parameters,
    show,
    weight_bytes,
)

# Bytes per second of a good local disk.
DISK = 1e9
# Bytes per second between a host and a GPU, from memory that is not pinned.
COPIED = 10e9
# Rates of a thread of a busy host, per second: elements of two 16-bit models read, decoded and averaged, elements
# rounded to 16 bits and written; bytes of Grams unpacked from files.
AVERAGED, ENCODED, UNPACKED = 0.42e9, 0.70e9, 0.96e9
GPU_READERS = 8  # `READERS` of a host with a GPU


@dataclass(frozen=True)
class LayerInput:
    """A distinct input of linear layers of a model.

    Attributes:
        layers: names of the layers with this input.
        width: number of its features.
        outputs: total number of outputs of these layers.
        share: fraction of the tokens that reach it, which is below 1 for experts, on average.
        pool: name of the parameter of all experts, for those of one.
    """

    layers: list[str]
    width: int
    outputs: int
    share: float = 1.0
    pool: str = ""

    @property
    def sum_bytes(self) -> int:
        """Bytes of its float32 sum in memory."""
        return 4 * self.width**2

    @property
    def token_products(self) -> float:
        """Operations for its sum, for a token: only one half of a symmetric product is computed."""
        return self.share * self.width**2

    @property
    def token_macs(self) -> float:
        """Multiplications of its layers, for a token."""
        return self.share * self.width * self.outputs

    @property
    def file_bytes(self) -> int:
        """Bytes of its Gram in a file."""
        return 4 * packed_size(self.width)


def plan_grams(flags: GramFlags) -> None:
    """Print the estimate of the Grams of a model.

    Raises:
        InputError: a config is missing, or the model cannot run without data.
    """
    quiet_libraries()
    device = find_device(flags.plan, flags.device)
    model = _model(*config_name(flags.model, flags.revision, flags.base), flags.dtype, flags.trust_remote_code)
    planned = estimate_grams(flags, model, device)
    # As in a run: layer by layer where the sums do not fit beside the model.
    if flags.layerwise == "on" or (flags.layerwise == "auto" and planned.counts.get("passes") != 1):
        planned = estimate_layerwise_grams(flags, model, device)
    show(f"Grams of {flags.model}", device, planned)


def estimate_grams(flags: GramFlags, model: PreTrainedModel, device: Device) -> Estimate:
    """Estimate the Grams of a model on the meta device; without `passes` if not even the widest sum fits."""
    inputs, head = layer_inputs(model), untied_head(model)
    # The head's output is released before sums are added.
    weights = weight_bytes(model) - (0 if head is None else weight_bytes(head))
    groups, widths = [each.layers for each in inputs], [each.width for each in inputs]
    batch_tokens = flags.batch_tokens(device.type)
    length = min(flags.max_length, batch_tokens)
    batch = batch_cost(model, max(1, batch_tokens // length), length, device)
    margin = (BATCH_MARGIN - 1) * batch.peak_bytes + (LIBRARIES if device.type == "cuda" else 0)
    try:
        memory = memory_for_sums(int(device.memory - weights), batch.peak_bytes, device.type)
        passes = plan_passes(groups, widths, memory)
    except InputError:
        passes = []
    sums = max(each.sum_bytes for each in inputs)
    for names in map(set, passes):
        sums = max(sums, sum(each.sum_bytes for each in inputs if not names.isdisjoint(each.layers)))
    tokens = flags.num_examples * flags.max_length
    layers = linear_layers(model)
    forwards = _forward_passes(inputs, passes, layers, model.get_output_embeddings()) if passes else 1.0
    token_flops = batch.flops / (batch_tokens // length * length) * forwards
    token_flops += sum(each.token_products for each in inputs)
    all_sums, file = (sum(getattr(each, name) for each in inputs) for name in ("sum_bytes", "file_bytes"))
    return Estimate(
        parameters={"model": parameters(model)},
        memory={"weights": weights, "sums": sums, "activations": batch.peak_bytes, "margin": margin},
        counts={"inputs": len(inputs), "tokens": tokens} | ({"passes": len(passes)} if passes else {}),
        flops=tokens * token_flops,
        seconds=tokens * token_flops / device.flops(model.dtype.itemsize) / device.count,
        # Two snapshots of half of the sums each.
        transfers={"disk": file, "snapshots": sums},
        notes={
            "weights": f"{str(model.dtype).removeprefix('torch.')}, all weights on every device",
            "sums": f"at most, of {gb(all_sums)}" + ("" if passes else "; no number of passes fits"),
            "activations": f"at most: batch of {batch_tokens} tokens",
            "tokens": "at most",
            "time": "loading and writing excluded",
            "disk": "twice as much while passes are joined",
            "snapshots": "for each device, during the run",
        },
    )


@dataclass(frozen=True)
class Steps:
    """Sizes of a model that is run layer by layer.

    Attributes:
        layers: the inputs of each decoder layer; last, those of the head.
        weights: bytes of the largest step.
        token_flops: operations of a forward pass through all layers, for a token.
        activations: bytes of a batch.
        state_bytes: bytes of a token's hidden state.
    """

    layers: list[list[LayerInput]]
    weights: int
    token_flops: float
    activations: float
    state_bytes: int

    @classmethod
    def of(cls, model: PreTrainedModel, batch_tokens: int, max_length: int, device: Device) -> "Steps":
        """Sizes of a meta model, in batches of `batch_tokens` with texts of `max_length`."""
        prefix, modules = decoder_layers(model)
        head, inputs, layers = untied_head(model), layer_inputs(model), []
        for number in range(len(modules)):
            layers.append([each for each in inputs if each.layers[0].startswith(f"{prefix}.{number}.")])
        rest = [each for each in inputs if not each.layers[0].startswith(f"{prefix}.")]
        largest = max(map(weight_bytes, modules))
        outside = weight_bytes(model) - weight_bytes(modules) - (0 if head is None else weight_bytes(head))
        length = min(max_length, batch_tokens)
        rows = max(1, batch_tokens // length)
        batch = batch_cost(model, rows, length, device)
        width = model.config.get_text_config().hidden_size
        flops = batch.flops / (rows * length)
        return cls([*layers, rest], max(largest, outside), flops, batch.peak_bytes, width * model.dtype.itemsize)

    def stages(self) -> list[list[list[LayerInput]]]:
        """The groups of each layer, those of all experts of a parameter together."""
        return [
            [list(stage) for _, stage in groupby(groups, lambda group: group.pool or group.layers[0])]
            for groups in self.layers
        ]

    def repeated(self, turns: Callable[[list[LayerInput]], int]) -> tuple[float, float]:
        """Work of forward passes that end at each stage, and of those that end at each last one, in whole ones; each
        stage takes as many as `turns` returns for it.
        """
        each = last = whole = 0.0
        for stages in self.stages()[:-1]:
            done = 0
            for stage in stages:
                last += done if stage is stages[-1] else 0
                each += done * turns(stage)
                done += sum(group.token_macs for group in stage)
            whole += done
        return each / whole, last / whole


def estimate_layerwise_grams(flags: GramFlags, model: PreTrainedModel, device: Device) -> Estimate:
    """Estimate the Grams of a model on the meta device, one decoder layer at a time."""
    steps = Steps.of(model, flags.batch_tokens(device.type), flags.max_length, device)
    inputs = [each for groups in steps.layers for each in groups]
    tokens = flags.num_examples * flags.max_length
    flops = tokens * (steps.token_flops + sum(each.token_products for each in inputs))
    states, file = tokens * steps.state_bytes, sum(each.file_bytes for each in inputs)
    margin = (BATCH_MARGIN - 1) * steps.activations + (LIBRARIES if device.type == "cuda" else 0)
    copied = 2 * len(steps.layers) * states / device.count
    return Estimate(
        parameters={"model": parameters(model)},
        memory={
            "weights": steps.weights,
            "sums": max(sum(each.sum_bytes for each in groups) for groups in steps.layers),
            "activations": steps.activations,
            "margin": margin,
        },
        counts={"inputs": len(inputs), "tokens": tokens, "steps": len(steps.layers) + 1},
        flops=flops,
        seconds=flops / device.flops(model.dtype.itemsize) / device.count,
        transfers={"states": states, "disk": file, "read": weight_bytes(model)},
        notes={
            "weights": "of one step",
            "sums": "of one step",
            "tokens": "at most",
            "time": f"loading and writing excluded, and copies of the states, {duration(copied / COPIED)} at "
            f"{gb(COPIED)}/s",
            "states": _place(flags.offload_dir),
            "disk": "twice as much while steps are joined",
        },
    )


def _place(offload_dir: str | None) -> str:
    return f"hidden states of all texts, on disk: {offload_dir}" if offload_dir else "hidden states of all texts, host"


def _forward_passes(
    inputs: list[LayerInput], passes: list[list[str]], layers: dict[str, Layer], head: torch.nn.Module | None
) -> float:
    """Work of `passes` in whole forward passes, since each pass ends at its last layer."""
    before: dict[str, float] = {}
    done = 0.0
    for layer_input in inputs:
        before |= dict.fromkeys(layer_input.layers, done)
        if layers[layer_input.layers[0]] is not head:
            done += layer_input.token_macs
    return sum(before[names[-1]] for names in passes) / done


def layer_inputs(model: PreTrainedModel) -> list[LayerInput]:
    """Find every distinct input of a meta model's linear layers, in the model's order.

    Raises:
        InputError: the inputs of layers depend on the data, as with experts that are modules of their own.
    """
    layers = linear_layers(model)
    inputs = LinearInputs(layers, model.get_output_embeddings(), lambda name, x: None)
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    try:
        with inputs:
            cost_of(lambda: inputs.run(model, ids, torch.ones_like(ids)), model)
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(f"layer inputs of a {model.config.model_type} depend on the data: no estimate") from error
    return [
        LayerInput(
            names,
            input_width(layers[names[0]]),
            sum(layers[name].weight.numel() // input_width(layers[name]) for name in names),
            _share(model, layers[names[0]]),
            parameter_of(names[0]) if isinstance(layers[names[0]], ExpertLayer) else "",
        )
        for names in inputs.groups()
    ]


def _share(model: PreTrainedModel, layer: Layer) -> float:
    """Fraction of the tokens that reach a layer."""
    if not isinstance(layer, ExpertLayer):
        return 1.0
    return getattr(model.config.get_text_config(), "num_experts_per_tok", 1) / len(layer.experts.down_proj)


def batch_cost(model: PreTrainedModel, rows: int, length: int, device: Device) -> Cost:
    """Cost of one batch through a meta model, with copies of the inputs of layers, without their sums."""

    def receive(name: str, x: torch.Tensor) -> None:
        kept = x.reshape(-1, x.shape[-1]).clone()  # rows without padding
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
    """Print the estimate of a merge.

    Raises:
        InputError: a config is missing, or the models differ in size.
    """
    quiet_libraries()
    device = replace(find_device(flags.plan, flags.device), count=1)
    estimate = estimate_sequential if flags.method in SEQUENTIAL else estimate_merge
    show(f"{flags.method} of {len(flags.models)} models", device, estimate(flags, device))


def estimate_sequential(flags: MergeFlags, device: Device) -> Estimate:
    """Estimate a layer-sequential merge of one alpha; several are merged one after the other."""
    models = _models(flags)
    model, count, itemsize = models[0], len(models), models[0].dtype.itemsize
    sources = flags.texts(of_any_model=True) if flags.calibration else [GramFlags(plan=HERE, model="-").texts()] * count
    tokens = sum(source.num_examples * source.max_length for source in sources)
    longest = max(source.max_length for source in sources)
    steps = Steps.of(model, flags.batch_tokens(device.type), longest, device)
    is_asymmetric, stages = flags.method == "regmean_asym", steps.stages()
    memory = _SequentialMemory(steps, count, is_asymmetric, device)
    each, last = steps.repeated(memory.turns)
    squares = sum(group.token_products for groups in steps.layers for group in groups)
    turns = max(map(memory.turns, chain(*stages) if is_asymmetric else steps.layers))
    most = max(sum(map(memory.turns, layer)) for layer in stages)
    if is_asymmetric:
        # The merge's inputs of every group and its states; the same of the models, whose last group needs no more.
        forwards, products, copies = 2 * (each + 1) - last, 4 * squares, 2.0
    else:
        forwards, products, copies = turns * last + 1 + 1 / SAMPLED, squares, 1 + 1 / SAMPLED
    flops = tokens * (forwards * steps.token_flops + products)
    solving = sum(_solving_flops(group, count, is_asymmetric) for groups in steps.layers for group in groups)
    size, states = weight_bytes(model), copies * tokens * steps.state_bytes
    reads = 2 * count * most + count * (count + 1) if is_asymmetric else (2 + turns) * count + 1
    copied = states * most * len(steps.layers)
    seconds = flops / device.flops(itemsize) + solving / device.single_flops
    alphas = len(flags.alpha)
    return Estimate(
        parameters={"each model": parameters(model)},
        memory=memory.parts(),
        counts={"systems": sum(map(len, steps.layers)), "tokens": tokens, "steps": len(steps.layers) + 1}
        | ({"turns": turns} if turns > 1 else {}),
        flops=alphas * (flops + solving),
        seconds=alphas * seconds,
        transfers={"states": states, "disk": (1 + alphas) * size, "read": alphas * reads * size},
        notes={
            "weights": "of one step of two models" if is_asymmetric else "of one step",
            "tokens": "at most, of all models",
            "turns": "passes over the texts for the sums of one layer, at most",
            "time": f"copies of the states excluded, {duration(alphas * copied / COPIED)} at {gb(COPIED)}/s",
            "states": _place(flags.offload_dir),
            "disk": "the merge, and its steps until it is complete",
            "read": "again for every group of layers: from the host's page cache, where a layer fits",
        },
    )


def _solving_flops(group: LayerInput, models: int, is_asymmetric: bool) -> float:
    """Operations of one system: its factor, solutions, right-hand sides and objectives."""
    products = (8 * models if is_asymmetric else 3 * (1 if models == 2 else models)) + 2
    return group.width**3 / 3 + products * group.outputs * group.width**2


@dataclass(frozen=True)
class _SequentialMemory:
    """Memory of a layer-sequential merge on a device."""

    steps: Steps
    models: int
    is_asymmetric: bool
    device: Device

    def turns(self, groups: list[LayerInput]) -> int:
        """Passes over the texts for the sums of groups that are summed at once, if they fit into memory."""
        needed = sum(map(self._sum_bytes, groups)) / (SUMS_PART * self.device.memory)
        return min(len(groups), max(1, math.ceil(needed)))

    def parts(self) -> dict[str, float]:
        """Bytes of the larger of two moments: while inputs are summed, and while a system is solved."""
        on_gpu = self.device.type == "cuda"
        margin = (BATCH_MARGIN - 1) * self.steps.activations + (LIBRARIES if on_gpu else 0)
        groups = [group for layer in self.steps.layers for group in layer]
        if self.is_asymmetric:
            at_once = [stage for stages in self.steps.stages() for stage in stages]
            # Beside the systems of a turn, which have one square each and the right-hand sides, one solver's arrays.
            arrays = max(
                4 * (GPU_SQUARES if on_gpu else 2) * group.width**2
                + 4 * group.width * group.outputs
                + 4 * (self.models + 8) * min(BLOCK_ELEMENTS, group.width * group.outputs)
                for group in groups
            )
            squares = [sum(4 * (g.width**2 + g.width * g.outputs) for g in stage) for stage in at_once]
            arrays += max(size / self.turns(stage) for size, stage in zip(squares, at_once, strict=True))
            solving = {"arrays": arrays}
        else:
            at_once = self.steps.layers
            systems = [(group.width, group.outputs) for group in groups]
            solving = {"arrays": array_bytes(self.models, systems, 1, self.device.type)}
        sums = max(sum(map(self._sum_bytes, groups)) / self.turns(groups) for groups in at_once)
        weights = self.steps.weights * (2 if self.is_asymmetric else 1)
        summing = {"weights": weights, "sums": sums, "activations": self.steps.activations, "margin": margin}
        if not self.is_asymmetric:
            solving = {"sums": sums} | solving
        return max(summing, solving, key=lambda parts: sum(parts.values()))

    def _sum_bytes(self, group: LayerInput) -> int:
        if self.is_asymmetric:
            # Three sums over the texts of a model, beside the system's square and right-hand sides.
            return 4 * (4 * group.width**2 + group.width * group.outputs)
        return self.models * group.sum_bytes


def _models(flags: MergeFlags) -> list[PreTrainedModel]:
    """The models of a merge, on the meta device.

    Raises:
        InputError: they differ in size.
    """
    revisions = flags.revisions[: len(flags.models)]
    names = [config_name(name, revision, flags.base) for name, revision in zip_longest(flags.models, revisions)]
    models = [_model(name, revision, "auto") for name, revision in names]
    sizes = {name: parameters(model) for name, model in zip(flags.models, models, strict=True)}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        raise InputError(f"models of different sizes do not merge; parameters: {listed}")
    return models


def estimate_merge(flags: MergeFlags, device: Device) -> Estimate:
    """Estimate a merge; for RegMean, with Grams of all inputs."""
    models = _models(flags)
    total, count, alphas = parameters(models[0]), len(models), len(flags.alpha)
    inputs = _solved_inputs(models[0], all(flags.counts_embeddings)) if flags.method == "regmean" else []
    weights_read, flops = float(sum(model.dtype.itemsize * total for model in models)), 0.0
    read = weights_read
    for each in inputs:
        # For three models or more, every Gram is read again for each block of outputs.
        elements = GPU_BLOCK_ELEMENTS if device.type == "cuda" else BLOCK_ELEMENTS
        blocks = math.ceil(each.outputs / max(1, elements // each.width)) if count > 2 else 1
        read += count * each.file_bytes * blocks
        # A factor for each alpha, and a solution for each output. A right-hand side for each output, and half a product
        # for the objective, for each model, or once for two models.
        flops += alphas * (each.width**3 / 3 + 2 * each.outputs * each.width**2)
        flops += 3 * each.outputs * each.width**2 * (1 if count == 2 else count)
    systems = [(each.width, each.outputs) for each in inputs]
    on_gpu = device.type == "cuda"
    arithmetic, host = flops / device.single_flops, _host_seconds(flags, total, read - weights_read, on_gpu)
    written = float(len(flags.output_dirs()) * total * _dtype(flags.dtype, models[0].dtype).itemsize)
    time = f"{duration(arithmetic)} of arithmetic, {duration(host)} of work on the host, at rates of a busy one; "
    time += f"disk excluded, {duration((read + written) / DISK)} at {gb(DISK)}/s"
    return Estimate(
        parameters={"each model": total},
        memory={"arrays": array_bytes(count, systems, alphas if inputs else 0, device.type)},
        counts={"systems": len(inputs)},
        flops=flops,
        # Work beside a GPU's; on a CPU both take the same cores.
        seconds=max(arithmetic, host) if on_gpu else arithmetic + host,
        transfers={"read": read, "written": written},
        notes={"work": "in float32", "memory": "models are never loaded whole", "time": time},
    )


def _solved_inputs(model: PreTrainedModel, by_counts: bool) -> list[LayerInput]:
    """Inputs of the systems of a merge; that of a tied head only if embeddings are merged by counts."""
    inputs, layers = layer_inputs(model), linear_layers(model)
    if by_counts or untied_head(model) is not None:
        return inputs
    return [each for each in inputs if layers[each.layers[0]] is not model.get_output_embeddings()]


def _host_seconds(flags: MergeFlags, elements: int, gram_bytes: float, on_gpu: bool) -> float:
    """Time of a merge's work on the host; `elements` are those of each model."""
    reading = len(flags.models) / 2 * elements / AVERAGED + gram_bytes / UNPACKED
    writing = len(flags.output_dirs()) * elements / ENCODED
    if flags.method == "regmean" and on_gpu:
        return max(reading / GPU_READERS, writing)
    return (reading + writing) / (READERS if flags.method == "regmean" else AVERAGERS)


def _model(path: str, revision: str | None, dtype: str, trust_remote_code: bool = False) -> PreTrainedModel:
    config = base_config(path, revision, trust_remote_code)
    model_class = auto_class(Checkpoint(path, Path(path), {}, {}), config)
    return on_meta(model_class, path, config, _dtype(dtype, config.dtype) or torch.float32, trust_remote_code)


def _dtype(name: str, default: torch.dtype | None) -> torch.dtype | None:
    return default if name == "auto" else getattr(torch, name)
