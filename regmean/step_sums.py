"""Sums over calibration texts that the layers of one step of a layer-sequential merge are solved from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.ranks import Process, available_memory
from regmean.asymmetric import Routed
from regmean.gram import GramSums, symmetrise_, zeros
from regmean.gram_file import Counts, Gram, Grams
from regmean.hooks import LinearInputs, linear_layers
from regmean.layerwise import Batch, Course, LayerwiseModel
from regmean.merge_plan import LayerGroup

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
