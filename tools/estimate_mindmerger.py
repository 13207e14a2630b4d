"""Estimates of training and evaluation at any size, without loading models: `--plan` of both scripts.

The models are built from their configs on the meta device and run on a micro batch there (`tools/estimate.py`).
Weights, optimizer, buffers and the number of steps are added by formula.
"""

import math
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModel, DynamicCache, PreTrainedModel

from common.errors import InputError
from common.logging import quiet_libraries
from common.models import base_config
from mindmerger.checkpoint import read_record
from mindmerger.config import BatchSizes, EvaluationFlags, ModelFlags, TrainingFlags
from mindmerger.evaluation.answerer import pick_dtype, trained_models
from mindmerger.frozen_models import cache_name, check_llm, cut_layers, encoder_shape, recompute_layers, without_pooling
from mindmerger.modeling import MindMergerConfig, MindMergerForCausalLM
from mindmerger.tasks import EVALUATION_TASKS, LANGUAGES, TRAINING_TASKS, find_task, select_languages
from tools.estimate import (
    LAUNCH_SECONDS,
    OWN_ATTENTION,
    Cost,
    Device,
    Estimate,
    causal_lm_on_meta,
    cost_of_layers,
    duration,
    find_device,
    on_meta,
    parameters,
    show,
    weight_bytes,
)

# Rows of the published test sets in each language.
PROBLEMS = {"mgsm": 250, "msvamp": 1000, "x-csqa": 1000, "xnli": 5010}
# DeepSpeed's defaults: elements of the buffer for exchanging gradients, and maximum elements of gathered weights under
# ZeRO-3.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
LINK = 100e9  # bytes per second into a device, over fast links


@dataclass(frozen=True)
class Row:
    """Numbers of tokens of an example: the encoder's source, the LLM's prompt and target."""

    source: int
    prompt: int
    target: int

    @property
    def prefix(self) -> int:
        """Tokens before the target: bos, mapped states, boundary, prompt."""
        return 1 + self.source + 1 + self.prompt if self.source else 1 + self.prompt

    def within(self, limits: "Row") -> "Row":
        """Cut the lengths to the limits."""
        return Row(*map(min, astuple(self), astuple(limits)))

    def describe(self) -> str:
        """Describe the lengths in one line."""
        parts = [f"{tokens} of {name}" for name, tokens in vars(self).items() if tokens]
        return f"rows of {self.prefix + self.target} tokens ({', '.join(parts)})"


# Mean tokens of MGSM, and of translations of GSM8K's questions and solutions, by the tokenizers of Gemma 3 (sources)
# and SmolLM2 (prompts, which repeat the question in its language, and targets). A label is a token and an eos.
MEAN_PAIR = Row(73, 170, 62)
MEAN_PROBLEM = Row(73, 190, 103)
LABEL_TOKENS = 2


def plan_training(flags: TrainingFlags) -> None:
    """Print the estimate of a training stage.

    Raises:
        InputError: a config is missing, or flags contradict each other.
    """
    quiet_libraries()
    device = find_device(flags.plan, flags.device)
    config, dtype = _deepspeed(flags, device)
    show(f"{flags.task}, {flags.stage_name} stage", device, estimate_training(flags, device, config, dtype))


