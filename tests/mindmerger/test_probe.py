"""Models with wrong results in the past: now right, or refused in one line, by their config or by a trial run."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    CanineConfig,
    ConvBertConfig,
    CpmAntConfig,
    FalconConfig,
    FalconMambaConfig,
    Gemma4TextConfig,
    GPTJConfig,
    GPTNeoConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MarianConfig,
    MiniMaxConfig,
    MptConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3_5TextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    XLNetConfig,
)

from common.errors import InputError
from mindmerger.batching import Tokens, lay_out
from mindmerger.config import Limits, ModelPair
from mindmerger.evaluation.decoding import greedy_steps, label_log_likelihoods
from mindmerger.frozen_models import check_context, check_llm, encode, encoder_shape, find_masking, load_encoder
from mindmerger.modeling import InputEmbeds, MindMergerForCausalLM, mapping_config
from mindmerger.probe import check_answers, check_padding
from mindmerger.tokenization import load_example_tokenizer
from tests.tiny_models import tiny_llama, tiny_mt5, tiny_xlm_roberta
from tools.estimate import causal_lm_on_meta
from tools.estimate_mindmerger import prefill_cost

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 90, "initializer_range": 0.3, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
STATES = {"state_size": 8, "bos_token_id": 1, "eos_token_id": 2}
RECURRENT = {
    "mamba": MambaConfig(**SIZES, **STATES),
    "falcon_mamba": FalconMambaConfig(**SIZES, **STATES),
    "mamba2": Mamba2Config(**SIZES, **STATES, num_heads=8, head_dim=8, n_groups=1),
    "lfm2": Lfm2Config(**SIZES, **HEADS, layer_types=["conv", "full_attention"]),
    "jamba": JambaConfig(**SIZES, **HEADS, mamba_d_state=8, attn_layer_period=2, attn_layer_offset=1, num_experts=2),
    "qwen3_5": Qwen3_5TextConfig(**SIZES, **HEADS, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8,
                                 linear_num_key_heads=2, linear_num_value_heads=4,
                                 layer_types=["linear_attention", "full_attention"]),
}  # fmt: skip
LABELS = [[5, 6, 7], [8], [11, 10]]


def random_llm(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", RECURRENT)
@torch.no_grad()
def test_an_llm_with_recurrent_states_answers_as_it_does_without_a_cache(family: str) -> None:
    llm = random_llm(RECURRENT[family])
    check_answers(llm)
    check_padding(llm)
    embedding = llm.get_input_embeddings()
    rows = [embedding(torch.randint(3, 90, (length,))) for length in (9, 4)]

    def alone(row: torch.Tensor, ids: list[int]) -> torch.Tensor:
        whole = torch.cat([row, embedding(torch.tensor(ids, dtype=torch.int64))])
        return llm(inputs_embeds=whole[None], use_cache=False).logits[0, len(row) - 1 :].double()

    pad = {"batch_first": True, "padding_side": "left"}
    masks = [torch.ones(len(row), dtype=torch.int64) for row in rows]
    both = InputEmbeds(*(torch.nn.utils.rnn.pad_sequence(part, **pad) for part in (rows, masks)))
    for answers in greedy_steps(llm, [0, 1], lambda _: both, 2, 8, set()):
        for answer in answers:
            assert answer.ids[-1] == int(alone(rows[answer.problem], answer.ids[:-1])[-1].argmax())
    scores, _ = label_log_likelihoods(llm, both, LABELS)
    for row, its in zip(rows, scores, strict=True):
        by_label = [alone(row, label)[:-1].log_softmax(dim=1) for label in LABELS]
        expected = [
            float(by_token.gather(1, torch.tensor(label)[:, None]).sum())
            for by_token, label in zip(by_label, LABELS, strict=True)
        ]
        assert its.tolist() == pytest.approx(expected, rel=1e-4)


BART = BartConfig(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64, vocab_size=90)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_llm_whose_logits_depend_on_batch_or_cache_is_refused(dtype: torch.dtype) -> None:
    """LLMs that attend to later tokens or count learned positions over padding; rounding to 16 bits is accepted."""
    bert = random_llm(BertConfig(**SIZES, num_attention_heads=4, intermediate_size=64)).to(dtype)
    with pytest.raises(InputError, match=r"BertLMHeadModel\) gives logits with a cache that differ by"):
        check_answers(bert)
    bart = random_llm(BART).to(dtype)
    torch.nn.init.normal_(bart.model.decoder.embed_positions.weight)
    with pytest.raises(InputError, match="logits with a cache, in a padded batch that differ"):
        check_answers(bart)
    with pytest.raises(InputError, match="logits in a padded batch that differ"):
        check_padding(bart)
    llama = random_llm(LlamaConfig(**SIZES, **HEADS)).to(dtype)
    check_answers(llama)
    check_padding(llama)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RwkvConfig(), "does not keep its states in a cache class of transformers"),
        (XLNetConfig(), "does not keep its states"),
        (MiniMaxConfig(), "does not keep its states"),
        (RecurrentGemmaConfig(), "does not keep its states"),
        (CpmAntConfig(), "takes token ids only"),
        (Gemma4TextConfig(), "embeds token ids in each layer"),
    ],
    ids=lambda it: getattr(it, "model_type", ""),
)
def test_what_a_config_tells_is_refused_before_anything_loads(
    config: PretrainedConfig, message: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        check_llm(ModelPair(llm_path=str(tmp_path)))


@torch.no_grad()
def test_a_mapping_is_as_wide_as_embeddings_and_states(tmp_path: Path) -> None:
    """OPT-350m's embeddings and its output are narrower than its hidden states."""
    opt = OPTConfig(hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                    vocab_size=90, max_position_embeddings=64)  # fmt: skip
    random_llm(opt).save_pretrained(tmp_path)
    config = mapping_config(ModelPair(llm_path=str(tmp_path), mt_path=str(tmp_path)), None)
    assert (config.llm_hidden_size, config.mt_hidden_size) == (16, 16)
    model = MindMergerForCausalLM.from_base_models(config)
    rows = [Tokens([3, 4], [5], [6, 7, 2]), Tokens([8], [], [2])]
    alone = [model(batch=lay_out([row], None), num_items_in_batch=1.0).loss for row in rows]
    together = model(batch=lay_out(rows, None), num_items_in_batch=1.0).loss
    torch.testing.assert_close(together, sum(alone))


