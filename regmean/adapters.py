"""Tensors of a model with an adapter's update, computed piece by piece when they are read: no merged copy exists.

LoRA (Hu et al. 2021, arXiv 2106.09685) adds s B A to a weight of shape (outputs, inputs), with s = alpha / r, or
alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732). DoRA (Liu et al. 2024, arXiv 2402.09353) then scales
the weights of each output to the length that its magnitude gives. A Conv1D stores the transpose of its weight, and PEFT
treats an embedding table like the weight of a Conv1D.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from common.errors import InputError
from regmean.slices import sliced
from regmean.tensor_file import STORAGE, JoinedTensor, TensorInfo, TransposedTensor, decode

ROWS_ELEMENTS = 1 << 20  # elements of a weight read at a time for the lengths of its columns


@dataclass(frozen=True)
class AdaptedTensor(TensorInfo):
    """A tensor `base` with an update, in float32, or in float64 where the base is.

    `path` is the adapter's file, and `offset` is of no use.
    """

    base: TensorInfo

    @classmethod
    def of(cls, base: TensorInfo, path: Path, *fields: Any) -> Self:
        """The tensor `base` with the update in the file `path` that the subclass's `fields` describe."""
        return cls(path, base.name, "F64" if base.dtype == "F64" else "F32", base.shape, 0, base, *fields)

    @property
    def file_dtype(self) -> str:
        return self.base.file_dtype

    @property
    def nbytes(self) -> int:
        return self.base.nbytes

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        stop, width = self.size if stop is None else stop, self.shape[-1] if len(self.shape) > 1 else 1
        first, last = start // width, -(-stop // width)
        rows = self.updated(self._base_rows(first, last, width), first)
        return rows.astype(STORAGE[self.dtype], copy=False).reshape(-1)[start - first * width : stop - first * width]

    def _base_rows(self, first: int, last: int, width: int) -> np.ndarray:
        values = decode(self.base.read(first * width, last * width), self.base.dtype)
        # `updated` may overwrite them.
        return values.astype(STORAGE[self.dtype], copy=False).reshape(-1, width)

    def updated(self, rows: np.ndarray, first: int) -> np.ndarray:
        """The rows of the base from row `first` on, with their update; elements of a vector are rows of one."""
        raise NotImplementedError


@dataclass(frozen=True)
class LoraTensor(AdaptedTensor):
    """A weight with the update of LoRA or DoRA.

    Attributes:
        a, b: the factors A (r, inputs) and B (outputs, r).
        magnitude: of each output, for DoRA; else None.
        scale: factor on B A.
        transposed: True if the weight is stored as (inputs, outputs).
        load: reads a factor whole, as floats.
    """

    a: TensorInfo
    b: TensorInfo
    magnitude: TensorInfo | None
    scale: float
    transposed: bool
    load: Callable[[TensorInfo], np.ndarray] = field(repr=False, compare=False)

    def updated(self, rows: np.ndarray, first: int) -> np.ndarray:
        left, right = (
            (self.load(self.a).T, self.load(self.b).T) if self.transposed else map(self.load, (self.b, self.a))
        )
        part = np.ascontiguousarray(left[first : first + len(rows)], rows.dtype)
        update = part @ np.ascontiguousarray(right, rows.dtype)
        update *= self.scale
        update += rows
        if self.magnitude is not None:
            update *= self._factors(update, first)
        return update

    def _factors(self, rows: np.ndarray, first: int) -> np.ndarray:
        """Factors of DoRA on rows that LoRA has updated."""
        magnitude = self.load(self.magnitude)
        if self.transposed:
            return (magnitude / self._lengths).astype(rows.dtype)
        return (magnitude[first : first + len(rows)] / np.linalg.norm(rows, axis=1))[:, None]

    @cached_property
    def _lengths(self) -> np.ndarray:
        """Length of each column, over all rows."""
        lora = LoraTensor.of(self.base, self.path, self.a, self.b, None, self.scale, True, self.load)
        count, width = self.shape
        step, squares = max(1, ROWS_ELEMENTS // width), np.zeros(width)
        for first in range(0, count, step):
            rows = lora.read(first * width, min(first + step, count) * width).reshape(-1, width)
            squares += np.square(rows, dtype=np.float64).sum(0)
        return np.sqrt(squares)


def updated_experts(
    base: TensorInfo,
    path: Path,
    a: TensorInfo,
    b: TensorInfo,
    scale: float,
    transposed: bool,
    load: Callable[[TensorInfo], np.ndarray],
) -> dict[str, TensorInfo]:
    """The stored tensors that make up `base`, the parameter of all experts, with the updates of all. Expert e of E has
    r rows of the factor A (E r, inputs), and every E-th column of B from e on.
    """
    count, size = base.shape[0], base.size // base.shape[0]

    def factor(expert: int, info: TensorInfo) -> np.ndarray:
        values = load(info)
        return np.split(values, count)[expert] if info is a else values[:, expert::count]

    updates = [(a, b, None, scale, transposed, partial(factor, expert)) for expert in range(count)]
    experts = [LoraTensor.of(sliced(base, number), path, *update) for number, update in enumerate(updates)]
    dtype = experts[0].dtype
    if not isinstance(base, JoinedTensor):
        parts = tuple((expert, 0, size) for expert in experts)
        whole = JoinedTensor(path, base.name, dtype, base.shape, 0, parts)
        return {base.name: TransposedTensor.of(whole) if isinstance(base, TransposedTensor) else whole}
    found, begin = {}, 0
    for source, first, last in base.parts:
        number, start = divmod(begin, size)
        begin += last - first
        if last - first != source.size or start + source.size > size:
            raise InputError(f"{path}: the update is for a part of {source.name}: merge the adapter with peft first")
        part = (replace(experts[number], name=source.name), start, start + source.size)
        found[source.name] = JoinedTensor(path, source.name, dtype, source.shape, 0, (part,))
    return found


@dataclass(frozen=True)
class BiasTensor(AdaptedTensor):
    """A bias with the update of LoRA: `scale` times the bias of the factor B."""

    bias: TensorInfo
    scale: float

    def updated(self, rows: np.ndarray, first: int) -> np.ndarray:
        update = decode(self.bias.read(first, first + len(rows)), self.bias.dtype)
        return rows + self.scale * update[:, None]


@dataclass(frozen=True)
class TokenTensor(AdaptedTensor):
    """An embedding table of which the rows `tokens` are replaced by those of `rows`, in this order."""

    rows: TensorInfo
    tokens: tuple[int, ...]

    def updated(self, rows: np.ndarray, first: int) -> np.ndarray:
        rows, width = rows.copy(), self.shape[1]
        for number, token in enumerate(self.tokens):
            if first <= token < first + len(rows):
                rows[token - first] = decode(self.rows.read(number * width, (number + 1) * width), self.rows.dtype)
        return rows


@dataclass(frozen=True)
class ReplacedTensor(AdaptedTensor):
    """A tensor that the adapter stores whole, as `stored`; the base's is not read."""

    stored: TensorInfo

    def _base_rows(self, first: int, last: int, width: int) -> np.ndarray:
        return decode(self.stored.read(first * width, last * width), self.stored.dtype).reshape(-1, width)

    def updated(self, rows: np.ndarray, first: int) -> np.ndarray:
        return rows
