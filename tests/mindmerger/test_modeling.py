import copy
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    CodeGenConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    MistralConfig,
    Qwen3Config,
)

from benchmarks.padded import PaddedBatch, collate
from common.errors import InputError
from mindmerger import frozen_models
from mindmerger.batching import IGNORED, Tokens, lay_out, padded_rows
from mindmerger.checkpoint import SAFETENSORS, write_mapping, write_verdicts
from mindmerger.config import ModelPair
from mindmerger.data import Example
from mindmerger.evaluation.decoding import greedy
from mindmerger.frozen_models import check_context, load_encoder, load_llm, recompute_layers
from mindmerger.init.scaled import embedding_scale
from mindmerger.modeling import InputEmbeds, MindMergerForCausalLM, mapping_config
from mindmerger.tasks import LANGUAGES
from mindmerger.tokenization import ExampleTokenizer
from tests.mindmerger.conftest import ENCODERS

Build = Callable[..., tuple[MindMergerForCausalLM, ExampleTokenizer]]


def left_padded(batch: PaddedBatch) -> PaddedBatch:
    """Move each row's padding to the left, as a user's collator may do."""

    def flip(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows = []
        for row, real in zip(ids, mask.bool(), strict=True):
            rows.append(torch.cat([row[~real], row[real]]))
        return torch.stack(rows)

    return PaddedBatch(
        flip(batch.input_ids, batch.attention_mask),
        flip(batch.attention_mask, batch.attention_mask),
        flip(batch.prompt_ids, batch.prompt_attention_mask),
        flip(batch.prompt_attention_mask, batch.prompt_attention_mask),
        flip(batch.labels, batch.labels != IGNORED),
    )


def row_losses(model: MindMergerForCausalLM, batch: PaddedBatch) -> list[float]:
    """Summed loss of each row of a batch, from the batch's logits."""
    output = model(**vars(batch))
    targets = batch.labels[batch.labels != IGNORED]
    losses = torch.nn.functional.cross_entropy(output.logits, targets, reduction="none")
    counts = (batch.labels != IGNORED).sum(dim=1).tolist()
    return [float(part.sum()) for part in losses.split(counts)]


def read(model: MindMergerForCausalLM, rows: list[Tokens], source_pad_id: int = 0) -> InputEmbeds:
    """Left-padded inputs of the LLM."""
    batch = lay_out(rows, model.config.llm_bos_token_id, source_pad_id)
    return InputEmbeds(model.embed(batch), batch.mask)


@pytest.mark.parametrize("mt", ENCODERS)
@pytest.mark.parametrize("augmentation", [True, False])
@torch.no_grad()
def test_padding_changes_nothing(build: Build, examples: list[Example], mt: str, augmentation: bool) -> None:
    model, tokenizer = build(mt=mt, augmentation=augmentation)
    rows = tokenizer(examples)
    together = collate(rows, tokenizer.source_pad_id)
    alone = [row_losses(model, collate([row], tokenizer.source_pad_id))[0] for row in rows]
    assert row_losses(model, together) == pytest.approx(alone, rel=1e-6, abs=2e-5)
    assert row_losses(model, left_padded(together)) == pytest.approx(alone, rel=1e-6, abs=2e-5)

    questions = tokenizer(examples, with_targets=False)
    together = collate(questions, tokenizer.source_pad_id)

    def answers(batch: PaddedBatch) -> list[list[int]]:
        return greedy(model.llm, read(model, padded_rows(**vars(batch)), tokenizer.source_pad_id), 12, {2})

    alone_answers = [answers(collate([row], tokenizer.source_pad_id))[0] for row in questions]
    assert answers(together) == alone_answers
    assert answers(left_padded(together)) == alone_answers
    assert len({tuple(answer) for answer in alone_answers}) > 1


@pytest.mark.parametrize("mt", ENCODERS)
def test_loss_equals_a_plain_implementation(
    build: Build, models: dict[str, Path], examples: list[Example], mt: str
) -> None:
    """One row at a time, no padding, every logit, float64 log softmax: written from the definition."""
    model, tokenizer = build(mt=mt)
    rows = tokenizer(examples)
    whole = AutoModel.from_pretrained(models[mt])
    encoder = whole.get_encoder() if whole.config.is_encoder_decoder else whole
    llm = AutoModelForCausalLM.from_pretrained(models["llama"])
    mapping = {name: tensor.detach() for name, tensor in model.mapping.state_dict().items()}

    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            states = encoder(input_ids=torch.tensor([list(row.source)])).last_hidden_state
            hidden = torch.relu(states @ mapping["mlp.linear1.weight"].T + mapping["mlp.linear1.bias"])
            vectors = hidden @ mapping["mlp.linear2.weight"].T + mapping["mlp.linear2.bias"]
            table = llm.model.embed_tokens.weight
            ids = torch.tensor(list(row.target))
            sequence = torch.cat(
                [table[[1]], vectors[0], mapping["end_boundary"][0], table[torch.tensor(list(row.prompt))], table[ids]]
            )
            logits = llm(inputs_embeds=sequence[None]).logits[0].double()
        predicting = logits[-len(ids) - 1 : -1].log_softmax(dim=-1)
        total -= float(predicting[torch.arange(len(ids)), ids].sum())
        count += len(ids)

    batch = collate(rows, tokenizer.source_pad_id)
    assert model(**vars(batch)).loss.item() == pytest.approx(total / count, rel=1e-5)
    assert model(**vars(batch), num_items_in_batch=7).loss.item() == pytest.approx(total / 7, rel=1e-5)


LLMS = {
    "mistral": MistralConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, sliding_window=16),
    "gemma2": Gemma2Config(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, head_dim=8, sliding_window=16),
    "gemma3": Gemma3TextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                               num_key_value_heads=2, head_dim=8, sliding_window=16),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4),
    "qwen3": Qwen3Config(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=16),
}  # fmt: skip


