"""Errors of a device or a host without enough memory, as advice."""

from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import InputError
from common.ranks import is_out_of_memory

SMALLER_BATCHES = "take a smaller --tokens_per_batch, or --device cpu"
OTHER_DEVICE = "take --device cpu, or a machine with more memory"


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Report that memory runs out in a block.

    Raises:
        InputError: it does; the message ends with the advice.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        raise InputError(f"out of memory: {advice}") from error
