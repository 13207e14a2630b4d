"""Every causal LM and every encoder that transformers builds tiny: right, or refused in one line.

Minutes: `pytest -m slow -s tests/mindmerger/test_architectures.py` prints the outcome of each.
"""

import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    CanineConfig,
    MT5Config,
    MT5EncoderModel,
    PretrainedConfig,
    PreTrainedModel,
)

from common.errors import InputError
from common.models import model_on_meta
from mindmerger.batching import Tokens, lay_out
from mindmerger.config import ModelPair
from mindmerger.evaluation.decoding import greedy_steps, label_log_likelihoods
from mindmerger.frozen_models import (
    check_llm,
    encode,
    encoder_shape,
    find_masking,
    llm_width,
    load_encoder,
    load_llm,
)
from mindmerger.modeling import InputEmbeds, MindMergerConfig, MindMergerForCausalLM
from mindmerger.probe import check_answers, check_padding

VOCABULARY, LARGEST = 96, 20_000_000
# Names of settings in configs, with small values.
_COMMON = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size", "lru_width"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "hidden_dim", "ffn_dim", "ffn_hidden_size", "d_inner"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "mamba_d_ssm"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim", "attention_head_dim", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "linear_key_head_dim"), 8),
    **dict.fromkeys(("linear_value_head_dim", "mamba_d_state", "mamba_n_heads", "mamba_d_head"), 8),
    **dict.fromkeys(("mamba_num_heads", "mamba_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    # With the usual 0.02, outputs of such small models do not depend on their inputs.
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **{"n_group": 1, "topk_group": 1, "mamba_n_groups": 1, "n_groups": 1, "rotary_pct": 1.0},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_TWICE = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# Settings for some families, tried in turn.
_VARIANTS = (
    {},
    {"num_key_value_heads": 4},
    dict.fromkeys(_TWICE, 8),
    dict.fromkeys(_TWICE, 8) | {"num_key_value_heads": 4},
)
# Additional settings of a few families.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "dots1": {"n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 2, "num_key_value_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"n_mamba_heads": 8, "mamba_ngroups": 1, "layers_block_type": ["mamba", "hybrid"] * 2},
}
LENGTHS = (9, 4, 6)
LABELS = [[5, 6, 7], [8], [11, 10]]


def tiny_config(config_class: type[PretrainedConfig], variant: dict[str, Any]) -> PretrainedConfig:
    """Default config of a class with all sizes small."""
    known = {*inspect.signature(config_class.__init__).parameters, *config_class.attribute_map}
    if dataclasses.is_dataclass(config_class):
        known |= {field.name for field in dataclasses.fields(config_class)}
    own = _OWN.get(config_class.model_type, {})
    parts = {
        name: tiny_config(part, variant).to_dict()
        for name, part in config_class.sub_configs.items()
        if part is not AutoConfig
    }
    sizes = {
        name: value
        for name, value in (_COMMON | variant).items()
        if name in known and config_class.attribute_map.get(name) not in _COMMON
    }
    return config_class(**(sizes | own | parts))


def tiny_models(auto_class: Any, config_class: type[PretrainedConfig]) -> Iterator[PreTrainedModel]:
    """Random models of a class that transformers can build small."""
    if len(config_class.sub_configs) > 1:
        # Composite models, such as vision with text: the text's class is tested separately.
        return
    for variant in _VARIANTS:
        # Classes raise different errors for unsupported settings.
        try:
            config = tiny_config(config_class, variant)
            whole = model_on_meta(auto_class, config.model_type, config)
            if sum(parameter.numel() for parameter in whole.parameters()) > LARGEST:
                return
            torch.manual_seed(0)
            yield auto_class.from_config(config).eval()
        except GeneratorExit:
            raise
        except Exception:
            continue


def sweep(
    classes: list[tuple[Any, type[PretrainedConfig]]], folder: Path, serve: Callable[[PreTrainedModel, Path], str]
) -> Counter:
    """Count models that are right, refused, or not built; fail for all others."""
    outcomes = {}
    for auto_class, config_class in classes:
        name, outcome = config_class.model_type, "not built"
        for model in tiny_models(auto_class, config_class):
            path = folder / name
            model.save_pretrained(path)
            try:
                outcome = f"right, {serve(model, path)}"
                break
            except InputError as error:
                assert "\n" not in str(error)
                outcome = f"refused: {str(error).replace(str(folder), '')}"
                if "cannot" not in outcome:
                    break
        outcomes[name] = outcome
        print(f"{name}: {outcome}", flush=True)
    counts = Counter(outcome.partition(":")[0].partition(",")[0] for outcome in outcomes.values())
    print(dict(counts))
    return counts


def padded(rows: list[torch.Tensor]) -> InputEmbeds:
    """Vectors of rows, left-padded."""
    pad = {"batch_first": True, "padding_side": "left"}
    masks = [torch.ones(len(row), dtype=torch.int64) for row in rows]
    return InputEmbeds(*(torch.nn.utils.rnn.pad_sequence(part, **pad) for part in (rows, masks)))


@torch.no_grad()
def serve_llm(_: PreTrainedModel, path: Path) -> str:
    """Load, probe, and compare losses, answers and likelihoods with those of one row at a time without a cache."""
    models = ModelPair(llm_path=str(path))
    check_llm(models)
    width = llm_width(models)
    llm = load_llm(str(path), None, torch.float32, False)
    check_answers(llm)
    check_padding(llm)

    torch.manual_seed(1)
    embedding = llm.get_input_embeddings()
    rows = [embedding(torch.randint(3, VOCABULARY, (length,))) for length in LENGTHS]
    assert rows[0].shape[1] == width

    def logits(row: torch.Tensor, ids: list[int]) -> torch.Tensor:
        """Logits that predict each of the ids and the token after them, alone and from the whole sequence."""
        whole = torch.cat([row, embedding(torch.tensor(ids, dtype=torch.int64))])
        return llm(inputs_embeds=whole[None], use_cache=False).logits[0, len(row) - 1 :].double()

    for answers in greedy_steps(llm, range(3), lambda some: padded([rows[row] for row in some]), 3, 6, set()):
        for answer in answers:
            predicting = logits(rows[answer.problem], answer.ids[:-1])
            chosen = predicting.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
            assert (predicting.amax(dim=1) - chosen).max() < 1e-2 * predicting.std(), (path.name, answer)

    scores, _ = label_log_likelihoods(llm, padded(rows), LABELS)
    for row, its in zip(rows, scores, strict=True):
        expected = [
            float(logits(row, label)[:-1].log_softmax(dim=1).gather(1, torch.tensor(label)[:, None]).sum())
            for label in LABELS
        ]
        assert its.tolist() == pytest.approx(expected, rel=2e-3, abs=2e-3), path.name

    encoder = MT5EncoderModel(MT5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, vocab_size=VOCABULARY))
    model = MindMergerForCausalLM(MindMergerConfig(llm_hidden_size=width, mt_hidden_size=16), encoder, llm)
    tokens = [Tokens([3, 9, 4], [5, 6], [7, 8, 2]), Tokens([8], [], [2]), Tokens([3, 5], [5, 6, 7, 11], [4, 2])]
    expected = 0.0
    for row in tokens:
        embeds = model.embed(lay_out([row], None))[0]
        own = llm(inputs_embeds=embeds[None], use_cache=False).logits[0, -len(row.target) :].double()
        expected -= float(own.log_softmax(dim=1).gather(1, torch.tensor(row.target)[:, None]).sum())
    packs = model.pack_rows()
    for packed in {False, packs}:
        loss = float(model(batch=lay_out(tokens, None, packed=packed), num_items_in_batch=1.0).loss)
        assert loss == pytest.approx(expected, rel=1e-3), (path.name, packed)
    return "packed" if packs else "padded"


