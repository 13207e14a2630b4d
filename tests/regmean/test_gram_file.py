"""Gram files of both forms: written values are read back, and anything else is refused."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from common.errors import InputError
from regmean import gram_file
from regmean.gram_file import Counts, Gram, GramFile, PublishedGrams, convert, join_files, open_grams, write_grams

IO_COUNTS = Path("/proc/self/io")


def random_gram(width: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(50, width)).astype(np.float32)
    return x.T @ x


def write(path: Path, sums: dict[str, np.ndarray], tokens: int = 50) -> Path:
    grams = [Gram(name, (name, f"{name}.twin"), tokens, len(total)) for name, total in sums.items()]
    counts = [Counts("counts.table", ("table.weight",), False, np.array([3, 0, 47]))]
    write_grams(path, grams, sums.__getitem__, {"model": "m"}, counts)
    return path


@pytest.mark.parametrize("block", [1, 5, 128])
def test_a_gram_comes_back_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(gram_file, "BLOCK_ROWS", block)
    monkeypatch.setattr(gram_file, "THREADED_BLOCKS", 2)
    sums = {"a": random_gram(13), "b": random_gram(1)}
    file = GramFile(write(tmp_path / "gram.safetensors", sums))
    assert file.provenance == {"model": "m"}
    assert file.grams["a"] == Gram("a", ("a", "a.twin"), 50, 13)
    written = (tmp_path / "gram.safetensors").read_bytes()
    assert GramFile(write(tmp_path / "again.safetensors", sums)).grams == file.grams
    assert (tmp_path / "again.safetensors").read_bytes() == written
    for name, total in sums.items():
        np.testing.assert_array_equal(file.read(name), total)
    counts = file.counts["counts.table"]
    assert (counts.tensors, counts.tied, counts.values.tolist()) == (("table.weight",), False, [3, 0, 47])
    # The contract: the lower triangle, row by row, in float32; counts in int64.
    assert load_file(tmp_path / "gram.safetensors")["counts.table"].dtype == np.int64
    packed = load_file(tmp_path / "gram.safetensors")["a"]
    np.testing.assert_array_equal(packed, sums["a"][np.tril_indices(13)])


@pytest.mark.parametrize("block", [1, 7, 1 << 22])
def test_joined_files_hold_the_same_bytes_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(gram_file, "BLOCK_ELEMENTS", block)
    sums = {"a": random_gram(5), "b": random_gram(1), "c": random_gram(4)}
    whole = write(tmp_path / "whole.safetensors", sums)
    parts = [{name: sums[name] for name in names} for names in ("ab", "c")]
    files = [GramFile(write(tmp_path / f"{number}.safetensors", part)) for number, part in enumerate(parts)]
    join_files(tmp_path / "joined.safetensors", files, {"model": "m"})
    assert (tmp_path / "joined.safetensors").read_bytes() == whole.read_bytes()


def test_files_of_version_1_are_read(tmp_path: Path) -> None:
    """They have no counts."""
    path = tmp_path / "gram.safetensors"
    grams = {"a": {"modules": ["a"], "tokens": 50, "width": 2, "conv1d": False, "tensors": ["a.weight"]}}
    metadata = {"format": "regmean-gram", "version": "1", "grams": json.dumps(grams), "provenance": "{}"}
    save_file({"a": np.array([1, 2, 5], np.float32)}, path, metadata)
    file = open_grams(tmp_path)
    assert file.read("a").tolist() == [[1, 2], [2, 5]]
    assert (file.counts, file.grams["a"].tensors) == ({}, ("a.weight",))


def test_a_gram_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    total = random_gram(4)
    total[2, 1] = np.inf
    with pytest.raises(InputError, match=r"input of a, a\.twin is NaN or infinite"):
        write(tmp_path / "gram.safetensors", {"a": total})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not IO_COUNTS.exists(), reason="Linux")
def test_a_gram_is_read_once_whatever_its_number_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bytes_read() -> int:
        return int(IO_COUNTS.read_text().split()[1])

    monkeypatch.setattr(gram_file, "BLOCK_ROWS", 4)
    path = write(tmp_path / "gram.safetensors", {"a": random_gram(300)})
    file, before = GramFile(path), bytes_read()
    file.read("a")
    assert bytes_read() - before < 2 * path.stat().st_size


@pytest.mark.parametrize("width", [2, 30])
@pytest.mark.parametrize(("value", "message"), [(np.nan, "NaN"), (-1.0, "negative diagonal")])
def test_a_damaged_gram_is_refused_when_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, value: float, message: str
) -> None:
    monkeypatch.setattr(gram_file, "BLOCK_ROWS", 4)
    monkeypatch.setattr(gram_file, "THREADED_BLOCKS", 2)
    path = write(tmp_path / "gram.safetensors", {"a": random_gram(width)})
    content = bytearray(path.read_bytes())
    content[-4:] = np.float32(value).tobytes()
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"gram\.safetensors: the Gram of a .*{message}"):
        GramFile(path).read("a")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "gram.safetensors", {"a": random_gram(2)})
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    with pytest.raises(InputError, match="download it again"):
        open_grams(tmp_path)
    for old, new, message in (
        (b'"version": "2"', b'"version": "9"', "version '9'"),
        (b'\\"tied\\": false', b'\\"tied\\": 12345', "header is damaged"),
        (b'[\\"table.weight\\"]', b"[1234567890.12345]", "header is damaged"),
        (np.array([3, 0, 47]).tobytes(), np.array([3, -1, 47]).tobytes(), "header is damaged"),
        (b'\\"width\\": 2', b'\\"width\\": 3', "header is damaged"),
        (b'\\"tokens\\": 50', b'\\"tokens\\": -1', "header is damaged"),
        (b'\\"modules\\"', b'\\"nodules\\"', "header is damaged"),
    ):
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, new))
        with pytest.raises(InputError, match=message):
            open_grams(path)
    with pytest.raises(InputError, match="no such Gram file"):
        open_grams(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="neither"):
        open_grams(tmp_path / "folder")


@pytest.mark.parametrize("by", ["pickle", "torch.save"])
def test_published_grams_are_read_and_converted(tmp_path: Path, by: str) -> None:
    shared, own = torch.from_numpy(random_gram(5)) / 50, torch.from_numpy(random_gram(3, seed=1)) / 50
    content = {"layers.0.q": shared, "layers.0.k": shared.clone(), "layers.0.o": own.to(torch.bfloat16)}
    path = tmp_path / "gram.pkl"
    if by == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    published = open_grams(tmp_path)
    assert isinstance(published, PublishedGrams)
    assert published.grams["layers.0.q"].modules == ("layers.0.q", "layers.0.k")
    np.testing.assert_array_equal(published.read("layers.0.q"), shared.numpy())

    convert(path, tmp_path / "gram.safetensors")
    converted = open_grams(tmp_path)
    assert isinstance(converted, GramFile)
    assert converted.grams == published.grams
    for name, gram in converted.grams.items():
        np.testing.assert_array_equal(converted.read(name) / gram.tokens, content[name].float().numpy())
    with pytest.raises(InputError, match="exists already"):
        convert(path, tmp_path / "gram.safetensors")


class Exploit:
    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("nested", [False, True])
def test_a_malicious_pickle_is_refused(tmp_path: Path, nested: bool) -> None:
    marker = tmp_path / "executed"
    attack: Any = Exploit(os.system, f"touch {marker}")
    if nested:
        # A tensor's storage is a torch file of its own, which torch would unpickle without restrictions.
        attack = Exploit(torch.storage._load_from_bytes, pickle.dumps(attack))
    path = tmp_path / "gram.pkl"
    path.write_bytes(pickle.dumps({"a": attack}))
    with pytest.raises(InputError, match=r"gram\.pkl: not a whole pickled file of plain tensors"):
        open_grams(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"not a pickle", pickle.dumps([1]), pickle.dumps({}), pickle.dumps({"a": 1}),
     pickle.dumps({"a": torch.zeros(2, 3)})],
)  # fmt: skip
def test_what_is_no_published_gram_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "gram.pkl").write_bytes(content)
    with pytest.raises(InputError, match=r"gram\.pkl"):
        open_grams(tmp_path)
