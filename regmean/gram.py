"""Grams: what RegMean needs to know of a model's training data, one sum of x x^T per distinct layer input.

From the top: `compute_grams` loads texts and model, probes the model once to learn which layers share an input,
plans as many passes as memory asks for, and runs them; `GramSums` adds up the products of each layer's input.
"""

import contextlib
import hashlib
import mmap
import shutil
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from common import runs, snapshots
from common.errors import InputError
from common.io import read_json, write_json
from common.locks import locked
from common.logging import progress, quiet_libraries, say
from common.models import load_model, load_tokenizer
from common.onednn import use_onednn
from common.ranks import Process, available_memory, finish
from common.signals import Stopped, StopSignals
from regmean.calibration import Calibration, collate, load_calibration, make_batches
from regmean.config import GramFlags
from regmean.gram_file import FILE_NAME, Gram, GramFile, write_grams
from regmean.hooks import LinearInputs, aligned_with, input_width, linear_layers, untied_head
from regmean.model_folder import Checkpoint, open_checkpoint

SNAPSHOT_SECONDS = 600.0
SUMS_NAME = "sums.safetensors"
PLAN = "plan.json"
PANEL = 512  # rows of a sum that a batch is added to at a time
# Of the memory that is free beside the model, what the activations of a batch and fragmentation may take.
RESERVED = 0.1


