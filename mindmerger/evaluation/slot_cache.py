"""A key-value cache of slots: tokens are written in place, and a finished row's slot is reused."""

from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Free columns of a new buffer: the number of steps before its content is copied to a larger one.
_ROOM = 64


class SlotCache(Cache):
    """Keys and values of rows that start and end at different times.

    Rows are left-padded and end in the last column, so that distances between the columns of a row are those between
    its tokens, as a sliding window needs.

    Args:
        like: an empty cache of the LLM for which `can_hold` is True.
        slots: number of rows.
    """

    def __init__(self, like: DynamicCache, slots: int):
        super().__init__(layers=[SlotLayer(layer, slots) for layer in like.layers])

    @staticmethod
    def can_hold(cache: DynamicCache) -> bool:
        """True if the LLM keeps only a key and a value for each token, and no recurrent states."""
        return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)

    def fill(self, slots: list[int], prefilled: DynamicCache, columns: int) -> None:
        """Put new rows into slots, in place of their old rows.

        Args:
            slots: slot of each new row.
            prefilled: keys and values of the new rows.
            columns: columns of the longest row, new rows included.
        """
        for layer, new in zip(self.layers, prefilled.layers, strict=True):
            layer.fill(slots, new, columns)

    def trim(self, columns: int) -> None:
        """Keep only the last `columns` columns, the length of the longest row."""
        for layer in self.layers:
            layer.columns = columns


class SlotLayer(DynamicLayer):
    """One layer of a `SlotCache`: two buffers [rows, heads, capacity, head width], the last column in use at `end`.

    `DynamicLayer` copies all its keys and values for every token.

    Args:
        like: an empty layer of the LLM's cache.
        slots: number of rows.
    """

    def __init__(self, like: DynamicLayer, slots: int):
        super().__init__()
        self._slots = slots
        self.is_sliding = like.is_sliding
        # Columns that a token attends to beside its own.
        self._window = like.sliding_window - 1 if like.is_sliding else None
        self.columns = self._end = 0

    @property
    def _kept(self) -> int:
        return self.columns if self._window is None else min(self.columns, self._window)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one column, [rows, heads, 1, head width]; return the keys and values that it attends to."""
        if self._end == self.keys.shape[2]:
            self._move(self._kept)
        start, self._end = self._end - self._kept, self._end + 1
        self.columns += 1
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer[:, :, self._end - 1 : self._end] = states
        return self.keys[:, :, start : self._end], self.values[:, :, start : self._end]

    def fill(self, slots: list[int], prefilled: DynamicLayer, columns: int) -> None:
        """Put new rows into slots; see `SlotCache.fill`."""
        if not self.is_initialized:
            self.keys, self.values = (
                new.new_zeros(self._slots, new.shape[1], 0, new.shape[3]) for new in (prefilled.keys, prefilled.values)
            )
            self.is_initialized = True
        in_use, self.columns = self._kept, columns
        count = min(prefilled.keys.shape[2], self._kept)
        if count > self._end:
            self._move(in_use, count)
        for buffer, new in ((self.keys, prefilled.keys), (self.values, prefilled.values)):
            buffer[slots, :, self._end - count : self._end] = new[:, :, -count:]

    def _move(self, in_use: int, columns: int = 0) -> None:
        """Move the last `in_use` columns to buffers with free ones after them, and before them up to `columns`."""
        end = max(in_use, columns)
        for name in ("keys", "values"):
            old = getattr(self, name)
            rows, heads, _, width = old.shape
            # Zeros, since masked values are multiplied by 0 and must be finite.
            new = old.new_zeros(rows, heads, end + _ROOM, width)
            new[:, :, end - in_use : end] = old[:, :, self._end - in_use : self._end]
            setattr(self, name, new)
        self._end = end

    def get_seq_length(self) -> int:
        """Columns of the longest row."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of columns of a mask, and the first of them."""
        return self._kept + query_length, self.columns - self._kept
