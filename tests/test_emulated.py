"""Models that wait instead of computing: their configuration, and the waits."""

from __future__ import annotations

import time

import pytest
import torch
from helpers import MACHINE, make_config

from harness.errors import ConfigError
from harness.model.assembly import build_layers
from harness.model.context import PassContext
from harness.model.emulated import EmulatedBlock
from harness.model.groups import TensorParallel
from harness.model.weight_gradients import WeightGradients, add_gradients
from harness.model.weights import initialize
from harness.record.sources import is_oversubscribed
from harness.spec.config import EmulatedModel, RunConfig
from harness.spec.parameters import parameter_table
from harness.spec.partition import layers_per_part

FAST = ("model=emulated", "model.forward_seconds=0.01", "model.backward_seconds=0.02")


def emulated(*overrides: str) -> EmulatedModel:
    model = make_config(*FAST, *overrides).model
    assert isinstance(model, EmulatedModel)
    return model


def test_the_configuration_survives_its_file() -> None:
    config = make_config(*FAST, "parallel.pp=2", "model.stage_factors=[1,2.5]")
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
    assert config.model.model_dump()["stage_factors"] == [1, 2.5]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model=emulated", "model.forward_seconds=-1"), r"model.forward_seconds=-1.* greater than or equal to 0"),
        (("model=emulated", "model.stage_factors=[1,2]"), r"stage_factors=\[1.*\] names 2 stages, but parallel.pp=1"),
        (("model=emulated", "+model.forward_second=1"), "model.forward_second is not a configuration key"),
        (("+model.forward_seconds=1",), "model.forward_seconds is not a configuration key"),
    ],
)
def test_mistakes_are_named(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(*overrides)


def test_a_block_takes_its_time_forward_and_backward() -> None:
    block = EmulatedBlock(emulated(), TensorParallel.single(), activation_checkpointing=False)
    torch.nn.init.zeros_(block.weight)
    block.factor = 3.0
    hidden = torch.randn(1, 4, 64)
    moments = [time.perf_counter()]
    output = block(hidden)
    moments.append(time.perf_counter())
    output.sum().backward()
    moments.append(time.perf_counter())
    assert torch.equal(output, hidden)
    assert block.weight.grad is not None
    assert moments[1] - moments[0] >= 0.03
    assert moments[2] - moments[1] >= 0.06


@pytest.mark.parametrize("splits", [False, True])
def test_a_pass_takes_the_share_that_is_no_padding(splits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also backward, though the context is at another micro-batch by then."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    shares = {(7, 0, 2): 0.25, (7, 1, 2): 0.5}
    context = PassContext(dp_rank=2)
    context.shares = lambda *place: shares[place]
    later = WeightGradients() if splits else None
    block = EmulatedBlock(emulated(), TensorParallel.single(later), False, context=context)
    torch.nn.init.zeros_(block.weight)
    outputs = []
    for micro_batch in (0, 1):
        context.forward_pass = (7, micro_batch)
        outputs.append(block(torch.ones(1, 4, 64)))
    assert waits == [0.25 * 0.01, 0.5 * 0.01]
    for output, share in zip(outputs, (0.25, 0.5), strict=True):
        waits.clear()
        output.sum().backward()
        assert waits == [share * 0.02 / (2 if splits else 1)]
    if later is not None:
        waits.clear()
        add_gradients(later.take())
        assert waits == [0.25 * 0.01, 0.5 * 0.01]


def test_jitter_is_the_same_in_every_layout() -> None:
    def waits(name: str) -> list[float]:
        block = EmulatedBlock(emulated("model.jitter=0.5"), TensorParallel.single(), False, name)
        return [block._random.uniform(-1, 1) for _ in range(4)]

    assert waits("blocks.1") == waits("blocks.1") != waits("blocks.2")


def test_the_table_of_parameters_fits_the_layers() -> None:
    model = emulated("model.num_hidden_layers=3")
    layers = build_layers(model, TensorParallel.single())
    assert {name: tuple(p.shape) for name, p in layers.named_parameters()} == {
        name: spec.shape for name, spec in parameter_table(model).items()
    }
    initialize(layers.named_parameters(), model, TensorParallel.single(), seed=1)


def test_waiting_ranks_need_no_cores_and_blocks_cost_alike() -> None:
    config = make_config(*FAST, "parallel.pp=4", "parallel.partition=cost")
    assert not is_oversubscribed(config, MACHINE)
    assert is_oversubscribed(make_config("parallel.pp=4"), MACHINE)
    assert layers_per_part(config.model, config.parallel, 128) == [2, 2, 2, 2]
