"""Aligned start: a mapping fitted to the LLM's embeddings on English text, without running the LLM.

Each token of an English text has one state of the encoder and one or more vectors in the LLM's embedding table. The
mapping is a ridge regression from states to vectors. A multilingual encoder has similar states for other languages, so
that the mapping also fits them to some degree. docs/aligned_start.md has the method and its results.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from common.errors import InputError
from common.io import read_json, write_json
from common.locks import locked
from common.logging import progress, say
from common.models import base_config
from common.ranks import Process
from mindmerger.batching import pad, plan_once
from mindmerger.checkpoint import read_mapping, write_mapping
from mindmerger.config import ModelPair
from mindmerger.data import Example
from mindmerger.frozen_models import encode, find_masking, is_decoder_only, load_encoder, load_llm
from mindmerger.init.ridge import Span, as_mlp, correlation, covering, relative_error, ridge
from mindmerger.init.scaled import mean_embedding
from mindmerger.modeling import MindMergerConfig
from mindmerger.tasks import LANGUAGES
from mindmerger.tokenization import ExampleTokenizer, ids_with_spans

RECORD = "aligned_start.json"
# On the squared weights; see `ridge`.
PENALTY = 0.01
# Fraction of the English texts that is held out to measure the fit.
HELD_OUT = 0.1
# Number of translation pairs, over all languages, that choose the encoder's layer.
MAX_PAIRS = 150


@dataclass(frozen=True)
class Texts:
    """Texts to which an aligned start is fitted.

    Attributes:
        english: English sentences.
        pairs: rows whose targets translate their sources; empty if there is no layer to choose.
    """

    english: list[str]
    pairs: list[Example]

    def digest(self) -> str:
        """Hex digest of all texts."""
        content = json.dumps([self.english, [[row.source.text, row.target] for row in self.pairs]])
        return hashlib.sha256(content.encode()).hexdigest()


def choose_texts(rows: list[Example], translations: bool, sentences: int, chooses_layer: bool, mt_path: str) -> Texts:
    """Select English text among the training rows: targets of translations, or English queries.

    Args:
        rows: training rows.
        translations: True if the targets translate the sources, as in the mapping stage.
        sentences: maximum number of English sentences.
        chooses_layer: True if translations are needed to choose an encoder layer.
        mt_path: path of the encoder, for messages.

    Raises:
        InputError: there is too little English text, or there are too few translations to choose a layer.
    """
    if translations:
        distinct = dict.fromkeys(row.target for row in rows)
    else:
        distinct = dict.fromkeys(row.source.text for row in rows if row.language.code == "en")
    english = list(distinct)[:sentences]
    if len(english) < 10:
        raise InputError(
            f"--mapping_init aligned needs English text, and the training rows have {len(english)} such sentences: "
            "add rows in English to the augmentation stage, or run the mapping stage first"
        )
    if chooses_layer and not translations:
        raise InputError(f"--encoder_layer is needed: without translations no layer of {mt_path} can be chosen")
    pairs = rows[:MAX_PAIRS] if chooses_layer else []
    if pairs and max(Counter(row.language.code for row in pairs).values()) == 1:
        raise InputError(
            f"--encoder_layer is needed: {len(pairs)} training rows, each of another language, are too few to choose "
            f"a layer of {mt_path}"
        )
    return Texts(english, pairs)


@dataclass(frozen=True)
class AlignedStart:
    """Fit of a mapping between two models to English text.

    Attributes:
        models: names of the two models.
        config: config of the mapping.
        tokenizer: tokenizers of the two models.
        dtype: dtype of both models.
        mean_boundary: True if the boundary is the LLM's mean embedding, False if it is 0.
        batch_size: texts in a batch of the encoder.
    """

    models: ModelPair
    config: MindMergerConfig
    tokenizer: ExampleTokenizer
    dtype: torch.dtype
    mean_boundary: bool
    batch_size: int

    def load_or_fit(
        self, read_texts: Callable[[bool], Texts], folder: Path, process: Process
    ) -> tuple[dict[str, torch.Tensor], int | None]:
        """Load the mapping and the encoder layer from `folder`, or fit them on rank 0 and write them there.

        Args:
            read_texts: function that returns the texts; its argument is True if a layer is to be chosen.
            folder: folder of the mapping and of the record of its fit; reused if its settings are the same.
            process: this rank.

        Raises:
            InputError: there is too little text, or a tokenizer has no character offsets.
        """
        if process.is_main:
            models = self.models
            mt_config = base_config(models.mt_path, models.mt_revision, models.trust_remote_code)
            texts = read_texts(models.encoder_layer is None and is_decoder_only(mt_config))
            settings = self._settings(texts)
            with locked(folder):
                kept = read_json(folder / RECORD) if (folder / RECORD).exists() else None
                if not isinstance(kept, dict) or kept.get("settings") != settings:
                    # Removed first, so that a killed run leaves no record beside another mapping.
                    (folder / RECORD).unlink(missing_ok=True)
                    report = self.fit(texts, folder, process)
                    write_json(folder / RECORD, {"settings": settings, **report})
        process.barrier()
        record = read_json(folder / RECORD)
        of_layers = "" if record["encoder_layer"] is None else f", layer {record['encoder_layer']} of the encoder"
        say(
            process,
            f"aligned start in {folder}: {record['tokens']} tokens of {record['sentences']} English "
            f"sentences{of_layers}, relative error {record['relative_error']:.3f} on {record['held_out_sentences']} "
            f"others, {record['seconds']} s",
        )
        mapping = read_mapping(folder, self.config.mt_hidden_size, self.config.llm_hidden_size)
        return mapping, record["encoder_layer"]

    def _settings(self, texts: Texts) -> dict[str, Any]:
        return {
            "llm_path": self.models.llm_path,
            "llm_revision": self.models.llm_revision,
            "mt_path": self.models.mt_path,
            "mt_revision": self.models.mt_revision,
            "max_seq_len": self.tokenizer.limits.max_seq_len,
            "encoder_layer": self.models.encoder_layer,
            "boundary_init": "mean" if self.mean_boundary else "zero",
            "dtype": str(self.dtype).removeprefix("torch."),
            "texts_sha256": texts.digest(),
            # Without effect on the fit, but part of the config beside it.
            **({} if self.config.prompt_format is None else {"prompt": self.config.prompt_format}),
        }

    def fit(self, texts: Texts, folder: Path, process: Process) -> dict[str, Any]:
        """Fit the mapping, write it to `folder`, and return figures of the fit."""
        started = time.monotonic()
        # The tokenizers run first, so that their errors come before the models load.
        english = self.tokenizer.sources_with_spans(texts.english, LANGUAGES["English"])
        llm_english = ids_with_spans(self.tokenizer.llm_tokenizer, texts.english)
        embedding = self._load_embedding(process.device)
        mean = mean_embedding(embedding, process.device)[0].cpu()
        targets = [
            token_targets(embedding, mean, spans, ids, llm_spans)
            for (_, spans), (ids, llm_spans) in zip(english, llm_english, strict=True)
        ]
        read = self._encoder_reader(process, all_layers=bool(texts.pairs))
        states = read([ids for ids, _ in english])
        fitted = len(english) - max(1, round(HELD_OUT * len(english)))
        maps = [ridge(torch.cat(of_layer[:fitted]), torch.cat(targets[:fitted]), PENALTY) for of_layer in states]
        layer, scores, best = self.models.encoder_layer, None, len(maps) - 1
        if texts.pairs:
            sources, meant = pair_vectors(self.tokenizer, embedding, mean, texts.pairs)
            scores = layer_scores(maps, read(sources), meant, [row.language.name for row in texts.pairs])
            best = max(range(len(scores)), key=scores.__getitem__)
            layer = best + 1

        state = as_mlp(maps[best])
        state["end_boundary"] = (mean if self.mean_boundary else torch.zeros_like(mean)).view(1, 1, -1)
        write_mapping(folder, self.config.to_dict() | {"encoder_layer": layer}, state)
        return {
            "encoder_layer": layer,
            "sentences": fitted,
            "tokens": sum(len(rows) for rows in targets[:fitted]),
            "held_out_sentences": len(english) - fitted,
            "relative_error": relative_error(maps[best](torch.cat(states[best][fitted:])), torch.cat(targets[fitted:])),
            "pairs": len(texts.pairs),
            "correlation_by_layer": scores,
            "seconds": round(time.monotonic() - started, 1),
        }

    def _load_embedding(self, device: torch.device) -> torch.nn.Module:
        """Load the LLM's embedding table; the rest of the LLM is dropped."""
        models = self.models
        llm = load_llm(models.llm_path, models.llm_revision, self.dtype, models.trust_remote_code)
        return llm.get_input_embeddings().to(device)

    def _encoder_reader(
        self, process: Process, all_layers: bool
    ) -> Callable[[list[list[int]]], list[list[torch.Tensor]]]:
        """Load the encoder and return `read_states` for it."""
        models = self.models
        encoder = load_encoder(
            models.mt_path, models.mt_revision, self.dtype, models.trust_remote_code, models.encoder_layer
        ).to(process.device)
        return partial(
            read_states,
            encoder,
            source_pad_id=self.tokenizer.source_pad_id,
            batch_size=self.batch_size,
            process=process,
            all_layers=all_layers,
        )


