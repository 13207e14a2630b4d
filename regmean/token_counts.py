"""Embedding tables whose rows are counted over calibration texts, and their counts.

A table is counted if a forward pass reads it at the token ids (the input embeddings, tables for each layer) or at one
row after another (learned positions). A few tokens show which tables these are, and the row of a text's first token,
which is 2 in OPT's positions.
"""

from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from common.errors import is_out_of_memory
from regmean.calibration import Calibration, collate
from regmean.gram_file import Counts

TOKENS = 4  # of the forward pass that finds the tables


@dataclass(frozen=True)
class Table:
    """An embedding table: the name of its module, and its number of rows.

    Attributes:
        head: the name of the output head, if the table is its weight as well.
        first: the row of a text's first token in a table of positions; None if rows are token ids.
    """

    module: str
    rows: int
    head: str | None = None
    first: int | None = None

    def counts(self, calibration: Calibration, tensors: dict[str, set[str]]) -> Counts:
        """Number of tokens that read each row; `tensors` as from `layer_tensors`.

        In `tensors`, the table's tensors become those of the head, if there is one.
        """
        stored = [name for name, owners in tensors.items() if not owners.isdisjoint({self.module, self.head})]
        if self.head is not None:
            tensors |= {name: {self.head} for name in stored}
        if self.first is None:
            values = np.bincount(np.concatenate(calibration.examples), minlength=self.rows)
        else:
            # Position j is read once for each text of more than j tokens.
            of_length = np.bincount([len(example) for example in calibration.examples])
            values = np.append(np.zeros(self.first), of_length[::-1].cumsum()[-2::-1])
        values = np.pad(values, (0, max(0, self.rows - len(values))))[: self.rows]
        return Counts(f"counts.{self.module}", tuple(stored), self.head is not None, values.astype(np.int64))


def find_tables(model: PreTrainedModel, calibration: Calibration) -> list[Table]:
    """The tables of a model whose rows are counted."""
    padding = model.config.get_text_config().pad_token_id
    # In descending order, tokens are neither positions nor the one type that all tokens have.
    chosen = sorted(set().union(*calibration.examples) - {padding}, reverse=True)[:TOKENS]
    if len(chosen) < 2:
        return []
    ids, mask = (tensor.to(model.device) for tensor in collate([chosen]))
    head = model.get_output_embeddings()
    ends = nullcontext() if head is None else head.register_forward_pre_hook(_end)
    try:
        with suppress(_Ended), ends, torch.no_grad(), _Lookups() as lookups:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return []  # texts take more memory, so that the run ends with advice
    names = {id(module): name for name, module in model.named_modules()}
    tables = []
    for name, weight in model.named_parameters():
        rows, module = lookups.rows.get(id(weight), []), name.removesuffix(".weight")
        tied = names[id(head)] if head is not None and head.weight is weight else None
        if rows and all(each == chosen for each in rows):
            tables.append(Table(module, len(weight), tied))
        elif rows and all(each == list(range(each[0], each[0] + len(chosen))) for each in rows):
            tables.append(Table(module, len(weight), tied, rows[0][0]))
    return tables


class _Ended(Exception):
    """Raised to end a forward pass before the logits."""


def _end(module: nn.Module, args: tuple) -> None:
    raise _Ended


class _Lookups(TorchFunctionMode):
    """Records the rows that are read of each embedding table, in order, by the id of the table."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, list[list[int]]] = {}

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.nn.functional.embedding:
            self.rows.setdefault(id(args[1]), []).append(args[0].flatten().tolist())
        return function(*args, **(kwargs or {}))
