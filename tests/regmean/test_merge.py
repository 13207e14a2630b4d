"""Merged model folders against plain implementations written here, and every refusal."""

import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import InputError
from common.io import read_json
from common.ranks import start_process
from regmean import average, comparison, regmean, solve
from regmean import merge as merge_module
from regmean.compute import compute_grams
from regmean.config import GramFlags, MergeFlags
from regmean.gram_file import FILE_NAME, GramFile, write_grams
from regmean.merge import array_bytes, merge
from regmean.model_folder import Checkpoint, CheckpointWriter, open_checkpoint
from regmean.tensor_file import STORAGE, decode
from tests.regmean.conftest import make_gpt2, make_llama, make_tokenizer

MODELS = {"llama": make_llama, "tied": lambda seed: make_llama(seed, tied=True), "gpt2": make_gpt2}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Path]]:
    """Folders of models of a kind, each with its Grams in `gram/`; made once, never changed."""
    root = tmp_path_factory.mktemp("library")

    def folders(kind: str, count: int = 2) -> list[Path]:
        made = []
        for seed in range(count):
            folder = root / f"{kind}{seed}"
            if not folder.exists():
                model = MODELS[kind](seed)
                with torch.no_grad():  # biases and norms start equal in every model
                    for parameter in model.parameters():
                        parameter.add_(0.05 * torch.randn_like(parameter))
                model.save_pretrained(folder)
                make_tokenizer().save_pretrained(folder)
                words = [" ".join(f"w{(seed + 3 * i + j * j) % 20}" for j in range(1 + i % 9)) for i in range(30)]
                (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
                flags = GramFlags(model=str(folder), dataset=str(root / "texts.jsonl"), text_column="text",
                                  output_dir=str(folder / "gram"), device="cpu")  # fmt: skip
                compute_grams(flags, start_process("cpu"))
            made.append(folder)
        return made

    return folders


def run(folders: list[Path], output: Path, method: str = "regmean", **options: Any) -> Path:
    grams = [str(folder / "gram") for folder in folders] if method == "regmean" else []
    # Embedding tables by token counts are in test_embeddings.py.
    settings = {"grams": grams, "embeddings": "average", "device": "cpu", "output_dir": str(output)} | options
    merge(MergeFlags(method=method, models=[str(folder) for folder in folders], **settings), "the command")
    return output


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def plain_regmean(folders: list[Path], alpha: float, model_weights: list[float]) -> dict[str, np.ndarray]:
    """RegMean as in the paper: float64, every tensor in memory, explicit inverse."""
    weights = [{name: t.double().numpy() for name, t in tensors(folder).items()} for folder in folders]
    grams: list[dict[str, np.ndarray]] = [{} for _ in folders]
    conv1d = False
    for folder, theirs in zip(folders, grams, strict=True):
        file = GramFile(folder / "gram" / FILE_NAME)
        for gram in file.grams.values():
            conv1d |= gram.conv1d
            mean = file.read(gram.name).astype(np.float64) / gram.tokens
            scaled = alpha * mean + (1 - alpha) * np.diag(np.diag(mean))
            theirs |= {f"{module}.weight": scaled for module in gram.modules}
    merged = {}
    for name in weights[0]:
        values = [theirs[name] for theirs in weights]
        if name in grams[0]:
            turned = [v if conv1d else v.T for v in values]
            total = sum(s * g[name] for s, g in zip(model_weights, grams, strict=True))
            right = sum(s * g[name] @ v for s, g, v in zip(model_weights, grams, turned, strict=True))
            solution = np.linalg.inv(total) @ right
            merged[name] = solution if conv1d else solution.T
        else:
            merged[name] = sum(s * v for s, v in zip(model_weights, values, strict=True))
    return merged


@pytest.mark.parametrize("kind", MODELS)
def test_avg_is_the_mean_bit_for_bit(library: Callable, tmp_path: Path, kind: str) -> None:
    folders = library(kind)
    a, b = (tensors(folder) for folder in folders)
    merged = tensors(run(folders, tmp_path / "out", "avg"))
    assert merged.keys() == a.keys()
    for name in a:
        assert torch.equal(merged[name], (a[name] + b[name]) / 2), name


def test_avg_of_three_weighted_models(library: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(average, "CHUNK_ELEMENTS", 100)
    folders = library("llama", 3)
    values = [tensors(folder) for folder in folders]
    merged = tensors(run(folders, tmp_path / "out", "avg", model_weights=[1.0, 2.0, 5.0]))
    for name in merged:
        plain = sum(t[name].double() * weight for t, weight in zip(values, (1 / 8, 2 / 8, 5 / 8), strict=True)).float()
        assert torch.equal(merged[name], plain), name


@pytest.mark.parametrize("models", [2, 3])
def test_systems_side_by_side_are_small_and_share_all_threads(models: int) -> None:
    some = 200 * [(576, 3072), (1536, 576)]
    assert regmean.systems_at_once(models, some, 1, threads=1) == 1
    assert regmean.systems_at_once(models, some, 1, threads=2) == 2
    assert regmean.systems_at_once(models, some[:1], 1, threads=64) == 1
    assert regmean.systems_at_once(models, [*some, (4096, 4096)], 1, threads=64) == 1
    assert regmean.systems_at_once(models, [], 1, threads=64) == 1
    for threads in (7, 12, 64):
        at_once = regmean.systems_at_once(models, some, 1, threads)
        assert threads % at_once == 0
        squares = 3 * 1536**2 * 4
        assert at_once * squares < regmean.SIDE_BY_SIDE_BYTES
    assert regmean.systems_at_once(models, 9 * [(64, 64)], 1, threads=8) == 8


def test_blocks_follow_the_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda": 16 * 10**9, "cpu": 128 * 10**9}
    monkeypatch.setattr(regmean, "available_memory", lambda device: free[device.type])
    plan = SimpleNamespace(models=[1, 2], groups=[SimpleNamespace(width=4096), SimpleNamespace(width=14336)])

    def elements(device: str) -> list[int]:
        method = regmean.RegMean(plan, {0.1: None, 0.9: None}, "cholesky", torch.device(device), lambda count: None)
        return method._elements(side_by_side=False)

    assert elements("cpu") == 2 * [solve.BLOCK_ELEMENTS]
    expected = [solve.gpu_block_elements(5, width, 2, free["cuda"], free["cpu"]) for width in (4096, 14336)]
    assert elements("cuda:0") == expected and solve.BLOCK_ELEMENTS < expected[1] < expected[0]


def test_the_memory_of_a_merge_on_a_gpu_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    systems = [(14336, 4096), (4096, 128256)]
    on_cpu, on_gpu = (array_bytes(2, systems, 1, device) for device in ("cpu", "cuda:1"))
    # The head in two blocks; seven squares of the widest layer with its whole weight; and the next block.
    assert on_gpu == max(4 * (7 * 4096**2 + 13 * (1 << 28)), 4 * (7 * 14336**2 + 13 * 14336 * 4096)) > on_cpu
    assert array_bytes(2, systems, 1) == on_cpu
    for available, expected in ((False, on_cpu), (True, on_gpu)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert array_bytes(2, systems, 1, "auto") == expected


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_the_mean_of_two_has_the_bits_of_a_sum_in_float64(dtype: str) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 16, (2, 40_000)).astype(np.uint16).view(STORAGE[dtype])
    edges = np.array([0x7F7F, 0x0001, 0x8000, 0xFF7F, 0x0080, 0x3F80], np.uint16).view(STORAGE[dtype])
    first, second = (
        np.concatenate([random, corners])
        for random, corners in zip(bits, (np.repeat(edges, 6), np.tile(edges, 6)), strict=True)
    )
    a, b = decode(first, dtype), decode(second, dtype)
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = a[finite], b[finite]
    expected = (0.5 * a.astype(np.float64) + 0.5 * b.astype(np.float64)).astype(np.float32)
    for start in range(0, len(a), 1000):  # sums beyond the range in some of the chunks only
        chunk = slice(start, start + 1000)
        mean = average.weighted_mean([a[chunk], b[chunk]], [0.5, 0.5], [dtype, dtype])
        np.testing.assert_array_equal(mean.view(np.uint32), expected[chunk].view(np.uint32))
        np.testing.assert_array_equal(average.weighted_mean([a[chunk]] * 2, [0.5, 0.5], [dtype] * 2), a[chunk])


def test_an_average_ends_soon_after_an_error(
    library: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(average, "CHUNK_ELEMENTS", 4)
    folders, mean, read = library("llama"), average.weighted_mean, []

    def spoilt(arrays: list[np.ndarray], *settings: list) -> np.ndarray:
        read.append(arrays)
        if len(read) == 1:
            raise InputError("a tensor of nonsense")
        time.sleep(0.01)
        return mean(arrays, *settings)

    monkeypatch.setattr(average, "weighted_mean", spoilt)
    with pytest.raises(InputError, match="a tensor of nonsense"):
        run(folders, tmp_path / "out", "avg")
    # Out of thousands.
    assert len(read) < 50
    assert not (tmp_path / "out").exists()


def test_small_systems_are_solved_side_by_side(
    library: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, threads, inside = library("llama"), torch.get_num_threads(), []
    written = CheckpointWriter.write

    def write(self: CheckpointWriter, name: str, *values: Any) -> None:
        inside.append((threading.current_thread().name.partition("_")[0], torch.get_num_threads()))
        written(self, name, *values)

    torch.set_num_threads(4)
    try:
        monkeypatch.setattr(regmean, "systems_at_once", lambda *sizes: 1)
        run(folders, tmp_path / "alone")
        monkeypatch.setattr(regmean, "systems_at_once", lambda *sizes: 2)
        monkeypatch.setattr(CheckpointWriter, "write", write)
        run(folders, tmp_path / "two")
        # PyTorch has one number of threads per process for new threads.
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 4
    finally:
        torch.set_num_threads(threads)
    assert ("solver", 2) in inside
    reports = [read_json(tmp_path / name / "merge_report.json")["layers"] for name in ("alone", "two")]
    assert [layer["tensors"] for layer in reports[0]] == [layer["tensors"] for layer in reports[1]]
    one, other = (tensors(tmp_path / name) for name in ("alone", "two"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("block", "at_once"), [(1, 3), (200, 1), (200, 3), (1 << 24, 1)])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_regmean_is_the_plain_implementation(
    library: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, count: int, block: int, at_once: int
) -> None:
    monkeypatch.setattr(solve, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(solve, "SIDE_BY_SIDE_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(regmean, "systems_at_once", lambda *sizes: min(at_once, torch.get_num_threads()))
    folders, weights = library(kind, count), {2: [0.25, 0.75], 3: [0.25, 0.25, 0.5]}[count]
    run(folders, tmp_path / "out", alpha=[0.1, 0.9], model_weights=[4 * weight for weight in weights])
    for alpha in (0.1, 0.9):
        merged = tensors(tmp_path / f"out_{alpha}")
        plain = plain_regmean(folders, alpha, weights)
        assert merged.keys() == plain.keys()
        for name, tensor in merged.items():
            np.testing.assert_allclose(tensor.numpy(), plain[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("solver", ["lstsq", "inverse"])
def test_the_other_solvers_agree(library: Callable, tmp_path: Path, solver: str) -> None:
    folders = library("llama")
    plain = plain_regmean(folders, 0.1, [0.5, 0.5])
    for name, tensor in tensors(run(folders, tmp_path / "out", solver=solver)).items():
        np.testing.assert_allclose(tensor.numpy(), plain[name], atol=2e-5, err_msg=name)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert all(layer["solver"].startswith(solver) for layer in report["layers"])


def test_published_grams_merge_as_ours_do(library: Callable, tmp_path: Path) -> None:
    folders = library("llama")
    published = []
    for folder in folders:
        file = GramFile(folder / "gram" / FILE_NAME)
        content = {
            module: torch.from_numpy(file.read(gram.name) / gram.tokens)
            for gram in file.grams.values()
            for module in gram.modules
        }
        published.append(tmp_path / f"{folder.name}.pkl")
        import pickle

        published[-1].write_bytes(pickle.dumps(content))
    ours = tensors(run(folders, tmp_path / "ours"))
    theirs = tensors(run(folders, tmp_path / "theirs", grams=[str(path) for path in published]))
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["avg", "regmean"])
def test_identical_models_merge_to_themselves(library: Callable, tmp_path: Path, method: str) -> None:
    folder = library("llama")[0]
    merged = tensors(run([folder] * 3, tmp_path / "out", method))
    for name, tensor in tensors(folder).items():
        assert torch.equal(merged[name], tensor), name


def test_merging_does_not_depend_on_the_order(library: Callable, tmp_path: Path) -> None:
    folders = library("llama", 3)
    for method in ("avg", "regmean"):
        forward = tensors(run(folders, tmp_path / f"forward_{method}", method))
        backward = tensors(run(folders[::-1], tmp_path / f"backward_{method}", method))
        for name in forward:
            torch.testing.assert_close(forward[name], backward[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_a_merge_is_a_whole_model(library: Callable, tmp_path: Path, kind: str) -> None:
    folders = library(kind)
    out = run(folders, tmp_path / "out", max_shard_size="4KB", alpha=[0.5], dtype="bfloat16")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == make_tokenizer().chat_template
    ids = tokenizer("w1 w2 w3", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 7)
    if kind == "tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight
    card = (out / "README.md").read_text()
    assert "base_model" not in card
    for line in (f"`{folders[0]}`", "- merge", "alpha 0.5", "the command", "texts.jsonl"):
        assert line in card
    report = json.loads((out / "merge_report.json").read_text())
    assert (report["alpha"], report["command"]) == (0.5, "the command")
    assert [gram["dataset"] for gram in report["grams"]] == [str(folders[0].parent / "texts.jsonl")] * 2
    solved = [name for layer in report["layers"] for name in layer["tensors"]]
    assert sorted(solved + report["averaged"]) == sorted(tensors(out))
    for layer in report["layers"]:
        objective = layer["objective"]
        assert layer["solver"] == "cholesky float32"
        assert 1 <= layer["condition"] < 1e4
        assert 0 <= objective["merged"] <= objective["mean"] <= max(objective["inputs"])


def test_bf16_is_rounded_once(library: Callable, tmp_path: Path) -> None:
    folders = library("llama")
    wide = tensors(run(folders, tmp_path / "wide", "avg"))
    narrow = tensors(run(folders, tmp_path / "narrow", "avg", dtype="bfloat16"))
    assert all(torch.equal(narrow[name], wide[name].bfloat16()) for name in wide)


def test_unselected_tensors_are_the_first_models(library: Callable, tmp_path: Path) -> None:
    folders = library("llama")
    a = tensors(folders[0])
    merged = tensors(run(folders, tmp_path / "out", include=["layers"], exclude=["layers.0", "norm"]))
    for name in a:
        assert torch.equal(merged[name], a[name]) == ("layers.1" not in name or "norm" in name), name


def changed_copy(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(folder, target)
    values = load_file(target / "model.safetensors")
    change(values)
    save_file(values, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_head_that_one_model_has_must_be_excluded(library: Callable, tmp_path: Path) -> None:
    a, b = library("llama")
    with_head = changed_copy(b, tmp_path / "head", lambda t: t.update({"score.weight": torch.zeros(3, 16)}))
    with pytest.raises(InputError, match=rf"score\.weight of {with_head} is missing in {a}; --exclude"):
        run([a, with_head], tmp_path / "out", "avg")
    assert "score.weight" not in tensors(run([a, with_head], tmp_path / "first", "avg", exclude=["^score"]))
    assert "score.weight" in tensors(run([with_head, a], tmp_path / "second", "avg", exclude=["^score"]))


def test_layers_without_a_gram_are_averaged_and_named(
    library: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folders = library("llama")
    source = GramFile(folders[1] / "gram" / FILE_NAME)
    some = [gram for gram in source.grams.values() if "down_proj" not in gram.name]
    write_grams(tmp_path / FILE_NAME, some, source.read, source.provenance)
    out = run(folders, tmp_path / "out", grams=[str(folders[0] / "gram"), str(tmp_path)])
    name = "model.layers.0.mlp.down_proj.weight"
    a, b, merged = (tensors(folder)[name] for folder in (*folders, out))
    assert torch.equal(merged, (a + b) / 2)
    assert name in json.loads((out / "merge_report.json").read_text())["averaged"]
    listed = "model.embed_tokens.weight, model.layers.*.mlp.down_proj.weight (2)"
    assert f"note: no Gram, averaged instead: {listed}" in capsys.readouterr().out


def test_checkpoints_without_the_base_models_prefix_find_their_grams(library: Callable, tmp_path: Path) -> None:
    folders = []
    for number, folder in enumerate(library("gpt2")):

        def strip(values: dict[str, torch.Tensor]) -> None:
            for name in list(values):
                values[name.removeprefix("transformer.")] = values.pop(name)

        folders.append(changed_copy(folder, tmp_path / str(number), strip))
        file = GramFile(folder / "gram" / FILE_NAME)
        # As in files of older versions: without tensors' names, and without Grams of tied heads.
        grams = [replace(gram, tensors=()) for gram in file.grams.values() if gram.name != "lm_head"]
        write_grams(folders[-1] / "gram" / FILE_NAME, grams, file.read, {})
    stripped = tensors(run(folders, tmp_path / "stripped"))
    whole = tensors(run(library("gpt2"), tmp_path / "whole"))
    assert all(torch.equal(stripped[name.removeprefix("transformer.")], whole[name]) for name in whole)


@pytest.mark.parametrize("method", ["avg", "regmean"])
def test_a_merge_killed_at_any_point_leaves_no_folder(
    library: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    write, lives = CheckpointWriter.write, 0

    def write_or_die(self: CheckpointWriter, *args: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        write(self, *args)

    monkeypatch.setattr(CheckpointWriter, "write", write_or_die)
    while True:
        left = lives
        try:
            run(library("llama"), tmp_path / "out", method, alpha=[0.1])
            break
        except KeyboardInterrupt:
            assert list(tmp_path.iterdir()) == []
            lives += 1
    assert lives == 21
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_while_the_report_is_written_leaves_no_folder(
    library: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(merge_module, "write_report", fail)
    with pytest.raises(InputError, match="cannot write .*disk full"):
        run(library("llama"), tmp_path / "out", alpha=[0.1, 0.9])
    assert list(tmp_path.iterdir()) == []


NORM, DOWN = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_vocabulary(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = load_file(folder / "model.safetensors")
        change(values)
        save_file(values, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def poison_gram(folder: Path) -> None:
    path = folder / "gram" / FILE_NAME
    content = bytearray(path.read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(content)


MISMATCHES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shape": (edit_tensors(lambda t: t.update({NORM: torch.ones(17)})), rf"tensor {NORM} is \[16\] in .*\[17\] in .*B"),
    "missing": (edit_tensors(lambda t: t.pop(DOWN)), rf"tensor {DOWN} of .* is missing in .*B"),
    "integers": (edit_tensors(lambda t: t.update({NORM: torch.ones(16).long()})), rf"{NORM} is F32 in .* I64 in .*B"),
    "nan": (edit_tensors(lambda t: t[DOWN].__setitem__((15, 2), torch.nan)), rf"B.*: tensor {DOWN} holds NaN"),
    "vocabulary": (edit_vocabulary, r"tokenizers of .* and .*B give the same ids to different text"),
    "vocabulary size": (lambda f: edit_json(f / "config.json", vocab_size=99), r"vocab_size is 32 in .* 99 in .*B"),
    "architecture": (lambda f: edit_json(f / "config.json", model_type="gpt2"), r"model_type is 'llama' .*'gpt2' in"),
    "tying": (edit_tensors(lambda t: t.pop("lm_head.weight")), r"tensor lm_head\.weight of .* is missing in .*B"),
    "heads": (lambda f: edit_json(f / "config.json", num_attention_heads=1), r"num_attention_heads is \d in .* 1 in"),
    "quantised": (lambda f: edit_json(f / "config.json", quantization_config={"bits": 4}), "B is quantised"),
    "truncated model": (lambda f: truncate(f / "model.safetensors"), r"B/model\.safetensors: .*download it again"),
    "truncated Gram": (lambda f: truncate(f / "gram" / FILE_NAME), r"B/gram/gram\.safetensors: .*download it again"),
    "nan Gram": (poison_gram, r"B/gram/gram\.safetensors: the Gram of .* holds NaN"),
    "no Gram": (lambda f: (f / "gram" / FILE_NAME).unlink(), r"B/gram: holds neither"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"B.* holds no model\.safetensors"),
    "outside": (
        lambda f: (
            (f / "model.safetensors").unlink(),
            (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}'),
        ),
        r"index\.json: '\.\./a\.safetensors' is not a file of ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISMATCHES)
def test_what_does_not_fit_is_refused_before_anything_is_written(library: Callable, tmp_path: Path, kind: str) -> None:
    a, b = library("llama")
    change, message = MISMATCHES[kind]
    copy = tmp_path / "B"
    shutil.copytree(b, copy)
    change(copy)
    with pytest.raises(InputError, match=message):
        run([a, copy], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["B"]


def test_every_difference_is_told_at_once(library: Callable, tmp_path: Path) -> None:
    a, b = library("llama")
    copy = tmp_path / "B"
    shutil.copytree(b, copy)
    edit_vocabulary(copy)
    edit_tensors(lambda t: t.update({NORM: torch.ones(17)}) or t.pop(DOWN))(copy)
    with pytest.raises(InputError) as error:
        run([a, copy], tmp_path / "out")
    assert all(text in str(error.value) for text in (NORM, DOWN, "tokenizers"))


def test_grams_of_another_model_are_refused(library: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = library("llama")
    with pytest.raises(InputError, match=rf"gram\.safetensors holds the Grams of {b}, not of {a}.*order of --models"):
        run([a, b], tmp_path / "out", grams=[str(b / "gram"), str(a / "gram")])
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "fingerprint", lambda _: "of weights that have changed")
        with pytest.raises(InputError, match=rf"the Grams of {a}, whose weights were others then: compute them again"):
            run([a, b], tmp_path / "out", grams=[str(a / "gram"), str(b / "gram")])
    other = library("gpt2")[0]
    with pytest.raises(InputError, match=r"has no layer transformer\.h\.0"):
        run([a, b], tmp_path / "out", grams=[str(a / "gram"), str(other / "gram")])
    assert list(tmp_path.iterdir()) == []


def test_a_gram_of_another_width_is_refused(library: Callable, tmp_path: Path) -> None:
    a, b = library("llama")
    source = GramFile(b / "gram" / FILE_NAME)
    gram = source.grams["model.layers.0.mlp.down_proj"]
    wrong = type(gram)(gram.name, gram.modules, gram.tokens, 16)
    write_grams(tmp_path / FILE_NAME, [wrong], lambda name: np.eye(16, dtype=np.float32), {})
    with pytest.raises(InputError, match=r"down_proj has width 16, its weight in .* is \[16, 24\]"):
        run([a, b], tmp_path / "out", grams=[str(a / "gram"), str(tmp_path)])


def test_renamed_added_tokens_are_noted(library: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = library("llama")
    copy = tmp_path / "B"
    shutil.copytree(b, copy)
    content = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(content.replace('"content": "<|user|>"', '"content": "<|human|>"'))
    run([a, copy], tmp_path / "out", "avg")
    assert "name 1 added tokens differently (4: '<|user|>', '<|human|>')" in capsys.readouterr().out


def test_other_positions_are_noted(library: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = library("llama")
    shutil.copytree(b, tmp_path / "B")
    edit_json(tmp_path / "B/config.json", rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    run([a, tmp_path / "B"], tmp_path / "out", "avg")
    assert re.search(r"note: rope_parameters is .* in .*B: the merge has that of ", capsys.readouterr().out)


def test_configs_of_several_years_are_compared_by_what_they_mean(tmp_path: Path) -> None:
    def compare(kind: str, first: dict[str, Any], second: dict[str, Any]) -> tuple[list[str], list[str]]:
        models = []
        for name, values in (("A", first), ("B", second)):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind} | values))
            models.append(Checkpoint(name, tmp_path / name, read_json(tmp_path / name / "config.json"), {}))
        problems: list[str] = []
        notes: list[str] = []
        comparison._compare_configs(*models, problems, problems, notes)
        return problems, notes

    # These do not concern the weights, and no config has to be loaded to decide this.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "_as_transformers_has_it", None)
        assert compare("llama", {"_name_or_path": "a", "eos_token_id": 2}, {"dtype": "bfloat16"}) == ([], [])
    theta = {"rope_theta": 5e5}
    assert compare("llama", theta, {"rope_parameters": theta | {"rope_type": "default"}}) == ([], [])
    linear = [{"rope_scaling": {kind: "linear", "factor": 2.0}} for kind in ("type", "rope_type")]
    assert compare("llama", *linear) == ([], [])
    assert compare("llama", {}, {"rms_norm_eps": 1e-6, "hidden_act": "silu"}) == ([], [])
    # The official releases of Gemma 1 name their activation differently from what transformers computes.
    assert compare("gemma", {"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}) == ([], [])
    _, notes = compare("mistral", {"sliding_window": 4096}, {"sliding_window": None})
    assert notes == ["sliding_window is 4096 in A and None in B: the merge has that of A"]
    _, notes = compare("llama", {}, theta)
    assert len(notes) == 1 and "500000.0" in notes[0]
    problems, _ = compare("gpt2", {"n_head": 12}, {"n_head": 8})
    assert problems == ["num_attention_heads is 12 in A and 8 in B"]
    problems, _ = compare("gemma2", {}, {"hidden_activation": "silu"})
    assert problems == ["hidden_activation is 'gelu_pytorch_tanh' in A and 'silu' in B"]
    problems, _ = compare("of-its-own-code", {"hidden_act": "silu"}, {"hidden_act": "relu"})
    assert problems == ["hidden_act is 'silu' in A and 'relu' in B"]


def test_of_two_forms_of_the_weights_the_one_that_transformers_reads(library: Callable, tmp_path: Path) -> None:
    a, _ = library("llama")
    copy = shutil.copytree(a, tmp_path / "A")
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "stale.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "stale.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(str(copy)).fingerprint() == open_checkpoint(str(a)).fingerprint()
    loaded = AutoModelForCausalLM.from_pretrained(copy)
    assert torch.equal(loaded.state_dict()[DOWN], load_file(a / "model.safetensors")[DOWN])


def test_a_value_that_the_output_cannot_hold_is_refused(library: Callable, tmp_path: Path) -> None:
    a, b = library("llama")
    big = changed_copy(b, tmp_path / "B", lambda t: t[NORM].fill_(1e6))
    with pytest.raises(InputError, match=rf"tensor {NORM}: .* does not fit F16; choose a wider --dtype"):
        run([a, big], tmp_path / "out", "avg", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_integer_tensors_must_agree(library: Callable, tmp_path: Path) -> None:
    a, b = library("llama")
    folders = [
        changed_copy(folder, tmp_path / name, lambda t, n=n: t.update({"steps": torch.arange(n, n + 4)}))
        for folder, name, n in ((a, "A", 0), (b, "B", 0), (b, "C", 1))
    ]
    assert tensors(run(folders[:2], tmp_path / "same", "avg"))["steps"].tolist() == [0, 1, 2, 3]
    with pytest.raises(InputError, match="steps of I64 differs between"):
        run(folders[1:], tmp_path / "other", "avg")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mean"}, "--method is one of avg, regmean"),
        ({"models": ["a"]}, "--models takes two or more"),
        ({"grams": ["a"]}, "--grams takes one per model: 2, not 1"),
        ({"method": "avg"}, "--grams belongs to --method regmean"),
        ({"alpha": [1.5]}, "--alpha must lie between"),
        ({"alpha": [0.1, 0.1]}, "--alpha names a value twice"),
        ({"alpha": [0.9999999, 1]}, "--alpha names a value twice"),
        ({"model_weights": [1.0]}, "--model_weights takes one per model"),
        ({"model_weights": [1.0, -1.0]}, "--model_weights must be positive"),
        ({"revisions": ["main"]}, "--revisions takes one per model"),
        ({"exclude": ["("]}, "--exclude '\\(': not a regular expression"),
        ({"solver": "qr"}, "--solver is"),
        ({"embeddings": "mean"}, "--embeddings is counts or average"),
        ({"method": "avg", "grams": [], "embeddings": "counts"}, "--embeddings counts belongs to --method regmean"),
        ({"dtype": "int8"}, "--dtype is one of"),
        ({"method": "regmean++", "grams": [], "calibration": ["math"], "plan": "h100"}, "--calibration takes one per"),
    ],
)
def test_flags_that_contradict_each_other_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MergeFlags(**{"method": "regmean", "models": ["a", "b"], "grams": ["a", "b"]} | options)


def test_output_folders_are_the_published_ones() -> None:
    def names(**options: Any) -> list[str]:
        flags = MergeFlags(models=["a", "b"], grams=["a", "b"] if options["method"] == "regmean" else [], **options)
        return [str(path) for path in flags.output_dirs()]

    assert names(method="avg") == ["runs/merges/avg"]
    assert names(method="regmean") == ["runs/merges/regmean_0.1"]
    assert names(method="regmean", alpha=[0.1, 1.0]) == ["runs/merges/regmean_0.1", "runs/merges/regmean_1"]
    assert names(method="regmean", alpha=[0.5], output_dir="x") == ["x"]
    assert names(method="regmean", alpha=[0.5, 0.9], output_dir="x") == ["x_0.5", "x_0.9"]


def test_bad_shard_sizes_and_empty_selections_are_named(library: Callable, tmp_path: Path) -> None:
    folders = library("llama")
    with pytest.raises(InputError, match="--max_shard_size lots"):
        run(folders, tmp_path / "out", "avg", max_shard_size="lots")
    with pytest.raises(InputError, match="leave no tensor"):
        run(folders, tmp_path / "out", "avg", include=["nothing"])
    with pytest.raises(InputError, match="none of the selected tensors has a Gram"):
        run(folders, tmp_path / "out", include=["embed"])
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_exists_is_refused_before_models_are_read(
    library: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out_0.9").mkdir()
    monkeypatch.setattr(merge_module, "open_models", None)
    with pytest.raises(InputError, match=r"out_0\.9 exists already"):
        run(library("llama"), tmp_path / "out", alpha=[0.1, 0.9])


def test_a_gpu_that_is_too_small_is_one_line(
    library: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")

    monkeypatch.setattr(regmean.RegMean, "_write_group", fail)
    with pytest.raises(InputError, match="out of memory: take --device cpu, or"):
        run(library("llama"), tmp_path / "out")


def test_a_full_disk_leaves_no_folder(
    library: Callable, tmp_path: Path, small_disk: Callable[[int, int], Path]
) -> None:
    disk = small_disk(14_000, 10_000)
    with pytest.raises(InputError, match=r"cannot write .*merged: (No space left on device|File too large)"):
        run(library("llama"), disk / "merged", "avg")
    assert list(disk.iterdir()) == []