def pair_vectors(
    tokenizer: ExampleTokenizer, embedding: torch.nn.Module, mean: torch.Tensor, pairs: list[Example]
) -> tuple[list[list[int]], torch.Tensor]:
    """Tokenize the sources of translation pairs, and compute the mean embeddings of their translations.

    Returns:
        (token ids with special tokens; float32 [pairs, llm_hidden_size]).
    """
    sources = [tokenizer.sources_with_spans([row.source.text], row.language)[0][0] for row in pairs]
    translations = ids_with_spans(tokenizer.llm_tokenizer, [row.target for row in pairs])
    # A text without tokens has the mean of all embeddings.
    means = [token_embeddings(embedding, ids).mean(dim=0) if ids else mean for ids, _ in translations]
    return sources, torch.stack(means)


def layer_scores(
    maps: list[Callable[[torch.Tensor], torch.Tensor]],
    foreign: list[list[torch.Tensor]],
    meant: torch.Tensor,
    languages: list[str],
) -> list[float]:
    """Score each layer by how near its map, fitted on English, brings sentences of other languages to translations.

    The fit on English is no such score: it is best before the first layer, where states depend on their token only.

    Args:
        maps: map of every layer, from states to vectors in float64.
        foreign: by layer, the states of every sentence, [tokens, mt_hidden_size].
        meant: mean embedding of every translation, [sentences, llm_hidden_size].
        languages: language of every sentence; at least one language has two sentences.

    Returns:
        By layer, the correlation between means of mapped vectors and means of embeddings, averaged over languages.
    """
    scores = []
    for affine, states in zip(maps, foreign, strict=True):
        mapped = torch.stack([affine(rows).mean(dim=0) for rows in states])
        by_language = []
        for language in dict.fromkeys(languages):
            rows = [row for row, its in enumerate(languages) if its == language]
            if len(rows) == 1:
                continue  # a correlation needs two sentences
            by_language.append(correlation(mapped[rows], meant[rows].double()))
        scores.append(sum(by_language) / len(by_language))
    return scores


