"""A layer-sequential merge from flags to model folders: checks, texts, models without weights, the passes, reports."""

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

from common.io import atomic_folder, read_json, refuse_existing
from common.logging import say
from common.ranks import Process
from common.runs import open_run
from regmean.adapter_folder import open_models
from regmean.average import CHUNK_ELEMENTS
from regmean.calibration import Calibration
from regmean.config import MergeFlags, TextSource
from regmean.experts import ExpertLayer, parameter_of
from regmean.gram_file import Gram
from regmean.hooks import input_width, is_conv1d
from regmean.layerwise.files import StepFiles, StepReport
from regmean.layerwise.grams import measured
from regmean.layerwise.model import BEFORE, LayerwiseModel
from regmean.layerwise.models import LayerwiseModels
from regmean.layerwise.sequential import SAMPLED, SequentialMerge
from regmean.layerwise.sums import StepGrams
from regmean.layerwise.survey import Survey
from regmean.merge import print_tensors
from regmean.merge_plan import MergePlan, plan_merge, without_experts
from regmean.model_folder import Checkpoint, CheckpointWriter, split_layout
from regmean.report import Provenance, Routing, print_table, write_report
from regmean.tensor_file import TensorInfo


def merge_layer_by_layer(flags: MergeFlags, process: Process, command: str) -> None:
    """Merge `flags.models` by `regmean++` or `regmean_asym` and write one model folder per alpha, each whole or not at
    all. A run that was cut short leaves a folder `OUTPUT.steps`; the same command continues from there.

    Raises:
        InputError: models or texts that do not fit together, a model type that cannot be run layer by layer, states or
            weights that are not finite.
    """
    started = time.monotonic()
    sources, outputs = flags.texts(), _open_outputs(flags, process, command)
    checkpoints = open_models(flags.models, flags.revisions, flags.base)
    # Checks of the headers, which need no texts.
    headers = plan_merge(checkpoints, flags.weights(), [], *flags.plan_options)
    split_layout(headers.layout, flags.max_shard_size)
    opened = LayerwiseModels.of(flags, checkpoints, process)
    models = [opened.build(index) for index in range(len(checkpoints))]
    found = (checkpoints, models, opened.surveys, opened.texts, sources, flags.calibration)
    grams = [_gram_entries(*of) for of in zip(*found, strict=True)]
    plan = plan_merge(checkpoints, flags.weights(), grams, *flags.plan_options)
    if process.is_main:
        tokens = ", ".join(f"{of.tokens:,}" for of in opened.texts)
        layers = f"{len(models[0].layers)} layers, one at a time"
        print(f"plan: {flags.method} of {len(models)} models, {layers}, {tokens} tokens of their texts")
        print_tensors(plan)
    for alpha, path in outputs.items():
        _merge_one(flags, alpha, path, plan, models, opened, command)
    say(process, f"merged in {time.monotonic() - started:.1f} s")


def _open_outputs(flags: MergeFlags, process: Process, command: str) -> dict[float, Path]:
    """The folder of each merge by alpha, without those that an earlier run of this command has written."""
    outputs = dict(zip(flags.alpha, flags.output_dirs(), strict=True))
    for alpha, path in list(outputs.items()):
        report = path / "merge_report.json"
        if report.exists() and read_json(report).get("command") == command and len(flags.alpha) > 1:
            say(process, f"{path}: written before, by the same command")
            del outputs[alpha]
        else:
            refuse_existing(path)
    return outputs


def _gram_entries(
    checkpoint: Checkpoint,
    model: LayerwiseModel,
    found: Survey,
    texts: Calibration,
    source: TextSource,
    of_texts: str,
) -> StepGrams:
    """Entries of all groups of linear layers whose inputs are summed, of experts' pools, and of the embedding tables.
    The tokens of experts are those of all texts, until they are counted.
    """
    parts, grams = measured(checkpoint, model, found, texts), {}
    # Layers that read other rows than the tokens are averaged.
    regular = [
        [layer for layer in group if layer in parts.layers and not found.is_irregular(layer)]
        for step in range(BEFORE, len(model.layers) + 1)
        for group in found.groups_of(step)
    ]
    name_of = {layer: group[0] for group in regular for layer in group}
    stored: dict[str, list[str]] = {}
    for tensor, owners in parts.tensors.items():
        names = {name_of.get(owner) for owner in owners}
        if len(names) == 1:
            stored.setdefault(names.pop(), []).append(tensor)
    for group in filter(None, regular):
        name, first = group[0], parts.layers[group[0]]
        pool = parameter_of(name) if isinstance(first, ExpertLayer) else ""
        form = (texts.tokens, input_width(first), is_conv1d(first))
        grams[name] = Gram(name, tuple(group), *form, tuple(stored.get(name, ())), pool)
        if pool:
            members = grams[pool].modules if pool in grams else ()
            grams[pool] = Gram(pool, (*members, name), *form, (), pool)
    origin = {"dataset": source.dataset, "split": source.split, "examples": len(texts.examples)}
    origin |= {"tokens": texts.tokens, "max_length": source.max_length}
    return StepGrams(of_texts, grams, {counts.name: counts for counts in parts.counts}, origin)