@torch.no_grad()
def serve_encoder(whole: PreTrainedModel, path: Path) -> str:
    """Load, probe, and compare states with those of the whole model, one source at a time."""
    width, limit = encoder_shape(ModelPair(llm_path="", mt_path=str(path)))
    encoder = load_encoder(str(path), None, torch.float32, False)
    # As for an LLM's input.
    encoder.config.use_cache = False
    sources = [[5, 17, 3, 44, 9, 60, 21, 2], [7, 8, 2], [33, 12, 90, 4, 2]]
    batch = lay_out([Tokens(source, [], []) for source in sources], None)
    parts = whole.get_encoder() if whole.config.is_encoder_decoder else getattr(whole, whole.base_model_prefix, whole)
    used = []
    for forms in (("causal", "additive", "padding", "alone"), ("padding", "alone")):
        used.append(find_masking(encoder, 0, forms))
        states = encode(encoder, batch.source_ids, batch.source_mask, used[-1])
        for row, source in zip(states, sources, strict=True):
            expected = parts(input_ids=torch.tensor([source])).last_hidden_state[0]
            assert expected.shape[1] == width
            torch.testing.assert_close(row[: len(source)], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    if limit is not None:
        encode(encoder, torch.full((1, limit), 5), torch.ones(1, limit, dtype=torch.int64))
    return f"{used[0]}, {used[1]}"


@pytest.mark.slow
def test_every_causal_lm_is_right_or_refused(tmp_path: Path) -> None:
    classes = {name: (AutoModelForCausalLM, name) for name in AutoModelForCausalLM._model_mapping}
    del classes[MindMergerConfig]
    counts = sweep(sorted(classes.values(), key=lambda it: it[1].model_type), tmp_path, serve_llm)
    assert counts["right"] >= 100 and counts["refused"] >= 10


@pytest.mark.slow
def test_every_encoder_is_right_or_refused(tmp_path: Path) -> None:
    classes = {CanineConfig: (AutoModel, CanineConfig)}
    for auto_class in (AutoModelForTextEncoding, AutoModelForMaskedLM, AutoModelForSeq2SeqLM):
        classes |= {name: (auto_class, name) for name in auto_class._model_mapping}
    counts = sweep(sorted(classes.values(), key=lambda it: it[1].model_type), tmp_path, serve_encoder)
    assert counts["right"] >= 30 and counts["refused"] >= 1
