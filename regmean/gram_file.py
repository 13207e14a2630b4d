"""Gram files: what one model's linear layers saw, written once and read layer by layer.

`gram.safetensors` holds one float32 tensor per distinct layer input: the lower triangle, row by row, of the *sum* of
x x^T over tokens. Sums add: the Grams of two data sets are the sum of their files' tensors and of their token counts.
The header's metadata says which modules share each Gram, how many tokens it sums, and where it came from. Since version
2 there is also one int64 tensor per embedding table, with the number of tokens that read each row. Since version 3
there are experts: each has Grams of the tokens routed to it, which may be none, and a pool is the sum over a layer's
experts. A file has the lowest version that its contents need.

The published form, `gram.pkl`, is a pickled dict of module name to mean Gram. It is read too, by an unpickler that
builds tensors and containers and nothing else.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError
from common.io import atomic_path
from regmean.tensor_file import TensorFile, TensorWriter

FORMAT = "regmean-gram"
PLAIN, COUNTED, WITH_EXPERTS = READABLE = ("1", "2", "3")
FILE_NAME = "gram.safetensors"
PUBLISHED_NAME = "gram.pkl"
BLOCK_ROWS = 128  # of a Gram, packed or unpacked at a time by each thread
THREADS = min(8, os.cpu_count() or 1)  # that pack or unpack a Gram; more have to wait for the memory
THREADED_BLOCKS = 16  # of a Gram: with fewer, starting threads takes longer than they save
PAD = 16  # columns beside a tile: without them its rows are whole powers of two apart, which share lines of a cache
BLOCK_ELEMENTS = 1 << 22  # of a packed Gram, copied at a time
Empty = Callable[[tuple[int, int], type], np.ndarray]  # of a shape and a dtype
ABOVE = np.triu(np.ones((BLOCK_ROWS, BLOCK_ROWS), bool), 1)  # the diagonal of such a block


@dataclass(frozen=True)
class Gram:
    """One distinct input of `width` features: the modules that receive it, and how many tokens were summed.

    `conv1d` is True if those modules store their weight as (in, out), as GPT-2's Conv1D does, not as (out, in).
    `tensors` are the names under which their weights are stored; files of older versions have none. `pool` is the name
    of the sum over all experts, for an expert's Gram and for that sum itself; of Grams with a pool, 0 tokens are none.
    """

    name: str
    modules: tuple[str, ...]
    tokens: int
    width: int
    conv1d: bool = False
    tensors: tuple[str, ...] = ()
    pool: str = ""

    @property
    def is_pool(self) -> bool:
        """True for a sum over experts."""
        return self.pool == self.name

    @property
    def packed_size(self) -> int:
        """Elements of its tensor."""
        return packed_size(self.width) if self.tokens else 0


@dataclass(frozen=True, eq=False)
class Counts:
    """Number of tokens that read each row of an embedding table: `values`, int64; `name` is that in the file.

    `tensors` are the names under which the table is stored. If `tied`, the table is the output head's weight as well,
    and that layer's Gram is in the file.
    """

    name: str
    tensors: tuple[str, ...]
    tied: bool
    values: np.ndarray


class Grams:
    """A model's Grams and counts by name, in either file form; `provenance` records the model and the data."""

    path: Path
    grams: dict[str, Gram]
    counts: dict[str, Counts]
    provenance: dict[str, Any]

    def read(self, name: str, empty: Empty = np.empty) -> np.ndarray:
        """The sum of x x^T of Gram `name`: float32 of shape (width, width), symmetric, the caller's own.

        `empty` allocates its memory, if it is read from a `gram.safetensors`.

        Raises:
            InputError: it cannot be read, is not finite, or has a negative diagonal.
        """
        square = self._read_square(name, empty)
        if square.diagonal().min() < 0:
            raise InputError(f"{self.path}: the Gram of {name} is damaged: a negative diagonal, as no sum of x x^T has")
        return square

    def _read_square(self, name: str, empty: Empty) -> np.ndarray:
        raise NotImplementedError

    def _check_finite(self, name: str, values: np.ndarray) -> None:
        if not np.isfinite(values).all():
            raise InputError(f"{self.path}: the Gram of {name} holds NaN or infinite values; compute it again")


