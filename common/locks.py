"""One run at a time on one output folder."""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from common.errors import InputError
from common.io import writing

# A pattern for the random letters of `tempfile`: `.a.*.partial` would be that of a folder `a.5`, too.
UNIQUE = "[a-z0-9_]" * 8
# Errors of file systems without locks: Lustre mounted without them, some that run in user space.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, which need not exist yet, for this process alone.

    The lock is the kernel's, on a file beside the folder: it ends with the process, however that ends, and emptying
    the folder does not lift it. Partial files of a killed holder are removed, except those with a lock file of their
    own.

    On a file system without locks there is a warning, no lock, and nothing is removed: it may be a live run's.

    Raises:
        InputError: another process holds it; its id and machine are named.
    """
    path = folder.parent / f".{folder.name}.lock"
    made = not path.parent.exists()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, is_locked = _lock(path, folder)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    try:
        for partial in _left_behind(folder) if is_locked else ():
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        # Where bad input was found before anything was written, nothing is left.
        if made:
            with contextlib.suppress(OSError):
                path.parent.rmdir()


def _left_behind(folder: Path) -> list[Path]:
    """Partial folders and files: of `folder`, and of what is in it and has no lock file of its own."""
    inside = []
    for partial in folder.glob(f".*.{UNIQUE}.partial"):
        name = partial.name.removesuffix(".partial").rpartition(".")[0]
        if not (folder / f"{name}.lock").exists():
            inside.append(partial)
    return [*folder.parent.glob(f".{glob.escape(folder.name)}.{UNIQUE}.partial"), *inside]


def _lock(path: Path, folder: Path) -> tuple[int, bool]:
    """The descriptor of `path`, and whether it holds a lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its holder may have removed the file between these two lines; the next one would make a new file.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor, True
        except OSError as error:
            if error.errno in _NO_LOCKS:
                print(f"warning: no locks here: see that no other run writes to {folder}", file=sys.stderr)
                return descriptor, False
            if not isinstance(error, BlockingIOError):
                os.close(descriptor)
                raise
            holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise InputError(
                f"{folder} is in use by {holder}: wait for that run, end it, or choose another folder"
            ) from error
        os.close(descriptor)
