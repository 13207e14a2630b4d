"""A run's folder: continued with its settings, refused with others, emptied by --overwrite, used by one process."""

from pathlib import Path

import pytest
import torch

from common.errors import InputError
from common.io import read_json
from common.ranks import Process
from common.runs import RUN, open_run

MAIN, OTHER = (Process(rank, 2, torch.device("cpu")) for rank in (0, 1))
ALONE = Process(0, 1, torch.device("cpu"))
SETTINGS = {"lr": 0.1, "rows": "abc"}


def test_a_run_begins_is_continued_and_finishes(tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "run"
    with open_run(folder, SETTINGS, False, ALONE) as run:
        assert not run.is_finished and not folder.exists()
        run.start()
        (folder / "rows.txt").write_text("1")
    with open_run(folder, SETTINGS, False, ALONE) as run:
        assert not run.is_finished and run.result is None
        run.start()
        assert (folder / "rows.txt").read_text() == "1"
        run.finish({"steps": 3})
        assert run.is_finished
    assert read_json(folder / RUN) == {"settings": SETTINGS, "result": {"steps": 3}}
    with open_run(folder, SETTINGS, False, ALONE) as run:
        assert run.is_finished and run.result == {"steps": 3}


def test_other_settings_are_refused_with_every_difference(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", SETTINGS, False, ALONE) as run:
        run.start()
    message = r"run holds another run \(lr was 0\.1, now None; rows was 'abc', now 'd'; seed was None, now 1\)"
    with pytest.raises(InputError, match=message), open_run(tmp_path / "run", {"rows": "d", "seed": 1}, False, ALONE):
        pass
    assert read_json(tmp_path / "run" / RUN) == {"settings": SETTINGS}
    # The lock is released.
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_overwrite_empties_the_folder_when_the_run_starts(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", SETTINGS, False, ALONE) as run:
        run.start()
        (tmp_path / "run" / "rows.txt").write_text("1")
        run.finish({"steps": 3})
    with open_run(tmp_path / "run", {"lr": 1}, True, ALONE) as run:
        assert not run.is_finished and (tmp_path / "run/rows.txt").exists()
        run.start()
        assert [path.name for path in (tmp_path / "run").iterdir()] == [RUN]
    assert read_json(tmp_path / "run" / RUN) == {"settings": {"lr": 1}}


def test_a_folder_that_cannot_be_emptied_keeps_its_run(tmp_path: Path) -> None:
    """A link stands for all: it is no folder that can be removed."""
    with open_run(tmp_path / "elsewhere", SETTINGS, False, ALONE) as run:
        run.start()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with open_run(tmp_path / "run", {"lr": 1}, True, ALONE) as run, pytest.raises(InputError, match="cannot write"):
        run.start()
    assert read_json(tmp_path / "elsewhere" / RUN) == {"settings": SETTINGS}


@pytest.mark.parametrize("content", ["[]", "{}", '{"settings": 3}', "{"])
def test_what_is_no_record_of_a_run_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / RUN).write_text(content)
    with pytest.raises(InputError, match=r"run\.json"), open_run(tmp_path, SETTINGS, False, ALONE):
        pass


def test_the_first_rank_holds_the_folder_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    monkeypatch.setattr(Process, "gather", lambda _, value: [value, value])
    with (
        open_run(folder, SETTINGS, False, MAIN),
        open_run(folder, SETTINGS, False, OTHER),
        pytest.raises(InputError, match="run is in use by process"),
        open_run(folder, SETTINGS, False, ALONE),
    ):
        pass
    with open_run(folder, SETTINGS, False, ALONE):
        pass


@pytest.mark.parametrize("process", [MAIN, OTHER])
def test_ranks_with_other_settings_open_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: Process
) -> None:
    others = [SETTINGS, SETTINGS | {"rows": "d", "seed": 1}]
    monkeypatch.setattr(Process, "gather", lambda *_: [SETTINGS, *others])
    message = r"^rows, seed differ between rank 0 and rank 2: all machines need the same flags, data"
    with pytest.raises(InputError, match=message), open_run(tmp_path / "run", SETTINGS, True, process):
        pass
    assert not list(tmp_path.iterdir())
