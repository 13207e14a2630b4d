"""Addition of batches of examples to the sums of layers, in halves if memory runs out."""

from collections.abc import Iterable
from typing import Self

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from common.errors import InputError, is_out_of_memory
from regmean.calibration import Calibration, collate
from regmean.gram import Added, GramSums
from regmean.hooks import Layer, LinearInputs


class TooLargeError(Exception):
    """Raised if one example does not fit into memory beside the sums."""


class BatchRunner:
    """Context manager that runs batches of examples, adds the inputs of `layers` to `sums`, and checks them.

    Args:
        layers: the layers whose inputs are summed, by name.
        padding: True if every layer reads every token, so that padding rows can be identified.
        tokens_per_batch: maximum, padding included; halved if memory runs out. Larger batches are run in halves.
        alone: layers that share no input.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: dict[str, Layer],
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

        # Not a method: a reference cycle would keep the sums alive after their pass.
        def receive(name: str, rows: torch.Tensor) -> None:
            # A finite sum has finite terms only. In float32, since half precision would overflow.
            row_sums[name] = rows.sum(dim=1, dtype=torch.float32)
            sums.add(name, rows)

        # If every layer reads every token, all forward passes call the same layers.
        head = model.get_output_embeddings()
        self._inputs = LinearInputs(layers, head, receive, padding, sums.shared_name, set(alone))

    def __enter__(self) -> Self:
        self._inputs.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._inputs.__exit__(*raised)

    def add(self, batch: list[int]) -> None:
        """Add the examples of these indices, the longest first.

        Raises:
            InputError: the input of a layer has NaN or infinity; the message names the first such layer.
            TooLargeError: one of the examples does not fit into memory; the sums include a part of the batch.
        """
        self._add(batch, {})

    def _add(self, batch: list[int], added: Added) -> None:
        """Add a batch, except for the parts listed in `added`."""
        tokens = len(batch) * len(self._calibration.examples[batch[0]])
        if len(batch) == 1 or tokens <= self.tokens_per_batch:
            self._sums.begin(added)
            if self._fits(batch):
                return
            if len(batch) == 1:
                raise TooLargeError
            added = self._sums.added
            self.tokens_per_batch = tokens // 2
            tqdm.write(f"out of memory with a batch of {tokens} tokens: continuing with {self.tokens_per_batch}")
        half = len(batch) // 2
        for part in (batch[:half], batch[half:]):
            self._add(part, added)

    def _fits(self, batch: list[int]) -> bool:
        """Run a batch; False if memory runs out."""
        try:
            self._run(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True
        # Outside the except block, where no traceback holds activations.
        torch.cuda.empty_cache()
        return False

    def _run(self, batch: list[int]) -> None:
        ids, mask = collate([self._calibration.examples[index] for index in batch])
        owners, real = mask.nonzero()[:, 0], mask.flatten().nonzero().flatten()
        device, row_sums = self._device, self._row_sums
        row_sums.clear()
        real = real.to(device) if len(real) < mask.numel() else None
        self._inputs.run(self._model, ids.to(device), mask.to(device), real)
        # One check for all layers, since each check synchronizes.
        if not row_sums or torch.cat(list(row_sums.values())).isfinite().all():
            return
        layer, rows = next((name, finite) for name, sums in row_sums.items() if not (finite := sums.isfinite()).all())
        # An expert reads some rows of the batch, in its own order: then any of the examples may be the cause.
        suspects = owners[~rows.cpu()].unique().tolist() if len(rows) == len(owners) else range(len(batch))
        examples = ", ".join(str(self._calibration.rows[batch[suspect]]) for suspect in suspects)
        raise InputError(
            f"the input of {layer} is NaN or infinite in row(s) {examples} of the data set (from 0): correct or remove "
            "these rows, or take a wider --dtype (bfloat16 or float32)"
        )
