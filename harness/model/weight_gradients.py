"""Backward passes in two halves: the gradient of the input first, those of the weights later (arXiv 2401.10241).

A stage of a pipeline waits for the first half of the stage after it, and nobody waits for the second. So where a
schedule splits backward passes, linear maps and embeddings compute only the gradient of their input, and leave a
computation for each of their weights with `WeightGradients`. Norms, positions and biases that are added after a sum
over ranks have small gradients, which belong to the first half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from harness.model.products import goes_through_onednn, product
from harness.model.uncompiled import apply


class PutOff(NamedTuple):
    """A part of a backward pass that was put off."""

    compute: Callable[[], Sequence[Tensor]]
    """The gradients of the parameters, one of the shape of each."""
    parameters: tuple[Tensor, ...]
    """Empty where a layer only takes time, as emulated ones do."""


class WeightGradients:
    """What the backward passes of one rank have left to do."""

    def __init__(self) -> None:
        self._left: list[PutOff] = []

    def leave(self, compute: Callable[[], Sequence[Tensor]], *parameters: Tensor | None) -> None:
        """Put off a part of the pass that runs now; what it needs stays in memory until then.

        Args:
            compute: the gradients of the parameters, those that are None left out.
        """
        self._left.append(PutOff(compute, tuple(parameter for parameter in parameters if parameter is not None)))

    def take(self) -> list[PutOff]:
        """What passes have left since this was asked last, in their order."""
        left, self._left = self._left, []
        return left


def add_gradients(left: list[PutOff]) -> None:
    """Compute what was put off, and add it to the gradients of parameters as a backward pass does.

    It is one: hooks that wait for gradients (of ZeRO, or that add up bf16 in fp32) see nothing new, and the first
    gradient of a parameter becomes its `grad` without a copy.

    Args:
        left: from `WeightGradients.take`; is emptied, so that each part frees what it needed.
    """
    left.reverse()
    while left:
        compute, parameters = left.pop()
        if parameters:
            torch.autograd.backward(_GradientsOf.apply(compute, *parameters))  # type: ignore[no-untyped-call]
        else:
            compute()


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, later: WeightGradients | None) -> Tensor:
    """A matrix product and a bias, [..., in] -> [..., out].

    Args:
        later: takes the gradients of weight and bias; None: backward computes them at once.
    """
    if later is None and not goes_through_onednn(hidden, weight):
        return F.linear(hidden, weight, bias)
    return apply(_Linear, hidden, weight, bias, later)


def embedding(rows: Tensor, weight: Tensor, later: WeightGradients | None) -> Tensor:
    """Rows of a matrix: integers [...] -> [..., hidden]; `later` as in `linear`."""
    if later is None:
        return F.embedding(rows, weight)
    return apply(_Embedding, rows, weight, later)


def product_gradients(gradient: Tensor, hidden: Tensor, has_bias: bool) -> list[Tensor]:
    """Gradients of a product's weight [out, in] and bias [out], if it has one, as F.linear has them.

    Args:
        gradient: of the output, [..., out].
        hidden: the input, [..., in].
    """
    rows = gradient.reshape(-1, gradient.shape[-1])
    of_weight = product(rows.t(), hidden.reshape(-1, hidden.shape[-1]).t())
    return [of_weight, rows.sum(dim=0)] if has_bias else [of_weight]


class _GradientsOf(torch.autograd.Function):
    """Of no use but for its backward pass, which hands autograd the gradients of the parameters."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], Sequence[Tensor]], *parameters: Tensor) -> Tensor:
        ctx.compute = compute
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.compute()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, later: WeightGradients | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.parameters, ctx.later = (weight, bias), later  # what was saved is, recomputed, another tensor
        return product(hidden, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (hidden, weight), gradient = ctx.saved_tensors, gradients[0]
        has_bias = ctx.parameters[1] is not None
        of_hidden = product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        if ctx.later is not None:
            ctx.later.leave(lambda: product_gradients(gradient, hidden, has_bias), *ctx.parameters)
            return of_hidden, None, None, None
        of_weight, *of_bias = product_gradients(gradient, hidden, has_bias)
        return of_hidden, of_weight, of_bias[0] if of_bias else None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, later: WeightGradients) -> Tensor:
        ctx.rows, ctx.weight, ctx.later = rows, weight, later
        return F.embedding(rows, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        rows, weight, gradient = ctx.rows, ctx.weight, gradients[0]

        def compute() -> list[Tensor]:
            return [torch.ops.aten.embedding_dense_backward(gradient, rows, len(weight), -1, False)]

        ctx.later.leave(compute, weight)
        return None, None, None
