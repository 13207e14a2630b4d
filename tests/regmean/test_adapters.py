"""Adapter folders as models, compared with weights merged in float64; none of it needs peft."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import InputError
from common.io import read_json
from common.ranks import start_process
from regmean.adapter_folder import config_name, open_models
from regmean.architectures import config_of
from regmean.config import SEQUENTIAL, MergeFlags
from regmean.gram_file import GramFile
from regmean.layerwise.merge import merge_layer_by_layer
from regmean.layerwise.model import build_without_weights, open_layerwise
from regmean.tensor_file import decode
from tests.regmean.conftest import make_gpt2, make_llama, make_tokenizer
from tests.regmean.folders import TEXTS, grams, run, save
from tools.estimate_regmean import plan_merging

HEAD, TABLE = "lm_head", "model.embed_tokens"
QUERY, OUT, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"))
CONV1D, SQUARE = "transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_proj"
RANK = 3


def rounded(*shape: int, scale: float = 0.3) -> torch.Tensor:
    """Random values that bfloat16 holds."""
    return (scale * torch.randn(*shape)).bfloat16().float()


@dataclass
class Adapter:
    """An adapter that is being written, and the float64 weights of its base merged with it."""

    weights: dict[str, torch.Tensor]
    settings: dict[str, Any]
    file: dict[str, torch.Tensor]

    def scale(self, rank: int, alpha: float | None = None) -> float:
        alpha = self.settings["lora_alpha"] if alpha is None else alpha
        return alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)

    def lora(self, module: str, conv1d: bool = False, rank: int = RANK, alpha: float | None = None) -> None:
        weight = self.weights[f"{module}.weight"]
        weight = weight.T if conv1d else weight
        a, b = rounded(rank, weight.shape[1]), rounded(weight.shape[0], rank)
        self.file |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        merged = self.dora(module, weight + self.scale(rank, alpha) * b.double() @ a.double())
        self.weights[f"{module}.weight"] = merged.T.contiguous() if conv1d else merged

    def dora(self, module: str, outputs_first: torch.Tensor) -> torch.Tensor:
        """Weights (outputs, inputs), scaled by a random magnitude if the settings say so."""
        if not self.settings.get("use_dora"):
            return outputs_first
        magnitude = rounded(len(outputs_first)).abs() + 0.5
        self.file[f"{module}.lora_magnitude_vector"] = magnitude
        return outputs_first * (magnitude.double() / outputs_first.square().sum(1).sqrt())[:, None]

    def table(self, module: str) -> None:
        weight = self.weights[f"{module}.weight"]
        a, b = rounded(RANK, weight.shape[0]), rounded(weight.shape[1], RANK)
        self.file |= {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}
        merged = self.dora(module, (weight + self.scale(RANK) * (b.double() @ a.double()).T).T)
        self.weights[f"{module}.weight"] = merged.T.contiguous()

    def tokens(self, module: str, ids: list[int]) -> None:
        rows = rounded(len(ids), self.weights[f"{module}.weight"].shape[1])
        self.file[f"{module}.token_adapter.trainable_tokens_delta"] = rows
        self.weights[f"{module}.weight"][torch.tensor(ids)] = rows.double()

    def whole(self, name: str, stored: str | None = None) -> None:
        self.weights[name] = rounded(*self.weights[name].shape).double()
        self.file[stored or name] = self.weights[name].float()


def make_adapter(
    base: Path, folder: Path, change: Callable[[Adapter], None], seed: int = 0, **settings: Any
) -> Adapter:
    """Write an adapter of `base`; its float64 weights are those of the model that transformers loads."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    weights = {name: value.detach().double().clone() for name, value in model.state_dict().items()}
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base), "revision": None, "r": RANK, "lora_alpha": 5,
                "lora_dropout": 0.1, "target_modules": ["q_proj"]} | settings  # fmt: skip
    adapter = Adapter(weights, settings, {})
    change(adapter)
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    prefixed = {f"base_model.model.{name}": value.contiguous() for name, value in adapter.file.items()}
    save_file(prefixed, folder / "adapter_model.safetensors", {"format": "pt"})
    return adapter


def usual(adapter: Adapter) -> None:
    for module in (QUERY, OUT, DOWN):
        adapter.lora(module)


