"""Layer-sequential merges, compared with float64 models that are merged group by group."""

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common.cli import parse_flags
from common.errors import InputError
from common.io import read_json
from common.ranks import Process, start_process
from regmean.compute import compute_grams
from regmean.config import SEQUENTIAL, GramFlags, MergeFlags
from regmean.gram_file import GramFile
from regmean.layerwise import files
from regmean.layerwise.merge import merge_layer_by_layer
from regmean.layerwise.model import Course, LayerwiseModel
from regmean.layerwise.models import LayerwiseModels
from regmean.layerwise.sequential import SequentialMerge
from regmean.layerwise.survey import survey
from regmean.merge import merge
from regmean.model_folder import CheckpointWriter
from regmean.tensor_file import TensorWriter
from tests.mindmerger.scripts import rank_processes, run_ranks
from tests.regmean.conftest import make_tokenizer
from tests.regmean.folders import EXPERTS, MODELS, TEXT, TRANSPOSED, build, gated, save, split_experts

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
# Of six experts, the last is not reached, and the one before it not in the second model, nor in the merge.
GPT_OSS = (
    "GptOssConfig",
    TEXT | EXPERTS | {"num_local_experts": 6, "num_experts": 6, "layer_types": ["sliding_attention", "full_attention"],
                      "sliding_window": 4, "tie_word_embeddings": False},
)  # fmt: skip
ALL = {**KINDS, "gpt_oss": GPT_OSS}
UNREACHED = {"A": [5], "B": [4, 5]}
# Linear layers that share an input, in the order of calls, by the ends of their names.
GROUPS = {
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
}
ATTENTION = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
for KIND, ROUTER in (("qwen3_moe", "mlp.gate"), ("gpt_oss", "mlp.router")):
    GROUPS[KIND] = [*ATTENTION, [ROUTER], ["mlp.experts.gate_up_proj"], ["mlp.experts.down_proj"]]
USUAL = [*ATTENTION, ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
TOKENIZER = make_tokenizer()
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
            config_class, options = ALL[kind]
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**options))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter) if parameter.ndim > 1 else 0.1)
            for name in "AB":
                for layer in model.model.layers if kind == "gpt_oss" else ():
                    layer.mlp.router.bias.data[UNREACHED[name]] = -1e4
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
        **{"tokens_per_batch": 24, "embeddings": "counts"} | options,
    )


def merged(folders: list[Path], out: Path, method: str, **options: Any) -> Path:
    merge_layer_by_layer(merge_flags(folders, out, method, **options), start_process("cpu"), "command")
    return out


# The oracle: whole models in float64, one text at a time.


def load64(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )


def run_texts(model: PreTrainedModel, texts: list[str]) -> None:
    """Run texts of one length at once, without padding."""
    ids = TOKENIZER(texts)["input_ids"]
    with torch.no_grad():
        for length in sorted(set(map(len, ids))):
            model(torch.tensor([each for each in ids if len(each) == length]))


def inputs_of(model: PreTrainedModel, layer: nn.Module, texts: list[str]) -> torch.Tensor:
    """Inputs of a layer for all tokens, (tokens, inputs)."""
    rows: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].reshape(-1, args[0].shape[-1])))
    run_texts(model, texts)
    handle.remove()
    return torch.cat(rows)


def inputs_of_experts(model: PreTrainedModel, name: str, texts: list[str]) -> list[dict[int, torch.Tensor]]:
    """The rows that each expert reads, by the number of their tokens; `name` is that of a parameter."""
    path, _, key = name.rpartition(".")
    module, seen = model.get_submodule(path), [0]
    ups, found = split_experts(module)["gate_up_proj"], [{} for _ in range(len(module.down_proj))]

    def add(module: nn.Module, args: tuple) -> None:
        states, choices = args[0], args[1].tolist()
        for number, rows in enumerate(found):
            tokens = [token for token, own in enumerate(choices) if number in own]
            x = states[tokens] if key == "gate_up_proj" else gated(module, ups[number](states[tokens]))
            rows |= {seen[0] + token: row for token, row in zip(tokens, x, strict=True)}
        seen[0] += len(choices)

    handle = module.register_forward_pre_hook(add)
    run_texts(model, texts)
    handle.remove()
    return found


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
        for i in range(ALL[kind][1].get("num_hidden_layers", 2))
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
            if group[0].endswith("_proj") and ".experts." in group[0]:
                solved[group[0]] = merged_experts(group[0], merge, models, behind, method)
            else:
                h = [inputs_of(m, m.get_submodule(group[0]), texts) for m, texts in zip(behind, TEXTS, strict=True)]
                x = [inputs_of(m, m.get_submodule(group[0]), texts) for m, texts in zip(models, TEXTS, strict=True)]
                x = h if method == "regmean++" else x
                sums = [(a.T @ a / len(a), a.T @ b / len(a)) for a, b in zip(h, x, strict=True)]
                for name in group:
                    solved[name] = solution(sums, [weight(model.get_submodule(name)) for model in models], method)
            if method == "regmean_asym":
                put(merge, solved)
        put(merge, solved)
    return merge


