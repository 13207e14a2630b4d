import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import InputError
from common.io import atomic_folder, atomic_path, partial_path, read_json, write_bytes, write_json


def test_a_file_keeps_its_old_content_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    write_json(path, {"accuracy": 1})
    with pytest.raises(RuntimeError), atomic_path(path) as partial:
        partial.write_text("half of it")
        raise RuntimeError
    assert read_json(path) == {"accuracy": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["scores.json"]


def test_a_folder_appears_only_when_complete(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "merged") as partial:
        (partial / "model.safetensors").write_text("half of it")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "merged") as partial:
        (partial / "config.json").write_text("{}")
    assert [file.name for file in (tmp_path / "merged").iterdir()] == ["config.json"]
    with pytest.raises(InputError, match="exists already"), atomic_folder(tmp_path / "merged"):
        pass


def test_what_a_killed_run_has_left_is_written_over(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "merged") as partial, atomic_path(tmp_path / "scores.json") as file:
        names = partial.name, file.name
        file.write_text("")
    (tmp_path / "merged").rename(tmp_path / names[0])
    (tmp_path / names[0] / "half.safetensors").touch()
    (tmp_path / "scores.json").rename(tmp_path / names[1])
    with atomic_folder(tmp_path / "merged"):
        write_json(tmp_path / "scores.json", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "scores.json"]
    assert list((tmp_path / "merged").iterdir()) == []


def test_what_cannot_be_removed_gets_into_no_new_folder(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/half.safetensors").touch()
    partial_path(tmp_path / "merged").symlink_to(tmp_path / "old")
    with pytest.raises(InputError, match="cannot write .*merged: "), atomic_folder(tmp_path / "merged"):
        pass
    assert not (tmp_path / "merged").exists() and (tmp_path / "old/half.safetensors").exists()


def test_read_json_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.json: no such file"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(InputError, match=r"a\.json: not readable as JSON"):
        read_json(tmp_path / "a.json")


def test_a_file_in_the_way_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("not a folder")
    with pytest.raises(InputError, match="cannot write"):
        write_json(tmp_path / "outputs" / "x.json", 1)


FULL = "No space left on device|File too large"


def test_a_full_disk_is_one_clear_error_and_the_earlier_file_stays(small_disk: Callable[[int, int], Path]) -> None:
    folder = small_disk(1 << 20, 1 << 20)
    write_json(folder / "scores.json", {"accuracy": 1})
    with pytest.raises(InputError, match=rf"cannot write .*scores\.json: ({FULL})"):
        write_bytes(folder / "scores.json", bytes(2 << 20))
    with (
        pytest.raises(InputError, match=rf"cannot write .*merged: ({FULL})"),
        atomic_folder(folder / "merged") as partial,
    ):
        (partial / "model.safetensors").write_bytes(bytes(2 << 20))
    assert read_json(folder / "scores.json") == {"accuracy": 1}
    assert [file.name for file in folder.iterdir()] == ["scores.json"]


def test_a_disk_that_takes_no_writes_is_named(small_disk: Callable[[int, int], Path]) -> None:
    folder = small_disk(1 << 20, 1 << 20)
    write_json(folder / "scores.json", {"accuracy": 1})
    if subprocess.run(["mount", "-o", "remount,ro", str(folder)], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    with pytest.raises(InputError, match=r"cannot write .*scores\.json: Read-only file system"):
        write_json(folder / "scores.json", {})
    with pytest.raises(InputError, match=r"cannot write .*merged: Read-only"), atomic_folder(folder / "merged"):
        pass
    assert read_json(folder / "scores.json") == {"accuracy": 1}


def test_what_may_not_be_written_or_is_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "scores.json").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*scores\.json: Is a directory"):
        write_json(tmp_path / "scores.json", 1)
    assert [file.name for file in tmp_path.iterdir()] == ["scores.json"]
    if os.geteuid() == 0:
        # root has all permissions, so another user is set temporarily.
        os.seteuid(65534)
    else:
        tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match=r"cannot write .*new\.json: Permission denied"):
            write_json(tmp_path / "new.json", 1)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        else:
            tmp_path.chmod(0o700)
