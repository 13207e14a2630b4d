"""Grams against float64 sums over the inputs of one example at a time, through whole unpadded forward passes."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from benchmarks.published_regmean import published_grams
from common.errors import InputError, Stopped
from common.ranks import start_process
from regmean import compute as compute_module
from regmean import gram as gram_module
from regmean.batch_runner import BatchRunner
from regmean.compute import compute_grams, plan_passes
from regmean.config import GramFlags, MergeFlags
from regmean.gram_file import FILE_NAME, GramFile
from regmean.hooks import LinearInputs, linear_layers
from regmean.merge import merge
from tests.mindmerger.scripts import run_ranks
from tests.regmean import folders
from tests.regmean.conftest import make_gpt2, make_llama, make_tokenizer

REPOSITORY = Path(__file__).parents[2]
MIXTURE_BYTES = 10_000  # room for about half of the sums of a mixture


class Experts(nn.Module):
    """A mixture of three experts with linear layers; the last gets only tokens 7, the second none."""

    def __init__(self, width: int):
        super().__init__()
        self.router = nn.Linear(width, 3)
        self.gate = nn.ModuleList(nn.Linear(width, 8) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(width, 8) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(8, width) for _ in range(3))
        self.ids = torch.empty(0)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        rows = states.reshape(-1, states.shape[-1])
        weight = self.router(rows).softmax(-1)
        choice = 2 * (self.ids.reshape(-1) == 7)
        out = torch.zeros_like(rows)
        for expert in range(3):
            mine = (choice == expert).nonzero().flatten()
            if len(mine):
                x = rows[mine]
                x = self.down[expert](self.gate[expert](x).relu() * self.up[expert](x))
                out[mine] = x * weight[mine, expert : expert + 1]
        return out.reshape(states.shape)


def make_experts() -> PreTrainedModel:
    model = make_llama()
    torch.manual_seed(5)
    for layer in model.model.layers:
        layer.mlp = Experts(16)
    model.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: [setattr(layer.mlp, "ids", args[0]) for layer in model.model.layers] and None
    )
    return model.eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": make_llama,
    "tied": lambda: make_llama(tied=True),
    "gpt2": make_gpt2,
    "experts": make_experts,
}


@torch.no_grad()
def oracle(model: PreTrainedModel, texts: Path) -> dict[str, tuple[np.ndarray, int]]:
    """X^T X in float64 and number of rows of every linear layer's input."""
    inputs: dict[str, list[np.ndarray]] = {}
    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: inputs.setdefault(name, []).append(
                args[0].reshape(-1, args[0].shape[-1]).double().numpy()
            )
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    tokenizer = make_tokenizer()
    for line in texts.read_text().splitlines():
        model(torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]]))
    for handle in handles:
        handle.remove()
    rows = {name: np.concatenate(parts) for name, parts in inputs.items()}
    return {name: (x.T @ x, len(x)) for name, x in rows.items()}


@pytest.fixture
def compute(save: Callable, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., GramFile]:
    """Compute the Grams of a named model in this process."""

    def compute_for(name: str, output: str = "gram", snapshot_seconds: float = 1e9, **options: Any) -> GramFile:
        folder = tmp_path / name
        if not folder.exists():
            save(MODELS[name](), name)
        if name == "experts":
            loaded = make_experts()
            monkeypatch.setattr("regmean.architectures.load_model", lambda *a, **k: loaded)
        # Several passes, where memory is short; layers one by one are tested in test_sequential.py.
        settings = {"dataset": str(texts), "text_column": "text", "device": "cpu", "layerwise": "off"} | options
        flags = GramFlags(model=str(folder), output_dir=str(tmp_path / output), **settings)
        compute_grams(flags, start_process("cpu"), snapshot_seconds)
        return GramFile(tmp_path / output / "gram.safetensors")

    return compute_for


def assert_close(file: GramFile, expected: dict[str, tuple[np.ndarray, int]], tolerance: float = 1e-6) -> None:
    for gram in file.grams.values():
        for module in gram.modules:
            total, rows = expected[module]
            assert gram.tokens == rows, module
            error = np.linalg.norm(file.read(gram.name) - total) / np.linalg.norm(total)
            assert error < tolerance, (module, error)


