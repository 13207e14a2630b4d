"""RegMean: each group of layers that share a Gram is read, solved and written, block by block of its rows."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, repeat

import numpy as np
import torch

from common.errors import InputError
from common.ranks import available_memory
from regmean.average import weighted_mean
from regmean.merge_plan import LayerGroup, MergePlan
from regmean.model_folder import Checkpoint, CheckpointWriter
from regmean.report import LayerReport
from regmean.solve import (
    GPU_BLOCK_ELEMENTS,
    GPU_SQUARES,
    SolveError,
    System,
    block_elements,
    gpu_block_elements,
    system_bytes,
)

READERS = 2  # threads that read weights and Grams for a system
# Maximum bytes of arrays of the systems that a CPU solves side by side. Products of small systems do not divide well
# among threads.
SIDE_BY_SIDE_BYTES = 256 << 20


def systems_at_once(models: int, systems: list[tuple[int, int]], alphas: int, threads: int) -> int:
    """Number of systems that a CPU solves side by side with an equal number of threads; see `merge.array_bytes`."""
    largest = system_bytes(models, systems, alphas, block_elements(models, side_by_side=True))
    fitting = min(threads, len(systems), SIDE_BY_SIDE_BYTES // max(largest, 1))
    return max((count for count in range(1, fitting + 1) if threads % count == 0), default=1)


def solving_bytes(models: int, systems: list[tuple[int, int]], alphas: int, device: str) -> int:
    """Peak bytes of RegMean's arrays; arguments as in `merge.array_bytes`."""
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return system_bytes(models, systems, alphas, GPU_BLOCK_ELEMENTS, GPU_SQUARES)
    at_once = systems_at_once(models, systems, alphas, os.cpu_count() or 1)
    alone, beside = (system_bytes(models, systems, alphas, block_elements(models, beside)) for beside in (False, True))
    return max(alone, at_once * beside)


@dataclass(frozen=True)
class Piece:
    """Rows `first` to `last` of a weight seen as (outputs, inputs)."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class RegMean:
    """The method: all groups of a plan, solved by a solver of `solve.SOLVERS` on a device; `writers` are by alpha.

    `advance` is called, from any thread, with the number of elements written.
    """

    plan: MergePlan
    writers: dict[float, CheckpointWriter]
    solver: str
    device: torch.device
    advance: Callable[[int], None]

    def write(self) -> dict[float, list[LayerReport]]:
        """Write all weights that have a Gram.

        Returns:
            Reports of all groups by alpha.

        Raises:
            InputError: a Gram or weight that is damaged or not finite, or a system that the solver cannot solve.
        """
        threads = torch.get_num_threads()
        at_once = systems_at_once(len(self.plan.models), self.plan.systems(), len(self.writers), threads)
        # A block of a Conv1D is the whole weight.
        if self.device.type == "cuda" or any(group.conv1d for group in self.plan.groups):
            at_once = 1
        groups, elements = self.plan.groups, self._elements(at_once > 1)
        if at_once == 1:
            with ThreadPoolExecutor(READERS) as readers:
                solved = list(map(self._write_group, groups, elements, repeat(readers.map)))
        else:
            try:
                # PyTorch's number of threads is set for each thread.
                with ThreadPoolExecutor(at_once, "solver", torch.set_num_threads, (threads // at_once,)) as solvers:
                    solved = list(solvers.map(self._write_group, groups, elements, repeat(map)))
            finally:
                torch.set_num_threads(threads)
        return {alpha: [reports[alpha] for reports in solved] for alpha in self.writers}

    def _elements(self, side_by_side: bool) -> list[int]:
        """Number of elements of a block of each group."""
        groups, models = self.plan.groups, len(self.plan.models)
        if self.device.type != "cuda":
            return [block_elements(models, side_by_side)] * len(groups)
        free = available_memory(self.device), available_memory(torch.device("cpu"))
        return [gpu_block_elements(models, group.width, len(self.writers), *free) for group in groups]

    def _write_group(
        self, group: LayerGroup, elements: int, for_each: Callable[..., Iterator]
    ) -> dict[float, LayerReport]:
        """Write the weights of one group, in blocks of `elements`; `for_each` is the `map` that reads the models."""
        models, model_weights, grams = self.plan.models, self.plan.model_weights, self.plan.grams
        tokens = [file.grams[name].tokens for file, name in zip(grams, group.grams, strict=True)]
        system = System(
            lambda index: grams[index].read(group.grams[index]), tokens, model_weights, self.solver, for_each
        )
        for block in self._blocks(group, elements):
            rows = list(for_each(_read_rows, models, repeat(block), repeat(group)))
            mean = weighted_mean([values.reshape(-1) for values in rows], model_weights).reshape(rows[0].shape)
            *values, mean = (torch.from_numpy(array).to(self.device) for array in (*rows, mean))
            regression = system.regress(values, mean)
            for alpha, writer in self.writers.items():
                try:
                    merged = regression.solve(alpha)
                except SolveError as error:
                    paths, layers = ", ".join(str(file.path) for file in grams), ", ".join(group.tensors)
                    raise InputError(f"alpha {alpha:g}, layers {layers}, Grams {paths}: {error}") from error
                self._write_rows(writer, block, group, merged.cpu().numpy())
            self.advance(sum(piece.last - piece.first for piece in block) * group.width)
        return {
            alpha: LayerReport(group.tensors, tokens, solver.label, solver.condition, system.objectives[alpha])
            for alpha, solver in system.solvers.items()
        }

    def _blocks(self, group: LayerGroup, elements: int) -> Iterator[list[Piece]]:
        """Yield the group's outputs in blocks of `elements`. A Conv1D weight, with outputs as columns, stays whole."""
        shapes = [self.plan.layout[name][1] for name in group.tensors]
        ends = list(accumulate(shape[1] if group.conv1d else shape[0] for shape in shapes))
        step = ends[-1] if group.conv1d else max(1, elements // group.width)
        for start in range(0, ends[-1], step):
            spans = zip(group.tensors, [0, *ends], ends, strict=False)
            pieces = [Piece(name, max(start - a, 0), min(start + step, b) - a) for name, a, b in spans]
            yield [piece for piece in pieces if piece.first < piece.last]

    def _write_rows(self, writer: CheckpointWriter, block: list[Piece], group: LayerGroup, merged: np.ndarray) -> None:
        row = 0
        for piece in block:
            rows = merged[row : row + piece.last - piece.first]
            row += len(rows)
            values = self.plan.encode(piece.name, rows.T if group.conv1d else rows)
            writer.write(piece.name, values, piece.first * group.width)


def _read_rows(model: Checkpoint, block: list[Piece], group: LayerGroup) -> np.ndarray:
    """Read a block of weights: float32 of shape (outputs, inputs), contiguous and writable."""
    parts = []
    for piece in block:
        values = model.tensors[piece.name].read_floats(piece.first * group.width, piece.last * group.width)
        parts.append(values.reshape(group.width, -1).T if group.conv1d else values.reshape(-1, group.width))
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts), np.float32)
