"""The loss on one rank against F.cross_entropy; several ranks are in test_tensor_parallel.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.model.groups import TensorParallel
from harness.model.loss import PipelineLoss, vocab_parallel_cross_entropy

SINGLE = TensorParallel.single()
NUM_COLUMNS = 300


def ours(logits: Tensor, targets: Tensor, vocab_size: int, ignore_index: int = -100) -> Tensor:
    return vocab_parallel_cross_entropy(logits, targets, vocab_size, SINGLE, ignore_index)


def reference(logits: Tensor, targets: Tensor, vocab_size: int, ignore_index: int = -100) -> Tensor:
    """In the type of the logits."""
    flat = logits[..., :vocab_size].flatten(0, -2)
    losses = F.cross_entropy(flat, targets.flatten(), reduction="none", ignore_index=ignore_index)
    return losses.reshape(targets.shape)


def weights_of(targets: Tensor) -> Tensor:
    """Of the losses; of both signs, exact in fp32."""
    return torch.linspace(-1, 2, targets.numel()).reshape(targets.shape)


def with_gradient(compute: Callable[..., Tensor], logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of the logits of their weighted sum."""
    leaf = logits.clone().requires_grad_()
    losses = compute(leaf, targets)
    losses.backward(weights_of(targets).to(losses.dtype))
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    vocab_size=st.integers(1, 20),
    padding=st.integers(0, 3),
    ignore_index=st.sampled_from([-100, 0]),
    scale=st.sampled_from([0.1, 3.0, 1e4]),
)
def test_equals_cross_entropy(
    seed: int, shape: list[int], vocab_size: int, padding: int, ignore_index: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, vocab_size + padding, generator=generator, dtype=torch.float64)
    logits[..., vocab_size:] = 10 * scale  # padding must not count, however large
    targets = torch.randint(vocab_size, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < 0.3] = ignore_index
    case = {"vocab_size": vocab_size, "ignore_index": ignore_index}
    losses, gradient = with_gradient(partial(ours, **case), logits, targets)
    expected, expected_gradient = with_gradient(partial(reference, **case), logits, targets)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-10 * scale)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)
    assert not losses[targets == ignore_index].any()
    assert not gradient[targets == ignore_index].any()


def rounding_bounds(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """What rounding to fp32 can change in the losses and in the logits' gradient, to first order in u = 2^-24.

    One rounding changes a result by u of it; exp, log and expm1 are exact to two of those. Let d be a logit's distance
    from the maximum, p its probability, E[d] the sum of p d, V the number of columns, T the sum of exponentials.

    - exp(-d) is off by d + 2 of those: rounding d shifts the exponent by u d.
    - T is off by V + E[d] + 2, in whatever order the V numbers are added. (torch adds V/4, V/8 or V/16 numbers in each
      lane of the processor's vectors, one after the other. When one of them is nearly all of T, that loses the most.)
    - exp(-d) / T costs 2, as some kernels multiply with 1 / T, and T found again from that 1 more: V + E[d] + 5.
    - loss = log T + d of the target adds 2 log T, the target's d and the loss itself: V + E[d] + 5 + 3 loss, times u.
    - The gradient, p times weight: exp, T, the division and two products, V + d + E[d] + 8, times u p weight.
    - Of the target, expm1(-loss) times weight: u (1 - p) weight thrice, and the loss' own error times p weight.

    Then the gradient gets the type of the logits: half an eps of that, or half of its smallest number.
    """
    u, target, weight = 2.0**-24, targets.unsqueeze(-1), weights.unsqueeze(-1).abs()
    exact, kind = logits.double(), torch.finfo(logits.dtype)
    probability = exact.softmax(-1)
    distance = exact.amax(-1, keepdim=True) - exact
    roundings = logits.shape[-1] + (probability * distance).sum(-1, keepdim=True)
    loss = exact.logsumexp(-1, keepdim=True) - exact.gather(-1, target)
    loss_bound = u * (roundings + 5 + 3 * loss)
    certainty, doubt = (-loss).exp(), -(-loss).expm1()
    size = probability.scatter(-1, target, doubt) * weight
    bound = u * (roundings + distance + 8) * size
    bound.scatter_(-1, target, (3 * u * doubt + loss_bound * certainty) * weight)
    return loss_bound.squeeze(-1), bound + (size + kind.tiny) * kind.eps / 2


def over_bounds(dtype: torch.dtype, compute: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
    """The largest errors of losses and gradient over their bounds; half of the rows are sure of the target."""
    targets = torch.arange(64)
    logits = (4 * torch.randn(64, NUM_COLUMNS, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[targets[:32], targets[:32]] += 20
    found = with_gradient(compute, logits, targets)
    exact = with_gradient(partial(reference, vocab_size=NUM_COLUMNS), logits.double(), targets)
    bounds = rounding_bounds(logits, targets, weights_of(targets))
    assert found[1].dtype == dtype
    return [float(((f.double() - e).abs() / b).max()) for f, e, b in zip(found, exact, bounds, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_is_computed_in_fp32(dtype: torch.dtype) -> None:
    assert max(over_bounds(dtype, partial(ours, vocab_size=NUM_COLUMNS))) <= 1


WRONG: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bf16": lambda logits, targets: reference(logits.bfloat16(), targets, NUM_COLUMNS),
    "fp16": lambda logits, targets: reference(logits.half(), targets, NUM_COLUMNS),
    "bf16 in the end": lambda logits, targets: ours(logits, targets, NUM_COLUMNS).bfloat16(),
    "a column is missing": lambda logits, targets: ours(logits, targets, NUM_COLUMNS - 1),
    "a thousandth too much": lambda logits, targets: 1.001 * ours(logits, targets, NUM_COLUMNS),
}


@pytest.mark.parametrize("name", WRONG)
def test_bounds_of_rounding_find_what_is_wrong(name: str) -> None:
    assert min(over_bounds(torch.float32, WRONG[name])) > 10


def test_target_outside_the_vocabulary_is_not_a_number() -> None:
    targets = torch.tensor([0, 4, -3, -100])  # the fifth column is padding
    losses = vocab_parallel_cross_entropy(torch.zeros(4, 5), targets, 4, SINGLE)
    assert losses.isnan().tolist() == [False, True, True, False]


def test_second_backward_is_refused() -> None:
    logits = torch.zeros(2, 5, requires_grad=True)
    loss = vocab_parallel_cross_entropy(logits, torch.tensor([1, 2]), 5, SINGLE).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"in-?place"):
        loss.backward()


def test_mean_of_micro_batches_is_the_mean_over_valid_tokens() -> None:
    torch.manual_seed(0)
    num_micro_batches, dp = 3, 2
    logits, targets = torch.randn(6, 2, 7, 11), torch.randint(11, (6, 2, 7))
    targets[0, 0, :5], targets[3, :, 2:] = -100, -100
    weight = torch.tensor(num_micro_batches * dp / float((targets >= 0).sum()))
    loss_function = PipelineLoss(11, SINGLE)
    losses = [loss_function(logits[i], (targets[i], weight)) for i in range(num_micro_batches * dp)]
    expected = F.cross_entropy(logits.flatten(0, 2), targets.flatten())
    torch.testing.assert_close(torch.stack(losses).mean(), expected)
