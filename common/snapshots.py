"""Snapshots that an interrupted run continues from: numbered folders with checksums, of which the last two are kept."""

import shutil
from collections.abc import Callable
from pathlib import Path

from common.errors import InputError
from common.io import atomic_folder, sha256, write_text

# In the form that `sha256sum --check` reads.
SUMS = "SHA256SUMS"
KEPT = 2
_PREFIX = "step_"


def save(root: Path, step: int, write: Callable[[Path], None]) -> None:
    """Keep what `write` puts into an empty folder as `root`'s snapshot of `step`, unless there is one already.

    It appears whole or not at all, and older ones are removed only after that.

    Raises:
        InputError: it cannot be written; the earlier ones are as they were.
    """
    target = root / f"{_PREFIX}{step}"
    if target.exists():
        return
    for killed in root.glob(".*.partial"):
        shutil.rmtree(killed)
    with atomic_folder(target) as partial:
        write(partial)
        write_text(partial / SUMS, "".join(f"{sha256(path)}  {path.name}\n" for path in sorted(partial.iterdir())))
    for folder in _snapshots(root)[KEPT:]:
        shutil.rmtree(folder)


def newest(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The last snapshot in `root` whose checksums hold, None where there is no snapshot at all.

    Args:
        root: as for `save`.
        warn: called with a message for each later one, which is damaged and is removed.

    Raises:
        InputError: there are snapshots, and all of them are damaged.
    """
    snapshots = _snapshots(root)
    for index, folder in enumerate(snapshots):
        if _is_whole(folder):
            for damaged in snapshots[:index]:
                warn(f"warning: {damaged} is damaged (see `sha256sum --check {SUMS}`): {folder} is taken instead")
                shutil.rmtree(damaged)
            return folder
    if snapshots:
        raise InputError(
            f"{', '.join(map(str, snapshots))}: not as written, by the checksums in {SUMS}, and there is no other to "
            "continue from: --overwrite starts anew"
        )
    return None


def step_of(snapshot: Path) -> int:
    """The step that a snapshot was saved under."""
    return int(snapshot.name.removeprefix(_PREFIX))


def _snapshots(root: Path) -> list[Path]:
    """Latest first."""
    found = [folder for folder in root.glob(f"{_PREFIX}*") if folder.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def _is_whole(folder: Path) -> bool:
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        files = sorted(path for path in folder.iterdir() if path.name != SUMS)
        return bool(files) and sums == {path.name: sha256(path) for path in files}
    except (OSError, ValueError):
        return False
