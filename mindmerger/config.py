"""Flags of both scripts, under their published names, and checks across flags."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.cli import flag
from common.devices import HERE, PLAN_HELP, launched_world_size, parse_devices
from common.errors import InputError
from common.logging import ReportTo, require_board
from mindmerger.tasks import EVALUATION_TASKS, TRAINING_TASKS, Task, select_languages


@dataclass(frozen=True)
class ModelPair:
    """Names of the encoder and the LLM that a mapping joins, or of an LLM alone.

    Attributes:
        llm_path: hub id or local folder of the LLM.
        mt_path: hub id or local folder of the multilingual model; None for the LLM alone.
        llm_revision, mt_revision: hub revisions; None for the newest.
        encoder_layer: number of layers used of a decoder-only multilingual model; None for all.
        trust_remote_code: True to run code from a model's repository.
    """

    llm_path: str
    mt_path: str | None = None
    llm_revision: str | None = None
    mt_revision: str | None = None
    encoder_layer: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Limits:
    """Maximum lengths in tokens.

    Attributes:
        max_seq_len: limit of the encoder's source, special tokens included.
        max_prompt_len: limit of the LLM's prompt.
        max_gen_len: limit of a target, its eos included, or of a generated answer.
    """

    max_seq_len: int
    max_prompt_len: int
    max_gen_len: int


@dataclass(frozen=True)
class BatchSizes:
    """Rows of an optimizer step: `train_batch_size` = rows of a forward pass x passes of a rank x ranks."""

    train_batch_size: int
    train_micro_batch_size_per_gpu: int
    gradient_accumulation: int


@dataclass(frozen=True)
class ModelFlags:
    """Flags of models, data and limits that both scripts share."""

    llm_path: str | None = flag(None, "LLM: hub id or local folder")
    mt_path: str | None = flag(None, "multilingual model: hub id or local folder")
    llm_revision: str | None = flag(None, "hub revision of the LLM")
    mt_revision: str | None = flag(None, "hub revision of the multilingual model")
    encoder_layer: int | None = flag(
        None, "number of layers to use of a decoder-only multilingual model; default: as trained, or all"
    )
    trust_remote_code: bool = flag(False, "run code from a model's repository")
    data_dir: str = flag("./datas", "folder in the published data layout")
    languages: str | None = flag(None, "comma-separated English names or ISO codes; default: all of the task's")
    max_seq_len: int = flag(512, "maximum tokens of the encoder's source")
    max_prompt_len: int = flag(512, "maximum tokens of the LLM's prompt")
    max_gen_len: int = flag(512, "maximum tokens of a target or of a generated answer")
    save_name: str = flag("MergeMinds", "name of the folders under outputs/ and results/")
    init_checkpoint: str | None = flag(
        None, "mapping to start from: folder, .safetensors or pytorch_model.bin; none: a new mapping"
    )
    eval_batch_size: int = flag(8, "rows of a batch at evaluation, per device")
    overwrite: bool = flag(False, "replace an output folder that holds another run")
    device: str = flag("auto", "auto: the GPU if there is one, else the CPU")
    plan: str | None = flag(None, PLAN_HELP, nargs="?", const=HERE)
    deepspeed: bool = flag(False, "accepted as in the published commands; training always runs under DeepSpeed")
    local_rank: int = flag(0, "set by the deepspeed launcher")

    def __post_init__(self) -> None:
        for name in ("max_seq_len", "max_prompt_len", "max_gen_len", "eval_batch_size"):
            require_positive(self, name)
        plain = Path(self.save_name).name == self.save_name and self.save_name not in ("", ".", "..")
        if not plain or len(self.save_name) > 100:
            raise InputError(f"--save_name {self.save_name[:100]!r} must be a plain folder name of at most 100 letters")
        if self.plan is not None:
            parse_devices(self.plan)

    @property
    def models(self) -> ModelPair:
        """Names of the models."""
        return ModelPair(
            self.llm_path,
            self.mt_path,
            self.llm_revision,
            self.mt_revision,
            self.encoder_layer,
            self.trust_remote_code,
        )

    @property
    def limits(self) -> Limits:
        """Maximum lengths in tokens."""
        return Limits(self.max_seq_len, self.max_prompt_len, self.max_gen_len)


@dataclass(frozen=True)
class TrainingFlags(ModelFlags):
    """Train MindMerger's mapping: one stage at a time, under the deepspeed launcher."""

    task: str = flag("math", f"one of: {', '.join(TRAINING_TASKS)}")
    prompt: Literal["published", "chat"] = flag(
        "published", "published: the papers' prompts; chat: the LLM's own chat template, for instruct LLMs"
    )
    stage_name: Literal["mapping", "augmentation"] = flag("mapping", "training stage")
    augmentation: bool | None = flag(None, "put the prompt after the mapped states; default: by the stage")
    train_num: int = flag(100_000, "training rows per language")
    dev_size: int = flag(3000, "training rows held out to select the best mapping by perplexity")
    epoch_num: int = flag(3, "passes over the training rows")
    train_batch_size: int | None = flag(None, "rows of an optimizer step on all ranks; default 128")
    train_micro_batch_size_per_gpu: int | None = flag(None, "rows of a forward pass; default at most 8, or derived")
    gradient_accumulation: int | None = flag(None, "forward passes per step on each rank; default: derived")
    optimizer: Literal["adamw", "muon"] = flag(
        "adamw", "adamw: published; muon moves the two matrices by orthogonal steps of the same size"
    )
    lr: float = flag(2e-5, "peak learning rate")
    boundary_lr: float | None = flag(None, "peak learning rate of the boundary vector; default: --lr")
    lr_scheduler: Literal["constant", "cosine"] = flag("constant", "learning rate after warm-up")
    warmup_ratio: float = flag(0.0, "fraction of all steps in which the learning rate rises from 0")
    mapping_init: Literal["scaled", "random", "aligned"] = flag(
        "scaled",
        "scaled: mapped vectors start at the RMS of the LLM's embeddings; aligned: fitted to them on English text "
        "(docs/aligned_start.md); random: published",
    )
    aligned_sentences: int = flag(300, "English sentences among the training rows that an aligned start is fitted to")
    boundary_init: Literal["mean", "zero"] = flag("mean", "mean: the LLM's mean embedding; zero: published")
    gradient_checkpointing: bool = flag(False, "recompute the LLM's layers in the backward pass, to save memory")
    eval_steps: int = flag(500, "optimizer steps between evaluations on the dev rows")
    save_steps: int = flag(500, "optimizer steps between saved states, from which a stopped run continues")
    report_to: ReportTo = flag("tensorboard", "where to log curves, beside metrics.jsonl")
    replay: float = flag(
        0.0, "additional rows, as a fraction of the training rows: right answers of the LLM to the prompt alone"
    )
    replay_languages: str | None = flag(
        None, "languages that the LLM reads: only their rows are answered, and every answer that ends is kept"
    )
    replay_weight: float = flag(1.0, "weight of the cross entropy of replayed rows; 0 leaves only --kl_weight")
    kl_weight: float = flag(0.0, "weight of KL(LLM alone || with the mapping) on the targets of replayed rows")
    seed: int = flag(0, "seed of the mapping's start, the dev rows, the replayed rows and the shuffles")
    cache_dir: str | None = flag(
        None, "folder for tokenised rows, which later runs on the same data reuse; default: in HF_DATASETS_CACHE"
    )
    deepspeed_config: str | None = flag(None, "DeepSpeed JSON; default: ZeRO-2 in bf16 on a GPU, in fp32 on a CPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.boundary_lr is None:
            _fill_in(self, boundary_lr=self.lr)
        for name in ("train_num", "epoch_num", "lr", "boundary_lr", "eval_steps", "save_steps"):
            require_positive(self, name)
        if self.llm_path is None or self.mt_path is None:
            raise InputError("--llm_path and --mt_path are needed: the two models to join")
        if self.dev_size < 0:
            raise InputError(f"--dev_size {self.dev_size} must not be negative")
        self._check_replay()
        if self.aligned_sentences < 10:
            raise InputError(f"--aligned_sentences {self.aligned_sentences} must be at least 10")
        if not 0 <= self.warmup_ratio <= 1:
            raise InputError(f"--warmup_ratio {self.warmup_ratio} must be from 0 to 1")
        require_board(self.report_to)
        if self.device.startswith("cuda:"):
            raise InputError(
                f"--device {self.device}: DeepSpeed gives each rank its GPU; choose which by CUDA_VISIBLE_DEVICES, or "
                "by deepspeed --include"
            )
        planned = None if self.plan is None else parse_devices(self.plan)[1]
        self._derive_batch_sizes(planned or launched_world_size())

    def _check_replay(self) -> None:
        if not 0 <= self.replay <= 1:
            raise InputError(f"--replay {self.replay} must be from 0 to 1")
        for name in ("replay_weight", "kl_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--{name} {getattr(self, name)} must be a number of at least 0")
        if self.kl_weight and not self.replay:
            raise InputError(f"--kl_weight {self.kl_weight} needs --replay: its rows are the replayed ones")
        if self.replay_languages is not None and not self.replay:
            raise InputError(f"--replay_languages {self.replay_languages} needs --replay")
        select_languages(self.replay_languages, "--replay_languages")
        if self.replay and not (self.replay_weight or self.kl_weight):
            raise InputError("--replay_weight 0 leaves replayed rows without a loss: set --kl_weight")
        if self.replay and not self.uses_prompt:
            raise InputError("--replay needs --augmentation True: the LLM alone answers the prompt")

    @property
    def uses_prompt(self) -> bool:
        """True if the prompt follows the mapped states: --augmentation, or the default of the stage."""
        return self.stage_name == "augmentation" if self.augmentation is None else self.augmentation

    @property
    def batch_sizes(self) -> BatchSizes:
        """Batch sizes, none of them None."""
        return BatchSizes(self.train_batch_size, self.train_micro_batch_size_per_gpu, self.gradient_accumulation)

    def _derive_batch_sizes(self, world_size: int) -> None:
        """Fill in missing values of batch = micro batch * accumulation * ranks, and check that it holds."""
        names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation")
        batch, micro, accumulation = given = [getattr(self, name) for name in names]
        for name, value in zip(names, given, strict=True):
            if value is not None:
                require_positive(self, name)
        if batch is None and (micro is None or accumulation is None):
            batch = 128
        if micro is None:
            rows = max(1, batch // (world_size * (accumulation or 1)))
            micro = rows if accumulation else max(size for size in range(1, 9) if rows % size == 0)
        if accumulation is None:
            accumulation = max(1, batch // (micro * world_size))
        batch = batch or micro * accumulation * world_size
        if batch != micro * accumulation * world_size:
            multiple = world_size * (given[1] or 1) * (given[2] or 1)
            raise InputError(
                f"--train_batch_size {batch} is not --train_micro_batch_size_per_gpu {micro} x "
                f"--gradient_accumulation {accumulation} x {world_size} rank(s) = {micro * accumulation * world_size}: "
                f"set it to a multiple of {multiple}{', or leave one of the three out' if all(given) else ''}"
            )
        _fill_in(self, train_batch_size=batch, train_micro_batch_size_per_gpu=micro, gradient_accumulation=accumulation)


@dataclass(frozen=True)
class EvaluationFlags(ModelFlags):
    """Evaluate an LLM with a mapping, or with --baseline alone, on multilingual tasks."""

    task: str = flag("mgsm", f"comma-separated, of: {', '.join(EVALUATION_TASKS)}")
    augmentation: bool | None = flag(
        None, "put the prompt after the mapped states; default: as trained, True for a published .bin"
    )
    prompt: Literal["auto", "published", "chat"] = flag(
        "auto", "prompts, published or in the LLM's chat template; auto: as trained, published for --baseline"
    )
    baseline: bool = flag(False, "evaluate the LLM alone, on the same prompts")
    test_num: int | None = flag(None, "problems per language; default: all")
    answer_parser: Literal["default", "published"] = flag("default", "parser that reads the number of an answer")
    classification: Literal["likelihood", "generation"] = flag(
        "likelihood", "label words scored by likelihood, or generated and compared to the letter, as published"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "auto: bfloat16 on a GPU, float32 on a CPU")
    backend: Literal["transformers", "vllm"] = flag(
        "transformers", "library that generates; vllm (requirements-vllm.txt) batches continuously, on one GPU"
    )
    init_checkpoint: str | None = flag(None, "mapping to evaluate: folder, .safetensors or pytorch_model.bin")
    switch: Literal["on", "off", "decide"] = flag(
        "on",
        "on: the LLM alone answers in languages that the mapping harms, by the verdicts in its config; off: the "
        "mapping answers in all; decide: the same, and these answers and a --baseline run's give new verdicts",
    )
    eval_batch_size: int | None = flag(
        None, "problems at once on each device, fewer while long ones are active; default 16, 256 for vllm"
    )

    def __post_init__(self) -> None:
        if self.eval_batch_size is None:
            _fill_in(self, eval_batch_size=256 if self.backend == "vllm" else 16)
        super().__post_init__()
        if self.test_num is not None:
            require_positive(self, "test_num")
        if self.baseline and self.init_checkpoint is not None:
            raise InputError("--baseline is the LLM alone: leave --init_checkpoint out")
        if self.baseline and self.switch == "decide":
            raise InputError("--baseline has no mapping whose verdicts to decide: leave --switch decide out")
        if not self.baseline and self.init_checkpoint is None and self.plan is None:
            raise InputError("--init_checkpoint is needed: the mapping to evaluate (or --baseline for the LLM alone)")
        if self.baseline and self.augmentation is False:
            raise InputError("--baseline reads only the prompt: leave --augmentation False out")
        if self.baseline and self.llm_path is None:
            raise InputError("--llm_path is needed: the LLM to evaluate")
        if self.backend == "vllm":
            chosen = [name for name in self.task.split(",") if name in EVALUATION_TASKS]
            scored = [name for name in chosen if self.by_likelihood(EVALUATION_TASKS[name])]
            if scored:
                raise InputError(
                    f"--backend vllm generates, and {', '.join(scored)} is scored by likelihood: add --classification "
                    "generation, or leave --backend out"
                )

    def by_likelihood(self, task: Task) -> bool:
        """True if answers to `task` are its most likely labels, without generation."""
        return bool(task.labels) and self.classification == "likelihood"


def _fill_in(flags: object, **values: object) -> None:
    """Replace defaults that depend on other flags; called in `__post_init__` of the frozen flags."""
    for name, value in values.items():
        object.__setattr__(flags, name, value)


def require_positive(flags: object, name: str) -> None:
    """Raise InputError unless the flag's value is above 0."""
    # `not ... > 0` also refuses NaN.
    if not getattr(flags, name) > 0:
        raise InputError(f"--{name} {getattr(flags, name)} must be above 0")
