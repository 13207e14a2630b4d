"""What training and evaluation take at any size, before anything loads: `--plan` of both scripts.

The models are built from their configs on the meta device, and a micro batch is run through them there
(`tools/estimate.py`); this module says which runs there are, and what stays in memory beside them.
"""

import math
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModel, DynamicCache, PreTrainedModel

from common.devices import Device
from common.errors import InputError
from common.logging import quiet_libraries
from common.models import base_config
from common.ranks import Process
from mindmerger.checkpoint import read_record
from mindmerger.config import EvaluationFlags, ModelFlags, TrainingFlags
from mindmerger.evaluation.answerer import pick_dtype, trained_models
from mindmerger.frozen_models import cut_layers, without_pooling
from mindmerger.modeling import MindMergerConfig, MindMergerForCausalLM
from mindmerger.tasks import EVALUATION_TASKS, LANGUAGES, TRAINING_TASKS, find_task, select_languages
from tools.estimate import (
    Cost,
    amount,
    causal_lm_on_meta,
    cost_of_layers,
    duration,
    fits,
    gb,
    on_meta,
    parameters,
    plan_device,
    show,
    weight_bytes,
)

# Rows of the published test sets, for each language.
PROBLEMS = {"mgsm": 250, "msvamp": 1000, "x-csqa": 1000, "xnli": 5010}
# DeepSpeed's own defaults: elements of the buffer that gradients are exchanged from, and under ZeRO-3 of gathered
# weights that it keeps at most.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
LINK = 100e9  # bytes per second into a device, over fast links


@dataclass(frozen=True)
class Row:
    """Tokens of an example: the encoder's source, the LLM's prompt and target."""

    source: int
    prompt: int
    target: int

    @property
    def prefix(self) -> int:
        """What the LLM reads before the target: bos, mapped states, boundary, prompt."""
        return 1 + self.source + 1 + self.prompt if self.source else 1 + self.prompt

    def within(self, limits: "Row") -> "Row":
        """The same, cut to the limits."""
        return Row(*(min(getattr(self, f.name), getattr(limits, f.name)) for f in fields(Row)))


# Means over MGSM, and translations of GSM8K's questions and their solutions, by the tokenizers of Gemma 3 (sources) and
# SmolLM2 (prompts, which repeat the question in its language, and targets). A label is a token and an eos.
MEAN_PAIR = Row(73, 170, 62)
MEAN_PROBLEM = Row(73, 190, 103)
LABEL_TOKENS = 2


@dataclass(frozen=True)
class TrainingPlan:
    """A stage of training; sizes in bytes, for each device.

    Attributes:
        llm, encoder, mapping: parameters.
        weights: both frozen models, or under ZeRO-3 a device's share of them and what is gathered of the others'.
        optimizer: the mapping, its gradient, AdamW's state, and the buffer that gradients are exchanged from.
        activations: at the peak of a micro batch whose rows are as long as the limits allow.
        mean_activations: the same, for rows of mean length.
        micro_batches: on each device, over the whole stage.
        llm_tokens, encoder_tokens: read over the whole stage, on all devices; dev rows included.
        flops: of the whole stage, on all devices.
        traffic: into each device, over the whole stage.
        disk: while the stage runs.
    """

    llm: int
    encoder: int
    mapping: int
    weights: float
    optimizer: float
    activations: float
    mean_activations: float
    steps: int
    micro_batches: int
    llm_tokens: int
    encoder_tokens: int
    flops: float
    traffic: float
    disk: float

    @property
    def peak(self) -> float:
        """The most that a device has to hold."""
        return self.weights + self.optimizer + self.activations


@dataclass(frozen=True)
class EvaluationPlan:
    """One task's evaluation; sizes in bytes, for each device.

    Attributes:
        llm, encoder, mapping: parameters.
        weights: all three.
        cache: keys and values of a full batch, at its longest.
        activations: of reading a full batch, beside its cache.
        problems: over all languages.
        llm_tokens, encoder_tokens: read over the whole task, on all devices; of the LLM's, answers are a part.
        flops: of the whole task, on all devices.
        seconds: of the whole task; writing an answer is bound by reading weights and cache.
    """

    llm: int
    encoder: int
    mapping: int
    weights: float
    cache: float
    activations: float
    problems: int
    llm_tokens: int
    encoder_tokens: int
    flops: float
    seconds: float

    @property
    def peak(self) -> float:
        """The most that a device has to hold."""
        return self.weights + self.cache + self.activations


