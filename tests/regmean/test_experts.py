"""Mixtures of experts against experts written as separate linear layers, in float64."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from common.errors import InputError
from common.io import read_json
from regmean import compute as compute_module
from regmean import gram as gram_module
from regmean.config import MergeFlags
from regmean.experts import chosen, run_experts
from regmean.gram_file import Gram, GramFile, join_files, write_grams
from regmean.slices import sliced
from regmean.tensor_file import TensorFile, TensorInfo
from tests.regmean.folders import TEXTS, assert_merged, build, grams, load, run, save, watch_experts

KINDS = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "olmoe", "llama4")
FEW = TEXTS[:12]


def pair(kind: str, folder: Path, change: Callable[[PreTrainedModel, int], None] | None = None) -> list[Path]:
    folders = []
    for seed, name in ((1, "A"), (2, "B")):
        model = build(kind, seed)
        if change is not None:
            change(model, seed)
        folders.append(save(model, folder / name))
        grams(folders[-1], FEW)
    return folders


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_is_solved(kind: str, tmp_path: Path) -> None:
    folders = pair(kind, tmp_path)
    out = run(folders, tmp_path / "out")
    assert_merged(out, folders, texts=FEW, tolerance=1e-5)
    solved = {layer["pool"].rpartition(".")[2] for layer in read_json(out / "merge_report.json")["layers"]}
    assert solved >= {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize("kind", [*KINDS, "nemotron_h"])
@torch.no_grad()
def test_experts_run_as_the_model_runs_them(kind: str) -> None:
    model, ids = build(kind).double(), torch.tensor([[3, 9, 4, 7, 5, 11, 6]])
    model.set_experts_implementation("eager")
    expected, reached, masks = model(ids).logits, [], []
    modules = [m for m in model.modules() if isinstance(getattr(m, "down_proj", None), torch.nn.Parameter)]
    for module in modules:
        module.forward = partial(run_experts, module, lambda *of: reached.append(of), None)
        module.register_forward_pre_hook(lambda module, args: masks.append(chosen(module, *args)))
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-10, atol=1e-10)
    assert bool(reached) == bool(modules)
    routed = [[token, number] for _, number, _, tokens in reached for token in tokens.tolist()]
    assert sorted(routed) == sorted(2 * [pair for mask in masks for pair in mask.nonzero().tolist()])
    if modules and kind != "llama4":
        module, x = modules[0], torch.randn(3, 16, dtype=torch.float64)
        routing = (torch.tensor([[0, 1], [2, 3], [0, 1]]), torch.rand(3, 2, dtype=torch.float64))
        real = torch.tensor([True, False, True])
        out = module.forward(x, *routing)
        padded = run_experts(module, lambda *of: None, real, x, *routing)
        torch.testing.assert_close(padded, out * real[:, None])


def unreachable(model: PreTrainedModel, seed: int) -> None:
    """Route no token to the last expert, and of model B none to the one before it."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.bias[-1] = -1e4
            layer.mlp.router.bias[-2] = -1e4 if seed == 2 else 0


