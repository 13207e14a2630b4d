"""Pickled files of others, read as tensors and containers and nothing else."""

import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from common.errors import InputError, first_line

# First bytes of a file of torch.save that is no zip archive, within its first 16.
_TORCH_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"
# torch.load puts advice to load the file freely before this.
_REASON = "WeightsUnpickler error: "


def read_pickled(path: Path) -> Any:
    """The content of a file that `torch.save` or `pickle.dump` wrote, tensors on the CPU.

    Raises:
        InputError: the file cannot be read, is damaged, or holds anything but tensors and containers.
    """
    try:
        with path.open("rb") as file:
            is_torch = zipfile.is_zipfile(file) or _TORCH_MAGIC in _first(file, 16)
            file.seek(0)
            return _load_tensors(file) if is_torch else _Unpickler(file).load()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # unpickling a damaged or hostile file can raise anything
        reason = str(error).partition(_REASON)[2].partition("\n")[0][:500] or first_line(error)
        raise InputError(f"{path}: not a whole pickled file of plain tensors: {reason}") from error


def _first(file: BinaryIO, count: int) -> bytes:
    file.seek(0)
    return file.read(count)


def _load_tensors(file: BinaryIO) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


# Python's own unpickler, not C's: that one makes room for as many memo entries as a damaged file numbers.
class _Unpickler(pickle._Unpickler):
    """For plain pickles of tensors, which `torch.load` does not read."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            # The storage's bytes are themselves a torch file, which torch's own function would unpickle freely.
            ("torch.storage", "_load_from_bytes"): lambda data: _load_tensors(io.BytesIO(data)),
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is neither a tensor nor a container")
        return allowed[module, name]
