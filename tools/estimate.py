"""Estimates of memory and work, from a run of a computation on torch's meta device, where tensors have no data.

No formula of a model's architecture is used: the models are built from their configs, their code runs, and every tensor
is counted from its creation to its release.
"""

import os
import weakref
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

# Documented, although its path is private: PyTorch has no other.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from common.devices import GPUS, HERE, launched_world_size, parse_devices
from common.errors import InputError, first_line
from common.models import base_config, model_on_meta
from common.ranks import available_memory

ATTENTION = "shapes_only"
# Families that compute attention by classes of their own, without such a function.
OWN_ATTENTION = ("falcon", "gptj", "gpt_neo", "mpt")
# Number of layers that are run: further layers add the same cost each.
FEW, MORE = 2, 4
# Products in the backward pass of attention: the scores again, and those for dq, dk, dv and dp.
BACKWARD_PRODUCTS = 2.5
# Fractions of the data sheets' figures that matrix products and memory transfers reach in practice.
SUSTAINED_FLOPS = 0.4
SUSTAINED_BANDWIDTH = 0.7
# Time of a host to start one of PyTorch's operations on a GPU, in Python and the driver.
LAUNCH_SECONDS = 5e-6


@dataclass(frozen=True)
class Cost:
    """Cost of a computation, without the weights of its modules.

    Attributes:
        peak_bytes: largest number of bytes of tensors at once.
        kept_bytes: bytes of tensors at the end.
        flops: operations of matrix products; a multiplication and an addition are two.
        calls: number of PyTorch's operations, each of which the host of a GPU has to start.
    """

    peak_bytes: float
    kept_bytes: float
    flops: float
    calls: float = 0


class _Tracker(TorchDispatchMode):
    """Context manager that counts tensors and operations of its block."""

    current: "_Tracker | None" = None

    def __init__(self, *given: nn.Module):
        super().__init__()
        self.live = self.peak = self.calls = 0
        self.flops = 0.0
        tensors = (tensor for module in given for tensor in (*module.parameters(), *module.buffers()))
        self._seen = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in tensors}

    def __enter__(self) -> "_Tracker":
        _Tracker.current = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _Tracker.current = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = StorageWeakRef(storage).cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def cost_of(run: Callable[[], Any], *given: nn.Module) -> Cost:
    """Cost of `run`, a function of tensors on the meta device; its result counts as kept.

    Args:
        run: function to run.
        given: modules whose weights are not counted.
    """
    with _Tracker(*given) as tracker:
        kept = run()
        live = tracker.live
        del kept
    return Cost(tracker.peak, live, tracker.flops, tracker.calls)


def cost_of_layers(run: Callable[[], Any], model: PreTrainedModel, *given: nn.Module) -> Cost:
    """Cost of a model of many layers, extrapolated from runs of `cost_of` with few layers, of the most frequent shapes.

    Raises:
        InputError: the model cannot run without data.
    """

    def run_or_refuse() -> Any:
        try:
            return run()
        # Errors of several types: some kinds of experts in float32, and code that reads values.
        except Exception as error:
            name = f"{type(model).__name__} in {str(model.dtype).removeprefix('torch.')}"
            raise InputError(f"--plan: {name} cannot run without data: {first_line(error)}") from error

    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    path, _, name = max(lists, key=lambda name: len(lists[name])).rpartition(".")
    parent = model.get_submodule(path)
    every = getattr(parent, name)
    if len(every) <= MORE:
        return cost_of(run_or_refuse, model, *given)
    kinds = [[parameter.shape for parameter in layer.parameters()] for layer in every]
    usual = max(kinds, key=kinds.count)
    alike = nn.ModuleList(layer for layer, kind in zip(every, kinds, strict=True) if kind == usual)
    costs = []
    try:
        for count in (FEW, MORE):
            setattr(parent, name, (alike if len(alike) >= MORE else every)[:count])
            costs.append(cost_of(run_or_refuse, model, *given))
    finally:
        setattr(parent, name, every)
    few, more = map(astuple, costs)
    return Cost(*(a + (b - a) / (MORE - FEW) * (len(every) - FEW) for a, b in zip(few, more, strict=True)))


