"""Pickled files of others, read as tensors and containers and nothing else, and as no more than the file holds."""

import collections
import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch._weights_only_unpickler

from common.errors import InputError, first_line

# How a file of torch.save begins that is no zip archive.
_TORCH_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"


def read_pickled(path: Path) -> Any:
    """The content of a file that `torch.save` or `pickle.dump` wrote, tensors on the CPU.

    Raises:
        InputError: the file cannot be read, is damaged, asks for anything but tensors and containers, or claims to
            hold more than its size.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            plain = not zipfile.is_zipfile(file) and _TORCH_MAGIC not in _first(file, 16)
            file.seek(0)
            content = _Unpickler(file).load() if plain else _load_tensors(file, size)
        for tensor in _tensors(content):
            held = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
            # Strides of 0, or a storage longer than what fills it, take no room until they are read.
            if not held or tensor.numel() * tensor.itemsize > size or tensor.untyped_storage().nbytes() > size:
                raise ValueError(f"a tensor of shape {list(tensor.shape)} is more than its {size} bytes hold")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # unpickling a damaged or hostile file can raise anything
        raise InputError(f"{path}: not a whole pickled file of plain tensors: {first_line(error)}") from error
    return content


def _first(file: BinaryIO, count: int) -> bytes:
    file.seek(0)
    return file.read(count)


def _load_tensors(file: BinaryIO, size: int) -> Any:
    # The two halves of torch.load(weights_only=True) without what it adds to their errors: advice found by regular
    # expressions, which take a minute for a name of 20 kB.
    unpickler, options = torch._weights_only_unpickler, {"encoding": "utf-8"}
    if not zipfile.is_zipfile(file):
        file.seek(0)
        return torch.serialization._legacy_load(file, "cpu", unpickler, **options)
    # torch.save compresses nothing: what it wrote adds up to less than the file.
    if sum(member.file_size for member in zipfile.ZipFile(file).infolist()) > size:
        raise ValueError("it unpacks to more than its size")
    file.seek(0)
    with torch.serialization._open_zipfile_reader(file) as archive:
        return torch.serialization._load(archive, "cpu", unpickler, **options)


def _tensors(content: Any) -> Iterator[torch.Tensor]:
    """Every tensor among nested dicts, lists and tuples, which may contain themselves."""
    left, seen = [content], set()
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value


# Python's own unpickler, not C's: that one makes room for as many memo entries as a damaged file numbers.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            # The storage's bytes are themselves a torch file, which torch's own function would unpickle freely.
            ("torch.storage", "_load_from_bytes"): lambda data: _load_tensors(io.BytesIO(data), len(data)),
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is neither a tensor nor a container")
        return allowed[module, name]
