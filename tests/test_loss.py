"""The loss on one rank against F.cross_entropy; several ranks are in test_tensor_parallel.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.model.groups import TensorParallel
from harness.model.loss import PipelineLoss, vocab_parallel_cross_entropy

SINGLE = TensorParallel.single()


def both(logits: Tensor, targets: Tensor, vocab_size: int, ignore_index: int = -100) -> list[tuple[Tensor, Tensor]]:
    """(losses, gradient of the logits) of ours and of F.cross_entropy in float64."""
    weights = torch.linspace(-1, 2, targets.numel(), dtype=torch.float64).reshape(targets.shape)
    ours = logits.clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(ours, targets, vocab_size, SINGLE, ignore_index)
    losses.backward(weights.to(losses.dtype))
    exact = logits.double().requires_grad_()
    flat = exact[..., :vocab_size].flatten(0, -2)
    expected = F.cross_entropy(flat, targets.flatten(), reduction="none", ignore_index=ignore_index)
    expected = expected.reshape(targets.shape)
    expected.backward(weights)
    return [(losses, ours.grad), (expected, exact.grad)]


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
    (losses, gradient), (expected, expected_gradient) = both(logits, targets, vocab_size, ignore_index)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-10 * scale)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)
    assert not losses[targets == ignore_index].any()
    assert not gradient[targets == ignore_index].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_is_computed_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (4 * torch.randn(64, 3000)).to(dtype)
    logits[torch.arange(32), torch.arange(32)] += 20  # sure of the target: 1 - softmax cancels
    (losses, gradient), (expected, expected_gradient) = both(logits, torch.arange(64), 3000)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected.float(), rtol=1e-5, atol=1e-5)
    assert gradient.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=max(2 * eps, 1e-4), atol=max(eps / 100, 5e-7))


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
