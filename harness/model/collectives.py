"""Communication inside a layer that autograd knows about, in the terms of Megatron-LM.

f and g are conjugate (arXiv 1909.08053): f copies forward and sums gradients backward, g sums forward and
copies gradients backward. Sequence parallelism (arXiv 2205.05198) moves as much with a slice on each rank:
f becomes a gather forward and a reduce-scatter backward, g a reduce-scatter forward and a gather backward.

Each function takes a group, and g and `gather_last_dim` do nothing where that is None. All traffic goes through
`all_reduce`, `all_gather` and `reduce_scatter`, one place to measure it or to replace it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from harness.model.groups import Group
from harness.model.products import product
from harness.model.uncompiled import apply
from harness.model.weight_gradients import WeightGradients, product_gradients

SEQUENCE = -2
"""The dimension that sequence parallelism slices: [batch, sequence, hidden]."""


class Collective(NamedTuple):
    """A collective that was begun, of a kind of `harness.spans.span.NESTED_KINDS`."""

    kind: str
    group: Group
    work: dist.Work | None
    """None: it is done."""
    tensor: Tensor

    def wait(self) -> Tensor:
        """Its result."""
        if self.work is not None:
            with self.group.parts.part(self.kind):
                self.work.wait()
        return self.tensor


def all_reduce(tensor: Tensor, group: Group, overlap: bool = False) -> Collective:
    """Sum a contiguous tensor over the ranks of `group`, in place.

    Args:
        overlap: begin only; it goes on beside what is computed until the caller waits.
    """
    with group.parts.part("tp_all_reduce"):
        work = dist.all_reduce(tensor, group=group.process_group, async_op=overlap)
    return Collective("tp_all_reduce", group, work, tensor)


def all_gather(tensor: Tensor, group: Group, overlap: bool = False) -> Collective:
    """The tensors of all ranks of `group`, in the order of ranks and all of one shape: [...] -> [ranks, ...]."""
    gathered, ranks = tensor.new_empty((group.size, *tensor.shape)), group.process_group
    with group.parts.part("tp_all_gather"):
        work = dist.all_gather_single(gathered.view(-1), tensor.reshape(-1), group=ranks, async_op=overlap)
    return Collective("tp_all_gather", group, work, gathered)


def reduce_scatter(chunks: Tensor, group: Group, overlap: bool = False) -> Collective:
    """The sum over ranks of this rank's chunk: [ranks, ...], contiguous -> [...]."""
    own, ranks = chunks.new_empty(chunks.shape[1:]), group.process_group
    with group.parts.part("tp_reduce_scatter"):
        work = dist.reduce_scatter_single(own.view(-1), chunks.view(-1), group=ranks, async_op=overlap)
    return Collective("tp_reduce_scatter", group, work, own)


def copied_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, group: Group, later: WeightGradients | None
) -> Tensor:
    """Megatron's f and the product it feeds: [..., in] -> [..., out].

    f is the identity forward, and the all-reduce of the gradient backward, which goes on beside the weight's.

    Args:
        later: takes the gradients of weight and bias; None: backward computes them at once.
    """
    return apply(_CopiedLinear, hidden, weight, bias, group, later)


def reduce_from_tensor_parallel(tensor: Tensor, group: Group | None) -> Tensor:
    """Megatron's g: all-reduce forward, identity backward.

    Overwrites `tensor`, which must be the fresh result of a matrix product or a look-up.
    """
    if group is not None and torch.is_grad_enabled():
        return apply(_Reduce, tensor, group)
    return tensor if group is None else all_reduce(tensor, group).tensor


def gather_last_dim(tensor: Tensor, group: Group | None) -> Tensor:
    """Concatenate the last dimension over ranks: [..., n] -> [..., n x ranks].

    Backward, every rank's gradient of the whole is summed and this rank's slice kept.
    """
    return tensor if group is None else apply(_GatherLastDim, tensor, group)


def gathered_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, group: Group, later: WeightGradients | None
) -> Tensor:
    """f of sequence parallelism and the product it feeds: [..., sequence/ranks, in] -> [..., sequence, out].

    Only this rank's slice is kept for backward, which gathers the others again (arXiv 2205.05198, section 4.2.2).

    Args:
        later: takes the gradients of weight and bias; None: backward computes them at once.
    """
    return apply(_GatheredLinear, hidden, weight, bias, group, later)


def scatter_sum(tensor: Tensor, group: Group) -> Tensor:
    """g of sequence parallelism: sum over ranks, then slice, [..., sequence, hidden] -> [..., sequence/ranks, hidden].

    Backward, the slices of the gradient are gathered.
    """
    return apply(_ScatterSum, tensor, group)


def _gather(tensor: Tensor, dim: int, group: Group) -> Tensor:
    """Concatenate dimension `dim` (negative) over ranks."""
    return _concatenated(all_gather(tensor, group).wait(), dim)


def _concatenated(gathered: Tensor, dim: int) -> Tensor:
    """[ranks, ...] -> [...], the ranks' parts of dimension `dim` (negative) one after the other."""
    return gathered.movedim(0, dim - 1).flatten(dim - 1, dim)


def _scatter_sum(tensor: Tensor, dim: int, group: Group, overlap: bool = False) -> Collective:
    """Sum over ranks, of which each keeps its slice of dimension `dim` (negative)."""
    chunks = torch.unflatten(tensor, dim, (group.size, -1)).movedim(dim - 1, 0)
    return reduce_scatter(chunks.contiguous(), group, overlap)


class _CopiedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, group: Group, later: WeightGradients | None
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.parameters, ctx.group, ctx.later = (weight, bias), group, later
        return product(hidden, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        (hidden, weight), gradient = ctx.saved_tensors, gradients[0]
        has_bias = ctx.parameters[1] is not None
        reduced = all_reduce(product(gradient, weight.t()), ctx.group, overlap=True)
        if ctx.later is not None:
            ctx.later.leave(lambda: product_gradients(gradient, hidden, has_bias), *ctx.parameters)
            return reduced.wait(), None, None, None, None
        of_weight, *of_bias = product_gradients(gradient, hidden, has_bias)
        return reduced.wait(), of_weight, of_bias[0] if of_bias else None, None, None


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
        return _scatter_sum(gradients[0], -1, ctx.group).wait(), None


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, group: Group, later: WeightGradients | None
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.parameters, ctx.group, ctx.later = (weight, bias), group, later
        return product(_gather(hidden, SEQUENCE, group), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        (hidden, weight), gradient, group = ctx.saved_tensors, gradients[0], ctx.group
        has_bias = ctx.parameters[1] is not None
        if ctx.later is not None:

            def of_parameters() -> list[Tensor]:
                return product_gradients(gradient, _gather(hidden, SEQUENCE, group), has_bias)

            ctx.later.leave(of_parameters, *ctx.parameters)
            return _scatter_sum(product(gradient, weight.t()), SEQUENCE, group).wait(), None, None, None, None
        gathered = all_gather(hidden, group, overlap=True)
        scattered = _scatter_sum(product(gradient, weight.t()), SEQUENCE, group, overlap=True)
        whole = _concatenated(gathered.wait(), SEQUENCE)
        of_weight, *of_bias = product_gradients(gradient, whole, has_bias)
        return scattered.wait(), of_weight, of_bias[0] if of_bias else None, None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _scatter_sum(tensor, SEQUENCE, group).wait()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _gather(gradients[0], SEQUENCE, ctx.group), None
