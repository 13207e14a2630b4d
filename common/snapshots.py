"""Snapshots that an interrupted run continues from: numbered folders with checksums. The last two are kept."""

import shutil
from collections.abc import Callable
from pathlib import Path

from common.errors import InputError
from common.io import atomic_folder, sha256, write_text

# In the format of `sha256sum --check`.
SUMS = "SHA256SUMS"
KEPT = 2
_PREFIX = "step_"


def save(root: Path, step: int, write: Callable[[Path], None]) -> None:
    """Create the snapshot of `step` in `root`, filled by `write`, whole or not at all, unless it exists.

    Raises:
        InputError: it cannot be written; the earlier snapshots are unchanged.
    """
    target = root / f"{_PREFIX}{step}"
    if target.exists():
        return
    for killed in root.glob(".*.partial"):
        shutil.rmtree(killed)
    with atomic_folder(target) as partial:
        write(partial)
        write_text(partial / SUMS, _sums(partial))
    for folder in _snapshots(root)[KEPT:]:
        shutil.rmtree(folder)


def newest(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The last snapshot in `root` whose checksums hold; None where there is no snapshot.

    Damaged snapshots after it are removed, each with a warning by `warn`.

    Raises:
        InputError: there are snapshots, and all of them are damaged.
    """
    snapshots = _snapshots(root)
    whole = next(filter(_is_whole, snapshots), None)
    if snapshots and whole is None:
        raise InputError(
            f"{', '.join(map(str, snapshots))}: not as written, by the checksums in {SUMS}, and there is no other to "
            "continue from: --overwrite starts anew"
        )
    for damaged in snapshots[: snapshots.index(whole) if whole else 0]:
        warn(f"warning: {damaged} is damaged (see `sha256sum --check {SUMS}`): {whole} is taken instead")
        shutil.rmtree(damaged)
    return whole


def step_of(snapshot: Path) -> int:
    """The step that a snapshot was saved under."""
    return int(snapshot.name.removeprefix(_PREFIX))


def _snapshots(root: Path) -> list[Path]:
    """Snapshots in `root`, latest first."""
    found = [folder for folder in root.glob(f"{_PREFIX}*") if folder.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def _sums(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.name != SUMS)
    return "".join(f"{sha256(path)}  {path.name}\n" for path in files)


def _is_whole(folder: Path) -> bool:
    return (folder / SUMS).is_file() and (folder / SUMS).read_bytes() == _sums(folder).encode()
