"""Merging: tensor by tensor from the models' files into a new model folder, in memory set by the largest layer."""

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from common.errors import InputError
from common.io import atomic_folder
from common.locks import locked
from regmean.config import MergeFlags
from regmean.gram_file import Grams, open_grams
from regmean.merge_plan import LayerGroup, MergePlan, describe_size, plan_merge
from regmean.model_folder import Checkpoint, CheckpointWriter, open_checkpoint
from regmean.report import LayerReport, Provenance, print_table, write_report
from regmean.tensor_file import FLOATS, encode

if TYPE_CHECKING:
    import torch

CHUNK_ELEMENTS = 1 << 17  # of an averaged tensor read at a time
AVERAGERS = 2  # threads that read, average and write chunks
READERS = 2  # threads that read weights and Grams for a system
CACHED_ELEMENTS = 1 << 16  # of it averaged at a time: their float64 sums stay in the processor's cache
# Of stacked layer outputs at a time, per model: 28 MB in float32. From 32 MB on the C library takes the memory of every
# array anew from the system, page by page.
BLOCK_ELEMENTS = 7 << 20
# Small systems are solved side by side on a CPU, since their products do not divide well among threads: as many as hold
# so many bytes of arrays together. Of two models they are solved in blocks of fewer outputs; more have their Grams read
# again for each block.
SIDE_BY_SIDE_BYTES = 256 << 20
SIDE_BY_SIDE_BLOCK_ELEMENTS = 1 << 19


def merge(flags: MergeFlags, command: str) -> None:
    """Merge `flags.models` and write one model folder per alpha (a single one for `avg`), each whole or not at all.

    Args:
        flags: what to merge, and how.
        command: the command line, for the model card and the report.

    Raises:
        InputError: models or Grams that do not fit together or are damaged; values that are not finite.
    """
    started = time.monotonic()
    models = [
        open_checkpoint(name, revision)
        for name, revision in zip(flags.models, flags.revisions or [None] * len(flags.models), strict=True)
    ]
    grams = [open_grams(Path(path)) for path in flags.grams]
    plan = plan_merge(flags, models, grams)
    _print_plan(flags, plan, models, grams)

    alphas = flags.alpha if grams else [None]
    with contextlib.ExitStack() as folders:
        for path in flags.output_dirs():
            folders.enter_context(locked(path))
        partial = [folders.enter_context(atomic_folder(path)) for path in flags.output_dirs()]
        dtype = None if flags.dtype == "auto" else flags.dtype
        writers = {
            alpha: CheckpointWriter(folder, plan.layout, models[0], dtype, flags.max_shard_size)
            for alpha, folder in zip(alphas, partial, strict=True)
        }
        merger = _Merger(flags, plan, models, grams, writers)
        merger.run()
        for alpha, folder in zip(alphas, partial, strict=True):
            writers[alpha].close()
            write_report(folder, Provenance.of(flags, alpha, command, models, grams), plan, merger.reports[alpha])
    for alpha, path in zip(alphas, flags.output_dirs(), strict=True):
        if alpha is not None:
            print_table(alpha, flags.models, merger.reports[alpha])
        print(f"{path}: written")
    print(f"merged in {time.monotonic() - started:.1f} s")


def weighted_mean(arrays: list[np.ndarray], shares: list[float]) -> np.ndarray:
    """sum_i shares_i arrays_i over flat arrays of one size, added up in float64 and returned in the first's dtype.

    float64 makes the mean of identical float32 models those models again, whatever the shares.
    """
    mean = np.empty_like(arrays[0])
    room = min(CACHED_ELEMENTS, mean.size)
    sums, terms = np.empty(room), np.empty(room)
    for start in range(0, mean.size, CACHED_ELEMENTS):
        chunk = slice(start, start + CACHED_ELEMENTS)
        total, term = sums[: mean[chunk].size], terms[: mean[chunk].size]
        np.multiply(arrays[0][chunk], shares[0], out=total, dtype=np.float64)
        for array, share in zip(arrays[1:], shares[1:], strict=True):
            total += np.multiply(array[chunk], share, out=term, dtype=np.float64)
        mean[chunk] = total
    return mean


