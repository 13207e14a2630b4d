"""Checkpoints as programs write them: tied heads, buffers, other vocabularies, companion files, and refused ones."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    T5Config,
    ViTConfig,
    WhisperConfig,
)

from common.errors import InputError
from common.io import read_json
from common.models import load_model
from regmean.model_folder import open_checkpoint
from regmean.names import compact
from regmean.report import Provenance, model_card
from tests.regmean.conftest import make_gpt2
from tests.regmean.folders import TEXT, assert_merged, build, grams, run, save, unread

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
SPECIALISTS = Path(__file__).parents[2] / "quickstart" / "models" / "regmean"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file(values, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    """Edit a config; None as a value removes the key."""
    config = {key: value for key, value in (read_json(folder / "config.json") | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def siblings(tmp_path: Path) -> Callable[..., list[Path]]:
    """Two folders of tiny models."""

    def make(kind: str = "llama", tied: bool | None = None) -> list[Path]:
        folders = [save(build(kind, seed), tmp_path / name) for seed, name in ((1, "A"), (2, "B"))]
        if tied is not None:
            for folder in folders:
                edit_config(folder, tie_word_embeddings=tied)
        return folders

    return make


def noisy_head(values: dict[str, torch.Tensor]) -> None:
    values[HEAD] = values[TABLE] + 0.3 * torch.randn_like(values[TABLE])


def copied_head(values: dict[str, torch.Tensor]) -> None:
    values[HEAD] = values[TABLE].clone()


def no_head(values: dict[str, torch.Tensor]) -> None:
    values.pop(HEAD, None)


def test_a_head_of_its_own_under_a_tied_config_is_solved(
    siblings: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folders = siblings(tied=True)
    for folder in folders:
        edit(folder, noisy_head)
        grams(folder)
    out = run(folders, tmp_path / "out")
    assert "has an output head of its own: tie_word_embeddings becomes false" in capsys.readouterr().out
    assert_merged(out, folders)
    assert read_json(out / "config.json")["tie_word_embeddings"] is False
    a, b, mean = (tensors(folder)[HEAD] for folder in (*folders, run(folders, tmp_path / "avg", "avg")))
    assert torch.equal(mean, (a + b) / 2)
    assert not torch.allclose(tensors(out)[HEAD], mean)
    edit(folders[1], no_head)
    with pytest.raises(
        InputError, match=rf"{folders[0]} has an output head of its own \(lm_head\.weight\), and"
    ) as error:
        run(folders, tmp_path / "mixed", "avg")
    # Without the head the table of one model would be merged beside the head of the other.
    assert "--exclude" not in str(error.value)


def test_a_head_of_its_own_of_bert_keeps_its_bias(tmp_path: Path) -> None:
    """With the tie the config would lose the name under which BERT's files hold the head's bias."""
    head = "cls.predictions.decoder.weight"
    folders = []
    for seed, name in enumerate("AB"):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=600, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
        )
        model = BertForMaskedLM(config)
        torch.nn.init.normal_(model.cls.predictions.bias)
        folders.append(save(model, tmp_path / name))
        edit(folders[-1], lambda values: values.update({head: torch.randn(600, 16)}))
    out = run(folders, tmp_path / "out", "avg")
    a, b, merged = (BertForMaskedLM.from_pretrained(folder).state_dict() for folder in (*folders, out))
    for name in (head, "cls.predictions.decoder.bias"):
        assert a[name].norm() > 0
        torch.testing.assert_close(merged[name], (a[name] + b[name]) / 2)


@pytest.mark.parametrize("key", [True, None])
@pytest.mark.parametrize(("a", "b"), [(copied_head, no_head), (no_head, copied_head), (copied_head, copied_head)])
def test_a_stored_copy_of_a_tied_head_is_no_weight(
    siblings: Callable, tmp_path: Path, key: bool | None, a: Callable, b: Callable
) -> None:
    """The class of Gemma 2 ties the head if the config has no such key."""
    folders = siblings("gemma2")
    for folder, change in zip(folders, (a, b), strict=True):
        edit(folder, change)
        edit_config(folder, tie_word_embeddings=key)
    out = run(folders, tmp_path / "out", "avg")
    assert HEAD not in tensors(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    mean = sum(tensors(folder)[TABLE] for folder in folders) / 2
    assert torch.equal(model.lm_head.weight, mean)


def test_buffers_may_be_infinite(siblings: Callable, tmp_path: Path) -> None:
    folders, name = siblings("neox"), "gpt_neox.layers.0.attention.masked_bias"
    for folder in folders:
        edit(folder, lambda t: t.update({name: torch.tensor(-1e9).half()}))
        grams(folder)
    for method in ("avg", "regmean"):
        assert tensors(run(folders, tmp_path / method, method))[name] == -torch.inf
    # As saved in another dtype, and as not saved at all.
    edit(folders[1], lambda t: t.update({name: torch.tensor(-1e9)}))
    with pytest.raises(InputError, match=r"A.*masked_bias holds NaN or infinite values; --exclude takes the first"):
        run(folders, tmp_path / "refused", "avg")
    assert tensors(run(folders, tmp_path / "excluded", "avg", exclude=["masked_bias"]))[name] == -torch.inf
    edit(folders[1], lambda t: t.pop(name))
    assert tensors(run(folders, tmp_path / "lacking", "avg"))[name] == -torch.inf
    edit(folders[1], lambda t: t.update({name: torch.tensor(torch.nan).half()}))
    edit(folders[0], lambda t: t.update({name: torch.tensor(torch.nan).half()}))
    with pytest.raises(InputError, match="masked_bias holds NaN"):
        run(folders, tmp_path / "nan", "avg")
    out = run(folders, tmp_path / "excluded_nan", "avg", exclude=["masked_bias"], dtype="bfloat16")
    assert tensors(out)[name].isnan()


def test_a_fingerprint_is_that_of_the_first_values_in_bfloat16(siblings: Callable) -> None:
    """Also of masks with the lowest number of float32, which bfloat16 rounds to infinity."""
    (folder, _), name = siblings("neox"), "gpt_neox.layers.0.attention.masked_bias"
    edit(folder, lambda t: t.update({name: torch.tensor([torch.finfo(torch.float32).min, 3.39e38, torch.inf])}))
    digest = hashlib.sha256()
    for key, value in sorted(tensors(folder).items()):
        digest.update(f"{key} {tuple(value.shape)} ".encode())
        digest.update(value.flatten()[:256].bfloat16().view(torch.int16).numpy().tobytes())
    assert open_checkpoint(str(folder)).fingerprint() == digest.hexdigest()
    edit(folder, lambda t: t.update({key: value.bfloat16() for key, value in t.items()}))
    assert open_checkpoint(str(folder)).fingerprint() == digest.hexdigest()


def test_the_backbone_alone_of_two_vocabularies(
    siblings: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    a, b = siblings()
    model = AutoModelForCausalLM.from_pretrained(b)
    model.resize_token_embeddings(33)
    save(model, b)
    tokenizer = AutoTokenizer.from_pretrained(b)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(b)
    for folder in (a, b):
        grams(folder)
    with pytest.raises(InputError, match="vocab_size is 32 in .*A and 33 in .*B"):
        run([a, b], tmp_path / "refused")
    out = run([a, b], tmp_path / "out", exclude=["embed_tokens", "lm_head"])
    assert "note: vocab_size is 32 in" in capsys.readouterr().out
    assert all(torch.equal(tensors(out)[name], tensors(a)[name]) for name in (HEAD, TABLE))
    assert read_json(out / "config.json")["vocab_size"] == 32
    assert not torch.equal(tensors(out)[QUERY], (tensors(a)[QUERY] + tensors(b)[QUERY]) / 2)


def test_tokens_in_spare_rows_of_one_model_are_noted(
    siblings: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    a, b = siblings()
    tokenizer = AutoTokenizer.from_pretrained(a)
    tokenizer.add_tokens(["<x>", "<y>"])
    tokenizer.save_pretrained(a)
    run([a, b], tmp_path / "out", "avg")
    assert f"only the tokenizer of {a} has 27: '<x>', 28: '<y>'; in {b} these rows are spare" in capsys.readouterr().out


def test_companion_files_are_copied_and_adapters_are_not(siblings: Callable, tmp_path: Path) -> None:
    a, b = siblings()
    for name in ("words.tiktoken", "bpe.codes", "additional_chat_templates/tool.jinja", "1_Pooling/config.json",
                 "adapter_config.json", "adapter_model.safetensors", "images/plot.json"):  # fmt: skip
        (a / name).parent.mkdir(exist_ok=True)
        (a / name).write_text("{}")
    out = run([a, b], tmp_path / "out", "avg")
    for name in ("words.tiktoken", "bpe.codes", "additional_chat_templates/tool.jinja", "1_Pooling/config.json"):
        assert (out / name).read_text() == "{}"
    assert not list(out.glob("adapter*")) and not (out / "images").exists()
    (a / "additional_chat_templates/tool.jinja").unlink()
    (a / "additional_chat_templates/tool.jinja").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match=r"tool\.jinja is a link to .*outside its folder"):
        run([a, b], tmp_path / "linked", "avg")


def test_an_adapter_beside_the_weights_is_not_read(siblings: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = siblings()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "no/such"}')
    for module in ("models.auto.auto_factory", "integrations.peft"):
        monkeypatch.setattr(f"transformers.{module}.is_peft_available", lambda: True)
    loaded: list[dict] = []

    def load(*args: Any, **options: Any) -> Any:
        loaded.append(options)
        return load_model(*args, **options)

    monkeypatch.setattr("regmean.architectures.load_model", load)
    assert grams(folder).exists() and len(loaded) == 1


def test_a_card_names_models_of_the_hub_alone() -> None:
    def card(*names: str) -> str:
        models = [{"model": name, "weight": 0.5, "fingerprint": ""} for name in names]
        return model_card(Provenance("avg", None, None, "the command", models, [], {}))

    assert "base_model:\n- owner/model\n" in card("owner/model", "/folder/model")
    assert "base_model" not in card("./model", "regmean/../tests")


def test_lstsq_on_nearly_singular_grams_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual is small, and the weights are far from those of both models."""
    folders = [Path(shutil.copytree(SPECIALISTS / name, tmp_path / name)) for name in ("problems", "programs")]
    grams(folders[0], ["3 + 4 = 7", "what is 12 - 5"])
    grams(folders[1], ["def f(x): return x", "print(1)"])
    with pytest.raises(InputError, match="lstsq gels leads away from the mean by .* times the models' difference"):
        run(folders, tmp_path / "out", solver="lstsq", alpha=[1.0])
    assert distance(run(folders, tmp_path / "cholesky", alpha=[1.0]), folders) < 10
    # Nothing else refuses it.
    monkeypatch.setattr("regmean.solve.FARTHEST", float("inf"))
    assert distance(run(folders, tmp_path / "far", solver="lstsq", alpha=[1.0], dtype="float32"), folders) > 100