def estimate_training(flags: TrainingFlags, device: Device, ds_config: dict, dtype: torch.dtype) -> Estimate:
    """Estimate a stage under a DeepSpeed config from `zero.deepspeed_config`, with weights of `dtype`.

    Tokens and operations are those of rows of mean length, dev rows included.
    """
    zero = ds_config["zero_optimization"]
    model = model_on_meta(flags, dtype)
    if flags.gradient_checkpointing:
        recompute_layers(model.llm)
    mapping, mean = parameters(model.mapping), _mean_row(flags)
    steps = flags.epoch_num * math.ceil((_training_rows(flags) - flags.dev_size) / flags.train_batch_size)
    evaluations = 1 + steps // flags.eval_steps + flags.epoch_num if flags.dev_size else 0
    learned, validated = steps * flags.train_batch_size, evaluations * flags.dev_size  # rows
    weights, traffic = _frozen_weights(flags, device, zero, model, steps)
    activations, row_flops, dev_row_flops = _costs_of_rows(flags, zero, model)
    # Divided by ZeRO: float32 weights and two moments, and in half precision the float32 sum of the gradients.
    divided = 12 if dtype.itemsize == 4 else 16
    optimizer = mapping * (2 * dtype.itemsize + divided / device.count)
    if device.type == "cuda":
        # On a CPU the buffer's pages are never used.
        optimizer += zero.get("reduce_bucket_size", REDUCE_BUCKET) * dtype.itemsize
    flops = learned * row_flops + validated * dev_row_flops
    # The mapping in both forms, the published form of the newest, and three saved states.
    transfers = {"disk": mapping * (8 + 4 + 3 * 12)} | ({"traffic": traffic} if traffic else {})
    return Estimate(
        parameters={"LLM": parameters(model.llm), "encoder": parameters(model.encoder), "mapping": mapping},
        memory={"weights": weights, "optimizer": optimizer, "activations": activations},
        counts={"steps": steps} | _tokens(learned + validated, mean),
        flops=flops,
        seconds=flops / device.flops(dtype.itemsize) / device.count,
        transfers=transfers,
        notes={
            "weights": f"ZeRO-{zero['stage']}, {str(dtype).removeprefix('torch.')}",
            "optimizer": "the mapping, its gradient, AdamW's state, DeepSpeed's buffer for gradients",
            "activations": f"micro batch of {flags.train_micro_batch_size_per_gpu}, {_limits(flags).describe()}",
            "steps": f"of {flags.train_batch_size} rows",
            "work": f"assumed at mean length: {mean.describe()}",
            "time": "communication excluded",
            "disk": "during the run",
            "traffic": f"weights received by each device, {duration(traffic / LINK)} at {LINK / 1e9:.0f} GB/s, partly "
            "during computation",
        },
    )


def _frozen_weights(
    flags: TrainingFlags, device: Device, zero: dict, model: MindMergerForCausalLM, steps: int
) -> tuple[float, float]:
    """Bytes of frozen weights on a device, and bytes of them received by it during the whole stage."""
    weights = weight_bytes(model.llm, model.encoder)
    if zero["stage"] < 3 or device.count == 1:
        return weights, 0.0
    # Gathered for the forward pass, the backward pass and, between them, for recomputation.
    readings = 3 if flags.gradient_checkpointing else 2
    traffic = readings * weights * (1 - 1 / device.count) * steps * flags.gradient_accumulation
    limit = min(zero.get("stage3_max_live_parameters", LIVE_PARAMETERS), parameters(model.llm, model.encoder))
    # The parameters of a module are gathered together for any limit: the head of a 405B model has 2.1e9.
    modules = (*model.llm.modules(), *model.encoder.modules())
    gathered = max(limit, *(sum(p.numel() for p in module.parameters(recurse=False)) for module in modules))
    return weights / device.count + gathered * model.llm.dtype.itemsize, traffic


def _costs_of_rows(flags: TrainingFlags, zero: dict, model: MindMergerForCausalLM) -> tuple[float, float, float]:
    """Peak bytes of activations at the limits, and operations of a training row and of a dev row of mean length."""
    # DeepSpeed takes seconds to import.
    from mindmerger.zero import linear_layers

    limits, mean, micro = _limits(flags), _mean_row(flags), flags.train_micro_batch_size_per_gpu
    longest, encoding = [encoder_cost(model, micro, limits)], encoder_cost(model, micro, mean)
    with linear_layers(zero):
        longest.append(step_cost(model, micro, limits))
        learning = step_cost(model, micro, mean)
    with torch.no_grad():
        validation = step_cost(model, micro, mean, backward=False)
        if batch := min(flags.eval_batch_size, flags.dev_size):
            longest += [encoder_cost(model, batch, limits), step_cost(model, batch, limits, backward=False)]
    peak = max(cost.peak_bytes for cost in longest)
    return peak, (encoding.flops + learning.flops) / micro, (encoding.flops + validation.flops) / micro