def plan_training(flags: TrainingFlags) -> None:
    """Print what a stage takes.

    Raises:
        InputError: a config that is not there, or flags that do not fit together.
    """
    quiet_libraries()
    device = plan_device(flags.plan, flags.device)
    config, dtype = _deepspeed(flags, device)
    plan = training_plan(flags, device, config, dtype)
    stage = config["zero_optimization"]["stage"]
    limits, mean = _limits(flags), _mean_row(flags)
    micro, dev_batch = flags.train_micro_batch_size_per_gpu, min(flags.eval_batch_size, flags.dev_size)
    half = dtype.itemsize < 4
    seconds = plan.flops / device.flops(dtype.itemsize) / device.count
    lines = [
        ("parameters", f"LLM {amount(plan.llm)}, encoder {amount(plan.encoder)}, mapping {amount(plan.mapping)}"),
        ("weights", f"{gb(plan.weights)} (ZeRO-{stage}, {'bf16' if half else 'fp32'})"),
        ("mapping, AdamW", f"{gb(plan.optimizer)}, with DeepSpeed's buffer for gradients"),
        (
            "activations",
            f"at most {gb(plan.activations)}: micro batch of {micro}"
            + (f" or {dev_batch} dev rows" if dev_batch else "")
            + f", {_describe(limits)}"
            + (", with recomputation" if flags.gradient_checkpointing else ""),
        ),
        ("", f"{gb(plan.mean_activations)} for rows of mean length: {_describe(mean)} (assumed)"),
        ("memory", fits(plan.peak, device)),
        ("steps", f"{plan.steps:,} of {flags.train_batch_size} rows"),
        ("tokens", _describe_tokens(plan)),
        ("work", f"{amount(plan.flops)}FLOP at mean length, dev rows included"),
        ("time", f"{duration(seconds)}, waiting for nobody"),
    ]
    if plan.traffic:
        lines.append(("traffic", f"{gb(plan.traffic)} of weights into each device: {_link_time(plan.traffic)}"))
    lines.append(("disk", f"{gb(plan.disk)} while it runs"))
    show(f"{flags.task}, {flags.stage_name} stage", device, lines)


