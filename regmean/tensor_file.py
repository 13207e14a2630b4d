"""safetensors files read and written piece by piece: memory holds a piece, not the file.

The `safetensors` library reads slices of bfloat16 only as PyTorch tensors, and a plain average does not import torch.
The library writes whole files; here a tensor may be written in pieces, in any order.
The format: https://huggingface.co/docs/safetensors/index#format
"""

import json
import math
import os
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from safetensors import SafetensorError, safe_open

from common.errors import InputError

# NumPy dtypes of stored values. NumPy has no bfloat16: its bits are uint16 until `decode`.
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_OTHERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "u1"}
STORAGE = {name: np.dtype(code) for name, code in (_FLOATS | _OTHERS).items()}
FLOATS = tuple(_FLOATS)


@dataclass(frozen=True)
class TensorInfo:
    """Header entry of a tensor: `offset` in bytes from the start of the file `path`."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes on disk."""
        return self.size * STORAGE[self.dtype].itemsize

    @property
    def file_dtype(self) -> str:
        """Dtype in the model's file; that of the values read may be wider."""
        return self.dtype

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements `start` to `stop` in row-major order, as a flat array in storage dtype.

        Raises:
            InputError: the file cannot be read or ends early.
        """
        values = np.empty((self.size if stop is None else stop) - start, STORAGE[self.dtype])
        try:
            # Unbuffered: a buffer would be filled beyond the chunk, for a third more of the kernel's time.
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + start * values.itemsize)
                left = memoryview(values).cast("B")
                while left:
                    count = file.readinto(left)
                    if not count:
                        raise InputError(f"{self.path}: ends within tensor {self.name}; copy or download it again")
                    left = left[count:]
        except OSError as error:
            raise InputError(f"{self.path}: cannot read tensor {self.name}: {error.strerror}") from error
        return values

    def read_floats(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read and decode elements: float64 if stored so, else float32.

        Raises:
            InputError: as for `read`, or a value is NaN or infinite.
        """
        values = decode(self.read(start, stop), self.dtype)
        if not is_finite(values):
            raise InputError(
                f"{self.path}: tensor {self.name} holds NaN or infinite values; --exclude takes the first model's"
            )
        return values


@dataclass(frozen=True)
class JoinedTensor(TensorInfo):
    """A concatenation of parts of stored tensors, each given by the tensor, its first and its last element."""

    parts: tuple[tuple[TensorInfo, int, int], ...] = ()

    @property
    def file_dtype(self) -> str:
        return self.parts[0][0].file_dtype

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        stop, begin, pieces = self.size if stop is None else stop, 0, []
        for info, first, last in self.parts:
            end = begin + last - first
            if begin < stop and start < end:
                values = info.read(first + max(start - begin, 0), first + min(stop, end) - begin)
                wider = info.dtype != self.dtype
                pieces.append(decode(values, info.dtype).astype(STORAGE[self.dtype]) if wider else values)
            begin = end
        return np.concatenate(pieces)


@dataclass(frozen=True)
class TransposedTensor(TensorInfo):
    """The tensor `stored` with its last two dimensions exchanged."""

    stored: TensorInfo

    @classmethod
    def of(cls, stored: TensorInfo) -> TensorInfo:
        """The tensor with its dimensions exchanged, which is the stored one if that has exchanged them before."""
        if isinstance(stored, cls):
            return stored.stored
        *outer, rows, columns = stored.shape
        return cls(stored.path, stored.name, stored.dtype, (*outer, columns, rows), 0, stored)

    @property
    def file_dtype(self) -> str:
        return self.stored.file_dtype

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        stop, shape = self.size if stop is None else stop, self.stored.shape[-2:]
        size = math.prod(shape)
        first, last = start // size, -(-stop // size)
        values = self.stored.read(first * size, last * size).reshape(-1, *shape).swapaxes(1, 2).reshape(-1)
        return values[start - first * size : stop - first * size]


def is_finite(values: np.ndarray) -> bool:
    """True if no value is NaN or infinite."""
    return bool(np.isfinite(values).all())


def is_finite_stored(values: np.ndarray, dtype: str) -> bool:
    """True if no value, as stored in `dtype`, is NaN or infinite."""
    if dtype == "BF16":
        # The largest magnitudes, as bits, are infinity and NaN.
        return values.size == 0 or bool((values & 0x7FFF).max() < 0x7F80)
    return is_finite(values)


