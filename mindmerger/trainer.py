"""One stage of training: set up, fit, validate. Only the mapping learns."""

import contextlib
import dataclasses
import hashlib
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import load_file, save
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup
from transformers.integrations import HfDeepSpeedConfig

from common import runs, snapshots
from common.errors import InputError
from common.io import read_json, sha256, write_bytes, write_json
from common.locks import locked
from common.logging import Metrics, progress, quiet_libraries, say
from common.onednn import use_onednn
from common.ranks import Process, is_out_of_memory, start_process
from common.signals import Stopped, StopSignals
from mindmerger.batching import Batch, collate, plan_epoch, plan_once
from mindmerger.card import source_datasets
from mindmerger.checkpoint import (
    CONFIG,
    PUBLISHED,
    mapping_file,
    read_mapping,
    with_trained_layer,
    write_mapping,
    write_published,
)
from mindmerger.config import TrainingFlags
from mindmerger.data import Example, hold_out, read_training, shared_targets
from mindmerger.frozen_models import check_context
from mindmerger.init.aligned import aligned_start
from mindmerger.modeling import MindMergerForCausalLM, embedding_scale, mapping_config
from mindmerger.tasks import TRAINING_TASKS, find_task, prompt_template, select_languages
from mindmerger.tokenization import Tokens, count_cuts, load_example_tokenizer
from mindmerger.zero import MappingState, deepspeed_config, make_optimizer, weights_dtype

STATE = "state"
ALIGNED_START = "aligned_start"
# Steps without a finite loss and gradient: one is passed over, so many in a row are no accident of a batch.
MAX_SKIPPED = 5
MAX_LISTED = 10

# Flags that say where and how often, not what: a run may be continued under others. The files that some flags name
# stand in a run's settings by their content.
_FREE_FLAGS = (
    *("deepspeed", "local_rank", "device", "overwrite", "eval_batch_size", "save_steps", "gradient_checkpointing"),
    *("deepspeed_config", "init_checkpoint", "data_dir", "report_to", "plan"),
)


def train(flags: TrainingFlags) -> None:
    """Train one stage and leave its best mapping in `outputs/{save_name}/{stage}/`.

    Raises:
        InputError: before any model loads, whatever is wrong with flags, files, or an earlier run in that folder.
    """
    process = start_process(flags.device, needs_group=True)
    quiet_libraries()
    # Takes over the process group; ZeRO-3 asks it for the number of ranks while a model is being read.
    deepspeed.init_distributed()
    _train(flags, process)
    # Not after an error: peers that wait in a collective would keep this process, and its message, waiting too.
    process.close()


