"""Who is asked: an LLM with a mapping, or alone, as evaluation, lm-evaluation-harness and the demo page ask it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from common.errors import InputError
from mindmerger.batching import Tokens, lay_out
from mindmerger.checkpoint import CONFIG, mapping_file, read_mapping, read_record, with_trained_layer
from mindmerger.config import EvaluationFlags
from mindmerger.evaluation.decoding import greedy_steps, label_log_likelihoods
from mindmerger.frozen_models import load_llm
from mindmerger.modeling import (
    MindMergerConfig,
    MindMergerForCausalLM,
    Sequence,
    mapping_config,
)
from mindmerger.tokenization import ExampleTokenizer, load_example_tokenizer


class Subject:
    """Who is asked.

    Args:
        llm: the language model that answers.
        tokenizer: from examples to tokens.
        model: the encoder and the mapping in front of `llm`; None for the LLM alone, which reads the prompt only.

    Attributes:
        eos_token_ids: any of these ends an answer.
    """

    def __init__(self, llm: PreTrainedModel, tokenizer: ExampleTokenizer, model: MindMergerForCausalLM | None = None):
        self.llm = llm
        self.tokenizer = tokenizer
        self.model = model
        configured = llm.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        known = (*configured, tokenizer.llm_tokenizer.eos_token_id)
        self.eos_token_ids = {index for index in known if index is not None}

    @torch.inference_mode()
    def read(self, rows: list[Tokens]) -> Sequence:
        """What the LLM reads of `rows`."""
        bos_token_id = self.tokenizer.llm_tokenizer.bos_token_id
        batch = lay_out(rows, bos_token_id, self.tokenizer.source_pad_id, mapped=self.model is not None)
        batch = batch.to(self.llm.device)
        embed = self.llm.get_input_embeddings() if self.model is None else None
        embeds = self.model.embed(batch) if embed is None else embed(batch.token_ids)
        return Sequence(embeds, batch.mask)

    def generate(
        self,
        rows: list[Tokens],
        max_new_tokens: int,
        slots: int,
        has_ended: Callable[[list[int]], bool] | None = None,
    ) -> Iterator[list[tuple[int, str, bool]]]:
        """Greedy answers to `rows`, of which `slots` are answered at a time; see `greedy_steps`.

        Yields:
            After every step the answers that it has ended, if any: (place in `rows`, text, whether it ended by itself).
        """
        steps = greedy_steps(
            self.llm,
            lambda places: self.read([rows[place] for place in places]),
            len(rows),
            slots,
            max_new_tokens,
            self.eos_token_ids,
            has_ended,
        )
        for answers in steps:
            ended = (answer for answer in answers if answer.is_done)
            yield [(answer.row, self.text(answer.ids), answer.ids[-1] in self.eos_token_ids) for answer in ended]

    def stream(self, sequence: Sequence, max_new_tokens: int) -> Iterator[str]:
        """The greedy answer to the one row of `sequence`, as far as it has come, after every token."""
        for [answer] in greedy_steps(self.llm, lambda _: sequence, 1, 1, max_new_tokens, self.eos_token_ids):
            yield self.text(answer.ids)

    def log_likelihoods(self, rows: list[Tokens], words: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of each of `words` as the answer to each row; see `label_log_likelihoods`."""
        return label_log_likelihoods(self.llm, self.read(rows), [self.tokenizer.label_ids(word) for word in words])

    def text(self, ids: list[int]) -> str:
        """What the LLM's token ids say, without special tokens."""
        return self.tokenizer.llm_tokenizer.decode(ids, skip_special_tokens=True)


def prepare(flags: EvaluationFlags) -> tuple[ExampleTokenizer, MindMergerConfig | None]:
    """Tokenizer and config of the subject that the flags name, checked before any model loads.

    What the flags leave open is filled in from the record beside the mapping.

    Returns:
        (tokenizer, config); config is None for the LLM alone.

    Raises:
        InputError: whatever of it is missing or does not fit together.
    """
    if not flags.baseline:
        take_from_checkpoint(flags)
    if flags.augmentation is None:
        # A published .bin says nothing, and was trained to be followed by the prompt.
        flags.augmentation = True
    models = replace(flags.models, mt_path=None) if flags.baseline else flags.models
    tokenizer = load_example_tokenizer(models, flags.limits, flags.augmentation)
    if flags.baseline:
        return tokenizer, None
    config = mapping_config(models, tokenizer.llm_tokenizer.bos_token_id)
    read_mapping(Path(flags.init_checkpoint), config.mt_hidden_size, config.llm_hidden_size)
    return tokenizer, config


def load_subject(
    flags: EvaluationFlags,
    tokenizer: ExampleTokenizer,
    config: MindMergerConfig | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Subject:
    """Load what `prepare` has checked.

    Raises:
        InputError: weights are missing.
    """
    if config is None:
        llm = load_llm(flags.llm_path, flags.llm_revision, dtype, flags.trust_remote_code)
        return Subject(llm.to(device), tokenizer)
    model = MindMergerForCausalLM.from_pretrained(
        flags.init_checkpoint, config=config, dtype=dtype, trust_remote_code=flags.trust_remote_code
    ).to(device)
    return Subject(model.llm, tokenizer, model)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `--dtype` names; auto: bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def take_from_checkpoint(flags: EvaluationFlags) -> None:
    """Fill in, from the record beside the mapping, which models it joins and whether the prompt follows it.

    Raises:
        InputError: there is no such mapping, or neither flags nor record name the models.
    """
    checkpoint = Path(flags.init_checkpoint)
    saved = read_record(checkpoint)
    flags.encoder_layer = with_trained_layer(flags.models, checkpoint).encoder_layer
    for name in ("llm", "mt"):
        if getattr(flags, f"{name}_path") is None:
            setattr(flags, f"{name}_path", saved.get(f"{name}_path"))
            if getattr(flags, f"{name}_revision") is None:
                setattr(flags, f"{name}_revision", saved.get(f"{name}_revision"))
        if getattr(flags, f"{name}_path") is None:
            raise InputError(f"--{name}_path is needed: no {CONFIG} beside {mapping_file(checkpoint)} names the models")
    if flags.augmentation is None:
        flags.augmentation = saved.get("augmentation")
