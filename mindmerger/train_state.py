"""Saved state of a run: counters, the mapping, its optimizer and schedule. Training draws no random numbers."""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import deepspeed
from safetensors.torch import load_file, save

from common import snapshots
from common.errors import InputError
from common.io import read_json, write_bytes, write_json
from common.logging import say
from common.ranks import Process
from mindmerger.zero import MappingState


@dataclass
class TrainState:
    """Counters of a run, saved beside the mapping and its optimizer.

    Attributes:
        best_perplexity: lowest perplexity on the dev rows so far.
        skipped, skipped_in_a_row: steps whose loss or gradient was not finite.
        metrics_size: bytes of the metrics file.
        step: optimizer steps taken.
    """

    best_perplexity: float = math.inf
    skipped: int = 0
    skipped_in_a_row: int = 0
    metrics_size: int = 0
    step: int = 0


@dataclass(frozen=True)
class SavedStates:
    """Saved states of one run, of which the last two are kept; every method is a collective of all ranks.

    Attributes:
        folder: folder of the states.
        engine: DeepSpeed's engine.
        mapping: values and optimizer state of the mapping.
        process: this rank.
        rows_sha256: hash of the training rows; see `Rows.fingerprint`.
    """

    folder: Path
    engine: deepspeed.DeepSpeedEngine
    mapping: MappingState
    process: Process
    rows_sha256: str

    def save(self, state: TrainState) -> None:
        """Save everything that the rest of the run depends on, unless this step is already saved."""
        tensors = self.mapping.tensors()
        record = asdict(state) | {
            "rows_sha256": self.rows_sha256,
            "optimizer_steps": self.mapping.steps,
            "schedule": self.engine.lr_scheduler.state_dict(),
        }

        def write(folder: Path) -> None:
            write_bytes(folder / "state.safetensors", save(tensors))
            write_json(folder / "state.json", record)

        if self.process.is_main:
            snapshots.save(self.folder, state.step, write)
        self.process.barrier()

    def load(self) -> TrainState:
        """Restore the last state, if there is one.

        Raises:
            InputError: all saved states are damaged, or the last one was saved with other training rows.
        """
        # Only rank 0 checks the states and removes damaged ones.
        warn = lambda text: say(self.process, text)  # noqa: E731
        found = snapshots.newest(self.folder, warn) if self.process.is_main else None
        found = self.process.gather(found)[0]
        if found is None:
            return TrainState()
        record, tensors = read_json(found / "state.json"), load_file(found / "state.safetensors")
        if record.get("rows_sha256", self.rows_sha256) != self.rows_sha256:  # older states have none
            raise InputError(
                f"{found} was saved with other token ids of the training rows, or other answers of the LLM (--replay): "
                "restore --cache_dir, --eval_batch_size and library versions of before, or --overwrite the run"
            )
        self.mapping.restore(tensors, record["optimizer_steps"])
        self.engine.lr_scheduler.load_state_dict(record["schedule"])
        for group, lr in zip(self.engine.optimizer.param_groups, self.engine.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
        known = {field.name for field in fields(TrainState)}
        return TrainState(
            **{name: value for name, value in record.items() if name in known} | {"step": snapshots.step_of(found)}
        )