def test_an_expert_without_tokens_is_averaged_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folders = pair("gpt_oss", tmp_path, unreachable)
    file = GramFile(folders[1].with_suffix(".gram") / "gram.safetensors")
    tokens = [file.grams[f"model.layers.0.mlp.experts.{number}.down_proj"].tokens for number in range(4)]
    assert min(tokens[:2]) > 0 == tokens[2] == tokens[3]
    out = run(folders, tmp_path / "out")
    assert_merged(out, folders, texts=FEW, tolerance=1e-5)
    (note,) = (note for note in read_json(out / "merge_report.json")["notes"] if "no model's texts reach" in note)
    assert "averaged: 4 weights: " in note
    assert "no token reached 4 layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("memory", "options"),
    [(10**9, {}), (10**9, {"tokens_per_batch": 1}), (2400, {}), (10**9, {"layerwise": "on"})],
    ids=["padded", "one by one", "passes", "layer by layer"],
)
def test_sums_equal_those_of_each_text_alone(
    memory: int, options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(build("qwen3_moe"), tmp_path / "A")
    monkeypatch.setattr(compute_module, "available_memory", lambda device: memory)
    file = GramFile(grams(folder, FEW, **({"layerwise": "off"} | options)) / "gram.safetensors")
    model, sums, counts = load(folder), {}, {}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    handles = watch_experts(model, sums, counts)
    with torch.no_grad():
        for text in FEW:
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
    assert len(handles) == 2
    for name, expected in sums.items():
        experts, _, key = name.rpartition(".")
        names = [f"{experts}.{number}.{key}" for number in range(4)]
        assert [file.grams[each].tokens for each in names] == counts[name]
        assert file.grams[name].tokens == sum(counts[name]) and set(file.grams[name].modules) == set(names)
        for each, total in zip([*names, name], [*expected, sum(expected)], strict=True):
            assert np.linalg.norm(file.read(each) - total.numpy()) <= 1e-6 * np.linalg.norm(total.numpy())


def test_a_rank_may_never_reach_an_expert(tmp_path: Path) -> None:
    class Peer:
        """The other of two ranks, which reaches the second expert only."""

        device = torch.device("cpu")

        def gather(self, value: dict) -> list[dict]:
            other = name.replace("experts.0", "experts.1")
            return [value, {other: 16 if isinstance(next(iter(value.values())), int) else other}]

        def sum_(self, tensor: torch.Tensor) -> None:
            tensor.add_(1.0)

        def sum(self, *values: float) -> list[float]:
            return [value + 1 for value in values]

    name = "model.layers.0.mlp.experts.0.gate_up_proj"
    layers = {
        key: layer for key, layer in compute_module.linear_layers(build("qwen3_moe")).items() if "layers.0" in key
    }
    sums = gram_module.GramSums(shared_name={name: name})
    sums.add(name, torch.ones(3, 16))
    sums.add_ranks(Peer())
    sums.write(tmp_path / "g", layers, {}, {})
    file = GramFile(tmp_path / "g")
    pool = "model.layers.0.mlp.experts.gate_up_proj"
    names = [name.replace("experts.0", f"experts.{number}") for number in range(4)]
    tokens = [file.grams[each].tokens for each in names]
    assert (tokens, file.grams[pool].tokens) == ([4, 1, 0, 0], 5)
    assert np.array_equal(file.read(pool), np.full((16, 16), 5.0))
    assert not file.read(names[3]).any()
    assert gram_module.GramSums.read(tmp_path / "g", torch.device("cpu")).tokens == {names[0]: 4, names[1]: 1}


def test_pools_of_several_passes_are_added_up(tmp_path: Path) -> None:
    files = []
    for number, tokens in enumerate((3, 0, 2)):
        expert = Gram(f"e.{number}.up_proj", (f"e.{number}.up_proj",), tokens, 2, pool="e.up_proj")
        pool = Gram("e.up_proj", (expert.name,), tokens, 2, pool="e.up_proj")
        square = np.full((2, 2), tokens, np.float32)
        write_grams(tmp_path / str(number), [expert, pool], lambda name, square=square: square, {})
        files.append(GramFile(tmp_path / str(number)))
    join_files(tmp_path / "all", files, {})
    joined = GramFile(tmp_path / "all")
    assert joined.grams["e.up_proj"].tokens == 5 and len(joined.grams["e.up_proj"].modules) == 3
    assert np.array_equal(joined.read("e.up_proj"), np.full((2, 2), 5))
    assert TensorFile(tmp_path / "all").metadata["version"] == "3"


@pytest.mark.parametrize("pool", ["none", "wide"])
def test_a_pool_that_does_not_fit_is_damage(pool: str, tmp_path: Path) -> None:
    found = [Gram("e.0.up_proj", ("e.0.up_proj",), 3, 2, pool=pool), Gram("wide", ("x",), 3, 3)]
    write_grams(tmp_path / "g", found, lambda name: np.ones((3, 3), np.float32), {})
    with pytest.raises(InputError, match="header is damaged"):
        GramFile(tmp_path / "g")


def test_routers_are_taken_from_one_model(tmp_path: Path) -> None:
    folders = pair("mixtral", tmp_path)
    out = run(folders, tmp_path / "out", router=2)
    merged, second = (load(folder).state_dict() for folder in (out, folders[1]))
    routers = [name for name in merged if name.endswith("mlp.gate.weight")]
    assert len(routers) == 2
    for name in routers:
        assert torch.equal(merged[name], second[name])
    with pytest.raises(InputError, match=r"--router is a number of --models: 1 to 2"):
        MergeFlags(method="avg", models=["A", "B"], router=3)
    dense = [save(build("llama", seed), tmp_path / f"dense{seed}") for seed in (1, 2)]
    with pytest.raises(InputError, match=r"--router 1: none of the selected tensors belongs to a router"):
        run(dense, tmp_path / "none", "avg", router=1)


def test_a_slice_reads_as_part_of_its_tensor(tmp_path: Path) -> None:
    folder = save(build("gpt_oss"), tmp_path / "A")
    tensors = TensorFile(folder / "model.safetensors").tensors
    info = tensors["model.layers.1.mlp.experts.down_proj"]
    part = sliced(info, 2)
    assert (part.name, part.shape) == (f"{info.name}[2]", info.shape[1:])
    expected = info.read().reshape(info.shape)[2].reshape(-1)
    assert np.array_equal(part.read(), expected)

    class Doubled(TensorInfo):
        """A tensor that is computed as it is read."""

        def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
            return 2 * super().read(start, stop)

    doubled = sliced(Doubled(*(getattr(info, field.name) for field in fields(TensorInfo))), 2)
    assert np.array_equal(doubled.read(), 2 * expected)
