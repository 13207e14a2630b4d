"""A causal LM, optionally behind an encoder and a mapping, that answers questions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from common.errors import InputError, within_memory
from common.io import sha256
from common.models import TOO_LARGE
from mindmerger.batching import Tokens, lay_out, without_sources
from mindmerger.chat import is_thinking_tag, without_thinking
from mindmerger.checkpoint import CONFIG, mapping_file, read_mapping, read_record, with_trained_layer
from mindmerger.config import Limits, ModelPair
from mindmerger.evaluation.decoding import greedy_steps, label_log_likelihoods
from mindmerger.frozen_models import check_llm, find_masking, load_llm
from mindmerger.modeling import (
    InputEmbeds,
    MindMergerConfig,
    MindMergerForCausalLM,
    mapping_config,
)
from mindmerger.probe import check_answers
from mindmerger.tasks.task import NO_PROMPT
from mindmerger.tokenization import ExampleTokenizer, load_example_tokenizer


class Output(NamedTuple):
    """The answer to one problem.

    Attributes:
        problem: index of the problem.
        text: text of the answer, without special tokens.
        stopped: True if the answer ended before the limit.
    """

    problem: int
    text: str
    stopped: bool


class Answerer:
    """A causal LM, optionally behind an encoder and a mapping.

    Args:
        llm: language model that answers.
        tokenizer: tokenizer of examples.
        model: encoder and mapping in front of `llm`; None for the LLM alone, whose input is the prompt only.

    Attributes:
        eos_token_ids: ids that end an answer.
    """

    def __init__(self, llm: PreTrainedModel, tokenizer: ExampleTokenizer, model: MindMergerForCausalLM | None = None):
        self.llm = llm
        self.tokenizer = tokenizer
        self.model = model
        self._vocabulary = tokenizer.llm_tokenizer
        configured = llm.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        known = (*configured, self._vocabulary.eos_token_id)
        self.eos_token_ids = {index for index in (*known, *tokenizer.closing[-1:]) if index is not None}
        added = self._vocabulary.added_tokens_decoder.items()
        self._hidden = {index for index, token in added if token.special and not is_thinking_tag(token.content)}

    @torch.inference_mode()
    def embed(self, rows: list[Tokens]) -> InputEmbeds:
        """Compute the LLM's input for `rows`."""
        rows = rows if self.model is not None else without_sources(rows)
        batch = lay_out(rows, self.tokenizer.bos_token_id, self.tokenizer.source_pad_id).to(self.llm.device)
        if self.model is not None:
            return InputEmbeds(self.model.embed(batch), batch.mask)
        return InputEmbeds(self.llm.get_input_embeddings()(batch.token_ids), batch.mask)

    def generate(
        self,
        rows: dict[int, Tokens],
        max_new_tokens: int,
        slots: int,
        has_ended: Callable[[list[int]], bool] | None = None,
    ) -> Iterator[list[Output]]:
        """Generate greedy answers to problems, at most `slots` at once; see `greedy_steps`.

        Args:
            rows: tokens of the problems by index, in the order in which they start.
            max_new_tokens: maximum tokens of an answer.
            slots: maximum number of problems at once.
            has_ended: function from an answer's token ids so far to True if the answer ends there.

        Yields:
            After every step, the answers that ended in it.
        """

        def input_of(problems: list[int]) -> InputEmbeds:
            return self.embed([rows[problem] for problem in problems])

        lengths = {problem: len(tokens) for problem, tokens in rows.items()}
        eos = self.eos_token_ids
        for answers in greedy_steps(self.llm, rows, input_of, slots, max_new_tokens, eos, has_ended, lengths):
            yield [self.output(answer.problem, answer.ids) for answer in answers if answer.is_done]

    def choose(self, rows: dict[int, Tokens], labels: dict[int, tuple[str, ...]], slots: int) -> Iterator[list[Output]]:
        """Answer each problem by the most likely of its `labels`, in batches of `slots` problems."""
        problems = list(rows)
        for start in range(0, len(problems), slots):
            batch = problems[start : start + slots]
            words = list(dict.fromkeys(label for problem in batch for label in labels[problem]))
            scores, _ = self.log_likelihoods([rows[problem] for problem in batch], words)
            by_word = [dict(zip(words, row, strict=True)) for row in scores.tolist()]
            yield [
                Output(problem, max(labels[problem], key=likelihoods.get), True)
                for problem, likelihoods in zip(batch, by_word, strict=True)
            ]

    def stream(self, sequence: InputEmbeds, max_new_tokens: int) -> Iterator[str]:
        """Yield the text of the greedy answer to a one-row `sequence` after every token."""
        for [answer] in greedy_steps(self.llm, [0], lambda _: sequence, 1, max_new_tokens, self.eos_token_ids):
            yield self.text(answer.ids)

    def log_likelihoods(self, rows: list[Tokens], words: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log likelihoods of each of `words` as the answer to each row; see `label_log_likelihoods`."""
        return label_log_likelihoods(self.llm, self.embed(rows), [self.tokenizer.label_ids(word) for word in words])

    def output(self, problem: int, ids: list[int]) -> Output:
        """Build the `Output` of new token ids, in a chat without the thinking part of the answer."""
        text = self.text(ids) if self.tokenizer.chat is None else without_thinking(self.text(ids, tags=True))
        return Output(problem, text, ids[-1] in self.eos_token_ids)

    def text(self, ids: list[int], tags: bool = False) -> str:
        """Decode token ids of the LLM, without special tokens; `tags` keeps those around a thinking part."""
        if tags:
            return self._vocabulary.decode([index for index in ids if index not in self._hidden])
        return self._vocabulary.decode(ids, skip_special_tokens=True)


@dataclass(frozen=True)
class AnswererParts:
    """Checked parts of an answerer, without its models.

    Attributes:
        models: names of LLM and encoder; no encoder for the LLM alone.
        augmentation: True if the prompt follows the mapped states.
        tokenizer: tokenizers of both models.
        checkpoint, config, mapping: path of the mapping, its config and its tensors; None for the LLM alone.
    """

    models: ModelPair
    augmentation: bool
    tokenizer: ExampleTokenizer
    checkpoint: Path | None = None
    config: MindMergerConfig | None = None
    mapping: dict[str, torch.Tensor] | None = None

    def load(self, dtype: torch.dtype, device: torch.device, generates: bool = True) -> Answerer:
        """Load the models on `device` in `dtype` and build the answerer.

        Args:
            generates: True if this copy of the LLM generates; False if vLLM does.

        Raises:
            InputError: weights are missing, a model's outputs depend on the batch or on the cache, or memory runs out.
        """
        models, model, trusted = self.models, None, self.models.trust_remote_code
        with within_memory(f"{models.llm_path}: {TOO_LARGE}"):
            if self.mapping is None:
                llm = load_llm(models.llm_path, models.llm_revision, dtype, trusted).to(device)
            else:
                model = MindMergerForCausalLM.from_base_models(self.config, dtype, trusted, self.mapping)
                llm = model.to(device).llm
                model.masking = find_masking(model.encoder, self.tokenizer.source_pad_id, ("padding", "alone"))
            if generates:
                check_answers(llm)
        return Answerer(llm, self.tokenizer, model)

    def settings(self) -> dict[str, Any]:
        """Settings of this answerer that identify its results."""
        names = ("llm_path", "llm_revision", "mt_path", "mt_revision", "encoder_layer")
        return {
            **{name: getattr(self.models, name) for name in names},
            "mapping_sha256": None if self.checkpoint is None else sha256(mapping_file(self.checkpoint)),
            "augmentation": self.augmentation,
            # Not recorded for published prompts, so that finished runs from before this setting still match.
            **({} if self.tokenizer.chat is None else {"chat_template": self.tokenizer.chat.prompt(NO_PROMPT).text}),
        }


def prepare_answerer(
    models: ModelPair,
    checkpoint: Path | None,
    limits: Limits,
    augmentation: bool | None,
    alone: frozenset[str] = frozenset(),
    prompt: str = "auto",
) -> AnswererParts:
    """Read and check all parts of an answerer but its models.

    Args:
        models: names given by the user; missing ones are filled in from the config beside the mapping.
        checkpoint: path of the mapping; None for the LLM alone.
        limits: maximum lengths in tokens.
        augmentation: True if the prompt follows the mapped states; None for the value in training.
        alone: English names of languages whose problems the LLM answers alone; see `switched_languages`.
        prompt: "published" or "chat"; "auto" for the value in training, or for published prompts.

    Raises:
        InputError: a part is missing, or the parts do not belong together.
    """
    if checkpoint is None:
        models = replace(models, mt_path=None, mt_revision=None)
        check_llm(models)
        return AnswererParts(models, True, load_example_tokenizer(models, limits, True, prompt == "chat"))
    models = trained_models(models, checkpoint)
    if augmentation is None:
        # A published .bin has no config, and was trained with the prompt after it.
        trained = read_record(checkpoint).get("augmentation")
        augmentation = True if trained is None else trained
    tokenizer = load_example_tokenizer(models, limits, augmentation, trained_prompt(prompt, checkpoint) == "chat")
    tokenizer.alone = alone
    config = mapping_config(models, tokenizer.bos_token_id, tokenizer.opening)
    mapping = read_mapping(checkpoint, config.mt_hidden_size, config.llm_hidden_size)
    return AnswererParts(models, augmentation, tokenizer, checkpoint, config, mapping)


def trained_prompt(prompt: str, checkpoint: Path) -> str:
    """Value of --prompt for the mapping in `checkpoint`; `prompt` is the value given by the user.

    Raises:
        InputError: the mapping was trained with another one.
    """
    record = read_record(checkpoint)
    trained = record.get("prompt_format") or "published"
    if record and prompt not in ("auto", trained):
        raise InputError(f"--prompt {prompt}: {checkpoint} was trained with --prompt {trained}, leave the flag out")
    return trained if prompt == "auto" else prompt


def trained_models(models: ModelPair, checkpoint: Path) -> ModelPair:
    """Fill in missing names of `models` from the config beside the mapping in `checkpoint`.

    Raises:
        InputError: there is no such mapping, or neither `models` nor the config name the models.
    """
    record = read_record(checkpoint)
    models = with_trained_layer(models, checkpoint)
    for name in ("llm", "mt"):
        path, revision = getattr(models, f"{name}_path"), getattr(models, f"{name}_revision")
        if path is None:
            path, revision = record.get(f"{name}_path"), revision or record.get(f"{name}_revision")
        if path is None:
            raise InputError(f"--{name}_path is needed: no {CONFIG} beside {mapping_file(checkpoint)} names the models")
        models = replace(models, **{f"{name}_path": path, f"{name}_revision": revision})
    return models


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Dtype of a value of `--dtype`; auto: bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
