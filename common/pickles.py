"""Restricted reading of pickled files: tensors and containers and nothing else."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from common.errors import InputError


def read_pickled(path: Path, by_torch: bool) -> Any:
    """Load a file of `torch.save`, with tensors on the CPU; unless `by_torch`, also one of `pickle.dump`.

    Raises:
        InputError: the file cannot be read, is damaged, or holds anything but tensors and containers.
    """
    try:
        with path.open("rb") as file:
            by_torch = by_torch or zipfile.is_zipfile(file)
            file.seek(0)
            return _load(file) if by_torch else _TensorUnpickler(file).load()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # unpickling a damaged or hostile file can raise anything
        # torch.load puts advice to load the file without restrictions before the reason.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]
        raise InputError(f"{path}: not a whole pickled file of plain tensors: {reason or error!r}") from error


def _load(file: BinaryIO) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            # The storage's bytes are a torch file, which torch's own function would unpickle freely.
            return lambda data: _load(io.BytesIO(data))
        if (module, name) in (("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2")):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is neither a tensor nor a container")
