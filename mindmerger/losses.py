"""The loss of a batch: cross entropy at the targets, and a divergence from the LLM alone on replayed rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from mindmerger.batching import Batch, Tokens, to_device

if TYPE_CHECKING:
    from mindmerger.token_table import Rows


@dataclass(frozen=True)
class Replayed:
    """Rows of a batch whose targets are the LLM's own answers to the prompt alone.

    Attributes:
        positions: int64, positions of their target tokens in the labels of the batch.
        alone: the same rows without mapped states; None without a divergence.
        weight: weight of their cross entropy.
        kl_weight: weight of KL(LLM alone || LLM with the mapping) at their targets.
    """

    positions: torch.Tensor
    alone: Batch | None
    weight: float
    kl_weight: float

    def summed_loss(self, run: Callable[[Batch], torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Run the LLM alone if needed; return a function from logits and labels of the batch to its summed loss.

        Args:
            run: function from a batch to the LLM's logits at its labels.
        """
        alone = None
        if self.alone is not None:
            with torch.no_grad():
                alone = run(self.alone)

        def summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            weights = torch.ones_like(logits[:, 0]).index_fill(0, self.positions, self.weight)
            total = (F.cross_entropy(logits, labels, reduction="none") * weights).sum()
            if alone is None:
                return total
            mapped = logits.index_select(0, self.positions).log_softmax(dim=-1)
            wanted = alone[: len(mapped)].float().log_softmax(dim=-1)
            return total + self.kl_weight * F.kl_div(mapped, wanted, reduction="sum", log_target=True)

        return summed


@dataclass(frozen=True)
class ReplayLoss:
    """Weights of the loss on replayed rows, and the layout of these rows in a micro batch.

    Attributes:
        weight, kl_weight: as in `Replayed`.
        lay_out: function from rows to a batch on the CPU, without mapped states.
        in_step: True if all ranks must run the LLM equally often, as under ZeRO-3.
    """

    weight: float
    kl_weight: float
    lay_out: Callable[[list[Tokens]], Batch]
    in_step: bool

    def of(
        self, train: "Rows", rows: list[int], micro_batches: list[list[int]], device: torch.device
    ) -> Replayed | None:
        """Lay out the replayed ones of a rank's `rows`; None if nothing is to be done for them.

        Args:
            train: training rows.
            rows: rows that this rank runs, at least one.
            micro_batches: rows of the micro batch on each rank.
            device: device of the result.
        """
        if not train.replayed[[row for of_rank in micro_batches for row in of_rank]].any():
            return None
        chosen, alone = [row for row in rows if train.replayed[row]], None
        if not chosen and not (self.in_step and self.kl_weight):
            return None
        if self.kl_weight:
            # A rank without such rows runs the LLM on its first row.
            alone = self.lay_out(train.tokens(chosen or rows[:1])).to(device)
        positions = torch.from_numpy(np.flatnonzero(np.repeat(train.replayed[rows], train.target_lengths[rows])))
        return Replayed(to_device(positions, device), alone, self.weight, self.kl_weight)
