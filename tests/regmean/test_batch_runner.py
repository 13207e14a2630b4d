"""Batches for which memory runs out at any point: the sums are those of an undisturbed run."""

import functools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import nn

from common.errors import InputError
from regmean import gram as gram_module
from regmean.batch_runner import BatchRunner, TooLargeError
from regmean.calibration import Calibration, make_batches
from regmean.gram import GramSums
from regmean.hooks import LinearInputs, linear_layers
from tests.regmean.conftest import make_gpt2, make_llama
from tests.regmean.test_gram import make_experts

BATCH = 1  # index of the one of three batches for which memory runs out
TOKENS = 24


def make_repeated() -> nn.Module:
    """A model with one block run twice, so that each layer has two inputs in a forward pass."""
    model = make_llama()
    model.model.layers[1] = model.model.layers[0]
    return model


MODELS = {"llama": make_llama, "gpt2": make_gpt2, "experts": make_experts, "repeated": make_repeated}


@functools.cache
def built(kind: str) -> nn.Module:
    return MODELS[kind]()


@pytest.fixture(autouse=True)
def several_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_module, "_panel_rows_on", lambda device, width: 9)


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], None]]]:
    """Functions that tests set, called at every point at which memory may run out."""
    called: list[Callable[[], None]] = []

    def at(place: object, name: str, after: bool = True) -> None:
        exact = getattr(place, name)

        def call(*args, **options):
            for function in called:
                function()
            result = exact(*args, **options)
            for function in called if after else ():
                function()
            return result

        monkeypatch.setattr(place, name, call)

    # A product allocates its memory before it changes the sum.
    at(gram_module, "_add_product", after=False)
    at(gram_module, "zeros")
    at(LinearInputs, "run")
    at(torch.nn.functional, "embedding")
    at(torch.nn.functional, "scaled_dot_product_attention")
    yield called


class Memory:
    """Raises an out-of-memory error at the calls, counted from `armed` on, for which `fails` is True."""

    def __init__(self, fails: Callable[[int], bool]):
        self.fails, self.calls, self.armed, self.failures = fails, 0, False, 0

    def __call__(self) -> None:
        if not self.armed:
            return
        self.calls += 1
        if self.fails(self.calls):
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def make_examples() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 27, (length,), generator=generator).tolist() for length in [6] * 4 + [4] * 6 + [4] * 4]


def run(kind: str, memory: Memory, tokens_per_batch: int = TOKENS) -> tuple[GramSums, BatchRunner]:
    """Sums of three batches of 4, 6 and 4 examples, with little memory for the second."""
    model, examples, sums = built(kind), make_examples(), GramSums()
    padding = kind != "experts"
    batches = make_batches([len(example) for example in examples], TOKENS, padding)
    assert list(map(len, batches)) == [4, 6, 4]
    calibration = Calibration(examples, list(range(len(examples))), 0, 0)
    layers = {name: layer for name, layer in linear_layers(model).items() if name != "lm_head"}
    runner = BatchRunner(model, layers, calibration, torch.device("cpu"), sums, padding, tokens_per_batch)
    with runner:
        for number, batch in enumerate(batches):
            memory.armed = number == BATCH
            runner.add(batch)
    return sums, runner


def assert_same(found: GramSums, expected: GramSums) -> None:
    assert (found.tokens, found.shared_name) == (expected.tokens, expected.shared_name)
    assert found.totals.keys() == expected.totals.keys()
    for name, total in expected.totals.items():
        a, b = (np.tril(sums.numpy()) for sums in (found.totals[name], total))
        assert np.linalg.norm(a - b) < 1e-6 * np.linalg.norm(b), name


@pytest.mark.parametrize("kind", MODELS)
def test_sums_are_the_same_wherever_memory_runs_out(kind: str, points: list) -> None:
    expected, undisturbed = run(kind, Memory(lambda call: False))
    point = 0
    while True:
        point += 1
        memory = Memory(lambda call, point=point: call == point)
        points[:] = [memory]
        found, runner = run(kind, memory)
        assert_same(found, expected)
        if not memory.failures:
            break
        assert runner.tokens_per_batch == TOKENS // 2
    assert point > 20
    assert undisturbed.tokens_per_batch == TOKENS


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("point", [2, 7, 12])
def test_so_they_are_where_it_runs_out_again_and_again(kind: str, point: int, points: list) -> None:
    """Memory runs out at some point of every run of several examples, until one remains."""
    expected, _ = run(kind, Memory(lambda call: False))
    exact, sizes, begun = BatchRunner._run, [], []
    memory = Memory(lambda call: sizes[-1] > 1 and call - begun[-1] == point)

    def run_and_note(self: BatchRunner, batch: list[int]) -> None:
        sizes.append(len(batch))
        begun.append(memory.calls)
        exact(self, batch)

    points[:] = [memory]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchRunner, "_run", run_and_note)
        found, runner = run(kind, memory)
    assert_same(found, expected)
    assert memory.failures == 2 and runner.tokens_per_batch < TOKENS // 2


def test_a_batch_that_fails_for_another_reason_is_not_tried_again(points: list) -> None:
    def fail() -> None:
        raise RuntimeError("in the middle")

    points[:] = [fail]
    with pytest.raises(RuntimeError, match="middle"):
        run("llama", Memory(lambda call: False))


def test_memory_that_never_holds_one_example_is_told(points: list) -> None:
    memory = Memory(lambda call: True)
    points[:] = [memory]
    with pytest.raises(TooLargeError):
        run("llama", memory)
    assert memory.failures == 3  # of six, three and one examples


@pytest.mark.parametrize("tokens_per_batch", [1, 5, 12])
def test_batches_are_no_larger_than_told(monkeypatch: pytest.MonkeyPatch, tokens_per_batch: int) -> None:
    expected, _ = run("llama", Memory(lambda call: False))
    forward, shapes = LinearInputs.run, []

    def run_and_note(self: LinearInputs, model: nn.Module, ids: torch.Tensor, *args) -> None:
        shapes.append(ids.shape)
        forward(self, model, ids, *args)

    monkeypatch.setattr(LinearInputs, "run", run_and_note)
    found, runner = run("llama", Memory(lambda call: False), tokens_per_batch)
    assert_same(found, expected)
    assert runner.tokens_per_batch == tokens_per_batch
    assert all(shape[0] == 1 or shape.numel() <= tokens_per_batch for shape in shapes)


def test_values_that_are_not_finite_are_found_in_a_part(points: list) -> None:
    memory = Memory(lambda call: call == 5)
    points[:] = [memory]
    exact, broken = BatchRunner._run, []

    def break_later(self: BatchRunner, batch: list[int]) -> None:
        if memory.failures and not broken:
            broken.append(batch)
            self._model.model.layers[1].input_layernorm.weight.data.fill_(torch.nan)
        exact(self, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match=r"row\(s\) 4, 5, 6 of the data set"):
        patch.setattr(BatchRunner, "_run", break_later)
        run("llama", memory)
