"""Rows on disk: tokenized once, equal to the tokenizer's output, and read from the cache if nothing has changed."""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from common.errors import InputError
from mindmerger import token_table
from mindmerger.data import Example
from mindmerger.token_table import TokenTable, open_table
from tests.mindmerger.scripts import train_here

Words = tuple[object, ...]


@pytest.fixture
def located(examples: list[Example]) -> list[Example]:
    return [replace(example, location=f"datas/{n % 2}.tsv, line {n}") for n, example in enumerate(examples)]


def reader(rows: list[Example], reads: list[int]) -> Callable[[], Iterable[Example]]:
    def read() -> Iterable[Example]:
        reads.append(1)
        yield from rows

    return read


def test_a_table_holds_what_the_tokenizer_gives(
    build: Callable, located: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several batches of rows, the last of which is not full.
    monkeypatch.setattr(token_table, "AT_ONCE", 2)
    _, tokenizer = build(max_seq_len=20)
    reads: list[int] = []
    table = open_table(reader(located, reads), tokenizer, {"files": {}}, tmp_path)
    order = np.array([3, 0, 4, 1])
    rows, expected = table.rows(order), tokenizer(located)
    assert len(table) == len(located) and len(rows) == 4
    allocated = pa.total_allocated_bytes()
    read = rows.tokens([0, 1, 2, 3])
    assert pa.total_allocated_bytes() == allocated, "token ids stay in the mapped file"
    for row, number in zip(read, order, strict=True):
        wanted = expected[number]
        for kind in ("source", "prompt", "target"):
            assert getattr(row, kind).dtype == np.int32 and list(getattr(row, kind)) == list(getattr(wanted, kind))
    assert rows.lengths.tolist() == [len(expected[number]) for number in order]
    assert rows.target_lengths.tolist() == [len(expected[number].target) for number in order]
    assert rows.locations([2, 0]) == ["datas/0.tsv, line 4", "datas/1.tsv, line 3"]
    assert rows.languages() == ["English", "German", "Swahili"]
    cut: dict[str, dict[str, int]] = {}
    for number in order:
        for kind in expected[number].cut:
            counts = cut.setdefault(expected[number].language, {})
            counts[kind] = counts.get(kind, 0) + 1
    assert rows.cuts() == cut and cut
    texts = "\n".join(f"{row.language.code}\t{row.source.text}\t{row.target}" for row in located)
    assert table.sha256 == hashlib.sha256(texts.encode()).hexdigest()
    assert table.files == ["datas/0.tsv", "datas/1.tsv"]


def test_targets_that_two_parts_share(build: Callable, located: list[Example], tmp_path: Path) -> None:
    _, tokenizer = build()
    rows = [*located, replace(located[0], language=located[1].language)]
    table = open_table(reader(rows, []), tokenizer, {}, tmp_path)
    assert table.rows(np.array([0, 1])).shared_targets(table.rows(np.array([2, 3, 4]))) == 0
    assert table.rows(np.array([0, 1])).shared_targets(table.rows(np.array([2, 5]))) == 1


def test_a_table_is_made_once_and_anew_where_anything_differs(
    build: Callable, located: list[Example], tmp_path: Path
) -> None:
    _, tokenizer = build()
    reads: list[int] = []

    def reads_after(tokenizer: object, **settings: object) -> int:
        open_table(reader(located, reads), tokenizer, settings, tmp_path)
        return len(reads)

    assert reads_after(tokenizer, files={"a": "1"}) == 1
    assert reads_after(tokenizer, files={"a": "1"}) == 1
    assert reads_after(build()[1], files={"a": "1"}) == 1
    assert reads_after(tokenizer, files={"a": "2"}) == 2
    assert reads_after(build(max_seq_len=50)[1], files={"a": "1"}) == 3
    assert reads_after(build(augmentation=False)[1], files={"a": "1"}) == 4
    assert reads_after(build(mt="nllb")[1], files={"a": "1"}) == 5


def test_a_malformed_row_leaves_no_table(build: Callable, located: list[Example], tmp_path: Path) -> None:
    _, tokenizer = build()

    def read() -> Iterable[Example]:
        yield from located
        raise InputError("row 6 is malformed")

    with pytest.raises(InputError, match="row 6"):
        open_table(read, tokenizer, {}, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_a_second_run_reads_the_cache(
    work: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words: Words = (
        *("--llm_path", models["llama"], "--mt_path", models["mt5"], "--stage_name", "mapping", "--languages", "de"),
        *("--train_num", 12, "--dev_size", 4, "--train_batch_size", 8, "--epoch_num", 1, "--cache_dir", "cache"),
    )
    train_here(work, *words, "--save_name", "first")
    tables = [path for path in (work / "cache").iterdir() if path.is_dir()]
    # The smaller one has the prompts of the dev rows, for the LLM alone.
    assert sorted(len(TokenTable(path)) for path in tables) == [4, 12]
    table = max(tables, key=lambda path: len(TokenTable(path)))
    size = (table / "rows.arrow").stat().st_size
    assert f"token ids: {size / 1e6:.1f} MB in cache/{table.name}" in capsys.readouterr().out
    monkeypatch.setattr(token_table, "write_table", lambda *_: pytest.fail("tokenised again"))
    train_here(work, *words, "--save_name", "second")
    one, other = ((work / f"outputs/{name}/mapping/model.safetensors").read_bytes() for name in ("first", "second"))
    assert one == other
    pairs = work / "datas/bilingual_pairs/en-de/train_100k.de"
    before = pairs.read_bytes()
    os.utime(pairs, (1, 1))
    train_here(work, *words, "--save_name", "third")
    pairs.write_bytes(before.replace(b"0", b"1"))
    with pytest.raises(pytest.fail.Exception, match="tokenised again"):
        train_here(work, *words, "--save_name", "fourth")
    pairs.write_bytes(before)
