"""MindMerger's model: a frozen multilingual encoder, a trainable mapping, a frozen LLM.

Section 3 of Huang et al., NeurIPS 2024 (arXiv 2405.17386). The LLM's input is
`[bos | mapped source states | boundary | prompt | target]`; the loss is on the target only. In a chat template
the mapped states stand inside the user's turn, after the template's opening.
"""

import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import cached_file

from common.errors import InputError, first_line
from common.models import base_config
from mindmerger.batching import Batch, Tokens, lay_out, padded_rows
from mindmerger.checkpoint import (
    SAFETENSORS,
    harmed_languages,
    mapping_file,
    read_mapping,
    read_record,
    write_mapping,
)
from mindmerger.frozen_models import (
    Masking,
    check_encoder_layer,
    check_llm,
    encode,
    encoder_shape,
    find_masking,
    llm_width,
    load_encoder,
    load_llm,
)
from mindmerger.packing import pack_attention, packed_arguments

if TYPE_CHECKING:
    from mindmerger.config import ModelPair
    from mindmerger.losses import Replayed

_HUB_OPTIONS = {
    *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"),
    "_commit_hash",  # private: the auto classes add it
}


class MindMergerConfig(PretrainedConfig):
    """Config of a mapping: the two models that it joins, and its last training run.

    Attributes:
        llm_path, mt_path: hub ids or local folders of the LLM and of the multilingual model.
        llm_revision, mt_revision: hub revisions of the two models.
        llm_hidden_size, mt_hidden_size: widths of the LLM's embeddings and of the encoder's states.
        llm_bos_token_id: first token of every sequence; None for an LLM without one.
        llm_opening: ids between bos and mapped states; see `Tokens`.
        encoder_layer: number of layers used of a decoder-only multilingual model; None for all.
        prompt_format: "chat" for prompts in the LLM's chat template; None for published ones.
        task, stage, augmentation, prompt: settings of the last training run; `prompt` is the template after the
            boundary, or None.
        verdicts: verdict of each language on the mapping; see `write_verdicts`.
        languages, train_rows, datasets: data of the last training run: codes of the sources' languages, number of
            rows, and hub ids of the data sets if known.
    """

    model_type = "mindmerger"

    llm_path: str | None = None
    mt_path: str | None = None
    llm_revision: str | None = None
    mt_revision: str | None = None
    llm_hidden_size: int | None = None
    mt_hidden_size: int | None = None
    llm_bos_token_id: int | None = None
    llm_opening: list[int] | None = None
    encoder_layer: int | None = None
    task: str | None = None
    stage: str | None = None
    augmentation: bool | None = None
    prompt_format: str | None = None
    prompt: str | None = None
    languages: list[str] | None = None
    train_rows: int | None = None
    datasets: list[str] | None = None
    verdicts: dict[str, Any] | None = None