@torch.inference_mode()
def read_states(
    encoder: PreTrainedModel,
    sources: list[list[int]],
    source_pad_id: int,
    batch_size: int,
    process: Process,
    all_layers: bool,
) -> list[list[torch.Tensor]]:
    """Compute the encoder's states of each source, [tokens, mt_hidden_size] on the CPU, by layer and source.

    Args:
        encoder: encoder on the device of `process`.
        sources: token ids with special tokens.
        source_pad_id: padding id of the sources.
        batch_size: sources of a batch.
        process: this rank.
        all_layers: True for the states of a decoder-only encoder cut to 1, 2, ... layers; False for the last states
            only.

    Raises:
        InputError: the encoder has no final norm that can be applied to its layers.
    """
    (plan,) = plan_once([len(source) for source in sources], batch_size, ranks=1)
    by_source: list[list[torch.Tensor]] = [[] for _ in sources]
    masking = "padding" if all_layers else find_masking(encoder, source_pad_id, ("padding", "alone"))
    for rows in progress(process, plan, desc="encoder states", leave=False):
        ids, mask = pad([sources[row] for row in rows], source_pad_id)
        inputs = {"input_ids": ids.to(process.device), "attention_mask": mask.to(process.device)}
        states = _all_layers(encoder, inputs) if all_layers else [encode(encoder, *inputs.values(), masking)]
        for position, row in enumerate(rows):
            by_source[row] = [layer[position, : len(sources[row])].cpu() for layer in states]
    return [list(of_layer) for of_layer in zip(*by_source, strict=True)]


def _all_layers(encoder: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Compute the final states [batch, length, mt_hidden_size] of the model cut after each of its layers."""
    lists = [module for module in encoder.modules() if isinstance(module, torch.nn.ModuleList)]
    of_layers = {module for layers in lists for module in layers.modules()}
    outputs: list[tuple[torch.nn.Module, Any]] = []
    hooks = [
        module.register_forward_hook(lambda module, _, output: outputs.append((module, output)))
        for module in encoder.modules()
        if module not in of_layers
    ]
    try:
        result = encoder(**inputs, output_hidden_states=True)
    finally:
        for hook in hooks:
            hook.remove()
    # The final norm, of any name: the innermost module whose output is that of the model, possibly in another shape.
    address = result.last_hidden_state.data_ptr()
    final = next((m for m, output in outputs if torch.is_tensor(output) and output.data_ptr() == address), None)
    if final is None:
        raise InputError(
            f"--encoder_layer is needed: {type(encoder).__name__} has no final norm to apply to its layers"
        )
    return [*(final(states) for states in result.hidden_states[1:-1]), result.last_hidden_state]


def token_targets(
    embedding: torch.nn.Module, mean: torch.Tensor, spans: list[Span], ids: list[int], llm_spans: list[Span]
) -> torch.Tensor:
    """Mean embedding of the LLM's tokens that overlap each token of the encoder, [tokens, llm_hidden_size].

    A special token, which covers no text, gets the mean of all embeddings.
    """
    vectors = token_embeddings(embedding, ids)
    rows = [vectors[covered].mean(dim=0) if covered else mean for covered in covering(spans, llm_spans)]
    return torch.stack(rows)


@torch.inference_mode()
def token_embeddings(embedding: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Embeddings of token ids, [tokens, llm_hidden_size], float32 on the CPU."""
    return embedding(torch.tensor(ids, dtype=torch.int64, device=embedding.weight.device)).float().cpu()