def open_grams(path: Path) -> Grams:
    """The Grams in `path`: a file of either form, or a folder holding `gram.safetensors` or `gram.pkl`.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if not path.exists():
        raise InputError(f"{path}: no such Gram file or folder; compute_gram.py makes one")
    if path.is_dir():
        found = [path / name for name in (FILE_NAME, PUBLISHED_NAME) if (path / name).exists()]
        if not found:
            raise InputError(f"{path}: holds neither {FILE_NAME} nor {PUBLISHED_NAME}; compute_gram.py makes one")
        path = found[0]
    return GramFile(path) if path.suffix == ".safetensors" else PublishedGrams(path)


class GramFile(Grams):
    """A `gram.safetensors`, whose header has been read and checked.

    Raises:
        InputError: damaged, or not a Gram file of a version this reads.
    """

    def __init__(self, path: Path):
        self.path = path
        file = TensorFile(path)
        metadata, self._tensors = file.metadata, file.tensors
        form = (metadata.get("format"), metadata.get("version"))
        if form[0] != FORMAT or form[1] not in READABLE:
            known = " and ".join(READABLE)
            raise InputError(f"{path}: format {form[0]!r}, version {form[1]!r}; this reads {FORMAT!r}, {known}")
        try:
            entries = json.loads(metadata["grams"])
            self.provenance = dict(json.loads(metadata["provenance"]).items())
            names = {"modules", "tensors"}
            lists = [{key: tuple(entry.pop(key)) for key in names & entry.keys()} for entry in entries.values()]
            self.grams = {
                name: Gram(name, **entry, **of) for (name, entry), of in zip(entries.items(), lists, strict=True)
            }
            for gram in self.grams.values():
                texts = (*gram.modules, *gram.tensors, gram.pool)
                types = (type(gram.tokens), type(gram.width), type(gram.conv1d), *map(type, texts))
                if types != (int, int, bool, *(str for _ in texts)) or min(gram.tokens, gram.width - 1) < 0:
                    raise ValueError(f"{gram} is not a Gram")
                if self.grams[gram.pool].width != gram.width if gram.pool else not gram.tokens:
                    raise ValueError(f"{gram} has no tokens, or a pool of another width")
                packed = self._tensors[gram.name]
                if (packed.dtype, packed.shape) != ("F32", (gram.packed_size,)):
                    raise ValueError(f"tensor {gram.name} is {packed.dtype} of shape {packed.shape}")
            tables = json.loads(metadata.get("counts", "{}"))
            self.counts = {name: self._read_counts(name, **entry) for name, entry in tables.items()}
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: the Gram file's header is damaged: {error!r}") from error

    def _read_counts(self, name: str, tensors: list[str], tied: bool) -> Counts:
        info = self._tensors[name]
        values = info.read()
        form = (info.dtype, len(info.shape), type(tied), *map(type, tensors))
        if form != ("I64", 1, bool, *(str for _ in tensors)) or values.min() < 0 or values.sum() < 1:
            raise ValueError(f"{name} is not a table's token counts")
        return Counts(name, tuple(tensors), tied, values)

    def read_packed(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop` of a Gram as it is stored."""
        return self._tensors[name].read(start, stop)

    def _read_square(self, name: str, empty: Empty) -> np.ndarray:
        width = self.grams[name].width
        square = empty((width, width), np.float32)
        if not self.grams[name].tokens:
            square[...] = 0
            return square

        def unpack(first: int, last: int) -> None:
            packed = self.read_packed(name, packed_size(first), packed_size(last))
            self._check_finite(name, packed)
            start = 0
            for length in range(first + 1, last + 1):
                square[length - 1, :length] = packed[start : start + length]
                start += length
            _mirror(square, first, last)

        _for_row_blocks(width, unpack)
        return square


class PublishedGrams(Grams):
    """A published `gram.pkl`, unpickled: mean Grams by module name. Equal Grams are one, as their modules share it.

    The file has no token counts: every Gram counts as one token, whose "sum" is then the mean.

    Raises:
        InputError: not such a pickle, or one of anything but tensors and containers.
    """

    def __init__(self, path: Path):
        self.path = path
        self.provenance = {"published_file": path.name, "token_counts": "unknown"}
        self.counts = {}
        self._means: dict[str, np.ndarray] = {}
        sharing: dict[str, list[str]] = {}
        names: dict[bytes, str] = {}
        for module, mean in _read_means(path).items():
            name = names.setdefault(hashlib.sha256(np.ascontiguousarray(mean)).digest(), module)
            self._means.setdefault(name, mean)
            sharing.setdefault(name, []).append(module)
        self.grams = {name: Gram(name, tuple(sharing[name]), 1, len(mean)) for name, mean in self._means.items()}

    def _read_square(self, name: str, empty: Empty) -> np.ndarray:
        self._check_finite(name, self._means[name])
        return self._means[name].copy()


def write_grams(
    path: Path,
    grams: Iterable[Gram],
    read: Callable[[str], np.ndarray],
    provenance: dict[str, Any],
    counts: Iterable[Counts] = (),
) -> None:
    """Write a Gram file, whole or not at all, holding one Gram at a time.

    `read` gives the (width, width) float32 sum of a Gram by its name, of which the lower triangle is kept;
    `provenance` is of JSON values.

    Raises:
        InputError: a Gram holds NaN or infinite values, or the file cannot be written.
    """
    grams = list(grams)
    with _writer(path, grams, provenance, counts) as writer:
        for gram in grams:
            if gram.tokens:
                _write_packed(writer, gram, read(gram.name))


def _write_packed(writer: TensorWriter, gram: Gram, square: np.ndarray) -> None:
    def pack(first: int, last: int) -> None:
        packed = np.concatenate([square[row, : row + 1] for row in range(first, last)])
        if not np.isfinite(packed).all():
            raise InputError(
                f"the input of {', '.join(gram.modules)} is NaN or infinite for some token; "
                "a wider --dtype (bfloat16 or float32) may hold it"
            )
        writer.write(gram.name, packed, start=packed_size(first))

    _for_row_blocks(gram.width, pack)


