"""States of whole models of `transformers` to and from ours, in memory; the harness goes tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from harness.errors import ConfigError
from harness.spec.config import Model
from harness.spec.parameters import parameter_table
from harness.spec.transformers_names import assign, counterparts, format_of


def to_transformers(full_state: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """State for the family's class in `transformers` from full parameters by global name.

    A tied head is left out, as in files that `save_pretrained` writes.

    Raises:
        ConfigError: the shape has no counterpart in `transformers`.
    """
    written, state = format_of(model), {}
    for name, spec in parameter_table(model).items():
        theirs, transposed = counterparts(name, written)
        full = full_state[name]
        pieces = torch.split(full, [size for _, size in spec.parts]) if len(theirs) > 1 else (full,)
        for their_name, piece in zip(theirs, pieces, strict=True):
            state[their_name] = (piece.t() if transposed else piece).contiguous()
    return state


def from_transformers(state: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Full parameters by global name from the state of a model of `transformers`.

    Names of older files and of models without their head are understood; copies of tied weights and what is no part
    of what is trained are ignored.

    Raises:
        ConfigError: weights are missing, of another shape, or left over.
    """
    written, full_state = format_of(model), {}
    sources = assign(state, model).sources
    for name, spec in parameter_table(model).items():
        full = torch.cat([state[their_name] for their_name in sources[name]])
        full = full.t().contiguous() if counterparts(name, written)[1] else full
        if tuple(full.shape) != spec.shape:
            raise ConfigError(
                f"{sources[name][0]} has shape {tuple(full.shape)}, but model={model.name} needs {spec.shape}; "
                "use the config.json that belongs to the weights"
            )
        full_state[name] = full
    return full_state
