from pathlib import Path

import pytest

from common.errors import InputError
from common.files import atomic_folder, atomic_path, read_json, write_json


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