def patterns(adapter: Adapter) -> None:
    adapter.lora(QUERY, rank=2)
    adapter.lora(DOWN, alpha=2)
    adapter.lora("model.layers.1.mlp.down_proj")


def square(adapter: Adapter) -> None:
    """Nothing but the base's other weights shows that the square one is transposed."""
    adapter.lora(SQUARE, conv1d=True)


def conv1d(adapter: Adapter) -> None:
    square(adapter)
    adapter.lora(CONV1D, conv1d=True)


def more(adapter: Adapter) -> None:
    """An embedding table with its base in the file, a whole head and a whole norm."""
    adapter.file[f"{TABLE}.base_layer.weight"] = adapter.weights[f"{TABLE}.weight"].float()
    adapter.table(TABLE)
    adapter.whole(f"{HEAD}.weight")
    adapter.whole("model.norm.weight")
    adapter.lora(QUERY)


def biases(adapter: Adapter) -> None:
    """LoRA's own bias on one layer, a trained bias of another."""
    adapter.lora(QUERY)
    bias = rounded(16)
    adapter.file[f"{QUERY}.lora_B.bias"] = bias
    adapter.weights[f"{QUERY}.bias"] += adapter.scale(RANK) * bias.double()
    adapter.whole(f"{OUT}.bias", f"{OUT}.base_layer.bias")


def tokens(adapter: Adapter) -> None:
    adapter.tokens(TABLE, [30, 2, 7])


def both_apart(adapter: Adapter) -> None:
    adapter.table(TABLE)
    adapter.lora(HEAD)


def both_alike(adapter: Adapter) -> None:
    """As with `ensure_weight_tying`: the head's factors are the table's."""
    adapter.table(TABLE)
    adapter.file[f"{HEAD}.lora_A.weight"] = adapter.file[f"{TABLE}.lora_embedding_B"].T
    adapter.file[f"{HEAD}.lora_B.weight"] = adapter.file[f"{TABLE}.lora_embedding_A"].T
    adapter.weights[f"{HEAD}.weight"] = adapter.weights[f"{TABLE}.weight"]


def tokens_of_both(adapter: Adapter) -> None:
    """Only the table's rows are in the file."""
    adapter.tokens(TABLE, [30, 2, 7])
    adapter.weights[f"{HEAD}.weight"] = adapter.weights[f"{TABLE}.weight"]


def wrapped(adapter: Adapter) -> None:
    """Tables by the names that they have after the vocabulary was resized."""
    adapter.file[f"{TABLE}.token_adapter.base_layer.weight"] = adapter.weights[f"{TABLE}.weight"].float()
    adapter.tokens(TABLE, [30, 2, 7])
    adapter.whole(f"{HEAD}.weight", f"{HEAD}.modules_to_save.weight")
    adapter.file[f"{HEAD}.original_module.weight"] = rounded(32, 16)


def same_rows_of_the_head(adapter: Adapter) -> None:
    tokens_of_both(adapter)
    end = "token_adapter.trainable_tokens_delta"
    adapter.file[f"{HEAD}.{end}"] = adapter.file[f"{TABLE}.{end}"].clone()


def other_rows_of_the_head(adapter: Adapter) -> None:
    adapter.tokens(TABLE, [30, 2])
    adapter.tokens(HEAD, [4])


