"""Weighted mean of models, tensor by tensor: the method `avg`, and RegMean's treatment of tensors without a Gram.

Threads read, average and write chunks of the tensors. This module does not import torch.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import numpy as np

from common.errors import InputError
from regmean.merge_plan import MergePlan
from regmean.model_folder import CheckpointWriter
from regmean.tensor_file import FLOATS, TensorInfo, decode, decode_into, is_finite

CHUNK_ELEMENTS = 1 << 17  # of a tensor read at a time
LARGE_BYTES = 31 << 20  # just below the largest array whose release has this effect; never touched
AVERAGERS = 2  # threads
CACHED_ELEMENTS = 1 << 15  # of a chunk averaged at a time: their float64 sums stay in the processor's cache


def write_averages(
    plan: MergePlan,
    writers: Iterable[CheckpointWriter],
    advance: Callable[[int], None],
    finished: Callable[[], None] = lambda: None,
) -> None:
    """Write all tensors that the plan averages, or copies from the first model, with every writer; the writers all
    hold the same tensors.

    Calls `advance`, from any thread, with the number of elements written, and `finished` at the end of each tensor.

    Raises:
        InputError: a value that is not finite or does not fit its dtype; integers that differ between models.
    """
    # Freeing a large array makes the C library keep what is freed later; else every chunk's memory comes from the
    # system, page by page, which takes longer than all arithmetic.
    np.empty(LARGE_BYTES, np.uint8)
    writers = list(writers)
    chunks, lock = _chunks(plan, writers[0].holds), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                chunk = next(chunks, None)
            if chunk is None:
                return
            name, infos, model_weights, start, stop = chunk
            values, (tensor, first) = _mean_of(name, infos, model_weights, start, stop, plan), plan.place(name)
            for writer in writers:
                writer.write(tensor, values, first + start)
            advance(stop - start)
            if stop == infos[0].size:
                finished()

    with ThreadPoolExecutor(AVERAGERS) as threads:
        workers = [threads.submit(work) for _ in range(AVERAGERS)]
        try:
            wait(workers, return_when=FIRST_EXCEPTION)
        finally:
            # After an error, or a signal, no thread begins another chunk.
            with lock:
                chunks.close()
    for worker in workers:
        worker.result()


def weighted_mean(
    arrays: list[np.ndarray], weights: list[float], stored: Iterable[str] = (), out: np.ndarray | None = None
) -> np.ndarray:
    """sum_i weights_i arrays_i over flat arrays of one size, added up in float64 and returned in the first's dtype.

    In float64, the mean of identical float32 models equals these models for any weights.

    Args:
        stored: the dtypes in which the arrays are stored, if known.
        out: memory for the mean.
    """
    mean = np.empty_like(arrays[0]) if out is None else out
    if weights == [0.5, 0.5] and {"BF16", "F16"}.issuperset(stored) and stored:
        # Of two numbers of 11 bits, the sum rounded to float32 is that of the sum rounded to float64, unless it is
        # beyond float32's range.
        with np.errstate(over="ignore", invalid="ignore"):
            np.add(*arrays, out=mean)
        mean *= 0.5
        if is_finite(mean):
            return mean
    room = min(CACHED_ELEMENTS, mean.size)
    sums, terms = np.empty(room), np.empty(room)
    for start in range(0, mean.size, CACHED_ELEMENTS):
        chunk = slice(start, start + CACHED_ELEMENTS)
        total, term = sums[: mean[chunk].size], terms[: mean[chunk].size]
        total[...] = arrays[0][chunk]
        total *= weights[0]
        for array, weight in zip(arrays[1:], weights[1:], strict=True):
            term[...] = array[chunk]
            term *= weight
            total += term
        mean[chunk] = total
    return mean


def read_mean(
    infos: list[TensorInfo], weights: list[float], start: int, stop: int, rows: list[np.ndarray], mean: np.ndarray
) -> None:
    """Read elements of each model's tensor into `rows`, and their weighted mean into `mean`, all flat float32.

    Raises:
        InputError: a value is NaN or infinite.
    """
    for info, row in zip(infos, rows, strict=True):
        decode_into(row, info.read(start, stop), info.dtype)
    weighted_mean(rows, weights, [info.dtype for info in infos], mean)
    if not is_finite(mean):
        for info in infos:
            info.read_floats(start, stop)


def _chunks(
    plan: MergePlan, holds: Callable[[str], bool]
) -> Iterator[tuple[str, list[TensorInfo], list[float], int, int]]:
    """Yield chunks of all tensors held: name, the models' tensors, their weights, and the first and last element."""
    tensors = [(name, [plan.models[index]], [1.0]) for name, index in plan.copied.items()]
    tensors += [(name, plan.models, plan.model_weights) for name in plan.averaged]
    for name, models, model_weights in (each for each in tensors if holds(plan.place(each[0])[0])):
        infos = [model.tensors[name] for model in models]
        for start in range(0, infos[0].size, CHUNK_ELEMENTS):
            yield name, infos, model_weights, start, min(start + CHUNK_ELEMENTS, infos[0].size)


def _mean_of(
    name: str, infos: list[TensorInfo], weights: list[float], start: int, stop: int, plan: MergePlan
) -> np.ndarray:
    """Mean of a chunk, in the dtype that it is written in."""
    first, *others = infos
    dtype = plan.layout[plan.place(name)[0]][0]
    if dtype in FLOATS and (others or first.dtype != dtype):
        arrays = [decode(info.read(start, stop), info.dtype) for info in infos]
        mean = weighted_mean(arrays, weights, [info.dtype for info in infos])
        if others and not is_finite(mean):
            # An infinity that all models have, as in some buffers, is kept.
            alike = np.logical_and.reduce([array == arrays[0] for array in arrays])
            if not (np.isfinite(mean) | alike).all():
                for info in infos:
                    info.read_floats(start, stop)
        return plan.encode(name, mean)
    values = first.read(start, stop)
    for info in others:
        if not np.array_equal(values, info.read(start, stop)):
            raise InputError(
                f"tensor {first.name} of {first.dtype} differs between {first.path} and {info.path}, and cannot be "
                "averaged; --exclude takes the first model's"
            )
    return values
