"""Layer-sequential merges, compared with float64 models that are merged group by group."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common.cli import parse_flags
from common.ranks import start_process
from regmean.compute import compute_grams
from regmean.config import GramFlags, MergeFlags
from regmean.gram_file import GramFile
from regmean.layerwise_merge import merge_layer_by_layer
from regmean.merge import merge
from tests.regmean.conftest import make_tokenizer
from tests.regmean.folders import EXPERTS, TEXT

ALPHA, RIDGE = 0.9, 1e-6
GEMMA = TEXT | {"num_hidden_layers": 3, "sliding_window": 4, "query_pre_attn_scalar": 4,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", TEXT | {"tie_word_embeddings": False}),
    "gemma3": ("Gemma3TextConfig", GEMMA),
    "qwen3": ("Qwen3Config", TEXT | {"tie_word_embeddings": False}),
    "gpt2": ("GPT2Config", {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "qwen3_moe": ("Qwen3MoeConfig", TEXT | EXPERTS),
}
# Linear layers that share an input, in the order of calls, by the ends of their names.
GROUPS = {
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    "qwen3_moe": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"], ["mlp.gate"]],
}
USUAL = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
TABLE = re.compile(r"embed_tokens|wte|wpe")
TEXTS = [
    [" ".join(f"w{(3 * i + j * j + i * j + seed) % 20}" for j in range(1 + i % (9 - 3 * seed))) for i in range(40)]
    for seed in (0, 1)
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """Folders of two models of a kind, the second with other weights; and YAML files of their texts."""
    made: dict[str, list[Path]] = {}

    def make(kind: str) -> list[Path]:
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            config_class, options = KINDS[kind]
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**options))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter) if parameter.ndim > 1 else 0.1)
            for name in "AB":
                model.save_pretrained(root / name)
                make_tokenizer().save_pretrained(root / name)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(0.1 * torch.randn_like(parameter))
            for name, texts in zip("AB", TEXTS, strict=True):
                data = root / f"{name}.jsonl"
                data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
                (root / f"{name}.yaml").write_text(f"model: {root / name}\ndataset: {data}\ntext_column: text\n")
            made[kind] = [root / "A", root / "B"]
        return made[kind]

    return make


def merge_flags(folders: list[Path], out: Path, method: str, **options: Any) -> MergeFlags:
    return MergeFlags(
        method=method,
        models=list(map(str, folders)),
        calibration=[f"{folder}.yaml" for folder in folders],
        alpha=[ALPHA],
        output_dir=str(out),
        device="cpu",
        **{"tokens_per_batch": 24} | options,
    )


def merged(folders: list[Path], out: Path, method: str, **options: Any) -> Path:
    merge_layer_by_layer(merge_flags(folders, out, method, **options), start_process("cpu"), "command")
    return out


# The oracle: whole models in float64, one text at a time.


def load64(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )


def inputs_of(model: PreTrainedModel, layer: nn.Module, texts: list[str]) -> torch.Tensor:
    """Inputs of a layer for all tokens, (tokens, inputs)."""
    rows: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].reshape(-1, args[0].shape[-1])))
    tokenizer = make_tokenizer()
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([tokenizer(text)["input_ids"]]))
    handle.remove()
    return torch.cat(rows)


def weight(layer: nn.Module) -> torch.Tensor:
    """(inputs, outputs)."""
    return layer.weight.data if isinstance(layer, Conv1D) else layer.weight.data.T


def scaled(matrix: torch.Tensor) -> torch.Tensor:
    return ALPHA * matrix + (1 - ALPHA) * torch.diag(matrix.diagonal())


def oracle(kind: str, folders: list[Path], method: str, tables: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The merge, from its embedding `tables` on."""
    models, merge = [load64(folder) for folder in folders], load64(folders[0])
    with torch.no_grad():
        for mine, a, b in zip(merge.parameters(), *(model.parameters() for model in models), strict=True):
            mine.copy_((a + b) / 2)
    merge.load_state_dict(tables, strict=False)
    layers = [
        f"transformer.h.{i}" if kind == "gpt2" else f"model.layers.{i}"
        for i in range(KINDS[kind][1].get("num_hidden_layers", 2))
    ]
    steps = [[[f"{layer}.{name}" for name in group] for group in GROUPS.get(kind, USUAL)] for layer in layers]
    if not merge.config.tie_word_embeddings:
        steps.append([["lm_head"]])
    for step in steps:
        solved = {}
        for group in step:
            if method == "regmean++":
                # Each model's own layer, or norm before the head, behind the merged layers before it.
                prefix = "model.norm" if group == ["lm_head"] else ".".join(group[0].split(".")[:3])
                behind = [with_own_layer(merge, model, prefix) for model in models]
            else:
                behind = [merge, merge]
            h = [inputs_of(m, m.get_submodule(group[0]), texts) for m, texts in zip(behind, TEXTS, strict=True)]
            x = [inputs_of(m, m.get_submodule(group[0]), texts) for m, texts in zip(models, TEXTS, strict=True)]
            if method == "regmean++":
                x = h
            hh = [scaled(a.T @ a) / len(a) / 2 for a in h]
            hx = [scaled(a.T @ b) / len(a) / 2 for a, b in zip(h, x, strict=True)]
            total = sum(hh)
            damping = RIDGE * total.diagonal().mean() if method == "regmean_asym" else 0.0
            dead = (total.diagonal() == 0).double()
            for name in group:
                own = [weight(model.get_submodule(name)) for model in models]
                mean = (own[0] + own[1]) / 2
                rhs = sum(b @ w - a @ mean for a, b, w in zip(hh, hx, own, strict=True))
                solved[name] = mean + torch.linalg.solve(total + torch.diag(damping + dead), rhs)
            if method == "regmean_asym":
                put(merge, solved)
        put(merge, solved)
    return merge