def join_files(path: Path, files: list[GramFile], provenance: dict[str, Any]) -> None:
    """Write the Grams of all `files` as one file, whole or not at all, packed as they are. Only pools may be in several
    files, and are added up.

    Counts are those of the first file.

    Raises:
        InputError: a file cannot be read, or `path` cannot be written.
    """
    grams: dict[str, Gram] = {}
    sources: dict[str, list[GramFile]] = {}
    for file in files:
        for name, gram in file.grams.items():
            if known := grams.get(name):
                gram = replace(gram, modules=known.modules + gram.modules, tokens=known.tokens + gram.tokens)
            grams[name] = gram
            sources.setdefault(name, []).extend([file] if file.grams[name].tokens else [])
    with _writer(path, list(grams.values()), provenance, files[0].counts.values()) as writer:
        for name, gram in grams.items():
            for start in range(0, gram.packed_size, BLOCK_ELEMENTS):
                stop = min(start + BLOCK_ELEMENTS, gram.packed_size)
                packed = [file.read_packed(name, start, stop) for file in sources[name]]
                writer.write(name, sum(packed[1:], start=packed[0]), start)


@contextlib.contextmanager
def _writer(
    path: Path, grams: list[Gram], provenance: dict[str, Any], counts: Iterable[Counts]
) -> Iterator[TensorWriter]:
    counts = list(counts)
    entries = {gram.name: asdict(gram) for gram in grams}
    for entry in entries.values():
        del entry["name"]
        if not entry["pool"]:
            del entry["pool"]
    tables = {table.name: {"tensors": table.tensors, "tied": table.tied} for table in counts}
    texts = {"grams": json.dumps(entries), "counts": json.dumps(tables), "provenance": json.dumps(provenance)}
    version = COUNTED if counts else PLAIN
    version = WITH_EXPERTS if any(gram.pool for gram in grams) else version
    metadata = {"format": FORMAT, "version": version} | texts
    layout = {gram.name: ("F32", (gram.packed_size,)) for gram in grams}
    layout |= {table.name: ("I64", table.values.shape) for table in counts}
    with atomic_path(path) as partial, TensorWriter(partial, layout, metadata) as writer:
        for table in counts:
            writer.write(table.name, table.values)
        yield writer


def convert(source: Path, target: Path) -> None:
    """Write the published Gram file `source` as `target` in this repository's form.

    Raises:
        InputError: `target` exists, or `source` is no whole pickle of square float matrices by name.
    """
    if target.exists():
        raise InputError(f"{target} exists already: remove it, or choose another --output_dir")
    published = PublishedGrams(source)
    write_grams(target, published.grams.values(), published.read, published.provenance)
    modules = sum(len(gram.modules) for gram in published.grams.values())
    print(f"{target}: {len(published.grams)} Grams of {modules} modules")


def packed_size(width: int) -> int:
    """Elements in the lower triangle, diagonal included; also where row `width` starts in the packed form."""
    return width * (width + 1) // 2


def _for_row_blocks(width: int, work: Callable[[int, int], None]) -> None:
    """Call `work` with the first and the last row of each block of rows of a Gram, in threads if there are many."""
    blocks = [(first, min(first + BLOCK_ROWS, width)) for first in range(0, width, BLOCK_ROWS)]
    if len(blocks) < THREADED_BLOCKS:
        for block in blocks:
            work(*block)
        return
    with ThreadPoolExecutor(THREADS) as threads:
        started = [threads.submit(work, *block) for block in blocks]
        try:
            for block in started:
                block.result()
        finally:
            # After an error or a signal, no thread begins another block.
            threads.shutdown(cancel_futures=True)


def _mirror(square: np.ndarray, first: int, last: int) -> None:
    """Copy rows `first` to `last` left of the diagonal to the columns above it, tile by tile."""
    padded = np.empty((BLOCK_ROWS, BLOCK_ROWS + PAD), np.float32)
    for left in range(0, first, BLOCK_ROWS):
        tile = padded[: last - first, :BLOCK_ROWS]
        tile[...] = square[first:last, left : left + BLOCK_ROWS]
        square[left : left + BLOCK_ROWS, first:last] = tile.T
    corner = square[first:last, first:last]
    np.copyto(corner, corner.T.copy(), where=ABOVE[: len(corner), : len(corner)])


def _read_means(path: Path) -> dict[str, np.ndarray]:
    import torch

    from common.pickles import read_pickled

    content = read_pickled(path, by_torch=False)
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: not a published Gram file: expected a dict of module name to Gram")
    for name, gram in content.items():
        square = isinstance(gram, torch.Tensor) and gram.ndim == 2 and gram.shape[0] == gram.shape[1] > 0
        if not square or not gram.dtype.is_floating_point or gram.itemsize < 2:
            raise InputError(f"{path}: the entry {name!r} is no square matrix of floats")
    return {str(name): gram.detach().float().numpy() for name, gram in content.items()}
