"""Forward passes over dev rows, and a verdict for each language from their losses."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.nn.functional as F
from transformers.modeling_outputs import CausalLMOutput

from common.errors import within_memory
from common.logging import progress, say
from common.ranks import Process
from mindmerger.batching import Batch, Tokens, plan_once
from mindmerger.checkpoint import mapping_file, write_verdicts
from mindmerger.evaluation.paired import judge_losses, summary
from mindmerger.token_table import Rows


@dataclass(frozen=True)
class DevPass:
    """Forward passes over dev rows; every method is a collective of all ranks.

    Attributes:
        engine: DeepSpeed's engine of a `MindMergerForCausalLM`.
        batch: function from rows to a batch on this rank's device.
        batch_size: rows of a forward pass.
        process: this rank.
        between: called after each pass.
    """

    engine: deepspeed.DeepSpeedEngine
    batch: Callable[[list[Tokens]], Batch]
    batch_size: int
    process: Process
    between: Callable[[], None]

    def loss(self, dev: Rows) -> tuple[float, float]:
        """Compute the summed loss of all rows, and the number of their target tokens."""
        loss, tokens = 0.0, 0
        for rows, _, output in self._outputs(dev):
            loss += float(output.loss)
            tokens += int(dev.target_lengths[rows].sum())
        loss, tokens = self.process.sum(loss, tokens)
        return loss, tokens

    def row_losses(self, dev: Rows) -> np.ndarray:
        """Compute the summed loss of each row."""
        losses = np.zeros(len(dev))
        for rows, batch, output in self._outputs(dev):
            each = F.cross_entropy(output.logits, batch.labels, reduction="none").double().cpu()
            losses[rows] = [float(own.sum()) for own in each.split(dev.target_lengths[rows].tolist())]
        return np.array(self.process.sum(*losses))

    def judge(self, dev: Rows, alone: Rows, folder: Path) -> None:
        """Write a verdict by language to the config in `folder`, whose mapping the model must have.

        Args:
            dev, alone: the dev rows with mapped states, and as the LLM alone reads them.
            folder: folder of the mapping.
        """
        losses = self.row_losses(dev), self.row_losses(alone)
        if self.process.is_main:
            judged = judge_losses(dev.row_languages(), *losses, dev.target_lengths)
            write_verdicts(mapping_file(folder), judged)
            say(self.process, f"dev rows with the mapping, against the LLM alone: {summary(judged)}")
        self.process.barrier()

    def _outputs(self, dev: Rows) -> Iterator[tuple[list[int], Batch, CausalLMOutput]]:
        """Yield this rank's rows batch by batch, with the model's output, whose `loss` is summed."""
        plan = plan_once(dev.lengths, self.batch_size, self.process.world_size)
        for rows in progress(self.process, plan[self.process.rank], desc="dev", leave=False):
            # A rank without rows runs one: under ZeRO-3 other ranks need its part of the weights.
            batch = self.batch(dev.tokens(rows or [0]))
            output = self._forward(batch)
            if rows:
                yield rows, batch, output
            self.between()

    @torch.no_grad()
    def _forward(self, batch: Batch) -> CausalLMOutput:
        with within_memory(
            f"out of memory in an evaluation, with a batch of {len(batch.lengths)} dev rows; saved files are kept. Use "
            f"an --eval_batch_size below {self.batch_size}, or lower --max_seq_len, --max_prompt_len or --max_gen_len"
        ):
            return self.engine(batch=batch, num_items_in_batch=1.0)
