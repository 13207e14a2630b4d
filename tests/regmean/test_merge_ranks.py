"""Merges by several ranks, and merges that were cut short: the same bytes as by one process in one go."""

import json
import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import InputError
from common.io import partial_path, read_json
from regmean import shards
from regmean.config import MergeFlags
from regmean.merge import merge
from regmean.merge_plan import LayerGroup, MergePlan
from regmean.model_folder import CheckpointWriter
from tests.mindmerger.scripts import end_of, rank_processes
from tests.regmean import folders

# Files of 4,000 bytes of a model of 17,000: a group of layers lies in two of them. A tensor of all experts is a file.
SHARD = "4KB"
RANK = """
import json, os, signal, sys
from common import ranks
from regmean import shards
from regmean.config import MergeFlags
from regmean.merge import merge
from regmean.model_folder import CheckpointWriter
import torch

torch.set_num_threads(1)
ranks.LOOK_SECONDS = 0.2
flags, dies = json.loads(sys.argv[1]), sys.argv[2] == "dies"
write, record, whole = CheckpointWriter.write, shards.record, []
kind = sys.argv[3]

def write_or_die(self, name, values, start=0):
    # Of a mixture, between the first expert of a tensor and the last.
    if dies and os.environ["RANK"] == "1" and whole and (kind != "gpt_oss" or (".experts." in name and start > 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, name, values, start)

def record_and_count(*args):
    record(*args)
    whole.append(args)

CheckpointWriter.write, shards.record = write_or_die, record_and_count
merge(MergeFlags(**flags), "the command")
"""


def with_grams(kind: str, root: Path) -> list[Path]:
    """Two models with their Grams."""
    made = [folders.save(folders.build(kind, seed), root / f"{seed}") for seed in range(2)]
    for folder in made:
        folders.grams(folder)
    return made


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return with_grams("llama", tmp_path_factory.mktemp("pair"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def options(pair: list[Path], output: Path, method: str = "regmean", **more: Any) -> dict[str, Any]:
    grams = [str(folder.with_suffix(".gram")) for folder in pair] if method == "regmean" else []
    names = {"method": method, "models": list(map(str, pair)), "grams": grams, "output_dir": str(output)}
    return names | {"device": "cpu", "max_shard_size": SHARD, "alpha": [0.1, 0.9] if grams else [0.1]} | more


def outputs(root: Path) -> dict[str, bytes]:
    """Bytes of all files by path, without those that name the folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("kind", "method"), [("gpt_oss", "regmean"), ("llama", "avg")])
def test_two_ranks_write_what_one_does_also_after_one_has_died(
    pair: list[Path], tmp_path: Path, kind: str, method: str
) -> None:
    pair = pair if kind == "llama" else with_grams(kind, tmp_path)
    merge(MergeFlags(**options(pair, tmp_path / "one" / "out", method)), "the command")
    expected = outputs(tmp_path / "one")
    assert sum(name.endswith(".safetensors") for name in expected) >= 4
    (tmp_path / "rank.py").write_text(RANK)
    flags = json.dumps(options(pair, tmp_path / "two" / "out", method))
    processes = rank_processes(2, tmp_path, tmp_path / "rank.py", flags, "dies", kind)
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode != 0 for process in processes] == [True, True]
    assert all(path.name.startswith(".") for path in (tmp_path / "two").iterdir())
    whole = list((tmp_path / "two").rglob(f"{shards.RECORDS}/model-*.json"))
    kept = {path: path.stat().st_mtime_ns for record in whole for path in [record.parent.parent / record.stem]}
    assert kept
    printed = end_of(rank_processes(2, tmp_path, tmp_path / "rank.py", flags, "lives", kind), tmp_path)
    assert re.search(r"continuing: \d of \d+ weight files are whole", printed)
    assert outputs(tmp_path / "two") == expected
    for path, time in kept.items():
        path = Path(str(path).replace("/.out", "/out").replace(".partial", ""))
        assert path.stat().st_mtime_ns == time


@pytest.mark.parametrize("changed", [None, "flags", "grams", "blocks"])
def test_an_interrupted_merge_keeps_whole_files_only_for_the_same_merge(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, changed: str
) -> None:
    write, closed = CheckpointWriter.close_whole, []

    def close_and_interrupt(self: CheckpointWriter) -> list:
        if len(closed) >= (5 if changed == "blocks" else 2):
            raise KeyboardInterrupt
        closed.extend(found := write(self))
        return found

    output, flags = tmp_path / "out", options(pair, tmp_path / "out", alpha=[0.1])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointWriter, "close_whole", close_and_interrupt)
        merge(MergeFlags(**flags), "the command")
    assert not output.exists() and (partial_path(output) / shards.RECORDS).exists()
    if changed == "flags":
        flags["exclude"] = ["norm"]
    elif changed == "grams":
        os.utime(pair[1].with_suffix(".gram") / "gram.safetensors")
    with monkeypatch.context() as patch:
        if changed == "blocks":
            # As with less memory on a GPU.
            patch.setattr("regmean.regmean.RegMean._elements", lambda self, _: [40] * len(self.plan.groups))
        merge(MergeFlags(**flags), "the command")
    assert ("continuing: " in capsys.readouterr().out) == (changed in (None, "blocks"))
    merge(MergeFlags(**flags | {"output_dir": str(tmp_path / "at_once")}), "the command")
    if changed == "blocks":
        found, expected = (read_json(path / "merge_report.json")["layers"] for path in (output, tmp_path / "at_once"))
        for one, other in zip(found, expected, strict=True):
            assert one["objective"]["mean"] == pytest.approx(other["objective"]["mean"], rel=1e-5)
            assert one["objective"]["merged"] == pytest.approx(other["objective"]["merged"], rel=1e-3)
    else:
        assert outputs(output) == outputs(tmp_path / "at_once")
    files = read_json(output / "model.safetensors.index.json")["weight_map"]
    layers = read_json(output / "merge_report.json")["layers"]
    assert any(len({files[name] for name in layer["tensors"]}) > 1 for layer in layers)
    assert len(layers) == 9 and all(0 < layer["objective"]["merged"] < layer["objective"]["mean"] for layer in layers)


def test_an_error_leaves_nothing_though_files_were_whole(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise InputError("a damaged Gram")

    monkeypatch.setattr("regmean.merge._reports", fail)
    with pytest.raises(InputError, match="a damaged Gram"):
        merge(MergeFlags(**options(pair, tmp_path / "out")), "the command")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("ranks", "most"), [(1, 1.0), (2, 0.6), (3, 0.45), (40, 0.2)])
def test_files_are_divided_by_their_work(ranks: int, most: float) -> None:
    layout = {f"{n}.{name}": ("BF16", shape) for n in range(16) for name, shape in (("q", (8, 8)), ("down", (8, 32)))}
    groups = [LayerGroup((name,), [name], shape[1], False) for name, (_, shape) in layout.items()]
    plan = MergePlan([], [], [], layout | {"embed": ("BF16", (100, 8))}, groups, [], ["embed"], {}, False, [])
    files: dict[str, list[str]] = {"embed.safetensors": ["embed"]}
    for number, name in enumerate(layout):
        files.setdefault(f"{number // 3}.safetensors", []).append(name)
    divided = shards.divide(plan, files, ranks)
    assert sorted(chain(*divided)) == sorted(files) and divided == shards.divide(plan, files, ranks)
    loads = [sum(8**3 + 8 * 64 if ".q" in n else 32**3 + 8 * 32**2 for f in own for n in files[f] if n in layout)
             for own in divided]  # fmt: skip
    assert max(loads) <= most * sum(loads)
