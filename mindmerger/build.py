"""Construction of a `Trainer` for one training stage from flags, with all checks before a model loads."""

import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from transformers.integrations import HfDeepSpeedConfig

from common.errors import InputError, within_memory
from common.io import sha256, write_json
from common.logging import Metrics, quiet_libraries, say
from common.models import TOO_LARGE
from common.ranks import Process, start_process
from common.runs import RunFolder, open_run
from mindmerger.batching import lay_out, without_sources
from mindmerger.card import source_datasets
from mindmerger.checkpoint import (
    CONFIG,
    PUBLISHED,
    mapping_file,
    read_mapping,
    read_record,
    warn_of_scale,
    with_trained_layer,
    write_published,
)
from mindmerger.config import ModelPair, TrainingFlags
from mindmerger.data import Example, hold_out, read_training
from mindmerger.frozen_models import check_context, recompute_layers
from mindmerger.init.aligned import AlignedStart, Texts, choose_texts
from mindmerger.init.scaled import embedding_scale
from mindmerger.losses import ReplayLoss
from mindmerger.modeling import MindMergerConfig, MindMergerForCausalLM, mapping_config
from mindmerger.optim import make_optimizer, make_schedule
from mindmerger.probe import check_padding
from mindmerger.replay import OwnAnswers
from mindmerger.tasks import LANGUAGES, TRAINING_TASKS, Prompt, find_task, prompt_template, select_languages
from mindmerger.token_table import Rows, TokenTable, file_hashes, open_table
from mindmerger.tokenization import ExampleTokenizer, load_example_tokenizer
from mindmerger.train_state import TrainState
from mindmerger.trainer import STATE, Schedule, Trainer, steps_per_epoch
from mindmerger.zero import MappingState, deepspeed_config, free_shared_memory, weights_dtype

ALIGNED_START = "aligned_start"

# Flags that do not change the result: a run may be continued with other values. Files named by some of these flags
# enter a run's settings by their content.
_FREE_FLAGS = (
    *("deepspeed", "local_rank", "device", "overwrite", "eval_batch_size", "save_steps", "gradient_checkpointing"),
    *("deepspeed_config", "init_checkpoint", "data_dir", "cache_dir", "report_to", "plan"),
)


def train(flags: TrainingFlags) -> None:
    """Train one stage and write its best mapping to `outputs/{save_name}/{stage}/`.

    Raises:
        InputError: flags, files, or an earlier run in that folder are invalid; raised before any model loads.
    """
    process = start_process(flags.device, needs_group=True)
    quiet_libraries()
    # Reuses the process group, from which ZeRO-3 gets the number of ranks while a model loads.
    deepspeed.init_distributed()
    free_shared_memory(process)
    stage = prepare(flags, process)
    # Batches depend on these lengths: other ones on one rank are wrong rows, or collectives that never end.
    parts = {"training rows": stage.train, "dev rows": stage.dev, "dev rows for the LLM alone": stage.alone}
    process.check_same(stage.settings | {name: rows is None or rows.fingerprint for name, rows in parts.items()})
    folder = Path("outputs") / flags.save_name / flags.stage_name
    with open_run(folder, stage.settings, flags.overwrite, process) as run:
        if run.is_finished:
            say(process, f"{folder} has this run, finished: nothing to do (--overwrite trains again)")
        else:
            announce(stage, process)
            _run_stage(flags, stage, run)
    # Not after an error: other ranks may wait in a collective, and closing would wait for them.
    process.close()


@dataclass(frozen=True)
class Stage:
    """Inputs of a training stage, without its models.

    Attributes:
        models: names of the two frozen models.
        config: config of the mapping.
        tokenizer: tokenizers of both models.
        table: all rows; `train` and `dev` are its parts.
        alone: the dev rows as the LLM alone reads them; None if there are none, or they are too long for the LLM.
        ds_config: DeepSpeed config.
        initial: mapping to start from; None for a new one.
        settings: values that identify a run; a run continues only under equal settings.
    """

    models: ModelPair
    config: MindMergerConfig
    tokenizer: ExampleTokenizer
    table: TokenTable
    train: Rows
    dev: Rows
    alone: Rows | None
    ds_config: dict[str, Any]
    initial: dict[str, torch.Tensor] | None
    settings: dict[str, Any]


