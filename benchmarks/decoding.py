"""CPU time of the decoding loop for each token: its Python, indexing and cache, without the LLM's own computation.

    python -m benchmarks.decoding [--layers 2] [--slots 64] [--other FOLDER]

A stand-in for the LLM writes fixed keys and values into the cache and returns fixed logits. FOLDER is another checkout
of this repository, whose loop then runs in turn with this one's, and must give the same answers.
"""

import importlib.util
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.side_by_side import machine
from common.cli import flag, parse_flags
from common.errors import exit_with_message
from mindmerger.modeling import InputEmbeds

LENGTH, MAX_NEW_TOKENS, VOCABULARY, HEADS, WIDTH = 40, 128, 16, 2, 8
MODULES = ("slot_cache", "decoding")
HERE = Path(__file__).resolve().parent.parent


@dataclass
class DecodingFlags:
    """Measure the decoding loop without the LLM."""

    layers: int = flag(2, "layers of the cache")
    slots: int = flag(64, "problems at once")
    problems: int = flag(256, "number of answers")
    rounds: int = flag(5, "runs; the fastest counts")
    other: str | None = flag(None, "another checkout to compare with")


class StandIn:
    """An LLM that computes nothing; answers have 124 tokens on average."""

    # Operations on tensors of another mode take longer, and an LLM's own are of this one.
    @torch.inference_mode()
    def __init__(self, layers: int, slots: int, device: torch.device | str = "cpu"):
        sizes = {"hidden_size": HEADS * WIDTH, "num_attention_heads": HEADS, "vocab_size": VOCABULARY}
        self.config, self.device = LlamaConfig(num_hidden_layers=layers, **sizes), torch.device(device)
        self._layers = range(layers)
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(97, slots, 1, VOCABULARY, generator=generator)
        logits[..., 0] -= 2.0
        self._logits = cycle(logits.to(device).unbind(0))
        self.mask = torch.ones(slots, LENGTH, dtype=torch.int64, device=device)
        states = torch.randn(slots, HEADS, LENGTH, WIDTH, generator=generator).to(device)
        # Made once for each shape, since its own time is not the loop's.
        self._states = cache(lambda rows, columns: states[:rows, :, :columns])

    def forward(self, position_ids: torch.Tensor, past_key_values: Any, **_: Any) -> SimpleNamespace:
        """Write the cache; return logits."""
        rows, columns = position_ids.shape
        states = self._states(rows, columns)
        for layer in self._layers:
            past_key_values.update(states, states, layer)
        return SimpleNamespace(logits=next(self._logits)[:rows])

    __call__ = forward


def loop(folder: Path) -> ModuleType:
    """Load the decoding loop of a checkout, with the modules that it is made of."""
    names = {f"mindmerger.evaluation.{name}": name for name in MODULES}
    kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    try:
        for name, file in names.items():
            spec = importlib.util.spec_from_file_location(name, folder / "mindmerger/evaluation" / f"{file}.py")
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            module.__name__ = folder.name
    finally:
        sys.modules.update(kept)
    return module


def answers(loop: ModuleType, llm: StandIn, problems: int, slots: int) -> Iterator[list[Any]]:
    """Decode answers of all problems."""
    embeds = torch.zeros(problems, LENGTH, HEADS * WIDTH, device=llm.device)
    mask = torch.ones(problems, LENGTH, dtype=torch.int64, device=llm.device)
    read = lambda some: InputEmbeds(embeds[some[0] : some[-1] + 1], mask[some[0] : some[-1] + 1])  # noqa: E731
    return loop.greedy_steps(llm, range(problems), read, slots, MAX_NEW_TOKENS, {0})


def microseconds(loop: ModuleType, flags: DecodingFlags) -> tuple[float, dict[int, list[int]]]:
    """CPU microseconds for each token, and the answers."""
    llm, found = StandIn(flags.layers, flags.slots), {}
    started = time.process_time()
    for active in answers(loop, llm, flags.problems, flags.slots):
        found |= {answer.problem: answer.ids for answer in active if answer.is_done}
    return 1e6 * (time.process_time() - started) / sum(map(len, found.values())), found


def main() -> None:
    flags = parse_flags(DecodingFlags)
    torch.set_num_threads(1)
    loops = [loop(Path(folder).resolve()) for folder in (HERE, flags.other) if folder]
    runs = [[microseconds(each, flags) for each in loops] for _ in range(flags.rounds)]
    for each, own in zip(loops, zip(*runs, strict=True), strict=True):
        print(f"{each.__name__}: {min(time for time, _ in own):.2f} us a token")
    print(f"identical: {all(found == runs[0][0][1] for run in runs for _, found in run)}; {machine()}")


if __name__ == "__main__":
    exit_with_message(main)