def training_plan(flags: TrainingFlags, device: Device, ds_config: dict, dtype: torch.dtype) -> TrainingPlan:
    """What a stage takes, with a DeepSpeed config as `engine.deepspeed_config` gives it and weights of `dtype`."""
    # DeepSpeed takes seconds to import.
    from mindmerger.zero import linear_layers

    model = model_on_meta(flags, dtype)
    if flags.gradient_checkpointing:
        model.checkpoint_gradients()
    llm, encoder, mapping = (parameters(part) for part in (model.llm, model.encoder, model.mapping))
    limits, mean = _limits(flags), _mean_row(flags)
    micro, accumulation = flags.train_micro_batch_size_per_gpu, flags.gradient_accumulation

    zero = ds_config["zero_optimization"]
    weights = weight_bytes(model.llm, model.encoder)
    # Divided by ZeRO: float32 weights and two moments, and in half precision the float32 sum of the gradients.
    divided = 12 if dtype.itemsize == 4 else 16
    optimizer = mapping * (2 * dtype.itemsize + divided / device.count)
    if device.type == "cuda":
        # On a CPU its pages are never touched.
        optimizer += zero.get("reduce_bucket_size", REDUCE_BUCKET) * dtype.itemsize
    traffic = 0.0
    rows = _training_rows(flags)
    steps = flags.epoch_num * math.ceil((rows - flags.dev_size) / flags.train_batch_size)
    if zero["stage"] == 3 and device.count > 1:
        # Gathered for the forward pass, the backward pass, and between them to compute anew.
        readings = 3 if flags.gradient_checkpointing else 2
        traffic = readings * weights * (1 - 1 / device.count) * steps * accumulation
        live = min(zero.get("stage3_max_live_parameters", LIVE_PARAMETERS), llm + encoder)
        weights = weights / device.count + live * dtype.itemsize

    encoding, mean_encoding = encoder_cost(model, micro, limits), encoder_cost(model, micro, mean)
    with linear_layers(zero):
        step, mean_step = step_cost(model, micro, limits), step_cost(model, micro, mean)
    peak = max(encoding.peak_bytes, step.peak_bytes)
    with torch.no_grad():
        mean_reading = step_cost(model, micro, mean, backward=False)
        if batch := min(flags.eval_batch_size, flags.dev_size):
            validation = step_cost(model, batch, limits, backward=False)
            peak = max(peak, encoder_cost(model, batch, limits).peak_bytes, validation.peak_bytes)
    evaluations = 1 + steps // flags.eval_steps + flags.epoch_num if flags.dev_size else 0
    learned, validated = steps * flags.train_batch_size, evaluations * flags.dev_size  # rows
    flops = learned / micro * (mean_encoding.flops + mean_step.flops)
    flops += validated / micro * (mean_encoding.flops + mean_reading.flops)
    return TrainingPlan(
        llm=llm,
        encoder=encoder,
        mapping=mapping,
        weights=weights,
        optimizer=optimizer,
        activations=peak,
        mean_activations=max(mean_encoding.peak_bytes, mean_step.peak_bytes),
        steps=steps,
        micro_batches=steps * accumulation,
        llm_tokens=(learned + validated) * (mean.prefix + mean.target),
        encoder_tokens=(learned + validated) * mean.source,
        flops=flops,
        traffic=traffic,
        # The mapping in both forms, the published form of the newest, and three states to continue from.
        disk=mapping * (8 + 4 + 3 * 12),
    )


def plan_evaluation(flags: EvaluationFlags) -> None:
    """Print what an evaluation takes.

    Raises:
        InputError: a config that is not there.
    """
    quiet_libraries()
    device = plan_device(flags.plan, flags.device)
    if flags.llm_path is None or (flags.mt_path is None and not flags.baseline):
        if flags.init_checkpoint is None:
            raise InputError("--llm_path and --mt_path are needed, or an --init_checkpoint that names the models")
        checkpoint = Path(flags.init_checkpoint)
        augmentation = read_record(checkpoint).get("augmentation") if flags.augmentation is None else flags.augmentation
        flags = replace(flags, augmentation=augmentation, **asdict(trained_models(flags.models, checkpoint)))
    dtype = pick_dtype(flags.dtype, torch.device(device.type))
    for name in flags.task.split(","):
        plan = evaluation_plan(flags, name, device, dtype)
        limits = _evaluation_limits(flags, name)
        batch = flags.eval_batch_size
        lines = [
            ("parameters", f"LLM {amount(plan.llm)}, encoder {amount(plan.encoder)}, mapping {amount(plan.mapping)}"),
            ("weights", f"{gb(plan.weights)} ({str(dtype).removeprefix('torch.')})"),
            ("cache", f"at most {gb(plan.cache)}: {batch} problems at once, {_describe(limits)}"),
            ("activations", f"at most {gb(plan.activations)}"),
            ("memory", fits(plan.peak, device)),
            ("tokens", _describe_tokens(plan)),
            ("work", f"{plan.problems:,} problems, {amount(plan.flops)}FLOP at mean length (assumed)"),
            ("time", f"{duration(plan.seconds)}, with every place of a batch taken"),
        ]
        show(f"evaluation on {name}", device, lines)