def compute_grams(
    flags: GramFlags,
    process: Process,
    snapshot_seconds: float = SNAPSHOT_SECONDS,
    model: PreTrainedModel | None = None,
) -> None:
    """Compute the Grams of `flags.model` over its calibration texts and write `gram.safetensors`.

    A run that was cut short leaves `gram.partial/` in the output folder; the same command continues from there and
    ends with the same Gram.

    Args:
        flags: what to compute.
        process: this rank; every rank takes its share of the batches.
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
    calibration = load_calibration(flags, tokenizer)
    say(
        process,
        f"{len(calibration.examples):,} examples, {calibration.tokens:,} tokens; "
        f"{calibration.truncated:,} cut at {flags.max_length} tokens, {calibration.empty:,} empty",
    )
    with locked(target.parent) if process.is_main else contextlib.nullcontext():
        _compute_grams(flags, process, snapshot_seconds, target, checkpoint, tokenizer, calibration, model)


def _compute_grams(
    flags: GramFlags,
    process: Process,
    snapshot_seconds: float,
    target: Path,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Calibration,
    model: PreTrainedModel | None,
) -> None:
    options = {"dtype": flags.dtype, "trust_remote_code": flags.trust_remote_code}
    model = model or load_model(AutoModelForCausalLM, str(checkpoint.folder), needs_head=False, **options)
    model = model.to(process.device).eval()
    use_onednn(model)
    head = untied_head(model)
    # A base model's checkpoint has no head: the one here is random, and no merge has a use for its Gram.
    layers = {
        name: layer
        for name, layer in linear_layers(model).items()
        if layer is not head or f"{name}.weight" in checkpoint.tensors
    }
    if head is not None:
        # A forward pass ends before it, and that of Llama-3-8B takes as much as a layer's sums.
        head.to("meta")
    work = target.with_suffix(".partial")
    identity = {
        "model": flags.model,
        "fingerprint": checkpoint.fingerprint(),
        "examples": calibration.digest(),
        "tokens_per_batch": flags.batch_tokens(process.device.type),
        "dtype": str(model.dtype).removeprefix("torch."),
        "world_size": process.world_size,
    }
    runs.is_finished(work, identity, flags.overwrite)
    runs.start(work, identity, flags.overwrite, process)
    # The first rank decides for all; it is the one that keeps the run's files.
    plan = process.gather(_continued_plan(work) if process.is_main else None)[0]
    if plan is None:
        plan = _make_plan(model, layers, calibration, process)
        if process.is_main:
            write_json(work / PLAN, asdict(plan))
    run = _Run(model, layers, calibration, plan, identity["tokens_per_batch"], work, process, snapshot_seconds)
    provenance = _provenance(flags, identity, checkpoint, tokenizer, calibration)

    started = time.monotonic()
    parts = [work / f"pass{number}.safetensors" for number in range(len(plan.passes))]
    for number, part in enumerate(parts):
        if process.gather(part.exists())[0]:
            # Where an earlier run was killed between the two.
            run.forget_snapshots(number)
            continue
        sums = run.sums_of_pass(number)
        sums.add_ranks(process)
        if process.is_main:
            sums.write(part, layers, provenance)
        # The next pass is planned to fill the memory.
        del sums
        process.barrier()
        run.forget_snapshots(number)

    if process.is_main:
        _assemble(parts, target, provenance)
        shutil.rmtree(work)
        grams = GramFile(target).grams.values()
        covered = {module for gram in grams for module in gram.modules}
        size, seconds = target.stat().st_size / 1e9, time.monotonic() - started
        say(process, f"{target}: {len(grams)} Grams of {len(covered)} layers, {size:.2f} GB, {seconds:.1f} s")
        unseen = [name for name in layers if name not in covered]
        if unseen:
            say(process, f"no token reached {len(unseen)} layers, which a merge will average: {', '.join(unseen)}")
    process.barrier()


def zeros(width: int, device: torch.device) -> torch.Tensor:
    """A float32 (width, width) of zeros; on the CPU in pages of its own.

    In the C library's heap, between activations, the sums would keep it from using the activations' memory again.
    """
    if device.type == "cpu":
        return torch.frombuffer(mmap.mmap(-1, 4 * width**2), dtype=torch.float32).view(width, width)
    return torch.zeros(width, width, device=device)


def add_products(total: torch.Tensor, rows: torch.Tensor) -> None:
    """total += rows^T rows, below the diagonal and somewhat above it: half the work, and no product beside the sum.

    Args:
        total: float32 of shape (width, width); of what is above the diagonal nothing is to be read.
        rows: float of shape (tokens, width), on the same device.
    """
    step = PANEL
    if rows.device.type == "cpu":
        rows = rows.float()
        # The fewer, the less is computed above the diagonal; a CPU is as fast with 192, and with 512 of wide layers.
        step = min(PANEL, max(192, len(total) // 8))
    for start in range(0, len(total), step):
        panel, below = rows[:, start : start + step].T, rows[:, : start + step]
        part = total[start : start + step, : start + step]
        if rows.dtype == torch.float32:
            part.addmm_(panel, below)
        else:
            # Products of two half-precision numbers are exact in float32, and so is nearly their sum.
            part += torch.mm(panel, below, out_dtype=torch.float32)


class GramSums:
    """The running sums of one pass, each a float32 matrix of shape (width, width) beside the activations."""

    def __init__(self) -> None:
        self.totals: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.shared_name: dict[str, str] = {}

    def add(self, name: str, rows: torch.Tensor) -> None:
        """Add the products of `rows`, of shape (tokens, width) and any float dtype, to the sum called `name`."""
        if name not in self.totals:
            width = rows.shape[1]
            self.totals[name] = zeros(width, rows.device)
            self.tokens[name] = 0
        add_products(self.totals[name], rows)
        self.tokens[name] += rows.shape[0]

    def add_ranks(self, process: Process) -> None:
        """Add up the sums of all ranks; a rank whose tokens never reached a layer adds nothing to it."""
        sharing: dict[str, str] = {}
        for theirs in process.gather(self.shared_name):
            for module, name in theirs.items():
                if sharing.setdefault(module, name) != name:
                    raise InputError(f"layer {module} shares its input with other layers on one rank than on another")
        widths: dict[str, int] = {}
        for theirs in process.gather({name: len(total) for name, total in self.totals.items()}):
            widths |= theirs
        self.shared_name = sharing
        for name, width in widths.items():
            if name not in self.totals:
                self.totals[name] = zeros(width, process.device)
            process.sum_(self.totals[name])
        names = list(widths)
        counts = process.sum(*(self.tokens.get(name, 0) for name in names))
        self.tokens = {name: int(count) for name, count in zip(names, counts, strict=True)}

    def write(self, path: Path, layers: dict[str, nn.Module], provenance: dict[str, Any]) -> None:
        """Write the sums as a Gram file."""
        grams = [
            Gram(
                name,
                tuple(module for module, shared in self.shared_name.items() if shared == name),
                self.tokens[name],
                len(total),
                isinstance(layers[name], Conv1D),
            )
            for name, total in self.totals.items()
        ]
        write_grams(path, grams, lambda name: self.totals[name].cpu().numpy(), provenance)

    @classmethod
    def read(cls, path: Path, device: torch.device) -> Self:
        """The sums in a Gram file, to go on adding to."""
        file = GramFile(path)
        sums = cls()
        for gram in file.grams.values():
            sums.totals[gram.name] = torch.from_numpy(file.read(gram.name)).to(device)
            sums.tokens[gram.name] = gram.tokens
            sums.shared_name |= dict.fromkeys(gram.modules, gram.name)
        return sums


@dataclass(frozen=True)
class Plan:
    """How the work is cut: the layers of each pass over the texts, and whether batches may hold padding."""

    passes: list[list[str]]
    padding: bool


@dataclass(frozen=True)
class Probe:
    """What one example tells.

    Attributes:
        inputs: the layers that share an input, for each distinct input.
        padding: as in `Plan`.
        seconds: what a forward pass with its products takes.
    """

    inputs: list[list[str]]
    padding: bool
    seconds: float


def probe(model: PreTrainedModel, layers: dict[str, nn.Module], ids: list[int], device: torch.device) -> Probe:
    """Run one example to see which layers share an input, and whether every layer's rows are the example's tokens.

    Where they are not (an expert gets some of the tokens, in its own order), padding cannot be told from tokens
    inside the model, and batches must do without.
    """
    example, mask = (tensor.to(device) for tensor in collate([ids]))
    aligned: list[bool] = []

    def receive(name: str, x: torch.Tensor) -> None:
        aligned.append(aligned_with(x, mask))
        GramSums().add(name, x.reshape(-1, x.shape[-1]))

    with LinearInputs(layers, model.get_output_embeddings(), receive) as inputs:
        inputs.run(model, example, mask)  # the first pass also warms up; the second is timed
        finish(device)
        started = time.monotonic()
        inputs.run(model, example, mask)
        finish(device)
        seconds = time.monotonic() - started
    return Probe(inputs.groups(), all(aligned) and len(inputs.shared_name) == len(layers), seconds)


def plan_passes(inputs: list[list[str]], widths: list[int], memory: int) -> list[list[str]]:
    """Distribute layers over as few passes as memory allows, those that share an input together.

    Args:
        inputs: the layers of each distinct input, in the model's order.
        widths: features of each of these inputs.
        memory: bytes for the sums of one pass.

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


