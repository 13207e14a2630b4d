"""RegMean: each group of layers that share a Gram is read, solved and written, block by block of its rows."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import accumulate, groupby

import numpy as np
import torch

from common.errors import InputError, within_memory
from common.ranks import available_memory
from regmean.memory import SYSTEMS
from regmean.merge_plan import LayerGroup, MergePlan
from regmean.model_folder import CheckpointWriter
from regmean.read_ahead import AheadReader, Piece, Reader
from regmean.shards import Layers
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

    `advance` is called, from any thread, with the number of elements written; `finished` after each group, with the
    reports of all groups so far by alpha.
    """

    plan: MergePlan
    writers: dict[float, CheckpointWriter]
    solver: str
    device: torch.device
    advance: Callable[[int], None]
    finished: Callable[[dict[float, Layers]], None] = lambda layers: None
    layers: dict[float, Layers] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @within_memory(SYSTEMS)
    def write(self) -> None:
        """Write all weights that have a Gram, and that the writers hold.

        Raises:
            InputError: a Gram or weight that is damaged or not finite, a system that the solver cannot solve, or too
                little memory.
        """
        threads = torch.get_num_threads()
        at_once = systems_at_once(len(self.plan.models), self.plan.systems(), len(self.writers), threads)
        # A block of a Conv1D is the whole weight.
        if self.device.type == "cuda" or any(group.conv1d for group in self.plan.groups):
            at_once = 1
        work = self._work(self._elements(at_once > 1))
        if at_once == 1:
            blocks = [(group, list(blocks.values())) for group, blocks in work]
            with AheadReader(self.plan, self.device, blocks, self._fits_ahead) as reader:
                for group, blocks in work:
                    self._write_group(group, blocks, reader)
        else:
            reader = Reader(self.plan)
            try:
                # PyTorch's number of threads is set for each thread.
                with ThreadPoolExecutor(at_once, "solver", torch.set_num_threads, (threads // at_once,)) as solvers:
                    list(solvers.map(lambda each: self._write_group(*each, reader), work))
            finally:
                torch.set_num_threads(threads)

    def _work(self, elements: list[int]) -> list[tuple[LayerGroup, dict[int, list[Piece]]]]:
        """The groups that the writers hold a tensor of, with their blocks of outputs by the first output.

        A block is in one file. So objectives add up, whatever the blocks' size is where another file is written.
        """
        work, writer = [], next(iter(self.writers.values()))
        for group, size in zip(self.plan.groups, elements, strict=True):
            blocks, first = {}, 0
            for block in output_blocks(self.plan, group, size, writer.file_of):
                if writer.holds(self.plan.place(block[0].name)[0]):
                    blocks[first] = block
                first += sum(piece.last - piece.first for piece in block)
            if blocks:
                work.append((group, blocks))
        return work

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
        return grams + self._system_bytes[self._numbers[id(group)]] <= max(self._system_bytes)

    @cached_property
    def _numbers(self) -> dict[int, int]:
        """Number of each group in the plan."""
        return {id(group): number for number, group in enumerate(self.plan.groups)}

    @cached_property
    def _system_bytes(self) -> list[int]:
        models, alphas = len(self.plan.models), len(self.writers)
        block = block_elements(models, side_by_side=False)
        return [system_bytes(models, [system], alphas, block) for system in self.plan.systems()]

    def _write_group(self, group: LayerGroup, blocks: dict[int, list[Piece]], reader: Reader) -> None:
        """Write the weights of one group, block by block, and keep its report."""
        grams, number = self.plan.grams, str(self._numbers[id(group)])
        # All experts' tokens count: of two models, that whose tokens reach an expert more often has the larger weight.
        tokens = [file.grams[name].tokens for file, name in zip(grams, group.pools or group.grams, strict=True)]
        system = System(lambda index: reader.gram(group, index), tokens, self.plan.model_weights, self.solver)
        for first, block in blocks.items():
            *values, mean = reader.rows(group, block)
            regression = system.regress(values, mean)
            for alpha, writer in self.writers.items():
                try:
                    merged = regression.solve(alpha)
                except SolveError as error:
                    paths, layers = ", ".join(str(file.path) for file in grams), ", ".join(group.tensors)
                    raise InputError(f"alpha {alpha:g}, layers {layers}, Grams {paths}: {error}") from error
                self._report(alpha, number, first, system)
                reader.write(partial(write_pieces, writer, encoded(self.plan, block, group, merged)))
            self.advance(sum(piece.last - piece.first for piece in block) * group.width)
        reader.write(self._finish)

    def _report(self, alpha: float, number: str, first: int, system: System) -> None:
        """Keep the report of a block that was just solved, before it is written."""
        solver, objective = system.solvers[alpha], asdict(system.objectives.pop(alpha))
        with self.lock:
            layers = self.layers.setdefault(alpha, {})
            known = layers.setdefault(number, {"solver": solver.label, "condition": solver.condition, "objectives": {}})
            known["objectives"][str(first)] = objective

    def _finish(self) -> None:
        with self.lock:
            self.finished(self.layers)


def output_blocks(
    plan: MergePlan, group: LayerGroup, elements: int, file_of: Callable[[str], str] | None = None
) -> Iterator[list[Piece]]:
    """Yield a group's outputs in blocks of `elements`, which end where a file does. A Conv1D weight, with outputs as
    columns, stays whole.
    """
    for _, files_own in groupby(group.tensors, lambda name: file_of and file_of(plan.place(name)[0])):
        names = list(files_own)
        ends = list(accumulate(plan.shape(name)[1 if group.conv1d else 0] for name in names))
        step = ends[-1] if group.conv1d else max(1, elements // group.width)
        for start in range(0, ends[-1], step):
            spans = zip(names, [0, *ends], ends, strict=False)
            pieces = [Piece(name, max(start - a, 0), min(start + step, b) - a) for name, a, b in spans]
            yield [piece for piece in pieces if piece.first < piece.last]


def encoded(
    plan: MergePlan, block: list[Piece], group: LayerGroup, merged: torch.Tensor
) -> list[tuple[str, np.ndarray, int]]:
    """Tensor, stored values and first element of each piece of a block."""
    pieces = []
    for piece, rows in zip(block, merged.split([piece.last - piece.first for piece in block]), strict=True):
        tensor, start = plan.place(piece.name)
        dtype, values = plan.layout[tensor][0], rows.T if group.conv1d else rows
        stored = values.to(TORCH_DTYPES[dtype]).cpu()
        stored = (stored.view(torch.uint16) if dtype == "BF16" else stored).numpy()
        if not is_finite_stored(stored, dtype):
            stored = plan.encode(piece.name, values.cpu().numpy())  # names the value
        pieces.append((tensor, stored, start + piece.first * group.width))
    return pieces


def write_pieces(writer: CheckpointWriter, pieces: list[tuple[str, np.ndarray, int]]) -> None:
    """Write pieces as from `encoded`."""
    for piece in pieces:
        writer.write(*piece)
