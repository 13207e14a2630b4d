import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import InputError
from common.locks import locked
from tests.conftest import REPOSITORY

HOLD = """
import sys, time
from pathlib import Path
from common.locks import locked
with locked(Path("run")):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_does_not_outlive_a_killed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", HOLD], env=environment, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"run is in use by process {holder.pid} on "), locked(Path("run")):
            pass
        holder.kill()
    # After the wait for a process, the kernel has closed its files.
    with locked(Path("run")):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_written_to_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "run"):
        (tmp_path / "run").mkdir()
    assert capsys.readouterr().err.startswith("warning: no locks here: see that no other run writes to ")
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_a_lock_is_taken_again_and_leaves_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path / "outputs/run"):
            assert (tmp_path / "outputs/.run.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_many_at_once_are_never_two_in_the_same_folder(tmp_path: Path) -> None:
    """Mutual exclusion holds although locking, unlocking and removal of the lock's file race with each other."""
    words = f"""
import sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from common.errors import InputError
from common.locks import locked
end, held = time.monotonic() + 2, 0
while time.monotonic() < end:
    try:
        with locked(Path("run")):
            Path("inside").touch(exist_ok=False)
            Path("inside").unlink()
            held += 1
    except InputError:
        pass
assert held
"""
    racers = [subprocess.Popen([sys.executable, "-c", words], cwd=tmp_path) for _ in range(3)]
    started = time.monotonic()
    assert [racer.wait(timeout=60) for racer in racers] == [0, 0, 0], time.monotonic() - started
