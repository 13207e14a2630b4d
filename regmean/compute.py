"""Grams of one model over calibration texts: one sum of x x^T per distinct layer input.

`compute_grams` loads texts and model, probes the model once to find which layers share an input, plans as many passes
as memory requires, and runs them. The sums themselves are in gram.py.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from common import snapshots
from common.errors import InputError, Stopped, is_out_of_memory, within_memory
from common.io import read_json, write_json
from common.logging import progress, quiet_libraries, say
from common.models import load_tokenizer
from common.ranks import Process, available_memory, synchronize
from common.runs import RUN, RunFolder, open_run
from common.signals import StopSignals
from regmean.adapter_folder import open_models
from regmean.architectures import auto_class, config_of, layer_tensors, load_updated
from regmean.batch_runner import BatchRunner, TooLargeError
from regmean.calibration import Calibration, check_length, check_tokens, collate, load_calibration, make_batches
from regmean.config import GramFlags, TextSource
from regmean.experts import ExpertLayer
from regmean.gram import GramSums, product_bytes
from regmean.gram_file import FILE_NAME, Counts, GramFile, join_files
from regmean.hooks import (
    Layer,
    LinearInputs,
    input_width,
    linear_layers,
    nominal_positions,
    share_modules,
    table_positions,
    untied_head,
)
from regmean.layerwise.grams import LayerwiseGrams, measured
from regmean.layerwise.model import BEFORE, build_without_weights, open_layerwise, stored_dtype
from regmean.layerwise.survey import Survey, survey
from regmean.model_folder import Checkpoint
from regmean.names import compact
from regmean.token_counts import find_tables

SNAPSHOT_SECONDS = 600.0
SUMS_NAME = "sums.safetensors"
PLAN = "plan.json"
# Minimum fraction of the memory beside the model that is kept for activations of a batch and fragmentation.
RESERVED = 0.1
# Factor on a batch's bytes as measured on a GPU; and bytes of libraries there, such as cuBLAS and NCCL.
BATCH_MARGIN = 1.15
LIBRARIES = 0.5e9
# Tokens of the text that shows if tokens depend on padding, and the largest relative change that is rounding.
PADDED, LARGEST_CHANGE = 64, 1e-3
MORE_MEMORY = "take a larger --device, a narrower --dtype or a smaller --max_length"


def compute_grams(
    flags: GramFlags, process: Process, snapshot_seconds: float = SNAPSHOT_SECONDS, model: PreTrainedModel | None = None
) -> None:
    """Compute the Grams of `flags.model` over its calibration texts and write `gram.safetensors`.

    A run that was cut short leaves `gram.partial/` in the output folder; the same command continues from there and
    ends with the same Gram.

    Args:
        process: this rank; each rank runs its shard of the batches. It leaves the process group before the first rank
            joins the Grams of several passes.
        snapshot_seconds: the time between two snapshots.
        model: the model `flags.model`, if it is already loaded; its output head is removed.

    Raises:
        InputError: bad flags, model or data; a Gram that does not fit into memory; activations that are not finite.
        Stopped: a signal was received; a snapshot of the work so far is on disk.
    """
    target = Path(flags.output_dir) / FILE_NAME
    if target.exists() and not flags.overwrite:
        raise InputError(f"{target} exists already: --overwrite it, or choose another --output_dir")
    (checkpoint,) = open_models([flags.model], [flags.revision], flags.base)
    quiet_libraries()
    trusted = {"trust_remote_code": flags.trust_remote_code}
    config = config_of(checkpoint, **trusted)
    model_class = auto_class(checkpoint, config)
    tokenizer = load_tokenizer(str(checkpoint.tokenizer_folder), **trusted)
    calibration = load_calibration(flags.texts(), tokenizer)
    say(process, calibration.summary(flags.max_length))
    found = None if model else survey_if_large(flags, checkpoint, model_class, config, process)
    load = partial(load_updated, checkpoint, model_class, config, dtype=flags.dtype, **trusted)
    # A class that comes with the model is built with its weights only.
    model = model or (load() if flags.trust_remote_code and found is None else None)
    dtype = model.dtype if model else stored_dtype(checkpoint, config, flags.dtype)
    built = model or build_without_weights(model_class, config, dtype, process.device)
    check_tokens(calibration, built.get_input_embeddings())
    check_length(calibration, table_positions(built))
    identity = _identity(checkpoint, calibration, dtype, process) | ({"layerwise": True} if found else {})
    provenance = _provenance(identity, checkpoint, flags.texts(), tokenizer, calibration)
    with open_run(target.with_suffix(".partial"), identity, flags.overwrite, process) as run:
        if found is None:
            _compute_whole(flags, checkpoint, model or load(), calibration, run, target, provenance, snapshot_seconds)
        else:
            _compute_layerwise(flags, checkpoint, built, found, calibration, run, target, provenance)


def _compute_whole(
    flags: GramFlags,
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    calibration: Calibration,
    run: RunFolder,
    target: Path,
    provenance: dict[str, Any],
    snapshot_seconds: float,
) -> None:
    """Compute the Grams with the whole model in memory."""
    run.start()
    parts, size = _prepare(model, checkpoint, calibration, run.process), flags.batch_tokens(run.process.device.type)
    passes = _Passes(model, *parts, calibration, size, run.folder, run.process, snapshot_seconds)
    passes.run(target, provenance)


def _compute_layerwise(
    flags: GramFlags,
    checkpoint: Checkpoint,
    built: PreTrainedModel,
    found: Survey,
    calibration: Calibration,
    run: RunFolder,
    target: Path,
    provenance: dict[str, Any],
) -> None:
    """Compute the Grams with one layer of the model in memory; `built` is the model without weights."""
    process = run.process
    model = open_layerwise(checkpoint, built, process.device, found.tuple_length)
    run.start()
    parts, size = measured(checkpoint, model, found, calibration), flags.batch_tokens(process.device.type)
    say(process, f"plan: {len(model.layers)} layers, one at a time, {len(parts.layers)} linear layers in them")
    grams = LayerwiseGrams(model, found, parts, calibration, size, flags.offload_dir, run.folder, process)
    grams.run(target, provenance)


def survey_if_large(
    flags: GramFlags, checkpoint: Checkpoint, model_class: Any, config: PretrainedConfig, process: Process
) -> Survey | None:
    """The survey of a model that is to be run layer by layer; None if it is run as a whole.

    Raises:
        InputError: `--layerwise on`, and the model cannot be run so.
    """
    # An unfinished run continues in its own way.
    before = Path(flags.output_dir) / f"{Path(FILE_NAME).stem}.partial" / RUN
    way = flags.layerwise
    if way == "auto" and before.exists() and not flags.overwrite:
        way = "on" if read_json(before)["settings"].get("layerwise") else "off"
    if way == "off" or (way == "auto" and flags.trust_remote_code):
        return None
    if way == "on":
        return survey(model_class, config, checkpoint.name)
    cpu = torch.device("cpu")
    built = build_without_weights(model_class, config, stored_dtype(checkpoint, config, flags.dtype), cpu)
    weights = sum(parameter.nbytes for parameter in built.parameters())
    layers = linear_layers(built)
    free = memory_for_sums(available_memory(process.device) - weights, 0, process.device.type)

    def is_large(names: Iterable[str]) -> bool:
        return any(process.gather(sum(4 * input_width(layers[name]) ** 2 for name in names) > free))

    # Layers that share an input have one sum: the first bound is too high.
    if not is_large(layers):
        return None
    try:
        found = survey(model_class, config, checkpoint.name)
        open_layerwise(checkpoint, built, cpu, found.tuple_length)
    except InputError as error:
        say(process, f"note: {error}")
        return None
    steps = range(BEFORE, len(found.kinds) + 1)
    return found if is_large(group[0] for step in steps for group in found.groups_of(step)) else None


def _identity(checkpoint: Checkpoint, calibration: Calibration, dtype: torch.dtype, process: Process) -> dict[str, Any]:
    """Settings and inputs that must be equal for a run to continue another."""
    return {
        "model": checkpoint.name,
        "fingerprint": checkpoint.fingerprint(),
        "examples": hashlib.sha256(json.dumps(calibration.examples).encode()).hexdigest(),
        "dtype": str(dtype).removeprefix("torch."),
        "world_size": process.world_size,
    }


def _prepare(
    model: PreTrainedModel, checkpoint: Checkpoint, calibration: Calibration, process: Process
) -> tuple[dict[str, Layer], dict[str, set[str]], list[Counts]]:
    """Put the model on this rank's device, without an output head of its own.

    Returns:
        The layers that have a Gram, by name; the names of the tensors that hold their weights, as `layer_tensors`; and
        the token counts of embedding tables.
    """
    share_modules(model)
    head, layers = untied_head(model), linear_layers(model)
    with within_memory(f"out of memory with the model; {MORE_MEMORY}"):
        model.to(process.device).eval()
    tables = find_tables(model, calibration)
    optional = {name for name, layer in layers.items() if layer is model.get_output_embeddings()}
    optional |= {table.module for table in tables}
    optional |= {name for name, layer in layers.items() if isinstance(layer, ExpertLayer)}
    names = [*layers, *(table.module for table in tables)]
    tensors, missing = layer_tensors(checkpoint.name, model, names, optional, checkpoint.tensors)
    counts = [table.counts(calibration, tensors) for table in tables]
    unknown = [name for name in missing if isinstance(layers.get(name), ExpertLayer)]
    if unknown:
        listed = ", ".join(compact(unknown))
        say(process, f"note: stored in a form of their own, which a merge averages: {listed}")
    for name in missing if head is not None else unknown:
        # A base model's checkpoint has no head: this one is random, and no merge uses its Gram.
        layers.pop(name, None)
    if head is not None:
        # Forward passes end before the head, and that of Llama-3-8B is as large as a layer's sums.
        head.to("meta")
    return layers, tensors, counts


@dataclass(frozen=True)
class Plan:
    """Division of the work into passes and batches.

    Attributes:
        passes: the layers of each pass over the texts.
        inputs: the layers of each distinct input.
        padding: True if batches may contain padding.
        tokens_per_batch: maximum for the batches distributed to the ranks; if memory is short, they are run in parts.
        alone: layers whose inputs are never shared.
    """

    passes: list[list[str]]
    inputs: list[list[str]]
    padding: bool
    tokens_per_batch: int
    alone: list[str] = field(default_factory=list)


class Probe(NamedTuple):
    """Result of running one example: fields of `Plan`, and the seconds and GPU bytes that it takes."""

    inputs: list[list[str]]
    padding: bool
    alone: list[str]
    seconds: float
    nbytes: int


def probe(model: PreTrainedModel, layers: dict[str, Layer], ids: list[int], device: torch.device) -> Probe:
    """Run one example to find which layers share an input, and if the rows of every layer are the example's tokens.

    If they are not (as in experts that are modules of their own, each with some of the tokens), padding rows cannot be
    identified inside the model, and batches must not contain padding; nor where tokens depend on padding.
    """
    example, mask = (tensor.to(device) for tensor in collate([ids]))
    head = model.get_output_embeddings()
    with LinearInputs(layers, head, lambda name, rows: GramSums().add(name, rows)) as inputs:
        inputs.run(model, example, mask)  # the first pass also warms up; the second is timed
        inputs.part()
        synchronize(device)
        started = time.monotonic()
        inputs.run(model, example, mask)
        synchronize(device)
        seconds = time.monotonic() - started
        # Without the sums, but with the copies of rows that a batch with padding needs.
        inputs.receive = lambda name, rows: None
        real = mask.flatten().nonzero().flatten() if inputs.aligned else None
        nbytes = peak_bytes(device, lambda: inputs.run(model, example, mask, real))
        modules = {name for name, layer in layers.items() if not isinstance(layer, ExpertLayer)}
        padding = inputs.aligned and inputs.shared_name.keys() >= modules
        padding = padding and not _depends_on_padding(model, inputs, modules, ids[:PADDED], device)
    return Probe(inputs.groups(), padding, sorted(inputs.alone), seconds, nbytes)


def _depends_on_padding(
    model: PreTrainedModel, inputs: LinearInputs, names: set[str], ids: list[int], device: torch.device
) -> bool:
    """True if inputs of these layers at the first half of a text change, beyond rounding, where that half is padded."""
    half, found = ids[: (len(ids) + 1) // 2], []
    for texts in ([half], [half, half], [ids, half]):
        batch, mask = (tensor.to(device) for tensor in collate(texts))
        real = None if mask.all() else mask.flatten().nonzero().flatten()
        rows: dict[str, torch.Tensor] = {}
        inputs.receive = rows.__setitem__
        inputs.run(model, batch, mask, real)
        found.append({name: rows[name][-len(half) :].double() for name in names & rows.keys()})
    tolerance = max(LARGEST_CHANGE, 4 * torch.finfo(model.dtype).eps)
    for name, alone in found[0].items():
        # Other shapes alone change the rounding, and so the experts of some tokens.
        rounding, change = ((other[name] - alone).norm() for other in found[1:])
        if change > 4 * rounding + tolerance * alone.norm():
            return True
    return False


def peak_bytes(device: torch.device, run: Callable[[], None]) -> int:
    """Peak bytes that PyTorch allocates on a GPU during a call of `run`; on other devices 0, without a call."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def memory_for_sums(free: int, batch_bytes: float, device_type: str) -> int:
    """Bytes that the sums of a pass may take, out of the `free` bytes beside the model."""
    left = min(free * (1 - RESERVED), free - BATCH_MARGIN * batch_bytes)
    return max(0, int(left - (LIBRARIES if device_type == "cuda" else 0)))


