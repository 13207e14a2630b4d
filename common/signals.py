"""Signals that stop a run so that it can be continued."""

import signal
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Context manager that only records SIGTERM and SIGUSR1 (which Slurm sends before the time limit).

    Attributes:
        received: name of the last signal received, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
