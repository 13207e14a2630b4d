"""Merging of models into a new model folder, tensor by tensor; memory depends on the largest layer.

Several ranks (`torchrun merge_model.py ...`) share the weight files of the output.
"""

import contextlib
import math
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.devices import launched_world_size
from common.errors import InputError
from common.io import refuse_existing
from common.locks import locked
from common.logging import progress, say
from regmean import shards
from regmean.adapter_folder import open_models
from regmean.average import AVERAGERS, CHUNK_ELEMENTS, write_averages
from regmean.config import TIMEOUT, MergeFlags
from regmean.gram_file import Grams, open_grams
from regmean.merge_plan import MergePlan, plan_merge
from regmean.model_folder import Checkpoint, CheckpointWriter, split_layout
from regmean.names import compact
from regmean.report import LayerReport, Provenance, Routing, TableReport, print_table, write_report
from regmean.tensor_file import STORAGE

if TYPE_CHECKING:
    from common.ranks import Process
    from regmean.layerwise.models import LayerwiseModels

UNMEASURED = "the merge's routing is not compared with the models': --calibration takes each model's texts"


@dataclass(frozen=True)
class OneProcess:
    """In place of a `Process` where there is one rank, and torch is not needed."""

    rank = 0
    world_size = 1
    is_main = True

    def barrier(self) -> None:
        """Nothing to wait for."""

    def gather(self, value: Any) -> list[Any]:
        """The value of the only rank."""
        return [value]

    def close(self) -> None:
        """Nothing to leave."""


def merge(flags: MergeFlags, command: str) -> None:
    """Merge `flags.models` and write one model folder per alpha (a single one for `avg`), each whole or not at all.

    A merge that was killed is continued by the same command: the weight files that it had completed are kept.
    `command` is the command line, for the model card and the report.

    Raises:
        InputError: models or Grams that do not fit together or are damaged; values that are not finite.
    """
    started = time.monotonic()
    outputs = dict(zip(flags.alpha if flags.grams else [None], flags.output_dirs(), strict=True))
    for path in outputs.values():
        refuse_existing(path)
    models = open_models(flags.models, flags.revisions, flags.base)
    grams, model_weights = [open_grams(Path(path)) for path in flags.grams], flags.weights()
    plan = plan_merge(models, model_weights, grams, *flags.plan_options)
    files = split_layout(plan.layout, flags.max_shard_size).filename_to_tensors
    process = _start_process(flags)
    opened = _open_for_routing(flags, models, plan, process)
    if process.is_main:
        _print_plan(flags, plan, len(outputs))

    with contextlib.ExitStack() as stack:
        folders = {}
        for alpha, path in outputs.items():
            if process.is_main:
                stack.enter_context(locked(path))
            settings = _settings(flags, alpha, models, grams)
            folders[alpha] = stack.enter_context(shards.unfinished_folder(path, settings, process.is_main))
        _write(flags, plan, files, folders, models[0], process)
        process.barrier()
        routing = _compare_routing(opened, folders, plan, process) if opened else {}
        # The other ranks leave: all files are whole.
        process.close()
        if not process.is_main:
            return
        reports = {alpha: _reports(plan, grams, folder, files) for alpha, folder in folders.items()}
        origin = (models, model_weights, grams, plan.solved_fraction() if grams else None)
        for alpha, folder in folders.items():
            provenance = Provenance.of(flags.method, alpha, flags.solver, command, *origin)
            write_report(folder, provenance, plan, *reports[alpha], routing.get(alpha))
    for alpha, path in outputs.items():
        _print_report(flags, alpha, reports[alpha], plan, routing.get(alpha))
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


def _open_for_routing(
    flags: MergeFlags, models: list[Checkpoint], plan: MergePlan, process: "Process | OneProcess"
) -> "LayerwiseModels | None":
    """The models with their texts, to measure a mixture's routing; None without texts, with a note for mixtures.

    Raises:
        InputError: as of `LayerwiseModels.of`, or the models are no mixtures.
    """
    if not flags.calibration:
        if plan.has_routers:
            plan.notes.append(UNMEASURED)
        return None
    from regmean.layerwise.models import LayerwiseModels

    opened = LayerwiseModels.of(flags, models, process)
    if not opened.has_experts:
        raise InputError(f"--calibration: {models[0].name} has no experts, whose routing {flags.method} measures")
    return opened