def solution(sums: list[tuple[torch.Tensor, torch.Tensor]], own: list[torch.Tensor], method: str) -> torch.Tensor:
    """The merged weight, (inputs, outputs), of two models with their weights and H^T H and H^T X."""
    mean = (own[0] + own[1]) / 2
    total = sum(scaled(hh) for hh, _ in sums) / 2
    rhs = sum(scaled(hx) @ w - scaled(hh) @ mean for (hh, hx), w in zip(sums, own, strict=True)) / 2
    damping = RIDGE * total.diagonal().mean() if method == "regmean_asym" else 0.0
    dead = (total.diagonal() == 0).double()
    return mean + torch.linalg.solve(total + torch.diag(damping + dead), rhs)


def merged_experts(
    name: str, merge: PreTrainedModel, models: list[PreTrainedModel], behind: list[PreTrainedModel], method: str
) -> torch.Tensor:
    """All experts of a parameter, each with the tokens that both runs route to it, and an eighth of the width in tokens
    of the mean over all experts.
    """
    path, _, key = name.rpartition(".")
    sums, counts = [], []
    for model, other, texts in zip(models, behind, TEXTS, strict=True):
        h, x = (inputs_of_experts(each, name, texts) for each in (other, model))
        x = h if method == "regmean++" else x
        tokens = [sorted(a.keys() & b.keys()) for a, b in zip(h, x, strict=True)]
        width = len(next(iter(h[0].values())))
        h, x = ([torch.stack([of[t] for t in own]) if own else torch.zeros(0, width, dtype=torch.float64)
                 for of, own in zip(side, tokens, strict=True)] for side in (h, x))  # fmt: skip
        count = sum(map(len, tokens))
        hh, hx = ([a.T @ b for a, b in zip(h, side, strict=True)] for side in (h, x))
        sums.append([[(one + width / 8 * sum(all_) / count) / count for one in all_] for all_ in (hh, hx)])
        counts.append(list(map(len, tokens)))
    own = [split_experts(model.get_submodule(path))[key] for model in models]
    parameter = merge.get_parameter(name).clone()
    for number, count in enumerate(map(sum, zip(*counts, strict=True))):
        weights = [weight(layers[number]) for layers in own]
        of_models = [(hh[number], hx[number]) for hh, hx in sums]
        value = solution(of_models, weights, method) if count else (weights[0] + weights[1]) / 2
        parameter[number] = value if value.shape == parameter[number].shape and is_transposed(merge, path) else value.T
    return parameter


def is_transposed(model: PreTrainedModel, path: str) -> bool:
    return type(model.get_submodule(path)).__name__ in TRANSPOSED


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
            is_parameter = ".experts." in name
            (model.get_parameter(name) if is_parameter else weight(model.get_submodule(name))).copy_(value)


def assert_equals_oracle(kind: str, folders: list[Path], out: Path, method: str) -> list[dict[str, torch.Tensor]]:
    """Assert that a merge equals the oracle; return the weights of the models and the merge, and the merge's tables."""
    a, b, found = (load64(folder).state_dict() for folder in (*folders, out))
    tables = {name: found[name] for name in found if TABLE.search(name)}
    expected = oracle(kind, folders, method, tables).state_dict()
    errors = {
        name: ((found[name] - value).norm() / ((a[name] - b[name]).norm() + 1e-12)).item()
        for name, value in expected.items()
        if value.is_floating_point()
    }
    assert max(errors.values()) <= 1e-5, {name: error for name, error in errors.items() if error > 1e-5}
    return [a, b, found, tables]