def prepare(flags: TrainingFlags, process: Process) -> Stage:
    """Build the stage from the flags and check it, without loading a model.

    Raises:
        InputError: flags or files are invalid.
    """
    uses_prompt = flags.uses_prompt
    if uses_prompt != (flags.stage_name == "augmentation"):
        say(process, f"warning: --augmentation {uses_prompt} is not the default of the {flags.stage_name} stage")
    ds_config = deepspeed_config(flags.deepspeed_config, flags.batch_sizes, process.device)
    models, checkpoint = flags.models, initial_checkpoint(flags)
    if checkpoint is not None:
        models = with_trained_layer(models, checkpoint)
        warn_of_scale(models, checkpoint, process)
        if flags.mapping_init == "aligned":
            say(process, f"warning: --mapping_init aligned has no effect, the mapping starts from {checkpoint}")
        record = read_record(checkpoint)
        trained = record.get("prompt_format") or "published"
        if record and trained != flags.prompt:
            say(process, f"warning: {checkpoint} was trained with --prompt {trained}, not {flags.prompt}")
    tokenizer = load_example_tokenizer(models, flags.limits, uses_prompt, flags.prompt == "chat")
    config = mapping_config(models, tokenizer.bos_token_id, tokenizer.opening)
    initial = None if checkpoint is None else read_mapping(checkpoint, config.mt_hidden_size, config.llm_hidden_size)

    table = _read_rows(flags, tokenizer)
    dev_index, train_index = hold_out(len(table), flags.dev_size, flags.seed)
    train, dev = table.rows(train_index), table.rows(dev_index)
    _check_rows(flags, models, train, dev)
    config.task, config.stage, config.augmentation = flags.task, flags.stage_name, uses_prompt
    config.prompt = prompt_template(flags.task, flags.stage_name) if uses_prompt else None
    if tokenizer.chat is not None:
        config.prompt_format = flags.prompt
        config.prompt = tokenizer.chat.prompt(Prompt("", "{turn}" if uses_prompt else "", "")).text
    config.languages = sorted(LANGUAGES[name].code for name in train.languages())
    config.train_rows, config.datasets = len(train), source_datasets(Path(flags.data_dir), table.files)
    settings = run_settings(flags, ds_config, table.sha256, checkpoint, process.world_size)
    if tokenizer.chat is not None:
        settings["chat_template"] = config.prompt
    alone = _alone_rows(flags, models, tokenizer, table, dev_index, process)
    return Stage(models, config, tokenizer, table, train, dev, alone, ds_config, initial, settings)


def _check_rows(flags: TrainingFlags, models: ModelPair, train: Rows, dev: Rows) -> None:
    """Raise InputError if a row is too long for the LLM, or a language of --replay_languages has no training row."""
    longest = max(rows.lengths.max(initial=0) for rows in (train, dev))
    if flags.replay:
        languages = select_languages(flags.replay_languages, "--replay_languages") or ()
        if missing := sorted({language.name for language in languages} - set(train.languages())):
            raise InputError(f"--replay_languages {flags.replay_languages}: no training row is in {', '.join(missing)}")
        # An answer of the LLM may be longer than the target.
        longest = max(longest, (train.lengths - train.target_lengths).max(initial=0) + flags.max_gen_len)
    check_context(models, int(longest))


def _alone_rows(
    flags: TrainingFlags,
    models: ModelPair,
    tokenizer: ExampleTokenizer,
    table: TokenTable,
    dev_index: np.ndarray,
    process: Process,
) -> Rows | None:
    """Dev rows with the prompt and without mapped states; from a table of their own if the stage has no prompt."""
    if not len(dev_index):
        return None
    alone = table.rows(dev_index, mapped=False)
    try:
        if not tokenizer.augmentation:
            own = ExampleTokenizer(
                tokenizer.mt_tokenizer,
                None,
                tokenizer.llm_tokenizer,
                augmentation=True,
                chats=tokenizer.chat is not None,
                **asdict(flags.limits),
            )
            order = np.sort(dev_index)
            alone = _read_rows(flags, own, order).rows(np.searchsorted(order, dev_index), mapped=False)
        # Limits that suffice for the stage itself may be too low for its prompts.
        check_context(models, int(alone.lengths.max()))
    except InputError as error:
        say(process, f"note: no verdicts by language, for which the LLM alone reads the dev rows' prompts: {error}")
        return None
    return alone


def _read_rows(flags: TrainingFlags, tokenizer: ExampleTokenizer, chosen: np.ndarray | None = None) -> TokenTable:
    """Open the table of all rows, or of those whose numbers are `chosen`, with their prompts."""
    languages = select_languages(flags.languages)
    data_dir = Path(flags.data_dir)
    settings = {
        "task": flags.task,
        "stage": flags.stage_name,
        "languages": languages and [language.code for language in languages],
        "train_num": flags.train_num,
        "files": file_hashes(data_dir / ("bilingual_pairs" if flags.stage_name == "mapping" else "query_translation")),
    }
    cache_dir = None if flags.cache_dir is None else Path(flags.cache_dir)
    read = partial(_read_examples, flags)
    if chosen is not None:
        settings |= {"dev_size": flags.dev_size, "seed": flags.seed}
        read = lambda: (row for n, row in enumerate(_read_examples(flags, True)) if n in numbers)  # noqa: E731
        numbers = set(chosen.tolist())
    return open_table(read, tokenizer, settings, cache_dir)


