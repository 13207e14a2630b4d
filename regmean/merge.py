"""Merging of models into a new model folder, tensor by tensor; memory depends on the largest layer."""

import contextlib
import math
import time
from pathlib import Path

from tqdm import tqdm

from common.io import atomic_folder
from common.locks import locked
from regmean.average import AVERAGERS, CHUNK_ELEMENTS, write_averages
from regmean.config import MergeFlags
from regmean.gram_file import open_grams
from regmean.merge_plan import MergePlan, compact, plan_merge
from regmean.model_folder import CheckpointWriter, open_checkpoint
from regmean.report import LayerReport, Provenance, TableReport, print_table, write_report
from regmean.tensor_file import STORAGE


def merge(flags: MergeFlags, command: str) -> None:
    """Merge `flags.models` and write one model folder per alpha (a single one for `avg`), each whole or not at all.

    `command` is the command line, for the model card and the report.

    Raises:
        InputError: models or Grams that do not fit together or are damaged; values that are not finite.
    """
    started = time.monotonic()
    revisions = flags.revisions or [None] * len(flags.models)
    models = [open_checkpoint(name, revision) for name, revision in zip(flags.models, revisions, strict=True)]
    grams = [open_grams(Path(path)) for path in flags.grams]
    outputs, model_weights = flags.output_dirs(), flags.weights()
    plan = plan_merge(models, model_weights, grams, flags.selects, flags.dtype, flags.counts_embeddings)
    _print_plan(flags, plan, len(outputs))

    alphas = flags.alpha if grams else [None]
    with contextlib.ExitStack() as folders:
        for path in outputs:
            folders.enter_context(locked(path))
        partial = [folders.enter_context(atomic_folder(path)) for path in outputs]
        dtype = None if flags.dtype == "auto" else flags.dtype
        writers = {
            alpha: CheckpointWriter(folder, plan.layout, models[0], dtype, flags.max_shard_size, plan.untied)
            for alpha, folder in zip(alphas, partial, strict=True)
        }
        reports = _write(plan, writers, flags.solver, flags.device)
        for alpha, folder in zip(alphas, partial, strict=True):
            writers[alpha].close()
            solved = plan.solved_fraction() if grams else None
            origin = (models, model_weights, grams, solved)
            provenance = Provenance.of(flags.method, alpha, flags.solver, command, *origin)
            write_report(folder, provenance, plan, *reports[alpha])
    for alpha, path in zip(alphas, outputs, strict=True):
        if alpha is not None:
            print_table(alpha, flags.models, *reports[alpha], plan.solved_fraction())
        print(f"{path}: written")
    print(f"merged in {time.monotonic() - started:.1f} s")


def array_bytes(models: int, systems: list[tuple[int, int]], alphas: int, device: str = "cpu") -> int:
    """Peak bytes of arrays in a merge of `models` models, on the GPU if `device` is one; assumes that they are free.

    `systems` has (inputs, outputs) of each system that RegMean solves for `alphas` alphas; empty for an average.
    """
    # For each chunk: the models' values, their mean as computed and as written, and float64 sums and terms.
    averaging = 4 * (models + 6) * AVERAGERS * CHUNK_ELEMENTS
    if not systems:
        return averaging
    from regmean.regmean import solving_bytes  # imports torch, which an average does not need

    return max(averaging, solving_bytes(models, systems, alphas, device))


def _write(
    plan: MergePlan, writers: dict[float | None, CheckpointWriter], solver: str, device: str
) -> dict[float | None, tuple[list[LayerReport], list[TableReport]]]:
    """Write every tensor of the plan; return the reports of RegMean's layers and of embedding tables by alpha."""
    elements = sum(math.prod(shape) for _, shape in plan.layout.values())
    with tqdm(total=elements, unit="el", unit_scale=True, desc="merging", dynamic_ncols=True) as bar:

        def advance(elements: int) -> None:
            with bar.get_lock():
                bar.update(elements)

        if not plan.groups and not plan.tables:
            write_averages(plan, writers.values(), advance)
            return {alpha: ([], []) for alpha in writers}
        # Imported late: an average needs neither torch nor the seconds that it takes to import.
        from common.ranks import start_process
        from regmean.regmean import RegMean
        from regmean.tables import Tables

        at = start_process(device).device
        write_averages(plan, writers.values(), advance)
        tables = Tables(plan, writers, at, advance).write()
        layers = RegMean(plan, writers, solver, at, advance).write()
        return {alpha: (layers[alpha], tables[alpha]) for alpha in writers}


def _print_plan(flags: MergeFlags, plan: MergePlan, outputs: int) -> None:
    models = plan.models
    read = sum(model.tensors[name].nbytes for model in models for name in plan.layout if name in model.tensors)
    written = sum(math.prod(shape) * STORAGE[dtype].itemsize for dtype, shape in plan.layout.values())
    peak = array_bytes(len(models), plan.systems(), outputs, flags.device)
    if plan.tables:
        from regmean.tables import table_bytes  # imports torch, as RegMean does

        peak = max(peak, table_bytes(plan, outputs))
    size = f"{read / 1e9:.2f} GB to read, {written / 1e9:.2f} GB to write for each of {outputs}"
    print(
        f"plan: {flags.method} of {len(models)} models, {size}, at most about {peak / 1e9:.2f} GB of arrays in memory"
    )
    layers = sum(len(group.tensors) for group in plan.groups)
    tables = f"{len(plan.tables)} embedding tables by token counts, " if plan.tables else ""
    rest = f"{tables}{len(plan.averaged)} tensors averaged, {len(plan.copied)} copied from {models[0].name}"
    solved = f"{plan.solved_fraction():.1%} of the parameters by RegMean: " if plan.grams else ""
    print(f"plan: {solved}{layers} weights by RegMean in {len(plan.groups)} systems, {rest}")
    for note in plan.notes:
        print(f"note: {note}")
    matrices = [name for name in plan.averaged if len(plan.layout[name][1]) > 1] if plan.grams else []
    if matrices:
        print(f"note: no Gram, averaged instead: {', '.join(compact(matrices))}")