def _continued_plan(work: Path) -> Plan | None:
    return Plan(**read_json(work / PLAN)) if (work / PLAN).exists() else None


def _make_plan(
    model: PreTrainedModel, layers: dict[str, nn.Module], calibration: Calibration, process: Process
) -> Plan:
    longest = max(calibration.examples, key=len)
    probed = probe(model, layers, longest, process.device)
    widths = [input_width(layers[names[0]]) for names in probed.inputs]
    memory = int(min(process.gather(available_memory(process.device))) * (1 - RESERVED))
    plan = Plan(plan_passes(probed.inputs, widths, memory), probed.padding)
    minutes = probed.seconds / len(longest) * calibration.tokens * len(plan.passes) / process.world_size / 60
    sums = sum(4 * width**2 for width in widths)
    passes = "1 pass" if len(plan.passes) == 1 else f"{len(plan.passes)} passes"
    say(
        process,
        f"plan: {len(layers)} layers with {len(widths)} distinct inputs, {sums / 1e9:.2f} GB of sums where "
        f"{memory / 1e9:.1f} GB are free: {passes}, at most about {minutes:.1f} min"
        + ("" if plan.padding else "; only examples of equal length share a batch"),
    )
    return plan


@dataclass(frozen=True)
class _Run:
    """Everything that a pass over the texts needs."""

    model: PreTrainedModel
    layers: dict[str, nn.Module]
    calibration: Calibration
    plan: Plan
    tokens_per_batch: int
    work: Path
    process: Process
    snapshot_seconds: float

    def _snapshots(self, number: int) -> Path:
        return self.work / f"pass{number}-rank{self.process.rank}"

    def forget_snapshots(self, number: int) -> None:
        """Remove this rank's snapshots of pass `number`, whose sums are in a file of their own."""
        shutil.rmtree(self._snapshots(number), ignore_errors=True)

    def sums_of_pass(self, number: int) -> GramSums:
        """This rank's sums for the layers of pass `number`, from its snapshot on where there is one."""
        examples, process = self.calibration.examples, self.process
        lengths = [len(example) for example in examples]
        batches = make_batches(lengths, self.tokens_per_batch, self.plan.padding)[process.rank :: process.world_size]
        tokens = [sum(lengths[index] for index in batch) for batch in batches]
        root = self._snapshots(number)
        done, sums = 0, GramSums()
        if snapshot := snapshots.newest(root, tqdm.write):
            done, sums = snapshots.step_of(snapshot), GramSums.read(snapshot / SUMS_NAME, process.device)
            say(process, f"continuing after {done} of {len(batches)} batches")
        layers = {name: self.layers[name] for name in self.plan.passes[number]}
        row_sums: dict[str, torch.Tensor] = {}

        def receive(name: str, x: torch.Tensor) -> None:
            rows = x.reshape(-1, x.shape[-1])
            if len(kept) < mask.numel():
                if not aligned_with(x, mask):
                    raise InputError(f"layer {name} reads {tuple(x.shape)}, where padding cannot be told from tokens")
                rows = rows.index_select(0, kept)
            # A sum is finite where every term is; in float32, since half precision would overflow.
            row_sums[name] = rows.sum(dim=1, dtype=torch.float32)
            sums.add(name, rows)

        def save(done: int) -> None:
            snapshots.save(root, done, lambda folder: sums.write(folder / SUMS_NAME, layers, {}))

        # Where every layer reads every token, no forward pass calls other layers than the one before.
        inputs = LinearInputs(layers, self.model.get_output_embeddings(), receive, same_calls=self.plan.padding)
        # A continued pass knows already which layers share an input.
        inputs.shared_name = sums.shared_name
        saved = time.monotonic()
        bar = progress(
            process,
            total=sum(tokens),
            initial=sum(tokens[:done]),
            unit="tok",
            unit_scale=True,
            desc=f"pass {number + 1} of {len(self.plan.passes)}",
        )
        with inputs, bar, StopSignals() as signals:
            for position in range(done, len(batches)):
                ids, mask = (tensor.to(process.device) for tensor in collate([examples[i] for i in batches[position]]))
                kept = mask.flatten().nonzero().flatten()
                inputs.run(self.model, ids, mask)
                # One look for all layers: each makes a GPU's queue run empty.
                if row_sums and not torch.cat(list(row_sums.values())).isfinite().all():
                    raise InputError(self._not_finite(row_sums, mask, batches[position]))
                row_sums.clear()
                bar.update(tokens[position])
                if signals.received:
                    save(position + 1)
                    raise Stopped(
                        f"{signals.received} after {position + 1} of {len(batches)} batches, which are kept in "
                        f"{self.work}: the same command continues"
                    )
                if time.monotonic() - saved >= self.snapshot_seconds:
                    save(position + 1)
                    saved = time.monotonic()
        return sums

    def _not_finite(self, row_sums: dict[str, torch.Tensor], mask: torch.Tensor, batch: list[int]) -> str:
        """Which layer, in the order of the forward pass, first read NaN or infinity, and of which example."""
        name, rows = next((name, finite) for name, sums in row_sums.items() if not (finite := sums.isfinite()).all())
        owners = mask.nonzero()[:, 0]
        # An expert's rows are some of the batch's, in its own order: then any of the examples may be the one.
        suspects = owners[~rows].unique().tolist() if len(rows) == len(owners) else range(len(batch))
        examples = ", ".join(str(self.calibration.rows[batch[suspect]]) for suspect in suspects)
        return (
            f"the input of {name} is NaN or infinite in row(s) {examples} of the data set (from 0): mend or leave out "
            "these rows, or take a wider --dtype (bfloat16 or float32)"
        )


