"""Grams of one model: what RegMean needs of its training data, one sum of x x^T per distinct layer input.

From the top: `compute_grams` loads texts and model, probes the model once to learn which layers share an input,
plans as many passes as memory requires, and runs them; the sums themselves are in gram.py.
"""

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from common import snapshots
from common.errors import InputError, Stopped
from common.io import read_json, write_json
from common.logging import progress, quiet_libraries, say
from common.models import load_model, load_tokenizer
from common.onednn import use_onednn
from common.ranks import Process, available_memory, synchronize
from common.runs import open_run
from common.signals import StopSignals
from regmean.calibration import Calibration, collate, load_calibration, make_batches
from regmean.config import GramFlags, TextSource
from regmean.gram import GramSums
from regmean.gram_file import FILE_NAME, GramFile, write_grams
from regmean.hooks import LinearInputs, input_width, linear_layers, untied_head
from regmean.model_folder import Checkpoint, open_checkpoint

SNAPSHOT_SECONDS = 600.0
SUMS_NAME = "sums.safetensors"
PLAN = "plan.json"
# Of the memory that is free beside the model, what the activations of a batch and fragmentation may take.
RESERVED = 0.1


def compute_grams(
    flags: GramFlags, process: Process, snapshot_seconds: float = SNAPSHOT_SECONDS, model: PreTrainedModel | None = None
) -> None:
    """Compute the Grams of `flags.model` over its calibration texts and write `gram.safetensors`.

    A run that was cut short leaves `gram.partial/` in the output folder; the same command continues from there and
    ends with the same Gram.

    Args:
        process: this rank; every rank takes its shard of the batches.
        snapshot_seconds: the time between two snapshots.
        model: that of `flags.model`, where it is loaded already; it loses its output head.

    Raises:
        InputError: bad flags, model or data; a Gram that fits no memory; activations that are not finite.
        Stopped: by a signal; a snapshot of all that was done is on disk.
    """
    target = Path(flags.output_dir) / FILE_NAME
    if target.exists() and not flags.overwrite:
        raise InputError(f"{target} exists already: --overwrite it, or choose another --output_dir")
    checkpoint = open_checkpoint(flags.model, flags.revision)
    quiet_libraries()
    tokenizer = load_tokenizer(str(checkpoint.folder), trust_remote_code=flags.trust_remote_code)
    calibration = load_calibration(flags.texts(), tokenizer)
    counts = f"{len(calibration.examples):,} examples, {calibration.tokens:,} tokens"
    say(process, f"{counts}; {calibration.truncated:,} cut at {flags.max_length} tokens, {calibration.empty:,} empty")
    options = {"dtype": flags.dtype, "trust_remote_code": flags.trust_remote_code}
    model = model or load_model(AutoModelForCausalLM, str(checkpoint.folder), needs_head=False, **options)
    tokens_per_batch = flags.batch_tokens(process.device.type)
    identity = {
        "model": checkpoint.name,
        "fingerprint": checkpoint.fingerprint(),
        "examples": hashlib.sha256(json.dumps(calibration.examples).encode()).hexdigest(),
        "tokens_per_batch": tokens_per_batch,
        "dtype": str(model.dtype).removeprefix("torch."),
        "world_size": process.world_size,
    }
    provenance = _provenance(identity, checkpoint, flags.texts(), tokenizer, calibration)
    with open_run(target.with_suffix(".partial"), identity, flags.overwrite, process) as run:
        run.start()
        layers = _prepare(model, checkpoint, process.device)
        passes = _Passes(model, layers, calibration, tokens_per_batch, run.folder, process, snapshot_seconds)
        passes.run(target, provenance)


def _prepare(model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device) -> dict[str, nn.Module]:
    """Put the model on `device`, without an output head of its own; gives the layers that have a Gram, by name."""
    model.to(device).eval()
    use_onednn(model)
    head = untied_head(model)
    # A base model's checkpoint has no head: the one here is random, and no merge has a use for its Gram.
    layers = linear_layers(model)
    for name in [
        name for name, layer in layers.items() if layer is head and f"{name}.weight" not in checkpoint.tensors
    ]:
        del layers[name]
    if head is not None:
        # A forward pass ends before it, and that of Llama-3-8B takes as much as a layer's sums.
        head.to("meta")
    return layers


@dataclass(frozen=True)
class Plan:
    """How the work is cut: the layers of each pass over the texts, and whether batches may hold padding."""

    passes: list[list[str]]
    padding: bool