def _merge_one(
    flags: MergeFlags,
    alpha: float,
    path: Path,
    plan: MergePlan,
    models: list[LayerwiseModel],
    opened: LayerwiseModels,
    command: str,
) -> None:
    steps, process, merged = path.with_name(f"{path.name}.steps"), opened.process, opened.build(0)
    identity = _identity(flags, alpha, plan, opened.texts, process)
    with open_run(steps, identity, False, process) as run:
        run.start()
        files, sampled = StepFiles(merged, steps), 1 if flags.method == "regmean_asym" else SAMPLED
        courses = [opened.courses(index, merged, model, sampled) for index, model in enumerate(models)]
        courses, own = map(list, zip(*courses, strict=True))
        options = (flags.method, alpha, flags.ridge, flags.solver, plan, opened.surveys[0], models, merged)
        reports = SequentialMerge(*options, courses, own, files, process).run()
        if process.is_main:
            with atomic_folder(path) as folder:
                _assemble(flags, plan, files.tensors, folder)
                _report(flags, alpha, plan, models, reports, folder, command)
            shutil.rmtree(steps)
            print(f"{path}: written")
        process.barrier()


def _identity(
    flags: MergeFlags, alpha: float, plan: MergePlan, texts: list[Calibration], process: Process
) -> dict[str, Any]:
    """Settings and inputs that must be equal for a run to continue another."""
    of_texts = hashlib.sha256(json.dumps([of.examples for of in texts]).encode()).hexdigest()
    return {
        "method": flags.method,
        "alpha": alpha,
        "ridge": flags.ridge,
        "solver": flags.solver,
        "models": [model.fingerprint() for model in plan.models],
        "model_weights": plan.model_weights,
        "texts": of_texts,
        "tensors": hashlib.sha256(
            repr((plan.layout, plan.groups, plan.copied, [t.tensor for t in plan.tables])).encode()
        ).hexdigest(),
        "tokens_per_batch": flags.batch_tokens(process.device.type),
        "world_size": process.world_size,
        "device": process.device.type,
    }


def _assemble(flags: MergeFlags, plan: MergePlan, tensors: dict[str, TensorInfo], folder: Path) -> None:
    """Copy the steps' tensors to a model folder."""
    dtype = None if flags.dtype == "auto" else flags.dtype
    writer = CheckpointWriter(folder, plan.layout, plan.models[0], dtype, flags.max_shard_size, plan.untied)
    for name in plan.layout:
        info = tensors[name]
        for start in range(0, info.size, CHUNK_ELEMENTS):
            writer.write(name, info.read(start, min(start + CHUNK_ELEMENTS, info.size)), start)
    writer.close()


def _report(
    flags: MergeFlags,
    alpha: float,
    plan: MergePlan,
    models: list[LayerwiseModel],
    reports: list[StepReport],
    folder: Path,
    command: str,
) -> None:
    layers = [report for step in reports for report in step.layers]
    plan = without_experts(plan, {name for step in reports for name in step.unreached})
    solved = plan.solved_fraction()
    origin = (plan.models, plan.model_weights, plan.grams, solved)
    provenance = Provenance.of(flags.method, alpha, flags.solver, command, *origin)
    tables = [report for step in reports for report in step.tables]
    routing = Routing(flags.models, [step.routing for step in reports[1:-1]])
    write_report(folder, provenance, plan, layers, tables, routing, [step.distances for step in reports[:-1]])
    print_table(alpha, flags.models, layers, tables, solved)
    if routing.means:
        print(f"routing: {routing}")
