"""Gradients made equal where several ranks hold the same parameters, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

SMALL = 1 << 16
"""Elements below which gradients go together: each collective has a cost of its own."""


def average(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Replace gradients by their mean over the ranks of a group.

    Args:
        gradients: of one type and in the same order on all ranks.
    """
    small = [gradient for gradient in gradients if gradient.numel() < SMALL]
    large = [gradient for gradient in gradients if gradient.numel() >= SMALL]
    together = torch.cat([gradient.flatten() for gradient in small]) if small else None
    averaged = large if together is None else [*large, together]
    for work in [dist.all_reduce(gradient, dist.ReduceOp.AVG, group, async_op=True) for gradient in averaged]:
        work.wait()
    if together is not None:
        parts = torch.split(together, [gradient.numel() for gradient in small])
        torch._foreach_copy_([gradient.view(-1) for gradient in small], list(parts))