class Probe(NamedTuple):
    """What one example tells: the layers of each distinct input, `Plan`'s padding, and the seconds that it takes."""

    inputs: list[list[str]]
    padding: bool
    seconds: float


def probe(model: PreTrainedModel, layers: dict[str, nn.Module], ids: list[int], device: torch.device) -> Probe:
    """Run one example to see which layers share an input, and whether every layer's rows are the example's tokens.

    Where they are not (an expert gets some of the tokens, in its own order), padding cannot be told from tokens
    inside the model, and batches must do without.
    """
    example, mask = (tensor.to(device) for tensor in collate([ids]))
    head = model.get_output_embeddings()
    with LinearInputs(layers, head, lambda name, rows: GramSums().add(name, rows)) as inputs:
        inputs.run(model, example, mask)  # the first pass also warms up; the second is timed
        synchronize(device)
        started = time.monotonic()
        inputs.run(model, example, mask)
        synchronize(device)
        seconds = time.monotonic() - started
    return Probe(inputs.groups(), inputs.aligned and len(inputs.shared_name) == len(layers), seconds)


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
            f"and {memory / 1e9:.1f} GB are free; take a larger --device or a narrower --dtype"
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


@dataclass(frozen=True)
class _Passes:
    """All passes of a run over its texts; `folder` holds what an interrupted one continues from."""

    model: PreTrainedModel
    layers: dict[str, nn.Module]
    calibration: Calibration
    tokens_per_batch: int
    folder: Path
    process: Process
    snapshot_seconds: float

    def run(self, target: Path, provenance: dict[str, Any]) -> None:
        """Do what is left to do, write the Grams to `target`, and remove the folder."""
        process, plan = self.process, self._agreed_plan()
        started = time.monotonic()
        parts = [self.folder / f"pass{number}.safetensors" for number in range(len(plan.passes))]
        for number, part in enumerate(parts):
            if not process.gather(part.exists())[0]:
                sums = self._sums_of_pass(number, plan)
                sums.add_ranks(process)
                if process.is_main:
                    sums.write(part, self.layers, provenance)
                # The next pass is planned to fill the memory.
                del sums
                process.barrier()
            # Also where an earlier run was killed before it came to this.
            shutil.rmtree(self._snapshots(number), ignore_errors=True)
        if process.is_main:
            _assemble(parts, self.folder / FILE_NAME, provenance).replace(target)
            shutil.rmtree(self.folder)
            self._report(target, time.monotonic() - started)
        process.barrier()

    def _agreed_plan(self) -> Plan:
        """The plan that an interrupted run began with, else a new one; the first rank decides, and keeps it."""
        path = self.folder / PLAN
        known = Plan(**read_json(path)) if self.process.is_main and path.exists() else None
        if plan := self.process.gather(known)[0]:
            return plan
        longest = max(self.calibration.examples, key=len)
        inputs, padding, seconds = probe(self.model, self.layers, longest, self.process.device)
        widths = [input_width(self.layers[names[0]]) for names in inputs]
        memory = int(min(self.process.gather(available_memory(self.process.device))) * (1 - RESERVED))
        plan = Plan(plan_passes(inputs, widths, memory), padding)
        if self.process.is_main:
            write_json(path, asdict(plan))
        runs, sums = len(plan.passes), sum(4 * width**2 for width in widths)
        minutes = seconds / len(longest) * self.calibration.tokens * runs / self.process.world_size / 60
        found = f"{len(self.layers)} layers with {len(widths)} distinct inputs, {sums / 1e9:.2f} GB of sums"
        passes = "1 pass" if runs == 1 else f"{runs} passes"
        alike = "" if padding else "; only examples of equal length share a batch"
        free = f"where {memory / 1e9:.1f} GB are free"
        say(self.process, f"plan: {found} {free}: {passes}, at most about {minutes:.1f} min{alike}")
        return plan

    def _snapshots(self, number: int) -> Path:
        """This rank's snapshots of pass `number`."""
        return self.folder / f"pass{number}-rank{self.process.rank}"

    def _sums_of_pass(self, number: int, plan: Plan) -> GramSums:
        """This rank's sums for the layers of pass `number`, from its snapshot on where there is one."""
        lengths, process = [len(example) for example in self.calibration.examples], self.process
        batches = make_batches(lengths, self.tokens_per_batch, plan.padding)[process.rank :: process.world_size]
        root, done, sums = self._snapshots(number), 0, GramSums()
        if snapshot := snapshots.newest(root, tqdm.write):
            done, sums = snapshots.step_of(snapshot), GramSums.read(snapshot / SUMS_NAME, process.device)
            say(process, f"continuing after {done} of {len(batches)} batches")
        row_sums: dict[str, torch.Tensor] = {}

        def receive(name: str, rows: torch.Tensor) -> None:
            # A sum is finite where every term is; in float32, since half precision would overflow.
            row_sums[name] = rows.sum(dim=1, dtype=torch.float32)
            sums.add(name, rows)

        layers = {name: self.layers[name] for name in plan.passes[number]}
        # Where every layer reads every token, no forward pass calls other layers than the one before.
        inputs = LinearInputs(layers, self.model.get_output_embeddings(), receive, plan.padding, sums.shared_name)
        tokens = [sum(lengths[index] for index in batch) for batch in batches]
        title, counts = f"pass {number + 1} of {len(plan.passes)}", (sum(tokens), sum(tokens[:done]))
        bar = progress(process, total=counts[0], initial=counts[1], unit="tok", unit_scale=True, desc=title)
        saved = time.monotonic()
        with inputs, bar, StopSignals() as signals:
            for position in range(done, len(batches)):
                self._run_batch(batches[position], inputs, row_sums)
                bar.update(tokens[position])
                signal = signals.received
                if signal or time.monotonic() - saved >= self.snapshot_seconds:
                    snapshots.save(root, position + 1, lambda to: sums.write(to / SUMS_NAME, self.layers, {}))
                    saved = time.monotonic()
                if signal:
                    raise Stopped(
                        f"{signal} after {position + 1} of {len(batches)} batches, which are kept in {self.folder}: "
                        "the same command continues"
                    )
        return sums

    def _run_batch(self, batch: list[int], inputs: LinearInputs, row_sums: dict[str, torch.Tensor]) -> None:
        """Run the examples of these indices; `row_sums` gets the sum of each row that a layer reads.

        Raises:
            InputError: a layer, the first of the forward pass is named, read NaN or infinity.
        """
        ids, mask = collate([self.calibration.examples[index] for index in batch])
        owners, real = mask.nonzero()[:, 0], mask.flatten().nonzero().flatten()
        device = self.process.device
        row_sums.clear()
        inputs.run(self.model, ids.to(device), mask.to(device), real.to(device) if len(real) < mask.numel() else None)
        # One look for all layers: each makes a GPU's queue run empty.
        if not row_sums or torch.cat(list(row_sums.values())).isfinite().all():
            return
        layer, rows = next((name, finite) for name, sums in row_sums.items() if not (finite := sums.isfinite()).all())
        # An expert's rows are some of the batch's, in its own order: then any of the examples may be the one.
        suspects = owners[~rows.cpu()].unique().tolist() if len(rows) == len(owners) else range(len(batch))
        examples = ", ".join(str(self.calibration.rows[batch[suspect]]) for suspect in suspects)
        raise InputError(
            f"the input of {layer} is NaN or infinite in row(s) {examples} of the data set (from 0): mend or leave out "
            "these rows, or take a wider --dtype (bfloat16 or float32)"
        )

    def _report(self, target: Path, seconds: float) -> None:
        grams, size = GramFile(target).grams.values(), target.stat().st_size / 1e9
        covered = {module for gram in grams for module in gram.modules}
        say(self.process, f"{target}: {len(grams)} Grams of {len(covered)} layers, {size:.2f} GB, {seconds:.1f} s")
        if unseen := [name for name in self.layers if name not in covered]:
            say(self.process, f"no token reached {len(unseen)} layers, which a merge will average: {', '.join(unseen)}")


def _assemble(parts: list[Path], target: Path, provenance: dict[str, Any]) -> Path:
    """One Gram file of all passes' files."""
    if len(parts) == 1:
        return parts[0]
    files = [GramFile(part) for part in parts]
    source = {name: file for file in files for name in file.grams}
    grams = [gram for file in files for gram in file.grams.values()]
    write_grams(target, grams, lambda name: source[name].read(name), provenance)
    return target


def _provenance(
    identity: dict[str, Any],
    checkpoint: Checkpoint,
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Calibration,
) -> dict[str, Any]:
    """Where the Grams come from, for their file."""
    is_chat, template = "text" not in source.columns, str(tokenizer.chat_template).encode()
    # A downloaded model lies in a folder named by its commit.
    is_downloaded = checkpoint.folder.parent.name == "snapshots"
    return {
        "model": checkpoint.name,
        "revision": checkpoint.folder.name if is_downloaded else None,
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
