"""Token ids on disk: tokenised once on each machine, memory-mapped by every rank.

Python lists of the published mapping stage's 900,000 rows take gigabytes in every rank. The memory of a mapped Arrow
file is shared by all ranks.
"""

import hashlib
import itertools
import json
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import transformers
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedTokenizerBase

from common.io import atomic_folder, read_json, sha256, write_json
from mindmerger.batching import KINDS, Tokens
from mindmerger.data import Example
from mindmerger.tokenization import ExampleTokenizer

ROWS, RECORD = "rows.arrow", "rows.json"
# Version of the file format and of the tokenization; a new version invalidates all cached tables.
VERSION = 1
# Rows tokenised together: enough for the tokenizer's threads, few enough for the processor's caches.
AT_ONCE = 1000
_IDS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    [*((kind, _IDS) for kind in KINDS), ("language", pa.string()), ("cut", pa.uint8()), ("location", pa.string()),
     ("target_hash", pa.int64())]
)  # fmt: skip


class Rows:
    """A subset of the rows of a table, in any order.

    Args:
        table: memory-mapped Arrow table.
        index: int64, numbers of the rows in the table.
        mapped: False to read the rows as those of the LLM alone.
        opening: opening of every row; see `Tokens`.
        trained: number of the table's first rows that are no replayed ones; None for all.

    Attributes:
        index: numbers of the rows in the table.
        lengths: int64, tokens of each row's sequence for the LLM; see `Tokens.__len__`.
        target_lengths: int64, tokens of each row's target.
        replayed: bool, True for a row whose target is the LLM's own answer.
    """

    def __init__(
        self,
        table: pa.Table,
        index: np.ndarray,
        mapped: bool = True,
        opening: Sequence[int] = (),
        trained: int | None = None,
    ):
        self._table, self._mapped, self._opening = table, mapped, opening
        self.index = index
        lengths = {kind: pc.list_value_length(table.column(kind)).to_numpy()[index] for kind in KINDS}
        source = lengths["source"] + 1 if mapped else 0
        self.lengths = (1 + len(opening) + source + lengths["prompt"] + lengths["target"]).astype(np.int64)
        self.target_lengths = lengths["target"].astype(np.int64)
        self.replayed = index >= (len(table) if trained is None else trained)

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the rows' lengths, which decide their order, and of the ids of replayed rows."""
        content = hashlib.sha256(self.lengths.tobytes())
        for row in self.tokens(np.flatnonzero(self.replayed)):
            content.update(np.concatenate([row.prompt, row.target]).tobytes())
        return content.hexdigest()

    def tokens(self, rows: Sequence[int]) -> list[Tokens]:
        """Token ids of the rows with these numbers, as int32 arrays."""
        # `take` of a list column in chunks would copy the whole column.
        columns = [self._table.column(kind) for kind in KINDS]
        return [
            Tokens(*(ids[row].values.to_numpy() for ids in columns), mapped=self._mapped, opening=self._opening)
            for row in self.index[rows].tolist()
        ]

    def locations(self, rows: Sequence[int]) -> list[str]:
        """File and line of the rows with these numbers."""
        return self._table.column("location").take(self.index[rows]).to_pylist()

    def languages(self) -> list[str]:
        """English names of the languages of these rows."""
        return sorted(pc.unique(self._column("language")).to_pylist())

    def row_languages(self) -> list[str]:
        """English name of the language of each row."""
        return self._column("language").to_pylist()

    def cuts(self) -> dict[str, dict[str, int]]:
        """Number of cut texts of each kind, by language: `{"German": {"prompt": 3}}`."""
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        cut = self._column("cut").to_numpy()
        names = self._column("language").take(np.flatnonzero(cut)).to_pylist()
        for language, bits in zip(names, cut[cut > 0].tolist(), strict=True):
            counts[language].update(kind for bit, kind in enumerate(KINDS) if bits >> bit & 1)
        return {language: dict(counter) for language, counter in counts.items()}

    def shared_targets(self, other: "Rows") -> int:
        """Number of rows whose target is also the target of a row of `other`."""
        return int(np.isin(self._column("target_hash").to_numpy(), other._column("target_hash").to_numpy()).sum())

    def joined(self, replayed: "TokenTable") -> "Rows":
        """These rows, followed by all rows of `replayed`."""
        count = len(self._table)
        table = pa.concat_tables([self._table, replayed.arrow])
        return Rows(
            table, np.concatenate([self.index, np.arange(count, len(table))]), opening=self._opening, trained=count
        )

    def _column(self, name: str) -> pa.ChunkedArray:
        return self._table.column(name).take(self.index)


class TokenTable:
    """All rows of one training stage.

    Args:
        folder: output of `write_table`.

    Attributes:
        folder: folder of the table.
        size: bytes of its file.
        sha256: hash of the rows' texts.
        files: data files that the rows were read from.
        arrow: memory-mapped rows.
    """

    def __init__(self, folder: Path):
        record = read_json(folder / RECORD)
        self.folder = folder
        self.size = (folder / ROWS).stat().st_size
        self.sha256: str = record["sha256"]
        self.files: list[str] = record["files"]
        self._opening: list[int] = record.get("opening", [])
        with pa.memory_map(str(folder / ROWS)) as file, pa.ipc.open_stream(file) as stream:
            self.arrow = stream.read_all()

    def __len__(self) -> int:
        return len(self.arrow)

    def rows(self, index: np.ndarray, mapped: bool = True) -> Rows:
        """The rows with these numbers, `mapped` as in `Rows`."""
        return Rows(self.arrow, index, mapped, self._opening)