@pytest.mark.parametrize("family", LLMS)
@torch.no_grad()
def test_other_llm_families(build: Build, examples: list[Example], family: str) -> None:
    """Sliding windows, scaled embeddings, soft-capped logits, learned positions: padding still changes nothing."""
    model, tokenizer = build()
    config = copy.deepcopy(LLMS[family])
    config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id = 420, 0, 1, 2
    torch.manual_seed(0)
    model.llm = AutoModelForCausalLM.from_config(config).eval()
    rows = tokenizer(examples)
    alone = [row_losses(model, collate([row], 0))[0] for row in rows]
    assert row_losses(model, collate(rows, 0)) == pytest.approx(alone, rel=1e-5)
    questions = tokenizer(examples, with_targets=False)
    answers = [greedy(model.llm, read(model, [row]), 8, {2})[0] for row in questions]
    together = read(model, questions)
    assert greedy(model.llm, together, 8, {2}) == answers

    # Gemma 2 caps its attention's scores, which SDPA does not support.
    assert model.pack_rows() == (family != "gemma2")
    assert row_losses(model, collate(rows, 0)) == pytest.approx(alone, rel=1e-5)
    assert greedy(model.llm, together, 8, {2}) == answers


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
@torch.no_grad()
def test_positions_counted_over_padding_matter_where_positions_are_learned(
    build: Build, examples: list[Example], family: str
) -> None:
    """The published training passes no position ids: an LLM then counts from the first column, including padding."""
    model, tokenizer = build()
    config = copy.deepcopy(LLMS[family])
    config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id = 420, 0, 1, 2
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.normal_(llm.get_input_embeddings().weight)
    model.llm = llm
    sequence = read(model, tokenizer(examples))
    inputs = {"inputs_embeds": sequence.embeds, "attention_mask": sequence.mask}
    ours = llm(**inputs, position_ids=sequence.position_ids).logits[:, -1]
    published = llm(**inputs, position_ids=torch.arange(sequence.mask.shape[1])[None]).logits[:, -1]
    is_padded = sequence.mask[:, 0] == 0
    assert is_padded.any() and not is_padded.all()
    difference = (ours - published).norm(dim=-1) / ours.norm(dim=-1)
    assert difference[~is_padded].max() < 1e-5
    if family == "gpt2":
        assert difference[is_padded].min() > 1e-2
    else:
        # Rotary positions: attention depends on their differences only.
        assert difference.max() < 1e-4


