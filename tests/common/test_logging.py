import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from common.cli import parse_flags
from common.errors import InputError
from common.logging import Metrics, require_board
from common.ranks import Process, start_process
from mindmerger.config import TrainingFlags


@pytest.fixture(scope="module")
def process() -> Process:
    return start_process("cpu")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_two(process: Process, folder: Path, **options: object) -> list[dict]:
    folder.mkdir(parents=True)
    metrics = Metrics(process, folder, **options)
    metrics.write(1, loss=2.5, lr=0.1)
    metrics.write(2, ["row"], loss=2.0)
    metrics.close()
    return [{name: value for name, value in line.items() if name != "time"} for line in lines(folder)]


WRITTEN = [{"step": 1, "loss": 2.5, "lr": 0.1}, {"step": 2, "loss": 2.0, "rows": ["row"]}]


def test_tensorboard_is_the_default(process: Process, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert write_two(process, tmp_path / "run") == WRITTEN
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 2.5), (2, 2.0)]


def test_none_leaves_the_file_alone(process: Process, tmp_path: Path) -> None:
    assert write_two(process, tmp_path / "run", report_to="none") == WRITTEN
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_the_size_is_that_of_the_lines_that_are_kept(process: Process, tmp_path: Path) -> None:
    write_two(process, tmp_path / "run", report_to="none")
    first = len((tmp_path / "run/metrics.jsonl").read_bytes().splitlines(keepends=True)[0])
    metrics = Metrics(process, tmp_path / "run", 1, first, report_to="none")
    assert metrics.size == first == (tmp_path / "run/metrics.jsonl").stat().st_size
    metrics.write(2, loss=1.5)
    assert metrics.size == (tmp_path / "run/metrics.jsonl").stat().st_size
    assert [line["loss"] for line in lines(tmp_path / "run")] == [2.5, 1.5]


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_trackers_get_what_the_file_gets(
    package: str, process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple] = []
    stand_in = ModuleType(package)
    stand_in.init = lambda **options: calls.append(("init", options))
    stand_in.log = lambda values, step: calls.append(("log", step, values))
    stand_in.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, package, stand_in)
    folder = tmp_path / "MergeMinds" / "mapping"
    assert write_two(process, folder, report_to=package, settings={"lr": 0.1}) == WRITTEN
    name, options = calls.pop(0)
    assert (name, options["project"], options["name"], options["config"]) == (
        "init",
        "MergeMinds",
        "mapping",
        {"lr": 0.1},
    )
    assert calls == [("log", 1, {"loss": 2.5, "lr": 0.1}), ("log", 2, {"loss": 2.0}), ("finish",)]

    def refuse(**_: object) -> None:
        raise RuntimeError("api_key not configured\nand a page of advice")

    monkeypatch.setenv(f"{package.upper()}_PROJECT", "mine")
    stand_in.init = refuse
    with pytest.raises(InputError, match=f"--report_to {package} did not start: api_key not configured$"):
        Metrics(process, folder, report_to=package)
    stand_in.init = lambda **options: calls.append(options["project"])
    Metrics(process, folder, report_to=package)
    assert calls[-1] == "mine"


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_the_real_packages_take_it(
    package: str, process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(package, reason=f"pip install -r requirements-{package}.txt")
    assert write_two(process, tmp_path / "MergeMinds" / "mapping", report_to=package) == WRITTEN
    kept = tmp_path / ("trackio" if package == "trackio" else "MergeMinds/mapping/wandb")
    assert any(path.suffix in (".db", ".wandb") for path in kept.rglob("*"))


def test_a_missing_package_is_told_with_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.optional.find_spec", lambda name: None)
    words = ["--llm_path", "L", "--mt_path", "M", "--report_to"]
    with pytest.raises(InputError, match="wandb is not installed: pip install -r requirements-wandb.txt"):
        parse_flags(TrainingFlags, [*words, "wandb"])
    require_board("tensorboard")
    require_board("none")
    with pytest.raises(InputError, match="tensorboard.*wandb.*trackio.*none"):
        parse_flags(TrainingFlags, [*words, "mlflow"])
