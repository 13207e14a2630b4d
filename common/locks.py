"""Locks that allow one run at a time on an output folder."""

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from common.errors import InputError
from common.io import writing

# Errors of file systems without locks: Lustre mounted without them, some that run in user space.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder`, which need not exist yet, for this process; on a file system without locks, warn instead.

    The kernel locks a file beside the folder: the lock ends with the process in all cases, and emptying the folder
    does not release it.

    Raises:
        InputError: another process holds it; its id and machine are named.
    """
    path = folder.parent / f".{folder.name}.lock"
    made = not path.parent.exists()
    # Retries for a moment: a run that has just ended may have removed the file.
    lock = FileLock(path, timeout=0.1, fallback_to_soft=False, on_acquired=_write_holder)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise InputError(
                f"{folder} is in use by {_read_holder(path)}: wait for that run, end it, or choose another folder"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(f"warning: no locks here: see that no other run writes to {folder}", file=sys.stderr)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
        # Leaves nothing behind if bad input was found before anything was written.
        if made:
            with contextlib.suppress(OSError):
                path.parent.rmdir()


def _write_holder(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())


def _read_holder(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(errors="replace") or "another process"
    return "another process"