@torch.no_grad()
def test_a_mean_of_micro_batch_means_depends_on_how_rows_are_split(build: Build, examples: list[Example]) -> None:
    """The published loss of a step, and its dev perplexity; here both are means over all target tokens."""
    model, tokenizer = build()
    rows = tokenizer(examples)
    tokens = sum(len(row.target) for row in rows)
    published, ours = [], []
    for cuts in ([0, 5], [0, 2, 5], [0, 1, 2, 3, 4, 5]):
        batches = [collate(rows[a:b], 0) for a, b in itertools.pairwise(cuts)]
        losses = [model(**vars(batch)).loss.item() for batch in batches]
        published.append(sum(losses) / len(losses))
        ours.append(sum(model(**vars(batch), num_items_in_batch=tokens).loss.item() for batch in batches))
    assert ours == pytest.approx([ours[0]] * 3, rel=1e-5)
    assert published[0] == pytest.approx(ours[0], rel=1e-5)
    assert min(abs(loss / ours[0] - 1) for loss in published[1:]) > 1e-3


@torch.no_grad()
def test_dropout_in_the_frozen_encoder_would_be_noise(build: Build, examples: list[Example]) -> None:
    """`train()` reaches all modules of the published model, and mT5's config has dropout 0.1."""
    model, tokenizer = build()
    assert model.encoder.config.dropout_rate == 0.1
    batch = collate(tokenizer(examples), 0)
    model.train()
    losses = [model(**vars(batch)).loss.item() for _ in range(2)]
    assert losses[0] == losses[1]
    model.encoder.train()
    noisy = [model(**vars(batch)).loss.item() for _ in range(2)]
    assert len({losses[0], *noisy}) == 3


@pytest.mark.parametrize("mt", ENCODERS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_packed_rows_give_the_loss_and_the_gradient_of_padded_ones(
    build: Build, examples: list[Example], mt: str, checkpointed: bool
) -> None:
    model, tokenizer = build(mt=mt)
    if checkpointed:
        recompute_layers(model.llm)
    batch = left_padded(collate(tokenizer(examples), tokenizer.source_pad_id))
    found, read = [], []
    model.llm.model.layers[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[:2]))
    for packed in (False, True):
        assert model.pack_rows() if packed else True
        read.clear()
        model.zero_grad()
        loss = model(**vars(batch)).loss
        loss.backward()
        found.append((loss.item(), [parameter.grad.clone() for parameter in model.mapping.parameters()]))
        # All except each row's last token, from which nothing is predicted.
        real = sum(map(len, tokenizer(examples))) - len(examples)
        assert read[0] == (1, real) if packed else read[0][0] * read[0][1] > real
    (padded_loss, padded), (packed_loss, packed) = found
    assert packed_loss == pytest.approx(padded_loss, rel=1e-6)
    for one, other in zip(padded, packed, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def test_an_llm_that_counts_positions_from_the_rows_start_is_not_packed(
    build: Build, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = build()
    model.llm = AutoModelForCausalLM.from_config(LLMS["gpt2"]).eval()
    forward = model.llm.transformer.forward
    monkeypatch.setattr(
        model.llm.transformer, "forward", lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    )
    rows = collate(tokenizer(examples), tokenizer.source_pad_id)
    before = model(**vars(rows)).loss.item()
    assert not model.pack_rows()
    assert model(**vars(rows)).loss.item() == before


def test_only_the_mapping_learns(build: Build, examples: list[Example]) -> None:
    model, tokenizer = build()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.train()
    assert not model.encoder.training and not model.llm.training and model.mapping.training
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-2)
    for _ in range(3):
        model(**vars(collate(tokenizer(examples), 0))).loss.backward()
        optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if name.startswith("mapping.")}
    assert all(parameter.grad is None for parameter in [*model.encoder.parameters(), *model.llm.parameters()])


@pytest.mark.parametrize("mt", ["mt5", "nllb"])
def test_of_an_encoder_decoder_only_the_encoder_is_in_memory(build: Build, models: dict[str, Path], mt: str) -> None:
    model, _ = build(mt=mt)
    whole = AutoModelForSeq2SeqLM.from_pretrained(models[mt]).get_encoder()
    assert sum(p.numel() for p in model.encoder.parameters()) == sum(p.numel() for p in whole.parameters())


