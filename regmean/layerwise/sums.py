"""Sums over calibration texts that the layers of one step of a layer-sequential merge are solved from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.ranks import Process, available_memory
from regmean.gram import GramSums, symmetrise_, zeros
from regmean.gram_file import Counts, Gram, Grams
from regmean.hooks import LinearInputs, linear_layers
from regmean.layerwise.asymmetric import AsymmetricSystem, Errors, Moments, Routed, has_few_outputs, paired
from regmean.layerwise.model import Batch, Course, LayerwiseModel
from regmean.layerwise.routing import advance
from regmean.merge_plan import LayerGroup, MergePlan
from regmean.read_ahead import Reader
from regmean.regmean import output_blocks
from regmean.solve import BLOCK_ELEMENTS

SUMS_PART = 0.5  # fraction of the free memory that the sums of one pass over the texts may take


class StepGrams(Grams):
    """Gram entries of all linear layers that one model's calibration texts reach; the sums of one step at a time.

    Attributes:
        sums: float32 (inputs, inputs) by name, symmetric. Those of experts without tokens are missing.
    """

    def __init__(self, name: str, grams: dict[str, Gram], counts: dict[str, Counts], provenance: dict[str, Any]):
        self.path, self.grams, self.counts, self.provenance = Path(name), grams, counts, provenance
        self.sums: dict[str, torch.Tensor] = {}

    def read(self, name: str, empty: Any = None) -> torch.Tensor:
        """A copy of the sum of a Gram."""
        if name not in self.sums:
            return torch.zeros_like(self.sums[self.grams[name].pool])
        return self.sums[name].clone()

    def count(self, name: str, tokens: int) -> None:
        """Set the number of tokens of an expert, or of a pool, which routing decides."""
        self.grams[name] = replace(self.grams[name], tokens=tokens)


def turns(
    groups: list[LayerGroup], nbytes: Callable[[LayerGroup], int], process: Process
) -> Iterator[list[LayerGroup]]:
    """Divide groups into those whose sums, of `nbytes` each, fit into memory at once; one at least."""
    free = SUMS_PART * min(process.gather(available_memory(process.device)))
    turn, left = [], free
    for group in groups:
        if turn and nbytes(group) > left:
            yield turn
            turn, left = [], free
        turn.append(group)
        left -= nbytes(group)
    if turn:
        yield turn


def sum_inputs(
    step: int, model: LayerwiseModel, course: Course, grams: StepGrams, wanted: set[str], process: Process
) -> None:
    """Sum the inputs of a model's own layers on the merge's states into `grams`. With the first experts of a parameter,
    those of all are summed for the pool.
    """
    pools = {grams.grams[name].pool for name in wanted} - {"", *grams.sums}
    experts = {name for pool in pools for name in grams.grams[pool].modules}
    linear, weights, sums = linear_layers(model.model), model.weights(step), GramSums()
    layers = {name: layer for name, layer in linear.items() if name in wanted | experts}

    def receive(name: str, rows: torch.Tensor) -> None:
        sums.add(name if name in wanted else grams.grams[name].pool, rows)

    own = Course(model, course.batches, course.numbers, course.states)
    with LinearInputs(layers, None, receive, same_calls=True, alone=set(layers)) as inputs:
        for index, batch in enumerate(course.batches):
            sums.begin({})
            _run(inputs, batch, partial(own.forward, step, weights, index), model.device)
    sums.add_ranks(process)
    grams.sums |= {name: symmetrise_(total) for name, total in sums.totals.items()}
    for name in sorted(wanted):
        if grams.grams[name].pool:
            grams.count(name, sums.tokens.get(name, 0))
        elif name not in grams.sums:
            grams.sums[name] = zeros(grams.grams[name].width, model.device)
    for pool in pools:
        members = [name for name in (pool, *grams.grams[pool].modules) if name in sums.totals]
        total = zeros(grams.grams[pool].width, model.device)
        for name in members:
            total += sums.totals[name]
        grams.sums[pool] = total
        grams.count(pool, sum(sums.tokens[name] for name in members))


@contextmanager
def inputs_of(
    model: LayerwiseModel, names: list[str], ends: bool
) -> Iterator[Callable[[Batch, Callable[[], Any]], dict[str, Routed]]]:
    """Yield a function that runs one forward pass of a batch, given as the second argument, and returns the inputs of
    the layers of these names that it reaches. If `ends`, passes end where the last of them is reached.
    """
    linear, found = linear_layers(model.model), {}
    layers = {name: linear[name] for name in names}

    def receive(name: str, rows: torch.Tensor) -> None:
        found[name] = rows, inputs.tokens

    def run(batch: Batch, forward: Callable[[], Any]) -> dict[str, Routed]:
        found.clear()
        _run(inputs, batch, forward, model.device)
        return dict(found)

    with LinearInputs(layers, None, receive, same_calls=ends, alone=set(layers)) as inputs:
        yield run


def _run(inputs: LinearInputs, batch: Batch, forward: Callable[[], Any], device: torch.device) -> None:
    real = None if batch.real is None else batch.real.to(device)
    # `inputs` passes a whole model's arguments; a step takes none of them.
    inputs.run(lambda **_: forward(), batch.ids, batch.mask, real)


def pool_of(group: LayerGroup, index: int = 0) -> str:
    """Name of the pool of an expert's group in a model; empty for others."""
    return group.pools[index] if group.pools else ""


