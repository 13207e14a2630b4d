"""Shared parts of the checks: device and roofline, timing, peak memory, waits of the host, random models."""

import functools
import inspect
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from common.devices import HERE
from common.ranks import Process
from mindmerger import packing
from regmean.config import GramFlags
from tools.estimate import Device, Estimate, causal_lm_on_meta, cost_of, find_device, weight_bytes
from tools.estimate_regmean import estimate_grams

REPOSITORY = Path(__file__).resolve().parents[2]
HALF = torch.bfloat16
LAYERS = (32, 24, 16, 12, 8, 4, 2)  # of the LLM: the first number that fits into memory
ROOM = 0.9  # fraction of free memory that estimates may fill
LENGTH = 256  # of a text of a Gram, as published
# Configurations of the dry run.
SMALL_LLM = {
    **{"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 6, "vocab_size": 256},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
SMALL_MT = {"vocab_size": 256, "d_model": 24, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 3}
# Operations that read values of a tensor, for which a GPU's host waits.
_READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select"}


class LeftOut(Exception):
    """Raised by a check that cannot run here; the message has the reason."""


@dataclass(eq=False)
class Bench:
    """The device of the checks.

    Attributes:
        process: this process and its device.
        small: tiny shapes, for a dry run on a CPU.
        folder: temporary folder for the configs of the models in use.
    """

    process: Process
    small: bool
    folder: Path

    @property
    def device(self) -> torch.device:
        """Device of the process."""
        return self.process.device

    @property
    def is_cuda(self) -> bool:
        """True on a GPU."""
        return self.device.type == "cuda"

    @cached_property
    def roofline(self) -> Device:
        """Rates of matrix products and of a copy, as `--plan` measures them, and free memory before any model."""
        return find_device(HERE, str(self.device))

    @cached_property
    def mt(self) -> Path:
        """Folder of the encoder's config, mT5-xl's."""
        return self._write_config("mt5-xl", SMALL_MT)

    @cached_property
    def planned_llm(self) -> PreTrainedModel:
        """LLM on the meta device: Llama-3-8B, with as many layers as fit into memory with their Grams' sums."""
        for layers in LAYERS:
            options = SMALL_LLM if self.small else {"num_hidden_layers": layers}
            model = causal_lm_on_meta(str(self._write_config("llama-3-8b", options)), dtype=HALF)
            need = self.planned_grams(model).peak + weight_bytes(model.get_output_embeddings())
            if self.small or need <= ROOM * self.roofline.memory:
                return model
        raise LeftOut(f"{self.roofline.memory / 1e9:.0f} GB are too few for {LAYERS[-1]} layers of Llama-3-8B")

    @cached_property
    def llm(self) -> PreTrainedModel:
        """The same LLM with random weights, on the device."""
        config = AutoConfig.from_pretrained(self.planned_llm.name_or_path)
        return random_model(AutoModelForCausalLM, config, self.device)

    @property
    def tokens(self) -> int:
        """Number of tokens of a batch of texts."""
        return 64 if self.small else 8192

    @property
    def length(self) -> int:
        """Number of tokens of a text."""
        return 16 if self.small else LENGTH

    def planned_grams(self, model: PreTrainedModel) -> Estimate:
        """Estimate for a model's Grams, all in one pass."""
        flags = GramFlags(model=model.name_or_path, plan=HERE, tokens_per_batch=self.tokens, max_length=self.length)
        return estimate_grams(flags, model, replace(self.roofline, memory=float(1 << 50)))

    def _write_config(self, name: str, options: dict[str, int]) -> Path:
        config = AutoConfig.from_pretrained(REPOSITORY / "configs/models" / name)
        for key, value in options.items():
            setattr(config, key, value)
        config.save_pretrained(self.folder / name)
        return self.folder / name

    def synchronize(self) -> None:
        """Wait for all work on the device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def seconds_of(self, work: Callable[[], Any], at_most: float = 8.0) -> float:
        """Median seconds of at most five calls, including their work on the device, after one warm-up."""
        times: list[float] = []
        started = time.perf_counter()
        while len(times) < 2 or (len(times) < 6 and not self.small and time.perf_counter() - started < at_most):
            self.synchronize()
            begun = time.perf_counter()
            work()
            self.synchronize()
            times.append(time.perf_counter() - begun)
        return statistics.median(times[1:])

    def peak_of(self, work: Callable[[], Any], *given: nn.Module) -> float:
        """Peak bytes of tensors that a call adds to those before it, which include the weights of `given` modules.

        On a CPU they are counted as for `--plan`.
        """
        if not self.is_cuda:
            return cost_of(work, *given).peak_bytes
        self.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    @contextmanager
    def waits(self) -> Iterator[Counter]:
        """Count the host's waits for the device in the block, by line of code; complete at its end.

        On a CPU, operations that would make a GPU's host wait are counted.
        """
        places: Counter = Counter()
        if not self.is_cuda:
            with _Reads(places):
                yield places
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield places
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places.update(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))


class _Reads(TorchDispatchMode):
    """Counts operations that read values, by their names."""

    def __init__(self, places: Counter):
        super().__init__()
        self._places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.overloadpacket.__name__ in _READS:
            self._places[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def random_model(
    auto_class: Any, config: PretrainedConfig, device: torch.device | str, dtype: torch.dtype = HALF
) -> PreTrainedModel:
    """Create a frozen model of this config with random weights on `device`, always the same on one device."""
    torch.manual_seed(0)
    with torch.device(device):
        return auto_class.from_config(config, dtype=dtype).eval().requires_grad_(False)


def random_texts(count: int, shortest: int, longest: int, vocabulary: int) -> list[list[int]]:
    """Random token ids of texts with lengths from `shortest` to `longest`."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Frobenius norm of the difference, relative to the reference's."""
    ours, reference = ours.detach().double().cpu(), reference.detach().double().cpu()
    return float((ours - reference).norm() / reference.norm())


def adapt_to_older_torch() -> bool:
    """Adapt `varlen_attn` of torch 2.11, which has no flag for grouped heads; True if that was necessary."""
    original = packing.varlen_attn
    if "enable_gqa" in inspect.signature(original).parameters:
        return False

    @functools.wraps(original)
    def adapted(*args: Any, enable_gqa: bool = False, **options: Any) -> Any:
        return original(*args, **options)

    packing.varlen_attn = adapted
    return True