CASES: dict[str, tuple[str, Callable[[Adapter], None], dict[str, Any]]] = {
    "lora": ("llama", usual, {}),
    "rslora": ("llama", usual, {"use_rslora": True}),
    "patterns": (
        "llama",
        patterns,
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.0\.mlp\.down_proj": 2}},
    ),
    "dora": ("llama", usual, {"use_dora": True}),
    "conv1d": ("gpt2", square, {"init_lora_weights": "mica"}),
    "conv1d dora": ("gpt2", conv1d, {"use_dora": True, "fan_in_fan_out": True}),
    "tables": ("llama", more, {}),
    "dora of a table": ("llama", lambda adapter: adapter.table(TABLE), {"use_dora": True}),
    "biases": ("biased", biases, {"lora_bias": True}),
    "tokens": ("llama", tokens, {"trainable_token_indices": [30, 2, 7]}),
    "tokens alone": ("llama", tokens, {"peft_type": "TRAINABLE_TOKENS", "token_indices": [30, 2, 7]}),
    "wrapped": ("llama", wrapped, {"trainable_token_indices": [30, 2, 7]}),
    "tied, table": ("tied", lambda adapter: adapter.table(TABLE), {}),
    "tied, head": ("tied", lambda adapter: adapter.lora(HEAD), {}),
    "tied, both": ("tied", both_apart, {}),
    "tied, alike": ("tied", both_alike, {"ensure_weight_tying": True}),
    "tied, whole table": ("tied", lambda adapter: adapter.whole(f"{TABLE}.weight"), {}),
    "tied, tokens": ("tied", tokens_of_both, {"trainable_token_indices": {"embed_tokens": [30, 2, 7]}}),
    "tied, same tokens": (
        "tied",
        same_rows_of_the_head,
        {"trainable_token_indices": {"embed_tokens": [30, 2, 7]}},
    ),
    "tied, other tokens": (
        "tied",
        other_rows_of_the_head,
        {"trainable_token_indices": {"embed_tokens": [30, 2], "lm_head": [4]}},
    ),
}
UNTIED = {"tied, table", "tied, head", "tied, both", "tied, whole table", "tied, other tokens"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    models = {
        "llama": make_llama(),
        "bfloat16": make_llama().bfloat16(),
        "tied": make_llama(tied=True),
        "biased": make_llama(attention_bias=True),
        "gpt2": make_gpt2(),
    }
    return {name: save(model, root / name) for name, model in models.items()}


def stored(weights: dict[str, torch.Tensor], names: set[str]) -> dict[str, torch.Tensor]:
    """Weights by the names of a folder; older GPT-2 folders lack the prefix."""
    return {name: weights[name if name in weights else f"transformer.{name}"] for name in names}


@pytest.mark.parametrize("case", CASES)
def test_tensors_equal_weights_merged_in_float64(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    kind, change, settings = CASES[case]
    adapter = make_adapter(bases[kind], tmp_path / "lora", change, **settings)
    (model,) = open_models([str(tmp_path / "lora")], [], None)
    assert model.untied == (case in UNTIED)
    assert (f"{HEAD}.weight" in model.tensors) == (kind not in ("tied", "gpt2") or case in UNTIED)
    draw = random.Random(0)
    for name, value in stored(adapter.weights, set(model.tensors)).items():
        info, value = model.tensors[name], value.reshape(-1)
        for start, stop in [(0, info.size), sorted(draw.sample(range(info.size + 1), 2))]:
            read = torch.from_numpy(decode(info.read(start, stop), info.dtype)).double()
            assert info.file_dtype == "F32" and len(read) == stop - start
            torch.testing.assert_close(read, value[start:stop], rtol=1e-6, atol=1e-6, msg=name)


def merged_folder(adapter: Adapter, base: Path, folder: Path) -> Path:
    """The base merged with an adapter, rounded to float32."""
    shutil.copytree(base, folder)
    values = stored(adapter.weights, set(load_file(base / "model.safetensors")))
    save_file({name: value.float().contiguous() for name, value in values.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def specialists(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    """Two adapters of one base, and the base merged with each; all but the second adapter have Grams."""
    root = tmp_path_factory.mktemp("specialists")
    adapters, whole = [], []
    for number, name in enumerate("AB"):
        adapter = make_adapter(bases["llama"], root / name, usual, seed=number)
        adapters.append(root / name)
        whole.append(merged_folder(adapter, bases["llama"], root / f"whole_{name}"))
    for folder in (adapters[0], *whole):
        grams(folder)
    return adapters, whole


def assert_alike(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=name)


def gram_file(folder: Path) -> GramFile:
    return GramFile(folder.with_suffix(".gram") / "gram.safetensors")


def assert_same_grams(one: GramFile, other: GramFile) -> None:
    assert {gram.tensors for gram in one.grams.values()} == {gram.tensors for gram in other.grams.values()}
    for name in one.grams.keys() & other.grams.keys():
        torch.testing.assert_close(*(torch.from_numpy(file.read(name)) for file in (one, other)), rtol=1e-4, atol=1e-4)


def test_grams_and_merges_are_those_of_merged_models(
    specialists: tuple[list[Path], list[Path]], tmp_path: Path
) -> None:
    adapters, whole = specialists
    assert_same_grams(gram_file(adapters[0]), gram_file(whole[0]))
    assert gram_file(adapters[0]).provenance["base"]
    assert_alike(*(run(folders, tmp_path / f"avg{i}", "avg") for i, folders in enumerate(specialists)))
    # An adapter beside a whole model.
    pairs = [[adapters[0], whole[1]], whole]
    outs = [run(folders, tmp_path / f"regmean{i}") for i, folders in enumerate(pairs)]
    assert_alike(*outs)
    report, card = read_json(outs[0] / "merge_report.json"), (outs[0] / "README.md").read_text()
    base = report["models"][0]["base"]
    assert report["models"][0]["model"] == str(adapters[0]) and "base" not in report["models"][1]
    assert f"`{adapters[0]}`, an adapter of `{base}`" in card
    with pytest.raises(InputError, match=r"holds the Grams of .*A, not of .*B"):
        run(adapters[::-1], tmp_path / "swapped", grams=[str(adapters[0].with_suffix(".gram"))] * 2)


def test_layers_alone_have_the_merged_weights(specialists: tuple[list[Path], list[Path]]) -> None:
    weights = load_file(specialists[1][0] / "model.safetensors")
    (checkpoint,) = open_models([str(specialists[0][0])], [], None)
    built = build_without_weights(AutoModelForCausalLM, config_of(checkpoint), torch.float32, torch.device("cpu"))
    model = open_layerwise(checkpoint, built, torch.device("cpu"), None)
    for step in range(3):
        for name, value in model.weights(step).items():
            torch.testing.assert_close(value, weights[name], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_passes_layer_by_layer_are_those_of_merged_models(
    specialists: tuple[list[Path], list[Path]], bases: dict[str, Path], tmp_path: Path
) -> None:
    layerwise = shutil.copytree(specialists[0][0], tmp_path / "layerwise")
    grams(layerwise, layerwise="on")
    assert_same_grams(gram_file(layerwise), gram_file(specialists[0][0]))
    make_adapter(bases["tied"], tmp_path / "untied", both_apart)
    shutil.copytree(tmp_path / "untied", tmp_path / "untied_layerwise")
    for name, way in (("untied", "off"), ("untied_layerwise", "on")):
        grams(tmp_path / name, layerwise=way)
    assert_same_grams(*(gram_file(tmp_path / name) for name in ("untied", "untied_layerwise")))
    texts = tmp_path / "texts.yaml"
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    texts.write_text(f"dataset: {tmp_path / 'texts.jsonl'}\ntext_column: text\n")
    for method in SEQUENTIAL:
        outs = []
        for number, folders in enumerate(specialists):
            names, outs = list(map(str, folders)), [*outs, tmp_path / f"{method}{number}"]
            flags = MergeFlags(method=method, models=names, calibration=[str(texts)] * 2, alpha=[0.9], device="cpu",
                               output_dir=str(outs[-1]))  # fmt: skip
            merge_layer_by_layer(flags, start_process("cpu"), "command")
        assert_alike(*outs, tolerance=1e-4)


def test_an_untied_head_is_in_grams_and_merge(bases: dict[str, Path], tmp_path: Path) -> None:
    """The merge of two adapters of a tied table has a head of its own, and Grams are of the model as it was trained."""
    adapters = [make_adapter(bases["tied"], tmp_path / name, both_apart, seed) for seed, name in enumerate("AB")]
    folders = [tmp_path / "A", tmp_path / "B"]
    for folder in folders:
        grams(folder)
    out = run(folders, tmp_path / "out")
    assert read_json(out / "config.json")["tie_word_embeddings"] is False
    values = load_file(out / "model.safetensors")
    means = {name: sum(adapter.weights[name] for adapter in adapters).float() / 2 for name in values}
    torch.testing.assert_close(values[f"{TABLE}.weight"], means[f"{TABLE}.weight"], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(values[f"{HEAD}.weight"], means[f"{HEAD}.weight"], atol=1e-3)
    assert AutoModelForCausalLM.from_pretrained(out).lm_head.weight.equal(values[f"{HEAD}.weight"])


def test_a_bfloat16_base_is_rounded_once(bases: dict[str, Path], tmp_path: Path) -> None:
    adapters = [make_adapter(bases["bfloat16"], tmp_path / name, usual, seed) for seed, name in enumerate("AB")]
    out = run([tmp_path / "A", tmp_path / "B"], tmp_path / "out", "avg")
    for name, value in load_file(out / "model.safetensors").items():
        mean = sum(adapter.weights[name] for adapter in adapters) / 2
        assert value.dtype == torch.bfloat16
        # Half a unit in the last of 8 bits.
        assert ((value.double() - mean).abs() <= mean.abs() * 2**-8 * 1.001).all(), name


def test_names_of_other_classes_and_of_older_folders_are_found(tmp_path: Path) -> None:
    """The folder's names are not those of the modules that the adapter was trained on."""
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    base = save(transformers.GPT2Model(config), tmp_path / "base")
    assert "h.0.attn.c_attn.weight" in load_file(base / "model.safetensors")
    adapter = make_adapter(base, tmp_path / "lora", conv1d)
    (model,) = open_models([str(tmp_path / "lora")], [], None)
    assert model.changed() == {"h.0.attn.c_attn.weight", "h.1.attn.c_proj.weight"}
    read = torch.from_numpy(model.tensors["h.0.attn.c_attn.weight"].read()).double()
    torch.testing.assert_close(read, adapter.weights[f"{CONV1D}.weight"].flatten(), rtol=1e-6, atol=1e-6)


def test_an_adapters_tokenizer_takes_the_place_of_the_bases(bases: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    (base / "added_tokens.json").write_text("{}")
    (base / "LICENSE").write_text("terms")
    for seed, name in enumerate("AB"):
        make_adapter(base, tmp_path / name, usual, seed)
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["<x>"])
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "A" / "trainer_state.json").write_text("{}")
    out = run([tmp_path / "A", tmp_path / "B"], tmp_path / "out", "avg")
    assert "<x>" in AutoTokenizer.from_pretrained(out).get_vocab()
    assert not (out / "added_tokens.json").exists() and (out / "LICENSE").exists()
    assert not list(out.glob("adapter*")) and not (out / "trainer_state.json").exists()
    assert (out / "generation_config.json").exists()
    (tmp_path / "A" / "tokenizer.json").unlink()
    assert open_models([str(tmp_path / "A")], [], None)[0].tokenizer_folder == base


def test_base_replaces_that_of_the_settings(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    make_adapter(bases["llama"], tmp_path / "A", usual, base_model_name_or_path="gone")
    make_adapter(bases["llama"], tmp_path / "B", usual, seed=1)
    folders = [tmp_path / "A", tmp_path / "B"]
    with pytest.raises(InputError, match="base gone: .* --base names another base"):
        run(folders, tmp_path / "out", "avg")
    flags = {"base": str(bases["llama"])}
    run(folders, tmp_path / "out", "avg", **flags)
    plan_merging(MergeFlags(method="avg", models=list(map(str, folders)), plan="h100", **flags))
    assert "avg of 2 models" in capsys.readouterr().out
    with pytest.raises(InputError, match="--base .* is for adapters, and there is none among"):
        run([bases["llama"]] * 2, tmp_path / "none", "avg", base=str(bases["llama"]))


def test_an_adapter_of_the_hub_and_its_base_are_downloaded(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(bases["llama"], tmp_path / "lora", usual, base_model_name_or_path="owner/base", revision="r1")
    sources, asked = {"owner/base": bases["llama"], "owner/lora": tmp_path / "lora"}, []

    def download(name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: Any = None) -> str:
        asked.append((name, revision))
        folder = tmp_path / name / "snapshots" / "commit"
        folder.mkdir(parents=True, exist_ok=True)
        files = [str(path.relative_to(sources[name])) for path in sources[name].iterdir()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            shutil.copy(sources[name] / file, folder / file)
        return str(folder)

    def listed(name: str, revision: str | None) -> list[str]:
        return [path.name for path in sources[name].iterdir()]

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", listed)
    assert config_name("owner/lora", "main", None) == ("owner/base", "r1")
    assert config_name("owner/base", "r1", None) == ("owner/base", "r1")
    (model,) = open_models(["owner/lora"], ["main"], None)
    assert asked[1:] == [("owner/lora", "main"), ("owner/lora", "commit"), ("owner/base", "r1")]
    assert model.revision() == "commit" and model.origin() == {"model": "owner/lora", "base": "owner/base"}
    assert len(model.changed()) == 3


def test_names_of_weights_change_with_base_and_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    """A Gram file belongs to one fingerprint, and a merge continues with files that have not changed."""
    base = shutil.copytree(bases["llama"], tmp_path / "base")

    def fingerprint(seed: int = 0, **settings: Any) -> str:
        make_adapter(base, tmp_path / "lora", usual, seed, **settings)
        (model,) = open_models([str(tmp_path / "lora")], [], None)
        assert {path.parent for path in model.files()} == {base, tmp_path / "lora"}
        return model.fingerprint()

    found = [fingerprint(), fingerprint(1), fingerprint(lora_alpha=6), fingerprint()]
    save(make_llama(1), base)
    found.append(fingerprint())
    assert len(set(found)) == 4 and found[0] == found[3]


REFUSED: dict[str, tuple[Callable[[Adapter], None], dict[str, Any], str]] = {
    "kind": (usual, {"peft_type": "IA3"}, "adapters of type IA3 are not read"),
    "prompt": (usual, {"peft_type": "PROMPT_TUNING"}, "adapters of type PROMPT_TUNING are not read"),
    "setting": (usual, {"layer_replication": [[0, 2]]}, "layer_replication is not supported"),
    "unknown": (usual, {"of_tomorrow": True}, "of_tomorrow is not supported"),
    "start": (usual, {"init_lora_weights": "pissa"}, "init_lora_weights pissa changes the base's weights"),
    "alpha": (lambda adapter: None, {"lora_alpha": "8"}, "lora_alpha and alpha_pattern must be numbers"),
    "huge": (lambda adapter: None, {"lora_alpha": 10**400}, "lora_alpha and alpha_pattern must be numbers"),
    "pattern": (usual, {"alpha_pattern": {"(?i)q_proj": 2}}, r"alpha_pattern '\(\?i\)q_proj': not a regular expr"),
    "long": (usual, {"base_model_name_or_path": "a" * 5000}, "no such folder here, .* --base names another base"),
    "base": (usual, {"base_model_name_or_path": None}, "no base_model_name_or_path; give the base by --base"),
    "nothing": (lambda adapter: None, {}, "no tensor of an adapter"),
    "half": (
        lambda adapter: [adapter.lora(QUERY), adapter.file.pop(f"{QUERY}.lora_B.weight")],
        {},
        "the update of model.layers.0.self_attn.q_proj is not whole",
    ),
    "part": (
        lambda adapter: adapter.file.update({f"{QUERY}.lora_E": rounded(2)}),
        {},
        "is no part of an update that is known here",
    ),
    "magnitude": (
        lambda adapter: [adapter.lora(QUERY), adapter.file.update({f"{QUERY}.lora_magnitude_vector": rounded(16)})],
        {},
        "use_dora is None, unlike the tensors of model.layers.0.self_attn.q_proj",
    ),
    "module": (
        lambda adapter: [adapter.lora(QUERY), adapter.file.update({"model.layers.9.q.lora_A.weight": rounded(2, 16)})],
        {},
        r"no tensor of the base .* holds model\.layers\.9\.q\.weight and no more",
    ),
    "vocabulary": (
        lambda adapter: adapter.file.update({f"{TABLE}.weight": rounded(40, 16)}),
        {},
        r"embed_tokens.weight of \[40, 16\] does not fit .* \[32, 16\]: .* if the vocabulary was resized",
    ),
    "shape": (
        lambda adapter: adapter.file.update(
            {f"{QUERY}.lora_A.weight": rounded(2, 9), f"{QUERY}.lora_B.weight": rounded(16, 2)}
        ),
        {},
        r"the product of \[16, 2\] and \[2, 9\] of .* does not fit",
    ),
    "tokens": (tokens, {"trainable_token_indices": [30, 2, 70]}, "no token ids of model.embed_tokens, or ids beyond"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_added_is_refused_in_one_line(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    change, settings, message = REFUSED[case]
    make_adapter(bases["llama"], tmp_path / "lora", change, **settings)
    with pytest.raises(InputError, match=message) as error:
        open_models([str(tmp_path / "lora")], [], None)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