def plan_evaluation(flags: EvaluationFlags) -> None:
    """Print the estimate of an evaluation.

    Raises:
        InputError: a config is missing.
    """
    quiet_libraries()
    device = find_device(flags.plan, flags.device)
    if flags.llm_path is None or (flags.mt_path is None and not flags.baseline):
        if flags.init_checkpoint is None:
            raise InputError("--llm_path and --mt_path are needed, or an --init_checkpoint that names the models")
        checkpoint = Path(flags.init_checkpoint)
        augmentation = read_record(checkpoint).get("augmentation") if flags.augmentation is None else flags.augmentation
        flags = replace(flags, augmentation=augmentation, **asdict(trained_models(flags.models, checkpoint)))
    dtype = pick_dtype(flags.dtype, torch.device(device.type))
    for name in flags.task.split(","):
        show(f"evaluation on {name}", device, estimate_evaluation(flags, name, device, dtype))


def estimate_evaluation(flags: EvaluationFlags, name: str, device: Device, dtype: torch.dtype) -> Estimate:
    """Estimate the evaluation of one task with weights of `dtype`: memory at the limits, the rest at mean length."""
    task, limits, batch = find_task(name, EVALUATION_TASKS), _evaluation_limits(flags, name), flags.eval_batch_size
    check_llm(flags.models)
    model = None if flags.baseline else model_on_meta(flags, dtype)
    llm = model.llm if model else causal_lm_on_meta(flags.llm_path, flags.llm_revision, dtype, flags.trust_remote_code)
    parts = {"LLM": llm} | ({"encoder": model.encoder, "mapping": model.mapping} if model else {})
    mean = (replace(MEAN_PROBLEM, target=LABEL_TOKENS) if task.labels else MEAN_PROBLEM).within(limits)
    with torch.no_grad():
        prefill, mean_prefill = prefill_cost(llm, batch, limits.prefix), prefill_cost(llm, batch, mean.prefix)
        encoding, mean_encoding = (
            encoder_cost(model, batch, row) if model else Cost(0, 0, 0) for row in (limits, mean)
        )
        cache = prefill_cost(llm, batch, limits.prefix + limits.target).kept_bytes
        calls = prefill_cost(llm, batch, 1).calls
    if flags.by_likelihood(task):
        # The cache of the prefill, and a copy for each label.
        cache *= 1 + len(task.labels)

    languages = select_languages(flags.languages) or task.languages
    problems = len(languages) * min(PROBLEMS[name], flags.test_num or PROBLEMS[name])
    prompt_flops, speed = mean_encoding.flops + mean_prefill.flops, device.flops(dtype.itemsize)
    token_flops = 2 * (parameters(llm) - llm.get_input_embeddings().weight.numel()) * batch
    # A step, one token of every row, reads all weights and the cache.
    token_seconds = max((weight_bytes(llm) + mean_prefill.kept_bytes) / device.bandwidth, token_flops / speed)
    time_note = "all rows of a batch active"
    if device.type == "cuda" and flags.backend == "transformers" and calls * LAUNCH_SECONDS > token_seconds:
        token_seconds = calls * LAUNCH_SECONDS
        time_note += f"; a token takes {calls:,.0f} operations, each {LAUNCH_SECONDS * 1e6:.0f} us to start (assumed)"
    activations = max(encoding.peak_bytes, prefill.peak_bytes - prefill.kept_bytes)
    return Estimate(
        parameters={title: parameters(part) for title, part in parts.items()},
        memory={"weights": weight_bytes(*parts.values()), "cache": cache, "activations": activations},
        counts={"problems": problems} | _tokens(problems, mean),
        flops=problems / batch * (prompt_flops + mean.target * token_flops),
        seconds=problems / batch * (prompt_flops / speed + mean.target * token_seconds) / device.count,
        notes={
            "weights": str(dtype).removeprefix("torch."),
            "cache": f"at most: {batch} problems at once, {limits.describe()}",
            "work": f"assumed at mean length: {mean.describe()}",
            "time": time_note,
        },
    )


def encoder_on_meta(
    path: str, revision: str | None, dtype: torch.dtype, trust_remote_code: bool, layers: int | None = None
) -> PreTrainedModel:
    """Build the encoder of `load_encoder` without data, from its config.

    Raises:
        InputError: there is no such config, or it is not of an encoder.
    """
    config = base_config(path, revision, trust_remote_code)
    if layers is not None:
        cut_layers(layers, path, config)
    options = {} if config.is_encoder_decoder else without_pooling(config)
    model = on_meta(AutoModel, path, config, dtype, trust_remote_code, **options)
    return model.get_encoder() if config.is_encoder_decoder else model


