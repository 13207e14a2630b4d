"""The training loop: steps, validation and saved states."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch

from common.errors import InputError, Stopped, within_memory
from common.logging import Metrics, progress, say
from common.ranks import Process
from common.signals import StopSignals
from mindmerger.batching import Batch, Tokens, plan_epoch
from mindmerger.checkpoint import read_mapping, write_mapping
from mindmerger.config import BatchSizes
from mindmerger.dev import DevPass
from mindmerger.losses import ReplayLoss
from mindmerger.token_table import Rows
from mindmerger.train_state import SavedStates, TrainState
from mindmerger.zero import MappingState

STATE = "state"
# Number of steps in a row without a finite loss and gradient that ends a run; fewer are skipped.
MAX_SKIPPED = 5
MAX_LISTED = 10
# `micro[i][rank]`: rows of the i-th micro batch of a step on a rank; see `plan_epoch`.
StepRows = list[list[list[int]]]


@dataclass(frozen=True)
class Schedule:
    """Batch sizes, length and intervals of training.

    Attributes:
        sizes: batch sizes of training.
        epochs: passes over the training rows.
        eval_batch_size: dev rows of a forward pass.
        eval_steps, save_steps: optimizer steps between evaluations, and between saved states.
        seed: seed of the shuffles.
    """

    sizes: BatchSizes
    epochs: int
    eval_batch_size: int
    eval_steps: int
    save_steps: int
    seed: int


@dataclass
class Trainer:
    """Trainer of the mapping; `fit` runs all steps, or the remaining ones after an interruption.

    Attributes:
        engine: DeepSpeed's engine of a `MindMergerForCausalLM`.
        mapping: values and optimizer state of the mapping.
        train, dev: training and dev rows; without dev rows the last mapping is saved, else the best one.
        alone: the dev rows as the LLM alone reads them; None for no verdicts by language.
        lay_out: function from rows to a batch on the CPU.
        schedule: batch sizes, length and intervals.
        folder: output folder of mapping, metrics and states.
        config: config of the mapping, written beside it.
        process: this rank.
        open_metrics: function that opens the run's metrics at the position of a `TrainState`.
        replay: loss on replayed rows; None without such rows.
    """

    engine: deepspeed.DeepSpeedEngine
    mapping: MappingState
    train: Rows
    dev: Rows
    alone: Rows | None
    lay_out: Callable[[list[Tokens]], Batch]
    schedule: Schedule
    folder: Path
    config: dict[str, Any]
    process: Process
    open_metrics: Callable[[TrainState], Metrics]
    replay: ReplayLoss | None = None

    def __post_init__(self) -> None:
        self.steps_per_epoch = steps_per_epoch(len(self.train), self.schedule.sizes)
        self.total_steps = self.steps_per_epoch * self.schedule.epochs
        self.states = SavedStates(self.folder / STATE, self.engine, self.mapping, self.process, self.train.fingerprint)
        self.signals = StopSignals()
        size = self.schedule.eval_batch_size
        self.dev_pass = DevPass(self.engine, self.batch, size, self.process, self._leave_on_signal)
        # Values of the best mapping, once this process has saved them.
        self.best: dict[str, torch.Tensor] | None = None

    def fit(self) -> dict[str, float]:
        """Run all remaining steps and leave the best mapping in `folder`.

        Returns:
            Optimizer steps, dev perplexity, seconds and peak memory of this process.

        Raises:
            InputError: out of memory, the disk is full, or loss or gradients stay non-finite.
            Stopped: a rank has received a signal; the state is saved.
        """
        started = time.monotonic()
        with self.signals:
            # Inside: the imports of `open_metrics` take a second, in which a signal would be lost.
            self.state = self.states.load()
            self.metrics = self.open_metrics(self.state)
            step, total = self.state.step, self.total_steps
            if step:
                say(self.process, f"continuing after step {step} of {total}")
            with progress(self.process, total=total, initial=step, desc="training", unit="step") as bar:
                for rows in self._steps():
                    self._between_steps()
                    bar.set_postfix(self._run_step(rows))
                    bar.update()
            self._between_steps()
            if self.alone is not None and math.isfinite(self.state.best_perplexity):
                self._judge(self.alone)
        self.metrics.close()
        result = {"steps": self.state.step, "seconds": round(time.monotonic() - started, 1)}
        if self.state.skipped:
            result["skipped_steps"] = self.state.skipped
        if not len(self.dev):
            self._save_mapping()
        elif math.isinf(self.state.best_perplexity):
            raise InputError(
                f"no evaluation of {self.folder} gave a finite dev perplexity: lower --lr and --boundary_lr"
            )
        else:
            result["best_dev_perplexity"] = round(self.state.best_perplexity, 4)
        return {**result, **self.process.peak_memory()}

    def batch(self, rows: list[Tokens]) -> Batch:
        """Lay out a batch of `rows` on this rank's device."""
        return self.lay_out(rows).to(self.process.device)

    def _steps(self) -> Iterator[StepRows]:
        """Rows of every remaining optimizer step."""
        epoch, done = divmod(self.state.step, self.steps_per_epoch)
        sizes, seed = self.schedule.sizes, self.schedule.seed
        for number in range(epoch, self.schedule.epochs):
            batch, accumulation = sizes.train_batch_size, sizes.gradient_accumulation
            plan = plan_epoch(self.train.lengths, batch, accumulation, self.process.world_size, seed, number)
            yield from itertools.islice(plan, done if number == epoch else 0, None)

    def _run_step(self, rows: StepRows) -> dict[str, str]:
        """Take and record one optimizer step; return values for the progress bar."""
        state, started, lr = self.state, time.monotonic(), self.engine.get_lr()[0]
        lengths = self.train.lengths[_all_rows(rows)]
        with within_memory(_too_large(state.step + 1, int(lengths.max()), self.schedule.sizes)):
            loss, stop, suspects = self.step(rows)
        state.step += 1
        speed = int(lengths.sum()) / (time.monotonic() - started)
        if suspects:
            self._skip(loss, suspects)
        else:
            state.skipped_in_a_row = 0
            self.metrics.write(state.step, loss=loss, lr=lr, tokens_per_s=round(speed, 1))
        self._leave_if(stop)
        best = f"{state.best_perplexity:.3f}" if len(self.dev) else "none"
        return {"loss": f"{loss:.4f}", "tokens_per_s": f"{speed:.0f}", "best_dev_ppl": best}

    def step(self, step_rows: StepRows) -> tuple[float, float, list[int]]:
        """Take one optimizer step.

        Returns:
            Mean loss over the target tokens of the global batch; number of ranks that have received a signal; rows
            that may have caused a non-finite loss or gradient, in which case no parameter was changed.
        """
        rows = _all_rows(step_rows)
        target_tokens = int(self.train.target_lengths[rows].sum())
        # DeepSpeed averages over accumulation and ranks; with this divisor the average is over all target tokens.
        divisor = target_tokens / (self.schedule.sizes.gradient_accumulation * self.process.world_size)
        losses = []
        for micro_batches in step_rows:
            micro_batch = micro_batches[self.process.rank]
            # A rank without rows runs one row with loss 0: under ZeRO-3 other ranks need its part of the weights.
            batch = self.batch(self.train.tokens(own := micro_batch or rows[:1]))
            replayed = self.replay and self.replay.of(self.train, own, micro_batches, self.process.device)
            loss = self.engine(batch=batch, num_items_in_batch=divisor, replayed=replayed).loss
            loss = loss if micro_batch else loss * 0
            # An infinite loss may have a finite gradient, and DeepSpeed skips a step only for its gradient.
            loss = loss * torch.where(loss.isfinite(), 1.0, math.nan)
            self.engine.backward(loss)
            self.engine.step()
            # Kept on the device, since copying a value to the host waits for a GPU.
            losses.append((loss.detach(), micro_batch))
        total, stop = self.process.sum(float(sum(loss for loss, _ in losses)) * divisor, bool(self.signals.received))
        suspects = []
        if not (math.isfinite(total) and self.engine.was_step_applied()):
            mine = [row for loss, micro_batch in losses if not loss.isfinite() for row in micro_batch]
            # If all losses are finite, any row may have caused the gradient.
            suspects = [row for theirs in self.process.gather(mine) for row in theirs] or rows
        return total / target_tokens, stop, suspects

    def _between_steps(self) -> None:
        """Save and evaluate if due; a state is saved before the evaluation of its step."""
        step, schedule = self.state.step, self.schedule
        # The last one too, if verdicts follow, for which the mapping is set to the best one.
        ends = step == self.total_steps and self.alone is not None
        if ends or (0 < step < self.total_steps and step % schedule.save_steps == 0):
            self._save_state()
        # Also before the first step, and at the end of each epoch (as published), hence after the last step.
        if len(self.dev) and (step % schedule.eval_steps == 0 or step % self.steps_per_epoch == 0):
            self.validate()

    def validate(self) -> None:
        """Compute dev perplexity, exp of the mean loss over all target tokens, and save the mapping if it is best."""
        loss, tokens = self.dev_pass.loss(self.dev)
        # exp of more than 709 overflows a float.
        perplexity = math.exp(loss / tokens) if loss / tokens < 700 else math.inf
        self.metrics.write(self.state.step, dev_perplexity=perplexity)
        say(self.process, f"step {self.state.step}: dev perplexity {perplexity:.4f}")
        if perplexity < self.state.best_perplexity:
            self.state.best_perplexity = perplexity
            self._save_mapping()

    def _judge(self, alone: Rows) -> None:
        """Write verdicts by language on the best mapping."""
        if self.best is None:  # saved before an interruption
            self.best = read_mapping(self.folder, self.config["mt_hidden_size"], self.config["llm_hidden_size"])
        self.mapping.set(self.best)
        self.dev_pass.judge(self.dev, alone, self.folder)

    def _leave_on_signal(self) -> None:
        (stop,) = self.process.sum(self.signals.received is not None)
        self._leave_if(stop)

    def _leave_if(self, stop: float) -> None:
        """Save the state and raise Stopped if any rank has received a signal; `stop` is the same on all ranks."""
        if stop:
            self._save_state()
            self.metrics.close()
            raise Stopped(
                f"{self.signals.received or 'a signal to another rank'} after step {self.state.step} of "
                f"{self.total_steps}, whose state is in {self.folder / STATE}: the same command continues the run"
            )

    def _skip(self, loss: float, suspects: list[int]) -> None:
        """Record a step skipped for its non-finite loss or gradient, and log the locations of its rows."""
        state, locations = self.state, self.train.locations(suspects)
        state.skipped += 1
        state.skipped_in_a_row += 1
        self.metrics.write(state.step, locations, skipped_steps=state.skipped)
        more = len(locations) - MAX_LISTED
        named = "; ".join(locations[:MAX_LISTED]) + (f" and {more} more (all are in metrics.jsonl)" if more > 0 else "")
        what = f"step {state.step} is skipped: its loss is {loss}, or its gradient not finite"
        say(self.process, f"warning: {what}; rows {named}")
        if state.skipped_in_a_row == MAX_SKIPPED:
            raise InputError(
                f"{MAX_SKIPPED} steps in a row had no finite loss and gradient, the last one with rows {named}: the "
                f"best mapping so far is in {self.folder}; lower --lr and --boundary_lr, or correct the rows"
            )

    def _save_mapping(self) -> None:
        self.best = self.mapping.values()
        if self.process.is_main:
            write_mapping(self.folder, self.config, self.best)
        self.process.barrier()

    def _save_state(self) -> None:
        self.state.metrics_size = self.metrics.size
        self.states.save(self.state)


def steps_per_epoch(rows: int, sizes: BatchSizes) -> int:
    """Optimizer steps of one pass over `rows` rows; the last step may have fewer rows."""
    return math.ceil(rows / sizes.train_batch_size)


def _all_rows(step_rows: StepRows) -> list[int]:
    return [row for micro_batches in step_rows for micro_batch in micro_batches for row in micro_batch]


def _too_large(step: int, longest: int, sizes: BatchSizes) -> str:
    """Message for a step that is out of memory and whose longest row has `longest` tokens."""
    micro = sizes.train_micro_batch_size_per_gpu
    advice = ["--gradient_checkpointing, if it is off"]
    if micro > 1:
        smaller = max(size for size in range(1, micro) if micro % size == 0)
        accumulation = sizes.gradient_accumulation * micro // smaller
        advice.append(f"--train_micro_batch_size_per_gpu {smaller} --gradient_accumulation {accumulation}")
    advice.append(f"a --max_seq_len, --max_prompt_len or --max_gen_len below {longest}, the longest row's tokens")
    return (
        f"out of memory in step {step} with micro batches of {micro} row(s) on average; saved files are kept. Use "
        f"{', or '.join(advice)}; other sizes than those of the run need --overwrite or another --save_name"
    )
