"""A mapping that starts where the LLM's words are, from English text alone.

Each token of an English text is one vector that the encoder gives and one, or a few, that the LLM's embedding table
has. A ridge regression from the first to the second is a mapping that says in the LLM's own vectors what the encoder
read, before the LLM is ever run; and since a multilingual encoder puts other languages near English, something of them,
too. docs/aligned_start.md has the idea and what it gains.
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
from mindmerger.frozen_models import is_decoder_only, load_encoder, load_llm
from mindmerger.init.ridge import Span, as_mlp, correlation, covering, relative_error, ridge
from mindmerger.init.scaled import mean_embedding
from mindmerger.modeling import MindMergerConfig
from mindmerger.tasks import LANGUAGES
from mindmerger.tokenization import ExampleTokenizer, ids_with_spans

RECORD = "aligned_start.json"
# On the squared weights; see `ridge`.
PENALTY = 0.01
# Of the English texts, how many are not fitted, to measure the fit on.
HELD_OUT = 0.1
# Translation pairs that choose the encoder's layer, over all languages.
MAX_PAIRS = 150


@dataclass(frozen=True)
class Texts:
    """The texts that an aligned start is fitted to.

    Attributes:
        english: sentences.
        pairs: rows whose targets translate their sources; none where there is no layer to choose.
    """

    english: list[str]
    pairs: list[Example]

    def digest(self) -> str:
        """Hex digest of all texts."""
        content = json.dumps([self.english, [[row.source.text, row.target] for row in self.pairs]])
        return hashlib.sha256(content.encode()).hexdigest()


def choose_texts(rows: list[Example], translations: bool, sentences: int, chooses_layer: bool, mt_path: str) -> Texts:
    """English text among the training rows: targets of translations, or English queries.

    Args:
        rows: of training.
        translations: True if the targets translate the sources, as in the mapping stage.
        sentences: English sentences at most.
        chooses_layer: True if translations are needed to choose an encoder's layer by.
        mt_path: of the encoder, for messages.

    Raises:
        InputError: there is none, or too few translations to choose a layer by.
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
        raise InputError(
            f"--encoder_layer is needed: without translations nothing tells which layer of {mt_path} to take"
        )
    pairs = rows[:MAX_PAIRS] if chooses_layer else []
    if pairs and max(Counter(row.language.code for row in pairs).values()) == 1:
        raise InputError(
            f"--encoder_layer is needed: {len(pairs)} training rows, each of another language, tell no layer of "
            f"{mt_path} from another"
        )
    return Texts(english, pairs)


@dataclass(frozen=True)
class AlignedStart:
    """A mapping fitted to English text, for two models.

    Attributes:
        models: the two.
        config: of the mapping.
        tokenizer: of the two models.
        dtype: in which both models run.
        mean_boundary: True if the boundary is the LLM's mean embedding, or 0.
        batch_size: texts that the encoder reads at once.
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
        """The mapping to start from, and the encoder's layer to read, fitted by the first rank and kept in `folder`.

        Args:
            read_texts: gives the texts; told whether a layer is to be chosen.
            folder: a mapping like any other, with the record of its fit; one of the same settings is read, not made
                anew.
            process: this rank.

        Raises:
            InputError: too little text, or a tokenizer without character offsets.
        """
        if process.is_main:
            models = self.models
            mt_config = base_config(models.mt_path, models.mt_revision, models.trust_remote_code)
            texts = read_texts(models.encoder_layer is None and is_decoder_only(mt_config))
            settings = self._settings(texts)
            with locked(folder):
                kept = read_json(folder / RECORD) if (folder / RECORD).exists() else None
                if not isinstance(kept, dict) or kept.get("settings") != settings:
                    # A record beside a mapping is that mapping's, whenever this is killed.
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
        }

    def fit(self, texts: Texts, folder: Path, process: Process) -> dict[str, Any]:
        """Fit the mapping, write it to `folder`, and report how well it fits."""
        started = time.monotonic()
        # The tokenizers go first: what they lack shows at once.
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
        """The LLM's embedding table; the rest of the LLM is dropped."""
        models = self.models
        llm = load_llm(models.llm_path, models.llm_revision, self.dtype, models.trust_remote_code)
        return llm.get_input_embeddings().to(device)

    def _encoder_reader(
        self, process: Process, all_layers: bool
    ) -> Callable[[list[list[int]]], list[list[torch.Tensor]]]:
        """`read_states` of the encoder, loaded here."""
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
    """Of translation pairs the sources' ids for the encoder, and the translations' mean embeddings.

    Returns:
        (token ids, special tokens included; float32 [pairs, llm_hidden_size]).
    """
    sources = [tokenizer.sources_with_spans([row.source.text], row.language)[0][0] for row in pairs]
    translations = ids_with_spans(tokenizer.llm_tokenizer, [row.target for row in pairs])
    # A text without a token says nothing.
    means = [token_embeddings(embedding, ids).mean(dim=0) if ids else mean for ids, _ in translations]
    return sources, torch.stack(means)