def _assemble(parts: list[Path], target: Path, provenance: dict[str, Any]) -> None:
    if len(parts) == 1:
        parts[0].replace(target)
        return
    files = [GramFile(part) for part in parts]
    source = {name: file for file in files for name in file.grams}

    def read(name: str) -> np.ndarray:
        return source[name].read(name)

    write_grams(target, (gram for file in files for gram in file.grams.values()), read, provenance)


def _provenance(
    flags: GramFlags,
    identity: dict[str, Any],
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Calibration,
) -> dict[str, Any]:
    template = None if flags.text_column else hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
    # A downloaded model lies in a folder named by its commit.
    downloaded = checkpoint.folder.parent.name == "snapshots"
    return {
        "model": flags.model,
        "revision": checkpoint.folder.name if downloaded else None,
        "fingerprint": identity["fingerprint"],
        "dataset": flags.dataset,
        "dataset_revision": flags.dataset_revision,
        "split": flags.split,
        "columns": {"text": flags.text_column} if flags.text_column else flags.roles(),
        "chat_template_sha256": template,
        "examples": len(calibration.examples),
        "tokens": calibration.tokens,
        "max_length": flags.max_length,
        "dtype": identity["dtype"],
        "versions": {name: version(name) for name in ("torch", "transformers", "datasets")},
    }
