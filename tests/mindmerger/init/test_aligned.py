"""The aligned start on models and tokenizers: matched tokens, inputs, and stored files."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, ByT5Tokenizer, GPT2Config, OPTConfig

from common.cli import parse_flags
from common.errors import InputError
from common.models import base_config, load_tokenizer
from common.ranks import Process
from mindmerger.batching import pad
from mindmerger.config import EvaluationFlags, Limits, ModelPair
from mindmerger.data import Example
from mindmerger.evaluation.run import evaluate
from mindmerger.frozen_models import load_encoder, load_llm
from mindmerger.init.aligned import AlignedStart, choose_texts, layer_scores, read_states
from mindmerger.init.ridge import AffineMap
from mindmerger.modeling import mapping_config
from mindmerger.tasks import LANGUAGES, Prompt
from mindmerger.tokenization import ids_with_spans, load_example_tokenizer
from quickstart.world import problems
from tests.conftest import REPOSITORY
from tests.mindmerger.datas import ROWS, write_datas
from tests.mindmerger.scripts import run_ranks, train_here

CPU = Process(0, 1, torch.device("cpu"))
TEXTS = ["Anna has 12 apples.", " two  spaces, é and 苹果 ", "</s> is text"]
PROMPT = Prompt("", "", "")


def test_spans_of_byte_level_and_sentencepiece_tokens(models: dict[str, Path]) -> None:
    """For any treatment of spaces, the spans of a tokenizer cover all other characters of a text, in order."""
    for folder in (models["llama"], models["nllb"], REPOSITORY / "quickstart/models/mt"):
        tokenizer = load_tokenizer(str(folder))
        for text, (ids, spans) in zip(TEXTS, ids_with_spans(tokenizer, TEXTS), strict=True):
            assert ids == tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
            assert len(ids) == len(spans)
            pieces = [text[start:end] for start, end in spans]
            assert all(piece == piece.strip() for piece in pieces)
            covered = {place for start, end in spans for place in range(start, end)}
            assert {place for place, character in enumerate(text) if not character.isspace()} <= covered


def test_special_tokens_stand_nowhere(build: Callable) -> None:
    for mt in ("mt5", "nllb", "xlm_roberta"):
        _, tokenizer = build(mt=mt)
        example = Example(replace(PROMPT, query=TEXTS[0]), replace(PROMPT, query=TEXTS[0]), "7", LANGUAGES["English"])
        ((ids, spans),) = tokenizer.sources_with_spans([TEXTS[0]], LANGUAGES["English"])
        # The fit and the training have the same inputs.
        assert ids == tokenizer([example])[0].source
        words = tokenizer.mt_tokenizer(TEXTS[0], add_special_tokens=False).input_ids
        assert [span == (0, 0) for span in spans] == [token not in words for token in ids]


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(InputError, match="not a fast one.*another --mapping_init"):
        ids_with_spans(ByT5Tokenizer(), TEXTS)


@pytest.fixture(scope="module")
def decoders(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models differ in their last modules: GPT-2 reshapes the output of its norm, OPT's norm is nested deeper."""
    folder = tmp_path_factory.mktemp("decoders")
    torch.manual_seed(0)
    small = {"vocab_size": 600, "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4}
    for name, config in (
        ("gpt2", GPT2Config(**small, initializer_range=0.3)),
        ("opt", OPTConfig(**small, ffn_dim=64, word_embed_proj_dim=32, init_std=0.3)),
    ):
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return {"qwen": models["qwen"], "gpt2": folder / "gpt2", "opt": folder / "opt"}


@pytest.mark.parametrize("name", ["qwen", "gpt2", "opt"])
def test_every_layer_is_what_a_model_of_so_few_layers_ends_in(name: str, decoders: dict[str, Path]) -> None:
    path = str(decoders[name])
    sources = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    options = {"source_pad_id": 0, "batch_size": 2, "process": CPU}
    whole = load_encoder(path, None, torch.float32, False)
    states = read_states(whole, sources, all_layers=True, **options)
    layers = base_config(path).num_hidden_layers
    assert len(states) == layers > 1
    for layer in range(1, layers + 1):
        cut = load_encoder(path, None, torch.float32, False, layer)
        assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in whole.parameters()) or layer == layers
        (last,) = read_states(cut, sources, all_layers=False, **options)
        for ours, alone, source in zip(states[layer - 1], last, sources, strict=True):
            assert ours.shape[0] == len(source)
            torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)
            with torch.no_grad():
                ids, mask = pad([source], 0)
                reference = cut(input_ids=ids, attention_mask=mask).last_hidden_state[0]
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


def test_layers_that_an_encoder_lacks_are_refused(models: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"--encoder_layer 9 must be from 1 to \d"):
        load_encoder(str(models["qwen"]), None, torch.float32, False, 9)
    with pytest.raises(InputError, match="--encoder_layer is for decoder-only models"):
        load_encoder(str(models["mt5"]), None, torch.float32, False, 1)


def rows(count: int, language: str = "German") -> list[Example]:
    return [
        Example(replace(PROMPT, query=f"{language} {number}"), PROMPT, f"English {number % 20}", LANGUAGES[language])
        for number in range(count)
    ]


def test_the_layer_is_chosen_by_languages_of_more_than_one_pair() -> None:
    """The second layer's map is right; a language with one sentence has no correlation and changes nothing."""
    torch.manual_seed(0)
    foreign = [torch.randn(4, 3) for _ in range(7)]
    meant = torch.stack([states.mean(dim=0) for states in foreign]) @ torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    zero, one = torch.zeros(3).double(), torch.ones(3).double()
    maps = [AffineMap(zero, one, torch.diag(torch.tensor(w)).double(), one) for w in ([-1.0, 1, 1], [1.0, 2, 3])]
    scores = layer_scores(maps, [foreign, foreign], meant, ["de", "de", "de", "sw", "sw", "sw", "ru"])
    assert scores[1] == pytest.approx(1, abs=1e-6) and scores[0] < 0.99


