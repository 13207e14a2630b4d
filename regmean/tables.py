"""Embedding tables merged by token counts: read, merged and written, block by block of their rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from common.errors import InputError, within_memory
from regmean.embeddings import TiedTable, merge_by_counts
from regmean.memory import SYSTEMS
from regmean.merge_plan import CountedTable, MergePlan
from regmean.model_folder import CheckpointWriter
from regmean.report import TableReport
from regmean.solve import Objective, SolveError

BLOCK_ELEMENTS = 1 << 20  # elements per model of the rows merged at a time


def table_bytes(plan: MergePlan, alphas: int) -> int:
    """Peak bytes of arrays while the tables of a plan are merged."""
    largest, models = 0, len(plan.models)
    for table in plan.tables:
        rows, width = plan.layout[table.tensor][1]
        # Grams in float32 and float64, moments, and eigenvectors, which take two more while they are computed.
        squares = width**2 * (12 * models + 8 * models + 8 * (alphas + 4)) if table.grams else 0
        largest = max(largest, squares + 8 * (3 * models + 8) * min(max(BLOCK_ELEMENTS, width), rows * width))
    return largest


@dataclass(frozen=True)
class _Block:
    """Rows from `first` on: each model's, float (rows, width), and how often a token reads each, float64 (rows,)."""

    first: int
    rows: list[torch.Tensor]
    frequencies: list[torch.Tensor]


@dataclass(frozen=True)
class Tables:
    """All tables of a plan; `writers` are by alpha, tied tables are merged on `device`.

    `advance` is called with the number of elements written.
    """

    plan: MergePlan
    writers: dict[float, CheckpointWriter]
    device: torch.device
    advance: Callable[[int], None]

    @within_memory(SYSTEMS)
    def write(self) -> dict[float, dict[str, TableReport]]:
        """Write all tables that the writers hold; return their reports by alpha and tensor.

        Raises:
            InputError: a Gram or table that is damaged or not finite, or too little memory.
        """
        holds = next(iter(self.writers.values())).holds
        tables = [table for table in self.plan.tables if holds(table.tensor)]
        written = {table.tensor: (self._write_tied if table.grams else self._write)(table) for table in tables}
        return {alpha: {name: reports[alpha] for name, reports in written.items()} for alpha in self.writers}

    def _write(self, table: CountedTable) -> dict[float, TableReport]:
        """Write a table that is not the output head; it is the same for each alpha."""
        objective = Objective()
        for block in self._blocks(table, torch.device("cpu")):
            merged, values = merge_by_counts(block.rows, block.frequencies, self.plan.model_weights)
            objective.add(values)
            for alpha in self.writers:
                self._write_rows(table, block, merged, alpha)
            self.advance(merged.numel())
        return dict.fromkeys(self.writers, self._report(table, None, objective))

    def _write_tied(self, table: CountedTable) -> dict[float, TableReport]:
        """Write a table that is the output head as well."""
        grams = []
        for file, name in zip(self.plan.grams, table.grams, strict=True):
            grams.append(torch.as_tensor(file.read(name), device=self.device).div_(file.grams[name].tokens))
        tied, alphas = TiedTable(grams, self.plan.model_weights), list(self.writers)
        for block in self._blocks(table, self.device):
            tied.measure(block.rows, block.frequencies)
        try:
            for block in self._blocks(table, self.device):
                for alpha, merged in zip(alphas, tied.merge(block.rows, block.frequencies, alphas), strict=True):
                    self._write_rows(table, block, merged, alpha)
                self.advance(block.rows[0].numel())
        except SolveError as error:
            paths = ", ".join(str(file.path) for file in self.plan.grams)
            raise InputError(f"table {table.tensor}, Grams {paths}: {error}") from error
        return {alpha: self._report(table, tied.beta(alpha), tied.objective(alpha)) for alpha in alphas}

    def _blocks(self, table: CountedTable, device: torch.device) -> Iterator[_Block]:
        infos = [model.tensors[table.tensor] for model in self.plan.models]
        rows, width = infos[0].shape
        step = max(1, BLOCK_ELEMENTS // width)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            values = [info.read_floats(first * width, last * width).reshape(-1, width) for info in infos]
            read = [torch.from_numpy(counts[first:last]).double() / counts.sum() for counts in table.counts]
            yield _Block(first, [torch.from_numpy(each).to(device) for each in values], [f.to(device) for f in read])

    def _write_rows(self, table: CountedTable, block: _Block, merged: torch.Tensor, alpha: float) -> None:
        values = self.plan.encode(table.tensor, merged.to(block.rows[0].dtype).cpu().numpy())
        self.writers[alpha].write(table.tensor, values, block.first * merged.shape[1])

    def _report(self, table: CountedTable, beta: float | None, objective: Objective) -> TableReport:
        tokens = [int(counts.sum()) for counts in table.counts]
        return TableReport(table.tensor, tokens, len(table.counts[0]), table.unread, beta, objective)