ROPES = {
    "longrope": {"original_max_position_embeddings": 200, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
    "dynamic": {"factor": 4.0},
}


@pytest.mark.parametrize("rope_type", ROPES)
def test_rows_beyond_switching_positions_are_refused(rope_type: str, tmp_path: Path) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 1e4} | ROPES[rope_type]
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "rope_parameters": rope}
    if rope_type == "longrope":
        Phi3Config(**sizes, max_position_embeddings=800, original_max_position_embeddings=200).save_pretrained(tmp_path)
    else:
        LlamaConfig(**sizes, max_position_embeddings=200).save_pretrained(tmp_path)
    models = ModelPair(llm_path=str(tmp_path))
    check_context(models, 200)
    with pytest.raises(InputError, match="computes other positions for all rows of a batch if one has more than 200"):
        check_context(models, 201)


def test_a_source_is_cut_to_the_encoders_table_of_positions(tmp_path: Path) -> None:
    """The tokenizer has no limit; XLM-R counts positions from after its padding id."""
    tiny_llama(tmp_path / "L")
    tiny_xlm_roberta(tmp_path / "M")
    settings = tmp_path / "M/tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"model_max_length": 512', '"model_max_length": 1e30'))
    models = ModelPair(llm_path=str(tmp_path / "L"), mt_path=str(tmp_path / "M"))
    # Padding has the id 0.
    assert encoder_shape(models) == (16, 513)
    assert load_example_tokenizer(models, Limits(1000, 300, 60), True).max_seq_len == 513
    tiny_mt5(tmp_path / "T5")
    assert encoder_shape(ModelPair(llm_path="", mt_path=str(tmp_path / "T5"))) == (24, None)


@torch.no_grad()
def test_marians_computed_positions_are_no_missing_weights(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 90, "max_position_embeddings": 32}
    torch.manual_seed(0)
    whole = AutoModelForSeq2SeqLM.from_config(MarianConfig(**sizes, pad_token_id=0, decoder_start_token_id=0)).eval()
    whole.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 9, 40, 2]])
    loaded = load_encoder(str(tmp_path), None, torch.float32, False)
    expected = whole.get_encoder()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(loaded(input_ids=ids).last_hidden_state, expected)


@torch.no_grad()
def test_an_encoder_that_padding_changes_reads_one_source_at_a_time() -> None:
    torch.manual_seed(0)
    config = ConvBertConfig(**SIZES, num_attention_heads=4, intermediate_size=64, embedding_size=32)
    encoder = AutoModelForMaskedLM.from_config(config).eval().base_model
    assert find_masking(encoder, 0) == find_masking(encoder, 0, ("padding", "alone")) == "alone"
    batch = lay_out([Tokens([5, 9, 40, 2], [], []), Tokens([7, 2], [], [])], None)
    states = encode(encoder, batch.source_ids, batch.source_mask, "alone")
    for row, ids in zip(states, ([5, 9, 40, 2], [7, 2]), strict=True):
        torch.testing.assert_close(row[: len(ids)], encoder(input_ids=torch.tensor([ids])).last_hidden_state[0])
    canine = AutoModel.from_config(
        CanineConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    ).eval()
    with pytest.raises(InputError, match="the encoder .* cannot run"):
        find_masking(canine, 0)


PLANNED = {
    "falcon": FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=90),
    "gptj": GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=8, vocab_size=90),
    "gpt_neo": GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
                            vocab_size=90),
    "mpt": MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=90),
    "mamba": RECURRENT["mamba"],
    "opt": OPTConfig(hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                     vocab_size=90),
}  # fmt: skip


@pytest.mark.parametrize("family", PLANNED)
def test_a_plan_of_an_llm_with_attention_of_its_own(family: str, tmp_path: Path) -> None:
    """Products of a forward pass without the head: two for each weight and token, and some for attention."""
    config = PLANNED[family]
    config.save_pretrained(tmp_path)
    llm = causal_lm_on_meta(str(tmp_path))
    cost = prefill_cost(llm, 2, 40)
    layers = [module for module in llm.base_model.modules() if not isinstance(module, torch.nn.Embedding)]
    weights = sum(p.numel() for module in layers for p in module.parameters(recurse=False) if p.ndim == 2)
    assert 0.9 < cost.flops / (2 * 80 * weights) < 2
    assert 0 < cost.kept_bytes < cost.peak_bytes