def evaluation_plan(flags: EvaluationFlags, name: str, device: Device, dtype: torch.dtype) -> EvaluationPlan:
    """What the evaluation of one task takes, with weights of `dtype`."""
    task = find_task(name, EVALUATION_TASKS)
    if flags.baseline:
        model = None
        llm = causal_lm_on_meta(flags.llm_path, flags.llm_revision, dtype, flags.trust_remote_code)
        parts = [llm]
    else:
        model = model_on_meta(flags, dtype)
        llm, parts = model.llm, [model.llm, model.encoder, model.mapping]
    limits, batch = _evaluation_limits(flags, name), flags.eval_batch_size
    mean = MEAN_PROBLEM if not task.labels else Row(MEAN_PROBLEM.source, MEAN_PROBLEM.prompt, LABEL_TOKENS)
    mean = mean.within(limits)

    with torch.no_grad():
        reading = reading_cost(llm, batch, limits.prefix)
        cache = cache_bytes(llm, batch, limits.prefix + limits.target)
        if flags.by_likelihood(task):
            # Once as read, and a copy for each label.
            cache *= 1 + len(task.labels)
        mean_reading, mean_cache = reading_cost(llm, batch, mean.prefix), cache_bytes(llm, batch, mean.prefix)
        encoding = Cost(0, 0, 0) if model is None else encoder_cost(model, batch, limits)
        mean_encoding = Cost(0, 0, 0) if model is None else encoder_cost(model, batch, mean)

    languages = select_languages(flags.languages) or task.languages
    problems = len(languages) * min(PROBLEMS[name], flags.test_num or PROBLEMS[name])
    batches = problems / batch
    word = 2 * (parameters(llm) - llm.get_input_embeddings().weight.numel()) * batch
    flops = batches * (mean_encoding.flops + mean_reading.flops + mean.target * word)
    speed = device.flops(dtype.itemsize)
    # For a token of every row all weights are read, and the cache.
    per_word = max((weight_bytes(llm) + mean_cache) / device.bandwidth, word / speed)
    seconds = batches * ((mean_encoding.flops + mean_reading.flops) / speed + mean.target * per_word) / device.count
    return EvaluationPlan(
        llm=parameters(llm),
        encoder=0 if model is None else parameters(model.encoder),
        mapping=0 if model is None else parameters(model.mapping),
        weights=weight_bytes(*parts),
        cache=cache,
        activations=max(encoding.peak_bytes, reading.peak_bytes - reading.kept_bytes),
        problems=problems,
        llm_tokens=problems * (mean.prefix + mean.target),
        encoder_tokens=problems * mean.source,
        flops=flops,
        seconds=seconds,
    )


def encoder_on_meta(
    path: str, revision: str | None, dtype: torch.dtype, trust_remote_code: bool, layers: int | None = None
) -> PreTrainedModel:
    """What `load_encoder` would load, as shapes without data: only the config is read.

    Raises:
        InputError: there is none, or not of an encoder.
    """
    config = base_config(path, revision, trust_remote_code)
    if layers is not None:
        cut_layers(layers, path, config)
    options = {} if config.is_encoder_decoder else without_pooling(config)
    model = on_meta(AutoModel, path, config, dtype, trust_remote_code, **options)
    return model.get_encoder() if config.is_encoder_decoder else model


def model_on_meta(flags: ModelFlags, dtype: torch.dtype) -> MindMergerForCausalLM:
    """Encoder, mapping and LLM as shapes without data, all in `dtype`, from the configs that the flags name."""
    llm = causal_lm_on_meta(flags.llm_path, flags.llm_revision, dtype, flags.trust_remote_code)
    encoder = encoder_on_meta(flags.mt_path, flags.mt_revision, dtype, flags.trust_remote_code, flags.encoder_layer)
    config = MindMergerConfig(
        llm_hidden_size=llm.config.get_text_config().hidden_size,
        mt_hidden_size=encoder.config.get_text_config().hidden_size,
    )
    with torch.device("meta"):
        model = MindMergerForCausalLM(config, encoder, llm)
    model.mapping.to(dtype)
    return model


def encoder_cost(model: MindMergerForCausalLM, rows: int, row: Row) -> Cost:
    """Cost of encoding so many sources at once."""

    def run() -> torch.Tensor:
        ids = torch.zeros(rows, row.source, dtype=torch.long, device="meta")
        mask = torch.ones_like(ids)
        with torch.no_grad():
            return model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state

    return cost_of_layers(run, model.encoder)


