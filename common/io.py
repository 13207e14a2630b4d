"""Files that appear whole or not at all."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import InputError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report file system errors of a block that writes `path`.

    Raises:
        InputError: the file system's error, such as a full disk or a missing permission.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write one file to; the file takes the name `path` when the block ends well.

    Raises:
        InputError: the file cannot be written; an earlier file of that name is unchanged.
    """
    partial = partial_path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            sync(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        sync(path.parent)


@contextmanager
def atomic_folder(path: Path, keeps: Callable[[Path], bool] = lambda partial: False) -> Iterator[Path]:
    """A folder beside `path` to fill; it takes the name `path` when the block ends well.

    `keeps` tells if the folder of a run that was killed, or lost a rank, is to be continued; else it is removed.

    Raises:
        InputError: `path` exists already, or something in it cannot be written.
    """
    refuse_existing(path)
    partial = partial_path(path)
    with writing(path):
        if partial.exists() and not keeps(partial):
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            for file in (*partial.rglob("*"), partial):
                sync(file)
            partial.rename(path)
        finally:
            if isinstance(sys.exception(), InputError | OSError) or not keeps(partial):
                shutil.rmtree(partial, ignore_errors=True)
        sync(path.parent)


def refuse_existing(path: Path) -> None:
    """Raise an `InputError` if an output folder exists."""
    if path.exists():
        raise InputError(f"{path} exists already: remove it, or choose another output folder")


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in the JSON file `path`.

    Raises:
        InputError: the file is missing, not UTF-8 or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a number of 5000 digits
        raise InputError(f"{path}: not readable as JSON: {error}") from error


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`; in a hub download it may be a link to `../../blobs`, where the files are.

    Raises:
        InputError: `name` is no plain file name, or a link out of the folder.
    """
    if Path(name).name != name or name in ("", ".."):
        raise InputError(f"{name!r} is not a file of {folder}")
    path, root = folder / name, folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    try:
        leads_out = not path.resolve().is_relative_to(root)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links that lead to each other
        raise InputError(f"{folder}: no file has the name {name!r}: {error}") from error
    if leads_out:
        raise InputError(f"{path} is a link to {path.resolve()}, outside its folder: put the file itself there")
    return path


def read_shard_index(path: Path) -> dict[str, str]:
    """Read the map of tensor to file name in the index of a model's shards, and check that all files are beside it.

    Raises:
        InputError: it is no such index, or names a file that is not beside it.
    """
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{path}: no weight_map of tensor to file name")
    for shard in set(weight_map.values()):
        try:
            inside(path.parent, shard)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    return weight_map


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def partial_path(path: Path) -> Path:
    """Fixed name for an unfinished `path`, so that a later run overwrites the remains of a killed one."""
    return path.with_name(f".{path.name}.partial")


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
