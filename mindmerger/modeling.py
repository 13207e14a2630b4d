"""MindMerger's model: a frozen multilingual encoder, a trainable mapping, a frozen LLM.

Section 3 of Huang et al., NeurIPS 2024 (arXiv 2405.17386). The LLM reads
`[bos | mapped source states | boundary | prompt | target]`; loss is on the target alone.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import cached_file

from common.errors import InputError, first_line
from common.models import base_config
from mindmerger.batching import IGNORED
from mindmerger.card import write_card
from mindmerger.checkpoint import SAFETENSORS, read_mapping, write_mapping
from mindmerger.config import ModelPair
from mindmerger.frozen_models import check_encoder_layer, encoder_config, load_encoder, load_llm
from mindmerger.packing import pack_attention, packed_arguments

_HUB_OPTIONS = {
    *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"),
    "_commit_hash",
}


class MindMergerConfig(PretrainedConfig):
    """Which two models a mapping joins, and what it was trained for.

    Args:
        llm_path, mt_path: hub ids or local folders of the LLM and of the multilingual model.
        llm_revision, mt_revision: hub revisions to pin them to.
        llm_hidden_size, mt_hidden_size: widths of the LLM's embeddings and of the encoder's states.
        llm_bos_token_id: opens every sequence; None for an LLM without one.
        encoder_layer: of a decoder-only multilingual model, how many of its layers make the encoder; None for all.
        task, stage, augmentation, prompt: what the mapping was last trained for; `prompt` is the template that
            followed the boundary, None where none did.
        languages, train_rows, datasets: what it was last trained on: codes of the sources' languages, how many rows,
            and hub ids of the data sets where they are known.
    """

    model_type = "mindmerger"

    def __init__(
        self,
        llm_path: str | None = None,
        mt_path: str | None = None,
        llm_revision: str | None = None,
        mt_revision: str | None = None,
        llm_hidden_size: int | None = None,
        mt_hidden_size: int | None = None,
        llm_bos_token_id: int | None = None,
        encoder_layer: int | None = None,
        task: str | None = None,
        stage: str | None = None,
        augmentation: bool | None = None,
        prompt: str | None = None,
        languages: list[str] | None = None,
        train_rows: int | None = None,
        datasets: list[str] | None = None,
        **kwargs: Any,
    ):
        self.llm_path = llm_path
        self.mt_path = mt_path
        self.llm_revision = llm_revision
        self.mt_revision = mt_revision
        self.llm_hidden_size = llm_hidden_size
        self.mt_hidden_size = mt_hidden_size
        self.llm_bos_token_id = llm_bos_token_id
        self.encoder_layer = encoder_layer
        self.task = task
        self.stage = stage
        self.augmentation = augmentation
        self.prompt = prompt
        self.languages = languages
        self.train_rows = train_rows
        self.datasets = datasets
        super().__init__(**kwargs)


class MLP(nn.Module):
    """Two linear layers with a ReLU between: [..., mt_hidden_size] to [..., llm_hidden_size]."""

    def __init__(self, mt_hidden_size: int, llm_hidden_size: int):
        super().__init__()
        self.linear1 = nn.Linear(mt_hidden_size, 2 * mt_hidden_size)
        self.linear2 = nn.Linear(2 * mt_hidden_size, llm_hidden_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.linear2(F.relu(self.linear1(states)))


class Mapping(nn.Module):
    """All that is trained. Names and shapes are those of the published checkpoints."""

    def __init__(self, mt_hidden_size: int, llm_hidden_size: int):
        super().__init__()
        self.mlp = MLP(mt_hidden_size, llm_hidden_size)
        self.end_boundary = nn.Parameter(torch.zeros(1, 1, llm_hidden_size))

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoder states [batch, length, mt_hidden_size] to (vectors [batch, length, llm_hidden_size], boundary).

        The boundary [batch, 1, llm_hidden_size] leaves through here because ZeRO-3 gathers a parameter only while
        the module that owns it runs.
        """
        return self.mlp(states), self.end_boundary.expand(len(states), -1, -1)


@dataclass(frozen=True)
class Sequence:
    """What the LLM reads, left-padded, so that every row ends in the last column.

    Attributes:
        embeds: [batch, length, llm_hidden_size].
        mask: [batch, length], 1 for a vector, 0 for padding.
    """

    embeds: torch.Tensor
    mask: torch.Tensor

    @property
    def position_ids(self) -> torch.Tensor:
        """[batch, length]; a row's first vector is at position 0, whatever its padding."""
        return (self.mask.cumsum(dim=1) - 1).clamp(min=0)


