"""The optimizer's policy against formulas written out here: which parameters decay, how the rate of learning goes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import make_config
from helpers_model import tiny_model

from harness.model.assembly import build_layers
from harness.model.groups import TensorParallel
from harness.run.optimizer import build_learning_rate, build_optimizer, learning_rate_factor
from harness.spec.config import Train


def train_section(**changes: Any) -> Train:
    return make_config().train.model_copy(update=changes)


BLOCK_MATRICES = ["attention.qkv.weight", "attention.output.weight", "mlp.up.weight", "mlp.down.weight"]
MATRICES = [f"blocks.{block}.{name}" for block in (0, 1) for name in BLOCK_MATRICES]


@pytest.mark.parametrize(
    ("model", "decaying", "others"),
    [
        (tiny_model("gpt2"), ["embedding.weight", "position_embedding.weight", *MATRICES], 2 * 8 + 2),
        (tiny_model("llama", tie_word_embeddings=False), ["embedding.weight", *MATRICES, "head.weight"], 2 * 2 + 1),
    ],
)  # per block of gpt2 two norms with bias and four biases, of llama two norms; and the last norm
def test_matrices_decay_norms_and_biases_do_not(model: Any, decaying: list[str], others: int) -> None:
    layers = build_layers(model, TensorParallel.single())
    names = {parameter: name for name, parameter in layers.named_parameters()}
    optimizer = build_optimizer(train_section(weight_decay=0.3), layers.parameters())
    assert isinstance(optimizer, torch.optim.AdamW)
    decays = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays.keys() == {*names.values()}
    assert sorted(name for name, decay in decays.items() if decay == 0.3) == sorted(decaying)
    assert sum(decay == 0.0 for decay in decays.values()) == others


def test_sgd_is_plain() -> None:
    weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = build_optimizer(train_section(optimizer="sgd", weight_decay=0.3, learning_rate=0.5), [weight])
    for _ in range(2):  # momentum would show in the second step
        weight.grad = torch.tensor([[0.25, 0.5]])
        optimizer.step()
    assert weight.tolist() == [[0.75, -2.5]]


@pytest.mark.parametrize("shape", [(1, 2), (2,)])
def test_adamw_by_hand(shape: tuple[int, ...]) -> None:
    """arXiv 1711.05101, algorithm 2, in float64: decoupled decay, epsilon outside of the corrected root."""
    first, second, epsilon, decay, rate = 0.6, 0.8, 0.05, 0.3, 0.1
    train = train_section(
        adam_betas=[first, second], adam_epsilon=epsilon, weight_decay=decay, learning_rate=rate,
        learning_rate_warmup_steps=2, learning_rate_decay="constant",
    )  # fmt: skip
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]).reshape(shape))
    optimizer = build_optimizer(train, [parameter])
    schedule = build_learning_rate(train, optimizer)
    gradients = [(0.5, -0.1), (-0.2, 0.3), (0.1, 0.1)]
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient).reshape(shape)
        optimizer.step()
        schedule.step()

    for element, start in enumerate((1.0, -2.0)):
        weight, m, v = start, 0.0, 0.0
        for step, factor in enumerate((0.5, 1.0, 1.0), start=1):
            g = gradients[step - 1][element]
            m, v = first * m + (1 - first) * g, second * v + (1 - second) * g * g
            weight *= 1 - factor * rate * (decay if len(shape) == 2 else 0.0)
            weight -= factor * rate * (m / (1 - first**step)) / (math.sqrt(v / (1 - second**step)) + epsilon)
        assert parameter.flatten()[element].item() == pytest.approx(weight, rel=1e-6)


def test_the_rate_rises_linearly_and_falls_along_a_cosine_to_a_tenth() -> None:
    train = train_section(learning_rate_warmup_steps=4, steps=12)
    assert [learning_rate_factor(train, step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    # From step 4 the angle grows by an eighth of 180 degrees per step.
    expected = {4: 1.0, 6: 0.55 + 0.45 * math.sqrt(0.5), 8: 0.55, 10: 0.55 - 0.45 * math.sqrt(0.5), 12: 0.1, 99: 0.1}
    assert {step: learning_rate_factor(train, step) for step in expected} == pytest.approx(expected)


def test_the_rate_without_rise_or_decay() -> None:
    constant = train_section(learning_rate_warmup_steps=2, learning_rate_decay="constant", steps=5)
    assert [learning_rate_factor(constant, step) for step in range(5)] == [0.5, 1.0, 1.0, 1.0, 1.0]
    falling = train_section(learning_rate_warmup_steps=0, steps=2)
    assert [learning_rate_factor(falling, step) for step in range(3)] == pytest.approx([1.0, 0.55, 0.1])
    only_rise = train_section(learning_rate_warmup_steps=4, steps=4)
    assert [learning_rate_factor(only_rise, step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_each_step_uses_its_own_rate() -> None:
    """torch's schedulers count calls of step(): the first step's rate must stand before any."""
    train = train_section(learning_rate=0.2, learning_rate_warmup_steps=2, steps=4)
    optimizer = build_optimizer(train, [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))])
    schedule, used = build_learning_rate(train, optimizer), []
    for _ in range(4):
        used.append({group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        schedule.step()
    assert [len(rates) for rates in used] == [1] * 4
    assert [rate for rates in used for rate in rates] == pytest.approx([0.1, 0.2, 0.2, 0.2 * 0.55])
