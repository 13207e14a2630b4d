"""The sums: x x^T of each distinct input of a model's linear layers, added up over tokens."""

import functools
import math
import mmap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from common.errors import InputError
from common.ranks import Process
from regmean.experts import ExpertLayer, parameter_of
from regmean.gram_file import Counts, Gram, GramFile, write_grams
from regmean.hooks import Layer, input_width, is_conv1d

PANEL = 512  # rows of a sum that a batch is added to at a time, at most on a CPU and at least on a GPU
TILE = (128, 256)  # rows and columns of a large product that one multiprocessor of a GPU computes at a time
# Rows of a sum that include the current batch, by name and number of each call of `GramSums.add` for it.
Added = dict[tuple[str, int], int]


def zeros(width: int, device: torch.device) -> torch.Tensor:
    """Zeros of shape (width, width) in float32; on the CPU in pages of their own.

    In the C library's heap, sums between activations would prevent the reuse of the activations' memory.
    """
    if device.type == "cpu":
        return torch.frombuffer(mmap.mmap(-1, 4 * width**2), dtype=torch.float32).view(width, width)
    return torch.zeros(width, width, device=device)


def add_products(total: torch.Tensor, rows: torch.Tensor) -> None:
    """total += rows^T rows, below the diagonal and somewhat above it: half the work, without a copy of the product.

    `total` is float32 (width, width), valid only on and below the diagonal; `rows` is float (tokens, width).
    """
    for _ in added_panels(total, rows):
        pass