@pytest.mark.parametrize("method", SEQUENTIAL)
def test_experts_are_solved_in_turns_where_memory_is_short(
    method: str, pair: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = pair("gpt_oss")
    # Three experts' gate and up at a time; more of RegMean++, whose sums are smaller.
    monkeypatch.setattr("regmean.layerwise.sums.available_memory", lambda device: 2 * 16_000)
    out = merged(folders, tmp_path / "out", method, tokens_per_batch=64)
    assert_equals_oracle("gpt_oss", folders, out, method)
    (note,) = (note for note in read_json(out / "merge_report.json")["notes"] if "no model's texts reach" in note)
    assert f"averaged: {4 if method == 'regmean++' else 8} weights: " in note


@pytest.mark.parametrize("method", SEQUENTIAL)
@pytest.mark.parametrize("kind", KINDS)
def test_merge_equals_models_merged_group_by_group(kind: str, method: str, pair: Callable, tmp_path: Path) -> None:
    folders = pair(kind)
    out = merged(folders, tmp_path / "out", method)
    a, b, found, tables = assert_equals_oracle(kind, folders, out, method)
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
        embeddings="counts",
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


def as_words(flags: MergeFlags) -> list[str]:
    words = [
        "--method",
        flags.method,
        "--models",
        *flags.models,
        "--calibration",
        *flags.calibration,
        "--device",
        "cpu",
    ]
    words += ["--tokens_per_batch", str(flags.tokens_per_batch), "--alpha", str(ALPHA), "--dtype", flags.dtype]
    words += ["--embeddings", flags.embeddings]
    return [*words, "--output_dir", str(flags.output_dir)]


@pytest.mark.parametrize("method", SEQUENTIAL)
def test_two_ranks_merge_as_one_does(method: str, pair: Callable, tmp_path: Path) -> None:
    folders = pair("qwen3_moe")
    run_ranks(2, tmp_path, "merge_model.py", *as_words(merge_flags(folders, tmp_path / "two", method)))
    one = load_file(merged(folders, tmp_path / "one", method) / "model.safetensors")
    a, b = (load_file(folder / "model.safetensors") for folder in folders)
    for name, found in load_file(tmp_path / "two/model.safetensors").items():
        assert (found - one[name]).norm() <= 1e-5 * (a[name] - b[name]).norm(), name
    reports = [read_json(tmp_path / name / "merge_report.json") for name in ("one", "two")]
    if method == "regmean_asym":  # a sample of the batches, which each rank has others of, for the other method
        np.testing.assert_allclose(*(report["routing"]["mean"] for report in reports), rtol=1e-12)


class FirstOfTwo(Process):
    """The first rank of two, whose second has no texts; checks that others can read what it has written."""

    unsynced: ClassVar[set[Path]] = set()

    def barrier(self) -> None:
        assert not self.unsynced

    def gather(self, value: Any) -> list[Any]:
        return [value, value]

    def sum_(self, tensor: torch.Tensor) -> None:
        pass


def test_other_machines_read_what_the_first_rank_has_written(
    pair: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsynced, write, sync = FirstOfTwo.unsynced, TensorWriter.write, files.sync

    def record_write(self: TensorWriter, name: str, *args: Any) -> None:
        unsynced.add(self._infos[name].path)
        write(self, name, *args)

    def record_sync(path: Path) -> None:
        unsynced.discard(path)
        sync(path)

    monkeypatch.setattr(TensorWriter, "write", record_write)
    monkeypatch.setattr(files, "sync", record_sync)
    monkeypatch.setattr(CheckpointWriter, "close", lambda self: unsynced.clear())
    process = FirstOfTwo(0, 2, torch.device("cpu"))
    merge_layer_by_layer(merge_flags(pair("llama"), tmp_path / "out", "regmean_asym"), process, "command")


@pytest.mark.parametrize("method", ["grams", "avg", *SEQUENTIAL])
def test_too_little_memory_is_one_line(
    method: str, pair: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")

    monkeypatch.setattr(Course, "advance", fail)
    out, message = tmp_path / "out", "out of memory: take a smaller --tokens_per_batch, or --device cpu"
    if method == "avg":
        merge(merge_flags(pair("qwen3_moe"), out, method, embeddings=None), "command")
        assert read_json(out / "merge_report.json")["notes"][-1].endswith(message)
        return
    words = ["--config", f"{pair('llama')[0]}.yaml", "--device", "cpu", "--layerwise", "on", "--output_dir", str(out)]
    with pytest.raises(InputError, match=message):
        if method == "grams":
            compute_grams(parse_flags(GramFlags, words), start_process("cpu"))
        else:
            merged(pair("llama"), out, method)


@pytest.mark.parametrize("method", SEQUENTIAL)
def test_a_full_disk_is_one_line(method: str, pair: Callable, small_disk: Callable[[int, int], Path]) -> None:
    out = small_disk(16_000, 6_000) / "out"
    with pytest.raises(InputError, match=r"cannot write .*: (No space left on device|File too large)"):
        merged(pair("llama"), out, method)
    assert not out.exists()


KILLED = """
import os, signal, sys
from common.ranks import start_process
from common.cli import parse_flags
from common.errors import InputError
from common.io import read_json
from regmean.config import MergeFlags
from regmean.layerwise.model import LayerwiseModel
from regmean.layerwise.survey import survey
from regmean.layerwise.model import LayerwiseModel
from regmean.layerwise.merge import merge_layer_by_layer

left, forward = int(sys.argv[1]), LayerwiseModel.forward

def forward_or_die(self, *args):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, *args)

LayerwiseModel.forward = forward_or_die
merge_layer_by_layer(parse_flags(MergeFlags, sys.argv[2:]), start_process("cpu"), "command")
"""


@pytest.mark.parametrize(("method", "kind"), [("regmean++", "gemma3"), ("regmean_asym", "qwen3_moe")])
def test_a_merge_that_is_killed_twice_continues_to_the_same_bytes(
    method: str, kind: str, pair: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = pair(kind)
    counted = count_forwards(monkeypatch)
    whole = merged(folders, tmp_path / "whole", method, dtype="bfloat16")
    monkeypatch.undo()
    script, flags = tmp_path / "killed.py", merge_flags(folders, tmp_path / "out", method, dtype="bfloat16")
    script.write_text(KILLED)
    seed = random.randrange(1000)
    moments = random.Random(seed)
    # A run that continues makes fewer forward passes, but at least a sixth.
    for passes in (counted[0], counted[0] // 6):
        moment = moments.randrange(1, passes)
        killed = rank_processes(1, tmp_path, str(script), str(moment), *as_words(flags))
        killed[0].join(timeout=300)
        assert killed[0].exitcode == -9, (seed, (tmp_path / "output.txt").read_text())
        assert not (tmp_path / "out").exists()
    merge_layer_by_layer(flags, start_process("cpu"), "command")
    assert not (tmp_path / "out.steps").exists()
    assert (tmp_path / "out/model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes(), seed
    reports = [json.loads((folder / "merge_report.json").read_text()) for folder in (whole, tmp_path / "out")]
    assert reports[0]["layers"] == reports[1]["layers"]
    assert reports[0]["distances"] == reports[1]["distances"]
    assert reports[0].get("routing") == reports[1].get("routing")


def count_forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    count, forward = [0], LayerwiseModel.forward

    def counting(self: LayerwiseModel, *args: Any) -> Any:
        count[0] += 1
        return forward(self, *args)

    monkeypatch.setattr(LayerwiseModel, "forward", counting)
    return count


def test_distances_are_those_of_the_merged_and_the_own_states(pair: Callable, tmp_path: Path) -> None:
    folders = pair("llama")
    out = merged(folders, tmp_path / "out", "regmean_asym")
    distances = json.loads((out / "merge_report.json").read_text())["distances"]
    tokenizer = make_tokenizer()
    states = []
    for folder, texts in ((out, 0), (folders[0], 0), (out, 1), (folders[1], 1)):
        model = load64(folder)
        with torch.no_grad():
            ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS[texts]]
            outputs = [model.model(each, output_hidden_states=True).hidden_states for each in ids]
        # The last of these is after the norm.
        states.append([torch.cat([each[layer][0] for each in outputs]) for layer in range(2)])
    for layer in range(2):
        for index, (h, x) in enumerate((states[:2], states[2:])):
            expected = (h[layer] - x[layer]).norm() / x[layer].norm()
            assert distances[layer][index] == pytest.approx(expected.item(), rel=1e-4)
    assert len(distances) == 3
    assert "![distances](distances.png)" in (out / "README.md").read_text()
    assert (out / "distances.png").stat().st_size > 1000


@pytest.mark.parametrize("method", ["avg", "regmean_asym"])
def test_the_report_states_how_often_the_merge_routes_as_each_model(
    method: str, pair: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folders, out = pair("qwen3_moe"), tmp_path / "out"
    if method == "avg":
        flags = merge_flags(folders, out, method, embeddings=None)
        merge(replace(flags, calibration=[], tokens_per_batch=None, output_dir=str(tmp_path / "none")), "command")
        assert "note: the merge's routing is not compared with the models': --calibration" in capsys.readouterr().out
        merge(flags, "command")
    else:
        merged(folders, out, method, router=2)
        for layer in range(2):
            routers = [load64(of).get_parameter(f"model.layers.{layer}.mlp.gate.weight") for of in (out, folders[1])]
            assert torch.equal(*routers)
    found, expected = read_json(out / "merge_report.json")["routing"], []
    for layer in range(2):
        alike = []
        for folder, texts in zip(folders, TEXTS, strict=True):
            choices = []
            for model in (load64(out), load64(folder)):
                router = model.get_submodule(f"model.layers.{layer}.mlp.gate")
                choices.append((inputs_of(model, router, texts) @ router.weight.T).topk(2).indices.tolist())
            alike.append(np.mean([len({*a} & {*b}) / 2 for a, b in zip(*choices, strict=True)]))
        expected.append(alike)
    np.testing.assert_allclose(found["layers"], expected, rtol=1e-12)
    np.testing.assert_allclose(found["mean"], np.mean(expected, 0), rtol=1e-12)
    assert f"the merge chooses: {folders[0]} {found['mean'][0]:.1%}, " in (out / "README.md").read_text()


def test_bad_input_is_refused_before_the_first_layer(
    pair: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = pair("llama")
    monkeypatch.setattr(SequentialMerge, "run", None)

    def refused(match: str, change: Callable[[MergeFlags], MergeFlags]) -> None:
        with pytest.raises(InputError, match=match) as caught:
            merge_layer_by_layer(
                change(merge_flags(folders, tmp_path / "out", "regmean++")), start_process("cpu"), "command"
            )
        assert "\n" not in str(caught.value) or "these do not merge" in str(caught.value)
        assert not (tmp_path / "out").exists()

    with pytest.raises(InputError, match="--calibration takes one per model: 2, not 1"):
        MergeFlags(method="regmean++", models=["A", "B"], calibration=["math"])
    with pytest.raises(InputError, match="--offload_dir belongs to --calibration"):
        MergeFlags(method="avg", models=["A", "B"], offload_dir="states")
    with pytest.raises(InputError, match=r"--calibration: .*A has no experts"):
        merge(merge_flags(folders, tmp_path / "out", "avg", embeddings=None), "command")
    swapped = [f"{folder}.yaml" for folder in reversed(folders)]
    refused("is for the model .*B, not .*A", lambda flags: replace(flags, calibration=swapped))
    refused("no such file, and no preset", lambda flags: replace(flags, calibration=["maths", "code"]))

    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"question": None}) + "\n")
    (tmp_path / "empty.yaml").write_text(f"dataset: {empty}\nuser_column: question\n")
    refused("no row has any text", lambda flags: replace(flags, calibration=[str(tmp_path / "empty.yaml")] * 2))

    other = tmp_path / "other"
    shutil.copytree(folders[1], other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "other.yaml").write_text(Path(f"{folders[1]}.yaml").read_text().replace(f"model: {folders[1]}\n", ""))
    refused(
        "the same ids to different text",
        lambda flags: replace(
            flags,
            models=[str(folders[0]), str(other)],
            calibration=[f"{folders[0]}.yaml", str(tmp_path / "other.yaml")],
        ),
    )

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.posix_fallocate", full)
    refused("--offload_dir .*No space left", lambda flags: replace(flags, offload_dir=str(tmp_path / "states")))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_shard_size": "lots"}, "--max_shard_size lots"),
        ({"include": ["nothing"]}, "leave no tensor to merge"),
        ({"models": ["llama", "gpt2"]}, "model_type is 'llama' in .* and 'gpt2' in"),
    ],
)
def test_headers_are_compared_before_texts_are_read(
    options: dict[str, Any], match: str, pair: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = merge_flags(pair("llama"), tmp_path / "out", "regmean_asym")
    options = {
        key: [str(pair(kind)[0]) for kind in value] if key == "models" else value for key, value in options.items()
    }
    monkeypatch.setattr(MergeFlags, "texts", lambda self: [])
    monkeypatch.setattr("regmean.layerwise.merge.LayerwiseModels", None)
    with pytest.raises(InputError, match=match):
        merge_layer_by_layer(replace(flags, **options), start_process("cpu"), "command")


def test_a_merge_is_kept_where_its_routing_cannot_be_measured(
    pair: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise InputError("states after step 1 are NaN")

    monkeypatch.setattr("regmean.layerwise.models.advance", fail)
    merge(merge_flags(pair("qwen3_moe"), tmp_path / "out", "avg", embeddings=None), "command")
    note = "the routing of the merge is not compared with the models': states after step 1 are NaN"
    assert f"note: {note}" in capsys.readouterr().out
    report = read_json(tmp_path / "out/merge_report.json")
    assert note in report["notes"] and "routing" not in report
    # An error of one rank ends the measurement on all.
    opened = LayerwiseModels(*[None] * 7, SimpleNamespace(gather=lambda message: [message, "of rank 1"]))
    with pytest.raises(InputError, match="of rank 1"):
        opened._by_all(lambda: None)


def test_models_whose_layers_exchange_more_are_refused() -> None:
    config = transformers.Gemma3nTextConfig(
        vocab_size=96, vocab_size_per_layer_input=96, hidden_size=16, hidden_size_per_layer_input=8,
        intermediate_size=24, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, laurel_rank=4,
        activation_sparsity_pattern=None,
    )  # fmt: skip
    with pytest.raises(InputError, match="layer by layer") as caught:
        survey(AutoModelForCausalLM, config, "M")
    assert "\n" not in str(caught.value)


def test_compute_gram_takes_layers_one_by_one_where_the_model_does_not_fit(
    pair: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = pair("llama")[0]
    size = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    for name, free in (("fits", 10 * size), ("large", size + 1000)):
        monkeypatch.setattr("regmean.compute.available_memory", lambda device, free=free: free)
        words = ["--config", f"{folder}.yaml", "--device", "cpu", "--output_dir", str(tmp_path / name)]
        compute_grams(parse_flags(GramFlags, words), start_process("cpu"))
    printed = capsys.readouterr().out
    assert printed.count("distinct inputs") == printed.count("layers, one at a time") == 1
    assert (tmp_path / "large/gram.safetensors").exists()


@pytest.mark.parametrize(
    "kind", [kind if kind == "convbert" else pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS]
)
def test_every_kind_is_surveyed_or_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    """Grams layer by layer are those of the whole model, wherever a model can be run layer by layer."""
    folder = save(build(kind, 1), tmp_path / "A")
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[0]))
    files = []
    for layerwise in ("on", "off"):
        words = ["--model", str(folder), "--dataset", str(data), "--text_column", "text", "--device", "cpu"]
        words += ["--layerwise", layerwise, "--output_dir", str(tmp_path / layerwise), "--dtype", "float32"]
        try:
            compute_grams(parse_flags(GramFlags, words), start_process("cpu"))
        except InputError as error:
            assert layerwise == "on" and "layer by layer" in str(error) and "\n" not in str(error)
            pytest.skip(str(error))
        files.append(GramFile(tmp_path / layerwise / "gram.safetensors"))
    layers, whole = files
    assert layers.grams == whole.grams
    for name in whole.grams:
        expected = whole.read(name)
        assert np.linalg.norm(layers.read(name) - expected) <= 1e-5 * np.linalg.norm(expected), name