def _read_examples(flags: TrainingFlags, with_prompts: bool = False) -> Iterable[Example]:
    """Examples of the stage, in the order of the files."""
    task, languages = find_task(flags.task, TRAINING_TASKS), select_languages(flags.languages)
    with_prompts = with_prompts or flags.uses_prompt
    return read_training(Path(flags.data_dir), task, flags.stage_name, languages, flags.train_num, with_prompts)


def announce(stage: Stage, process: Process) -> None:
    """Log the number of rows and ranks, and how many texts the limits cut."""
    ranks = f"{process.world_size} rank(s)"
    say(process, f"{len(stage.train)} training rows, {len(stage.dev)} dev rows, {ranks}")
    say(process, f"token ids: {stage.table.size / 1e6:.1f} MB in {stage.table.folder}")
    if shared := stage.dev.shared_targets(stage.train):
        say(process, f"{shared} dev row(s) have targets of training rows: dev perplexity will be optimistic")
    for language, cuts in stage.table.rows(np.arange(len(stage.table))).cuts().items():
        say(process, f"cut to the limits in {language}: {', '.join(f'{n} {kind}(s)' for kind, n in cuts.items())}")


def _run_stage(flags: TrainingFlags, stage: Stage, run: RunFolder) -> None:
    """Load the models, train, and write the result of the stage."""
    process, folder, config = run.process, run.folder, stage.config
    dtype = weights_dtype(stage.ds_config)
    initial = stage.initial
    with within_memory(f"{flags.llm_path} and {flags.mt_path}: {TOO_LARGE}"):
        if initial is None and flags.mapping_init == "aligned":
            initial, config.encoder_layer = _aligned_start(flags, stage, folder.parent / ALIGNED_START, dtype, process)
        if flags.replay:
            stage = _with_replay(flags, stage, dtype, process)
        torch.cuda.empty_cache()  # models that are gone; NCCL allocates outside of PyTorch's cache
        # While this object exists, transformers loads a model directly into ZeRO-3's partitions.
        hf_ds_config = HfDeepSpeedConfig(stage.ds_config)  # noqa: F841
        torch.manual_seed(flags.seed)
        model = MindMergerForCausalLM.from_base_models(config, dtype, flags.trust_remote_code)
        if flags.gradient_checkpointing:
            recompute_layers(model.llm)
        run.start()
        trainer = build_trainer(flags, stage, model, folder, process)
        if initial is not None:
            trainer.mapping.set(initial)
        else:
            scale_mapping(trainer, model, flags.mapping_init == "scaled", flags.boundary_init == "mean")
    result = trainer.fit()

    if process.is_main:
        best = read_mapping(folder, config.mt_hidden_size, config.llm_hidden_size)
        write_json(folder.parent / CONFIG, config.to_dict())
        write_published(folder.parent / PUBLISHED, best)
        run.finish(result)
        shutil.rmtree(folder / STATE, ignore_errors=True)
    process.barrier()
    say(process, f"done: {folder} and {folder.parent / PUBLISHED}; {', '.join(f'{k} {v}' for k, v in result.items())}")


def _aligned_start(
    flags: TrainingFlags, stage: Stage, folder: Path, dtype: torch.dtype, process: Process
) -> tuple[dict[str, torch.Tensor], int | None]:
    """Load or fit an aligned start: the mapping, and the encoder layer that it was fitted to."""

    def read_texts(chooses_layer: bool) -> Texts:
        examples = list(_read_examples(flags))
        rows = [examples[row] for row in stage.train.index]
        return choose_texts(rows, flags.stage_name == "mapping", flags.aligned_sentences, chooses_layer, flags.mt_path)

    start = AlignedStart(
        stage.models, stage.config, stage.tokenizer, dtype, flags.boundary_init == "mean", flags.eval_batch_size
    )
    return start.load_or_fit(read_texts, folder, process)


def _with_replay(flags: TrainingFlags, stage: Stage, dtype: torch.dtype, process: Process) -> Stage:
    """Add replayed rows to the training rows; before the models load, so that the LLM is in memory once."""
    task, languages = find_task(flags.task, TRAINING_TASKS), select_languages(flags.replay_languages)
    keeps_all = flags.stage_name == "mapping" or languages is not None
    answers = OwnAnswers(stage.models, task, keeps_all, stage.tokenizer, dtype, flags.eval_batch_size)
    names = languages and [language.name for language in languages]
    train = answers.replay(stage.table, stage.train, flags.replay, flags.seed, process, names)
    process.check_same({"replayed rows": train.fingerprint})
    return replace(stage, train=train)


