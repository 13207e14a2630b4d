"""Folders of many architectures, in every naming that transformers reads, compared with a float64 RegMean."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights

from common.io import read_json
from regmean.architectures import layer_tensors
from regmean.hooks import linear_layers
from tests.regmean.folders import MODELS, assert_merged, build, grams, in_older_naming, rename, run, save

FAST = ("convbert", "neox", "qwen3_moe", "zamba2")
AUTO = {
    "llava": AutoModelForImageTextToText,
    "qwen3_vl_moe": AutoModelForImageTextToText,
    "step3p7": AutoModelForImageTextToText,
    "bert": AutoModelForSequenceClassification,
    "roberta": AutoModelForTokenClassification,
    "distilbert": AutoModelForQuestionAnswering,
    "convbert": AutoModelForMaskedLM,
}


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS]
)
def test_every_layer_is_solved(kind: str, tmp_path: Path) -> None:
    folders = [save(build(kind, seed), tmp_path / name) for seed, name in ((1, "A"), (2, "B"))]
    if kind == "gemma3":
        for folder in folders:
            rename(folder, in_older_naming)
    for folder in folders:
        grams(folder)
    out = run(folders, tmp_path / "out")
    # The router of ERNIE runs in float32 only.
    dtype = torch.float32 if kind == "ernie4_5_moe" else torch.float64
    assert_merged(out, folders, AUTO.get(kind, AutoModelForCausalLM), dtype=dtype)
    report = read_json(out / "merge_report.json")
    assert f"RegMean solved {report['solved_fraction']:.1%} of the parameters" in (out / "README.md").read_text()
    if kind == "neox":
        assert any("embed_out.weight" in layer["tensors"] for layer in report["layers"])


def as_in_memory(folder: Path, kind: str, seed: int) -> None:
    """Rewrite a folder with the tensors that the model has in memory: experts in one tensor."""
    save_file(build(kind, seed).state_dict(), folder / "model.safetensors", {"format": "pt"})


def text_alone(folder: Path, kind: str, seed: int) -> None:
    """Rewrite a multimodal folder as its language model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    save(model, folder)


def transposed(folder: Path, kind: str, seed: int) -> None:
    """Rewrite a folder with its experts as (experts, in, out), as those of the hub are stored."""
    tensors = load_file(folder / "model.safetensors")
    turned = {name: value.mT.contiguous() for name, value in tensors.items() if ".experts." in name}
    assert len(turned) == 4
    save_file(tensors | turned, folder / "model.safetensors", {"format": "pt"})


def renamed(folder: Path, kind: str, seed: int) -> None:
    rename(folder, in_older_naming)


@pytest.mark.parametrize(
    ("kind", "change", "first"),
    [
        ("qwen3_moe", as_in_memory, "A"),
        ("qwen3_moe", as_in_memory, "B"),
        ("qwen3_vl_moe", transposed, "A"),
        ("qwen3_vl_moe", transposed, "B"),
        pytest.param("qwen3_vl_moe", transposed, "both", marks=pytest.mark.slow),
        pytest.param("qwen3_5", text_alone, "A", marks=pytest.mark.slow),
        pytest.param("qwen3_5", text_alone, "B", marks=pytest.mark.slow),
        pytest.param("gemma3", renamed, "A", marks=pytest.mark.slow),
        pytest.param("gemma3", renamed, "B", marks=pytest.mark.slow),
    ],
)
def test_two_forms_of_one_model_merge(kind: str, change: Any, first: str, tmp_path: Path) -> None:
    folders = [save(build(kind, seed), tmp_path / name) for seed, name in ((1, "A"), (2, "B"))]
    change(folders[1], kind, 2)
    if first == "both":
        change(folders[0], kind, 1)
    for folder in folders:
        grams(folder)
    if first == "B":
        folders.reverse()
    out = run(folders, tmp_path / "out")
    auto = AUTO.get(kind, AutoModelForCausalLM)
    assert_merged(out, folders, auto)
    # In the form of the first model, with all of its tensors.
    written, stored = (load_file(folder / "model.safetensors") for folder in (out, folders[0]))
    assert {name: value.shape for name, value in written.items()} == {n: value.shape for n, value in stored.items()}
    assert_average(run(folders, tmp_path / "avg", "avg"), folders, auto)


def assert_average(out: Path, folders: list[Path], auto: Any) -> None:
    a, b, merged = (auto.from_pretrained(folder).state_dict() for folder in (*folders, out))
    for name in a:
        torch.testing.assert_close(merged[name], (a[name] + b[name]) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("config_class", MODEL_FOR_CAUSAL_LM_MAPPING, ids=lambda config_class: config_class.model_type)
def test_the_tensors_of_every_causal_model_are_found(config_class: type[PretrainedConfig]) -> None:
    try:
        config = config_class()
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        pytest.skip(f"transformers builds none from a default config: {error!r}")
    # As `save_pretrained` writes them.
    tied = model.all_tied_weights_keys
    own = {name: value for name, value in model.state_dict().items() if name not in tied}
    stored = {name: SimpleNamespace(shape=value.shape) for name, value in revert_weight_conversion(model, own).items()}
    layers = [name for name in linear_layers(model) if f"{name}.weight" not in tied]
    found, _ = layer_tensors("default", model, layers, set(), stored)
    assert set(layers) == set().union(*found.values())
