"""Layer-sequential merges: `regmean++` and `regmean_asym`. Each layer is solved from the states that the layers merged
before it produce, one decoder layer of each model in memory at a time.

Every step of the pass (see layerwise.py) is merged as follows: tensors without a solution are averaged; the inputs of
the linear layers are summed; the layers are solved and written to the step's file; the hidden states of all calibration
texts go through the written layer. A run that was stopped continues after the last whole step.

`regmean++`: Nguyen et al., "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging"
(2025), arXiv 2508.03121. `regmean_asym`: see asymmetric.py.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import InputError
from common.logging import progress
from common.ranks import Process
from regmean.asymmetric import AsymmetricSystem, Errors, Moments, has_few_outputs
from regmean.average import write_averages
from regmean.gram import GramSums, symmetrise_, zeros
from regmean.gram_file import Counts, Gram, Grams
from regmean.hooks import LinearInputs
from regmean.layer_survey import Survey
from regmean.layerwise import BEFORE, Course, LayerwiseModel
from regmean.merge_plan import LayerGroup, MergePlan
from regmean.read_ahead import Reader
from regmean.regmean import RegMean, write_pieces
from regmean.report import LayerReport, TableReport
from regmean.solve import BLOCK_ELEMENTS, SolveError
from regmean.step_files import StepFiles, StepReport
from regmean.tables import Tables
from regmean.tensor_file import TensorWriter

# For `regmean++`, one batch of this number carries the models' own states, to measure how far the merge is from them.
SAMPLED = 16


class StepGrams(Grams):
    """Gram entries of all linear layers that one model's calibration texts reach; the sums of one step at a time.

    Attributes:
        sums: float32 (inputs, inputs) by name, symmetric.
    """

    def __init__(self, name: str, grams: dict[str, Gram], counts: dict[str, Counts], provenance: dict[str, Any]):
        self.path, self.grams, self.counts, self.provenance = Path(name), grams, counts, provenance
        self.sums: dict[str, torch.Tensor] = {}

    def read(self, name: str, empty: Any = None) -> torch.Tensor:
        """A copy of the sum of a Gram."""
        return self.sums[name].clone()


@dataclass(eq=False)
class SequentialMerge:
    """One merge.

    Attributes:
        method: `regmean++` or `regmean_asym`.
        plan: what happens to each tensor; `plan.grams` are `StepGrams`.
        models: the models, and `merged` the merge, which reads its weights from the files of the steps.
        courses: each model's texts in the merge; `own`: each model's texts in itself, a sample for `regmean++`.
        files: the files of the steps.
    """

    method: str
    alpha: float
    ridge: float
    solver: str
    plan: MergePlan
    survey: Survey
    models: list[LayerwiseModel]
    merged: LayerwiseModel
    courses: list[Course]
    own: list[Course]
    files: StepFiles
    process: Process
    _own_steps: dict[int, int] = field(default_factory=dict)  # the last step that each model's own texts went through

    def run(self) -> list[StepReport]:
        """Merge all steps; return their reports."""
        count, reports = len(self.merged.layers) + 2, []
        names = self.files.names(self.plan, self.survey)
        for step in progress(self.process, range(BEFORE, count - 1), desc=f"alpha {self.alpha:g}", unit="step"):
            known = self.process.gather(self.files.read_report(step))[0]
            layers, tables = (known.layers, known.tables) if known else self._merge_step(step, names[step])
            self.files.use(step)
            reports.append(StepReport(layers, tables, self._advance(step)))
            if known is None and self.process.is_main:
                self.files.write_report(step, reports[-1])
            self.process.barrier()
        return reports

    def _merge_step(self, step: int, names: list[str]) -> tuple[list[LayerReport], list[TableReport]]:
        if not names:
            return [], []
        part = self._part(names)
        if any(table.grams for table in part.tables):
            self._sum_head_inputs()
        writer, tables = None, []
        if self.process.is_main:
            writer = self.files.open_writer(step, part)
            write_averages(part, [writer], _ignore)
            tables = list(Tables(part, {self.alpha: writer}, self.process.device, _ignore).write()[self.alpha].values())
        self._drop_sums()
        solve = self._solve_asymmetric if self.method == "regmean_asym" else self._solve_symmetric
        layers = solve(step, part, writer)
        if writer is not None:
            self.files.close(step, writer)
        self.process.barrier()
        return layers, tables

    def _drop_sums(self) -> None:
        for grams in self.plan.grams:
            grams.sums.clear()

    def _sum_head_inputs(self) -> None:
        """Sum the inputs of a head that is the embedding table: each model runs its own texts once, layer by layer."""
        for index, (model, course) in enumerate(zip(self.models, self.courses, strict=True)):
            alone = Course(model, course.batches, course.numbers, course.states)
            for step in range(BEFORE, len(model.layers)):
                weights = model.weights(step)
                for number in range(len(course.batches)):
                    alone.advance(step, weights, number)
            names = {table.grams[index] for table in self.plan.tables if table.grams}
            self._sum_inputs(len(model.layers), model, course, self.plan.grams[index], names)

    def _part(self, names: list[str]) -> MergePlan:
        """The plan of these tensors alone."""
        chosen = set(names)
        return replace(
            self.plan,
            layout={name: self.plan.layout[name] for name in names},
            groups=[group for group in self.plan.groups if chosen.issuperset(group.tensors)],
            tables=[table for table in self.plan.tables if table.tensor in chosen],
            averaged=[name for name in self.plan.averaged if name in chosen],
            copied={name: index for name, index in self.plan.copied.items() if name in chosen},
        )

    def _solve_symmetric(self, step: int, part: MergePlan, writer: TensorWriter | None) -> list[LayerReport]:
        """RegMean with the inputs of each model's own layer on the merged states."""
        if not part.groups:
            return []
        for index, (model, course) in enumerate(zip(self.models, self.courses, strict=True)):
            wanted = {group.grams[index] for group in part.groups}
            self._sum_inputs(step, model, course, self.plan.grams[index], wanted)
        reports = []
        if writer is not None:
            method = RegMean(part, {self.alpha: writer}, self.solver, self.process.device, _ignore)
            method.write()
            for number, group in enumerate(part.groups):
                solved = method.layers[self.alpha][str(number)]
                reports.append(LayerReport.of_blocks(group.tensors, self._tokens(group), **solved))
        self._drop_sums()
        return reports

    def _tokens(self, group: LayerGroup) -> list[int]:
        return [grams.grams[name].tokens for grams, name in zip(self.plan.grams, group.grams, strict=True)]

    def _sum_inputs(self, step: int, model: LayerwiseModel, course: Course, grams: StepGrams, wanted: set[str]) -> None:
        layers = {name: model.model.get_submodule(name) for name in sorted(wanted)}
        weights, sums = model.weights(step), GramSums()
        # The model's own layer, on the merge's states.
        own = Course(model, course.batches, course.numbers, course.states)
        with LinearInputs(layers, None, sums.add, same_calls=True, alone=set(layers)) as inputs:
            for index, batch in enumerate(course.batches):
                real = None if batch.real is None else batch.real.to(model.device)
                sums.begin({})
                forward = partial(own.forward, step, weights, index)
                inputs.run(lambda run=forward, **_: run(), batch.ids, batch.mask, real)
        for name in sorted(wanted):
            total = sums.totals.get(name)
            if total is None:
                total = zeros(grams.grams[name].width, model.device)
            self.process.sum_(total)
            grams.sums[name] = symmetrise_(total)

    def _solve_asymmetric(self, step: int, part: MergePlan, writer: TensorWriter | None) -> list[LayerReport]:
        """One group after the other, each with the inputs that the merged groups before it lead to."""
        order = [names[0] for names in self.survey.groups_of(step)]
        groups = sorted(part.groups, key=lambda group: order.index(self._module(group, 0)))
        reports = []
        for group in groups:
            self.process.barrier()
            self.files.use_unfinished(step)
            system = AsymmetricSystem(self.alpha, self.ridge, lambda group=group: self._blocks(group))
            for index, weight in enumerate(self.plan.model_weights):
                sums = self._sums(step, index, group, is_last=group is groups[-1])
                if writer is not None:
                    system.add(index, weight, sums, self._tokens(group)[index])
                del sums
            if writer is not None:
                reports.append(self._write_solution(system, group, writer))
        return reports

    def _module(self, group: LayerGroup, index: int) -> str:
        """First linear layer of a group that is called in model `index`."""
        return group.grams[index]

    def _sums(self, step: int, index: int, group: LayerGroup, is_last: bool) -> Moments | Errors:
        """Sums over the texts of a model; those in the model itself go through the whole step with its last group."""
        course, own = self.courses[index], self.own[index]
        sums = self._no_sums(index, group)
        merged_weights, weights = self.merged.weights(step), own.model.weights(step)
        layers = [model.model.get_submodule(self._module(group, index)) for model in (self.merged, own.model)]
        run_own = own.advance if is_last else own.forward
        for number, batch in enumerate(course.batches):
            h = batch.rows(_input_of(layers[0], partial(course.forward, step, merged_weights, number)))
            x = batch.rows(_input_of(layers[1], partial(run_own, step, weights, number), ends=not is_last))
            sums.add(h, x)
        for total in sums.sums():
            self.process.sum_(total)
        if is_last:
            self._own_steps[index] = step
        return sums

    def _no_sums(self, index: int, group: LayerGroup) -> Moments | Errors:
        outputs = sum(math.prod(self.plan.layout[name][1]) for name in group.tensors) // group.width
        if has_few_outputs(outputs, group.width, self.process.device):
            return Errors([(rows[index], mean) for rows, mean in self._blocks(group)])
        return Moments(group.width, self.process.device)

    def _blocks(self, group: LayerGroup) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
        """Blocks of a group's outputs: the models' rows and their mean."""
        method = RegMean(self.plan, {}, self.solver, self.process.device, _ignore)
        for block in method.blocks(group, BLOCK_ELEMENTS):
            *rows, mean = (values.to(self.process.device) for values in Reader(self.plan).rows(group, block))
            yield rows, mean

    def _write_solution(self, system: AsymmetricSystem, group: LayerGroup, writer: TensorWriter) -> LayerReport:
        method = RegMean(self.plan, {}, self.solver, self.process.device, _ignore)
        try:
            merged, objective, solver = system.solve(self.solver)
        except SolveError as error:
            raise InputError(f"alpha {self.alpha:g}, layers {', '.join(group.tensors)}: {error}") from error
        for block, rows in zip(method.blocks(group, BLOCK_ELEMENTS), merged, strict=True):
            write_pieces(writer, method.encoded(block, group, rows, writer))
        return LayerReport(group.tensors, self._tokens(group), solver.label, solver.condition, objective)

    def _advance(self, step: int) -> list[float]:
        """Move all texts through the step; return the relative distances of the merge's states from the models'."""
        weights = self.merged.weights(step)
        for course in self.courses:
            for index in range(len(course.batches)):
                course.advance(step, weights, index)
        del weights
        for number, own in enumerate(self.own):
            if self._own_steps.get(number) == step:
                continue
            weights = own.model.weights(step)
            for index in range(len(own.batches)):
                own.advance(step, weights, index)
        return [self._distance(*pair) for pair in zip(self.courses, self.own, strict=True)]

    def _distance(self, course: Course, own: Course) -> float:
        apart = size = 0.0
        for index, (batch, number) in enumerate(zip(own.batches, own.numbers, strict=True)):
            h, x = (batch.rows(states).double() for states in (course.states[number], own.states[index]))
            apart, size = apart + (h - x).square().sum().item(), size + x.square().sum().item()
        apart, size = self.process.sum(apart, size)
        return math.sqrt(apart / size) if size else 0.0


def _ignore(elements: int) -> None:
    """Progress of elements, which a pass of steps does not show."""


def _input_of(layer: nn.Module, run: Callable[[], Any], ends: bool = True) -> torch.Tensor:
    """The input of a layer in a forward pass, which ends there if `ends`."""
    seen: list[torch.Tensor] = []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else next(iter(kwargs.values())))
        if ends:
            raise _Reached

    handle = layer.register_forward_pre_hook(record, with_kwargs=True)
    with contextlib.suppress(_Reached):
        try:
            run()
        finally:
            handle.remove()
    return seen[0]


class _Reached(Exception):
    """Raised to end a forward pass."""
