"""Devices of an estimate: memory and sustained speed of each, and their number. Imports no torch."""

import difflib
import os
import re
from dataclasses import dataclass

from common.errors import InputError

# `--plan` without a device.
HERE = "this machine"
PLAN_HELP = (
    "print memory, work and time, from the models' configs alone, and exit: on this machine, or on another one, as in "
    "h100 or 8xa100-80gb"
)
# Of the data sheets' figures, what matrix products and streams over memory reach in practice.
SUSTAINED_FLOPS = 0.4
SUSTAINED_BANDWIDTH = 0.7


@dataclass(frozen=True)
class Device:
    """One of `count` like devices.

    Attributes:
        name: of the device.
        type: cuda or cpu.
        count: how many there are.
        memory: bytes that PyTorch may allocate on each.
        half_flops, single_flops: operations per second that matrix products of 16 bits, and of float32, sustain.
        bandwidth: bytes per second of its memory that can be counted on.
        basis: where these figures come from.
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
        """As in `8 x h100`."""
        return self.name if self.count == 1 else f"{self.count} x {self.name}"

    def flops(self, itemsize: int) -> float:
        """Operations per second of one device for products of numbers of that many bytes."""
        return self.half_flops if itemsize < 4 else self.single_flops


# Memory in GiB that PyTorch finds free on an empty one, CUDA's own taken off; data sheets' dense TFLOP/s with 16 bits
# (accumulated in float32) and in float32; GB/s.
_GPUS = {
    "rtx3090": (23.2, 71, 35.6, 936),
    "rtx4090": (23.1, 165, 82.6, 1008),
    "l40s": (43.9, 362, 91.6, 864),
    "a100-40gb": (38.9, 312, 19.5, 1555),
    "a100-80gb": (78.7, 312, 19.5, 2039),
    "h100": (78.6, 989, 67, 3350),
    "h200": (139.2, 989, 67, 4800),
}


def parse_devices(text: str) -> tuple[str, int | None]:
    """(name, count) of `h100` or `8xh100`; (`HERE`, count) of `8x`; the count is None where none is said.

    Raises:
        InputError: no such device.
    """
    if text == HERE:
        return HERE, None
    count, name = re.fullmatch(r"(?:(\d{1,6})x)?(.*)", text.lower(), flags=re.DOTALL).groups()
    if count is not None and int(count) == 0:
        raise InputError(f"--plan {text}: there must be one device at least")
    if name not in _GPUS:
        nearest = difflib.get_close_matches(name, _GPUS, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise InputError(
            f"--plan {text[:100]!r}: {hint}known devices: {', '.join(_GPUS)}, or several, as in 8xh100; without one, "
            "this machine"
        )
    return name, int(count) if count else None


def launched_world_size() -> int:
    """Number of processes that the launcher (deepspeed, torchrun) started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def known_device(name: str, count: int) -> Device:
    """`count` devices of the table, at what they sustain."""
    memory, half, single, bandwidth = _GPUS[name]
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
