"""DeepSpeed's settings for training, and access to the mapping in ZeRO's partitions."""

import contextlib
import os
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from common.errors import InputError
from common.io import read_json
from common.ranks import Process
from mindmerger.config import BatchSizes

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "deepspeed"
# AdamW's state of every parameter; under Muon the second moment of a matrix stays zero.
MOMENTS = ("exp_avg", "exp_avg_sq")


def free_shared_memory(process: Process) -> None:
    """Remove the name of the shared memory that DeepSpeed opens on a CPU, 69 MB a rank.

    DeepSpeed 0.19 keeps the name, and with it the memory, after the process. Without a name, the memory stays usable
    and is freed with the processes.
    """
    process.barrier()  # every rank has opened the others' memory
    group = "_".join(str(part) for part in (os.getuid(), *map(os.environ.get, ("MASTER_ADDR", "MASTER_PORT"))))
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{group}_{process.rank}").unlink(missing_ok=True)


def deepspeed_config(path: str | None, sizes: BatchSizes, device: torch.device) -> dict[str, Any]:
    """Read a DeepSpeed JSON and fill in the batch sizes.

    Args:
        path: path of the file; None for the default of the device type.
        sizes: batch sizes of training.
        device: device of this rank.

    Raises:
        InputError: the file is unreadable or invalid, or sets values that flags set.
    """
    path = Path(path or CONFIGS / ("zero2_bf16.json" if device.type == "cuda" else "cpu.json"))
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object")
    bf16 = config.get("bf16", {})
    if not isinstance(bf16, dict) or not isinstance(bf16.get("enabled", False), bool):
        raise InputError(f'{path}: write "bf16": {{"enabled": true}} or false, not {reprlib.repr(bf16)}')
    config = _without_auto(config)
    for key, instead in {"optimizer": "--lr", "scheduler": "--lr_scheduler", "fp16": "bf16"}.items():
        if key in config:
            raise InputError(f"{path}: remove {key!r}, and use {instead} instead")
    config |= {
        "train_batch_size": sizes.train_batch_size,
        "train_micro_batch_size_per_gpu": sizes.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": sizes.gradient_accumulation,
        # Keeps the optimizer of `optim.py`, also if its state is offloaded.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    if not isinstance(config.setdefault("gradient_clipping", 1.0), int | float):
        raise InputError(f"{path}: gradient_clipping is {reprlib.repr(config['gradient_clipping'])}, not a number")
    try:
        stage = DeepSpeedConfig(config).zero_optimization_stage
    except (ValueError, TypeError, AssertionError, DeepSpeedConfigError) as error:
        raise InputError(f"{path}: invalid for DeepSpeed: {' '.join(str(error).split())}") from error
    if stage == 0:
        raise InputError(f'{path}: set "zero_optimization": {{"stage": 2}}, or 1, or 3')
    return config


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """Section of a DeepSpeed JSON without keys of value "auto", which Hugging Face's Trainer would fill in."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != "auto"
    }


def weights_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """Dtype of the frozen weights under a DeepSpeed config."""
    return torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") else torch.float32


@contextlib.contextmanager
def linear_layers(zero: dict[str, Any]) -> Iterator[None]:
    """Replace `torch.nn.functional.linear` as DeepSpeed does under this `zero_optimization` section.

    Under ZeRO-3 a linear layer keeps its input for the backward pass, frozen or not.
    """
    plain = torch.nn.functional.linear
    if zero["stage"] == 3 and zero.get("memory_efficient_linear", True):
        torch.nn.functional.linear = zero3_linear_wrap
    try:
        yield
    finally:
        torch.nn.functional.linear = plain


class MappingState:
    """Access to whole values and optimizer moments of the mapping, for any partitioning by ZeRO.

    Every method is a collective of all ranks. Every tensor is float32 and has the parameter's shape.

    Args:
        engine: DeepSpeed's engine before its first step, with an optimizer of `mindmerger/optim.py`.
        mapping: module that the engine trains.
        process: this rank.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, mapping: torch.nn.Module, process: Process):
        self._parameters = dict(mapping.named_parameters())
        self._optimizer = engine.optimizer.optimizer
        self._process = process
        self._make_moments(engine.optimizer)

    @property
    def steps(self) -> float:
        """Optimizer steps taken."""
        return float(next(iter(self._optimizer.state.values()))["step"])

    def values(self) -> dict[str, torch.Tensor]:
        """Parameters by name, on the CPU."""
        return {name: safe_get_full_fp32_param(parameter).cpu() for name, parameter in self._parameters.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors for `restore`: values as `mapping.{name}`, moments as `{moment}.{name}`."""
        return {f"mapping.{name}": value for name, value in self.values().items()} | {
            f"{moment}.{name}": safe_get_full_optimizer_state(parameter, moment).cpu()
            for name, parameter in self._parameters.items()
            for moment in MOMENTS
        }

    def set(self, values: dict[str, torch.Tensor]) -> None:
        """Set every parameter, by name."""
        for name, parameter in self._parameters.items():
            self.change(parameter, lambda _, name=name: values[name].to(self._process.device))

    def restore(self, tensors: dict[str, torch.Tensor], steps: float) -> None:
        """Set values, moments and step count to those that `tensors` and `steps` returned."""
        self.set({name: tensors[f"mapping.{name}"] for name in self._parameters})
        for name, parameter in self._parameters.items():
            for moment in MOMENTS:
                self._set_optimizer_value(parameter, tensors[f"{moment}.{name}"].to(self._process.device), moment)
        for state in self._optimizer.state.values():
            state["step"].fill_(steps)

    def change(self, parameter: torch.nn.Parameter, to: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply `to` to one parameter's value, in the model and in the optimizer's copy."""
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            value = to(parameter.data.float())
            parameter.data.copy_(value)
        self._set_optimizer_value(parameter, value)

    def _make_moments(self, wrapper: Any) -> None:
        """Create the optimizer's state before its first step, so that it can be read and set."""
        partitions = [partition for group in self._optimizer.param_groups for partition in group["params"]]
        # Under ZeRO-3 the optimizer has the partitions only during a step.
        for partition in partitions or wrapper.fp32_partitioned_groups_flat:
            moments = {name: torch.zeros_like(partition) for name in MOMENTS}
            self._optimizer.state[partition] = {"step": torch.zeros(()), **moments}
        if partitions:
            # Needed by DeepSpeed's access functions. Private: DeepSpeed calls it only in its first step.
            wrapper._lazy_init_hp_params_optimizer_state()

    def _set_optimizer_value(self, parameter: torch.nn.Parameter, value: torch.Tensor, moment: str = "") -> None:
        """Set a parameter's value in ZeRO's optimizer: its float32 copy, or one of MOMENTS."""
        if not hasattr(parameter, "ds_id"):
            if moment:
                safe_set_full_optimizer_state(parameter, value, moment)
            else:
                safe_set_full_fp32_param(parameter, value)
            return
        # Under ZeRO-3 the same call would read past the end if the parameter is not divisible by the ranks.
        size, ranks = parameter.ds_tensor.numel(), self._process.world_size
        padded = torch.nn.functional.pad(value.flatten(), (0, size * ranks - value.numel()))
        part = padded.view(ranks, size)[self._process.rank]
        if moment:
            safe_set_local_optimizer_state(parameter, part, moment)
        else:
            safe_set_local_fp32_param(parameter, part)