def add_cross_products(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left^T right; `total` is float32 (width, width), the others are float (tokens, width) of one dtype."""
    if _is_widened(left):
        left, right = left.float(), right.float()
    _add_product(total, left.T, right)


def symmetrise_(total: torch.Tensor) -> torch.Tensor:
    """Copy the entries below the diagonal to those above it, in place."""
    for first in range(0, len(total), PANEL):
        last = min(first + PANEL, len(total))
        total[:first, first:last] = total[first:last, :first].T
        corner = total[first:last, first:last]
        corner.copy_(corner.tril() + corner.tril(-1).T)
    return total


def added_panels(total: torch.Tensor, rows: torch.Tensor, start: int = 0) -> Iterator[int]:
    """Run `add_products` panel by panel, from row `start` of `total` on; yield the end row of each panel."""
    if _is_widened(rows):
        rows = rows.float()
    step = _panel_rows_on(rows.device, len(total))
    for first in range(start, len(total), step):
        panel, below = rows[:, first : first + step].T, rows[:, : first + step]
        _add_product(total[first : first + step, : first + step], panel, below)
        yield min(first + step, len(total))


def _is_widened(rows: torch.Tensor) -> bool:
    # A CPU has no product of half-precision numbers in float32.
    return rows.device.type == "cpu"


def _add_product(part: torch.Tensor, panel: torch.Tensor, below: torch.Tensor) -> None:
    if panel.dtype == torch.float32:
        part.addmm_(panel, below)
    else:
        # Products of two half-precision numbers are exact in float32, and their sum nearly so.
        part += torch.mm(panel, below, out_dtype=torch.float32)


def _panel_rows_on(device: torch.device, width: int) -> int:
    if device.type == "cuda":
        return panel_rows(width, torch.cuda.get_device_properties(device).multi_processor_count)
    # Fewer rows compute less above the diagonal; a CPU is as fast with 192, or with 512 for wide layers.
    return min(PANEL, max(192, width // 8))


@functools.cache
def panel_rows(width: int, multiprocessors: int) -> int:
    """Number of rows of a panel, for a sum of this width and this number of multiprocessors of a GPU.

    A GPU computes a product in rounds of one tile for each multiprocessor. Low panels have too few tiles to fill a
    round, and high ones compute more above the diagonal. The height with the fewest rounds is returned.
    """

    def rounds(step: int) -> int:
        total = 0
        for first in range(0, width, step):
            end = min(first + step, width)
            tiles = math.ceil((end - first) / TILE[0]) * math.ceil(end / TILE[1])
            total += math.ceil(tiles / multiprocessors)
        return total

    return min((PANEL, 2 * PANEL, 4 * PANEL, 8 * PANEL), key=rounds)


def product_bytes(width: int, device: torch.device) -> int:
    """Maximum bytes of a temporary product for a sum of this width; 0 on a CPU, which adds in place."""
    return 4 * _panel_rows_on(device, width) * width if device.type == "cuda" else 0


@dataclass(eq=False)
class GramSums:
    """The running sums of one pass, each a float32 matrix of shape (width, width) beside the activations.

    A batch that fails halfway is in some sums only. To repeat it, in any number of parts, `begin` is called with the
    last value of `added`.

    Attributes:
        totals, tokens: sum and token count of each input, by the name of the first layer that reads it.
        shared_name: that name for each layer.
        added: the rows of the sums that include the current batch.
    """

    totals: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    shared_name: dict[str, str] = field(default_factory=dict)
    added: Added = field(default_factory=dict)
    _calls: Counter[str] = field(default_factory=Counter)

    def begin(self, added: Added) -> None:
        """Begin a batch; `add` skips the rows listed in `added`."""
        self.added = dict(added)
        self._calls.clear()

    def add(self, name: str, rows: torch.Tensor) -> None:
        """Add the products of `rows`, of shape (tokens, width) and any float dtype, to the sum called `name`."""
        if name not in self.totals:
            self.totals[name] = zeros(rows.shape[1], rows.device)
            self.tokens[name] = 0
        total, call = self.totals[name], (name, self._calls[name])
        self._calls[name] += 1
        start = self.added.get(call, 0)
        for end in added_panels(total, rows, start):
            self.added[call] = end
        if start < len(total):
            self.tokens[name] += len(rows)

    def add_ranks(self, process: Process) -> None:
        """Add up the sums of all ranks; a rank whose tokens never reached a layer adds nothing to it.

        Raises:
            InputError: layers share an input on one rank only.
        """
        sharing: dict[str, str] = {}
        for theirs in process.gather(self.shared_name):
            for module, name in theirs.items():
                if sharing.setdefault(module, name) != name:
                    raise InputError(f"layer {module} shares its input with other layers on one rank than on another")
        widths: dict[str, int] = {}
        for theirs in process.gather({name: len(total) for name, total in self.totals.items()}):
            widths |= theirs
        self.shared_name = sharing
        for name, width in widths.items():
            if name not in self.totals:
                self.totals[name] = zeros(width, process.device)
            process.sum_(self.totals[name])
        counts = process.sum(*(self.tokens.get(name, 0) for name in widths))
        self.tokens = {name: int(count) for name, count in zip(widths, counts, strict=True)}

    def write(
        self,
        path: Path,
        layers: dict[str, Layer],
        tensors: dict[str, set[str]],
        provenance: dict[str, Any],
        counts: Iterable[Counts] = (),
    ) -> None:
        """Write the sums as a Gram file, experts without tokens and pools of experts included; `layers` are those of
        the sums by name, `tensors` as from `layer_tensors`.
        """
        grams = self._entries(layers, tensors)
        pools = {gram.name: gram.modules for gram in grams if gram.is_pool}

        def read(name: str) -> Any:
            first, *others = (self.totals[each] for each in pools.get(name, [name]) if each in self.totals)
            return sum(others, start=first).cpu().numpy()

        write_grams(path, grams, read, provenance, counts)

    def _entries(self, layers: dict[str, Layer], tensors: dict[str, set[str]]) -> list[Gram]:
        sharing: dict[str, list[str]] = {}
        for module, shared in self.shared_name.items():
            sharing.setdefault(shared, []).append(module)
        stored: dict[str, list[str]] = {}
        for tensor, owners in tensors.items():
            names = {self.shared_name.get(owner, owner) for owner in owners}
            if len(names) == 1:
                stored.setdefault(names.pop(), []).append(tensor)
        grams, pools = [], {}
        experts = [name for name, layer in layers.items() if isinstance(layer, ExpertLayer)]
        for name in dict.fromkeys([*self.totals, *experts]):
            pool = parameter_of(name) if isinstance(layers[name], ExpertLayer) else ""
            form = (input_width(layers[name]), is_conv1d(layers[name]))
            modules, own = tuple(sharing.get(name, [name])), tuple(stored.get(name, ()))
            grams.append(Gram(name, modules, self.tokens.get(name, 0), *form, own, pool))
            if pool:
                pools.setdefault(pool, []).append(grams[-1])
        for pool, theirs in pools.items():
            tokens, names = sum(gram.tokens for gram in theirs), tuple(gram.name for gram in theirs)
            grams.append(Gram(pool, names, tokens, theirs[0].width, theirs[0].conv1d, (), pool))
        return grams

    @classmethod
    def read(cls, path: Path, device: torch.device) -> Self:
        """Load the sums in a Gram file, to continue adding."""
        file = GramFile(path)
        sums = cls()
        for gram in file.grams.values():
            if gram.is_pool or not gram.tokens:
                continue
            sums.totals[gram.name] = torch.from_numpy(file.read(gram.name)).to(device)
            sums.tokens[gram.name] = gram.tokens
            sums.shared_name |= dict.fromkeys(gram.modules, gram.name)
        return sums
