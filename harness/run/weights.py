"""What a rank's parameters are before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor, nn

from harness.model.groups import TensorParallel
from harness.model.pretrained import read_slice
from harness.model.weights import fill, initialize, load_full, load_slices
from harness.run.checkpoint import WeightReader
from harness.spec.config import RunConfig
from harness.spec.initial_weights import is_checkpoint
from harness.spec.parameters import parameter_table
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
    table, origin = parameter_table(config.model), config.model.weights
    if weights is not None:
        load_full(parameters, table, weights, tp)
    elif origin is None:
        initialize(parameters, config.model, tp, config.train.seed)
    elif is_checkpoint(Path(origin)):
        reader = WeightReader(Path(origin), config.model)
        fill(parameters, table, lambda spec, parameter: reader.read_slice(spec, parameter, tp))
    else:
        pretrained = open_pretrained(Path(origin), config.model)
        load_slices(parameters, table, lambda spec: read_slice(pretrained, spec, tp.rank, tp.size))
