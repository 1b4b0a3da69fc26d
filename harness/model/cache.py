"""Keys and values of the tokens that sequences have, so that each token is computed once.

Every block of a stage has memory for each of its slots, allocated once: as many positions as the longest sequence will
have, or as its window lets a token see, in whole blocks. Position p is in row p modulo their number. A rank keeps the
key-value heads that its queries use, also where ranks share one.

    keys, values    [slots, heads, capacity, head_dim] each, for every block
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from harness.spec.batching import Row
from harness.spec.kv_cache import CacheShape

T = TypeVar("T")


class KeyValueCache:
    """The memory of one rank, and what the pass that it is in does with it.

    Args:
        blocks: names of the rank's blocks.
        num_positions: of the longest sequence.
        window: tokens that one sees, see `harness.spec.config.Model`.
    """

    def __init__(
        self,
        blocks: Sequence[str],
        shape: CacheShape,
        num_positions: int,
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_positions, self.device = num_positions, device
        self._capacity, self._window = shape.capacity, window
        size = shape.num_slots, shape.num_heads, shape.capacity, shape.head_dim
        # Zeros: what no token wrote has no weight in attention, but 0 times NaN is NaN. So slots are cleared, too.
        self._memory = {
            block: (torch.zeros(size, dtype=dtype, device=device), torch.zeros(size, dtype=dtype, device=device))
            for block in blocks
        }
        self._places = torch.arange(shape.capacity, device=device)
        self._used: set[int] = set()
        """Slots that sequences had."""
        self.num_passes = 0

    @property
    def num_bytes(self) -> int:
        """Of all keys and values."""
        return sum(tensor.nbytes for pair in self._memory.values() for tensor in pair)

    def begin(self, rows: Sequence[Row], length: int) -> None:
        """A pass begins, over as many tokens of each row; those behind a row's end are padding."""
        self.num_passes += 1
        starts = [row.start for row in rows]
        self._length, self._is_first = length, not any(starts)
        self._rows = rows
        self._clear([row.slot for row in rows if row.start == 0])
        self._is_even = len(set(starts)) == 1
        self._slots = [row.slot for row in rows]
        first, last = self._slots[0], self._slots[-1] + 1
        self._range = (first, last) if self._slots == list(range(first, last)) else None
        self._start = starts[0]
        self._kept_index: tuple[Tensor, Tensor] | None = None
        self._positions: Tensor | None = None
        self._kept: tuple[Tensor, Tensor] | None = None
        self._shared: dict[object, Any] = {}
        self._masks: dict[torch.dtype, Tensor | None] = {}

    @property
    def _index(self) -> tuple[Tensor, Tensor]:
        """First positions and slots of the rows, [rows] each."""
        if self._kept_index is None:
            starts = torch.tensor([row.start for row in self._rows], device=self.device)
            self._kept_index = starts, torch.tensor(self._slots, device=self.device)
        return self._kept_index

    def positions(self) -> Tensor | None:
        """Of the tokens in their sequences, [rows, length]; None: 0, 1, ... in each row.

        Padding may be behind the last position that there is, and is given that one.
        """
        if self._is_first:
            return None
        if self._positions is None:
            with torch.inference_mode(False):
                steps = torch.arange(self._length, device=self.device)
                self._positions = (self._index[0].unsqueeze(1) + steps).clamp(max=self.num_positions - 1)
        return self._positions

    def _clear(self, slots: Sequence[int]) -> None:
        """Sequences begin in these slots: forget the last ones there."""
        for slot in self._used.intersection(slots):
            for memory in (memory for pair in self._memory.values() for memory in pair):
                memory[slot].zero_()
        self._used.update(slots)

    def shared(self, what: object, make: Callable[[], T]) -> T:
        """Made once for all layers of a pass."""
        if what not in self._shared:
            with torch.inference_mode(False):
                self._shared[what] = make()
        made: T = self._shared[what]
        return made

    def extend(self, block: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keep keys and values, and find all that the queries may look at.

        Args:
            key, value: of the pass's tokens, [rows, heads, length, head_dim].

        Returns:
            keys and values [rows, heads, seen, head_dim], and what is to be added to the scores, [rows, 1, length,
            seen]; None: all are seen, or, of prompts from their beginning, what would be without a cache.
        """
        pair = self._memory[block]
        if self._length == 1 and not self._is_first:
            self._store(pair, key, value)
            keys, values = (self._read(memory) for memory in pair)
            return keys, values, self._mask(key.dtype)
        if self._is_first:
            self._store(pair, key, value)
            return key, value, None
        keys, values = (self._read(memory) for memory in pair)
        joined = torch.cat((keys, key), dim=2), torch.cat((values, value), dim=2)
        self._store(pair, key, value)
        return *joined, self._mask(key.dtype)

    # --- memory

    def _store(self, pair: tuple[Tensor, Tensor], key: Tensor, value: Tensor) -> None:
        """Into the rows of their positions, without padding and what newer tokens would overwrite."""
        begin, end = self._start, self._start + self._length
        if self._range and self._is_even and self._is_whole and end <= self._capacity:
            for memory, new in zip(pair, (key, value), strict=True):
                memory[slice(*self._range), :, begin:end] = new
            return
        if self._kept is None:
            positions = self._index[0].unsqueeze(1) + torch.arange(self._length, device=self.device)
            ends = torch.tensor([row.end for row in self._rows], device=self.device).unsqueeze(1)
            kept = (positions < ends) & (positions >= ends - self._capacity)
            rows, steps = kept.nonzero(as_tuple=True)
            self._kept = rows, steps
            self._targets = self._index[1][rows], positions[rows, steps] % self._capacity
        rows, steps = self._kept
        slots, places = self._targets
        for memory, new in zip(pair, (key, value), strict=True):
            memory[slots, :, places] = new[rows, :, steps]

    @property
    def _is_whole(self) -> bool:
        """Whether no row has padding."""
        return all(row.end - row.start == self._length for row in self._rows)

    @property
    def _num_seen(self) -> int:
        """Rows of memory that hold what may be seen: of a single token its own, too."""
        own = 1 if self._length == 1 else 0
        return min(self._capacity, max(row.start for row in self._rows) + own)

    def _read(self, memory: Tensor) -> Tensor:
        seen = memory[:, :, : self._num_seen]
        return seen[slice(*self._range)] if self._range else seen[self._index[1]]

    def _mask(self, dtype: torch.dtype) -> Tensor | None:
        if dtype not in self._masks:
            with torch.inference_mode(False):
                self._masks[dtype] = self._make_mask(dtype)
        return self._masks[dtype]

    def _make_mask(self, dtype: torch.dtype) -> Tensor | None:
        """0 where a query sees a key, else -inf."""
        if self._is_even and self._length == 1 and (self._window is None or self._start < self._window):
            return None
        queries = self._index[0].view(-1, 1, 1) + torch.arange(self._length, device=self.device).view(1, -1, 1)
        # The newest position that its row of memory can hold: of a single token its own row's, else those before.
        newest = self._index[0].view(-1, 1, 1) - (0 if self._length == 1 else 1)
        places = self._places[: self._num_seen].view(1, 1, -1)
        held = newest - (newest - places) % self._capacity
        if self._length > 1:
            own = queries.transpose(1, 2)
            held = torch.cat((held, own), dim=2)
        seen = (held >= 0) & (held <= queries)
        if self._window is not None:
            seen &= queries - held < self._window
        return torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, -torch.inf).unsqueeze(1)
