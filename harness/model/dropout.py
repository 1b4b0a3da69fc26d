"""Dropout (arXiv 1207.0580) whose masks depend on what is computed, not on where, when or how often.

Every mask is drawn from a random stream of its own. Its seed is a function of (seed, step, micro-batch, data-parallel
rank, place in the model), so a model cut into pipeline stages draws the masks of the whole one, a resumed training
those of the uninterrupted, and the second computation of a checkpointed layer those of the first. Tensor-parallel
ranks that hold the same values draw the same mask; where each holds values of its own, attention heads or a slice of
the sequence, its tensor-parallel rank is part of the seed too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.model.context import PassContext


class Dropout(nn.Module):
    """Zeroes values with probability `rate` and divides the others by 1 - rate, in training.

    Args:
        place: name in the model, such as `blocks.3.attention.output`.
        tp_rank: where tensor-parallel ranks hold different values; None where they hold the same.
    """

    def __init__(self, rate: float, context: PassContext, place: str, tp_rank: int | None) -> None:
        super().__init__()
        self.rate = rate
        self.context = context
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
        with self.context.stream(self.place, first.device):
            return compute(first, *others)

    def forward(self, hidden: Tensor) -> Tensor:
        """[...] -> the same shape; with a rate of 0 the same tensor."""
        return hidden if self.current_rate == 0 else self.drawing(partial(F.dropout, p=self.rate), hidden)