def build_trainer(
    flags: TrainingFlags, stage: Stage, model: MindMergerForCausalLM, folder: Path, process: Process
) -> Trainer:
    """Build DeepSpeed's engine for `model`, and the trainer."""
    sizes, pad_id = flags.batch_sizes, stage.tokenizer.source_pad_id
    steps = steps_per_epoch(len(stage.train), sizes) * flags.epoch_num
    optimizer = make_optimizer(flags.optimizer, model.mapping, flags.lr, flags.boundary_lr, process)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda it: make_schedule(flags.lr_scheduler, it, round(flags.warmup_ratio * steps), steps),
        # DeepSpeed's own timers wait for the GPU in every micro batch.
        config={"timers": {"throughput": {"enabled": False}}} | stage.ds_config,
    )
    # After the engine is built: under ZeRO-3 a model cannot run before.
    if not model.pack_rows(pad_id):
        check_padding(model.llm)
        say(process, f"{flags.llm_path} reads padded rows, since its logits of packed rows differ")

    layout = partial(lay_out, bos_token_id=stage.config.llm_bos_token_id, source_pad_id=pad_id, packed=model.packs)
    replay = None
    if flags.replay:
        in_step = engine.zero_optimization_partition_weights()
        replay = ReplayLoss(flags.replay_weight, flags.kl_weight, lambda rows: layout(without_sources(rows)), in_step)

    def open_metrics(state: TrainState) -> Metrics:
        settings = asdict(flags)
        return Metrics(process, folder, state.step, state.metrics_size, flags.report_to, settings)

    return Trainer(
        engine=engine,
        mapping=MappingState(engine, model.mapping, process),
        train=stage.train,
        dev=stage.dev,
        alone=stage.alone,
        lay_out=layout,
        schedule=Schedule(
            sizes, flags.epoch_num, flags.eval_batch_size, flags.eval_steps, flags.save_steps, flags.seed
        ),
        folder=folder,
        config=stage.config.to_dict(),
        process=process,
        open_metrics=open_metrics,
        replay=replay,
    )


def scale_mapping(trainer: Trainer, model: MindMergerForCausalLM, scaled: bool, mean_boundary: bool) -> None:
    """Scale a new mapping's output to the RMS of the LLM's embeddings, and set its boundary to their mean."""
    mapping, rows = model.mapping, range(min(32, len(trainer.train)))
    mean, scale = embedding_scale(model, trainer.batch(trainer.train.tokens(rows)))
    if mean_boundary:
        trainer.mapping.change(mapping.end_boundary, lambda zero: zero + mean)
    if scaled:
        trainer.mapping.change(mapping.mlp.linear2.weight, lambda weight: weight * scale)
        trainer.mapping.change(mapping.mlp.linear2.bias, lambda bias: bias * scale)


def run_settings(
    flags: TrainingFlags, ds_config: dict[str, Any], rows_sha256: str, checkpoint: Path | None, ranks: int
) -> dict[str, Any]:
    """Values that identify a run: flags, number of ranks, and the contents of the files that the flags name."""
    settings = {k: v for k, v in asdict(flags).items() if k not in _FREE_FLAGS}
    if checkpoint is not None:
        del settings["mapping_init"], settings["boundary_init"]
    if checkpoint is not None or flags.mapping_init != "aligned":
        del settings["aligned_sentences"]
    if flags.prompt == "published":
        # Not recorded, so that runs from before this flag still match.
        del settings["prompt"]
    if not flags.replay:
        del settings["replay"], settings["replay_weight"], settings["kl_weight"]
    if flags.replay_languages is None:
        del settings["replay_languages"]
    return settings | {
        "augmentation": flags.uses_prompt,
        "deepspeed": ds_config,
        "initial_mapping_sha256": None if checkpoint is None else sha256(mapping_file(checkpoint)),
        "rows_sha256": rows_sha256,
        "ranks": ranks,
    }


def initial_checkpoint(flags: TrainingFlags) -> Path | None:
    """Path of the mapping to start from: --init_checkpoint, or the mapping stage's best in the augmentation stage.

    Raises:
        InputError: the mapping stage has written no mapping.
    """
    if flags.init_checkpoint is not None:
        return None if flags.init_checkpoint == "none" else Path(flags.init_checkpoint)
    if flags.stage_name == "mapping":
        return None
    checkpoint = Path("outputs") / flags.save_name / "mapping"
    if not checkpoint.exists():
        raise InputError(
            f"the augmentation stage starts from the mapping stage's best, and {checkpoint} does not exist: "
            "run --stage_name mapping first, or name a mapping with --init_checkpoint (none: a new mapping)"
        )
    return checkpoint
