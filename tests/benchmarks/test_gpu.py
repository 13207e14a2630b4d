"""The checks for a GPU, run on a CPU at tiny shapes; and their GPU parts with substitutes."""

import json
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import equality, measure
from benchmarks.gpu.__main__ import line_of, table
from benchmarks.gpu.measure import Bench, LeftOut, adapt_to_older_torch
from benchmarks.gpu.speed import training
from common.ranks import Process
from mindmerger import packing
from mindmerger.config import ModelFlags, TrainingFlags
from tests.conftest import REPOSITORY
from tools.estimate import weight_bytes
from tools.estimate_mindmerger import model_on_meta


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, as in a dry run: at such sizes several are slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bench(folder: Path, device: str = "cpu") -> Bench:
    return Bench(Process(0, 1, torch.device(device)), True, folder)


def test_all_checks_run_small_on_a_cpu() -> None:
    words = [sys.executable, "-m", "benchmarks.gpu", "--small", "--device", "cpu"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines, rows = ([line for line in done.stdout.splitlines() if line.startswith(start)] for start in ("{", "|"))
    checks = {line["check"]: line for line in map(json.loads, lines)}
    assert checks.pop("deepspeed_runs")["result"] == "left out"
    assert checks.pop("setup")["torch"] == torch.__version__
    assert {name: line["result"] for name, line in checks.items() if line["kind"] == "equality"} == dict.fromkeys(
        (check.__name__ for check in equality.EQUALITY), "passed"
    )
    speed = {name: line for name, line in checks.items() if line["kind"] == "speed"}
    assert list(speed) == ["rates", "gram_batch", "merge_layer", "host_work", "training", "decoding"]
    assert {line["result"] for line in speed.values()} == {"measured"}
    for name in ("gram_batch", "training"):
        for row in speed[name]["rows"]:
            # The estimate for very small shapes.
            assert "peak_GB" not in row or row["peak_GB"] == pytest.approx(row["planned_GB"], rel=0.25)
    assert [sum(row["waits"].values()) for row in speed["training"]["rows"]] == [0, 0]
    # The published way's peak is measured, not planned.
    mixed = speed["decoding"]["rows"][-1]
    assert mixed.keys() == {"what", "peak_GB", "published_GB"} and "| published_GB |" in rows[0]
    assert len(rows) == 3 + sum(len(line.get("rows", [0])) for line in checks.values())
    for private in (str(REPOSITORY), tempfile.gettempdir(), socket.gethostname()):
        assert private not in done.stdout


def unequal(_: Bench) -> list[dict]:
    return [equality.row("right", 0.0, 1e-5), equality.row("wrong", float("nan"), 1e-5)]


def broken(bench: Bench) -> list[dict]:
    raise RuntimeError(f"{bench.folder}/x and {REPOSITORY}/y\nsecond line")


def absent(_: Bench) -> list[dict]:
    raise LeftOut("not installed")


def test_what_fails_or_lacks_time_is_named(tmp_path: Path) -> None:
    here = bench(tmp_path)
    lines = [line_of(check, here, 5, left) for check, left in ((unequal, 9), (broken, 9), (absent, 9), (absent, 4))]
    assert [line["result"] for line in lines] == ["failed", "failed", "left out", "left out"]
    assert lines[1]["reason"] == "RuntimeError: x and y"
    assert "4 s are left" in lines[3]["reason"]
    assert [row.split(" | ")[:3] for row in table(lines).splitlines()[2:5]] == [
        ["| unequal", "failed", "right"],
        ["| unequal", "failed", "wrong"],
        ["| broken", "failed", "RuntimeError: x and y"],
    ]


def test_a_gpus_waits_and_peak_are_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes, allocated = [], iter([100])
    for name, stand_in in {
        "set_sync_debug_mode": modes.append,
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: next(allocated),
        "max_memory_allocated": lambda device: 350,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    there = bench(tmp_path, "cuda:0")
    with there.waits() as waits:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert modes == ["warn", "default"]
    assert list(waits.values()) == [3] and next(iter(waits)).startswith("test_gpu.py:")
    assert there.peak_of(lambda: None) == 250


def test_as_many_layers_as_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of Llama-3-8B takes 0.44 GB in bfloat16, and its sums 4 (3 x 4096^2 + 14336^2) = 1.02 GB; beside these
    are embedding and head, 2.1 GB, the head's sum, 0.07 GB, and about 1 GB of activations.
    """
    for memory, layers in ((140e9, 32), (24.8e9, 12)):
        here = bench(tmp_path)
        here.small = False
        device = measure.Device("", "cuda", 1, memory, 1.0, 1.0, 1.0, "")
        monkeypatch.setattr(measure, "find_device", lambda *_, device=device: device)
        assert here.planned_llm.config.num_hidden_layers == layers
        assert layers * 1.46e9 + 3.2e9 < measure.ROOM * memory
    assert measure.ROOM * 24.8e9 < 16 * 1.46e9 + 3.2e9


def test_micro_batches_are_halved_until_they_fit(tmp_path: Path) -> None:
    here = bench(tmp_path)
    here.roofline = measure.Device("", "cpu", 1, 1e12, 1.0, 1.0, 1.0, "")
    whole = training(here)[0]
    assert whole["what"] == "mapping stage, micro batch of 2"
    names = ModelFlags(llm_path=here.planned_llm.name_or_path, mt_path=str(here.mt))
    weights = weight_bytes(here.llm, model_on_meta(names, measure.HALF).encoder)
    for part, what in ((0.99, "mapping stage, micro batch of 1"), (0.1, "a row at the limits takes")):
        memory = (weights + part * 1e9 * whole["planned_GB"]) / measure.ROOM
        here.roofline = replace(here.roofline, memory=memory)
        line = line_of(training, here, 0, 1)
        assert what in json.dumps(line)


def test_an_older_torch_is_told_nothing_of_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not adapt_to_older_torch()
    monkeypatch.setattr(packing, "varlen_attn", lambda query, *, scale=None: (query, scale))
    assert adapt_to_older_torch()
    assert packing.varlen_attn(1, scale=2, enable_gqa=True) == (1, 2)


def test_training_is_run_in_three_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def child(words: list[str], folder: Path = REPOSITORY, **_: str) -> str:
        if words[0] == "-c":
            return ""
        flags = dict(zip(words[1::2], words[2::2], strict=False))
        commands.append(words)
        metrics = folder / "outputs" / words[-1] / "mapping/metrics.jsonl"
        metrics.parent.mkdir(parents=True)
        metrics.write_text('{"dev_perplexity": 9.0}\n{"loss": 1.0}\n{"dev_perplexity": 8.0}\n')
        assert flags["--llm_path"] == "llama"
        return ""

    monkeypatch.setattr(equality, "child", child)
    here = bench(tmp_path)
    here.small = False
    rows = equality.deepspeed_runs(here)
    assert [row["difference"] for row in rows] == [pytest.approx(8 / 9)] * 3 + [0.0]
    assert not any(row["failed"] for row in rows)
    assert [words[-1] for words in commands] == ["zero2", "zero3", "muon"]
    names = {word.removeprefix("--") for words in commands for word in words[1:] if word.startswith("--")}
    assert names <= TrainingFlags.__dataclass_fields__.keys()