def same_bits(a: GramFile, b: GramFile) -> bool:
    counts = [{name: counts.values.tolist() for name, counts in file.counts.items()} for file in (a, b)]
    same = a.grams == b.grams and counts[0] == counts[1] and counts[0]
    return bool(same) and all(np.array_equal(a.read(name), b.read(name)) for name in a.grams)


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 10_000])
@pytest.mark.parametrize("name", MODELS)
def test_a_gram_is_the_sum_over_real_tokens(name: str, tokens_per_batch: int, compute: Callable, texts: Path) -> None:
    file = compute(name, tokens_per_batch=tokens_per_batch)
    expected = oracle(MODELS[name](), texts)
    assert {module for gram in file.grams.values() for module in gram.modules} == set(expected)
    assert_close(file, expected)


@pytest.mark.parametrize("one_length", [True, False])
def test_the_published_grams_differ_in_padding_alone(one_length: bool, compute: Callable, texts: Path) -> None:
    if one_length:
        words = [json.loads(line)["text"].split() for line in texts.read_text().splitlines()]
        rows = [{"text": " ".join((words[n] * 20)[:12])} for n in range(len(words))]
        texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = compute("llama")
    lines = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    published = published_grams(make_llama(), make_tokenizer(), lines, max_length=256)
    assert set(published) == {module for gram in file.grams.values() for module in gram.modules}
    for gram in file.grams.values():
        ours = torch.from_numpy(file.read(gram.name)) / gram.tokens
        for module in gram.modules:
            difference = (published[module] - ours).norm() / ours.norm()
            assert (difference < 1e-5) == one_length, (module, difference)


def sharing(file: GramFile, *modules: str) -> list[set[str]]:
    """Groups that share a Gram, restricted to the named modules."""
    groups = [set(gram.modules) & set(modules) for gram in file.grams.values()]
    return sorted((group for group in groups if group), key=sorted)


def test_layers_that_read_one_tensor_share_a_gram(compute: Callable) -> None:
    layer = "model.layers.1."
    names = [layer + name for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                                       "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]  # fmt: skip
    assert sharing(compute("llama"), *names, "lm_head") == sorted(
        [set(names[:3]), {names[3]}, set(names[4:6]), {names[6]}, {"lm_head"}], key=sorted
    )
    experts = compute("experts", output="experts_gram")
    mlp = "model.layers.0.mlp."
    assert sharing(experts, mlp + "gate.0", mlp + "up.0", mlp + "down.0") == [
        {mlp + "down.0"},
        {mlp + "gate.0", mlp + "up.0"},
    ]
    covered = {module for gram in experts.grams.values() for module in gram.modules}
    assert mlp + "gate.2" in covered
    assert mlp + "gate.1" not in covered


def test_conv1d_layers_are_marked(compute: Callable) -> None:
    grams = compute("gpt2").grams
    assert {name for name, gram in grams.items() if not gram.conv1d} == {"lm_head"}
    assert grams["transformer.h.0.mlp.c_proj"].width == 64


def test_another_tensor_at_the_same_address_is_another_input() -> None:
    class Reuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(1000, 1) for _ in range(8))
            self.addresses: set[int] = set()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> None:
            for factor, layer in enumerate(self.layers):
                x = torch.full((1, 1, 1000), float(factor))
                self.addresses.add(x.data_ptr())
                layer(input=x)
                del x

    model, received = Reuses(), []
    layers = dict(model.layers.named_children())
    with LinearInputs(layers, None, lambda name, x: received.append((name, x[0, 0].item()))) as inputs:
        inputs.run(model, torch.zeros(1, 1), torch.ones(1, 1))
    assert len(model.addresses) < len(layers), "the allocator did not use an address again, so this showed nothing"
    assert received == [(str(factor), float(factor)) for factor in range(8)]


def test_order_and_padding_side_do_not_matter(compute: Callable, texts: Path, tmp_path: Path) -> None:
    plain = compute("llama", tokens_per_batch=60)
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path / "llama")
    assert same_bits(plain, compute("llama", output="right", tokens_per_batch=60))
    lines = texts.read_text().splitlines(keepends=True)
    (tmp_path / "reversed.jsonl").write_text("".join(reversed(lines)))
    other = compute("llama", output="reversed", tokens_per_batch=60, dataset=str(tmp_path / "reversed.jsonl"))
    assert_close(other, {name: (plain.read(name), gram.tokens) for name, gram in plain.grams.items()
                         for name in [gram.name]} | oracle(make_llama(), texts))  # fmt: skip