def step_cost(model: MindMergerForCausalLM, rows: int, row: Row, backward: bool = True) -> Cost:
    """Cost of a micro batch from encoder states to the mapping's gradient, or to the loss alone."""
    m, h = model.config.mt_hidden_size, model.config.llm_hidden_size
    dtype = model.mapping.end_boundary.dtype

    def run() -> torch.Tensor:
        model.mapping.zero_grad()
        states = torch.empty(rows, row.source, m, dtype=dtype, device="meta")
        vectors, boundary = model.mapping(states)
        words = torch.empty(rows, 1 + row.prompt + row.target, h, dtype=dtype, device="meta")
        embeds = torch.cat([vectors, boundary, words], dim=1)
        logits = model.llm(inputs_embeds=embeds, use_cache=False, logits_to_keep=row.target).logits.float()
        labels = torch.zeros(rows * row.target, dtype=torch.long, device="meta")
        loss = F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
        if backward:
            loss.backward()
        return loss

    return cost_of_layers(run, model.llm, model.mapping)


def reading_cost(llm: torch.nn.Module, rows: int, tokens: int) -> Cost:
    """Cost of reading so many sequences at once; their cache is kept."""

    def run() -> DynamicCache:
        embeds = torch.empty(rows, tokens, llm.config.get_text_config().hidden_size, dtype=llm.dtype, device="meta")
        cache = DynamicCache(config=llm.config)
        llm(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    return cost_of_layers(run, llm)


def cache_bytes(llm: torch.nn.Module, rows: int, tokens: int) -> float:
    """Keys and values of so many sequences."""
    return reading_cost(llm, rows, tokens).kept_bytes


def _deepspeed(flags: TrainingFlags, device: Device) -> tuple[dict, torch.dtype]:
    """The stage's DeepSpeed config, and the dtype of its weights."""
    # DeepSpeed takes seconds to import.
    from mindmerger.zero import deepspeed_config, weights_dtype

    # It multiplies the batch sizes up for the ranks that there are: this process.
    one = copy(flags)
    one.train_batch_size = flags.train_micro_batch_size_per_gpu * flags.gradient_accumulation
    config = deepspeed_config(one, Process(0, 1, torch.device(device.type)))
    return config, weights_dtype(config)


def _limits(flags: TrainingFlags) -> Row:
    return Row(flags.max_seq_len, flags.max_prompt_len if flags.uses_prompt else 0, flags.max_gen_len)


def _mean_row(flags: TrainingFlags) -> Row:
    if flags.stage_name == "mapping":
        mean = MEAN_PAIR
    else:
        is_choice = bool(find_task(flags.task, TRAINING_TASKS).labels)
        mean = MEAN_PROBLEM if not is_choice else Row(MEAN_PROBLEM.source, MEAN_PROBLEM.prompt, LABEL_TOKENS)
    return mean.within(_limits(flags))


def _evaluation_limits(flags: EvaluationFlags, name: str) -> Row:
    likelihood = flags.by_likelihood(EVALUATION_TASKS[name])
    uses_prompt = flags.baseline or flags.augmentation is not False
    return Row(
        0 if flags.baseline else flags.max_seq_len,
        flags.max_prompt_len if uses_prompt else 0,
        LABEL_TOKENS if likelihood else flags.max_gen_len,
    )


def _training_rows(flags: TrainingFlags) -> int:
    """As many as the flags ask for, in English too; the mapping stage has no pairs from English."""
    task = find_task(flags.task, TRAINING_TASKS)
    languages = select_languages(flags.languages) or (*task.languages, LANGUAGES["English"])
    if flags.stage_name == "mapping":
        languages = tuple(language for language in languages if language.code != "en")
    rows = len(languages) * flags.train_num
    if rows <= flags.dev_size:
        raise InputError(f"--dev_size {flags.dev_size} holds out all of the {rows} training rows")
    return rows


def _describe(row: Row) -> str:
    parts = [f"{tokens} of {name}" for name, tokens in vars(row).items() if tokens]
    return f"rows of {row.prefix + row.target} tokens ({', '.join(parts)})"


def _describe_tokens(plan: TrainingPlan | EvaluationPlan) -> str:
    return f"{amount(plan.llm_tokens)} for the LLM, {amount(plan.encoder_tokens)} for the encoder, at mean length"


def _link_time(traffic: float) -> str:
    return f"{duration(traffic / LINK)} at {LINK / 1e9:.0f} GB/s, in part beside the work"