def _train(flags: TrainingFlags, process: Process) -> None:
    folder = Path("outputs") / flags.save_name / flags.stage_name
    if flags.augmentation is not None and flags.augmentation != (flags.stage_name == "augmentation"):
        say(process, f"warning: --augmentation {flags.augmentation} in the {flags.stage_name} stage, as told")

    ds_config = deepspeed_config(flags, process)
    task = find_task(flags.task, TRAINING_TASKS)
    languages = select_languages(flags.languages)
    rows = list(read_training(Path(flags.data_dir), task, flags.stage_name, languages, flags.train_num))
    dev_rows, train_rows = hold_out(rows, flags.dev_size, flags.seed)
    models = flags.models
    tokenizer = load_example_tokenizer(models, flags.limits, flags.uses_prompt)
    checkpoint = initial_checkpoint(flags)
    if checkpoint is not None:
        models = with_trained_layer(models, checkpoint)
        if flags.mapping_init == "aligned":
            say(process, f"warning: --mapping_init aligned does nothing, the mapping starts from {checkpoint}")
    config = mapping_config(models, tokenizer.llm_tokenizer.bos_token_id)
    config.task, config.stage, config.augmentation = flags.task, flags.stage_name, flags.uses_prompt
    config.prompt = prompt_template(flags.task, flags.stage_name) if flags.uses_prompt else None
    config.languages = sorted({row.language.code for row in train_rows})
    config.train_rows, config.datasets = len(train_rows), source_datasets(Path(flags.data_dir), train_rows)
    widths = config.mt_hidden_size, config.llm_hidden_size
    initial = None if checkpoint is None else read_mapping(checkpoint, *widths)

    settings = run_settings(flags, ds_config, rows, checkpoint, process)
    with locked(folder) if process.is_main else contextlib.nullcontext():
        if runs.is_finished(folder, settings, flags.overwrite):
            say(process, f"{folder} holds this very run, finished: nothing to do (--overwrite trains anew)")
            return
        train_tokens, dev_tokens = tokenizer(train_rows), tokenizer(dev_rows)
        check_context(models, max(map(len, train_tokens + dev_tokens)))
        say(process, f"{len(train_tokens)} training rows, {len(dev_tokens)} dev rows, {process.world_size} rank(s)")
        if shared := shared_targets(dev_rows, train_rows):
            say(process, f"targets of {shared} dev row(s) are training rows' too: dev perplexity will flatter")
        for language, cuts in count_cuts(train_tokens + dev_tokens).items():
            say(process, f"cut to the limits in {language}: {', '.join(f'{n} {kind}(s)' for kind, n in cuts.items())}")

        dtype = weights_dtype(ds_config)
        if checkpoint is None and flags.mapping_init == "aligned":
            place = folder.parent / ALIGNED_START
            initial, config.encoder_layer = aligned_start(flags, config, tokenizer, train_rows, place, dtype, process)
        # transformers reads a model straight into ZeRO-3's partitions while this object is alive.
        hf_ds_config = HfDeepSpeedConfig(ds_config)  # noqa: F841
        torch.manual_seed(flags.seed)
        model = MindMergerForCausalLM.from_base_models(config, dtype, flags.trust_remote_code)
        if flags.gradient_checkpointing:
            model.checkpoint_gradients()

        runs.start(folder, settings, flags.overwrite, process)
        places, pad_id = [row.location for row in train_rows], tokenizer.source_pad_id
        stage = Stage(flags, process, model, ds_config, train_tokens, places, dev_tokens, folder, pad_id)
        stage.initialise_mapping(initial)
        result = stage.fit()

        if process.is_main:
            best = read_mapping(folder, *widths)
            write_json(folder.parent / CONFIG, model.config.to_dict())
            write_published(folder.parent / PUBLISHED, best)
            runs.finish(folder, settings, result)
            shutil.rmtree(folder / STATE, ignore_errors=True)
        process.barrier()
    say(process, f"done: {folder} and {folder.parent / PUBLISHED}; {', '.join(f'{k} {v}' for k, v in result.items())}")


