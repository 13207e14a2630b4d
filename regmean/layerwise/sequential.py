"""Layer-sequential merges: `regmean++` and `regmean_asym`. Each layer is solved from the states that the layers merged
before it produce, one decoder layer of each model in memory at a time.

Every step of the pass (see model.py) is merged as follows: tensors without a solution are averaged; the inputs of
the linear layers are summed; the layers are solved and written to the step's file; the hidden states of all calibration
texts go through the written layer. A run that was stopped continues after the last whole step.

`regmean++`: Nguyen et al., "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging"
(2025), arXiv 2508.03121. `regmean_asym`: see asymmetric.py.
"""

import itertools
import math
from dataclasses import dataclass, field, replace
from functools import partial

from common.errors import InputError, within_memory
from common.io import writing
from common.logging import progress
from common.ranks import Process
from regmean.average import write_averages
from regmean.layerwise.asymmetric import AsymmetricSystem
from regmean.layerwise.files import StepFiles, StepReport
from regmean.layerwise.model import BEFORE, Course, LayerwiseModel
from regmean.layerwise.routing import advance, agreement
from regmean.layerwise.sums import PairSums, blocks_of, pool_of, sum_inputs, turns
from regmean.layerwise.survey import Survey
from regmean.memory import BATCHES
from regmean.merge_plan import LayerGroup, MergePlan
from regmean.regmean import RegMean, encoded, output_blocks, write_pieces
from regmean.report import LayerReport
from regmean.solve import BLOCK_ELEMENTS, SolveError
from regmean.tables import Tables
from regmean.tensor_file import TensorWriter

