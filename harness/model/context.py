"""What layers need to know of the forward pass they are in, and no tensor tells them.

One tensor passes between layers, and only the first and the last stage of a pipeline see samples. So the place in the
training says the rest: which step and micro-batch it is. From there follow the random streams of dropout, and which
tokens of a row belong to one document: the masks of attention and the positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from harness.model.cache import KeyValueCache

T = TypeVar("T")
Documents = Callable[[int, int, int], Tensor]
"""(step, micro-batch, data-parallel rank) -> [batch, sequence]: which document of its row a position belongs to,
counted from 0; what is behind the last one has a number of its own."""

Shares = Callable[[int, int, int], float]
"""(step, micro-batch, data-parallel rank) -> which share of its positions is no padding."""


def stream_seed(*key: object) -> int:
    """Seed of a random stream: 63 bits, a function of `key` alone."""
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


class PassContext:
    """The forward pass of this rank that layers are in."""

    def __init__(self, seed: int = 0, dp_rank: int = 0) -> None:
        self.seed = seed
        self.dp_rank = dp_rank
        self.forward_pass = (0, 0)
        """Step and micro-batch, set before each forward pass."""
        self.documents: Documents | None = None
        """None: a row is one sequence."""
        self.shares: Shares | None = None
        """None: there is no padding."""
        self.cache: KeyValueCache | None = None
        """Of sequences that get token after token; None: a pass sees all that there is."""
        self._made: tuple[object, dict[object, Any]] = None, {}
        """What the layers of one pass share, and of which."""

    @property
    def share(self) -> float:
        """Of this pass's positions that are no padding."""
        return 1.0 if self.shares is None else self.shares(*self.forward_pass, self.dp_rank)

    def stream(self, place: str, device: torch.device) -> AbstractContextManager[None]:
        """What torch draws inside comes from the stream of `place`; its generator is left as it was found."""
        return _seeded(device, stream_seed(self.seed, *self.forward_pass, self.dp_rank, place))

    def repeatable(self, compute: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`compute` for torch's `checkpoint`: whenever it runs, it is in the pass that it would be in now."""
        own = self.forward_pass

        def repeat(hidden: Tensor) -> Tensor:
            current, self.forward_pass = self.forward_pass, own
            try:
                return compute(hidden)
            finally:
                self.forward_pass = current

        return repeat

    def positions(self, device: torch.device) -> Tensor | None:
        """Of every token in its document, [batch, sequence]; None: 0, 1, ... in each row."""
        if self.cache is not None:
            return self.cache.positions()
        if self.documents is None:
            return None
        positions: Tensor = self.shared("positions", lambda: positions_in(self._documents(device)))
        return positions

    def mask(self, query: Tensor, causal: bool, window: int | None) -> Tensor | None:
        """What to add to scores: 0 where a query sees a key, else -inf, [1 or batch, 1, sequence, sequence].

        None: it sees all keys, or with `causal` those up to its own. A truth value would take a byte, but every layer
        would make numbers of it, and keep them for its backward pass.

        Args:
            query: of any head, [..., sequence, head_dim].
            window: see `sliding_window` of `harness.spec.config.Model`.
        """
        length, device, dtype = query.shape[-2], query.device, query.dtype
        window = window if window is not None and window < length else None
        if self.documents is None and window is None:
            return None
        what = "mask", length, causal, window, device, dtype
        mask: Tensor = self.shared(what, lambda: self._make_mask(length, causal, window, device, dtype))
        return mask

    def _make_mask(
        self, length: int, causal: bool, window: int | None, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        seen = torch.ones(1, length, length, dtype=torch.bool, device=device)
        if causal:
            seen = seen.tril()
        if window is not None:
            seen = seen.triu(1 - window)
        if self.documents is not None:
            documents = self._documents(device)
            seen = seen & (documents.unsqueeze(2) == documents.unsqueeze(1))
        scores = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
        return scores.unsqueeze(1)

    def _documents(self, device: torch.device) -> Tensor:
        assert self.documents is not None
        return self.documents(*self.forward_pass, self.dp_rank).to(device)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def shared(self, what: object, make: Callable[[], T]) -> T:
        """Made once for all layers of a pass; of all passes, where rows are whole sequences."""
        current: object = None
        if self.cache is not None:
            current = self.cache.num_passes
        elif self.documents is not None:
            current = self.documents, self.forward_pass, self.dp_rank
        if self._made[0] != current:
            self._made = current, {}
        made = self._made[1]
        if what not in made:
            with torch.inference_mode(False):  # it may serve training later
                made[what] = make()
        found: T = made[what]
        return found


def positions_in(documents: Tensor) -> Tensor:
    """Place of each token in its document, [batch, sequence].

    Args:
        documents: as `Documents` gives them.
    """
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - places.where(begins, 0).cummax(dim=1).values


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """torch's generator of a device, seeded, then put back."""
    on_gpu = device.type == "cuda"
    generator = torch.cuda.default_generators[device.index] if on_gpu else torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
