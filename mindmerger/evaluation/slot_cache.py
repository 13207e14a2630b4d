"""A key-value cache of slots: tokens are written in place, and a finished row's slot is reused."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Maximum free columns of a new buffer: the number of steps before its content is copied to another place.
_ROOM = 64
# Columns whose views are made together, which takes less time than one view for each token.
_VIEWS = 16


class SlotCache(Cache):
    """Keys and values of rows that start and end at different times.

    Rows are left-padded and end in the last column, so that distances between the columns of a row are those between
    its tokens, as a sliding window needs.

    Args:
        like: an empty cache of the LLM for which `can_hold` is True.
        most: maximum number of steps of a row, above which free columns would be of no use.
    """

    def __init__(self, like: DynamicCache, most: int):
        super().__init__(layers=[SlotLayer(layer, min(most, _ROOM)) for layer in like.layers])

    @staticmethod
    def can_hold(cache: DynamicCache) -> bool:
        """True if the LLM keeps only a key and a value for each token, and no recurrent states."""
        return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)

    def begin(self, slots: torch.Tensor, rows: int, columns: int) -> None:
        """Let the next forward pass, a prefill, put new rows into slots, in place of their old rows.

        Args:
            slots: slot of each new row.
            rows: number of slots, which grows to this.
            columns: columns of the longest row that stays.
        """
        for layer in self.layers:
            layer.new, layer.columns = (slots, rows), columns

    def trim(self, columns: int) -> None:
        """Keep only the last `columns` columns, the length of the longest row; a prefill has ended."""
        for layer in self.layers:
            layer.new, layer.columns = None, columns

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Update one layer; see `SlotLayer.update`."""
        return self.layers[layer_idx].update(key_states, value_states)


class SlotLayer(DynamicLayer):
    """One layer of a `SlotCache`: two buffers [rows, heads, capacity, head width], the last column in use at `_end`.

    `DynamicLayer` copies all its keys and values for every token.

    Args:
        like: an empty layer of the LLM's cache.
        room: free columns of a new buffer.

    Attributes:
        columns: columns of the longest row.
        new: in a prefill, the slots of its rows and the number of all slots; None in a step.
    """

    def __init__(self, like: DynamicLayer, room: int):
        super().__init__()
        self.is_sliding, self._room = like.is_sliding, room
        # Columns that a token attends to beside its own.
        self._window = like.sliding_window - 1 if like.is_sliding else None
        self.columns = self._end = self._capacity = 0
        self.new: tuple[torch.Tensor, int] | None = None
        # Views of the next free columns of the two buffers.
        self._free: Iterator[tuple[torch.Tensor, torch.Tensor]] = iter(())

    def _cut(self, columns: int) -> int:
        return columns if self._window is None else min(columns, self._window)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one column, [rows, heads, 1, head width], or a prefill; return the keys and values that it attends to."""
        if self.new is not None:
            self._fill(key_states, value_states, *self.new)
            return key_states, value_states
        kept = self._cut(self.columns)
        if (free := next(self._free, None)) is None:
            free = self._next_free(kept)
        free[0].copy_(key_states)
        free[1].copy_(value_states)
        start = self._end - kept
        self._end += 1
        self.columns += 1
        return _columns(self.keys, start, kept + 1), _columns(self.values, start, kept + 1)

    def _next_free(self, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Make views of the next free columns; return those of the first."""
        if self._end == self._capacity:
            self._make_room(kept)
        count = min(_VIEWS, self._capacity - self._end)
        columns = (buffer.narrow(2, self._end, count).split(1, dim=2) for buffer in (self.keys, self.values))
        self._free = zip(*columns, strict=True)
        return next(self._free)

    def _make_room(self, kept: int) -> None:
        """Move the last `kept` columns to the front, inside the buffers if that fits their size."""
        free = self._end - kept
        if not self._room // 2 < free <= 2 * self._room:
            self._move(len(self.keys), kept, kept)
            return
        for buffer in (self.keys, self.values):
            # Pieces that do not overlap.
            for start in range(0, kept, free):
                count = min(free, kept - start)
                buffer.narrow(2, start, count).copy_(buffer.narrow(2, start + free, count))
        self._end = kept

    def _fill(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, rows: int) -> None:
        """Put new rows into slots; see `SlotCache.begin`."""
        if not self.is_initialized:
            self.keys, self.values = (new.new_zeros(rows, new.shape[1], 0, new.shape[3]) for new in (keys, values))
            self.is_initialized = True
        tokens = keys.shape[2]
        count, kept = self._cut(tokens), self._cut(self.columns)
        if count > self._end or rows > len(self.keys):
            self._move(rows, kept, max(count, kept))
        for buffer, new in ((self.keys, keys), (self.values, values)):
            columns = buffer.narrow(2, self._end - count, count)
            columns.index_copy_(0, slots, new if count == tokens else new.narrow(2, tokens - count, count))

    def _move(self, rows: int, kept: int, end: int) -> None:
        """Move the last `kept` columns to buffers of `rows` rows, where they end at `end`, before free ones."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            # Free columns are written before they are read.
            new = old.new_empty(rows, old.shape[1], end + self._room, old.shape[3])
            # Zeros, since masked values are multiplied by 0 and must be finite.
            new[:, :, : end - kept] = 0
            new[len(old) :, :, end - kept : end] = 0
            new[: len(old), :, end - kept : end] = old[:, :, self._end - kept : self._end]
            setattr(self, name, new)
        self._end, self._capacity = end, end + self._room
        self._free = iter(())

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the rows `beam_idx`."""
        super().reorder_cache(beam_idx)
        self._free = iter(())

    def get_seq_length(self) -> int:
        """Columns of the longest row; in a prefill 0."""
        return 0 if self.new is not None else self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of columns of a mask, and the first of them."""
        if self.new is not None:
            return query_length, 0
        kept = self._cut(self.columns)
        return kept + query_length, self.columns - kept


def _columns(buffer: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Columns of a contiguous buffer; `narrow` takes longer."""
    rows, heads, _, width = buffer.shape
    return buffer.as_strided((rows, heads, count, width), buffer.stride(), start * width)