def test_an_encoder_of_an_unknown_family_is_refused(tmp_path: Path) -> None:
    """A pair of models joined by transformers: no auto class has their encoder."""
    bert = AutoConfig.for_model("bert", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    config = AutoConfig.for_model("encoder-decoder", encoder=bert.to_dict(), decoder=bert.to_dict())
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="type 'encoder-decoder' are not supported"):
        load_encoder(str(tmp_path), None, torch.float32, False)


@pytest.mark.parametrize("family", ["t5gemma", "t5gemma2"])
@torch.no_grad()
def test_an_encoder_with_a_config_of_its_own_is_read(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    """An encoder like T5Gemma's, whose width may differ from the decoder's."""
    size = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    size |= {"vocab_size": 64, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = size | {"hidden_size": 16}
    if family == "t5gemma2":
        encoder = {"text_config": encoder, "vision_config": vision | {"image_size": 28, "patch_size": 14}}
    decoder = size | {"hidden_size": 24, "cross_attention_hidden_size": 16}
    if family == "t5gemma2":
        decoder = size | {"hidden_size": 16}
    config = AutoConfig.for_model(family, encoder=encoder, decoder=decoder, vocab_size=64)
    whole = AutoModelForSeq2SeqLM.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    inputs = {"input_ids": torch.arange(3, 8)[None], "attention_mask": torch.ones(1, 5, dtype=torch.int64)}
    loaded = load_encoder(str(tmp_path), None, torch.float32, False)
    assert torch.equal(loaded(**inputs).last_hidden_state, whole.get_encoder()(**inputs).last_hidden_state)
    joined = mapping_config(ModelPair(llm_path=str(models["llama"]), mt_path=str(tmp_path)), 1)
    assert joined.mt_hidden_size == 16


def test_gradient_checkpointing_recomputes_and_changes_nothing(build: Build, examples: list[Example]) -> None:
    gradients, forwards = [], []
    for checkpointed in (False, True):
        model, tokenizer = build()
        if checkpointed:
            recompute_layers(model.llm)
        calls: list[int] = []
        # The first module of a layer, since recomputation ends once it has all tensors for the backward pass.
        model.llm.model.layers[0].input_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(**vars(collate(tokenizer(examples), 0))).loss.backward()
        gradients.append([parameter.grad for parameter in model.mapping.parameters()])
        forwards.append(len(calls))
    assert forwards == [1, 2]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_learned_positions_end(models: dict[str, Path], tmp_path: Path) -> None:
    GPT2Config(n_positions=64).save_pretrained(tmp_path)
    learned, rotary = ModelPair(llm_path=str(tmp_path)), ModelPair(llm_path=str(models["llama"]))
    check_context(learned, 64)
    check_context(rotary, 1_000_000)
    with pytest.raises(InputError, match="the longest row has 65 tokens, and .* has 64 positions: lower --max_seq"):
        check_context(learned, 65)
    # A table of sinusoids has an end, too; rotary positions do not.
    CodeGenConfig(n_positions=64).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has 64 positions"):
        check_context(learned, 65)
    FalconConfig(max_position_embeddings=64).save_pretrained(tmp_path)
    check_context(learned, 65)


def test_an_llm_that_cannot_recompute_says_so(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = build()
    monkeypatch.setattr(frozen_models, "GradientCheckpointingLayer", type(None))
    with pytest.raises(
        InputError, match="--gradient_checkpointing: LlamaForCausalLM has no layers that can be recomputed"
    ):
        recompute_layers(model.llm)


def test_an_llm_without_bos_gets_none(build: Build, examples: list[Example]) -> None:
    model, tokenizer = build(llm="qwen")
    rows = tokenizer(examples[:1])
    with_bos = read(model, rows)
    model.config.llm_bos_token_id = None
    without = read(model, rows)
    assert with_bos.mask.sum() == len(rows[0]) - 1
    torch.testing.assert_close(without.embeds, with_bos.embeds[:, 1:])


@torch.no_grad()
def test_embedding_scale(build: Build, examples: list[Example]) -> None:
    model, tokenizer = build()
    batch = lay_out(tokenizer(examples), 1)
    mean, scale = embedding_scale(model, batch)
    table = model.llm.model.embed_tokens.weight
    torch.testing.assert_close(mean, table.mean(dim=0))
    model.mapping.mlp.linear2.weight *= scale
    model.mapping.mlp.linear2.bias *= scale
    vectors, _ = model.map_sources(batch)
    assert float(vectors.square().mean()) == pytest.approx(float(table.square().mean()), rel=1e-4)


@torch.no_grad()
def test_saved_and_loaded_it_answers_the_same(build: Build, examples: list[Example], tmp_path: Path) -> None:
    model, tokenizer = build()
    batch = collate(tokenizer(examples, with_targets=False), 0)
    inputs = {name: tensor for name, tensor in vars(batch).items() if name != "labels"}
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "pytorch_model.bin")
    }
    for loaded in (MindMergerForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(loaded(**inputs).logits, expected)
    published = MindMergerForCausalLM.from_pretrained(tmp_path / "pytorch_model.bin", config=model.config)
    assert torch.equal(published(**inputs).logits, expected)


@torch.no_grad()
def test_greedy_equals_hugging_faces_generate(build: Build, examples: list[Example]) -> None:
    model, tokenizer = build()
    batch = collate(tokenizer(examples, with_targets=False), 0)
    inputs = {name: tensor for name, tensor in vars(batch).items() if name != "labels"}
    # Tokens that these rows generate, so that rows end at different times.
    eos = model.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=2, pad_token_id=0)[:2, 5].tolist()
    generated = model.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=eos, pad_token_id=0)
    ours = greedy(model.llm, read(model, tokenizer(examples, with_targets=False)), 20, set(eos))
    assert len({len(row) for row in ours}) > 1
    for row, reference in zip(ours, generated.tolist(), strict=True):
        assert row == reference[: len(row)]
        assert set(reference[len(row) :]) <= {0}


