"""What a stopped run continues from: counters, the mapping, its optimizer and schedule, random generators, on disk."""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import deepspeed
from safetensors.torch import load_file, save

from common import snapshots
from common.io import read_json, write_bytes, write_json
from common.logging import say
from common.ranks import Process
from mindmerger.zero import MappingState


@dataclass
class TrainState:
    """Where a run stands, beside the mapping and its optimizer.

    Attributes:
        best_perplexity: on the dev rows, so far.
        skipped, skipped_in_a_row: steps whose loss or gradient was not finite.
        metrics_size: bytes of the metrics written.
        step: optimizer steps done.
    """

    best_perplexity: float = math.inf
    skipped: int = 0
    skipped_in_a_row: int = 0
    metrics_size: int = 0
    step: int = 0


@dataclass(frozen=True)
class SavedStates:
    """The states of one run on disk, the last two of which are kept; every method is for all ranks together.

    Attributes:
        folder: of the states.
        engine: DeepSpeed's.
        mapping: values and optimizer state of what it trains.
        process: this rank.
    """

    folder: Path
    engine: deepspeed.DeepSpeedEngine
    mapping: MappingState
    process: Process

    def save(self, state: TrainState) -> None:
        """Keep all that the rest of the run depends on, unless that of this very step is kept already."""
        tensors = self.mapping.tensors()
        for rank, rng_state in enumerate(self.process.gather(self.process.rng_state())):
            tensors[f"rng.{rank}"] = rng_state
        record = asdict(state) | {
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
        """Continue from the last state, where there is one.

        Raises:
            InputError: there are states, and all of them are damaged.
        """
        # The first rank alone judges, and cleans up, before any other looks.
        warn = lambda text: say(self.process, text)  # noqa: E731
        found = snapshots.newest(self.folder, warn) if self.process.is_main else None
        found = self.process.gather(found)[0]
        if found is None:
            return TrainState()
        record, tensors = read_json(found / "state.json"), load_file(found / "state.safetensors")
        self.mapping.restore(tensors, record["optimizer_steps"])
        self.engine.lr_scheduler.load_state_dict(record["schedule"])
        for group, lr in zip(self.engine.optimizer.param_groups, self.engine.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
        self.process.set_rng_state(tensors[f"rng.{self.process.rank}"])
        known = {field.name for field in fields(TrainState)}
        return TrainState(
            **{name: value for name, value in record.items() if name in known} | {"step": snapshots.step_of(found)}
        )