def systems_at_once(models: int, systems: list[tuple[int, int]], alphas: int, threads: int) -> int:
    """How many systems a CPU solves side by side, sharing `threads` evenly; the rest is as of `array_bytes`."""
    largest = _system_bytes(models, systems, alphas, _block_elements(models, side_by_side=True))
    fitting = min(threads, len(systems), SIDE_BY_SIDE_BYTES // max(largest, 1))
    return max((count for count in range(1, fitting + 1) if threads % count == 0), default=1)


def array_bytes(models: int, systems: list[tuple[int, int]], alphas: int) -> int:
    """The most bytes of arrays that a merge holds at once.

    Args:
        models: how many there are.
        systems: (inputs, outputs) of each that RegMean solves; none for an average.
        alphas: how many values of alpha it is solved for.
    """
    at_once = systems_at_once(models, systems, alphas, os.cpu_count() or 1)
    # Of each chunk the models' values, their mean as computed and as written, and float64 sums and terms.
    averaging = 4 * (models + 6) * AVERAGERS * CHUNK_ELEMENTS
    alone, beside = (
        _system_bytes(models, systems, alphas, _block_elements(models, side_by_side)) for side_by_side in (False, True)
    )
    return max(averaging, alone, at_once * beside)


def _block_elements(models: int, side_by_side: bool) -> int:
    return SIDE_BY_SIDE_BLOCK_ELEMENTS if side_by_side and models == 2 else BLOCK_ELEMENTS


def _system_bytes(models: int, systems: list[tuple[int, int]], alphas: int, block: int) -> int:
    """Of the largest system's arrays, with blocks of at most `block` elements."""
    # Squares (the sum of Grams, one more Gram or the difference of two, a factor for each alpha), and blocks: one per
    # model, eight in the solver.
    sizes = (
        4 * ((2 + alphas) * inputs**2 + (models + 8) * min(block, inputs * outputs)) for inputs, outputs in systems
    )
    return max(sizes, default=0)


def _print_plan(flags: MergeFlags, plan: MergePlan, models: list[Checkpoint], grams: list[Grams]) -> None:
    read, written = describe_size(plan, models)
    peak = array_bytes(len(models), _sizes(plan), len(flags.alpha))
    print(
        f"plan: {flags.method} of {len(models)} models, {read / 1e9:.2f} GB to read, {written / 1e9:.2f} GB to write "
        f"for each of {len(flags.output_dirs())}, at most about {peak / 1e9:.2f} GB of arrays in memory"
    )
    layers = sum(len(group.tensors) for group in plan.groups)
    print(
        f"plan: {layers} weights by RegMean in {len(plan.groups)} systems, {len(plan.averaged)} tensors averaged, "
        f"{len(plan.copied)} copied from {models[0].name}"
    )
    for note in plan.notes:
        print(f"note: {note}")
    matrices = [name for name in plan.averaged if len(plan.layout[name][1]) > 1] if grams else []
    if matrices:
        print(f"note: averaged for want of a Gram: {', '.join(matrices)}")


def _sizes(plan: MergePlan) -> list[tuple[int, int]]:
    """(inputs, outputs) of each system."""
    return [(g.width, sum(math.prod(plan.layout[name][1]) for name in g.tensors) // g.width) for g in plan.groups]


@dataclass(frozen=True)
class _Piece:
    """Rows `first` to `last` of a weight seen as (outputs, inputs)."""

    name: str
    first: int
    last: int


class _Merger:
    """Reads, merges and writes every tensor of a plan; `writers` and `reports` are by alpha, None for an average."""

    def __init__(
        self,
        flags: MergeFlags,
        plan: MergePlan,
        models: list[Checkpoint],
        grams: list[Grams],
        writers: dict[float | None, CheckpointWriter],
    ):
        self.reports: dict[float | None, list[LayerReport]] = {alpha: [] for alpha in writers}
        self._flags = flags
        self._shares = flags.weights()
        self._plan = plan
        self._models = models
        self._grams = grams
        self._writers = writers
        total = sum(math.prod(shape) for _, shape in plan.layout.values())
        self._bar = tqdm(total=total, unit="el", unit_scale=True, desc="merging", dynamic_ncols=True)
        self._lock = threading.Lock()  # of the progress bar, and of the chunks that are left

    def run(self) -> None:
        with self._bar:
            device = None
            if self._plan.groups:
                # An average needs neither torch nor the seconds that it takes to import.
                from common.ranks import start_process

                device = start_process(self._flags.device).device
            self._average()
            if device is not None:
                self._solve_all(device)

    def _advance(self, elements: int) -> None:
        with self._lock:
            self._bar.update(elements)

    def _average(self) -> None:
        """Write all tensors that are copied or averaged."""
        tensors = [(name, self._models[:1], [1.0]) for name in self._plan.copied]
        tensors += [(name, self._models, self._shares) for name in self._plan.averaged]
        chunks = (
            (name, models, shares, start, min(start + CHUNK_ELEMENTS, models[0].tensors[name].size))
            for name, models, shares in tensors
            for start in range(0, models[0].tensors[name].size, CHUNK_ELEMENTS)
        )

        def work() -> None:
            while True:
                with self._lock:
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                name, models, shares, start, stop = chunk
                values = self._averaged_chunk(name, models, shares, start, stop)
                for writer in self._writers.values():
                    writer.write(name, values, start)
                self._advance(stop - start)

        with ThreadPoolExecutor(AVERAGERS) as threads:
            workers = [threads.submit(work) for _ in range(AVERAGERS)]
            try:
                wait(workers, return_when=FIRST_EXCEPTION)
            finally:
                # After an error, or a signal, nobody has another chunk to begin.
                with self._lock:
                    chunks.close()
        for worker in workers:
            worker.result()

    def _averaged_chunk(
        self, name: str, models: list[Checkpoint], shares: list[float], start: int, stop: int
    ) -> np.ndarray:
        """Elements `start` to `stop` of the models' mean, in the dtype that they are written in."""
        infos = [model.tensors[name] for model in models]
        dtype = self._plan.layout[name][0]
        if dtype in FLOATS:
            return self._encode(weighted_mean([info.read_floats(start, stop) for info in infos], shares), name)
        values = infos[0].read(start, stop)
        for info in infos[1:]:
            if not np.array_equal(values, info.read(start, stop)):
                raise InputError(
                    f"tensor {name} of {dtype} differs between {infos[0].path} and {info.path}, and cannot be "
                    "averaged; --exclude takes the first model's"
                )
        return values

    def _solve_all(self, device: "torch.device") -> None:
        """Write all weights that have a Gram."""
        import torch

        threads = torch.get_num_threads()
        at_once = systems_at_once(len(self._models), _sizes(self._plan), len(self._flags.alpha), threads)
        # A Conv1D's block is the whole weight, however large.
        if device.type == "cuda" or any(group.conv1d for group in self._plan.groups):
            at_once = 1
        block = _block_elements(len(self._models), at_once > 1)
        if at_once == 1:
            with ThreadPoolExecutor(READERS) as readers:
                for group in self._plan.groups:
                    self._report(self._solve(group, device, block, readers.map))
            return
        try:
            # Each thread has PyTorch's number of threads of its own.
            with ThreadPoolExecutor(at_once, "solver", torch.set_num_threads, (threads // at_once,)) as solvers:
                calls = (self._plan.groups, repeat(device), repeat(block), repeat(map))
                for reports in solvers.map(self._solve, *calls):
                    self._report(reports)
        finally:
            torch.set_num_threads(threads)

    def _report(self, reports: dict[float, LayerReport]) -> None:
        for alpha, report in reports.items():
            self.reports[alpha].append(report)

    def _solve(
        self, group: LayerGroup, device: "torch.device", block_elements: int, for_each: Callable[..., Iterator]
    ) -> dict[float, LayerReport]:
        """Write the weights of one group, in blocks of so many elements; `for_each` is the `map` to read models by."""
        import torch

        from regmean.solve import SOLVERS, GramSum, Objective, Regression, SolveError

        files = [file.grams[name] for file, name in zip(self._grams, group.grams, strict=True)]

        def read(index: int) -> np.ndarray:
            return self._grams[index].read(group.grams[index])

        def per_token(gram: np.ndarray, index: int) -> torch.Tensor:
            return torch.from_numpy(gram).to(device).div_(files[index].tokens)

        total = difference = None
        solvers: dict[float, Any] = {}
        objectives = {alpha: Objective() for alpha in self._flags.alpha}
        for number, block in enumerate(self._blocks(group, block_elements)):
            weights = list(for_each(self._read_rows, self._models, repeat(block), repeat(group)))
            mean = weighted_mean([weight.reshape(-1) for weight in weights], self._shares).reshape(weights[0].shape)
            regression = Regression(
                [torch.from_numpy(weight).to(device) for weight in weights],
                torch.from_numpy(mean).to(device),
                self._shares,
            )
            if len(self._models) == 2:
                if total is None:
                    # Threads read and no more: PyTorch would start a pool of its own in each.
                    pair = map(per_token, for_each(read, range(2)), range(2))
                    total, difference = GramSum.of_two(*pair, self._shares)
                regression.add(difference)
            else:
                # Read again for each block: keeping every model's Gram would take more memory than all else.
                for index, share in enumerate(self._shares):
                    gram = per_token(read(index), index)
                    if number == 0:
                        total = total or GramSum(torch.zeros_like(gram))
                        total.add(gram, share)
                    regression.add(gram, index)
                    del gram
            for alpha in self._flags.alpha:
                try:
                    if alpha not in solvers:
                        solvers[alpha] = SOLVERS[self._flags.solver](total, alpha)
                    merged, objective = regression.solve(total, solvers[alpha], alpha)
                except SolveError as error:
                    paths = ", ".join(str(file.path) for file in self._grams)
                    layers = ", ".join(group.tensors)
                    raise InputError(f"alpha {alpha:g}, layers {layers}, Grams {paths}: {error}") from error
                objectives[alpha].add(objective)
                self._write_rows(self._writers[alpha], block, group, merged.cpu().numpy())
            self._advance(sum(piece.last - piece.first for piece in block) * group.width)
        tokens = [gram.tokens for gram in files]
        return {
            alpha: LayerReport(group.tensors, tokens, solver.label, solver.condition, objectives[alpha])
            for alpha, solver in solvers.items()
        }

    def _blocks(self, group: LayerGroup, elements: int) -> Iterator[list[_Piece]]:
        """The group's outputs in blocks of so many. A Conv1D weight, whose outputs are columns, stays whole."""
        limit = max(1, elements // group.width)
        block: list[_Piece] = []
        room = limit
        for name in group.tensors:
            shape = self._plan.layout[name][1]
            rows = shape[1] if group.conv1d else shape[0]
            first = 0
            while first < rows:
                last = rows if group.conv1d else min(rows, first + room)
                block.append(_Piece(name, first, last))
                room -= last - first
                first = last
                if room <= 0:
                    yield block
                    block, room = [], limit
        if block:
            yield block

    def _read_rows(self, model: Checkpoint, block: list[_Piece], group: LayerGroup) -> np.ndarray:
        """The block's weights, float32 of shape (outputs, inputs), contiguous and writable."""
        parts = []
        for piece in block:
            values = model.tensors[piece.name].read_floats(piece.first * group.width, piece.last * group.width)
            parts.append(values.reshape(group.width, -1).T if group.conv1d else values.reshape(-1, group.width))
        return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts), np.float32)

    def _write_rows(self, writer: CheckpointWriter, block: list[_Piece], group: LayerGroup, merged: np.ndarray) -> None:
        row = 0
        for piece in block:
            rows = merged[row : row + piece.last - piece.first]
            row += len(rows)
            writer.write(
                piece.name, self._encode(rows.T if group.conv1d else rows, piece.name), piece.first * group.width
            )

    def _encode(self, values: np.ndarray, name: str) -> np.ndarray:
        try:
            return encode(values, self._plan.layout[name][0])
        except OverflowError as error:
            raise InputError(f"tensor {name}: {error}; choose a wider --dtype") from error