def causal_lm_on_meta(
    path: str, revision: str | None = None, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the causal language model of a hub id or local folder from its config; see `on_meta`.

    Args:
        dtype: dtype of the weights; None for the config's, or float32 if the config has none.

    Raises:
        InputError: there is no such model.
    """
    config = base_config(path, revision, trust_remote_code)
    return on_meta(AutoModelForCausalLM, path, config, dtype or config.dtype or torch.float32, trust_remote_code)


def on_meta(
    auto_class: Any, path: str, config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool, **options: Any
) -> PreTrainedModel:
    """Build a model without data: frozen, in eval mode, with the attention of this module if the model supports it.

    Args:
        auto_class: class of transformers, such as `AutoModelForCausalLM`.
        path: path of the config, for messages.
        options: arguments of the model's class.

    Raises:
        InputError: the config is not of such a model.
    """
    if config.model_type not in OWN_ATTENTION:
        options["attn_implementation"] = ATTENTION
    model = model_on_meta(auto_class, path, config, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    # Weights are tied in the initialisation, which is skipped here.
    model.tie_weights()
    return model.requires_grad_(False).eval()


def parameters(*modules: nn.Module) -> int:
    """Number of parameters; those with several names are counted once."""
    return sum(tensor.numel() for tensor in {p for module in modules for p in module.parameters()})


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of these parameters and of the buffers."""
    tensors = {t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors)


class _Attention(torch.autograd.Function):
    """Attention with the memory of fused kernels: query, key, value, output and one float32 per query, no scores."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, flops: float) -> torch.Tensor:
        ctx.flops = flops
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        _Tracker.current.flops += flops
        return out

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple:
        _Tracker.current.flops += BACKWARD_PRODUCTS * ctx.flops
        return (*map(torch.empty_like, ctx.saved_tensors[:3]), None)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    rows, heads, queries, width = query.shape
    flops = 2.0 * rows * heads * queries * key.shape[2] * (width + value.shape[-1])
    if getattr(module, "is_causal", False) and queries == key.shape[2]:
        flops /= 2
    if position_bias is not None:
        # The bias is expanded to all rows, since it is added to their padding masks.
        position_bias = position_bias.expand(rows, -1, -1, -1).clone()
    return _Attention.apply(query, key, value, flops).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attend)


@dataclass(frozen=True)
class Device:
    """One of `count` equal devices.

    Attributes:
        type: cuda or cpu.
        memory: bytes that PyTorch may allocate on each.
        half_flops, single_flops: sustained operations per second of matrix products in 16 bits, and in float32.
        bandwidth: sustained bytes per second of its memory.
        basis: source of these figures.
    """

    name: str
    type: str
    count: int
    memory: float
    half_flops: float
    single_flops: float
    bandwidth: float
    basis: str

    @property
    def title(self) -> str:
        """Count and name, such as `8 x h100`."""
        return self.name if self.count == 1 else f"{self.count} x {self.name}"

    def flops(self, itemsize: int) -> float:
        """Operations per second of one device for products of numbers of this many bytes."""
        return self.half_flops if itemsize < 4 else self.single_flops


def known_device(name: str, count: int) -> Device:
    """Build `count` devices of the table, with sustained figures."""
    memory, half, single, bandwidth = GPUS[name]
    return Device(
        name,
        "cuda",
        count,
        memory * 2**30,
        half * 1e12 * SUSTAINED_FLOPS,
        single * 1e12 * SUSTAINED_FLOPS,
        bandwidth * 1e9 * SUSTAINED_BANDWIDTH,
        f"assumed: {SUSTAINED_FLOPS:.0%} of {half:g} TFLOP/s in 16 bits and {single:g} in float32, "
        f"{SUSTAINED_BANDWIDTH:.0%} of {bandwidth:g} GB/s",
    )


def find_device(text: str, device: str) -> Device:
    """Devices of `--plan`, as many as it names, or else as the launcher has started.

    Devices of this machine are measured for a second: its GPU, or its CPU according to `--device`.

    Raises:
        InputError: unknown device.
    """
    name, count = parse_devices(text)
    count = launched_world_size() if count is None else count
    if name != HERE:
        return known_device(name, count)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        memory = available_memory(chosen)
        half, single = (_measured_flops(chosen, dtype) for dtype in (torch.bfloat16, torch.float32))
        bandwidth = _measured_bandwidth(chosen)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: {first_line(error)}") from error
    basis = (
        f"measured: {half / 1e12:.2g} TFLOP/s in bfloat16, {single / 1e12:.2g} in float32, {bandwidth / 1e9:.0f} GB/s"
    )
    return Device(f"{HERE}'s {chosen.type}", chosen.type, count, memory, half, single, bandwidth, basis)


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    # Larger products in bfloat16 take seconds on some CPUs.
    size = 8192 if device.type == "cuda" else 256 * dtype.itemsize
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / _seconds("a @ a", a=a)


def _measured_bandwidth(device: torch.device) -> float:
    a = torch.ones(1 << (28 if device.type == "cuda" else 25), device=device)
    return 2 * a.nbytes / _seconds("b.copy_(a)", a=a, b=torch.zeros_like(a))


def _seconds(statement: str, **tensors: torch.Tensor) -> float:
    timer = Timer(statement, globals=tensors, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.1).median


@dataclass(frozen=True)
class Estimate:
    """Memory, work and time of a run.

    Attributes:
        parameters: number of parameters of each model, by name.
        memory: bytes on a device at once, by kind.
        counts: amounts of work: steps, tokens, problems, passes, systems.
        flops: operations of matrix products on all devices.
        seconds: time of these operations.
        transfers: bytes written, read or sent, by name.
        notes: remarks on the figures, by name.
    """

    parameters: dict[str, int]
    memory: dict[str, float]
    counts: dict[str, int]
    flops: float
    seconds: float
    transfers: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """Maximum number of bytes on a device."""
        return sum(self.memory.values())


def show(title: str, device: Device, estimate: Estimate) -> None:
    """Print an estimate, on rank 0 only."""
    if int(os.environ.get("RANK", "0")):
        return
    verdict = "fits" if estimate.peak <= device.memory else "DOES NOT FIT"
    lines = {
        "device": f"{device.title}, {gb(device.memory)} each; {device.basis}",
        "parameters": ", ".join(f"{name} {amount(count)}" for name, count in estimate.parameters.items()),
        **{name: gb(size) for name, size in estimate.memory.items()},
        "memory": f"{gb(estimate.peak)} of {gb(device.memory)}: {verdict}",
        **{name: f"{count:,}" for name, count in estimate.counts.items()},
        "work": f"{amount(estimate.flops)}FLOP",
        "time": duration(estimate.seconds),
        **{name: gb(size) for name, size in estimate.transfers.items()},
    }
    print(f"plan: {title}")
    for name, text in lines.items():
        note = f"; {estimate.notes[name]}" if name in estimate.notes else ""
        print(f"  {name.ljust(max(map(len, lines)))}  {text}{note}")


def gb(size: float) -> str:
    """Format bytes, such as `12.3 GB`, of 10^9 bytes."""
    for unit, name in ((1e15, "PB"), (1e12, "TB")):
        if size >= 10 * unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.1f} GB"


def amount(count: float) -> str:
    """Format a number, such as `6.74 B`."""
    units = {1e18: "E", 1e15: "P", 1e12: "T", 1e9: "B", 1e6: "M", 1e3: "K"}
    unit = next((unit for unit in units if count >= unit), 1)
    return f"{count / unit:.3g} {units.get(unit, '')}".rstrip()


def duration(seconds: float) -> str:
    """Format seconds, such as `2.5 h`."""
    units = {86400: "days", 3600: "h", 60: "min"}
    unit = next((unit for unit in units if seconds >= 2 * unit), 1)
    return f"{seconds / unit:.1f} {units.get(unit, 's')}"
