"""A layer-sequential merge from flags to model folders: checks, texts, models without weights, the passes, reports."""

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from common.io import atomic_folder, read_json, refuse_existing
from common.logging import quiet_libraries, say
from common.models import load_tokenizer
from common.ranks import Process
from common.runs import open_run
from regmean.adapter_folder import open_models
from regmean.architectures import auto_class, config_of
from regmean.average import CHUNK_ELEMENTS
from regmean.calibration import Calibration, check_length, check_tokens, load_calibration, make_batches
from regmean.config import MergeFlags, TextSource
from regmean.experts import ExpertLayer
from regmean.gram_file import Gram
from regmean.hooks import input_width, is_conv1d, table_positions
from regmean.layer_survey import Survey, survey
from regmean.layerwise import BEFORE, LayerwiseModel, build_without_weights, open_layerwise, stored_dtype
from regmean.layerwise_grams import course_of, measured
from regmean.merge import print_tensors
from regmean.merge_plan import MergePlan, check_vocabularies, plan_merge
from regmean.model_folder import Checkpoint, CheckpointWriter
from regmean.report import Provenance, print_table, write_report
from regmean.sequential import SAMPLED, SequentialMerge, StepGrams
from regmean.step_files import StepFiles, StepReport
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
    # The merge reads the texts of all models.
    check_vocabularies(checkpoints)
    quiet_libraries()
    configs = [config_of(checkpoint) for checkpoint in checkpoints]
    classes = [auto_class(*pair) for pair in zip(checkpoints, configs, strict=True)]
    surveys = [survey(*of, c.name) for *of, c in zip(classes, configs, checkpoints, strict=True)]
    texts = [_texts(checkpoint, source) for checkpoint, source in zip(checkpoints, sources, strict=True)]
    dtype = _run_dtype(checkpoints[0], configs[0], flags.dtype, process.device)

    def build(index: int) -> LayerwiseModel:
        model = build_without_weights(classes[index], configs[index], dtype, process.device)
        check_tokens(texts[index], model.get_input_embeddings())
        check_length(texts[index], table_positions(model))
        return open_layerwise(checkpoints[index], model, process.device, surveys[0].tuple_length)

    models = [build(index) for index in range(len(checkpoints))]
    grams = [
        _gram_entries(*of) for of in zip(checkpoints, models, surveys, texts, sources, flags.calibration, strict=True)
    ]
    plan = plan_merge(checkpoints, flags.weights(), grams, *flags.plan_options)
    if process.is_main:
        tokens = ", ".join(f"{of.tokens:,}" for of in texts)
        layers = f"{len(models[0].layers)} layers, one at a time"
        print(f"plan: {flags.method} of {len(models)} models, {layers}, {tokens} tokens of their texts")
        print_tensors(plan)
    for alpha, path in outputs.items():
        _merge_one(flags, alpha, path, plan, models, build(0), surveys[0], texts, process, command)
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


def _texts(checkpoint: Checkpoint, source: TextSource) -> Calibration:
    return load_calibration(source, load_tokenizer(str(checkpoint.tokenizer_folder)))


def _run_dtype(first: Checkpoint, config: PretrainedConfig, dtype: str, device: torch.device) -> torch.dtype:
    """The dtype that layers run in: the merge's; float32 on a CPU for float16, which CPUs multiply slowly."""
    chosen = stored_dtype(first, config, dtype)
    return torch.float32 if chosen == torch.float16 and device.type == "cpu" else chosen


def _gram_entries(
    checkpoint: Checkpoint,
    model: LayerwiseModel,
    found: Survey,
    texts: Calibration,
    source: TextSource,
    name: str,
) -> StepGrams:
    """Entries of all groups of linear layers whose inputs are summed, and of the embedding tables."""
    parts, grams = measured(checkpoint, model, found, texts), {}
    for step in range(BEFORE, len(model.layers) + 1):
        for group in found.groups_of(step):
            # Layers that read other rows than the tokens are averaged, and experts.
            group = [layer for layer in group if layer in parts.layers and not found.is_irregular(layer)]
            if group and not isinstance(parts.layers[group[0]], ExpertLayer):
                stored = tuple(tensor for tensor, owners in parts.tensors.items() if owners.issubset(group))
                first = parts.layers[group[0]]
                entry = (texts.tokens, input_width(first), is_conv1d(first), stored)
                grams[group[0]] = Gram(group[0], tuple(group), *entry)
    origin = {"dataset": source.dataset, "split": source.split, "examples": len(texts.examples)}
    origin |= {"tokens": texts.tokens, "max_length": source.max_length}
    return StepGrams(name, grams, {counts.name: counts for counts in parts.counts}, origin)


def _merge_one(
    flags: MergeFlags,
    alpha: float,
    path: Path,
    plan: MergePlan,
    models: list[LayerwiseModel],
    merged: LayerwiseModel,
    found: Survey,
    texts: list[Calibration],
    process: Process,
    command: str,
) -> None:
    steps = path.with_name(f"{path.name}.steps")
    identity = _identity(flags, alpha, plan, texts, process)
    with open_run(steps, identity, False, process) as run:
        run.start()
        files, size = StepFiles(merged, steps), flags.batch_tokens(process.device.type)
        courses, own = [], []
        for model, of in zip(models, texts, strict=True):
            batches = make_batches([len(example) for example in of.examples], size, padding=True)
            batches = batches[process.rank :: process.world_size]
            step = 1 if flags.method == "regmean_asym" else SAMPLED
            numbers = range(0, len(batches), step)
            courses.append(course_of(merged, of, batches, range(len(batches)), flags.offload_dir))
            own.append(course_of(model, of, batches, numbers, flags.offload_dir))
        method = SequentialMerge(
            flags.method, alpha, flags.ridge, flags.solver, plan, found, models, merged, courses, own, files, process
        )
        reports = method.run()
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
    solved = plan.solved_fraction()
    origin = (plan.models, plan.model_weights, plan.grams, solved)
    provenance = Provenance.of(flags.method, alpha, flags.solver, command, *origin)
    tables = [report for step in reports for report in step.tables]
    write_report(folder, provenance, plan, layers, tables, [step.distances for step in reports[:-1]])
    print_table(alpha, flags.models, layers, tables, solved)