def distance(out: Path, folders: list[Path]) -> float:
    """Largest distance of a merged matrix from the mean, in differences of the models."""
    merged, *of_models = (tensors(folder) for folder in (out, *folders))
    pairs = {name: [theirs[name].double() for theirs in of_models] for name in merged if merged[name].ndim > 1}
    return max(((merged[name] - (a + b) / 2).norm() / (a - b).norm()).item() for name, (a, b) in pairs.items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(), "a t5 model has an encoder and a decoder"),
        (WhisperConfig(), "a whisper model has an encoder and a decoder"),
        (CLIPConfig(), "a clip model is no causal language model and no text encoder"),
        (ViTConfig(), "a vit model is no causal language model and no text encoder"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_models_that_have_no_grams_of_texts_are_refused(config: Any, message: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path / "model")
    save_file({"weight": torch.zeros(1)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(InputError, match=message):
        grams(tmp_path / "model")


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"weight": torch.zeros(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"adapter .*lora, base .*lora: model .* is an adapter .* no whole model"):
        grams(folder)
    with pytest.raises(InputError, match="is an adapter"):
        run([folder, folder], tmp_path / "out", "avg")


def test_texts_that_a_model_has_no_rows_for_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(make_gpt2(), tmp_path / "gpt2")
    texts = ["w1 w2", " ".join(["w3"] * 70), "w4"]
    assert grams(folder, texts, max_length=64).exists()
    monkeypatch.setattr("regmean.compute.load_updated", unread)
    with pytest.raises(InputError, match=r"row 1 of the data set .* has 71 tokens, .* for 64: --max_length 64 cuts it"):
        grams(folder, texts, overwrite=True)
    config = AutoConfig.from_pretrained(folder, vocab_size=20)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with pytest.raises(InputError, match=r"row 0 of .* has the token 26, and the embedding table .* has 20 rows"):
        grams(folder, ["w19"], overwrite=True)


def test_names_that_differ_in_numbers_are_listed_as_one() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up.weight" for layer in range(3) for expert in range(4)]
    assert compact([*names, "norm"]) == ["model.layers.*.mlp.experts.*.up.weight (12)", "norm"]


@pytest.mark.parametrize(
    ("config", "model", "settings", "positions"),
    [
        ("BertConfig", "BertForMaskedLM", {}, 16),
        ("RobertaConfig", "RobertaForMaskedLM", {"pad_token_id": 3}, 12),
        ("GPTJConfig", "GPTJForCausalLM", {"rotary_dim": 4}, 16),
        ("GPT2Config", "GPT2LMHeadModel", {}, 16),
        ("MptConfig", "MptForCausalLM", {"max_seq_len": 16}, 16),
        ("LlamaConfig", "LlamaForCausalLM", {}, None),
    ],
)
def test_a_text_of_more_tokens_than_positions_is_named(
    config: str, model: str, settings: dict, positions: int | None, tmp_path: Path
) -> None:
    """Llama's positions are rotary, and MPT's are computed: the error of its first pass is translated."""
    options = {key: value for key, value in TEXT.items() if key != "head_dim"} | {"max_position_embeddings": 16}
    built = getattr(transformers, model)(getattr(transformers, config)(**options | settings))
    folder, texts = save(built, tmp_path / "model"), ["w1", " ".join(["w2"] * 22)]
    if positions is None:
        assert grams(folder, texts).exists()
        return
    message = rf"row 1 of the data set .* has 23 tokens, .* {positions}: --max_length {positions} cuts it"
    with pytest.raises(InputError, match=message):
        grams(folder, texts)
    assert folder.with_suffix(".gram").exists() == (model == "MptForCausalLM")
    assert grams(folder, texts, max_length=positions, overwrite=True).exists()


@pytest.mark.parametrize(
    ("config", "model", "is_named", "auto"),
    [
        ("DistilBertConfig", "DistilBertForMultipleChoice", True, AutoModel),
        ("BertConfig", "BertForNextSentencePrediction", True, AutoModel),
        ("BertConfig", "BertModel", False, AutoModel),
        ("BertConfig", "BertForMaskedLM", False, AutoModelForMaskedLM),
    ],
)
def test_encoders_with_heads_of_any_class_are_solved(
    config: str, model: str, is_named: bool, auto: Any, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in "AB"]
    for folder in folders:
        save(getattr(transformers, model)(getattr(transformers, config)(**TEXT, hidden_dim=24)), folder)
        if not is_named:
            edit_config(folder, architectures=None)
        grams(folder)
    assert_merged(run(folders, tmp_path / "out"), folders, auto)


def test_a_tie_in_the_text_config_alone_is_read_and_removed(siblings: Callable, tmp_path: Path) -> None:
    folders = siblings()
    for folder in folders:
        edit_config(folder, tie_word_embeddings=None, text_config={"tie_word_embeddings": True})
        edit(folder, copied_head)
    assert HEAD not in tensors(run(folders, tmp_path / "tied", "avg"))
    for folder in folders:
        edit(folder, noisy_head)
    config = read_json(run(folders, tmp_path / "own", "avg") / "config.json")
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
