"""Estimates of Grams and merges at any size, without loading models: `--plan` of both scripts.

The model is built from its config on the meta device (`tools/estimate.py`). Layers with the same input are found from
the tensors, as in a run.
"""

import math
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import nn
from transformers import PreTrainedModel

from common.errors import InputError
from common.logging import quiet_libraries
from regmean.average import AVERAGERS
from regmean.compute import BATCH_MARGIN, LIBRARIES, memory_for_sums, plan_passes
from regmean.config import GramFlags, MergeFlags
from regmean.gram import PANEL
from regmean.gram_file import packed_size
from regmean.hooks import LinearInputs, input_width, linear_layers, untied_head
from regmean.merge import array_bytes
from regmean.read_ahead import READERS
from regmean.solve import BLOCK_ELEMENTS, GPU_BLOCK_ELEMENTS
from tools.estimate import (
    Cost,
    Device,
    Estimate,
    causal_lm_on_meta,
    cost_of,
    cost_of_layers,
    duration,
    find_device,
    gb,
    parameters,
    show,
    weight_bytes,
)

# Bytes per second of a good local disk.
DISK = 1e9
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
    """

    layers: list[str]
    width: int
    outputs: int

    @property
    def sum_bytes(self) -> int:
        """Bytes of its float32 sum in memory."""
        return 4 * self.width**2

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
    model = _model(flags.model, flags.revision, flags.dtype, flags.trust_remote_code)
    show(f"Grams of {flags.model}", device, estimate_grams(flags, model, device))


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
    # Only one half of a symmetric product is computed.
    token_flops = batch.flops / (batch_tokens // length * length) * forwards + sum(width**2 for width in widths)
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


def _forward_passes(
    inputs: list[LayerInput], passes: list[list[str]], layers: dict[str, nn.Module], head: nn.Module | None
) -> float:
    """Work of `passes` in whole forward passes, since each pass ends at its last layer."""
    before: dict[str, int] = {}
    done = 0
    for layer_input in inputs:
        before |= dict.fromkeys(layer_input.layers, done)
        if layers[layer_input.layers[0]] is not head:
            done += layer_input.width * layer_input.outputs
    return sum(before[names[-1]] for names in passes) / done


def layer_inputs(model: PreTrainedModel) -> list[LayerInput]:
    """Find every distinct input of a meta model's linear layers, in the model's order.

    Raises:
        InputError: the inputs of layers depend on the data, as with experts.
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
        )
        for names in inputs.groups()
    ]


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
    show(f"{flags.method} of {len(flags.models)} models", device, estimate_merge(flags, device))


def estimate_merge(flags: MergeFlags, device: Device) -> Estimate:
    """Estimate a merge; for RegMean, with Grams of all inputs."""
    revisions = flags.revisions[: len(flags.models)]
    models = [_model(name, revision, "auto") for name, revision in zip_longest(flags.models, revisions)]
    sizes = {name: parameters(model) for name, model in zip(flags.models, models, strict=True)}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        raise InputError(f"models of different sizes do not merge; parameters: {listed}")
    total, count, alphas = parameters(models[0]), len(models), len(flags.alpha)
    inputs = _solved_inputs(models[0], flags.counts_embeddings) if flags.method == "regmean" else []
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
    return causal_lm_on_meta(path, revision, _dtype(dtype, None), trust_remote_code)


def _dtype(name: str, default: torch.dtype | None) -> torch.dtype | None:
    return default if name == "auto" else getattr(torch, name)