def join(segments: list[tuple[torch.Tensor, torch.Tensor]]) -> Sequence:
    """Concatenate (embeds [batch, n, hidden], mask [batch, n]) segments and move all padding to the left."""
    embeds = torch.cat([embeds for embeds, _ in segments], dim=1)
    mask = torch.cat([mask for _, mask in segments], dim=1)
    return Sequence(*squeeze_padding(mask, embeds, side="left"))


def squeeze_padding(mask: torch.Tensor, values: torch.Tensor, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the padding of each row to one side and drop the columns that then hold nothing else.

    Args:
        mask: [batch, length], 1 for a real position, 0 for padding, in any order.
        values: [batch, length] or [batch, length, hidden].
        side: where the padding goes, "left" or "right".

    Returns:
        (values, mask), real positions in their order.
    """
    order = mask.argsort(dim=1, descending=side == "right", stable=True)
    longest = int(mask.sum(dim=1).max())
    order = order[:, -longest:] if side == "left" else order[:, :longest]
    index = order if values.dim() == 2 else order.unsqueeze(-1).expand(-1, -1, values.shape[-1])
    return values.gather(1, index), mask.gather(1, order)


class MindMergerForCausalLM(PreTrainedModel):
    """A multilingual encoder, a mapping, and an LLM, of which only the mapping is trained, saved and loaded.

    Args:
        config: names and sizes of the two models.
        encoder: gives states [batch, length, mt_hidden_size]; see `load_encoder`.
        llm: any Hugging Face causal language model; see `load_llm`.
    """

    config_class = MindMergerConfig
    base_model_prefix = "mindmerger"
    main_input_name = "input_ids"

    def __init__(self, config: MindMergerConfig, encoder: PreTrainedModel, llm: PreTrainedModel):
        super().__init__(config)
        # Not PreTrainedModel.post_init: it would initialise weights, and all but the mapping's are loaded ones.
        self.encoder = encoder.requires_grad_(False)
        self.llm = llm.requires_grad_(False)
        self.mapping = Mapping(config.mt_hidden_size, config.llm_hidden_size)
        # An encoder's cache is never read.
        self.encoder.config.use_cache = False
        # Frozen weights are in no checkpoint, under whichever of their names (embeddings often have two).
        self.register_state_dict_post_hook(_keep_mapping)
        self._packs = False
        self.eval()

    @classmethod
    def from_base_models(
        cls, config: MindMergerConfig, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
    ) -> "MindMergerForCausalLM":
        """Load both frozen models that `config` names, in `dtype`; the mapping starts at random, in float32."""
        encoder = load_encoder(config.mt_path, config.mt_revision, dtype, trust_remote_code, config.encoder_layer)
        llm = load_llm(config.llm_path, config.llm_revision, dtype, trust_remote_code)
        return cls(config, encoder, llm)

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
            config: stands in for the folder's own, for instance to name other copies of the two models.
            dtype: of all three parts, as a torch dtype or its name.
            trust_remote_code: run the code that a base model's repository brings.
            hub_options: of a download: `revision`, `token`, `cache_dir` and the like.

        Raises:
            InputError: a missing file, or a mapping of other models (the tensor is named).
        """
        # The auto classes add these two for models of their own.
        hub_options = {k: v for k, v in hub_options.items() if k not in ("adapter_kwargs", "_from_auto")}
        unknown = hub_options.keys() - _HUB_OPTIONS
        if unknown:
            raise TypeError(f"from_pretrained() takes no {', '.join(sorted(unknown))}")
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not isinstance(dtype, torch.dtype):
            raise InputError(
                "dtype is a torch dtype or its name, as bfloat16: the models may have several of their own"
            )
        path = Path(checkpoint, hub_options.get("subfolder") or "")
        try:
            config = config or MindMergerConfig.from_pretrained(checkpoint, **hub_options)
            if not path.exists():
                path = Path(cached_file(str(checkpoint), SAFETENSORS, **hub_options))
        except OSError as error:
            raise InputError(f"no mapping could be loaded from {checkpoint}: {first_line(error)}") from error
        if config.mt_hidden_size is None or config.llm_hidden_size is None:
            raise InputError(f"the config in {checkpoint} is not a mapping's: it names no hidden sizes")
        state = read_mapping(path, config.mt_hidden_size, config.llm_hidden_size)
        model = cls.from_base_models(config, dtype, trust_remote_code)
        model.mapping.load_state_dict(state)
        model.mapping.to(dtype)
        return model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write config, mapping and model card to a folder; the base models stay where they are.

        The card holds the scores that evaluations in `./results` gave to this very mapping.
        """
        write_mapping(Path(save_directory), self.config.to_dict(), self.mapping.state_dict())
        write_card(Path(save_directory))

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload MindMerger mapping",
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hub's `repo_id`, which is made if need be; returns its URL.

        Transformers' own would put an empty card in place of this one.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
        return str(commit.commit_url)

    def train(self, mode: bool = True) -> "MindMergerForCausalLM":
        """As for any module, but the frozen models never leave eval mode: no dropout where nothing is learned."""
        super().train(mode)
        self.encoder.eval()
        self.llm.eval()
        return self

    def checkpoint_gradients(self) -> None:
        """Recompute the LLM's layers in the backward pass instead of keeping their activations.

        Hugging Face's own switch does nothing in eval mode, in which the LLM stays.

        Raises:
            InputError: the LLM's layers are not transformers' own kind.
        """
        layers = [layer for layer in self.llm.modules() if isinstance(layer, GradientCheckpointingLayer)]
        if not layers:
            raise InputError(f"--gradient_checkpointing: {type(self.llm).__name__} has no layers that can recompute")
        for layer in layers:
            layer.forward = _checkpointed(layer.forward)

    def pack_rows(self) -> bool:
        """Have `forward` read the rows of a batch with targets packed instead of padded, if the LLM allows it.

        Returns:
            Whether it does; see `pack_attention`.
        """
        self._packs = pack_attention(self.llm)
        return self._packs

    def encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Source ids, padded on either side, to (encoder states [batch, length, mt_hidden_size], mask)."""
        # Some encoders count positions from the first column, padding or not.
        input_ids, attention_mask = squeeze_padding(attention_mask, input_ids, side="right")
        with torch.no_grad():
            states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states, attention_mask

    def embed(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        prompt_ids: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> Sequence:
        """The sequence `[bos | mapped source states | boundary | prompt | target]`; arguments as in `forward`."""
        return join(self._segments(input_ids, attention_mask, prompt_ids, prompt_attention_mask, labels))

    def _segments(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        prompt_ids: torch.Tensor | None,
        prompt_attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        states, states_mask = self.encode(input_ids, attention_mask)
        vectors, boundary = self.mapping(states.to(self.mapping.end_boundary.dtype))
        dtype = self.llm.get_input_embeddings().weight.dtype
        segments = [
            *bos_segment(self.llm, self.config.llm_bos_token_id, states_mask),
            (vectors.to(dtype), states_mask),
            (boundary.to(dtype), states_mask.new_ones(len(states), 1)),
        ]
        if prompt_ids is not None:
            segments.append(token_segment(self.llm, prompt_ids, prompt_attention_mask))
        if labels is not None:
            segments.append(token_segment(self.llm, labels.clamp(min=0), (labels != IGNORED).long()))
        return segments

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        prompt_ids: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: float | None = None,
    ) -> CausalLMOutput:
        """Loss on the target, or the next token's logits where there is none.

        Args:
            input_ids, attention_mask: source for the encoder, [batch, source length].
            prompt_ids, prompt_attention_mask: prompt for the LLM, [batch, prompt length].
            labels: target ids, [batch, target length], -100 where padded.
            num_items_in_batch: divides the summed loss; default the number of target tokens here.

        Returns:
            `loss`: cross entropy in nats, float32; `logits`: [target tokens, vocabulary] in row order, or
            [batch, vocabulary] of the next token where `labels` is None or empty. The LLM's head runs where a target
            is to be predicted, and of padded rows on the last columns, as many as the longest target has.
        """
        segments = self._segments(input_ids, attention_mask, prompt_ids, prompt_attention_mask, labels)
        if labels is None or labels.shape[1] == 0:
            return CausalLMOutput(logits=self._logits(join(segments), 1)[:, -1])
        logits = (self._packed_logits if self._packs else self._padded_logits)(segments).float()
        loss = F.cross_entropy(logits, labels[labels != IGNORED], reduction="sum")
        return CausalLMOutput(loss=loss / (num_items_in_batch or len(logits)), logits=logits)

    def _packed_logits(self, segments: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """What predicts each token of the last segment, [its tokens, vocabulary], from one row of all sequences."""
        embeds, masks = (torch.cat(parts, dim=1) for parts in zip(*segments, strict=True))
        is_real = masks.bool()
        is_target = torch.zeros_like(is_real)
        is_target[:, -segments[-1][1].shape[1] :] = True
        return self.llm(
            inputs_embeds=embeds[is_real][None],
            logits_to_keep=is_target[is_real].nonzero().flatten() - 1,
            use_cache=False,
            **packed_arguments(masks.sum(dim=1).tolist(), masks.device),
        ).logits[0]

    def _padded_logits(self, segments: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """As `_packed_logits`, from left-padded rows."""
        sequence, target_mask = join(segments), segments[-1][1]
        _, is_target = squeeze_padding(target_mask, target_mask, side="left")
        # Rows end in the last column, and nothing is predicted from the last token.
        sequence = Sequence(sequence.embeds[:, :-1], sequence.mask[:, :-1])
        return self._logits(sequence, is_target.shape[1])[is_target.bool()]

    def _logits(self, sequence: Sequence, last: int) -> torch.Tensor:
        return self.llm(
            inputs_embeds=sequence.embeds,
            attention_mask=sequence.mask,
            position_ids=sequence.position_ids,
            logits_to_keep=last,
            use_cache=False,
        ).logits

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        prompt_ids: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """New token ids [batch, new tokens]; `kwargs` go to the LLM's own `generate`."""
        sequence = self.embed(input_ids, attention_mask, prompt_ids, prompt_attention_mask)
        return self.llm.generate(inputs_embeds=sequence.embeds, attention_mask=sequence.mask, **kwargs)


AutoConfig.register("mindmerger", MindMergerConfig)
AutoModelForCausalLM.register(MindMergerConfig, MindMergerForCausalLM)


def bos_segment(
    llm: PreTrainedModel, bos_token_id: int | None, mask: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The one segment that opens as many sequences as `mask` has rows, or none for an LLM without a bos token."""
    if bos_token_id is None:
        return []
    bos = torch.full_like(mask[:, :1], bos_token_id)
    return [token_segment(llm, bos, torch.ones_like(bos))]


def token_segment(
    llm: PreTrainedModel, token_ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both [batch, n], as a segment for `join`."""
    return llm.get_input_embeddings()(token_ids), mask


@torch.no_grad()
def embedding_scale(
    model: MindMergerForCausalLM, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """What a mapping at PyTorch's initialisation lacks to speak at the LLM's own scale.

    A frozen LLM has only ever read vectors of its embedding table; PyTorch's initialisation, made for hidden
    layers, gives vectors many times as long.

    Args:
        model: with a fresh mapping.
        input_ids, attention_mask: some sources, [batch, source length], to measure the encoder's scale on.

    Returns:
        (mean embedding [llm_hidden_size], float32; root mean square of the embeddings over that of the mapped
        vectors).
    """
    mean, embedding_rms = mean_embedding(model.llm.get_input_embeddings(), input_ids.device)
    states, mask = model.encode(input_ids, attention_mask)
    vectors, _ = model.mapping(states.to(model.mapping.end_boundary.dtype))
    mapped_rms = float(vectors[mask.bool()].float().square().mean().sqrt())
    return mean, embedding_rms / mapped_rms


@torch.no_grad()
def mean_embedding(embedding: nn.Module, device: torch.device) -> tuple[torch.Tensor, float]:
    """(mean, [llm_hidden_size] in float32; root mean square of all values) of an LLM's embedding table."""
    total, squares = 0.0, 0.0
    for ids in torch.arange(embedding.num_embeddings, device=device).split(8192):
        # Not the table itself: some models scale what they look up, and ZeRO-3 gathers it only here.
        vectors = embedding(ids).float()
        total = total + vectors.sum(dim=0)
        squares += float(vectors.square().sum())
    return total / embedding.num_embeddings, (squares / (embedding.num_embeddings * len(total))) ** 0.5


def mapping_config(models: ModelPair, llm_bos_token_id: int | None) -> MindMergerConfig:
    """The config that joins the two models of `models`, from their configs alone: no weights are read.

    Raises:
        InputError: one of the two cannot be found, or has no such --encoder_layer.
    """
    llm = base_config(models.llm_path, models.llm_revision, models.trust_remote_code)
    mt = base_config(models.mt_path, models.mt_revision, models.trust_remote_code)
    if models.encoder_layer is not None:
        check_encoder_layer(models.encoder_layer, models.mt_path, mt)
    return MindMergerConfig(
        llm_path=models.llm_path,
        mt_path=models.mt_path,
        llm_revision=models.llm_revision,
        mt_revision=models.mt_revision,
        llm_hidden_size=llm.get_text_config().hidden_size,
        mt_hidden_size=encoder_config(mt).get_text_config().hidden_size,
        llm_bos_token_id=llm_bos_token_id,
        encoder_layer=models.encoder_layer,
    )


def _keep_mapping(_: nn.Module, state: dict[str, torch.Tensor], prefix: str, __: Any) -> None:
    for name in [name for name in state if not name.startswith(f"{prefix}mapping.")]:
        del state[name]


def _checkpointed(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