def with_own_layer(merge: PreTrainedModel, model: PreTrainedModel, prefix: str) -> PreTrainedModel:
    other = load_copy(merge)
    other.get_submodule(prefix).load_state_dict(model.get_submodule(prefix).state_dict())
    return other


def load_copy(model: PreTrainedModel) -> PreTrainedModel:
    import copy

    return copy.deepcopy(model)


def put(model: PreTrainedModel, solved: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in solved.items():
            weight(model.get_submodule(name)).copy_(value)


@pytest.mark.parametrize("method", ["regmean++", "regmean_asym"])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_equals_models_merged_group_by_group(kind: str, method: str, pair: Callable, tmp_path: Path) -> None:
    folders = pair(kind)
    out = merged(folders, tmp_path / "out", method)
    a, b, found = (load64(folder).state_dict() for folder in (*folders, out))
    tables = {name: found[name] for name in found if TABLE.search(name)}
    expected = oracle(kind, folders, method, tables).state_dict()
    errors = {
        name: ((found[name] - value).norm() / ((a[name] - b[name]).norm() + 1e-12)).item()
        for name, value in expected.items()
        if value.is_floating_point()
    }
    assert max(errors.values()) <= 1e-5, {name: error for name, error in errors.items() if error > 1e-5}
    # The tables are those of RegMean with Grams of the same texts.
    for folder in folders:
        words = ["--config", f"{folder}.yaml", "--device", "cpu", "--dtype", "float32"]
        grams = parse_flags(GramFlags, [*words, "--output_dir", str(tmp_path / folder.name)])
        compute_grams(grams, start_process("cpu"))
    flags = MergeFlags(
        method="regmean",
        models=list(map(str, folders)),
        grams=[str(tmp_path / folder.name) for folder in folders],
        alpha=[ALPHA],
        output_dir=str(tmp_path / "regmean"),
    )
    merge(flags, "command")
    by_grams = load64(tmp_path / "regmean").state_dict()
    for name in tables:
        apart = (a[name] - b[name]).norm()
        assert (found[name] - (a[name] + b[name]) / 2).norm() > 0.05 * apart, name
        assert (found[name] - by_grams[name]).norm() <= 1e-5 * apart, name


@pytest.mark.parametrize("kind", KINDS)
def test_grams_layer_by_layer_equal_those_of_the_whole_model(kind: str, pair: Callable, tmp_path: Path) -> None:
    folder = pair(kind)[0]
    files = []
    for layerwise in ("off", "on"):
        words = ["--config", f"{folder}.yaml", "--device", "cpu", "--dtype", "float32", "--tokens_per_batch", "24"]
        out = tmp_path / layerwise
        words += ["--layerwise", layerwise, "--output_dir", str(out), "--offload_dir", str(tmp_path / "states")]
        compute_grams(parse_flags(GramFlags, words), start_process("cpu"))
        files.append(GramFile(out / "gram.safetensors"))
    whole, layers = files
    assert whole.grams == layers.grams
    for name in whole.grams:
        expected = whole.read(name)
        assert np.linalg.norm(layers.read(name) - expected) <= 1e-6 * np.linalg.norm(expected), name
    assert {n: (c.tensors, c.tied, c.values.tolist()) for n, c in whole.counts.items()} == {
        n: (c.tensors, c.tied, c.values.tolist()) for n, c in layers.counts.items()
    }
    assert not list((tmp_path / "states").iterdir())
