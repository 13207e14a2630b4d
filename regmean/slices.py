"""Slices of a stored tensor along its first dimension: the weight of one expert in a tensor of all. Slice 3 of the
tensor NAME is called NAME[3].
"""

import math
import re
from dataclasses import replace

from regmean.tensor_file import JoinedTensor, TensorInfo

SLICE = re.compile(r"(.+)\[(\d+)\]")


def slice_name(tensor: str, number: int) -> str:
    """Name of a slice."""
    return f"{tensor}[{number}]"


def split_name(name: str) -> tuple[str, int | None]:
    """The tensor's name and the slice's number, which is None if the name is that of a whole tensor."""
    match = SLICE.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, None)


def sliced(info: TensorInfo, number: int) -> TensorInfo:
    """A slice of a tensor."""
    name, shape = slice_name(info.name, number), info.shape[1:]
    size = math.prod(shape)
    if type(info) is TensorInfo:
        each = info.nbytes // info.shape[0]
        return replace(info, name=name, shape=shape, offset=info.offset + number * each)
    # Other kinds of tensors compute what they read.
    sources = info.parts if isinstance(info, JoinedTensor) else ((info, 0, info.size),)
    parts, begin, start, stop = [], 0, number * size, (number + 1) * size
    for source, first, last in sources:
        end = begin + last - first
        if begin < stop and start < end:
            parts.append((source, first + max(start - begin, 0), first + min(stop, end) - begin))
        begin = end
    return JoinedTensor(info.path, name, info.dtype, shape, 0, tuple(parts))


def slices_within(tensor: TensorInfo, first: int, last: int) -> list[str]:
    """Names of the slices that hold elements `first` to `last` of a tensor."""
    size = math.prod(tensor.shape[1:]) or 1
    return [slice_name(tensor.name, number) for number in range(first // size, -(-last // size))]
