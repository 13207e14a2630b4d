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
from common.files import write_text


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
        done: steps that a continued run starts after; what an interrupted one wrote of later steps is dropped.
    """

    def __init__(self, process: Process, folder: Path, done: int = 0):
        self._file = self._board = None
        if process.is_main:
            # TensorBoard takes seconds to import, and only the rank that writes needs it.
            from torch.utils.tensorboard import SummaryWriter

            path = folder / "metrics.jsonl"
            kept = []
            if done and path.exists():
                # A last line without its end was being written when the run was killed.
                lines = [
                    line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"
                ]
                kept = [line for line in lines if json.loads(line)["step"] <= done]
            write_text(path, "".join(kept))
            self._file = path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)

    def write(self, step: int, **values: float) -> None:
        """Record `values` at optimizer step `step`."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush everything to disk."""
        if self._file is not None:
            self._file.close()
            self._board.close()
