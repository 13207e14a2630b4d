"""Rows of token ids on disk: tokenised once for each machine, memory-mapped by every rank.

A list of Python objects for the published mapping stage's 900,000 rows takes gigabytes in every rank; an Arrow file is
mapped once into the memory that all ranks share.
"""

import hashlib
import itertools
import json
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
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
# Of the file's form and of everything that decides which ids a row has; a new one makes every table anew.
VERSION = 1
# Rows that are tokenised together: enough for a tokenizer's threads, few enough for the processor's caches.
AT_ONCE = 1000
_IDS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    [*((kind, _IDS) for kind in KINDS), ("language", pa.string()), ("cut", pa.uint8()), ("location", pa.string()),
     ("target_hash", pa.int64())]
)  # fmt: skip


class Rows:
    """Some rows of a table, in an order of their own.

    Args:
        table: as `open_table` maps it.
        index: int64, the table's numbers of these rows.

    Attributes:
        index: the same.
        lengths: int64, tokens of each row's sequence for the LLM; see `Tokens.__len__`.
        target_lengths: int64, tokens of each row's target.
    """

    def __init__(self, table: pa.Table, index: np.ndarray):
        self._table = table
        self.index = index
        lengths = {kind: pc.list_value_length(table.column(kind)).to_numpy()[index] for kind in KINDS}
        self.lengths = sum(lengths.values()).astype(np.int64) + 2
        self.target_lengths = lengths["target"].astype(np.int64)

    def __len__(self) -> int:
        return len(self.index)

    def tokens(self, rows: Sequence[int]) -> list[Tokens]:
        """The token ids of the rows with these numbers, as int32 arrays."""
        columns = self._table.select(KINDS).take(self.index[rows]).itercolumns()
        return [Tokens(*(ids.values.to_numpy() for ids in row)) for row in zip(*columns, strict=True)]

    def locations(self, rows: Sequence[int]) -> list[str]:
        """File and line of the rows with these numbers."""
        return self._table.column("location").take(self.index[rows]).to_pylist()

    def languages(self) -> list[str]:
        """English names of the languages of these rows."""
        return sorted(pc.unique(self._column("language")).to_pylist())

    def cuts(self) -> dict[str, dict[str, int]]:
        """How many texts of each kind were cut, by language: `{"German": {"prompt": 3}}`."""
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        cut = self._column("cut").to_numpy()
        names = self._column("language").take(np.flatnonzero(cut)).to_pylist()
        for language, bits in zip(names, cut[cut > 0].tolist(), strict=True):
            counts[language].update(kind for bit, kind in enumerate(KINDS) if bits >> bit & 1)
        return {language: dict(counter) for language, counter in counts.items()}

    def shared_targets(self, other: "Rows") -> int:
        """How many of these rows have a target that a row of `other` has, too."""
        return int(np.isin(self._column("target_hash").to_numpy(), other._column("target_hash").to_numpy()).sum())

    def _column(self, name: str) -> pa.ChunkedArray:
        return self._table.column(name).take(self.index)


class TokenTable:
    """All rows of one training stage.

    Args:
        folder: as `write_table` leaves it.

    Attributes:
        folder: the same.
        size: of its file, in bytes.
        sha256: of the rows' texts.
        files: the data files that the rows were read from.
    """

    def __init__(self, folder: Path):
        record = read_json(folder / RECORD)
        self.folder = folder
        self.size = (folder / ROWS).stat().st_size
        self.sha256: str = record["sha256"]
        self.files: list[str] = record["files"]
        with pa.memory_map(str(folder / ROWS)) as file, pa.ipc.open_stream(file) as stream:
            self._table = stream.read_all()

    def __len__(self) -> int:
        return len(self._table)

    def rows(self, index: np.ndarray) -> Rows:
        """The rows with these numbers."""
        return Rows(self._table, index)


def open_table(
    read: Callable[[], Iterable[Example]], tokenizer: ExampleTokenizer, settings: dict[str, Any], cache_dir: Path | None
) -> TokenTable:
    """The token ids of the rows that `read` gives, from the cache, or tokenised and kept there.

    Called by every rank; of the ranks that share a cache one tokenises, and the others wait for its lock.

    Args:
        read: gives the rows.
        tokenizer: of the two models.
        settings: everything that decides which rows `read` gives, as JSON values, data files by their hashes.
        cache_dir: None for a folder beside the data sets that Hugging Face's library caches (`HF_DATASETS_CACHE`).

    Raises:
        InputError: a malformed row, a template longer than its limit, a full disk.
    """
    # Not asked of `datasets` itself, whose import takes longer than reading a table.
    root = cache_dir or Path(os.environ.get("HF_DATASETS_CACHE", f"{HF_HOME}/datasets")) / "mindmerger"
    folder = root / _key(tokenizer, settings)
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        # The lock saves work; what keeps a reader from half a table is the folder's renaming.
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                with atomic_folder(folder) as partial:
                    write_table(partial, read(), tokenizer)
    return TokenTable(folder)


def file_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file below `folder`, by its path."""
    return {str(path): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def write_table(folder: Path, examples: Iterable[Example], tokenizer: ExampleTokenizer) -> None:
    """Write the token ids of `examples` to `folder`, some thousand rows at a time."""
    texts, files = hashlib.sha256(), set()
    with pa.OSFile(str(folder / ROWS), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        for number, chunk in enumerate(_chunks(examples)):
            writer.write_batch(_record_batch(chunk, tokenizer(chunk)))
            lines = "\n".join(f"{row.language.code}\t{row.source.text}\t{row.target}" for row in chunk)
            texts.update((("\n" if number else "") + lines).encode())
            files |= {row.location.rpartition(", ")[0] for row in chunk}
    write_json(folder / RECORD, {"sha256": texts.hexdigest(), "files": sorted(files)})


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
    """Names the table of these settings: a hash of all that decides what is in it."""
    content = settings | {
        "version": VERSION,
        "libraries": [transformers.__version__, tokenizers.__version__],
        "llm_tokenizer": _tokenizer_hashes(tokenizer.llm_tokenizer),
        "mt_tokenizer": _tokenizer_hashes(tokenizer.mt_tokenizer),
        "names_language": tokenizer.names_language,
        "prompts": tokenizer.augmentation,
        "limits": [tokenizer.max_seq_len, tokenizer.max_prompt_len, tokenizer.max_gen_len],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_hashes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Hashes of the tokenizer's files, wherever they lie and whatever they are called."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return sorted(file_hashes(Path(folder)).values())
