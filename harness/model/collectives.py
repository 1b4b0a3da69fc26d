"""Communication inside a layer that autograd knows about, in the terms of Megatron-LM.

f and g are conjugate (arXiv 1909.08053): f copies forward and sums gradients backward, g sums forward and
copies gradients backward. Sequence parallelism (arXiv 2205.05198) moves as much with a slice on each rank:
f becomes a gather forward and a reduce-scatter backward, g a reduce-scatter forward and a gather backward.

Each function takes a group, and f, g and `gather_last_dim` do nothing where that is None. All traffic goes through
`all_reduce`, `all_gather` and `reduce_scatter`, one place to measure it or to replace it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from harness.model.groups import Group
from harness.model.weight_gradients import WeightGradients, product_gradients

SEQUENCE = -2
"""The dimension that sequence parallelism slices: [batch, sequence, hidden]."""


def all_reduce(tensor: Tensor, group: Group) -> None:
    """Sum a contiguous tensor over the ranks of `group`, in place."""
    with group.parts.part("tp_all_reduce"):
        dist.all_reduce(tensor, group=group.process_group)


def all_gather(tensor: Tensor, group: Group) -> Tensor:
    """The tensors of all ranks of `group`, in the order of ranks and all of one shape: [...] -> [ranks, ...]."""
    gathered = tensor.new_empty((group.size, *tensor.shape))
    with group.parts.part("tp_all_gather"):
        dist.all_gather_single(gathered.view(-1), tensor.reshape(-1), group=group.process_group)
    return gathered


def reduce_scatter(chunks: Tensor, group: Group) -> Tensor:
    """The sum over ranks of this rank's chunk: [ranks, ...], contiguous -> [...]."""
    ranks = group.process_group
    if dist.get_backend(ranks) == "gloo":  # makes an all-reduce of a reduce-scatter, in twice the time of this
        received = torch.empty_like(chunks)
        with group.parts.part("tp_reduce_scatter"):
            dist.all_to_all_single(received, chunks, group=ranks)
        return received.sum(dim=0)
    own = torch.empty_like(chunks[0])
    with group.parts.part("tp_reduce_scatter"):
        dist.reduce_scatter_single(own.view(-1), chunks.view(-1), group=ranks)
    return own


def copy_to_tensor_parallel(tensor: Tensor, group: Group | None) -> Tensor:
    """Megatron's f: identity forward, all-reduce of the gradient backward.

    The gradient is reduced in place, so feed the result to one matrix product and nothing else: its
    backward makes a fresh gradient, while additions and views hand on one that others hold too.
    """
    return tensor if group is None else _Copy.apply(tensor, group)  # type: ignore[no-untyped-call]


def reduce_from_tensor_parallel(tensor: Tensor, group: Group | None) -> Tensor:
    """Megatron's g: all-reduce forward, identity backward.

    Overwrites `tensor`, which must be the fresh result of a matrix product or a look-up.
    """
    return tensor if group is None else _Reduce.apply(tensor, group)  # type: ignore[no-untyped-call]


def gather_last_dim(tensor: Tensor, group: Group | None) -> Tensor:
    """Concatenate the last dimension over ranks: [..., n] -> [..., n x ranks].

    Backward, every rank's gradient of the whole is summed and this rank's slice kept.
    """
    return tensor if group is None else _GatherLastDim.apply(tensor, group)  # type: ignore[no-untyped-call]


def gathered_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, group: Group, later: WeightGradients | None
) -> Tensor:
    """f of sequence parallelism and the product it feeds: [..., sequence/ranks, in] -> [..., sequence, out].

    Only this rank's slice is kept for backward, which gathers the others again (arXiv 2205.05198, section 4.2.2).

    Args:
        later: takes the gradients of weight and bias; None: backward computes them at once.
    """
    return _GatheredLinear.apply(hidden, weight, bias, group, later)  # type: ignore[no-untyped-call, no-any-return]


def scatter_sum(tensor: Tensor, group: Group) -> Tensor:
    """g of sequence parallelism: sum over ranks, then slice, [..., sequence, hidden] -> [..., sequence/ranks, hidden].

    Backward, the slices of the gradient are gathered.
    """
    return _ScatterSum.apply(tensor, group)  # type: ignore[no-untyped-call, no-any-return]


def _gather(tensor: Tensor, dim: int, group: Group) -> Tensor:
    """Concatenate dimension `dim` (negative) over ranks."""
    return all_gather(tensor, group).movedim(0, dim - 1).flatten(dim - 1, dim)


def _scatter_sum(tensor: Tensor, dim: int, group: Group) -> Tensor:
    """Sum over ranks, of which each keeps its slice of dimension `dim` (negative)."""
    chunks = torch.unflatten(tensor, dim, (group.size, -1)).movedim(dim - 1, 0)
    return reduce_scatter(chunks.contiguous(), group)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return tensor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        all_reduce(gradient, ctx.group)
        return gradient, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.mark_dirty(tensor)
        all_reduce(tensor, group)
        return tensor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _GatherLastDim(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gather(tensor, -1, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _scatter_sum(gradients[0], -1, ctx.group), None


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, group: Group, later: WeightGradients | None
    ) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.weight, ctx.bias, ctx.group, ctx.later = weight, bias, group, later
        return F.linear(_gather(hidden, SEQUENCE, group), weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        (hidden,), gradient, weight, bias, group = ctx.saved_tensors, gradients[0], ctx.weight, ctx.bias, ctx.group

        def of_parameters() -> list[Tensor]:
            return product_gradients(gradient, _gather(hidden, SEQUENCE, group), bias is not None)

        hidden_gradient = _scatter_sum(gradient @ weight, SEQUENCE, group)
        if ctx.later is not None:
            ctx.later.leave(of_parameters, weight, bias)
            return hidden_gradient, None, None, None, None
        of_weight, *of_bias = of_parameters()
        return hidden_gradient, of_weight, of_bias[0] if of_bias else None, None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _scatter_sum(tensor, SEQUENCE, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _gather(gradients[0], SEQUENCE, ctx.group), None
