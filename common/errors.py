"""The exception for what the user can mend, and how a script ends on it."""

import os
import sys
import traceback
from collections.abc import Callable

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not done, try again
# Ends the process with an exit code; `common.ranks` sets its own in a process that joins a process group.
end_process: Callable[[int], None] = sys.exit


class Stopped(Exception):
    """A signal has ended the run, and what it had done is on disk: the same command continues it."""


class InputError(Exception):
    """Bad input: the message names the file, line, flag or tensor, and says what to do."""


def first_line(error: Exception) -> str:
    """What a library's error says, without the page of advice that may follow; its kind, where it says nothing."""
    return str(error).strip().split("\n", 1)[0][:500] or type(error).__name__


def exit_with_message(main: Callable[[], None]) -> None:
    """Run a script's `main` and end the process; in one line on stderr, without a traceback, where that says all.

    Exit codes: 0, 2 for an `InputError`, `EXIT_STOPPED` for a run that a signal has stopped, 1 for any other exception.
    """
    code = 0
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        # What the system refuses to do with a file that it names, a flag or a link has named.
        refused = isinstance(error, OSError) and error.filename is not None
        expected = refused or isinstance(error, (InputError, Stopped))
        if not expected and end_process is sys.exit:
            raise
        rank = os.environ.get("RANK", "0")
        stopped = isinstance(error, Stopped)
        kind = ("stopped" if stopped else "error") + ("" if rank == "0" else f" (rank {rank})")
        # At once, so that the lines of two ranks do not mix.
        print(f"{kind}: {error if expected else traceback.format_exc().rstrip()}", file=sys.stderr, flush=True)
        code = EXIT_STOPPED if stopped else 2 if expected else 1
    end_process(code)
