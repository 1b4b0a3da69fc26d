"""Dropout: rates, context, and the same masks wherever and whenever the same thing is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from helpers_model import fill, normal, random_state, random_tokens, tiny_model
from torch import Tensor, nn

from harness.model import context as context_module
from harness.model.assembly import build_layers, describe_layers
from harness.model.block import TransformerBlock
from harness.model.context import PassContext
from harness.model.dropout import Dropout
from harness.model.groups import TensorParallel
from harness.model.loss import PipelineLoss

SINGLE = TensorParallel.single()
MODEL = tiny_model(dropout=0.25)


def mask(
    rate: float = 0.5, place: str = "blocks.0.mlp", tp_rank: int | None = None, size: int = 100_000, **of: Any
) -> Tensor:
    """What dropout makes of ones."""
    context = PassContext(of.get("seed", 1), of.get("dp_rank", 0))
    context.forward_pass = (of.get("step", 0), of.get("micro_batch", 0))
    return Dropout(rate, context, place, tp_rank)(torch.ones(size))


def are_independent(a: Tensor, b: Tensor) -> bool:
    """Of two masks that drop a half: they agree in about half of the places, within 4 standard deviations."""
    return bool(abs((a == b).float().mean() - 0.5) < 4 * 0.5 / len(a) ** 0.5)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate_and_expectation(rate: float) -> None:
    dropped = mask(rate)
    kept = 1 - rate
    assert dropped.unique().tolist() == pytest.approx([0, 1 / kept])
    deviation = (rate * kept / len(dropped)) ** 0.5
    assert abs((dropped > 0).float().mean() - kept) < 4 * deviation
    assert abs(dropped.mean() - 1) < 4 * deviation / kept


def test_same_key_same_mask() -> None:
    assert torch.equal(mask(), mask())
    assert torch.equal(mask(tp_rank=1), mask(tp_rank=1))


KEYS: list[dict[str, Any]] = [
    {}, {"seed": 2}, {"step": 1}, {"micro_batch": 1}, {"dp_rank": 1}, {"place": "blocks.1.mlp"},
    {"place": "blocks.0.attention"}, {"tp_rank": 0}, {"tp_rank": 1}, {"step": 1, "micro_batch": 1},
]  # fmt: skip


def test_every_part_of_the_key_has_a_stream_of_its_own() -> None:
    masks = [mask(**key) for key in KEYS]
    for i in range(len(KEYS)):
        for j in range(i):
            assert are_independent(masks[i], masks[j]), (KEYS[i], KEYS[j])


def places(tp: TensorParallel) -> dict[str, str]:
    """Streams of a block by module."""
    block = TransformerBlock(MODEL, tp, activation_checkpointing=False, name="blocks.3")
    return {name: module.place for name, module in block.named_modules() if isinstance(module, Dropout)}


def embedding_stream(tp: TensorParallel) -> str:
    """Stream of the embedding's dropout."""
    layer = next(layer for layer in describe_layers(MODEL, tp) if layer.name == "embedding_dropout").build()
    assert isinstance(layer, Dropout)
    assert layer.rate == MODEL.dropout
    return layer.place


def test_ranks_share_streams_where_they_share_values() -> None:
    """Heads are split in any case, what is between layers with sequence parallelism."""
    ranks = [TensorParallel(group=None, rank=rank, size=2, kv_group=None, kv_size=1) for rank in (0, 1)]
    sliced = [replace(rank, sequence_parallel=True) for rank in ranks]
    between = {"attention_dropout", "mlp_dropout"}
    for first, second, differ in ((*ranks, {"attention.dropout"}), (*sliced, {"attention.dropout", *between})):
        a, b = places(first), places(second)
        assert a.keys() == {"attention.dropout", *between}
        assert len({*a.values()}) == 3
        assert {name for name in a if a[name] != b[name]} == differ
        assert (embedding_stream(first) != embedding_stream(second)) == ("mlp_dropout" in differ)


def test_attention_drops_probabilities() -> None:
    """The same values everywhere come out of attention as the sum of the probabilities that are left."""
    model = tiny_model(dropout=0.5, hidden_size=64, head_dim=8)
    attention = TransformerBlock(model, SINGLE, activation_checkpointing=False).attention
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.zero_()
        attention.qkv.bias[128:] = 1  # values
        attention.output.weight.copy_(torch.eye(64))
        sums = attention(torch.zeros(500, 16, 64)).unflatten(-1, (8, 8))[..., 0]
        assert set(sums[:, 0].unique().tolist()) == {0.0, 2.0}  # the first token sees itself alone
        assert abs(sums.mean() - 1) < 0.02
        assert sums[:, 15].var() == pytest.approx(0.25 / 16 * 4, rel=0.1)
        assert torch.equal(attention.eval()(torch.zeros(1, 16, 64)), torch.ones(1, 16, 64))


def build(model: Any, checkpointing: bool, context: PassContext) -> nn.Module:
    layers = build_layers(model, SINGLE, checkpointing, context)
    fill(layers, model, random_state(model), SINGLE)
    return layers


