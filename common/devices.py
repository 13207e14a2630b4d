"""Devices for `--plan`, and the number of processes that a launcher started. Imports no torch."""

import difflib
import os
import re

from common.errors import InputError

# `--plan` without a device.
HERE = "this machine"
PLAN_HELP = (
    "print memory, work and time, from the models' configs alone, and exit: on this machine, or on another one, as in "
    "h100 or 8xa100-80gb"
)
# Memory in GiB that PyTorch finds free on an idle GPU; the data sheets' dense TFLOP/s with 16 bits (accumulated in
# float32) and in float32; GB/s.
GPUS = {
    "rtx3090": (23.2, 71, 35.6, 936),
    "rtx4090": (23.1, 165, 82.6, 1008),
    "a6000": (47.4, 155, 38.7, 768),
    "l40s": (43.9, 362, 91.6, 864),
    "a100-40gb": (38.9, 312, 19.5, 1555),
    "a100-80gb": (78.7, 312, 19.5, 2039),
    "h100": (78.6, 989, 67, 3350),
    "h200": (139.2, 989, 67, 4800),
}


def parse_devices(text: str) -> tuple[str, int | None]:
    """Parse `h100` or `8xh100` to (name, count), and `8x` to (`HERE`, count); the count is None if not given.

    Raises:
        InputError: unknown device.
    """
    if text == HERE:
        return HERE, None
    count, name = re.fullmatch(r"(?:(\d{1,6})x)?(.*)", text.lower(), flags=re.DOTALL).groups()
    if count is not None and int(count) == 0:
        raise InputError(f"--plan {text}: there must be one device at least")
    if name not in GPUS:
        nearest = difflib.get_close_matches(name, GPUS, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise InputError(
            f"--plan {text!r}: {hint}known devices: {', '.join(GPUS)}, or several, as in 8xh100; without one, "
            "this machine"
        )
    return name, int(count) if count else None


def launched_world_size() -> int:
    """Number of processes that the launcher (deepspeed, torchrun) started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