class Stage:
    """One stage's engine and rows; `fit` runs it, or the rest of it after an interruption."""

    def __init__(
        self,
        flags: TrainingFlags,
        process: Process,
        model: MindMergerForCausalLM,
        ds_config: dict[str, Any],
        train_tokens: list[Tokens],
        places: list[str],
        dev_tokens: list[Tokens],
        folder: Path,
        source_pad_id: int,
    ):
        self.flags = flags
        self.process = process
        self.model = model
        self.train_tokens = train_tokens
        self.places = places
        self.dev_tokens = dev_tokens
        self.folder = folder
        self.source_pad_id = source_pad_id
        self.steps_per_epoch = math.ceil(len(train_tokens) / flags.train_batch_size)
        self.total_steps = self.steps_per_epoch * flags.epoch_num
        self.best_perplexity = math.inf
        self.skipped = self.skipped_in_a_row = 0
        self.signals = StopSignals()
        optimizer = make_optimizer(flags, model.mapping, process)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=self._schedule, config=ds_config
        )
        self.mapping_state = MappingState(self.engine, model.mapping, process)
        # The encoder stays as it is: its states can be so large that a difference in rounding shows in the mapping's
        # gradient (2e-5 of it with Gemma 3).
        use_onednn(model.llm)
        # Under ZeRO-3 a model runs only once the engine is there.
        if not model.pack_rows():
            say(process, f"{flags.llm_path} reads padded rows: packed ones would come out otherwise")

    def initialise_mapping(self, initial: dict[str, torch.Tensor] | None) -> None:
        """Give a mapping at PyTorch's own start the `initial` values, or the start that the flags ask for."""
        if initial is not None:
            self.mapping_state.set(initial)
            return
        mapping = self.model.mapping
        batch = self._batch(list(range(min(32, len(self.train_tokens)))))
        mean, scale = embedding_scale(self.model, batch.input_ids, batch.attention_mask)
        if self.flags.boundary_init == "mean":
            self.mapping_state.change(mapping.end_boundary, lambda zero: zero + mean)
        if self.flags.mapping_init == "scaled":
            self.mapping_state.change(mapping.mlp.linear2.weight, lambda weight: weight * scale)
            self.mapping_state.change(mapping.mlp.linear2.bias, lambda bias: bias * scale)

    def fit(self) -> dict[str, float]:
        """Run all steps that are left; the best mapping is in the stage's folder afterwards.

        Returns:
            Optimizer steps, dev perplexities, seconds and peak memory of this process.

        Raises:
            InputError: too little memory, a full disk, loss or gradients that stay non-finite.
            Stopped: a rank has received a signal; the state to continue from is on disk.
        """
        flags, started = self.flags, time.monotonic()
        with self.signals:
            # From here on, since writing curves imports for a second in which a signal would be lost.
            step, metrics = self._load_state()
            bar = progress(self.process, total=self.total_steps, initial=step, desc=flags.stage_name, unit="step")
            for step_rows in self._steps_from(step):
                self._between_steps(step, metrics)
                step_started, lr = time.monotonic(), self.engine.get_lr()[0]
                try:
                    loss, tokens, stop, suspects = self._step(step_rows)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    raise InputError(self._too_large(step, step_rows)) from error
                step += 1
                speed = tokens / (time.monotonic() - step_started)
                if suspects:
                    self._skip(step, loss, suspects, metrics)
                else:
                    self.skipped_in_a_row = 0
                    metrics.write(step, loss=loss, lr=lr, tokens_per_s=round(speed, 1))
                best = f"{self.best_perplexity:.3f}" if self.dev_tokens else "none"
                bar.set_postfix(loss=f"{loss:.4f}", tokens_per_s=f"{speed:.0f}", best_dev_ppl=best)
                bar.update()
                self._leave_if(stop, step, metrics)
            self._between_steps(step, metrics)
        bar.close()
        metrics.close()
        result = {"steps": step, "seconds": round(time.monotonic() - started, 1)}
        if self.skipped:
            result["skipped_steps"] = self.skipped
        if not self.dev_tokens:
            self._save_mapping()
        elif math.isinf(self.best_perplexity):
            raise InputError(
                f"no evaluation of {self.folder} gave a finite dev perplexity: lower --lr and --boundary_lr"
            )
        else:
            result["best_dev_perplexity"] = round(self.best_perplexity, 4)
        return {**result, **self.process.peak_memory()}

    def _between_steps(self, step: int, metrics: Metrics) -> None:
        """Save and evaluate where `step` is the turn for it. A state is of before its step's evaluation."""
        if 0 < step < self.total_steps and step % self.flags.save_steps == 0:
            self._save_state(step, metrics)
        # Before the first step; the end of an epoch is evaluated as published, the last step as any must be.
        if self.dev_tokens and (step % self.flags.eval_steps == 0 or step % self.steps_per_epoch == 0):
            self._validate(step, metrics)

    def _validate(self, step: int, metrics: Metrics) -> None:
        """Perplexity of the dev targets: exp of the mean loss over all their tokens, on all ranks. The best is kept."""
        loss, tokens = 0.0, 0
        plan = plan_once([len(row) for row in self.dev_tokens], self.flags.eval_batch_size, self.process.world_size)
        with torch.no_grad():
            for rows in progress(self.process, plan[self.process.rank], desc="dev", leave=False):
                # A rank without rows left runs along, since under ZeRO-3 its peers need its share of the weights.
                batch = self._batch(rows or [0], self.dev_tokens)
                try:
                    summed = float(self.engine(**vars(batch), num_items_in_batch=1.0).loss)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    raise InputError(
                        f"out of memory in the evaluation before step {step + 1}, with {len(rows or [0])} dev rows at "
                        f"once; what is saved stays. Take an --eval_batch_size below {self.flags.eval_batch_size}, or "
                        "lower --max_seq_len, --max_prompt_len or --max_gen_len"
                    ) from error
                if rows:
                    loss += summed
                    tokens += sum(len(self.dev_tokens[row].target) for row in rows)
                (stop,) = self.process.sum(self.signals.received is not None)
                self._leave_if(stop, step, metrics)
        loss, tokens = self.process.sum(loss, tokens)
        # exp of more than 709 is more than a float holds.
        perplexity = math.exp(loss / tokens) if loss / tokens < 700 else math.inf
        metrics.write(step, dev_perplexity=perplexity)
        say(self.process, f"step {step}: dev perplexity {perplexity:.4f}")
        if perplexity < self.best_perplexity:
            self.best_perplexity = perplexity
            self._save_mapping()

    def _leave_if(self, stop: float, step: int, metrics: Metrics) -> None:
        """Save the state and leave where any rank has received a signal: all ranks pass the same sum as `stop`."""
        if stop:
            self._save_state(step, metrics)
            metrics.close()
            raise Stopped(
                f"{self.signals.received or 'a signal to another rank'} after step {step} of {self.total_steps}, whose "
                f"state is in {self.folder / STATE}: the same command continues the run"
            )

    def _skip(self, step: int, loss: float, suspects: list[int], metrics: Metrics) -> None:
        """Count and name a step that changed nothing, since its loss or gradient was not finite."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        places = [self.places[row] for row in suspects]
        metrics.write(step, places, skipped_steps=self.skipped)
        more = f" and {len(places) - MAX_LISTED} more (all are in metrics.jsonl)" if len(places) > MAX_LISTED else ""
        what = f"step {step} is skipped: its loss is {loss}, or its gradient not finite"
        say(self.process, f"warning: {what}; rows {'; '.join(places[:MAX_LISTED])}{more}")
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise InputError(
                f"{MAX_SKIPPED} steps in a row had no finite loss and gradient, the last one with rows "
                f"{'; '.join(places[:MAX_LISTED])}{more}: the best mapping so far is in {self.folder}; lower --lr "
                "and --boundary_lr, or mend the rows"
            )

    def _too_large(self, step: int, step_rows: list[list[list[int]]]) -> str:
        flags = self.flags
        micro = flags.train_micro_batch_size_per_gpu
        longest = max(len(self.train_tokens[row]) for ranks in step_rows for rows in ranks for row in rows)
        advice = [] if flags.gradient_checkpointing else ["--gradient_checkpointing"]
        if micro > 1:
            smaller = max(size for size in range(1, micro) if micro % size == 0)
            accumulation = flags.gradient_accumulation * micro // smaller
            advice.append(f"--train_micro_batch_size_per_gpu {smaller} --gradient_accumulation {accumulation}")
        advice.append(f"a --max_seq_len, --max_prompt_len or --max_gen_len below {longest}, the longest row's tokens")
        return (
            f"out of memory in step {step + 1} with micro batches of {micro} row(s) on average; what is saved stays. "
            f"Take {', or '.join(advice)}; other sizes than the run began with need --overwrite or another --save_name"
        )

    def _steps_from(self, step: int) -> Iterator[list[list[list[int]]]]:
        """The rows of every optimizer step after the first `step` ones; see `plan_epoch`."""
        first, place = divmod(step, self.steps_per_epoch)
        for epoch in range(first, self.flags.epoch_num):
            yield from self._plan(epoch)[place if epoch == first else 0 :]

    def _plan(self, epoch: int) -> list[list[list[list[int]]]]:
        lengths = [len(row) for row in self.train_tokens]
        flags, ranks = self.flags, self.process.world_size
        return plan_epoch(lengths, flags.train_batch_size, flags.gradient_accumulation, ranks, flags.seed, epoch)

    def _step(self, step_rows: list[list[list[int]]]) -> tuple[float, int, float, list[int]]:
        """One optimizer step.

        Returns:
            Mean loss over the target tokens of the global batch; tokens the LLM read; how many ranks have received a
            signal; and where loss or gradient is not finite, so that nothing was changed, the rows that may be why.
        """
        rows = [row for micro_batches in step_rows for micro_batch in micro_batches for row in micro_batch]
        target_tokens = sum(len(self.train_tokens[row].target) for row in rows)
        # DeepSpeed averages over accumulation and ranks; divided by this, that is the mean over all target tokens.
        divisor = target_tokens / (self.flags.gradient_accumulation * self.process.world_size)
        # Kept on the device: reading a number off a GPU waits for it.
        shares = []
        for micro_batches in step_rows:
            micro_batch = micro_batches[self.process.rank]
            batch = self._batch(micro_batch or rows[:1])
            share = self.engine(**vars(batch), num_items_in_batch=divisor).loss
            share = share if micro_batch else share * 0
            # An infinite loss may have a finite gradient, and DeepSpeed skips a step by its gradient alone.
            share = share * torch.where(share.isfinite(), 1.0, math.nan)
            self.engine.backward(share)
            self.engine.step()
            shares.append((share.detach(), micro_batch))
        loss = float(sum(share for share, _ in shares)) * divisor
        loss, stop = self.process.sum(loss, self.signals.received is not None)
        suspects = []
        if not (math.isfinite(loss) and self.engine.was_step_applied()):
            mine = [row for share, micro_batch in shares if not share.isfinite() for row in micro_batch]
            # A finite loss says nothing of which rows gave the gradient.
            suspects = [row for theirs in self.process.gather(mine) for row in theirs] or rows
        return loss / target_tokens, sum(len(self.train_tokens[row]) for row in rows), stop, suspects

    def _save_mapping(self) -> None:
        values = self.mapping_state.values()
        if self.process.is_main:
            write_mapping(self.folder, self.model.config.to_dict(), values)
        self.process.barrier()

    def _save_state(self, step: int, metrics: Metrics) -> None:
        """Keep all that the rest of the run depends on, unless that of this very step is kept already."""
        tensors = self.mapping_state.tensors()
        for rank, state in enumerate(self.process.gather(self.process.rng_state())):
            tensors[f"rng.{rank}"] = state
        record = {
            "best_perplexity": self.best_perplexity,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "optimizer_steps": self.mapping_state.steps,
            "schedule": self.engine.lr_scheduler.state_dict(),
            "metrics_size": metrics.size,
        }

        def write(folder: Path) -> None:
            write_bytes(folder / "state.safetensors", save(tensors))
            write_json(folder / "state.json", record)

        if self.process.is_main:
            snapshots.save(self.folder / STATE, step, write)
        self.process.barrier()

    def _load_state(self) -> tuple[int, Metrics]:
        """Continue from the last saved state: the number of steps already done, 0 where there is none."""
        root = self.folder / STATE
        # The first rank alone judges, and cleans up, before any other looks.
        found = snapshots.newest(root, lambda text: say(self.process, text)) if self.process.is_main else None
        found = self.process.gather(found)[0]
        if found is None:
            return 0, self._metrics()
        step, record = snapshots.step_of(found), read_json(found / "state.json")
        tensors = load_file(found / "state.safetensors")
        self.mapping_state.restore(tensors, record["optimizer_steps"])
        self.engine.lr_scheduler.load_state_dict(record["schedule"])
        for group, lr in zip(self.engine.optimizer.param_groups, self.engine.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
        self.process.set_rng_state(tensors[f"rng.{self.process.rank}"])
        self.best_perplexity = record["best_perplexity"]
        self.skipped, self.skipped_in_a_row = record["skipped"], record["skipped_in_a_row"]
        say(self.process, f"continuing after step {step} of {self.total_steps}")
        return step, self._metrics(step, record["metrics_size"])

    def _metrics(self, step: int = 0, size: int = 0) -> Metrics:
        settings = dataclasses.asdict(self.flags)
        return Metrics(self.process, self.folder, step, size, self.flags.report_to, settings)

    def _schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        warmup = round(self.flags.warmup_ratio * self.total_steps)
        if self.flags.lr_scheduler == "cosine":
            return get_cosine_schedule_with_warmup(optimizer, warmup, self.total_steps)
        return get_constant_schedule_with_warmup(optimizer, warmup)

    def _batch(self, rows: list[int], tokens: list[Tokens] | None = None) -> Batch:
        chosen = [(self.train_tokens if tokens is None else tokens)[row] for row in rows]
        return collate(chosen, self.source_pad_id).to(self.process.device)


def run_settings(
    flags: TrainingFlags, ds_config: dict[str, Any], rows: list[Example], checkpoint: Path | None, process: Process
) -> dict[str, Any]:
    """What makes two runs the same run: flags, ranks, and what the files hold that the flags name."""
    settings = {k: v for k, v in dataclasses.asdict(flags).items() if k not in _FREE_FLAGS}
    if checkpoint is not None:
        del settings["mapping_init"], settings["boundary_init"]
    if checkpoint is not None or flags.mapping_init != "aligned":
        del settings["aligned_sentences"]
    texts = "\n".join(f"{row.language.code}\t{row.source.text}\t{row.target}" for row in rows)
    return settings | {
        "augmentation": flags.uses_prompt,
        "deepspeed": ds_config,
        "initial_mapping_sha256": None if checkpoint is None else sha256(mapping_file(checkpoint)),
        "rows_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        "ranks": process.world_size,
    }


def initial_checkpoint(flags: TrainingFlags) -> Path | None:
    """The mapping to start from: as told, else the mapping stage's best for the augmentation stage, else none.

    Raises:
        InputError: the mapping stage has left nothing to start from.
    """
    if flags.init_checkpoint is not None:
        return None if flags.init_checkpoint == "none" else Path(flags.init_checkpoint)
    if flags.stage_name == "mapping":
        return None
    checkpoint = Path("outputs") / flags.save_name / "mapping"
    if not checkpoint.exists():
        raise InputError(
            f"the augmentation stage starts from the mapping stage's best, and {checkpoint} does not exist: "
            "run --stage_name mapping first, or name a mapping with --init_checkpoint (none starts afresh)"
        )
    return checkpoint
