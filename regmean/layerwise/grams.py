"""Grams of one model, layer by layer: for models that do not fit into memory beside their sums.

Each step of the model (see model.py) is read when its turn comes, and its sums are written before the next step. A
run that was stopped continues after the last whole step. The Grams are those of compute.py.
"""

import shutil
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import Stopped, within_memory
from common.logging import progress, say
from common.ranks import Process
from common.signals import StopSignals
from regmean.architectures import layer_tensors
from regmean.calibration import Calibration, make_batches
from regmean.experts import ExpertLayer
from regmean.gram import GramSums
from regmean.gram_file import FILE_NAME, Counts, GramFile, join_files
from regmean.hooks import Layer, LinearInputs, linear_layers
from regmean.layerwise.model import BEFORE, Batch, Course, LayerwiseModel, States
from regmean.layerwise.survey import Survey
from regmean.memory import BATCHES
from regmean.model_folder import Checkpoint


def course_of(
    model: LayerwiseModel,
    texts: Calibration,
    batches: list[list[int]],
    numbers: range,
    offload_dir: str | None,
) -> Course:
    """Texts before the first step of a model.

    Args:
        batches: indices of the texts of each batch.
        numbers: the batches to take.
        offload_dir: folder for the hidden states; None for host memory.

    Raises:
        InputError: the folder has no room for the states.
    """
    chosen = [Batch.of(batches[number], texts) for number in numbers]
    width = model.model.config.get_text_config().hidden_size
    folder = Path(offload_dir) if offload_dir else None
    states = States([tuple(batch.ids.shape) for batch in chosen], width, model.model.dtype, folder)
    return Course(model, chosen, list(numbers), states)


@dataclass(frozen=True)
class Measured:
    """Parts of a model that calibration texts measure.

    Attributes:
        layers: linear layers whose inputs are summed, by name.
        tensors: names of the stored tensors that hold their weights, as `layer_tensors`.
        counts: token counts of embedding tables.
    """

    layers: dict[str, Layer]
    tensors: dict[str, set[str]]
    counts: list[Counts]


def measured(checkpoint: Checkpoint, model: LayerwiseModel, found: Survey, texts: Calibration) -> Measured:
    """The parts of a model that `texts` measure.

    Raises:
        InputError: the weight of a layer is in none of the checkpoint's files.
    """
    linear = linear_layers(model.model)
    called = {
        name for step in range(BEFORE, len(model.layers) + 1) for group in found.groups_of(step) for name in group
    }
    layers = {name: layer for name, layer in linear.items() if name in called}
    rows = {name: len(parameter) for name, parameter in model.model.named_parameters()}
    tables = [replace(table, rows=rows[f"{table.module}.weight"]) for table in found.tables]
    heads = {name for name, layer in layers.items() if layer is model.head or isinstance(layer, ExpertLayer)}
    modules = [table.module for table in tables]
    tensors, missing = layer_tensors(
        checkpoint.name, model.model, [*layers, *modules], heads | set(modules), checkpoint.tensors
    )
    counts = [table.counts(texts, tensors) for table in tables]
    tied = {table.head for table in tables}
    # A base model's checkpoint has no head.
    layers = {name: layer for name, layer in layers.items() if name not in missing or name in tied}
    return Measured(layers, tensors, counts)


class LayerwiseGrams:
    """A run over all steps; `folder` holds one Gram file per step.

    Raises:
        InputError: a file system without room for the hidden states.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        found: Survey,
        parts: Measured,
        calibration: Calibration,
        tokens_per_batch: int,
        offload_dir: str | None,
        folder: Path,
        process: Process,
    ):
        self.model, self.found, self.parts = model, found, parts
        self.folder, self.process = folder, process
        lengths = [len(example) for example in calibration.examples]
        batches = make_batches(lengths, tokens_per_batch, padding=not (found.irregular or found.depends_on_padding))
        batches = batches[process.rank :: process.world_size]
        self.course = course_of(model, calibration, batches, range(len(batches)), offload_dir)

    @within_memory(BATCHES)
    def run(self, target: Path, provenance: dict[str, Any]) -> None:
        """Run the remaining steps, write the Grams to `target`, and remove the folder.

        Raises:
            InputError: activations that are not finite, or too little memory.
            Stopped: a signal was received; the whole steps so far are on disk.
        """
        started, steps = time.monotonic(), range(BEFORE, len(self.model.layers) + 1)
        with StopSignals() as signals:
            for step in progress(self.process, steps, desc="layers", unit="step"):
                self._run_step(step, provenance)
                if signals.received:
                    raise Stopped(
                        f"{signals.received} after step {step + 2} of {len(steps)}; its sums are kept in "
                        f"{self.folder}: the same command continues"
                    )
        self.process.barrier()
        self.process.close()
        if self.process.is_main:
            parts = [GramFile(part) for step in steps if (part := self._part(step)).exists()]
            join_files(self.folder / FILE_NAME, parts, provenance)
            (self.folder / FILE_NAME).replace(target)
            shutil.rmtree(self.folder)
            size = target.stat().st_size / 1e9
            seconds = time.monotonic() - started
            count = sum(len(part.grams) for part in parts)
            say(
                self.process,
                f"{target}: {count} Grams of {len(self.parts.layers)} layers, {size:.2f} GB, {seconds:.1f} s",
            )

    def _part(self, step: int) -> Path:
        return self.folder / f"step{step + 1}.safetensors"

    def _run_step(self, step: int, provenance: dict[str, Any]) -> None:
        names = [name for group in self.found.groups_of(step) for name in group if name in self.parts.layers]
        is_done = self.process.gather(self._part(step).exists())[0]
        if step == len(self.model.layers) and (is_done or not names):
            return
        sums, weights = GramSums(), self.model.weights(step)
        layers = {} if is_done else {name: self.parts.layers[name] for name in names}
        alone = {name for name in names if self.found.is_irregular(name)}
        with LinearInputs(layers, None, sums.add, shared_name=sums.shared_name, alone=alone) as inputs:
            for index, batch in enumerate(self.course.batches):
                sums.begin({})
                real = None if batch.real is None else batch.real.to(self.model.device)
                # `inputs` passes a whole model's arguments; a step takes none of them.
                advance = partial(self.course.advance, step, weights, index)
                inputs.run(lambda run=advance, **_: run(), batch.ids, batch.mask, real)
        if names and not is_done:
            sums.add_ranks(self.process)
            if self.process.is_main:
                own = {name: self.parts.layers[name] for name in names}
                sums.write(self._part(step), own, self.parts.tensors, provenance, self.parts.counts)
        self.process.barrier()