def blocks_of(
    plan: MergePlan, group: LayerGroup, device: torch.device
) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """Yield blocks of a group's outputs: the models' rows and their mean."""
    for block in output_blocks(plan, group, BLOCK_ELEMENTS):
        *rows, mean = (values.to(device) for values in Reader(plan).rows(group, block))
        yield rows, mean


@dataclass(eq=False)
class PairSums:
    """Sums over inputs in the merge and in each model itself, for `asymmetric.py`, in one step.

    Attributes:
        plan, merged, courses, own: as of `SequentialMerge`.
        pools: the sums over all experts of a parameter, by the model's index and the pool's name.
    """

    step: int
    plan: MergePlan
    merged: LayerwiseModel
    courses: list[Course]
    own: list[Course]
    process: Process
    pools: dict[tuple[int, str], Moments] = field(default_factory=dict)

    def sums(self, index: int, turn: list[LayerGroup], is_last: bool) -> dict[str, Moments | Errors]:
        """Sums of each group's Gram over the texts of a model. In the model itself, these go through the whole step if
        the turn is the last. The first experts of a parameter also complete its pool.
        """
        names, sums = [group.grams for group in turn], {group.grams[index]: self._none(index, group) for group in turn}
        key, rest = (index, pool_of(turn[0], index)), None
        if key[1] and key not in self.pools:
            rest = self.pools[key] = Moments(turn[0].width, self.process.device)
            every = zip(self.plan.grams, turn[0].pools, strict=True)
            names = list(zip(*(grams.grams[pool].modules for grams, pool in every), strict=True))
        self._add_texts(index, [(each[0], each[index]) for each in names], sums, rest, is_last)
        for each in (*sums.values(), *([rest] if rest else [])):
            for total in each.sums():
                self.process.sum_(total)
        for name, each in sums.items() if key[1] else ():
            self.plan.grams[index].count(name, int(each.tokens))
            if rest is not None:
                rest.join(each)
        if rest is not None:
            self.plan.grams[index].count(key[1], int(rest.tokens))
        return sums

    def _none(self, index: int, group: LayerGroup) -> Moments | Errors:
        outputs = sum(map(self.plan.size, group.tensors)) // group.width
        if not group.pools and has_few_outputs(outputs, group.width, self.process.device):
            blocks = blocks_of(self.plan, group, self.process.device)
            return Errors([(rows[index], mean) for rows, mean in blocks])
        return Moments(group.width, self.process.device)

    def _add_texts(
        self,
        index: int,
        names: list[tuple[str, str]],
        sums: dict[str, Moments | Errors],
        rest: Moments | None,
        is_last: bool,
    ) -> None:
        """Add the inputs of layers, by their names in the merge and in the model; those without a sum, to `rest`."""
        course, own = self.courses[index], self.own[index]
        merged_weights, weights = self.merged.weights(self.step), own.model.weights(self.step)
        run_own = partial(advance, own) if is_last else own.forward
        of_merge, of_model = map(list, zip(*names, strict=True))
        with (
            inputs_of(self.merged, of_merge, ends=True) as run_merged,
            inputs_of(own.model, of_model, ends=not is_last) as run_model,
        ):
            for number, batch in enumerate(course.batches):
                h = run_merged(batch, partial(course.forward, self.step, merged_weights, number))
                x = run_model(batch, partial(run_own, self.step, weights, number))
                for in_merge, in_model in names:
                    if in_merge in h and in_model in x:
                        sums.get(in_model, rest).add(*paired(h[in_merge], x[in_model]))

    def add(self, system: AsymmetricSystem, index: int, group: LayerGroup, sums: Moments | Errors) -> None:
        """Add a model's sums to a group's system; none if no token reaches any expert, which are then averaged."""
        tokens = self.plan.grams[index].grams[pool_of(group, index) or group.grams[index]].tokens
        if tokens:
            if group.pools:
                sums.shrink(self.pools[index, group.pools[index]])
            system.add(index, self.plan.model_weights[index], sums, tokens)