class MLP(nn.Module):
    """Two linear layers with a ReLU between them, from [..., mt_hidden_size] to [..., llm_hidden_size]."""

    def __init__(self, mt_hidden_size: int, llm_hidden_size: int):
        super().__init__()
        self.linear1 = nn.Linear(mt_hidden_size, 2 * mt_hidden_size)
        self.linear2 = nn.Linear(2 * mt_hidden_size, llm_hidden_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.linear2(F.relu(self.linear1(states)))


class Mapping(nn.Module):
    """All trained parameters, under the names and shapes of the published checkpoints."""

    def __init__(self, mt_hidden_size: int, llm_hidden_size: int):
        super().__init__()
        self.mlp = MLP(mt_hidden_size, llm_hidden_size)
        self.end_boundary = nn.Parameter(torch.zeros(1, 1, llm_hidden_size))

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map encoder states [..., mt_hidden_size] to vectors [..., llm_hidden_size]; return also the boundary.

        The boundary is returned here because ZeRO-3 gathers a parameter only while the module that owns it runs.
        """
        return self.mlp(states), self.end_boundary.view(1, -1)


@dataclass(frozen=True)
class InputEmbeds:
    """Input embeddings of the LLM, left-padded, so that every row ends in the last column.

    Attributes:
        embeds: [batch, length, llm_hidden_size].
        mask: [batch, length], 1 for a vector, 0 for padding.
    """

    embeds: torch.Tensor
    mask: torch.Tensor

    @property
    def position_ids(self) -> torch.Tensor:
        """Positions [batch, length], counted from the first vector of each row after its padding."""
        return (self.mask.cumsum(dim=1) - 1).clamp(min=0)


class MindMergerForCausalLM(PreTrainedModel):
    """A multilingual encoder, a mapping and an LLM; only the mapping is trained, saved and loaded.

    Args:
        config: names and sizes of the two models.
        encoder: encoder with states [rows, columns, mt_hidden_size]; see `load_encoder`.
        llm: any Hugging Face causal language model; see `load_llm`.

    Attributes:
        packs: True if the LLM takes packed rows; set by `pack_rows`.
        masking: form of the encoder's mask; see `find_masking`.
        alone: English names of languages in which `generate` uses the LLM alone; set by `from_pretrained`.
    """

    config_class = MindMergerConfig
    base_model_prefix = "mindmerger"
    main_input_name = "input_ids"

    def __init__(self, config: MindMergerConfig, encoder: PreTrainedModel, llm: PreTrainedModel):
        super().__init__(config)
        # Not PreTrainedModel.post_init, which would initialise the loaded weights.
        self.encoder = encoder.requires_grad_(False)
        self.llm = llm.requires_grad_(False)
        self.mapping = Mapping(config.mt_hidden_size, config.llm_hidden_size)
        # An encoder's cache is never read.
        self.encoder.config.use_cache = False
        # Leaves the frozen weights out of checkpoints.
        self.register_state_dict_post_hook(_keep_mapping)
        self.packs = False
        self.masking: Masking = "padding"
        self.alone: frozenset[str] = frozenset()
        self.eval()

    @classmethod
    def from_base_models(
        cls,
        config: MindMergerConfig,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
        mapping: dict[str, torch.Tensor] | None = None,
    ) -> "MindMergerForCausalLM":
        """Load both frozen models of `config` in `dtype`, and set the mapping; None leaves a random one in float32."""
        encoder = load_encoder(config.mt_path, config.mt_revision, dtype, trust_remote_code, config.encoder_layer)
        llm = load_llm(config.llm_path, config.llm_revision, dtype, trust_remote_code)
        model = cls(config, encoder, llm)
        if mapping is not None:
            model.mapping.load_state_dict(mapping)
            model.mapping.to(dtype)
        return model

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        checkpoint: str | Path,
        *,
        config: MindMergerConfig | None = None,
        dtype: torch.dtype | str = torch.float32,
        trust_remote_code: bool = False,
        **hub_options: Any,
    ) -> "MindMergerForCausalLM":
        """Load a mapping saved by `save_pretrained`, and the two models that its config names.

        Args:
            checkpoint: a folder or hub id; with `config` given, also a `.safetensors` file or a published
                `pytorch_model.bin`.
            config: replaces the folder's config, for instance to name other copies of the two models.
            dtype: dtype of all three parts, as a torch dtype or its name.
            trust_remote_code: True to run code from a base model's repository.
            hub_options: options of a download, such as `revision`, `token` and `cache_dir`.

        Raises:
            InputError: a file is missing, or the mapping belongs to other models (the message names the tensor).
        """
        hub_options, dtype = _without_auto(hub_options), _find_dtype(dtype)
        path = Path(checkpoint, hub_options.get("subfolder") or "")
        try:
            config = config or MindMergerConfig.from_pretrained(checkpoint, **hub_options)
            path = path if path.exists() else Path(cached_file(str(checkpoint), SAFETENSORS, **hub_options))
        except OSError as error:
            raise InputError(f"no mapping could be loaded from {checkpoint}: {first_line(error)}") from error
        if config.mt_hidden_size is None or config.llm_hidden_size is None:
            raise InputError(f"the config in {checkpoint} is not one of a mapping: it has no hidden sizes")
        state = read_mapping(path, config.mt_hidden_size, config.llm_hidden_size)
        model = cls.from_base_models(config, dtype, trust_remote_code, state)
        model.masking = find_masking(model.encoder, model.source_pad_id, ("padding", "alone"))
        verdicts = config.verdicts or read_record(path).get("verdicts")
        model.alone = harmed_languages(mapping_file(path), verdicts, warnings.warn)
        return model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write config, mapping and model card to a folder, without the two frozen models.

        The card has the scores of this mapping in `./results`.
        """
        from mindmerger.card import write_card

        write_mapping(Path(save_directory), self.config.to_dict(), self.mapping.state_dict())
        write_card(Path(save_directory))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # type: ignore[override]
        """Upload the files of `save_pretrained`, card included, with the options of `card.upload`; gives a URL."""
        from mindmerger.card import upload

        return upload(self, repo_id, **options)

    def train(self, mode: bool = True) -> "MindMergerForCausalLM":
        """Set the training mode, but keep the frozen models in eval mode, without dropout."""
        super().train(mode)
        self.encoder.eval()
        self.llm.eval()
        return self

    def pack_rows(self, source_pad_id: int = 0) -> bool:
        """Prepare both frozen models for batches laid out on the host, so that no step waits for the device.

        Args:
            source_pad_id: padding id of the sources.

        Returns:
            True if the LLM now takes packed rows; see `pack_attention`.
        """
        self.packs = pack_attention(self.llm)
        self.masking = find_masking(self.encoder, source_pad_id)
        return self.packs

    def map_sources(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the mapped states of all sources [states, llm_hidden_size]; also return the boundary."""
        with torch.no_grad():
            states = encode(self.encoder, batch.source_ids, batch.source_mask, self.masking)
        states = states.flatten(0, 1).index_select(0, batch.source_index)
        return self.mapping(states.to(self.mapping.end_boundary.dtype))

    def embed(self, batch: Batch) -> torch.Tensor:
        """Compute the LLM's input: embeddings of `token_ids`, with the mapped states inserted.

        The embedding is called, not indexed: under ZeRO-3 a module has its weights only while it runs.
        """
        if not len(batch.mapped_positions):  # the LLM alone
            return self.llm.get_input_embeddings()(batch.token_ids)
        vectors, boundary = self.map_sources(batch)
        embeds = self.llm.get_input_embeddings()(batch.token_ids)
        mapped = torch.cat([vectors, boundary.expand(len(batch.source_ids), -1)]).to(embeds.dtype)
        return embeds.flatten(0, 1).index_copy(0, batch.mapped_positions, mapped).view_as(embeds)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        prompt_ids: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: float | None = None,
        batch: Batch | None = None,
        replayed: "Replayed | None" = None,
    ) -> CausalLMOutput:
        """Compute the loss on the target, or the next token's logits if there is no target.

        Args:
            input_ids, attention_mask: source for the encoder, [rows, source length].
            prompt_ids, prompt_attention_mask: prompt for the LLM, [rows, prompt length].
            labels: target ids, [rows, target length], -100 for padding.
            num_items_in_batch: divisor of the summed loss; default: the number of target tokens of the batch.
            batch: rows laid out by `lay_out`, instead of the arguments above.
            replayed: those of its rows whose targets are the LLM's own answers; None for none.

        Returns:
            `loss`: cross entropy in nats, float32; `logits`: [target tokens, vocabulary] in row order, or
            [rows, vocabulary] of the next token if there are no targets.
        """
        if batch is None:
            rows = padded_rows(input_ids, attention_mask, prompt_ids, prompt_attention_mask, labels)
            batch = self._lay_out(rows, packed=self.packs and labels is not None)
        summed = partial(F.cross_entropy, reduction="sum") if replayed is None else replayed.summed_loss(self.logits)
        logits = self.logits(batch)
        if not len(batch.labels):
            return CausalLMOutput(logits=logits)
        logits = logits.float()
        loss = summed(logits, batch.labels)
        return CausalLMOutput(loss=loss / (num_items_in_batch or len(logits)), logits=logits)

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits of each label of `batch`, [targets, vocabulary], or of the next token, [rows, vocabulary]."""
        arguments = {"inputs_embeds": self.embed(batch), "position_ids": batch.position_ids, "use_cache": False}
        if batch.mask is None:
            arguments |= packed_arguments(batch.lengths, batch.cumulative_lengths)
            logits = self.llm(**arguments, logits_to_keep=batch.logit_positions).logits[0]
            kept = len(logits) == len(batch.logit_positions)  # a few LLMs compute all
            return logits if kept else logits.index_select(0, batch.logit_positions)
        arguments |= {"attention_mask": batch.mask, "logits_to_keep": batch.columns}
        logits = self.llm(**arguments).logits[:, -batch.columns :].flatten(0, 1)  # some LLMs return all
        return logits.index_select(0, batch.logit_positions) if len(batch.labels) else logits

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        prompt_ids: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        language: str | list[str] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Generate token ids [rows, new tokens]; `kwargs` are passed to the LLM's `generate`.

        In a `language` (English name or ISO code; one for all rows, or a list) that the mapping harms, by the verdicts
        in its config, the LLM alone reads the prompt; None never switches.
        """
        rows = padded_rows(input_ids, attention_mask, prompt_ids, prompt_attention_mask)
        batch = self._lay_out(rows if language is None else _switched(rows, language, self.alone))
        return self.llm.generate(inputs_embeds=self.embed(batch), attention_mask=batch.mask, **kwargs)

    @property
    def source_pad_id(self) -> int:
        """The encoder's padding id, by which some encoders count positions; 0 for an encoder without one."""
        return getattr(self.encoder.config.get_text_config(), "pad_token_id", None) or 0

    def _lay_out(self, rows: list[Tokens], packed: bool = False) -> Batch:
        rows = [replace(row, opening=self.config.llm_opening or []) for row in rows]
        return lay_out(rows, self.config.llm_bos_token_id, self.source_pad_id, packed).to(self.llm.device)


AutoConfig.register("mindmerger", MindMergerConfig)
AutoModelForCausalLM.register(MindMergerConfig, MindMergerForCausalLM)


def mapping_config(
    models: "ModelPair", llm_bos_token_id: int | None, llm_opening: list[int] | None = None
) -> MindMergerConfig:
    """Build the config of a mapping between `models` from their configs, without reading weights.

    Raises:
        InputError: a model is not found or not supported, or has no such --encoder_layer.
    """
    check_llm(models)
    mt = base_config(models.mt_path, models.mt_revision, models.trust_remote_code)
    if models.encoder_layer is not None:
        check_encoder_layer(models.encoder_layer, models.mt_path, mt)
    return MindMergerConfig(
        llm_path=models.llm_path,
        mt_path=models.mt_path,
        llm_revision=models.llm_revision,
        mt_revision=models.mt_revision,
        llm_hidden_size=llm_width(models),
        mt_hidden_size=encoder_shape(models)[0],
        llm_bos_token_id=llm_bos_token_id,
        llm_opening=llm_opening or None,
        encoder_layer=models.encoder_layer,
    )


def _without_auto(hub_options: dict[str, Any]) -> dict[str, Any]:
    """Options of a download without the two that the auto classes add; a TypeError for unknown ones."""
    hub_options = {k: v for k, v in hub_options.items() if k not in ("adapter_kwargs", "_from_auto")}
    if unknown := hub_options.keys() - _HUB_OPTIONS:
        raise TypeError(f"from_pretrained() takes no {', '.join(sorted(unknown))}")
    return hub_options


def _find_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise InputError(
            "dtype must be a torch dtype or its name, such as bfloat16: the two models may have different ones"
        )
    return found


def _switched(rows: list[Tokens], language: str | list[str], alone: frozenset[str]) -> list[Tokens]:
    """Take the mapped states out of rows in the languages of `alone`.

    Raises:
        InputError: a language is unknown, there is not one for each row, or such a row has no prompt.
    """
    from mindmerger.tasks import find_language

    words = [language] * len(rows) if isinstance(language, str) else language
    if len(words) != len(rows):
        raise InputError(f"{len(words)} languages for {len(rows)} rows: give one, or one for each row")
    names = [find_language(word).name for word in words]
    for row, name in zip(rows, names, strict=True):
        if name in alone and not row.prompt:
            raise InputError(f"the mapping harms in {name}: give prompt_ids, which the LLM alone reads there")
    return [replace(row, mapped=name not in alone) for row, name in zip(rows, names, strict=True)]


def _keep_mapping(_: nn.Module, state: dict[str, torch.Tensor], prefix: str, __: Any) -> None:
    for name in [name for name in state if not name.startswith(f"{prefix}mapping.")]:
        del state[name]