# For `regmean++`, one batch of this number carries the models' own states, to measure how far the merge is from them.
SAMPLED = 16


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

    @within_memory(BATCHES)
    def run(self) -> list[StepReport]:
        """Merge all steps; return their reports.

        Raises:
            InputError: too little memory, a full disk, states or weights that are not finite.
        """
        count, reports = len(self.merged.layers) + 2, []
        names = self.files.names(self.plan, self.survey)
        for step in progress(self.process, range(BEFORE, count - 1), desc=f"alpha {self.alpha:g}", unit="step"):
            known = self.process.gather(self.files.read_report(step))[0]
            with writing(self.files.folder):
                report = known or self._merge_step(step, names[step])
            self.files.use(step)
            report.distances, report.routing = self._advance(step)
            if known is None and self.process.is_main:
                self.files.write_report(step, report)
            reports.append(report)
            self.process.barrier()
        return reports

    def _merge_step(self, step: int, names: list[str]) -> StepReport:
        if not names:
            return StepReport([], [])
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
        solved = {name for layer in layers for name in layer.tensors}
        return StepReport(layers, tables, [n for group in part.groups for n in group.tensors if n not in solved])

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
            sum_inputs(len(model.layers), model, course, self.plan.grams[index], names, self.process)

    def _part(self, names: list[str]) -> MergePlan:
        """The plan of these tensors alone."""
        chosen = set(names)
        return replace(
            self.plan,
            layout={name: self.plan.layout[name] for name in names},
            groups=[group for group in self.plan.groups if chosen.issuperset(map(self._stored, group.tensors))],
            tables=[table for table in self.plan.tables if table.tensor in chosen],
            averaged=[name for name in self.plan.averaged if self._stored(name) in chosen],
            copied={name: index for name, index in self.plan.copied.items() if name in chosen},
        )

    def _stored(self, name: str) -> str:
        """The tensor of a slice, or a tensor itself."""
        return self.plan.place(name)[0]

    def _solve_symmetric(self, step: int, part: MergePlan, writer: TensorWriter | None) -> list[LayerReport]:
        """RegMean with the inputs of each model's own layer on the merged states."""
        reports = []
        for turn in turns(part.groups, lambda group: 4 * len(self.models) * group.width**2, self.process):
            for index, (model, course) in enumerate(zip(self.models, self.courses, strict=True)):
                wanted = {group.grams[index] for group in turn}
                sum_inputs(step, model, course, self.plan.grams[index], wanted, self.process)
            if writer is not None:
                self._average_unreached(turn, part, writer)
                reached = [group for group in turn if self._is_reached(group)]
                options = ({self.alpha: writer}, self.solver, self.process.device, _ignore)
                method = RegMean(replace(part, groups=reached), *options)
                method.write()
                for number, group in enumerate(reached):
                    solved = method.layers[self.alpha][str(number)]
                    reports.append(
                        LayerReport.of_blocks(group.tensors, self._tokens(group.grams), **solved, pool=pool_of(group))
                    )
            for index, group in itertools.product(range(len(self.models)), turn):
                self.plan.grams[index].sums.pop(group.grams[index], None)
        self._drop_sums()
        return reports

    def _is_reached(self, group: LayerGroup) -> bool:
        """False for experts that no model's tokens reach, and for all if no token of a model reaches any."""
        return not group.pools or (any(self._tokens(group.grams)) and all(self._tokens(group.pools)))

    def _average_unreached(self, turn: list[LayerGroup], part: MergePlan, writer: TensorWriter) -> None:
        names = [name for group in turn if not self._is_reached(group) for name in group.tensors]
        write_averages(replace(part, averaged=names, copied={}), [writer], _ignore)

    def _tokens(self, names: tuple[str, ...]) -> list[int]:
        return [grams.grams[name].tokens for grams, name in zip(self.plan.grams, names, strict=True)]

    def _solve_asymmetric(self, step: int, part: MergePlan, writer: TensorWriter | None) -> list[LayerReport]:
        """One group after the other, each with the inputs that the merged groups before it lead to; all experts' groups
        of a parameter at once, if their sums fit into memory.
        """
        order = {names[0]: number for number, names in enumerate(self.survey.groups_of(step))}
        groups = sorted(part.groups, key=lambda group: order[group.grams[0]])
        stages = [list(stage) for _, stage in itertools.groupby(groups, lambda group: group.pools or group.grams)]
        work = [turn for stage in stages for turn in turns(stage, self._pair_bytes, self.process)]
        pairs, reports = PairSums(step, self.plan, self.merged, self.courses, self.own, self.process), []
        for turn in work:
            if writer is not None and self.process.world_size > 1:
                self.files.sync(step)
            self.process.barrier()
            self.files.use_unfinished(step)
            blocks = [partial(blocks_of, self.plan, group, self.process.device) for group in turn]
            systems = [AsymmetricSystem(self.alpha, self.ridge, each) for each in blocks]
            for index in range(len(self.models)):
                sums = pairs.sums(index, turn, is_last=turn is work[-1])
                for system, group in zip(systems, turn, strict=True) if writer is not None else ():
                    pairs.add(system, index, group, sums.pop(group.grams[index]))
                del sums
            if writer is not None:
                self._average_unreached(turn, part, writer)
                solved = [pair for pair in zip(systems, turn, strict=True) if self._is_reached(pair[1])]
                reports += [self._write_solution(*pair, writer) for pair in solved]
        if work:
            self._own_steps |= dict.fromkeys(range(len(self.models)), step)
        return reports

    def _pair_bytes(self, group: LayerGroup) -> int:
        """Bytes of a group's sums over the texts of one model, its system and its right-hand side."""
        return 4 * (4 * group.width**2 + sum(map(self.plan.size, group.tensors)))

    def _write_solution(self, system: AsymmetricSystem, group: LayerGroup, writer: TensorWriter) -> LayerReport:
        try:
            merged, objective, solver = system.solve(self.solver)
        except SolveError as error:
            raise InputError(f"alpha {self.alpha:g}, layers {', '.join(group.tensors)}: {error}") from error
        for block, rows in zip(output_blocks(self.plan, group, BLOCK_ELEMENTS), merged, strict=True):
            write_pieces(writer, encoded(self.plan, block, group, rows))
        tokens = self._tokens(group.grams)
        return LayerReport(group.tensors, tokens, solver.label, solver.condition, objective, pool_of(group))

    def _advance(self, step: int) -> tuple[list[float], list[float | None]]:
        """Move all texts through the step; return the relative distances of the merge's states from the models', and
        how often the merge routes as each model does.
        """
        weights = self.merged.weights(step)
        for course in self.courses:
            for index in range(len(course.batches)):
                advance(course, step, weights, index)
        del weights
        for number, own in enumerate(self.own):
            if self._own_steps.get(number) == step:
                continue
            weights = own.model.weights(step)
            for index in range(len(own.batches)):
                advance(own, step, weights, index)
        pairs = list(zip(self.courses, self.own, strict=True))
        return [self._distance(*pair) for pair in pairs], [agreement(*pair, self.process) for pair in pairs]

    def _distance(self, course: Course, own: Course) -> float:
        apart = size = 0.0
        for index, (batch, number) in enumerate(zip(own.batches, own.numbers, strict=True)):
            h, x = (batch.rows(states).double() for states in (course.states[number], own.states[index]))
            apart, size = apart + (h - x).square().sum().item(), size + x.square().sum().item()
        apart, size = self.process.sum(apart, size)
        return math.sqrt(apart / size) if size else 0.0


def _ignore(elements: int) -> None:
    """Progress of elements, which a pass of steps does not show."""
