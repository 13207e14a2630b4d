"""A folder belongs to one run: the same settings continue it, others are refused."""

import shutil
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.io import read_json, write_json
from common.ranks import Process

RUN = "run.json"


def is_finished(folder: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether `folder` holds the run of these settings, finished.

    Args:
        folder: of outputs or results.
        settings: all that makes two runs the same run, as JSON values.
        overwrite: whether whatever it holds is to be replaced.

    Raises:
        InputError: it holds a run of other settings, and `overwrite` is off; the differences are listed.
    """
    if overwrite or not (folder / RUN).exists():
        return False
    run = read_json(folder / RUN)
    if not isinstance(run, dict) or not isinstance(run.get("settings"), dict):
        raise InputError(f"{folder / RUN} is not a record of a run: --overwrite the folder, or choose another")
    before = run["settings"]
    differences = [
        f"{key} was {before.get(key)!r}, now {settings.get(key)!r}"
        for key in sorted(settings.keys() | before.keys())
        if before.get(key) != settings.get(key)
    ]
    if differences:
        raise InputError(
            f"{folder} holds another run ({'; '.join(differences)}): choose another folder, or --overwrite it"
        )
    return "result" in run


def start(folder: Path, settings: dict[str, Any], overwrite: bool, process: Process) -> None:
    """Make `folder` this run's, or go on with it; with `overwrite`, empty it first.

    Raises:
        InputError: it cannot be written to.
    """
    process.barrier()
    if process.is_main:
        if overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / RUN, {"settings": settings})
    process.barrier()


def finish(folder: Path, settings: dict[str, Any], result: dict[str, Any]) -> None:
    """Record that the run in `folder` has ended well, and how."""
    write_json(folder / RUN, {"settings": settings, "result": result})