def open_table(
    read: Callable[[], Iterable[Example]], tokenizer: ExampleTokenizer, settings: dict[str, Any], cache_dir: Path | None
) -> TokenTable:
    """Load the token ids of the rows of `read` from the cache, or tokenise the rows and cache them.

    Called by every rank. One of the ranks that share a cache tokenises, and the others wait for its lock.

    Args:
        read: function that returns the rows.
        tokenizer: tokenizer of the two models.
        settings: JSON values that determine the rows of `read`, with the hashes of its data files.
        cache_dir: folder of cached tables; None for one in Hugging Face's cache of data sets (`HF_DATASETS_CACHE`).

    Raises:
        InputError: a row is malformed, a template is longer than its limit, or the disk is full.
    """
    # Importing `datasets` for this path would take longer than reading a table.
    root = cache_dir or Path(os.environ.get("HF_DATASETS_CACHE", f"{HF_HOME}/datasets")) / "mindmerger"
    folder = root / _key(tokenizer, settings)
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        # The lock avoids double work; the renaming of the folder keeps partial tables from readers.
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                with atomic_folder(folder) as partial:
                    write_table(partial, read(), tokenizer)
    return TokenTable(folder)


def open_replaced(folder: Path, table: TokenTable, targets: dict[int, list[int]]) -> TokenTable:
    """Load the table in `folder`, or first write it: rows of `table` by their numbers, with other targets."""
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            kept = table.arrow.take(pa.array(sorted(targets), pa.int64()))
            ids = [targets[row] for row in sorted(targets)]
            hashes = [hashlib.blake2b(json.dumps(row).encode(), digest_size=8).digest() for row in ids]
            for name, column in (
                ("target", pa.array(ids, _IDS)),
                ("target_hash", pa.array(np.frombuffer(b"".join(hashes), np.int64))),
            ):
                kept = kept.set_column(kept.column_names.index(name), name, column)
            with atomic_folder(folder) as partial:
                with pa.OSFile(str(partial / ROWS), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
                    writer.write_table(kept)
                record = read_json(table.folder / RECORD)
                digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
                write_json(partial / RECORD, record | {"sha256": digest, "rows": len(ids)})
    return TokenTable(folder)


def file_hashes(folder: Path) -> dict[str, str]:
    """Compute the sha256 of every file below `folder`, by its path."""
    return {str(path): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def write_table(folder: Path, examples: Iterable[Example], tokenizer: ExampleTokenizer) -> None:
    """Write the token ids of `examples` to `folder`, a thousand rows at a time."""
    texts, files = hashlib.sha256(), set()
    with pa.OSFile(str(folder / ROWS), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        for number, chunk in enumerate(_chunks(examples)):
            writer.write_batch(_record_batch(chunk, tokenizer(chunk)))
            lines = "\n".join(f"{row.language.code}\t{row.source.text}\t{row.target}" for row in chunk)
            texts.update((("\n" if number else "") + lines).encode())
            files |= {row.location.rpartition(", ")[0] for row in chunk}
    record = {"sha256": texts.hexdigest(), "files": sorted(files), "opening": tokenizer.opening}
    write_json(folder / RECORD, record)


def _chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    left = iter(examples)
    while chunk := list(itertools.islice(left, AT_ONCE)):
        yield chunk


def _record_batch(examples: list[Example], rows: list[Tokens]) -> pa.RecordBatch:
    columns: dict[str, pa.Array] = {kind: pa.array([getattr(row, kind) for row in rows], _IDS) for kind in KINDS}
    columns["language"] = pa.array([row.language for row in rows])
    columns["cut"] = pa.array([sum(1 << KINDS.index(kind) for kind in row.cut) for row in rows], pa.uint8())
    columns["location"] = pa.array([example.location for example in examples])
    hashes = [hashlib.blake2b(example.target.encode(), digest_size=8).digest() for example in examples]
    columns["target_hash"] = pa.array(np.frombuffer(b"".join(hashes), np.int64))
    return pa.record_batch(columns, schema=_SCHEMA)


def _key(tokenizer: ExampleTokenizer, settings: dict[str, Any]) -> str:
    """Name of the table in the cache: a hash of everything that determines its content."""
    content = settings | {
        "version": VERSION,
        "libraries": [transformers.__version__, tokenizers.__version__],
        "llm_tokenizer": _tokenizer_hashes(tokenizer.llm_tokenizer),
        "mt_tokenizer": _tokenizer_hashes(tokenizer.mt_tokenizer),
        "names_language": tokenizer.names_language,
        "prompts": tokenizer.augmentation,
        "limits": [tokenizer.max_seq_len, tokenizer.max_prompt_len, tokenizer.max_gen_len],
    }
    if tokenizer.chat is not None:
        content["chat"] = [tokenizer.chat.before, tokenizer.chat.after, tokenizer.closing]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_hashes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Hashes of the tokenizer's files as `save_pretrained` writes them."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return sorted(file_hashes(Path(folder)).values())
