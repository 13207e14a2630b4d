"""Batches of examples into the sums of some layers, in halves where memory runs out."""

from collections.abc import Iterable
from typing import Self

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from common.errors import InputError
from common.ranks import is_out_of_memory
from regmean.calibration import Calibration, collate
from regmean.gram import Added, GramSums
from regmean.hooks import LinearInputs


class TooLargeError(Exception):
    """Memory does not hold one example beside the sums."""


class BatchRunner:
    """Runs batches of examples, adds what `layers` read to `sums`, and checks it; a context manager, for its hooks.

    Args:
        layers: by name; `sums` is to have their inputs.
        padding: whether every layer reads every token, so that padding can be told from tokens.
        tokens_per_batch: padding included. A larger batch is run in halves; where memory runs out it is halved.
        alone: layers that share no input.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: dict[str, nn.Module],
        calibration: Calibration,
        device: torch.device,
        sums: GramSums,
        padding: bool,
        tokens_per_batch: int,
        alone: Iterable[str] = (),
    ):
        self.tokens_per_batch = tokens_per_batch
        self._model, self._calibration, self._device, self._sums = model, calibration, device, sums
        self._row_sums = row_sums = {}

        # No method: a cycle of references would keep the sums beyond their pass.
        def receive(name: str, rows: torch.Tensor) -> None:
            # A sum is finite where every term is; in float32, since half precision would overflow.
            row_sums[name] = rows.sum(dim=1, dtype=torch.float32)
            sums.add(name, rows)

        # Where every layer reads every token, no forward pass calls other layers than the one before.
        head = model.get_output_embeddings()
        self._inputs = LinearInputs(layers, head, receive, padding, sums.shared_name, set(alone))

    def __enter__(self) -> Self:
        self._inputs.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._inputs.__exit__(*raised)

    def add(self, batch: list[int]) -> None:
        """Add the examples of these indices, of which the first is the longest.

        Raises:
            InputError: a layer, the first of the forward pass is named, read NaN or infinity.
            TooLargeError: memory does not hold one of the examples; the sums have a part of the batch.
        """
        self._add(batch, {})

    def _add(self, batch: list[int], added: Added) -> None:
        """Add a batch but for what `added` has of it."""
        tokens = len(batch) * len(self._calibration.examples[batch[0]])
        if len(batch) == 1 or tokens <= self.tokens_per_batch:
            self._sums.begin(added)
            if self._fits(batch):
                return
            if len(batch) == 1:
                raise TooLargeError
            added = self._sums.added
            self.tokens_per_batch = tokens // 2
            tqdm.write(f"out of memory with a batch of {tokens} tokens: going on with {self.tokens_per_batch}")
        half = len(batch) // 2
        for part in (batch[:half], batch[half:]):
            self._add(part, added)

    def _fits(self, batch: list[int]) -> bool:
        """Run a batch; False where memory has run out."""
        try:
            self._run(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True
        # Here, where no traceback holds activations.
        torch.cuda.empty_cache()
        return False

    def _run(self, batch: list[int]) -> None:
        ids, mask = collate([self._calibration.examples[index] for index in batch])
        owners, real = mask.nonzero()[:, 0], mask.flatten().nonzero().flatten()
        device, row_sums = self._device, self._row_sums
        row_sums.clear()
        real = real.to(device) if len(real) < mask.numel() else None
        self._inputs.run(self._model, ids.to(device), mask.to(device), real)
        # One look for all layers: each makes a GPU's queue run empty.
        if not row_sums or torch.cat(list(row_sums.values())).isfinite().all():
            return
        layer, rows = next((name, finite) for name, sums in row_sums.items() if not (finite := sums.isfinite()).all())
        # An expert's rows are some of the batch's, in its own order: then any of the examples may be the one.
        suspects = owners[~rows.cpu()].unique().tolist() if len(rows) == len(owners) else range(len(batch))
        examples = ", ".join(str(self._calibration.rows[batch[suspect]]) for suspect in suspects)
        raise InputError(
            f"the input of {layer} is NaN or infinite in row(s) {examples} of the data set (from 0): mend or leave out "
            "these rows, or take a wider --dtype (bfloat16 or float32)"
        )
