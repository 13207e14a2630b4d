"""DeepSpeed as training uses it: its settings, and the mapping as ZeRO partitions it."""

import contextlib
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
# Of AdamW, for every parameter; Muon leaves the second of a matrix at zero.
MOMENTS = ("exp_avg", "exp_avg_sq")


def deepspeed_config(path: str | None, sizes: BatchSizes, device: torch.device) -> dict[str, Any]:
    """The content of a DeepSpeed JSON with the batch sizes filled in.

    Args:
        path: of the file; None for the default of the device's kind.
        sizes: of a batch.
        device: of this rank.

    Raises:
        InputError: an unreadable file, one that sets what flags set, or one that leaves the precision open.
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
            raise InputError(f"{path}: take {key!r} out, {instead} stands for it")
    config |= {
        "train_batch_size": sizes.train_batch_size,
        "train_micro_batch_size_per_gpu": sizes.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": sizes.gradient_accumulation,
        # The optimizer is this repository's or PyTorch's own, wherever its state is kept.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    if not isinstance(config.setdefault("gradient_clipping", 1.0), int | float):
        raise InputError(f"{path}: gradient_clipping is {reprlib.repr(config['gradient_clipping'])}, no number")
    try:
        stage = DeepSpeedConfig(config).zero_optimization_stage
    except (ValueError, TypeError, AssertionError, DeepSpeedConfigError) as error:
        raise InputError(f"{path}: DeepSpeed refuses it: {' '.join(str(error).split())}") from error
    if stage == 0:
        raise InputError(f'{path}: set "zero_optimization": {{"stage": 2}}, or 1, or 3')
    return config


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """A section of a DeepSpeed JSON without what it leaves to Hugging Face's Trainer: keys whose value is "auto"."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != "auto"
    }


def weights_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """The dtype of the frozen weights under a DeepSpeed config."""
    return torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") else torch.float32


@contextlib.contextmanager
def linear_layers(zero: dict[str, Any]) -> Iterator[None]:
    """Linear layers as they are under this part of a DeepSpeed config.

    ZeRO-3's keep their inputs for the backward pass, frozen or not.
    """
    plain = torch.nn.functional.linear
    if zero["stage"] == 3 and zero.get("memory_efficient_linear", True):
        torch.nn.functional.linear = zero3_linear_wrap
    try:
        yield
    finally:
        torch.nn.functional.linear = plain


class MappingState:
    """Values of the mapping and its optimizer's moments, read and set whole, however ZeRO has divided them.

    Every method is for all ranks together, and every tensor float32, of the parameter's shape.

    Args:
        engine: DeepSpeed's, before its first step, with an optimizer of `mindmerger/optim.py`.
        mapping: the module that the engine trains.
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
        """The parameters by name, on the CPU."""
        return {name: safe_get_full_fp32_param(parameter).cpu() for name, parameter in self._parameters.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that `restore` needs beside `steps`: values as `mapping.{name}`, moments as `{moment}.{name}`."""
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
        """Set everything to what `tensors` and `steps` have read."""
        self.set({name: tensors[f"mapping.{name}"] for name in self._parameters})
        for name, parameter in self._parameters.items():
            for moment in MOMENTS:
                self._set_optimizer_value(parameter, tensors[f"{moment}.{name}"].to(self._process.device), moment)
        for state in self._optimizer.state.values():
            state["step"].fill_(steps)

    def change(self, parameter: torch.nn.Parameter, to: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace one parameter's value by what `to` makes of it, in the model and where the optimizer moves it."""
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            value = to(parameter.data.float())
            parameter.data.copy_(value)
        self._set_optimizer_value(parameter, value)

    def _make_moments(self, wrapper: Any) -> None:
        """Give the optimizer the state that it else makes at its first step, so that it can be read and set before."""
        partitions = [partition for group in self._optimizer.param_groups for partition in group["params"]]
        # ZeRO-3 hands its partitions to the optimizer only while that steps.
        for partition in partitions or wrapper.fp32_partitioned_groups_flat:
            moments = {name: torch.zeros_like(partition) for name in MOMENTS}
            self._optimizer.state[partition] = {"step": torch.zeros(()), **moments}
        if partitions:
            # DeepSpeed's functions then find a parameter's part. Private: DeepSpeed calls it in its first step only.
            wrapper._lazy_init_hp_params_optimizer_state()

    def _set_optimizer_value(self, parameter: torch.nn.Parameter, value: torch.Tensor, moment: str = "") -> None:
        """Replace what ZeRO's optimizer holds of a parameter: its float32 copy, or one of MOMENTS."""
        if not hasattr(parameter, "ds_id"):
            if moment:
                safe_set_full_optimizer_state(parameter, value, moment)
            else:
                safe_set_full_fp32_param(parameter, value)
            return
        # Under ZeRO-3 the same call would read past the end where the ranks do not divide the parameter.
        size, ranks = parameter.ds_tensor.numel(), self._process.world_size
        padded = torch.nn.functional.pad(value.flatten(), (0, size * ranks - value.numel()))
        part = padded.view(ranks, size)[self._process.rank]
        if moment:
            safe_set_local_optimizer_state(parameter, part, moment)
        else:
            safe_set_local_fp32_param(parameter, part)
