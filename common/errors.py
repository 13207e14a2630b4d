"""The one exception that means: the user can mend this."""

import os
import sys
from collections.abc import Callable


class InputError(Exception):
    """Bad input: the message names the file, line, flag or tensor, and says what to do."""


def first_line(error: Exception) -> str:
    """What a library's error says, without the page of advice that may follow."""
    return str(error).strip().split("\n", 1)[0]


def exit_with_message(main: Callable[[], None]) -> None:
    """Run a script's `main`; an `InputError` becomes one line on stderr and exit code 2, without a traceback."""
    try:
        main()
    except InputError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