def test_english_text_is_every_target_once() -> None:
    texts = choose_texts(rows(50), True, 15, False, "mt")
    assert texts.english == [f"English {number}" for number in range(15)] and not texts.pairs
    assert choose_texts(rows(50), True, 300, True, "mt").pairs == rows(50)
    one_each = [replace(rows(1, name)[0], target=f"English, {name}") for name in list(LANGUAGES)[:12]]
    with pytest.raises(InputError, match="12 training rows, each of another language"):
        choose_texts(one_each, True, 300, True, "mt")


def test_english_queries_in_the_augmentation_stage() -> None:
    mixed = rows(30) + rows(12, "English")
    texts = choose_texts(mixed, False, 300, False, "mt")
    assert texts.english == [f"English {number}" for number in range(12)]
    with pytest.raises(InputError, match="have 0 such sentences"):
        choose_texts(rows(30), False, 300, False, "mt")
    with pytest.raises(InputError, match="--encoder_layer is needed"):
        choose_texts(mixed, False, 300, True, "mt")


def test_mapped_english_is_near_the_llms_words(tmp_path: Path) -> None:
    """On the quickstart's models, whose encoder has read English; and not where each text has another's words."""
    models = REPOSITORY / "quickstart/models"
    pair = ModelPair(str(models / "llm"), str(models / "mt"))
    english = [problem.question("en") for problem in islice(problems("train", 0), 80)]
    tokenizer = load_example_tokenizer(pair, Limits(512, 512, 512), augmentation=False)
    told = [Example(replace(PROMPT, query="?"), PROMPT, text, LANGUAGES["German"]) for text in english]
    errors = []
    for name in ("itself", "another"):
        config = mapping_config(pair, tokenizer.llm_tokenizer.bos_token_id)
        start = AlignedStart(pair, config, tokenizer, torch.float32, mean_boundary=True, batch_size=8)
        texts = choose_texts(told, True, 300, False, "mt")
        state, layer = start.load_or_fit(lambda _, texts=texts: texts, tmp_path / name, CPU)
        assert layer is None and torch.isfinite(state["mlp.linear1.weight"]).all()
        errors.append(json.loads((tmp_path / name / "aligned_start.json").read_text())["relative_error"])
        spans = tokenizer.sources_with_spans
        tokenizer.sources_with_spans = lambda texts, language, spans=spans: spans(texts[::-1], language)
    assert errors[0] < 0.75 < errors[1]


def test_a_stage_from_an_aligned_start(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder-only encoder: its layer is chosen, stored with the mapping, and used by all later runs."""
    write_datas(tmp_path / "datas")
    pair = ("--llm_path", models["llama"], "--mt_path", models["qwen"], "--max_seq_len", 64)
    words = (
        *("--deepspeed", *pair, "--stage_name", "mapping", "--languages", "de,sw", "--mapping_init", "aligned"),
        *("--train_num", ROWS, "--dev_size", 4, "--train_batch_size", 10, "--epoch_num", 1, "--lr", "1e-12"),
    )
    printed = run_ranks(2, tmp_path, "run_training.py", *words)
    start, mapping = tmp_path / "outputs/MergeMinds/aligned_start", tmp_path / "outputs/MergeMinds/mapping"
    record = json.loads((start / "aligned_start.json").read_text())
    assert f"layer {record['encoder_layer']} of the encoder, relative error {record['relative_error']:.3f}" in printed
    scores = record["correlation_by_layer"]
    assert len(scores) == 2 and record["encoder_layer"] == scores.index(max(scores)) + 1
    assert json.loads((mapping / "config.json").read_text())["encoder_layer"] == record["encoder_layer"]
    # With such a small learning rate, the trained mapping equals the start.
    first, trained = load_file(start / "model.safetensors"), load_file(mapping / "model.safetensors")
    for name, tensor in first.items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-5, atol=1e-6)
    embeddings = load_llm(str(models["llama"]), None, torch.float32, False).get_input_embeddings().weight
    torch.testing.assert_close(first["end_boundary"].flatten(), embeddings.mean(dim=0), rtol=1e-5, atol=1e-6)

    # A second run with other steps reads the stored start; other texts give another one.
    made = (start / "model.safetensors").stat().st_mtime_ns
    train_here(tmp_path, *words, "--overwrite", "--lr", "1e-11")
    assert (start / "model.safetensors").stat().st_mtime_ns == made
    train_here(tmp_path, *words, "--overwrite", "--aligned_sentences", 11)
    assert (start / "model.safetensors").stat().st_mtime_ns > made

    train_here(tmp_path, "--deepspeed", *pair, "--stage_name", "augmentation", "--languages", "de", "--dev_size", 4)
    config = json.loads((tmp_path / "outputs/MergeMinds/augmentation/config.json").read_text())
    layer = json.loads((start / "aligned_start.json").read_text())["encoder_layer"]
    assert config["encoder_layer"] == layer
    asked = ("--init_checkpoint", "outputs/MergeMinds/augmentation", "--languages", "de", "--max_gen_len", 4)
    monkeypatch.chdir(tmp_path)
    evaluate(parse_flags(EvaluationFlags, list(map(str, asked))))
    settings = json.loads((tmp_path / "results/MergeMinds/mgsm/run.json").read_text())["settings"]
    assert settings["encoder_layer"] == layer
    with pytest.raises(InputError, match=f"was trained on {layer} layer"):
        evaluate(parse_flags(EvaluationFlags, list(map(str, (*asked, "--encoder_layer", 3 - layer)))))
