"""One stage of training: set up, fit, validate. Only the mapping learns."""

import dataclasses
import hashlib
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup
from transformers.integrations import HfDeepSpeedConfig

from common import runs
from common.distributed import Process, start_process
from common.errors import InputError
from common.files import read_json, sha256, write_json
from common.logging import Metrics, progress, quiet_libraries, say
from mindmerger.batching import Batch, collate, plan_epoch, plan_once
from mindmerger.checkpoint import PUBLISHED, mapping_file, read_mapping, write_mapping, write_published
from mindmerger.data import Example, hold_out, read_training
from mindmerger.flags import TrainingFlags
from mindmerger.modeling import MindMergerForCausalLM, embedding_scale, mapping_config
from mindmerger.tasks import TRAINING_TASKS, find_task, prompt_template, select_languages
from mindmerger.tokenization import Tokens, count_cuts, load_example_tokenizer

DEEPSPEED_CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "deepspeed"
STATE = "state"
COMPLETE = "complete.json"

# Flags that say where and how often, not what: a run may be continued under others. The files that some flags name
# stand in a run's settings by their content.
_FREE_FLAGS = (
    *("deepspeed", "local_rank", "device", "overwrite", "eval_batch_size", "save_steps", "gradient_checkpointing"),
    *("deepspeed_config", "init_checkpoint", "data_dir"),
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
    rows = read_training(Path(flags.data_dir), task, flags.stage_name, languages, flags.train_num)
    dev_rows, train_rows = hold_out(rows, flags.dev_size, flags.seed)
    tokenizer = load_example_tokenizer(flags, flags.uses_prompt)
    config = mapping_config(flags, tokenizer.llm_tokenizer.bos_token_id)
    config.task, config.stage, config.augmentation = flags.task, flags.stage_name, flags.uses_prompt
    config.prompt = prompt_template(flags.task, flags.stage_name) if flags.uses_prompt else None
    checkpoint = initial_checkpoint(flags)
    widths = config.mt_hidden_size, config.llm_hidden_size
    initial = None if checkpoint is None else read_mapping(checkpoint, *widths)

    settings = run_settings(flags, ds_config, rows, checkpoint, process)
    if runs.is_finished(folder, settings, flags.overwrite):
        say(process, f"{folder} holds this very run, finished: nothing to do (--overwrite trains anew)")
        return
    train_tokens, dev_tokens = tokenizer(train_rows), tokenizer(dev_rows)
    say(process, f"{len(train_tokens)} training rows, {len(dev_tokens)} dev rows, {process.world_size} rank(s)")
    for language, cuts in count_cuts(train_tokens + dev_tokens).items():
        say(process, f"cut to the limits in {language}: {', '.join(f'{n} {kind}(s)' for kind, n in cuts.items())}")

    # transformers reads a model straight into ZeRO-3's partitions while this object is alive.
    hf_ds_config = HfDeepSpeedConfig(ds_config)
    torch.manual_seed(flags.seed)
    dtype = torch.bfloat16 if hf_ds_config.is_true("bf16.enabled") else torch.float32
    model = MindMergerForCausalLM.from_base_models(config, dtype, flags.trust_remote_code)
    if flags.gradient_checkpointing:
        model.checkpoint_gradients()

    runs.start(folder, settings, flags.overwrite, process)
    stage = Stage(flags, process, model, ds_config, train_tokens, dev_tokens, folder, tokenizer.source_pad_id)
    stage.initialise_mapping(initial)
    result = stage.fit()

    if process.is_main:
        best = read_mapping(folder, *widths)
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
        dev_tokens: list[Tokens],
        folder: Path,
        source_pad_id: int,
    ):
        self.flags = flags
        self.process = process
        self.model = model
        self.train_tokens = train_tokens
        self.dev_tokens = dev_tokens
        self.folder = folder
        self.source_pad_id = source_pad_id
        self.steps_per_epoch = math.ceil(len(train_tokens) / flags.train_batch_size)
        self.total_steps = self.steps_per_epoch * flags.epoch_num
        self.best_perplexity = math.inf
        # Betas, eps and weight decay as published.
        optimizer = torch.optim.AdamW(
            model.mapping.parameters(), lr=flags.lr, betas=(0.8, 0.999), eps=1e-8, weight_decay=3e-7
        )
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=self._schedule, config=ds_config
        )

    def initialise_mapping(self, initial: dict[str, torch.Tensor] | None) -> None:
        """Give a mapping at PyTorch's own start the `initial` values, or the start that the flags ask for."""
        mapping = self.model.mapping
        if initial is not None:
            for name, parameter in mapping.named_parameters():
                _change(parameter, lambda _, name=name: initial[name].to(self.process.device))
            return
        batch = self._batch(list(range(min(32, len(self.train_tokens)))))
        mean, scale = embedding_scale(self.model, batch.input_ids, batch.attention_mask)
        if self.flags.boundary_init == "mean":
            _change(mapping.end_boundary, lambda zero: zero + mean)
        if self.flags.mapping_init == "scaled":
            _change(mapping.mlp.linear2.weight, lambda weight: weight * scale)
            _change(mapping.mlp.linear2.bias, lambda bias: bias * scale)

    def fit(self) -> dict[str, float]:
        """Run all steps that are left; the best mapping is in the stage's folder afterwards.

        Returns:
            Optimizer steps, dev perplexities, seconds and peak memory of this process.
        """
        flags, started = self.flags, time.monotonic()
        done = self._load_state()
        metrics = Metrics(self.process, self.folder, done)
        if done:
            say(self.process, f"continuing after step {done} of {self.total_steps}")
        elif self.dev_tokens:
            self._validate(0, metrics)

        bar = progress(self.process, total=self.total_steps, initial=done, desc=flags.stage_name, unit="step")
        step = done
        for epoch in range(done // self.steps_per_epoch, flags.epoch_num):
            for step_rows in self._plan(epoch)[step - epoch * self.steps_per_epoch :]:
                step_started, lr = time.monotonic(), self.engine.get_lr()[0]
                loss, tokens = self._step(step_rows)
                step += 1
                speed = tokens / (time.monotonic() - step_started)
                metrics.write(step, loss=loss, lr=lr, tokens_per_s=round(speed, 1))
                if not math.isfinite(loss):
                    raise InputError(
                        f"the loss of step {step} is {loss}: the best mapping so far is in {self.folder}; lower --lr"
                    )
                # The end of an epoch is evaluated as published, the end of training as any last step must be.
                if self.dev_tokens and (step % flags.eval_steps == 0 or step % self.steps_per_epoch == 0):
                    self._validate(step, metrics)
                best = f"{self.best_perplexity:.3f}" if self.dev_tokens else "none"
                bar.set_postfix(loss=f"{loss:.4f}", tokens_per_s=f"{speed:.0f}", best_dev_ppl=best)
                bar.update()
                if step % flags.save_steps == 0 and step < self.total_steps:
                    self._save_state(step)
        bar.close()
        metrics.close()
        if not self.dev_tokens:
            self._save_mapping()
        result = {"steps": step, "seconds": round(time.monotonic() - started, 1)}
        if self.dev_tokens:
            result["best_dev_perplexity"] = round(self.best_perplexity, 4)
        return {**result, **self.process.peak_memory()}

    def validate(self) -> float:
        """Perplexity of the dev targets: exp of the mean loss over all their tokens, on all ranks."""
        loss, tokens = 0.0, 0
        plan = plan_once([len(row) for row in self.dev_tokens], self.flags.eval_batch_size, self.process.world_size)
        with torch.no_grad():
            for rows in progress(self.process, plan[self.process.rank], desc="dev", leave=False):
                # A rank without rows left runs along, since under ZeRO-3 its peers need its share of the weights.
                batch = self._batch(rows or [0], self.dev_tokens)
                summed = float(self.engine(**vars(batch), num_items_in_batch=1.0).loss)
                if rows:
                    loss += summed
                    tokens += sum(len(self.dev_tokens[row].target) for row in rows)
        loss, tokens = self.process.sum(loss, tokens)
        return math.exp(min(loss / tokens, 700.0))

    def _plan(self, epoch: int) -> list[list[list[list[int]]]]:
        lengths = [len(row) for row in self.train_tokens]
        flags, ranks = self.flags, self.process.world_size
        return plan_epoch(lengths, flags.train_batch_size, flags.gradient_accumulation, ranks, flags.seed, epoch)

    def _step(self, step_rows: list[list[list[int]]]) -> tuple[float, int]:
        """One optimizer step: (mean loss over the target tokens of the global batch, tokens the LLM read)."""
        rows = [row for micro_batches in step_rows for micro_batch in micro_batches for row in micro_batch]
        target_tokens = sum(len(self.train_tokens[row].target) for row in rows)
        # DeepSpeed averages over accumulation and ranks; divided by this, that is the mean over all target tokens.
        divisor = target_tokens / (self.flags.gradient_accumulation * self.process.world_size)
        # Summed on the device: reading a number off a GPU waits for it.
        loss = torch.zeros((), device=self.process.device)
        for micro_batches in step_rows:
            micro_batch = micro_batches[self.process.rank]
            batch = self._batch(micro_batch or rows[:1])
            share = self.engine(**vars(batch), num_items_in_batch=divisor).loss
            share = share if micro_batch else share * 0
            self.engine.backward(share)
            self.engine.step()
            loss += share.detach() * divisor
        (loss,) = self.process.sum(float(loss))
        return loss / target_tokens, sum(len(self.train_tokens[row]) for row in rows)

    def _validate(self, step: int, metrics: Metrics) -> None:
        perplexity = self.validate()
        metrics.write(step, dev_perplexity=perplexity)
        say(self.process, f"step {step}: dev perplexity {perplexity:.4f}")
        if perplexity < self.best_perplexity:
            self.best_perplexity = perplexity
            self._save_mapping()

    def _save_mapping(self) -> None:
        parameters = self.model.mapping.named_parameters()
        state = {name: safe_get_full_fp32_param(parameter).cpu() for name, parameter in parameters}
        if self.process.is_main:
            write_mapping(self.folder, self.model.config.to_dict(), state)
        self.process.barrier()

    def _save_state(self, step: int) -> None:
        state, tag = self.folder / STATE, f"step_{step}"
        best = {"step": step, "best_perplexity": self.best_perplexity}
        self.engine.save_checkpoint(
            str(state), tag=tag, client_state=best, save_latest=False, exclude_frozen_parameters=True
        )
        self.process.barrier()
        if self.process.is_main:
            # Only now every rank's share is on disk; a kill before this line leaves the state before it in force.
            write_json(state / COMPLETE, {"tag": tag})
            for older in state.glob("step_*"):
                if older.name != tag:
                    shutil.rmtree(older)

    def _load_state(self) -> int:
        """Continue from the last saved state: the number of steps already done, 0 where there is none."""
        state = self.folder / STATE
        if not (state / COMPLETE).exists():
            return 0
        tag = read_json(state / COMPLETE)["tag"]
        _, saved = self.engine.load_checkpoint(str(state), tag=tag, load_module_strict=False)
        self.best_perplexity = saved["best_perplexity"]
        return saved["step"]

    def _schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        warmup = round(self.flags.warmup_ratio * self.total_steps)
        if self.flags.lr_scheduler == "cosine":
            return get_cosine_schedule_with_warmup(optimizer, warmup, self.total_steps)
        return get_constant_schedule_with_warmup(optimizer, warmup)

    def _batch(self, rows: list[int], tokens: list[Tokens] | None = None) -> Batch:
        chosen = [(self.train_tokens if tokens is None else tokens)[row] for row in rows]
        return collate(chosen, self.source_pad_id).to(self.process.device)


def _change(parameter: torch.nn.Parameter, to: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace a parameter's value, whole or partitioned, and its float32 copy, which is what ZeRO's optimizer moves."""
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        value = to(parameter.data.float())
        parameter.data.copy_(value)
    safe_set_full_fp32_param(parameter, value)


def deepspeed_config(flags: TrainingFlags, process: Process) -> dict[str, Any]:
    """The DeepSpeed JSON that `--deepspeed_config` names, or the machine's default, with the batch sizes filled in.

    Raises:
        InputError: an unreadable file, or one that sets what flags set.
    """
    default = "zero2_bf16.json" if process.device.type == "cuda" else "cpu.json"
    path = Path(flags.deepspeed_config or DEEPSPEED_CONFIGS / default)
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object")
    for key, instead in {"optimizer": "--lr", "scheduler": "--lr_scheduler", "fp16": "bf16"}.items():
        if key in config:
            raise InputError(f"{path}: take {key!r} out, {instead} stands for it")
    config |= {
        "train_batch_size": flags.train_batch_size,
        "train_micro_batch_size_per_gpu": flags.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": flags.gradient_accumulation,
        # AdamW is PyTorch's own, wherever its state is kept.
        "zero_force_ds_cpu_optimizer": False,
    }
    config.setdefault("gradient_clipping", 1.0)
    try:
        stage = DeepSpeedConfig(config).zero_optimization_stage
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(f"{path}: DeepSpeed refuses it: {' '.join(str(error).split())}") from error
    if stage == 0:
        raise InputError(f'{path}: set "zero_optimization": {{"stage": 2}}, or 1, or 3')
    return config


def run_settings(
    flags: TrainingFlags, ds_config: dict[str, Any], rows: list[Example], checkpoint: Path | None, process: Process
) -> dict[str, Any]:
    """What makes two runs the same run: flags, ranks, and what the files hold that the flags name."""
    settings = {k: v for k, v in dataclasses.asdict(flags).items() if k not in _FREE_FLAGS}
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
