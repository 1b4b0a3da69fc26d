"""A backward pass in two halves is the whole one, bit by bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.model.weight_gradients import WeightGradients, add_gradients, embedding, linear

Layer = Callable[..., Tensor]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_halves_are_the_whole(dtype: torch.dtype, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (3, 4, 7), generator=generator)  # three micro-batches
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in ((11, 6), (5, 6), (5,))]
    outgoing = torch.randn(3, 4, 7, 5, generator=generator).to(dtype)

    def trained(
        look_up: Callable[..., Tensor], product: Callable[..., Tensor], end: Callable[[], None]
    ) -> list[Tensor]:
        table, weight, bias = (nn.Parameter(value.clone()) for value in values)
        for rows, gradient in zip(tokens, outgoing, strict=True):
            product(look_up(rows, table), weight, bias if has_bias else None).backward(gradient)
            end()
        return [p.grad for p in (table, weight, bias) if p.grad is not None]

    later = WeightGradients()
    whole = trained(F.embedding, F.linear, lambda: None)
    halves = trained(
        lambda rows, table: embedding(rows, table, later),
        lambda hidden, weight, bias: linear(hidden, weight, bias, later),
        lambda: add_gradients(later.take()),
    )
    assert len(halves) == 2 + has_bias
    assert all(torch.equal(half, one) for half, one in zip(halves, whole, strict=True))


def test_a_first_gradient_is_not_copied_and_hooks_are_told_once() -> None:
    parameter, computed, told = nn.Parameter(torch.zeros(4)), list[int](), list[Tensor]()
    parameter.register_post_accumulate_grad_hook(lambda p: told.append(p.grad.clone()))
    later = WeightGradients()

    def compute() -> list[Tensor]:
        gradient = torch.ones(4)
        computed.append(gradient.data_ptr())
        return [gradient]

    later.leave(compute, parameter)
    later.leave(compute, parameter)
    left = later.take()
    add_gradients(left[:1])
    assert parameter.grad is not None
    assert parameter.grad.data_ptr() == computed[0]
    add_gradients(left[1:])
    assert [gradient.tolist() for gradient in told] == [[1] * 4, [2] * 4]
    assert later.take() == []
