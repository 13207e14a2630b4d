"""Calibration texts: rows of a data set -> token ids -> batches of a bounded number of tokens."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from common.errors import InputError, first_line
from regmean.config import GramFlags

FILE_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Calibration:
    """What the Grams are computed from.

    Attributes:
        examples: token ids of each text, none empty.
        rows: of the data set, from 0, that the examples are.
        truncated: how many were cut at the length limit.
        empty: how many rows had no tokens and were left out.
    """

    examples: list[list[int]]
    rows: list[int]
    truncated: int
    empty: int

    @property
    def tokens(self) -> int:
        """How many all examples have together."""
        return sum(map(len, self.examples))

    def digest(self) -> str:
        """Hex digest of every token id, so that a run is continued on the same examples only."""
        return hashlib.sha256(json.dumps(self.examples).encode()).hexdigest()


def load_calibration(flags: GramFlags, tokenizer: PreTrainedTokenizerBase) -> Calibration:
    """The first `--num_examples` rows of the data set, tokenised: every special token once, cut at `--max_length`.

    Raises:
        InputError: no such data set, split or column; a value that is no text; no chat template; nothing left.
    """
    rows = _load_rows(flags)
    columns = [flags.text_column] if flags.text_column else flags.chat_columns()
    for column in columns:
        if column not in rows.column_names:
            raise InputError(f"--dataset {flags.dataset}: no column {column!r}; it has {', '.join(rows.column_names)}")
    if not flags.text_column and tokenizer.chat_template is None:
        raise InputError(f"--model {flags.model} has no chat template; give --text_column for plain text")

    examples: list[list[int]] = []
    numbers: list[int] = []
    truncated = empty = 0
    for number, row in enumerate(rows.select_columns(columns)):
        for column in columns:
            if row[column] is not None and not isinstance(row[column], str):
                raise InputError(f"--dataset {flags.dataset}: row {number}, column {column!r} is no text")
        try:
            ids = (
                _plain_ids(tokenizer, row[columns[0]] or "") if flags.text_column else _chat_ids(tokenizer, flags, row)
            )
        except TemplateError as error:
            raise InputError(
                f"--dataset {flags.dataset}: row {number}: the chat template of --model {flags.model} refuses it: "
                f"{first_line(error)}; leave a column out, as --system_column, or give --text_column for plain text"
            ) from error
        truncated += len(ids) > flags.max_length
        if ids:
            examples.append(ids[: flags.max_length])
            numbers.append(number)
        else:
            empty += 1
    if not examples:
        raise InputError(f"--dataset {flags.dataset}: no row has any text in {', '.join(columns)}")
    return Calibration(examples, numbers, truncated, empty)


def make_batches(lengths: list[int], tokens_per_batch: int, padding: bool) -> list[list[int]]:
    """Indices of examples, longest first, in batches of at most `tokens_per_batch` tokens, padding included.

    Args:
        lengths: tokens of each example; an example above the budget is a batch of its own.
        tokens_per_batch: the budget.
        padding: False puts examples of one length only into a batch, for models that mix tokens up.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[batches[-1][0]] if batches else 0
        fits = batches and (len(batches[-1]) + 1) * longest <= tokens_per_batch
        if fits and (padding or lengths[index] == longest):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def collate(examples: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both int64 of shape (examples, longest), padded on the right.

    A decoder's real tokens never see what follows them, so right padding leaves them as they are without any;
    padding ids are 0, which every vocabulary has.
    """
    longest = max(map(len, examples))
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = torch.tensor(example)
        mask[row, : len(example)] = 1
    return ids, mask


def _load_rows(flags: GramFlags) -> Any:
    import datasets  # takes a second to import

    datasets.disable_progress_bars()
    path = Path(flags.dataset)
    wanted = f"{flags.split}[:{flags.num_examples}]"
    try:
        if path.is_file():
            if path.suffix not in FILE_READERS:
                raise InputError(f"--dataset {path}: expected one of {', '.join(FILE_READERS)}")
            return datasets.load_dataset(FILE_READERS[path.suffix], data_files={flags.split: str(path)}, split=wanted)
        if (path / "state.json").exists():
            saved = datasets.load_from_disk(str(path))
            return saved.select(range(min(flags.num_examples, len(saved))))
        return datasets.load_dataset(flags.dataset, revision=flags.dataset_revision, split=wanted)
    except InputError:
        raise
    except Exception as error:  # `datasets` raises errors of many libraries for one unreadable source
        raise InputError(
            f"--dataset {flags.dataset} --split {flags.split}: cannot be loaded: {first_line(error)}"
        ) from error


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = tokenizer(text, verbose=False)["input_ids"]
    # A text that spells out its own bos would otherwise start with two.
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        return ids[1:]
    return ids


def _chat_ids(tokenizer: PreTrainedTokenizerBase, flags: GramFlags, row: dict[str, str | None]) -> list[int]:
    messages = [
        {"role": role, "content": row[column]} for role, column in flags.roles().items() if row[column] is not None
    ]
    if not messages:
        return []
    # The template writes the special tokens itself; the tokenizer must not add them again.
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