def gradients(model: Any, checkpointing: bool) -> dict[str, Tensor]:
    """Of two micro-batches whose forward passes both come before the backward passes."""
    context = PassContext(seed=1)
    layers, (tokens, targets) = build(model, checkpointing, context), random_tokens(model)
    loss = PipelineLoss(model.vocab_size, SINGLE)
    losses = []
    for micro_batch in (0, 1):
        context.forward_pass = (7, micro_batch)
        losses.append(loss(layers(tokens), (targets, torch.tensor(0.1))))
    assert losses[0] != losses[1]
    for value in losses:
        value.backward()
    assert context.forward_pass == (7, 1)
    return {name: parameter.grad for name, parameter in layers.named_parameters()}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_computing_again_repeats_the_masks(family: str) -> None:
    model = tiny_model(family, dropout=0.25)
    plain, checkpointed = gradients(model, False), gradients(model, True)
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name


def test_nothing_leaks_into_torchs_generator() -> None:
    layers, (tokens, _) = build(MODEL, True, PassContext()), random_tokens(MODEL)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = layers(tokens)
    first.sum().backward()
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(layers(tokens), first)  # nor does it depend on it


@pytest.mark.parametrize("state", [{"dropout": 0.0}, {"dropout": 0.25, "eval": True}])
def test_nothing_is_drawn_without_dropout(state: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(dropout=state["dropout"])
    layers, (tokens, _) = build(model, False, PassContext()), random_tokens(model)
    reference = build(tiny_model(), False, PassContext())(tokens)
    if state.get("eval"):
        layers.eval()
    monkeypatch.setattr(context_module, "stream_seed", None)
    assert torch.equal(layers(tokens), reference)
    names = [layer.name for layer in describe_layers(model, SINGLE)]
    assert ("embedding_dropout" in names) == (model.dropout > 0)
    hidden = normal(2, 3, seed=1)
    assert Dropout(0.0, PassContext(), "", None)(hidden) is hidden


def test_expected_loss_is_near_that_without() -> None:
    """To first order in the rate; the average over 100 masks."""
    tokens, targets = random_tokens(MODEL)
    found = {}
    for rate in (0.0, 0.02):
        model, context = tiny_model(dropout=rate), PassContext(seed=1)
        layers, loss = build(model, False, context), PipelineLoss(model.vocab_size, SINGLE)
        found[rate] = []
        for step in range(100 if rate else 1):
            context.forward_pass = (step, 0)
            with torch.no_grad():
                found[rate].append(float(loss(layers(tokens), (targets, 1 / (targets >= 0).sum()))))
    values = torch.tensor(found[0.02])
    assert values.std() > 0
    assert values.mean() == pytest.approx(found[0.0][0], rel=0.05)


# --- through the engine

TRAINING = [
    "model=gpt2_tiny", "model.num_hidden_layers=2", "model.hidden_size=32", "model.num_attention_heads=4",
    "model.dropout=0.2", "data.kind=synthetic", "train.sequence_length=16", "train.global_batch_size=4",
    "train.steps=6", "train.warmup_steps=0", "train.learning_rate=1e-2", "launch.threads_per_rank=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[float]]:
    """Loss curves by layout, from one launch of one rank and one of two."""
    alone, pair = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    runs: dict[tuple[int, Path], dict[str, list[str]]] = {
        (1, alone): {
            "whole": ["train.checkpoint_interval=3"],
            "checkpointing": ["train.activation_checkpointing=full"],
            "resumed": [f"train.resume={alone}/whole/checkpoints/step-00000003"],
            "evaluated": ["train.eval_interval=1", "train.eval_samples=4"],
            "without": ["model.dropout=0.0"],
        },
        (2, pair): {
            "stages": ["parallel.pp=2"],
            "stages, checkpointing": ["parallel.pp=2", "train.activation_checkpointing=full"],
        },
    }
    curves = {}
    for (world_size, folder), cases in runs.items():
        argument = {"runs": [[name, [*TRAINING, *overrides]] for name, overrides in cases.items()]}
        answers = run_ranks(world_size, "ranks_train", argument, folder)
        for name, lines in zip(cases, answers, strict=True):
            curves[name] = [line["train/loss"] for line in lines]
    return curves.__getitem__


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpointing", "stages", "stages, checkpointing", "evaluated"])
def test_same_masks_same_curve(name: str, losses: Callable[[str], list[float]]) -> None:
    assert len(losses("whole")) == 6
    assert losses(name) == pytest.approx(losses("whole"), rel=1e-6)


@pytest.mark.slow
def test_masks_matter(losses: Callable[[str], list[float]]) -> None:
    assert losses("without") != pytest.approx(losses("whole"), rel=1e-4)


@pytest.mark.slow
def test_resuming_repeats_the_masks(losses: Callable[[str], list[float]]) -> None:
    assert losses("resumed") == losses("whole")[3:]
