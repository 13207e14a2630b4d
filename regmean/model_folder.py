"""Model folders in Hugging Face's layout: read tensor by tensor, and written whole."""

import contextlib
import filecmp
import hashlib
import math
import shutil
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import InputError, first_line
from common.io import inside, read_json, read_shard_index, write_json
from regmean.tensor_file import FLOATS, STORAGE, TensorFile, TensorInfo, TensorWriter, decode, round_to

if TYPE_CHECKING:
    from huggingface_hub import StateDictSplit

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
FINGERPRINT_ELEMENTS = 256
# Everything a model folder needs beside its weights: settings, tokenizer, templates, code of its own, terms of use.
COMPANIONS = (
    *("*.json", "*.jinja", "*.txt", "*.model", "*.py", "LICENSE*", "NOTICE*"),
    *("*.tiktoken", "*.codes", "*.bpe", "*.spm", "*.vocab", "*.tokenizer"),
)
# Folders of further chat templates and of Sentence-Transformers modules, which are copied whole.
FOLDERS = ("additional_chat_templates/*", "[0-9]_*/*")
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
NOT_COMPANIONS = ("*.index.json", "config.json", "merge_report.json", "trainer_state.json", ADAPTER)
# A second copy of the weights in some repositories, adapters, and other folders; * in a pattern also matches slashes.
NOT_DOWNLOADED = (
    *("consolidated*", "adapter_model*", "[!0-9a]*/*", "[0-9][!_]*/*"),
    *("a[!d]*/*", "ad[!d]*/*", "a*/*.safetensors"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its name as the user wrote it, its folder and `config.json`. Tensors are headers until read.

    `untied` is True if `config` unties output head and table, and the folder's own does not.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo] = field(repr=False)
    untied: bool = field(default=False, kw_only=True)

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of the tokenizer."""
        return self.folder

    def files(self) -> set[Path]:
        """All files that the weights are read from."""
        return {info.path for info in self.tensors.values()}

    def changed(self) -> set[str]:
        """Names of tensors that differ from those in the folder."""
        return set()

    def origin(self) -> dict[str, Any]:
        """Names, for reports."""
        return {"model": self.name}

    def revision(self) -> str | None:
        """Commit of a downloaded model, which its folder is named by; None for others."""
        return commit(self.folder)

    def companions(self) -> dict[Path, Path]:
        """Files to copy into a merge, with their paths there."""
        return companions(self.folder)

    def fingerprint(self) -> str:
        """Hex digest of the first elements of every tensor in bfloat16, which identifies the weights.

        Equal for a copy in other shards or in another dtype; different after full fine-tuning.

        Raises:
            InputError: a tensor cannot be read.
        """
        digest = hashlib.sha256()
        # A tied output head may or may not be stored.
        tied = {"lm_head.weight"} if self.config.get("tie_word_embeddings") is True else set()
        for name, info in sorted(self.tensors.items()):
            if info.dtype in FLOATS and name not in tied:
                head = decode(info.read(0, min(FINGERPRINT_ELEMENTS, info.size)), info.dtype)
                digest.update(f"{name} {info.shape} ".encode() + round_to(head, "BF16").tobytes())
        return digest.hexdigest()


def commit(folder: Path) -> str | None:
    return folder.name if folder.parent.name == "snapshots" else None


def locate_model(name: str, revision: str | None = None, adapter: bool = False) -> Path:
    """Local folder of a model, which is downloaded first if `name` is a hub id; of an `adapter`, its weights alone.

    Raises:
        InputError: neither a folder nor a model that can be downloaded.
    """
    with contextlib.suppress(OSError):  # the name may be too long for a path
        if Path(name).is_dir():
            return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = {"allow_patterns": [*COMPANIONS, *FOLDERS, "*.safetensors"], "ignore_patterns": [*NOT_DOWNLOADED]}
    patterns = {"allow_patterns": [ADAPTER_WEIGHTS]} if adapter else patterns
    try:
        return Path(snapshot_download(name, revision=revision, **patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"model {name}: no such folder here, and the download failed: {first_line(error)}") from error


def is_adapter(folder: Path) -> bool:
    """True if a folder holds an adapter and no whole weights. Beside whole weights an adapter is ignored."""
    return (folder / ADAPTER).exists() and not any((folder / file).exists() for file in (SINGLE_NAME, INDEX_NAME))


def open_checkpoint(name: str, revision: str | None = None, folder: Path | None = None) -> Checkpoint:
    """Read and check the config and the headers of the model `name`, which is no adapter, in its `folder` if known.

    Raises:
        InputError: no config, no safetensors weights, a shard missing, truncated or outside the folder.
    """
    folder = folder or locate_model(name, revision)
    weights = [file for file in (SINGLE_NAME, INDEX_NAME) if (folder / file).exists()]
    if is_adapter(folder):
        raise InputError(
            f"model {name} is an adapter ({ADAPTER}) and no whole model: merge it into its base model, as with peft's "
            "merge_and_unload, save that, and take the saved folder"
        )
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'}: expected an object")
    if config.get("quantization_config"):
        raise InputError(f"model {name} is quantised; take the unquantised weights")
    # A single file takes precedence over an index, as in transformers, which computes the Grams.
    if weights[:1] == [SINGLE_NAME]:
        files, names = [SINGLE_NAME], set()
    elif weights:
        weight_map = read_shard_index(folder / INDEX_NAME)
        files, names = sorted(set(weight_map.values())), set(weight_map)
    else:
        raise InputError(f"model {name}: {folder} holds no {SINGLE_NAME}; save it in that form first")
    tensors = {key: info for file in files for key, info in TensorFile(inside(folder, file)).tensors.items()}
    if missing := sorted(names - set(tensors)):
        raise InputError(f"{folder / INDEX_NAME}: tensor {missing[0]} is in none of the files")
    return Checkpoint(name, folder, config, tensors)


def split_layout(layout: dict[str, tuple[str, tuple[int, ...]]], max_shard_size: str) -> "StateDictSplit":
    """Split the tensors of a layout into weight files, as the hub's library does.

    Raises:
        InputError: `max_shard_size` ("5GB") cannot be read.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    sizes = {name: math.prod(shape) * STORAGE[dtype].itemsize for name, (dtype, shape) in layout.items()}
    options = {"get_storage_size": lambda size: size, "filename_pattern": "model{suffix}.safetensors"}
    try:
        return split_state_dict_into_shards_factory(sizes, **options, max_shard_size=max_shard_size)
    except ValueError as error:
        raise InputError(f"--max_shard_size {max_shard_size}: {error}; as in 5GB or 500MB") from error


def untied_config(config: dict[str, Any]) -> dict[str, Any]:
    """The content of a `config.json` with an output head apart from the embedding table."""
    config, text = config | {"tie_word_embeddings": False}, config.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        config["text_config"] = text | {"tie_word_embeddings": False}
    return config


class CheckpointWriter:
    """Fills an empty folder with a model: sharded safetensors of `layout` (dtype and shape of every tensor), and the
    config, the tokenizer and the templates of `source`. Its config gets another `dtype` if one is given, and
    `tie_word_embeddings` false if it is `untied`.

    Several writers of one folder have some of the weight files each, `files`; the first, `is_main`, has all the rest.
    """

    def __init__(
        self,
        folder: Path,
        layout: dict[str, tuple[str, tuple[int, ...]]],
        source: Checkpoint,
        dtype: str | None,
        max_shard_size: str,
        untied: bool = False,
        files: Collection[str] | None = None,
        is_main: bool = True,
    ):
        self._folder, self._is_main = folder, is_main
        self._split = split_layout(layout, max_shard_size)
        self._lock = threading.Lock()
        self._writers = {
            file: TensorWriter(folder / file, {name: layout[name] for name in names}, {"format": "pt"})
            for file, names in self._split.filename_to_tensors.items()
            if files is None or file in files
        }
        self._files = set(self._writers)
        if is_main:
            self._copy_rest(source, dtype, untied)

    def _copy_rest(self, source: Checkpoint, dtype: str | None, untied: bool) -> None:
        """Write the config, and copy all that is not weights."""
        folder = self._folder
        config = dict(source.config)
        if dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = dtype
        write_json(folder / "config.json", untied_config(config) if untied else config)
        for path, relative in source.companions().items():
            target = folder / relative
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)

    def file_of(self, name: str) -> str:
        """Name of the tensor's file."""
        return self._split.tensor_to_filename[name]

    def holds(self, name: str) -> bool:
        """True if this writer has the tensor's file."""
        return self.file_of(name) in self._files

    def write(self, name: str, values: np.ndarray, start: int = 0) -> None:
        """Write a part of a tensor, see `TensorWriter.write`."""
        self._writers[self.file_of(name)].write(name, values, start)

    def close_whole(self) -> list[tuple[str, list[str]]]:
        """Close the files that have become whole; return their names, and those of their tensors."""
        with self._lock:
            whole = [file for file, writer in self._writers.items() if writer.is_whole]
            for file in whole:
                self._writers.pop(file).close()
        return [(file, self._split.filename_to_tensors[file]) for file in whole]

    def close(self) -> None:
        """Finish every file."""
        for writer in self._writers.values():
            writer.close()
        if self._is_main and self._split.is_sharded:
            index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
            write_json(self._folder / INDEX_NAME, index)


def companions(folder: Path) -> dict[Path, Path]:
    """Files beside the weights to copy into a merge, with their paths relative to `folder`."""
    return {path: path.relative_to(folder) for path in _companions(folder)}


def _companions(folder: Path) -> Iterator[Path]:
    for path in (path for pattern in COMPANIONS for path in folder.glob(pattern)):
        if path.is_file() and not any(path.match(other) for other in NOT_COMPANIONS):
            yield inside(folder, path.name)
    root = folder.resolve()
    # The files of a hub download are links to its own folder `blobs`.
    root = root.parent.parent if root.parent.name == "snapshots" else root
    for path in (path for pattern in FOLDERS for path in folder.glob(pattern)):
        if path.is_file():
            if not path.resolve().is_relative_to(root):
                raise InputError(f"{path} is a link to {path.resolve()}, outside its folder: put the file itself there")
            yield path


def same_tokenizer_file(first: Checkpoint, second: Checkpoint) -> bool:
    """True if both have a `tokenizer.json` with identical bytes."""
    paths = [checkpoint.tokenizer_folder / "tokenizer.json" for checkpoint in (first, second)]
    return all(path.is_file() for path in paths) and filecmp.cmp(*paths, shallow=False)


def base_vocabulary(checkpoint: Checkpoint) -> tuple[Any, dict[int, str]] | None:
    """The tokenizer's base vocabulary and its added tokens by id; None if there is no `tokenizer.json`."""
    path = checkpoint.tokenizer_folder / "tokenizer.json"
    if not path.exists():
        return None
    content = read_json(path)
    try:
        added = {int(token["id"]): token["content"] for token in content["added_tokens"]}
        vocabulary = content["model"]["vocab"]
        if not isinstance(vocabulary, dict | list):
            raise TypeError("a vocabulary")
        return vocabulary, added
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # the last for an id of infinity
        raise InputError(f"{path}: not a tokenizer file: {error!r} is missing") from error