def plan_passes(inputs: list[list[str]], widths: list[int], memory: int) -> list[list[str]]:
    """Distribute the layers of each distinct input, in the model's order, over as few passes as memory allows.

    `widths` has the features of each input, `memory` the bytes for the sums of one pass.

    Raises:
        InputError: the largest sum does not fit.
    """
    largest = 4 * max(widths) ** 2
    if largest > memory:
        raise InputError(
            f"the widest layer ({max(widths)} features) needs {largest / 1e9:.1f} GB beside the model, "
            f"and {memory / 1e9:.1f} GB are free; take a larger --device, a narrower --dtype or a smaller batch "
            "(--tokens_per_batch)"
        )
    passes: list[list[str]] = []
    free = 0
    for names, width in zip(inputs, widths, strict=True):
        if not passes or 4 * width**2 > free:
            passes.append([])
            free = memory
        passes[-1] += names
        free -= 4 * width**2
    return passes


@dataclass
class _Passes:
    """All passes of a run over its texts; `folder` holds the state that an interrupted run continues from.

    `tokens_per_batch` is lowered when a batch does not fit into memory.
    """

    model: PreTrainedModel
    layers: dict[str, Layer]
    tensors: dict[str, set[str]]
    counts: list[Counts]
    calibration: Calibration
    tokens_per_batch: int
    folder: Path
    process: Process
    snapshot_seconds: float

    def run(self, target: Path, provenance: dict[str, Any]) -> None:
        """Run the remaining passes, write the Grams to `target`, and remove the folder."""
        process, plan, number = self.process, self._agreed_plan(), 0
        started = time.monotonic()
        while number < len(plan.passes):
            part = self._part(number)
            if not process.gather(part.exists())[0]:
                sums = self._sums_of_pass(number, plan)
                if not all(process.gather(sums is not None)):
                    del sums
                    plan = self._with_smaller_passes(plan, number)
                    continue
                sums.add_ranks(process)
                if process.is_main:
                    sums.write(part, self._layers(plan, number), self.tensors, provenance, self.counts)
                # The next pass is planned to fill the memory.
                del sums
                process.barrier()
            # Also after an earlier run that was killed before it reached this line.
            shutil.rmtree(self._snapshots(number), ignore_errors=True)
            number += 1
        # The other ranks leave first: joining may take longer than a collective waits.
        process.barrier()
        process.close()
        if process.is_main:
            parts = [self._part(number) for number in range(len(plan.passes))]
            _assemble(parts, self.folder / FILE_NAME, provenance).replace(target)
            shutil.rmtree(self.folder)
            self._report(target, time.monotonic() - started)

    def _agreed_plan(self) -> Plan:
        """Plan of the interrupted run, else a new one; the first rank makes and stores it."""
        path, device = self.folder / PLAN, self.process.device
        known = Plan(**read_json(path)) if self.process.is_main and path.exists() else None
        if plan := self.process.gather(known)[0]:
            return plan
        longest = max(self.calibration.examples, key=len)
        try:
            inputs, padding, alone, seconds, nbytes = probe(self.model, self.layers, longest, device)
        except (RuntimeError, IndexError) as error:
            if not is_out_of_memory(error):
                # Also the cause where a number of positions is computed, as in MPT.
                check_length(self.calibration, nominal_positions(self.model))
                raise
            raise InputError(f"out of memory with the model and one example; {MORE_MEMORY}") from error
        padding, widths = all(self.process.gather(padding)), self._widths(inputs)
        batch = nbytes * max(1.0, self.tokens_per_batch / len(longest)) + product_bytes(max(widths), device)
        memory = min(self.process.gather(memory_for_sums(available_memory(device), batch, device.type)))
        plan = Plan(plan_passes(inputs, widths, memory), inputs, padding, self.tokens_per_batch, alone)
        if self.process.is_main:
            write_json(path, asdict(plan))
        runs, sums = len(plan.passes), sum(4 * width**2 for width in widths)
        minutes = seconds / len(longest) * self.calibration.tokens * runs / self.process.world_size / 60
        found = f"{len(self.layers)} layers with {len(widths)} distinct inputs, {sums / 1e9:.2f} GB of sums"
        found += ", half of that on disk,"
        passes = "1 pass" if runs == 1 else f"{runs} passes"
        alike = "" if padding else "; only examples of equal length share a batch"
        free = f"where {memory / 1e9:.1f} GB are free"
        say(self.process, f"plan: {found} {free}: {passes}, at most about {minutes:.1f} min{alike}")
        return plan

    def _with_smaller_passes(self, plan: Plan, number: int) -> Plan:
        """Split pass `number`, which does not fit into a rank's memory, into parts of half the sums.

        Raises:
            InputError: the pass has only one input.
        """
        inputs = [names for names in plan.inputs if names[0] in plan.passes[number]]
        widths = self._widths(inputs)
        if len(inputs) == 1:
            raise InputError(
                f"out of memory with the sum of one layer ({widths[0]} features) and one example; {MORE_MEMORY}"
            )
        sums = [4 * width**2 for width in widths]
        parts = plan_passes(inputs, widths, max(*sums, sum(sums) // 2))
        say(self.process, f"out of memory with one example at once: pass {number + 1} becomes {len(parts)} passes")
        # Snapshots of the whole pass do not apply to its parts.
        shutil.rmtree(self._snapshots(number), ignore_errors=True)
        self.process.barrier()
        plan = replace(plan, passes=[*plan.passes[:number], *parts, *plan.passes[number + 1 :]])
        if self.process.is_main:
            write_json(self.folder / PLAN, asdict(plan))
        return plan

    def _widths(self, inputs: list[list[str]]) -> list[int]:
        return [input_width(self.layers[names[0]]) for names in inputs]

    def _layers(self, plan: Plan, number: int) -> dict[str, Layer]:
        return {name: self.layers[name] for name in plan.passes[number]}

    def _part(self, number: int) -> Path:
        """The Gram file of pass `number`."""
        return self.folder / f"pass{number}.safetensors"

    def _snapshots(self, number: int) -> Path:
        """This rank's snapshots of pass `number`."""
        return self.folder / f"pass{number}-rank{self.process.rank}"

    def _sums_of_pass(self, number: int, plan: Plan) -> GramSums | None:
        """This rank's sums for the layers of pass `number`, continued from a snapshot if there is one.

        None if a single example does not fit into memory.
        """
        lengths, process = [len(example) for example in self.calibration.examples], self.process
        batches = make_batches(lengths, plan.tokens_per_batch, plan.padding)[process.rank :: process.world_size]
        root, done, sums = self._snapshots(number), 0, GramSums()
        if snapshot := snapshots.newest(root, tqdm.write):
            done, sums = snapshots.step_of(snapshot), GramSums.read(snapshot / SUMS_NAME, process.device)
            say(process, f"continuing after {done} of {len(batches)} batches")
        layers = self._layers(plan, number)
        runner = BatchRunner(
            self.model, layers, self.calibration, process.device, sums, plan.padding, self.tokens_per_batch, plan.alone
        )
        tokens = [sum(lengths[index] for index in batch) for batch in batches]
        title, counts = f"pass {number + 1} of {len(plan.passes)}", (sum(tokens), sum(tokens[:done]))
        bar = progress(process, total=counts[0], initial=counts[1], unit="tok", unit_scale=True, desc=title)
        saved = time.monotonic()
        with runner, bar, StopSignals() as signals:
            for position in range(done, len(batches)):
                try:
                    runner.add(batches[position])
                except TooLargeError:
                    return None
                bar.update(tokens[position])
                signal = signals.received
                if signal or time.monotonic() - saved >= self.snapshot_seconds:
                    snapshots.save(root, position + 1, lambda to: sums.write(to / SUMS_NAME, layers, {}, {}))
                    saved = time.monotonic()
                if signal:
                    raise Stopped(
                        f"{signal} after {position + 1} of {len(batches)} batches, which are kept in {self.folder}: "
                        "the same command continues"
                    )
        self.tokens_per_batch = runner.tokens_per_batch
        return sums

    def _report(self, target: Path, seconds: float) -> None:
        grams, size = GramFile(target).grams.values(), target.stat().st_size / 1e9
        grams = [gram for gram in grams if gram.tokens and not gram.is_pool]
        covered = {module for gram in grams for module in gram.modules}
        say(self.process, f"{target}: {len(grams)} Grams of {len(covered)} layers, {size:.2f} GB, {seconds:.1f} s")
        if unseen := [name for name in self.layers if name not in covered]:
            say(
                self.process,
                f"no token reached {len(unseen)} layers, which a merge will average, but for experts that another "
                f"model's tokens reach: {', '.join(compact(unseen))}",
            )


def _assemble(parts: list[Path], target: Path, provenance: dict[str, Any]) -> Path:
    """Join the files of all passes into one Gram file."""
    if len(parts) == 1:
        return parts[0]
    join_files(target, [GramFile(part) for part in parts], provenance)
    return target


def _provenance(
    identity: dict[str, Any],
    checkpoint: Checkpoint,
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Calibration,
) -> dict[str, Any]:
    """Origin of the Grams, for their file."""
    is_chat, template = "text" not in source.columns, str(tokenizer.chat_template).encode()
    return {
        **checkpoint.origin(),
        "revision": checkpoint.revision(),
        "fingerprint": identity["fingerprint"],
        "dataset": source.dataset,
        "dataset_revision": source.revision,
        "split": source.split,
        "columns": source.columns,
        "chat_template_sha256": hashlib.sha256(template).hexdigest() if is_chat else None,
        "examples": len(calibration.examples),
        "tokens": calibration.tokens,
        "max_length": source.max_length,
        "dtype": identity["dtype"],
        "versions": {name: version(name) for name in ("torch", "transformers", "datasets")},
    }
