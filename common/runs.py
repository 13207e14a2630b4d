"""Folders of runs: locked during a run, continued with the same settings, refused for other settings."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import InputError
from common.io import read_json, write_json, writing
from common.locks import locked

if TYPE_CHECKING:
    from common.ranks import Process

RUN = "run.json"


@dataclass
class RunFolder:
    """Folder of one run, returned by `open_run`.

    Attributes:
        folder, settings, overwrite, process: arguments of `open_run`.
        result: the argument of `finish`; None while the run is not finished.
    """

    folder: Path
    settings: dict[str, Any]
    overwrite: bool
    process: "Process"
    result: dict[str, Any] | None = field(init=False)

    def __post_init__(self) -> None:
        self.result = None if self.overwrite else self._recorded_result()

    @property
    def is_finished(self) -> bool:
        """True if the folder holds this run, finished."""
        return self.result is not None

    def start(self) -> None:
        """Record the settings in the folder; with `overwrite`, empty it first.

        Called by all ranks, after every check and before anything else is written.

        Raises:
            InputError: the folder cannot be emptied or written.
        """
        self.process.barrier()
        if self.process.is_main:
            if self.overwrite and self.folder.exists():
                with writing(self.folder):
                    shutil.rmtree(self.folder)
            write_json(self.folder / RUN, {"settings": self.settings})
        self.process.barrier()

    def finish(self, result: dict[str, Any]) -> None:
        """Record that the run has ended, and its result. Called by the first rank, as the last write."""
        write_json(self.folder / RUN, {"settings": self.settings, "result": result})
        self.result = result

    def _recorded_result(self) -> dict[str, Any] | None:
        path = self.folder / RUN
        if not path.exists():
            return None
        run = read_json(path)
        if not isinstance(run, dict) or not isinstance(run.get("settings"), dict):
            raise InputError(f"{path} is not a record of a run: --overwrite the folder, or choose another")
        before, now = run["settings"], self.settings
        differences = [
            f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
            for key in sorted(now.keys() | before.keys())
            if before.get(key) != now.get(key)
        ]
        if differences:
            raise InputError(
                f"{self.folder} holds another run ({'; '.join(differences)}): choose another folder, or --overwrite it"
            )
        return run.get("result")


@contextlib.contextmanager
def open_run(folder: Path, settings: dict[str, Any], overwrite: bool, process: "Process") -> Iterator[RunFolder]:
    """Open `folder` for a run with these settings; the first rank locks it until the block ends.

    Args:
        folder: of outputs or results; need not exist.
        settings: JSON values; two runs are the same run if these are equal.
        overwrite: True to replace the content of the folder.
        process: this rank.

    Raises:
        InputError: another process has locked the folder; or it holds a run of other settings (the differences are
            listed), and `overwrite` is off; or the ranks have different settings.
    """
    process.check_same(settings)
    with locked(folder) if process.is_main else contextlib.nullcontext():
        yield RunFolder(folder, settings, overwrite, process)