def layer_scores(
    maps: list[Callable[[torch.Tensor], torch.Tensor]],
    foreign: list[list[torch.Tensor]],
    meant: torch.Tensor,
    languages: list[str],
) -> list[float]:
    """How near to its translation each layer's map, fitted on English, brings a sentence of another language.

    Not by the fit itself: on English that is best before the first layer, where a token's state still is the token.

    Args:
        maps: of every layer, from states to vectors in float64.
        foreign: by layer, the states of every sentence, [tokens, mt_hidden_size].
        meant: the mean embedding of every translation, [sentences, llm_hidden_size].
        languages: of every sentence; at least one language has two.

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
                continue  # one sentence has no correlation with another
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
    """What the encoder makes of each source, [tokens, mt_hidden_size] on the CPU, by layer and source.

    Args:
        encoder: on the process's device.
        sources: token ids, special tokens included.
        source_pad_id: pads a batch.
        batch_size: sources at a time.
        process: whose progress bar this is.
        all_layers: of a decoder-only encoder, the states that it would end in had it only 1, 2, ... layers; else the
            last ones alone.

    Raises:
        InputError: the encoder's parts do not tell what it would end in.
    """
    (plan,) = plan_once([len(source) for source in sources], batch_size, ranks=1)
    by_source: list[list[torch.Tensor]] = [[] for _ in sources]
    for rows in progress(process, plan, desc="encoder states", leave=False):
        ids, mask = pad([sources[row] for row in rows], source_pad_id)
        inputs = {"input_ids": ids.to(process.device), "attention_mask": mask.to(process.device)}
        states = _all_layers(encoder, inputs) if all_layers else [encoder(**inputs).last_hidden_state]
        for place, row in enumerate(rows):
            by_source[row] = [layer[place, : len(sources[row])].cpu() for layer in states]
    return [list(of_layer) for of_layer in zip(*by_source, strict=True)]


def _all_layers(encoder: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """By layer, the states [batch, length, mt_hidden_size] that the model would end in if that layer were its last."""
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
    # The final norm, under whichever name: the innermost part that gives, if in another shape, what the model gives.
    address = result.last_hidden_state.data_ptr()
    final = next((m for m, output in outputs if torch.is_tensor(output) and output.data_ptr() == address), None)
    if final is None:
        raise InputError(
            f"--encoder_layer is needed: {type(encoder).__name__} has no final norm, by which to compare its layers"
        )
    return [*(final(states) for states in result.hidden_states[1:-1]), result.last_hidden_state]


def token_targets(
    embedding: torch.nn.Module, mean: torch.Tensor, spans: list[Span], ids: list[int], llm_spans: list[Span]
) -> torch.Tensor:
    """For each of the encoder's tokens the mean embedding of the LLM's tokens that cover it, [tokens, llm_hidden_size].

    A token of no text, as that which closes a source, is to say nothing in particular: the mean of all embeddings.
    """
    vectors = token_embeddings(embedding, ids)
    rows = [vectors[covered].mean(dim=0) if covered else mean for covered in covering(spans, llm_spans)]
    return torch.stack(rows)


@torch.inference_mode()
def token_embeddings(embedding: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Vectors of token ids, [tokens, llm_hidden_size], float32 on the CPU."""
    return embedding(torch.tensor(ids, dtype=torch.int64, device=embedding.weight.device)).float().cpu()