def test_a_model_that_is_not_whole_is_refused(save: Callable, texts: Path, tmp_path: Path) -> None:
    folder = save(make_llama(), "halved")
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    options = {"dataset": str(texts), "text_column": "text", "output_dir": str(tmp_path / "gram"), "device": "cpu"}
    with pytest.raises(InputError, match=r"lacks weights of LlamaForCausalLM.*model\.norm\.weight"):
        compute_grams(GramFlags(model=str(folder), **options), start_process("cpu"))


def test_a_model_without_a_head_has_grams_of_all_that_it_has(
    save: Callable, texts: Path, tmp_path: Path, compute: Callable
) -> None:
    """Such models merge, too, without a random head."""
    folder = save(make_llama().model, "base")
    options = {"dataset": str(texts), "text_column": "text", "output_dir": str(folder), "device": "cpu"}
    compute_grams(GramFlags(model=str(folder), **options), start_process("cpu"))
    file, whole = GramFile(folder / FILE_NAME), compute("llama")
    assert file.grams.keys() == whole.grams.keys() - {"lm_head"}
    for name in file.grams:
        np.testing.assert_array_equal(file.read(name), whole.read(name))
    models, out = [str(folder)] * 2, str(tmp_path / "merged")
    merge(MergeFlags(method="regmean", models=models, grams=models, device="cpu", output_dir=out), "")
    merged, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", folder))
    assert merged.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(merged[name], tensor)


