"""Weights and Grams of RegMean's systems: read in the calling thread, or in threads ahead of the solver."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Self

import numpy as np
import torch

from regmean.average import CHUNK_ELEMENTS, read_mean
from regmean.gram_file import Empty
from regmean.merge_plan import LayerGroup, MergePlan
from regmean.solve import POOLED

READERS = min(8, os.cpu_count() or 1)  # threads that read and average the chunks of a block


@dataclass(frozen=True)
class Piece:
    """Rows `first` to `last` of a weight seen as (outputs, inputs)."""

    name: str
    first: int
    last: int


class Reader:
    """Reads in the calling thread, for a solver on the CPU."""

    def __init__(self, plan: MergePlan):
        self._plan = plan
        self._pools: dict[int, tuple[str, np.ndarray]] = {}  # the last one read, by model

    def rows(self, group: LayerGroup, block: list[Piece]) -> list[torch.Tensor]:
        """Weights of a block of outputs of each model, and their weighted mean: float32 (outputs, inputs), which the
        caller may overwrite until the next call but one.

        Raises:
            InputError: a weight that is damaged or not finite.
        """
        size = group.width * sum(piece.last - piece.first for piece in block)
        return read_block(self._plan, group, block, [torch.empty(size) for _ in range(len(self._plan.models) + 1)])

    def gram(self, group: LayerGroup, index: int) -> np.ndarray:
        """The group's Gram of model `index`, see `Grams.read`; that of an expert has `POOLED` more tokens for each of
        its inputs, as the layer's experts have on average.
        """
        return self._read_gram(group, index)

    def _read_gram(self, group: LayerGroup, index: int, empty: Empty = np.empty) -> np.ndarray:
        file = self._plan.grams[index]
        square = file.read(group.grams[index], empty)
        if group.pools:
            name = group.pools[index]
            known = self._pools.get(index)
            if known is None or known[0] != name:
                known = name, file.read(name)
                known[1][...] *= POOLED * group.width / file.grams[name].tokens
                self._pools[index] = known
            square += known[1]
        return square

    def write(self, work: Callable[[], None]) -> None:
        """Call `work`, which writes what was solved."""
        work()


class AheadReader(Reader):
    """Reads the next block, and the next group's Grams, while the caller works on those before, and writes behind it.

    Args:
        device: the solver's; the rows of a GPU are copied to it from pinned memory, by a stream of their own.
        work: the groups with their blocks, in the order in which the caller asks for them.
        fits: tells if there is memory for the Grams of the second group while the first is solved.
    """

    def __init__(
        self,
        plan: MergePlan,
        device: torch.device,
        work: list[tuple[LayerGroup, list[list[Piece]]]],
        fits: Callable[[LayerGroup, LayerGroup], bool],
    ):
        super().__init__(plan)
        self._device, self._fits = device, fits
        self._is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None
        self._blocks = [(group, block) for group, blocks in work for block in blocks]
        sizes = [group.width * sum(piece.last - piece.first for piece in block) for group, block in self._blocks]
        # One set of buffers is filled while the other is in use; that of a GPU is free again after the copy.
        self._buffers = [
            [torch.empty(max(sizes, default=0), pin_memory=self._is_cuda) for _ in range(len(plan.models) + 1)]
            for _ in range(1 if self._is_cuda else 2)
        ]
        self._following = {id(group): later for (group, _), (later, _) in pairwise(work)}
        self._first = work[0][0] if work else None
        self._ahead: tuple[LayerGroup, list[Future]] | None = None
        self._next = 0
        self._written: Future | None = None

    def __enter__(self) -> Self:
        # A thread for a block, and two for Grams.
        self._background, self._readers = ThreadPoolExecutor(3), ThreadPoolExecutor(READERS)
        self._writer = ThreadPoolExecutor(1)
        self._start_grams(self._first)
        self._start_block()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for threads in (self._background, self._readers, self._writer):
            threads.shutdown(cancel_futures=error is not None)
        if error is None and self._written is not None:
            self._written.result()

    def rows(self, group: LayerGroup, block: list[Piece]) -> list[torch.Tensor]:
        """As of `Reader`, on the solver's device."""
        tensors = self._loading.result()
        if self._is_cuda:
            for tensor in tensors:
                # Its memory belongs to the stream that copied it.
                tensor.record_stream(torch.cuda.current_stream(self._device))
        self._start_block()
        return tensors

    def gram(self, group: LayerGroup, index: int) -> np.ndarray:
        """As of `Reader`."""
        if self._ahead is not None and self._ahead[0] is group:
            square = self._ahead[1].pop(0).result()
        else:
            square = self._read_gram(group, index)
        if index == len(self._plan.models) - 1:
            self._ahead = None
            following = self._following.get(id(group))
            if following is not None and self._fits(group, following):
                self._start_grams(following)
        return square

    def write(self, work: Callable[[], None]) -> None:
        """Call `work` in a thread, after the work of the call before."""
        if self._written is not None:
            self._written.result()
        self._written = self._writer.submit(work)

    def _start_block(self) -> None:
        if self._next < len(self._blocks):
            self._loading = self._background.submit(self._load, self._next)
            self._next += 1

    def _load(self, number: int) -> list[torch.Tensor]:
        buffers = self._buffers[number % len(self._buffers)]
        tensors = read_block(self._plan, *self._blocks[number], buffers, self._readers.map)
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                tensors = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
            self._stream.synchronize()
        return tensors

    def _start_grams(self, group: LayerGroup | None) -> None:
        # Of more models than two, the Grams are read again for each block, one at a time.
        if group is not None and len(self._plan.models) == 2:
            self._ahead = group, [self._background.submit(self._read_gram, group, index) for index in range(2)]

    def _read_gram(self, group: LayerGroup, index: int, empty: Empty = np.empty) -> np.ndarray:
        # A GPU copies from pinned memory several times as fast.
        pinned = (lambda shape, dtype: torch.empty(shape, pin_memory=True).numpy()) if self._is_cuda else empty
        return super()._read_gram(group, index, pinned)


def read_block(
    plan: MergePlan,
    group: LayerGroup,
    block: list[Piece],
    buffers: list[torch.Tensor],
    for_each: Callable[..., Iterator] = map,
) -> list[torch.Tensor]:
    """Read the weights of a block, and average them, into flat `buffers`: one for each model, and the mean's.

    Returns:
        The buffers as (outputs, inputs), contiguous; copies of them for a Conv1D.
    """
    flat, chunks, ends = [buffer.numpy() for buffer in buffers], [], [0]
    for piece in block:
        first, last = piece.first * group.width, piece.last * group.width
        infos = [model.tensors[piece.name] for model in plan.models]
        for start in range(first, last, CHUNK_ELEMENTS):
            chunks.append((infos, start, min(start + CHUNK_ELEMENTS, last), ends[-1] + start - first))
        ends.append(ends[-1] + last - first)

    def read(chunk: tuple) -> None:
        infos, start, stop, at = chunk
        *rows, mean = (array[at : at + stop - start] for array in flat)
        read_mean(infos, plan.model_weights, start, stop, rows, mean)

    for _ in for_each(read, chunks):
        pass
    if not group.conv1d:
        return [buffer[: ends[-1]].view(-1, group.width) for buffer in buffers]
    return [
        torch.cat([buffer[first:last].view(group.width, -1).T for first, last in pairwise(ends)]) for buffer in buffers
    ]
