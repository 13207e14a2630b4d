import errno
import subprocess
from pathlib import Path

import pytest

from common import snapshots
from common.errors import InputError
from common.io import write_text


def save(root: Path, step: int) -> None:
    snapshots.save(root, step, lambda folder: write_text(folder / "state", f"of step {step}"))


def steps(root: Path) -> list[int]:
    return sorted(map(snapshots.step_of, root.iterdir()))


def test_the_last_two_are_kept_and_sha256sum_can_check_them(tmp_path: Path) -> None:
    root = tmp_path / "state"
    assert snapshots.newest(root, print) is None
    for step in (2, 9, 10):
        save(root, step)
    save(root, 10)
    assert steps(root) == [9, 10]
    folder = snapshots.newest(root, print)
    assert (folder / "state").read_text() == "of step 10"
    assert subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder).returncode == 0


@pytest.mark.parametrize("damage", ["flip", "cut", "extra", "no sums", "no file", "empty sums"])
def test_a_damaged_one_is_named_removed_and_passed_over(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    folder, warnings = tmp_path / "step_2", []
    if damage == "flip":
        (folder / "state").write_text("oF step 2")
    elif damage == "cut":
        (folder / "state").write_text("of step")
    elif damage == "extra":
        (folder / "more").write_text("")
    elif damage == "no file":
        (folder / "state").unlink()
    elif damage == "no sums":
        (folder / "SHA256SUMS").unlink()
    else:
        (folder / "SHA256SUMS").write_text("")
    assert snapshots.newest(tmp_path, warnings.append) == tmp_path / "step_1"
    assert len(warnings) == 1 and "step_2 is damaged" in warnings[0]
    save(tmp_path, 2)
    assert snapshots.newest(tmp_path, warnings.append) == tmp_path / "step_2" and len(warnings) == 1


def test_nothing_whole_is_an_error_that_removes_nothing(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
        (tmp_path / f"step_{step}/state").write_text("")
    with pytest.raises(InputError, match=r"step_2.*step_1: not as written.*--overwrite"):
        snapshots.newest(tmp_path, print)
    assert steps(tmp_path) == [1, 2]


def test_a_write_that_fails_leaves_the_earlier_ones(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        (folder / "state").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, 1)
    with pytest.raises(InputError, match=r"cannot write .*step_2: No space left on device"):
        snapshots.save(tmp_path, 2, full)
    assert steps(tmp_path) == [1]
