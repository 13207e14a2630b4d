"""Calibration texts: rows of a data set -> token ids -> batches of a bounded number of tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from common.errors import InputError, first_line
from regmean.config import TextSource

FILE_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Calibration:
    """Calibration texts: their token ids, none empty, and the row number of each in the data set.

    `truncated` of them were cut at the length limit; `empty` rows had no tokens and were left out.
    """

    examples: list[list[int]]
    rows: list[int]
    truncated: int
    empty: int

    @property
    def tokens(self) -> int:
        """Number of tokens in all examples."""
        return sum(map(len, self.examples))

    def summary(self, max_length: int) -> str:
        """Line of counts for the terminal."""
        counts = f"{len(self.examples):,} examples, {self.tokens:,} tokens"
        return f"{counts}; {self.truncated:,} cut at {max_length} tokens, {self.empty:,} empty"


def load_calibration(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> Calibration:
    """Load and tokenise the texts of `source`: every special token once, cut at the length limit.

    Raises:
        InputError: no such data set, split or column; a value that is not text; no chat template; no text left.
    """
    rows = _load_rows(source)
    columns = list(source.columns.values())
    if lacking := [column for column in columns if column not in rows.column_names]:
        raise InputError(f"--dataset {source.dataset}: no column {lacking[0]!r}; it has {', '.join(rows.column_names)}")
    is_chat = "text" not in source.columns
    if is_chat and tokenizer.chat_template is None:
        raise InputError(f"--model {tokenizer.name_or_path} has no chat template; give --text_column for plain text")

    examples: list[list[int]] = []
    numbers: list[int] = []
    truncated = 0
    for number, row in enumerate(rows.select_columns(columns)):
        texts = {key: row[column] for key, column in source.columns.items() if row[column] is not None}
        if wrong := [source.columns[key] for key, text in texts.items() if not isinstance(text, str)]:
            raise InputError(f"--dataset {source.dataset}: row {number}, column {wrong[0]!r} is no text")
        try:
            ids = _chat_ids(tokenizer, texts) if is_chat else _plain_ids(tokenizer, texts.get("text", ""))
        except TemplateError as error:
            refused = f"the chat template of --model {tokenizer.name_or_path} refuses it: {first_line(error)}"
            raise InputError(
                f"--dataset {source.dataset}: row {number}: {refused}; leave a column out, as --system_column, or give "
                "--text_column for plain text"
            ) from error
        truncated += len(ids) > source.max_length
        if ids:
            examples.append(ids[: source.max_length])
            numbers.append(number)
    if not examples:
        raise InputError(f"--dataset {source.dataset}: no row has any text in {', '.join(columns)}")
    return Calibration(examples, numbers, truncated, empty=len(rows) - len(examples))


def check_tokens(calibration: Calibration, table: nn.Module) -> None:
    """Check that every token has a row in a model's embedding table.

    Raises:
        InputError: a token has none.
    """
    size = table.weight.shape[0]
    for row, example in zip(calibration.rows, calibration.examples, strict=True):
        if max(example) >= size:
            raise InputError(
                f"row {row} of the data set (from 0) has the token {max(example)}, and the embedding table of --model "
                f"has {size} rows: take the model's own tokenizer"
            )


def check_length(calibration: Calibration, positions: int | None) -> None:
    """Check that a model with this number of positions takes the longest text; None is no limit.

    Raises:
        InputError: it does not.
    """
    row, longest = max(zip(calibration.rows, calibration.examples, strict=True), key=lambda example: len(example[1]))
    if positions is not None and 0 < positions < len(longest):
        text = f"row {row} of the data set (from 0) has {len(longest)} tokens"
        raise InputError(f"{text}, and the model has positions for {positions}: --max_length {positions} cuts it")


def make_batches(lengths: list[int], tokens_per_batch: int, padding: bool) -> list[list[int]]:
    """Indices of examples, longest first, in batches of at most `tokens_per_batch` tokens, padding included.

    A longer example is a batch of its own. Without `padding`, for models that reorder tokens, all examples of a batch
    have the same length.
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

    Real tokens of a decoder do not attend to later positions, so right padding does not change them. Padding ids are
    0, which every vocabulary has.
    """
    ids = pad_sequence([torch.tensor(example) for example in examples], batch_first=True)
    mask = pad_sequence([torch.ones(len(example), dtype=torch.long) for example in examples], batch_first=True)
    return ids, mask


def _load_rows(source: TextSource) -> Any:
    import datasets  # takes a second to import

    datasets.disable_progress_bars()
    path, named = Path(source.dataset), f"--dataset {source.dataset} --split {source.split}"
    is_saved = (path / "state.json").exists()
    if path.is_file() and path.suffix not in FILE_READERS:
        raise InputError(f"--dataset {path}: expected one of {', '.join(FILE_READERS)}")
    try:
        if path.is_file():
            files = {source.split.partition("[")[0]: str(path)}
            rows = datasets.load_dataset(FILE_READERS[path.suffix], data_files=files, split=source.split)
        elif is_saved:
            rows = datasets.load_from_disk(str(path))
        else:
            rows = datasets.load_dataset(source.dataset, revision=source.revision, split=source.split)
    except Exception as error:  # `datasets` raises errors of many libraries for one unreadable source
        raise InputError(f"{named}: cannot be loaded: {first_line(error)}") from error
    if is_saved and source.split not in ("train", str(rows.split).partition("[")[0]):
        raise InputError(f"{named}: the folder holds one split, {rows.split or 'without a name'}: leave --split out")
    return rows.select(range(min(source.num_examples, len(rows))))


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = tokenizer(text, verbose=False)["input_ids"]
    # A text that contains its own bos would otherwise start with two.
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        return ids[1:]
    return ids


def _chat_ids(tokenizer: PreTrainedTokenizerBase, texts: dict[str, str]) -> list[int]:
    if not texts:
        return []
    messages = [{"role": role, "content": text} for role, text in texts.items()]
    # The template writes the special tokens itself; the tokenizer must not add them again.
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