@torch.no_grad()
def test_generate_leaves_the_mapping_out_where_it_harms(build: Build, examples: list[Example], tmp_path: Path) -> None:
    """Against the LLM's own `generate` on the prompts; `language=None` never switches."""
    model, tokenizer = build()
    rows = tokenizer(examples, with_targets=False)
    inputs = {name: tensor for name, tensor in vars(collate(rows, 0)).items() if name != "labels"}
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mapped = model.generate(**inputs, **options).tolist()
    prompts = [torch.tensor([[1, *row.prompt]]) for row in rows]
    alone = [model.llm.generate(ids, **options)[0, ids.shape[1] :].tolist() for ids in prompts]
    assert all(one != other for one, other in zip(mapped, alone, strict=True))

    model.save_pretrained(tmp_path)
    write_verdicts(tmp_path / SAFETENSORS, {"German": {"verdict": "harms"}, "Chinese": {"verdict": "cannot be told"}})
    loaded = MindMergerForCausalLM.from_pretrained(tmp_path)
    codes = [LANGUAGES[example.language.name].code for example in examples]
    switched = loaded.generate(**inputs, language=codes, **options).tolist()
    assert switched == [alone[row] if code == "de" else mapped[row] for row, code in enumerate(codes)]
    for language, expected in ((None, mapped), ("Swahili", mapped), ("de", alone)):
        assert loaded.generate(**inputs, language=language, **options).tolist() == expected
    for language, message in (("Klingon", "unknown language"), (["de", "de"], "2 languages for 5 rows")):
        with pytest.raises(InputError, match=message):
            loaded.generate(**inputs, language=language, **options)
    sources = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(InputError, match="the mapping harms in German: give prompt_ids"):
        loaded.generate(**sources, language="de", **options)

    # Saved again they stay; on another mapping, or one named by its .bin, none holds.
    loaded.save_pretrained(tmp_path / "again")
    assert MindMergerForCausalLM.from_pretrained(tmp_path / "again").alone == {"German"}
    config = loaded.config
    assert MindMergerForCausalLM.from_pretrained(tmp_path / "pytorch_model.bin", config=config).alone == frozenset()
    model.mapping.end_boundary += 1
    write_mapping(tmp_path, config.to_dict(), model.mapping.state_dict())
    with pytest.warns(UserWarning, match="no language is switched, since the verdicts in .* are of another mapping"):
        assert MindMergerForCausalLM.from_pretrained(tmp_path).alone == frozenset()


