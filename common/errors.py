"""Errors that the user can correct, and the exit of a script on each kind of error."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not done, try again
# Ends the process with an exit code; `common.ranks` sets its own in a process that joins a process group.
end_process: Callable[[int], None] = sys.exit


class Stopped(Exception):
    """Raised after a signal ended the run. Its state is on disk: the same command continues it."""


class InputError(Exception):
    """Bad input. The message names the file, line, flag or tensor, and what to do."""


def first_line(error: Exception) -> str:
    """First line of a library's error, without the advice that may follow; its class name if the message is empty."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


def is_out_of_memory(error: Exception) -> bool:
    """True if an error reports too little memory: Python's, PyTorch's, CUDA's, a CUDA library's, or the host's."""
    import torch  # late: programs report bad flags without it

    texts = ("CUDA error: out of memory", "STATUS_ALLOC_FAILED", "DefaultCPUAllocator")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in texts)


@contextmanager
def within_memory(message: str) -> Iterator[None]:
    """Raise InputError with `message` if memory runs out in a block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(message) from error


def exit_with_message(main: Callable[[], None]) -> None:
    """Run a script's `main` and end the process; an error that the user can correct is one line on stderr.

    Exit codes: 0, 2 for an `InputError`, `EXIT_STOPPED` for a run that a signal has stopped, 1 for any other exception.
    """
    code = 0
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        # A file named by a flag or a link that the system cannot open.
        refused = isinstance(error, OSError) and error.filename is not None
        expected = refused or isinstance(error, (InputError, Stopped))
        if not expected and end_process is sys.exit:
            raise
        rank = os.environ.get("RANK", "0")
        stopped = isinstance(error, Stopped)
        kind = ("stopped" if stopped else "error") + ("" if rank == "0" else f" (rank {rank})")
        # One call, so that the lines of two ranks do not mix.
        print(f"{kind}: {error if expected else traceback.format_exc().rstrip()}", file=sys.stderr, flush=True)
        code = EXIT_STOPPED if stopped else 2 if expected else 1
    end_process(code)