def test_sums_of_two_data_sets_add(compute: Callable, texts: Path, tmp_path: Path) -> None:
    lines = texts.read_text().splitlines(keepends=True)
    files = []
    for name, part in (("a", lines[:15]), ("b", lines[15:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
        files.append(compute("llama", output=name, dataset=str(tmp_path / f"{name}.jsonl")))
    whole = compute("llama")
    for name, gram in whole.grams.items():
        assert gram.tokens == sum(file.grams[name].tokens for file in files)
        np.testing.assert_allclose(sum(file.read(name) for file in files), whole.read(name), rtol=1e-4, atol=1e-5)


def test_no_logits_are_computed(compute: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    monkeypatch.setattr("regmean.architectures.load_model", lambda *args, **options: model)
    products: list[tuple] = []
    model.lm_head.register_forward_hook(lambda module, args, output: products.append(output.shape))
    file = compute("llama")
    assert products == []
    assert "lm_head" in file.grams


def test_hooks_are_removed_whatever_happens() -> None:
    model = make_llama()

    def fail(name: str, x: torch.Tensor) -> None:
        raise RuntimeError("in the middle")

    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(RuntimeError, match="middle"), LinearInputs(linear_layers(model), model.lm_head, fail) as inputs:
        inputs.run(model, ids, ids)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model(ids).logits.shape == (1, 3, 32)


def test_layers_are_done_in_passes_where_memory_is_short(
    compute: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole = compute("llama", tokens_per_batch=60)
    assert ": 1 pass," in capsys.readouterr().out
    monkeypatch.setattr(compute_module, "available_memory", lambda device: 5000)
    alive: WeakSet[gram_module.GramSums] = WeakSet()

    class OneAtATime(gram_module.GramSums):
        def __init__(self) -> None:
            assert not alive
            super().__init__()
            alive.add(self)

    monkeypatch.setattr(compute_module, "GramSums", OneAtATime)
    parts = compute("llama", output="passes", tokens_per_batch=60)
    assert "passes," in capsys.readouterr().out
    assert same_bits(whole, parts)
    monkeypatch.setattr(compute_module, "available_memory", lambda device: 2000)
    with pytest.raises(InputError, match=r"widest layer \(24 features\) needs"):
        compute("llama", output="none")


def test_a_forward_pass_ends_where_nothing_more_is_read(compute: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exceptions are the pass that finds tables, the probe's five, and the first of each pass over the texts, which
    find the last layer.
    """
    computed: Counter[str] = Counter()

    def load(*args: Any, **options: Any) -> PreTrainedModel:
        computed.clear()
        model = make_llama(tied=True)
        first, second = model.model.layers
        for name, layer in {"first": first.self_attn.q_proj, "second": second.self_attn.q_proj,
                            "last": second.mlp.down_proj}.items():  # fmt: skip
            layer.register_forward_hook(lambda *_, name=name: computed.update([name]))
        return model

    monkeypatch.setattr("regmean.architectures.load_model", load)
    whole = compute("tied", tokens_per_batch=60)
    batches = computed["first"] - 6
    assert batches > 1
    assert computed == {"first": 6 + batches, "second": 6 + batches, "last": 6 + batches}
    # Three passes, which end at the first layer's MLP, the second's attention, and the head.
    monkeypatch.setattr(compute_module, "available_memory", lambda device: 5000)
    assert same_bits(whole, compute("tied", output="passes", tokens_per_batch=60))
    assert computed == {"first": 6 + 3 * batches, "second": 6 + 1 + 2 * batches, "last": 6 + 2 + batches}


@pytest.fixture
def limit_sums(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that lets memory run out if sums exceed its bytes; the probe's sums are not counted."""

    def limit(memory: int) -> None:
        alive: WeakSet[gram_module.GramSums] = WeakSet()

        class Limited(gram_module.GramSums):
            def __init__(self) -> None:
                # Sums of a failed pass are freed, too.
                assert not any(sums.totals for sums in alive)
                super().__init__()
                alive.add(self)

            def add(self, name: str, rows: torch.Tensor) -> None:
                sizes = {name: 4 * len(total) ** 2 for name, total in self.totals.items()}
                if sum((sizes | {name: 4 * rows.shape[1] ** 2}).values()) > memory:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
                super().add(name, rows)

        monkeypatch.setattr(compute_module, "GramSums", Limited)

    return limit


def test_a_pass_that_does_not_fit_is_cut_in_two_for_good(
    compute: Callable,
    monkeypatch: pytest.MonkeyPatch,
    limit_sums: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    whole = compute("llama", output="whole", tokens_per_batch=60)
    # Of 11,776 bytes, cut to at most 5,888, and again.
    limit_sums(5000)
    run, left = BatchRunner._run, 20

    def run_or_die(self: BatchRunner, batch: list[int]) -> None:
        nonlocal left
        run(self, batch)
        left -= 1
        if left == 0:
            raise Killed

    monkeypatch.setattr(BatchRunner, "_run", run_or_die)
    with pytest.raises(Killed):
        compute("llama", tokens_per_batch=60, snapshot_seconds=0)
    assert capsys.readouterr().out.count("out of memory with one example at once: pass 1 becomes 3 passes") == 2
    limit_sums(5000)  # restarts the count: the traceback above holds sums
    parts = compute("llama", tokens_per_batch=60, snapshot_seconds=0)
    printed = capsys.readouterr().out
    # The second of the three fails only now; failed passes are not tried again.
    assert "continuing after" in printed and "pass 4 becomes 3 passes" in printed and "pass 1 becomes" not in printed
    assert parts.grams == whole.grams and same_bits(whole, parts)
    assert [path.name for path in (tmp_path / "gram").iterdir()] == ["gram.safetensors"]


def test_one_sum_that_does_not_fit_is_told(compute: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(BatchRunner, "_run", fail)
    with pytest.raises(
        InputError, match=r"out of memory with the sum of one layer \(16 features\) and one example; take"
    ):
        compute("llama", tokens_per_batch=60)


def test_a_model_that_does_not_run_at_all_is_told(compute: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(LinearInputs, "run", fail)
    with pytest.raises(InputError, match="out of memory with the model and one example; take a larger --device"):
        compute("llama")
    monkeypatch.setattr(PreTrainedModel, "to", fail)
    with pytest.raises(InputError, match="out of memory with the model; take a larger --device"):
        compute("llama")


def test_the_memory_of_a_batch_is_left_free(
    compute: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Memory that a GPU's probe measures for one example is scaled to the tokens of a batch."""
    monkeypatch.setattr(compute_module, "available_memory", lambda device: 14_000)
    probed = []

    def measure(device: torch.device, run: Callable[[], None]) -> int:
        run()
        probed.append(device)
        return 200

    compute("llama", tokens_per_batch=60)
    assert ": 1 pass," in capsys.readouterr().out
    monkeypatch.setattr(compute_module, "peak_bytes", measure)
    whole = compute("llama", output="measured", tokens_per_batch=60)
    # Examples of up to 21 tokens: 14000 - 1.15 * 200 * 60 / 21 = 13343; below 11776 are 14000 - 1.15 * 200 * 10.
    assert ": 1 pass," in capsys.readouterr().out
    assert same_bits(whole, compute("llama", output="larger", tokens_per_batch=210)) is False
    assert ": 2 passes," in capsys.readouterr().out
    assert probed == 2 * [torch.device("cpu")]


def test_a_batch_is_measured_where_pytorch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    device, held = torch.device("cuda:1"), [700, 900]

    def of_device(value: int) -> Callable[[torch.device], int]:
        return lambda given: held[value] if given == device else pytest.fail(f"of {given}")

    assert compute_module.peak_bytes(torch.device("cpu"), lambda: pytest.fail("nothing is measured on a CPU")) == 0
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda given: held.__setitem__(1, held[0]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", of_device(0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", of_device(1))
    assert compute_module.peak_bytes(device, lambda: held.__setitem__(1, 1200)) == 500


def test_memory_for_sums_leaves_a_tenth_or_a_batch_and_room_for_libraries() -> None:
    memory = compute_module.memory_for_sums
    assert memory(5000, 0, "cpu") == 4500
    assert memory(5000, 1000, "cpu") == 3850
    # Llama-3-8B on 24 GB, whose batches of 8192 tokens take 1.0 GB; and a large card.
    assert memory(9_800_000_000, 1e9, "cuda") == 8_150_000_000
    assert memory(120_000_000_000, 1e9, "cuda") == 107_500_000_000
    assert memory(400_000_000, 0, "cuda") == 0


def test_passes_fit_and_keep_sharing_layers_together() -> None:
    inputs, widths = [["q", "k"], ["o"], ["gate", "up"], ["down"]], [10, 10, 10, 20]
    # The widest sum takes 1600 bytes; a narrow one takes 400.
    assert plan_passes(inputs, widths, 2800) == [["q", "k", "o", "gate", "up", "down"]]
    assert plan_passes(inputs, widths, 2799) == [["q", "k", "o", "gate", "up"], ["down"]]
    assert plan_passes(inputs, widths, 1600) == [["q", "k", "o", "gate", "up"], ["down"]]
    with pytest.raises(InputError, match="widest layer"):
        plan_passes(inputs, widths, 1599)


@pytest.mark.parametrize(("panel", "width"), [(1, 13), (5, 13), (512, 13), (512, 400)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_added_below_the_diagonal(
    monkeypatch: pytest.MonkeyPatch, panel: int, width: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(gram_module, "PANEL", panel)
    rows = torch.randn(9, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    total = torch.ones(width, width)
    gram_module.add_products(total, rows)
    expected = 1 + rows.double().numpy().T @ rows.double().numpy()
    np.testing.assert_allclose(np.tril(total.numpy()), np.tril(expected), rtol=1e-5, atol=1e-5)


def test_half_precision_products_are_summed_in_float32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has no float32 product of half-precision matrices, so a substitute computes it from the same arguments."""
    calls = []

    def mm(input: torch.Tensor, mat2: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
        assert input.ndim == mat2.ndim == 2 and input.shape[1] == mat2.shape[0]
        assert input.dtype == mat2.dtype and input.dtype in (torch.bfloat16, torch.float16)
        assert out_dtype == torch.float32
        calls.append(input.dtype)
        return (input.double() @ mat2.double()).float()

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(gram_module, "_is_widened", lambda rows: False)
    monkeypatch.setattr(gram_module, "_panel_rows_on", lambda device, width: 5)
    for dtype in (torch.bfloat16, torch.float16):
        rows = torch.randn(9, 13, generator=torch.Generator().manual_seed(0)).to(dtype)
        total = torch.ones(13, 13)
        gram_module.add_products(total, rows)
        expected = 1 + rows.double().numpy().T @ rows.double().numpy()
        np.testing.assert_allclose(np.tril(total.numpy()), np.tril(expected), rtol=1e-6, atol=1e-6)
    assert calls == 3 * [torch.bfloat16] + 3 * [torch.float16]


@pytest.mark.parametrize(
    ("width", "multiprocessors", "rows"),
    # An H200, an A100, an A40; a narrow sum is one panel.
    [(4096, 132, 2048), (14336, 132, 2048), (4096, 108, 1024), (4096, 84, 1024), (512, 132, 512)],
)
def test_panels_fill_the_multiprocessors_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, width: int, multiprocessors: int, rows: int
) -> None:
    assert gram_module.panel_rows(width, multiprocessors) == rows
    asked = []
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: asked.append(device) or SimpleNamespace(multi_processor_count=multiprocessors),
    )
    assert gram_module._panel_rows_on(torch.device("cuda:1"), width) == rows
    assert asked == [torch.device("cuda:1")]


class Killed(BaseException):
    pass


def test_a_signal_leaves_a_snapshot_and_damage_to_it_is_found(
    compute: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = compute("llama", output="whole", tokens_per_batch=30)
    run, calls = LinearInputs.run, []

    def run_and_signal(self: LinearInputs, *args: Any) -> None:
        calls.append(1)
        if len(calls) in (8, 13):
            os.kill(os.getpid(), signal.SIGTERM)
        run(self, *args)

    monkeypatch.setattr(LinearInputs, "run", run_and_signal)
    # The first run also probes, with five calls.
    for done in (3, 8):
        with pytest.raises(Stopped, match=f"SIGTERM after {done} of .* batches"):
            compute("llama", tokens_per_batch=30)
    snapshots = tmp_path / "gram/gram.partial/pass0-rank0"
    sums = snapshots / "step_8/sums.safetensors"
    content = bytearray(sums.read_bytes())
    content[-1] ^= 1
    sums.write_bytes(content)
    monkeypatch.setattr(LinearInputs, "run", run)
    assert same_bits(whole, compute("llama", tokens_per_batch=30))
    printed = capsys.readouterr().out
    assert "step_8 is damaged" in printed and "continuing after 3 of" in printed


def test_a_gram_that_is_there_is_replaced_when_told_to(compute: Callable, tmp_path: Path) -> None:
    compute("llama", tokens_per_batch=30)
    with pytest.raises(InputError, match=r"gram\.safetensors exists already: --overwrite it"):
        compute("llama", tokens_per_batch=30, num_examples=4)
    assert compute("llama", num_examples=4, overwrite=True).provenance["examples"] == 4


@pytest.mark.parametrize("memory", [10**9, 5000])
def test_a_run_that_was_cut_short_ends_with_the_same_gram(
    compute: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, memory: int
) -> None:
    monkeypatch.setattr(compute_module, "available_memory", lambda device: memory)
    whole = compute("experts", output="whole", tokens_per_batch=30)
    run, calls = LinearInputs.run, 0
    lives = [3, 1, 9, 14]

    def run_or_die(self: LinearInputs, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if lives and calls > lives[0]:
            lives.pop(0)
            calls = 0
            raise Killed
        run(self, *args)

    monkeypatch.setattr(LinearInputs, "run", run_or_die)
    for _ in range(4):
        with pytest.raises(Killed):
            compute("experts", tokens_per_batch=30, snapshot_seconds=0)
        partial = tmp_path / "gram/gram.partial"
        assert not any((partial / f"{part.stem}-rank0").exists() for part in partial.glob("pass*.safetensors"))
        assert not (tmp_path / "gram" / "gram.safetensors").exists()
    other = pytest.raises(InputError, match=r"another run .examples was .*, now .*--overwrite")
    with other, monkeypatch.context() as patch:
        patch.setattr(compute_module, "load_updated", folders.unread)
        compute("experts", tokens_per_batch=30, num_examples=39)
    assert same_bits(whole, compute("experts", tokens_per_batch=30))
    assert [path.name for path in (tmp_path / "gram").iterdir()] == ["gram.safetensors"]


@pytest.mark.parametrize(("tokens_per_batch", "same"), [(1, False), (11, False), (30, True), (500, True)])
def test_another_batch_size_continues_the_run(
    compute: Callable, monkeypatch: pytest.MonkeyPatch, tokens_per_batch: int, same: bool
) -> None:
    """With a smaller size, the rest runs in smaller batches, with a larger one as before."""
    whole = compute("llama", output="whole", tokens_per_batch=30)
    run, shapes, left = LinearInputs.run, [], 7

    def run_or_die(self: LinearInputs, model: nn.Module, ids: torch.Tensor, *args: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        shapes.append(ids.shape)
        run(self, model, ids, *args)

    monkeypatch.setattr(LinearInputs, "run", run_or_die)
    with pytest.raises(Killed):
        compute("llama", tokens_per_batch=30, snapshot_seconds=0)
    shapes.clear()
    continued = compute("llama", tokens_per_batch=tokens_per_batch)
    assert shapes and all(shape[0] == 1 or shape.numel() <= tokens_per_batch for shape in shapes)
    assert continued.grams == whole.grams and same_bits(whole, continued) == same
    assert_close(continued, oracle_of(whole))


def oracle_of(file: GramFile) -> dict[str, tuple[np.ndarray, int]]:
    return {name: (file.read(gram.name), gram.tokens) for gram in file.grams.values() for name in gram.modules}


def script(words: list[str], **environment: str) -> subprocess.CompletedProcess:
    environment = dict(os.environ) | {"PYTHONPATH": str(REPOSITORY)} | environment
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120)


def test_sigkill_loses_nothing_but_the_last_batches(
    compute: Callable, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixture whose experts take several passes, killed in the second."""
    folders.save(folders.build("qwen3_moe"), tmp_path / "mixture")
    monkeypatch.setattr(compute_module, "available_memory", lambda device: MIXTURE_BYTES)
    whole = compute("mixture", output="whole", tokens_per_batch=30)
    killing = f"""
import os, signal
from pathlib import Path
from common.ranks import start_process
from regmean import compute
from regmean.config import GramFlags
run = compute.LinearInputs.run
def run_or_die(self, *args):
    if Path({str(tmp_path / "gram" / "gram.partial" / "pass1-rank0")!r}).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    run(self, *args)
compute.LinearInputs.run = run_or_die
compute.available_memory = lambda device: {MIXTURE_BYTES}
flags = GramFlags(model={str(tmp_path / "mixture")!r}, dataset={str(texts)!r}, text_column="text", tokens_per_batch=30,
                  output_dir={str(tmp_path / "gram")!r}, device="cpu", layerwise="off")
compute.compute_grams(flags, start_process("cpu"), snapshot_seconds=0.0)
"""
    assert script(["-c", killing]).returncode == -9
    assert (tmp_path / "gram" / "gram.partial" / "pass1-rank0").exists()
    assert same_bits(whole, compute("mixture", tokens_per_batch=30))


def test_two_ranks_find_what_one_does(compute: Callable, texts: Path, tmp_path: Path) -> None:
    alone = compute("llama", tokens_per_batch=60)
    words = ["--model", str(tmp_path / "llama"), "--dataset", str(texts), "--text_column", "text", "--device", "cpu",
             "--tokens_per_batch", "60", "--output_dir", str(tmp_path / "ranks")]  # fmt: skip
    run_ranks(2, tmp_path, "compute_gram.py", *words)
    together = GramFile(tmp_path / "ranks" / "gram.safetensors")
    assert together.grams == alone.grams
    for name in alone.grams:
        error = np.linalg.norm(together.read(name) - alone.read(name)) / np.linalg.norm(alone.read(name))
        assert error < 1e-6


SHORT_OF_MEMORY = """
import sys, time
import torch
import torch.distributed as dist
from common import ranks
from common.ranks import start_process
from regmean import compute
from regmean.batch_runner import BatchRunner
from regmean.config import GramFlags

ranks.LOOK_SECONDS = 0.2
model, dataset, output_dir, failures = sys.argv[1:]
process = start_process("cpu")
run, add, left = BatchRunner._run, compute.GramSums.add, int(failures)

def run_or_fail(self, batch):
    global left
    seen = 0

    def add_or_fail(*args):
        global left
        nonlocal seen
        seen += 1
        if process.rank == 1 and left and seen == 4:
            left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        add(*args)

    compute.GramSums.add = add_or_fail
    run(self, batch)

def join(*args):
    # Longer than it takes to see that the other rank has ended.
    time.sleep(2)
    print("ranks are joined still:", dist.is_initialized())
    exact(*args)

BatchRunner._run = run_or_fail
exact, compute.join_files = compute.join_files, join
flags = GramFlags(model=model, dataset=dataset, text_column="text", tokens_per_batch=60, output_dir=output_dir)
compute.compute_grams(flags, process)
"""


@pytest.mark.parametrize(("failures", "passes"), [(1, 1), (20, 3)])
def test_memory_that_runs_out_on_one_of_two_ranks(
    compute: Callable, texts: Path, tmp_path: Path, failures: int, passes: int
) -> None:
    """Running out once halves the batch; running out with a single example splits the pass on both ranks.

    Passes are joined after the other rank has ended, and its end is not reported as a failure.
    """
    alone = compute("llama", tokens_per_batch=60)
    (tmp_path / "short.py").write_text(SHORT_OF_MEMORY)
    words = (tmp_path / "short.py", tmp_path / "llama", texts, tmp_path / "ranks", failures)
    printed = run_ranks(2, tmp_path, *map(str, words))
    assert "out of memory with a batch of" in printed
    assert (f"pass 1 becomes {passes} passes" in printed) == (passes > 1)
    assert ("ranks are joined still: False" in printed) == (passes > 1)
    together = GramFile(tmp_path / "ranks" / "gram.safetensors")
    assert together.grams == alone.grams
    assert_close(together, oracle_of(alone))


def test_ranks_whose_tokens_reached_other_experts_still_add_up() -> None:
    class Peer:
        """The other of two ranks, on which layer b is reached instead of layer a."""

        device = torch.device("cpu")

        def gather(self, value: Any) -> list[Any]:
            return [value, {key.replace("a", "b"): "b" if item == "a" else item for key, item in value.items()}]

        def sum_(self, tensor: torch.Tensor) -> None:
            tensor.add_(1.0)

        def sum(self, *values: float) -> list[float]:
            return [value + 1 for value in values]

    sums = gram_module.GramSums()
    sums.shared_name = {"a": "a"}
    sums.add("a", torch.ones(3, 2))
    sums.add_ranks(Peer())
    assert sums.shared_name == {"a": "a", "b": "b"}
    assert {name: total.tolist() for name, total in sums.totals.items()} == {"a": [[4.0] * 2] * 2, "b": [[1.0] * 2] * 2}
    assert sums.tokens == {"a": 4, "b": 1}


def test_half_precision_models_sum_in_float32(compute: Callable, texts: Path) -> None:
    file = compute("llama", dtype="bfloat16")
    assert file.provenance["dtype"] == "bfloat16"
    assert_close(file, oracle(make_llama().bfloat16(), texts), tolerance=1e-2)


def test_activations_that_are_not_finite_are_named(
    compute: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.inf
    monkeypatch.setattr("regmean.architectures.load_model", lambda *args, **options: model)
    with pytest.raises(InputError, match=r"input of model\.layers\.1\.self_attn\.q_proj is NaN or infinite in row"):
        compute("llama")
    assert not (tmp_path / "gram" / "gram.safetensors").exists()


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 10_000])
def test_the_example_of_a_non_finite_activation_is_named(
    compute: Callable, monkeypatch: pytest.MonkeyPatch, texts: Path, tokens_per_batch: int
) -> None:
    model, lines = make_llama(), texts.read_text().splitlines()
    for number in (7, 30):
        lines[number] = json.dumps({"text": json.loads(lines[number])["text"] + " <unk>"})
    texts.write_text("\n".join(lines))
    with torch.no_grad():
        model.model.embed_tokens.weight[make_tokenizer().unk_token_id] = torch.nan
    monkeypatch.setattr("regmean.architectures.load_model", lambda *args, **options: model)
    named = r"(7|30|30, 7|7, 30)" if tokens_per_batch < 10_000 else r"(30, 7|7, 30)"
    message = rf"input of model\.layers\.0\.self_attn\.q_proj is NaN or infinite in row\(s\) {named} of the data set"
    with pytest.raises(InputError, match=message):
        compute("llama", tokens_per_batch=tokens_per_batch)


def test_provenance_tells_where_the_grams_come_from(compute: Callable, texts: Path, tmp_path: Path) -> None:
    provenance = compute("llama").provenance
    assert provenance["model"] == str(tmp_path / "llama")
    assert provenance["dataset"] == str(texts)
    assert (provenance["examples"], provenance["columns"]) == (40, {"text": "text"})
    assert provenance["versions"]["torch"] == torch.__version__


def test_an_existing_gram_is_kept(compute: Callable, save: Callable) -> None:
    compute("llama")
    with pytest.raises(InputError, match="exists already"):
        compute("llama")


def test_models_that_cannot_be_read_are_named(save: Callable, compute: Callable, tmp_path: Path) -> None:
    folder = save(make_llama(), "llama")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(InputError, match=r"model\.safetensors.*download it again"):
        compute("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        compute("llama")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        compute("llama")
    with pytest.raises(InputError, match="no such folder here, and the download failed"):
        compute_grams(
            GramFlags(model="no/such", dataset="d", text_column="t", output_dir=str(tmp_path / "o")),
            start_process("cpu"),
        )


def test_a_full_disk_is_named(compute: Callable, small_disk: Callable[[int, int], Path]) -> None:
    compute("llama", output="whole")
    small_disk(12_000, 5_000)
    with pytest.raises(
        InputError, match=r"cannot write .*disk/.*safetensors: (No space left on device|File too large)"
    ):
        compute("llama", output="disk")