def test_what_from_pretrained_refuses(build: Build, models: dict[str, Path], tmp_path: Path) -> None:
    model, _ = build()
    model.save_pretrained(tmp_path)
    loaded = MindMergerForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    with pytest.raises(TypeError, match="takes no device_map"):
        MindMergerForCausalLM.from_pretrained(tmp_path, device_map="auto")
    with pytest.raises(InputError, match="no mapping could be loaded from nowhere"):
        MindMergerForCausalLM.from_pretrained("nowhere")
    with pytest.raises(InputError, match="dtype must be a torch dtype or its name"):
        MindMergerForCausalLM.from_pretrained(tmp_path, dtype="auto")
    with pytest.raises(InputError, match="not one of a mapping"):
        MindMergerForCausalLM.from_pretrained(models["llama"])


def test_a_subfolder_is_read_whole(build: Build, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "mapping"):
        model, _ = build()
        torch.nn.init.normal_(model.mapping.end_boundary)
        model.save_pretrained(place)
    loaded = MindMergerForCausalLM.from_pretrained(tmp_path, subfolder="mapping")
    assert torch.equal(loaded.mapping.end_boundary, model.mapping.end_boundary)


def test_a_base_model_that_is_not_whole_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["llama"], tmp_path / "llm")
    weights = tmp_path / "llm/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="llm as AutoModelForCausalLM"):
        load_llm(str(tmp_path / "llm"), None, torch.float32, False)
    state = load_file(models["llama"] / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights of LlamaForCausalLM.*model\.norm\.weight"):
        load_llm(str(tmp_path / "llm"), None, torch.float32, False)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bos", [None, 9])
def test_layout(packed: bool, bos: int | None) -> None:
    """Against the sequences written out: m for a mapped state, b for a boundary, p for padding.

    The third row is one of the LLM alone.
    """
    alone = Tokens([8, 8], [5, 6], [9, 2], mapped=False)
    rows = [Tokens([3, 4], [5], [6, 7, 2]), Tokens([8], [], [2]), alone, Tokens([3], [5, 6, 7], [4, 2])]
    head = [] if bos is None else [bos]
    sequences = [[*head, "m", "m", "b", 5, 6, 7], [*head, "m", "b"], [*head, 5, 6, 9], [*head, "m", "b", 5, 6, 7, 4]]
    batch = lay_out(rows, bos, source_pad_id=1, packed=packed)
    longest = max(map(len, sequences))
    lines = [list(itertools.chain(*sequences))] if packed else [["p"] * (longest - len(s)) + s for s in sequences]
    assert batch.token_ids.tolist() == [[token if isinstance(token, int) else 0 for token in line] for line in lines]
    flat = list(itertools.chain(*lines))
    counted = [count for s in sequences for count in range(len(s))]
    assert [p for p, token in zip(batch.position_ids.flatten().tolist(), flat, strict=True) if token != "p"] == counted
    assert [flat[place] for place in batch.mapped_positions.tolist()] == ["m"] * 4 + ["b"] * 3
    assert batch.mapped_positions[:4].tolist() == sorted(batch.mapped_positions[:4].tolist())
    assert batch.source_ids.tolist() == [[3, 4], [8, 1], [3, 1]] and batch.source_index.tolist() == [0, 1, 2, 4]
    assert batch.labels.tolist() == [6, 7, 2, 2, 9, 2, 4, 2]
    assert [len(row) for row in rows] == [len(s) + 1 + (bos is None) for s in sequences]
    assert batch.lengths == [len(s) for s in sequences]
    assert batch.cumulative_lengths.tolist() == [0, *itertools.accumulate(batch.lengths)]
    kept = flat if packed else [token for line in lines for token in line[-batch.columns :]]
    assert [kept[place] for place in batch.logit_positions.tolist()] == [5, 6, 7, "b", 6, 9, 7, 4]
    if packed:
        assert batch.mask is None
    else:
        assert batch.mask.tolist() == [[int(token != "p") for token in line] for line in lines]


def test_a_layout_without_a_mapping_is_the_prompt_alone() -> None:
    batch = lay_out([Tokens([], [5, 6], [], mapped=False), Tokens([], [7], [], mapped=False)], 9)
    assert batch.token_ids.tolist() == [[9, 5, 6], [0, 9, 7]] and not len(batch.mapped_positions)


def test_a_batch_moves_all_its_tensors(build: Build, examples: list[Example]) -> None:
    _, tokenizer = build()
    moved = lay_out(tokenizer(examples), 1).to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if not isinstance(value, int | list)]
    assert len(tensors) == 10 and all(tensor.is_meta for tensor in tensors)
