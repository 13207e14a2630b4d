"""Lines on the terminal, progress bars, and metrics on disk."""

import importlib
import json
import logging
import os
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from common.errors import InputError, first_line
from common.io import writing
from common.optional import require

if TYPE_CHECKING:
    from common.ranks import Process

ReportTo = Literal["tensorboard", "wandb", "trackio", "none"]
_OPTIONAL = ("wandb", "trackio")


def quiet_libraries() -> None:
    """Silence notes and progress bars of libraries, but not their errors."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")


def say(process: "Process", message: str) -> None:
    """Print `message` once, above any progress bar."""
    if process.is_main:
        tqdm.write(message)


def progress(process: "Process", iterable: Iterable | None = None, **options: Any) -> tqdm:
    """A progress bar, shown by one process only."""
    return tqdm(iterable, disable=not process.is_main, dynamic_ncols=True, smoothing=0.05, **options)


def require_board(report_to: ReportTo) -> None:
    """Raise InputError, with the command that installs it, unless the package that `--report_to` names is installed."""
    if report_to in _OPTIONAL:
        require(report_to, f"requirements-{report_to}.txt")


class Metrics:
    """Metrics of a run, as JSON lines in `metrics.jsonl` and on a dashboard.

    Args:
        process: this rank; only the main one writes.
        folder: of the run.
        step: the last step of a continued run, 0 for a new one.
        size: bytes of `metrics.jsonl` at that step; later lines, of an interrupted run, are dropped.
        report_to: the dashboard. TensorBoard's events are written to `folder`. A run of Weights & Biases or Trackio is
            named after the folder, its project after the parent folder, or by `WANDB_PROJECT` or `TRACKIO_PROJECT`.
        settings: of the run, for the dashboard.
    """

    def __init__(
        self,
        process: "Process",
        folder: Path,
        step: int = 0,
        size: int = 0,
        report_to: ReportTo = "tensorboard",
        settings: dict[str, Any] | None = None,
    ):
        self._path = folder / "metrics.jsonl"
        self._file = self._board = None
        if process.is_main:
            with writing(self._path):
                self._file = self._path.open("ab")
                self._file.seek(self._file.truncate(min(size, self._file.tell())))
                if report_to == "tensorboard":
                    self._board = _TensorBoard(folder / "tensorboard", step)
            if report_to in _OPTIONAL:
                self._board = _Tracker(report_to, folder, settings or {})

    @property
    def size(self) -> int:
        """Bytes of `metrics.jsonl` so far; 0 in the processes that do not write."""
        return self._file.tell() if self._file else 0

    def write(self, step: int, rows: list[str] | None = None, **values: float) -> None:
        """Record `values`, and the locations of their `rows`, at optimizer step `step`.

        Raises:
            InputError: the file cannot be written, as on a full disk.
        """
        if self._file is None:
            return
        line = {"step": step, "time": round(time.time(), 3), **values, **({"rows": rows} if rows else {})}
        with writing(self._path):
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            if self._board is not None:
                self._board.write(step, values)

    def close(self) -> None:
        """Flush everything to disk."""
        if self._file is not None:
            with writing(self._path):
                self._file.close()
                if self._board is not None:
                    self._board.close()


class _TensorBoard:
    def __init__(self, folder: Path, step: int):
        # Imported late: the import takes seconds, and only the main process writes.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        self.close = self._writer.close

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


class _Tracker:
    """Weights & Biases, and Trackio, which has the same interface."""

    def __init__(self, package: str, folder: Path, settings: dict[str, Any]):
        project = os.environ.get(f"{package.upper()}_PROJECT", folder.parent.name)
        # wandb writes files of its own; Trackio has one folder for all runs.
        where = {"dir": str(folder)} if package == "wandb" else {}
        tracker = importlib.import_module(package)
        try:
            tracker.init(project=project, name=folder.name, config=settings, **where)
        except Exception as error:  # each has its own errors: no account, no connection
            raise InputError(f"--report_to {package} did not start: {first_line(error)}") from error
        self.write = lambda step, values: tracker.log(values, step=step)
        self.close = tracker.finish
