"""RegMean: each group of layers that share a Gram is read, solved and written, block by block of its rows."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np
import torch

from common.errors import InputError
from common.ranks import available_memory
from regmean.merge_plan import LayerGroup, MergePlan
from regmean.model_folder import CheckpointWriter
from regmean.read_ahead import AheadReader, Piece, Reader
from regmean.report import LayerReport
from regmean.solve import (
    GPU_BLOCK_ELEMENTS,
    GPU_SQUARES,
    HOST_PART,
    SolveError,
    System,
    block_elements,
    gpu_block_elements,
    system_bytes,
)
from regmean.tensor_file import is_finite_stored

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
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
    ahead = models + 1  # the next block: each model's values, and their mean
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return system_bytes(models + ahead, systems, alphas, GPU_BLOCK_ELEMENTS, GPU_SQUARES)
    at_once = systems_at_once(models, systems, alphas, os.cpu_count() or 1)
    alone = system_bytes(models + ahead, systems, alphas, block_elements(models, side_by_side=False))
    beside = system_bytes(models, systems, alphas, block_elements(models, side_by_side=True))
    return max(alone, at_once * beside)


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
        work = [
            (group, list(self._blocks(group, elements)))
            for group, elements in zip(self.plan.groups, self._elements(at_once > 1), strict=True)
        ]
        if at_once == 1:
            with AheadReader(self.plan, self.device, work, self._fits_ahead) as reader:
                solved = [self._write_group(group, blocks, reader) for group, blocks in work]
        else:
            reader = Reader(self.plan)
            try:
                # PyTorch's number of threads is set for each thread.
                with ThreadPoolExecutor(at_once, "solver", torch.set_num_threads, (threads // at_once,)) as solvers:
                    solved = list(solvers.map(lambda each: self._write_group(*each, reader), work))
            finally:
                torch.set_num_threads(threads)
        return {alpha: [reports[alpha] for reports in solved] for alpha in self.writers}

    def _elements(self, side_by_side: bool) -> list[int]:
        """Number of elements of a block of each group."""
        groups, models = self.plan.groups, len(self.plan.models)
        if self.device.type != "cuda":
            return [block_elements(models, side_by_side)] * len(groups)
        free = available_memory(self.device), available_memory(torch.device("cpu"))
        # The next block is there, too: each model's values, and their mean.
        return [gpu_block_elements(2 * models + 1, group.width, len(self.writers), *free) for group in groups]

    def _fits_ahead(self, group: LayerGroup, following: LayerGroup) -> bool:
        """True if the host has memory for the Grams of the following group while this one is solved."""
        grams = 4 * len(self.plan.models) * following.width**2
        if self.device.type == "cuda":
            return grams < HOST_PART * available_memory(torch.device("cpu"))
        models, systems, alphas = len(self.plan.models), self.plan.systems(), len(self.writers)
        own = [system for each, system in zip(self.plan.groups, systems, strict=True) if each is group]
        block = block_elements(models, side_by_side=False)
        return grams + system_bytes(models, own, alphas, block) <= system_bytes(models, systems, alphas, block)

    def _write_group(self, group: LayerGroup, blocks: list[list[Piece]], reader: Reader) -> dict[float, LayerReport]:
        """Write the weights of one group, block by block."""
        model_weights, grams = self.plan.model_weights, self.plan.grams
        tokens = [file.grams[name].tokens for file, name in zip(grams, group.grams, strict=True)]
        system = System(lambda index: reader.gram(group, index), tokens, model_weights, self.solver)
        for block in blocks:
            *values, mean = reader.rows(group, block)
            regression = system.regress(values, mean)
            for alpha, writer in self.writers.items():
                try:
                    merged = regression.solve(alpha)
                except SolveError as error:
                    paths, layers = ", ".join(str(file.path) for file in grams), ", ".join(group.tensors)
                    raise InputError(f"alpha {alpha:g}, layers {layers}, Grams {paths}: {error}") from error
                reader.write(partial(_write_pieces, writer, self._encoded(block, group, merged)))
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

    def _encoded(
        self, block: list[Piece], group: LayerGroup, merged: torch.Tensor
    ) -> list[tuple[str, np.ndarray, int]]:
        """Name, stored values and first element of each piece of a block."""
        pieces, row = [], 0
        for piece in block:
            rows = merged[row : row + piece.last - piece.first]
            row += len(rows)
            dtype, values = self.plan.layout[piece.name][0], rows.T if group.conv1d else rows
            stored = values.to(TORCH_DTYPES[dtype]).cpu()
            stored = (stored.view(torch.uint16) if dtype == "BF16" else stored).numpy()
            if not is_finite_stored(stored, dtype):
                stored = self.plan.encode(piece.name, values.cpu().numpy())  # names the value
            pieces.append((piece.name, stored, piece.first * group.width))
        return pieces


def _write_pieces(writer: CheckpointWriter, pieces: list[tuple[str, np.ndarray, int]]) -> None:
    for piece in pieces:
        writer.write(*piece)
