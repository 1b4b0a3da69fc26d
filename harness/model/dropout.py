"""Dropout (arXiv 1207.0580) whose masks depend on what is computed, not on where, when or how often.

Every mask is drawn from a random stream of its own. Its seed is a function of (seed, step, micro-batch, data-parallel
rank, place in the model), so a model cut into pipeline stages draws the masks of the whole one, a resumed training
those of the uninterrupted, and the second computation of a checkpointed layer those of the first. Tensor-parallel
ranks that hold the same values draw the same mask; where each holds values of its own, attention heads or a slice of
the sequence, its tensor-parallel rank is part of the seed too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def stream_seed(*key: object) -> int:
    """Seed of a random stream: 63 bits, a function of `key` alone."""
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


class RandomStreams:
    """What all streams of this rank have in common, and which forward pass it is that draws from them."""

    def __init__(self, seed: int = 0, dp_rank: int = 0) -> None:
        self.seed = seed
        self.dp_rank = dp_rank
        self.forward_pass = (0, 0)
        """Step and micro-batch, set before each forward pass."""

    def stream(self, place: str, device: torch.device) -> AbstractContextManager[None]:
        """What torch draws inside comes from the stream of `place`; its generator is left as it was found."""
        return _seeded(device, stream_seed(self.seed, *self.forward_pass, self.dp_rank, place))

    def repeatable(self, compute: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`compute` for torch's `checkpoint`: whenever it runs, it draws what it would draw now."""
        own = self.forward_pass

        def repeat(hidden: Tensor) -> Tensor:
            current, self.forward_pass = self.forward_pass, own
            try:
                return compute(hidden)
            finally:
                self.forward_pass = current

        return repeat


class Dropout(nn.Module):
    """Zeroes values with probability `rate` and divides the others by 1 - rate, in training.

    Args:
        place: name in the model, such as `blocks.3.attention.output`.
        tp_rank: where tensor-parallel ranks hold different values; None where they hold the same.
    """

    def __init__(self, rate: float, streams: RandomStreams, place: str, tp_rank: int | None) -> None:
        super().__init__()
        self.rate = rate
        self.streams = streams
        self.place = place if tp_rank is None else f"{place} {tp_rank}"

    @property
    def current_rate(self) -> float:
        """The rate in training, else 0."""
        return self.rate if self.training else 0.0

    def drawing(self, compute: Callable[..., Tensor], first: Tensor, *others: Tensor) -> Tensor:
        """What `compute` makes of tensors; what torch draws for it comes from this place's stream."""
        return self._draw(compute, first, *others) if self.current_rate > 0 else compute(first, *others)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _draw(self, compute: Callable[..., Tensor], first: Tensor, *others: Tensor) -> Tensor:
        with self.streams.stream(self.place, first.device):
            return compute(first, *others)

    def forward(self, hidden: Tensor) -> Tensor:
        """[...] -> the same shape; with a rate of 0 the same tensor."""
        return hidden if self.current_rate == 0 else self.drawing(partial(F.dropout, p=self.rate), hidden)


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