def decode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Convert stored floats to float64 for F64, else to float32. Exact."""
    if dtype == "BF16":
        bits = values.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return values.astype(np.float64 if dtype == "F64" else np.float32, copy=False)


def decode_into(out: np.ndarray, values: np.ndarray, dtype: str) -> None:
    """Convert stored floats to float32, in the memory of `out`."""
    if dtype == "BF16":
        np.left_shift(values, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(out, values, casting="same_kind")


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """Convert floats to the storage dtype `dtype`, rounded to nearest, ties to even; beyond its range, to infinity."""
    with np.errstate(over="ignore"):
        if dtype != "BF16":
            return values.astype(STORAGE[dtype], copy=False)
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # In place: new memory costs as much as all the rest.
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Convert floats as `round_to`.

    Raises:
        OverflowError: a finite value is beyond the range of `dtype`.
    """
    stored = round_to(values, dtype)
    if dtype in ("BF16", "F16") and not is_finite_stored(stored, dtype):
        lost = ~np.isfinite(decode(stored, dtype)) & np.isfinite(values)
        if lost.any():
            raise OverflowError(f"a value of magnitude {np.abs(values[lost]).max():.3g} does not fit {dtype}")
    return stored


def open_tensors(path: Path) -> safe_open:
    """Open a safetensors file for reading slices as NumPy arrays; its header is compared with the file's size.

    Raises:
        InputError: no such file, not safetensors, or truncated.
    """
    try:
        # Not mapped into memory: mapped pages count as memory of this process.
        return safe_open(path, framework="np", backend="pread")
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file; copy or download it again ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


class TensorFile:
    """A safetensors file's header: `metadata`, and `tensors` by name. InputError as of `open_tensors`, or for an
    unknown dtype.
    """

    def __init__(self, path: Path):
        with open_tensors(path), path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, entry in header.items():
            if entry["dtype"] not in STORAGE:
                raise InputError(f"{path}: tensor {name} has dtype {entry['dtype']}; this reads {', '.join(STORAGE)}")
            offset = 8 + length + entry["data_offsets"][0]
            self.tensors[name] = TensorInfo(path, name, entry["dtype"], tuple(entry["shape"]), offset)


class TensorWriter:
    """Writes one safetensors file of a layout known beforehand (dtype and shape of each tensor), tensor by tensor or
    piece by piece, in any order, from any thread; the file is complete only after `close`.
    """

    def __init__(self, path: Path, layout: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]):
        # Widest first keeps every tensor aligned, which readers that map the file rely on.
        ordered = dict(sorted(layout.items(), key=lambda item: -STORAGE[item[1][0]].itemsize))
        header: dict[str, dict] = {"__metadata__": metadata}
        end = 0
        for name, (dtype, shape) in ordered.items():
            begin, end = end, end + math.prod(shape) * STORAGE[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._infos = {
            name: TensorInfo(path, name, dtype, shape, 8 + len(text) + header[name]["data_offsets"][0])
            for name, (dtype, shape) in ordered.items()
        }
        self._missing = {name: info.size for name, info in self._infos.items()}
        self._lock = threading.Lock()
        self._file = path.open("wb", buffering=0)
        # Readers compare sizes: a file that is being filled can be read, too.
        self._file.truncate(8 + len(text) + end)
        self._write_at(0, struct.pack("<Q", len(text)) + text)

    def file_of(self, name: str) -> str:
        """Name of the tensor's file."""
        return self._infos[name].path.name

    def holds(self, name: str) -> bool:
        """True if the file has a tensor of this name."""
        return name in self._infos

    def write(self, name: str, values: np.ndarray, start: int = 0) -> None:
        """Write `values`, in the tensor's storage dtype, as its elements from `start` on in row-major order."""
        info = self._infos[name]
        if values.dtype != STORAGE[info.dtype] or start + values.size > info.size:
            raise ValueError(f"{values.size} elements of {values.dtype} from {start} on do not fit tensor {info}")
        self._write_at(info.offset + start * values.itemsize, np.ascontiguousarray(values).reshape(-1).view(np.uint8))
        with self._lock:
            self._missing[name] -= values.size

    @property
    def is_whole(self) -> bool:
        """True if all elements have been written."""
        with self._lock:
            return not any(self._missing.values())

    def close(self) -> None:
        """Finish the file.

        Raises:
            ValueError: some elements were never written.
        """
        self._file.close()
        missing = [name for name, count in self._missing.items() if count]
        if missing:
            raise ValueError(f"tensors not fully written: {missing}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self._file.close()

    def _write_at(self, offset: int, data: bytes | np.ndarray) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[count:], offset + count