def _compare_routing(
    opened: "LayerwiseModels", folders: dict[float | None, Path], plan: MergePlan, process: "Process | OneProcess"
) -> dict[float | None, Routing]:
    """Compare the routing of each merge with the models'; where that fails, the plan gets a note with the reason."""
    found = {}
    for alpha, folder in folders.items():
        try:
            found[alpha] = opened.routing(folder)
        except InputError as error:
            merge = "the merge" if alpha is None else f"the merge with alpha {alpha:g}"
            plan.notes.append(f"the routing of {merge} is not compared with the models': {error}")
            say(process, f"note: {plan.notes[-1]}")
    return found


def _start_process(flags: MergeFlags) -> "Process | OneProcess":
    """Join the launcher's ranks. Imported late: an average needs neither torch nor the seconds that it takes."""
    if not flags.grams and not flags.calibration and launched_world_size() == 1:
        return OneProcess()
    from common.ranks import start_process

    return start_process(flags.device if flags.grams or flags.calibration else "cpu", TIMEOUT)


def _settings(flags: MergeFlags, alpha: float | None, models: list[Checkpoint], grams: list[Grams]) -> dict[str, Any]:
    """All that the bytes of a weight file depend on: flags, versions, and the files read by size and time of change."""
    names = (
        "method",
        "models",
        "base",
        "grams",
        "model_weights",
        "include",
        "exclude",
        "solver",
        "dtype",
        "max_shard_size",
        "embeddings",
        "router",
    )
    paths = [model.files() for model in models] + [{file.path} for file in grams]
    read = [sorted(map(str, (path.resolve() for path in some))) for some in paths]
    stats = [[(path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in some] for some in read]
    return {
        **{name: getattr(flags, name) for name in names},
        "alpha": alpha,
        "files": [[list(stat) for stat in some] for some in stats],
        "records": 2,  # form of the files' records
        "versions": {name: version(name) for name in ("torch", "numpy")},
    }


def _write(
    flags: MergeFlags,
    plan: MergePlan,
    files: dict[str, list[str]],
    folders: dict[float | None, Path],
    source: Checkpoint,
    process: "Process | OneProcess",
) -> None:
    """Write this rank's weight files, except those that an earlier run has left whole; and the first rank, the rest."""
    done = process.gather(shards.whole_files(folders.values(), files) if process.is_main else None)[0]
    if done and process.is_main:
        print(f"continuing: {len(done)} of {len(files)} weight files are whole")
    own = [file for file in shards.divide(plan, files, process.world_size)[process.rank] if file not in done]
    dtype = None if flags.dtype == "auto" else flags.dtype
    options = (source, dtype, flags.max_shard_size, plan.untied, own, process.is_main)
    writers = {alpha: CheckpointWriter(folder, plan.layout, *options) for alpha, folder in folders.items()}
    elements = sum(plan.size(name) for file in own for name in files[file])
    with progress(process, total=elements, unit="el", unit_scale=True, desc="merging") as bar:

        def advance(elements: int) -> None:
            with bar.get_lock():
                bar.update(elements)

        tables: dict[float | None, dict[str, TableReport]] = {alpha: {} for alpha in writers}

        def close_whole(layers: dict[float | None, shards.Layers]) -> None:
            for alpha, writer in writers.items():
                for file, names in writer.close_whole():
                    of_tables = {name: asdict(tables[alpha][name]) for name in names if name in tables[alpha]}
                    shards.record(folders[alpha], file, _layers_of(plan, names, layers.get(alpha, {})), of_tables)

        write_averages(plan, writers.values(), advance, lambda: close_whole({}))
        # Threads may have ended their last tensors in another order.
        close_whole({})
        if plan.groups or plan.tables:
            from regmean.regmean import RegMean
            from regmean.tables import Tables

            tables |= Tables(plan, writers, process.device, advance).write()
            close_whole({})
            RegMean(plan, writers, flags.solver, process.device, advance, close_whole).write()
    for writer in writers.values():
        writer.close()


def _layers_of(plan: MergePlan, names: list[str], layers: shards.Layers) -> shards.Layers:
    """The reports of the groups that have one of these tensors, of which those of blocks of these tensors."""
    held, chosen = set(names), {}
    for number, group in enumerate(plan.groups):
        sizes = [plan.size(name) // group.width for name in group.tensors]
        spans = zip(group.tensors, map(range, [0, *accumulate(sizes)], accumulate(sizes)), strict=True)
        own = [outputs for name, outputs in spans if plan.place(name)[0] in held]
        if own and (report := layers.get(str(number))):
            kept = {first: each for first, each in report["objectives"].items() if any(int(first) in o for o in own)}
            chosen[str(number)] = report | {"objectives": kept}
    return chosen


def _reports(
    plan: MergePlan, grams: list[Grams], folder: Path, files: dict[str, list[str]]
) -> tuple[list[LayerReport], list[TableReport]]:
    """Reports of RegMean's layers and of embedding tables, from those of all ranks."""
    layers, tables = shards.recorded(folder, files)
    of_layers = [
        LayerReport.of_blocks(
            group.tensors,
            [file.grams[name].tokens for file, name in zip(grams, group.grams, strict=True)],
            pool=group.pools[0] if group.pools else "",
            **layers[str(number)],
        )
        for number, group in enumerate(plan.groups)
    ]
    return of_layers, [TableReport.of_json(tables[table.tensor]) for table in plan.tables]


def _print_report(
    flags: MergeFlags,
    alpha: float | None,
    of_tensors: tuple[list[LayerReport], list[TableReport]],
    plan: MergePlan,
    routing: Routing | None,
) -> None:
    if alpha is not None:
        print_table(alpha, flags.models, *of_tensors, plan.solved_fraction())
    if routing is not None:
        print(f"routing: {routing}")


def _print_plan(flags: MergeFlags, plan: MergePlan, outputs: int) -> None:
    models = plan.models
    read = sum(model.tensors[name].nbytes for model in models for name in plan.layout if name in model.tensors)
    written = sum(math.prod(shape) * STORAGE[dtype].itemsize for dtype, shape in plan.layout.values())
    peak = array_bytes(len(models), plan.systems(), outputs, flags.device) + plan.pool_bytes()
    if plan.tables:
        from regmean.tables import table_bytes  # imports torch, as RegMean does

        peak = max(peak, table_bytes(plan, outputs))
    size = f"{read / 1e9:.2f} GB to read, {written / 1e9:.2f} GB to write for each of {outputs}"
    print(
        f"plan: {flags.method} of {len(models)} models, {size}, at most about {peak / 1e9:.2f} GB of arrays in memory"
    )
    print_tensors(plan)


def print_tensors(plan: MergePlan) -> None:
    """Print how many tensors are merged in each way, and the plan's notes."""
    layers = sum(len(group.tensors) for group in plan.groups)
    tables = f"{len(plan.tables)} embedding tables by token counts, " if plan.tables else ""
    rest = f"{tables}{len(plan.averaged)} tensors averaged"
    for index in sorted({0, *plan.copied.values()}):
        rest += f", {list(plan.copied.values()).count(index)} copied from {plan.models[index].name}"
    solved = f"{plan.solved_fraction():.1%} of the parameters by RegMean: " if plan.grams else ""
    print(f"plan: {solved}{layers} weights by RegMean in {len(plan.groups)} systems, {rest}")
    for note in plan.notes:
        print(f"note: {note}")
    matrices = [name for name in plan.averaged if len(plan.shape(name)) > 1] if plan.grams else []
    if matrices:
        print(f"note: no Gram, averaged instead: {', '.join(compact(matrices))}")