def model_on_meta(flags: ModelFlags, dtype: torch.dtype) -> MindMergerForCausalLM:
    """Build encoder, mapping and LLM without data, all in `dtype`, from the configs of the flags."""
    check_llm(flags.models)
    llm = causal_lm_on_meta(flags.llm_path, flags.llm_revision, dtype, flags.trust_remote_code)
    encoder = encoder_on_meta(flags.mt_path, flags.mt_revision, dtype, flags.trust_remote_code, flags.encoder_layer)
    config = MindMergerConfig(
        llm_hidden_size=llm.get_input_embeddings().weight.shape[1],
        mt_hidden_size=encoder_shape(flags.models)[0],
    )
    with torch.device("meta"):
        model = MindMergerForCausalLM(config, encoder, llm)
    model.mapping.to(dtype)
    return model


def encoder_cost(model: MindMergerForCausalLM, rows: int, row: Row) -> Cost:
    """Cost of encoding a batch of sources."""

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
        embeds = torch.cat([vectors, boundary.expand(rows, 1, -1), words], dim=1)
        # As in training, rows that cannot be packed have a mask; without one these models look for packed rows.
        has_mask = model.llm.config.model_type in OWN_ATTENTION
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device="meta") if has_mask else None
        options = {"attention_mask": mask, "use_cache": False, "logits_to_keep": row.target}
        logits = model.llm(inputs_embeds=embeds, **options).logits.float()
        labels = torch.zeros(rows * row.target, dtype=torch.long, device="meta")
        loss = F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
        if backward:
            loss.backward()
        return loss

    return cost_of_layers(run, model.llm, model.mapping)


def prefill_cost(llm: torch.nn.Module, rows: int, tokens: int) -> Cost:
    """Cost of the prefill of a batch of sequences; their cache is kept."""

    def run() -> DynamicCache:
        width = llm.get_input_embeddings().weight.shape[1]
        embeds = torch.empty(rows, tokens, width, dtype=llm.dtype, device="meta")
        cache = DynamicCache(config=llm.config)
        llm(inputs_embeds=embeds, **{cache_name(type(llm)): cache}, use_cache=True, logits_to_keep=1)
        return cache

    return cost_of_layers(run, llm)


def _deepspeed(flags: TrainingFlags, device: Device) -> tuple[dict, torch.dtype]:
    """DeepSpeed config of the stage, and dtype of its weights."""
    # DeepSpeed takes seconds to import.
    from mindmerger.zero import deepspeed_config, weights_dtype

    # DeepSpeed checks the sizes against the present ranks: this process only.
    micro, accumulation = flags.train_micro_batch_size_per_gpu, flags.gradient_accumulation
    sizes = BatchSizes(micro * accumulation, micro, accumulation)
    config = deepspeed_config(flags.deepspeed_config, sizes, torch.device(device.type))
    return config, weights_dtype(config)


def _limits(flags: TrainingFlags) -> Row:
    return Row(flags.max_seq_len, flags.max_prompt_len if flags.uses_prompt else 0, flags.max_gen_len)


def _mean_row(flags: TrainingFlags) -> Row:
    mean = MEAN_PAIR if flags.stage_name == "mapping" else MEAN_PROBLEM
    if flags.stage_name == "augmentation" and find_task(flags.task, TRAINING_TASKS).labels:
        mean = replace(mean, target=LABEL_TOKENS)
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
    """Number of rows by the flags, with English in the augmentation stage only."""
    task = find_task(flags.task, TRAINING_TASKS)
    languages = select_languages(flags.languages) or (*task.languages, LANGUAGES["English"])
    if flags.stage_name == "mapping":
        languages = tuple(language for language in languages if language.code != "en")
    rows = len(languages) * flags.train_num
    if rows <= flags.dev_size:
        raise InputError(f"--dev_size {flags.dev_size} holds out all of the {rows} training rows")
    return rows


def _tokens(rows: int, mean: Row) -> dict[str, int]:
    return {"LLM tokens": rows * (mean.prefix + mean.target), "encoder tokens": rows * mean.source}
