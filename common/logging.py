"""What a run says: lines on the terminal, progress bars, metrics on disk."""

import json
import logging
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.distributed import Process
from common.files import writing


def quiet_libraries() -> None:
    """Keep the libraries' notes about their own inner workings off the terminal; their errors still come through."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")


def say(process: Process, message: str) -> None:
    """Print `message` once, above any progress bar."""
    if process.is_main:
        tqdm.write(message)


def progress(process: Process, iterable: Iterable | None = None, **options: Any) -> tqdm:
    """A progress bar, shown by one process only."""
    return tqdm(iterable, disable=not process.is_main, dynamic_ncols=True, smoothing=0.05, **options)


class Metrics:
    """Numbers of a run, as JSON lines in `metrics.jsonl` and as TensorBoard events in the same folder.

    Args:
        process: only the main one writes.
        folder: of the run.
        step: that a continued run starts after, 0 for a new one.
        size: of `metrics.jsonl` when that step was saved; what an interrupted run wrote later is dropped.
    """

    def __init__(self, process: Process, folder: Path, step: int = 0, size: int = 0):
        self._path = folder / "metrics.jsonl"
        self._file = self._board = None
        if process.is_main:
            # TensorBoard takes seconds to import, and only the rank that writes needs it.
            from torch.utils.tensorboard import SummaryWriter

            with writing(self._path):
                self._file = self._path.open("ab")
                self._file.truncate(min(size, self._file.tell()))
                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    @property
    def size(self) -> int:
        """Bytes of `metrics.jsonl` so far; 0 in the processes that do not write."""
        return self._file.tell() if self._file else 0

    def write(self, step: int, rows: list[str] | None = None, **values: float) -> None:
        """Record `values`, and the `rows` that they are about, at optimizer step `step`.

        Raises:
            InputError: the disk is full, or gone.
        """
        if self._file is None:
            return
        line = {"step": step, "time": round(time.time(), 3), **values, **({"rows": rows} if rows else {})}
        with writing(self._path):
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush everything to disk."""
        if self._file is not None:
            with writing(self._path):
                self._file.close()
                self._board.close()
