"""What a rank's parameters are before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.model.groups import TensorParallel
from harness.model.pretrained import read_slice
from harness.model.weights import fill, initialize, load_full
from harness.run.checkpoint import WeightReader
from harness.run.engines.engine import Engine
from harness.spec.config import Model, RunConfig
from harness.spec.initial_weights import is_checkpoint
from harness.spec.parameters import ParameterSpec, parameter_table
from harness.spec.pretrained import open_pretrained


def fill_parameters(
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: RunConfig,
    tp: TensorParallel,
    weights: Callable[[str], Tensor] | None = None,
) -> None:
    """Fill this rank's parameters, given with their global names: from `model.weights`, or with fresh weights.

    Args:
        weights: full parameter by global name, instead of either.

    Raises:
        ConfigError: `model.weights` can't be read.
    """
    table = parameter_table(config.model)
    if weights is not None:
        load_full(parameters, table, weights, tp)
    elif config.model.weights is None:
        initialize(parameters, config.model, tp, config.train.seed)
    else:
        fill(parameters, table, _reading(config.model, tp))


def fill_masters(engine: Engine) -> None:
    """Give an optimizer that steps in fp32 the weights of `model.weights` as they are.

    It has them from parameters of the training's precision, which are rounded and stay so.

    Raises:
        ConfigError: they can't be read.
    """
    model = engine.config.model
    table, read = parameter_table(model), _reading(model, engine.tp)
    shapes = {name: parameter.shape for name, parameter in engine.parameters()}
    with torch.no_grad():
        for name, held in engine.held(tied_copies=True):
            read(table[name], local := torch.empty(shapes[name]))
            own = local.view(-1)[held.start : held.start + held.length]
            held.master.view(-1)[held.first : held.first + held.length].copy_(own)


def _reading(model: Model, tp: TensorParallel) -> Callable[[ParameterSpec, Tensor], object]:
    """What reads this rank's slice of a parameter into memory, from where `model.weights` says."""
    assert model.weights is not None
    place = Path(model.weights)
    if is_checkpoint(place):
        reader = WeightReader(place, model)
        return lambda spec, memory: reader.read_slice(spec, memory, tp)
    pretrained = open_pretrained(place, model)

    def read(spec: ParameterSpec, memory: Tensor) -> None:
        local = read_slice(pretrained, spec, tp.rank, tp.size)
        assert local.shape == memory.shape, f"{spec.name}: {local.shape} does not fit {memory.shape}"
        memory.copy_(local)

    return read
