"""Engines by name: where their code is, and what they can run; no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.errors import ConfigError

if TYPE_CHECKING:
    from harness.spec.config import RunConfig


@dataclass(frozen=True)
class EngineKind:
    """What is to be known of an engine before it is built."""

    module: str
    """Has `build`, as `harness.run.engines.engine.Build`."""
    check: Callable[[RunConfig], None]
    """Raises ConfigError for what the engine can't run."""
    splits_backward: bool = False
    """Whether it computes gradients of inputs and of weights one after the other, where a schedule asks for that."""


def check_deepspeed(config: RunConfig) -> None:
    """Refuse what DeepSpeed's pipeline engine can't run, or runs wrongly."""
    zero_stage = config.parallel.zero_stage
    if zero_stage >= 2:
        raise ConfigError(
            f"parallel.zero_stage={zero_stage} can't be combined with DeepSpeed's pipeline engine, "
            "which keeps whole gradients between micro-batches; use zero_stage 0 or 1"
        )
    if config.train.precision == "fp16" and zero_stage == 0:
        raise ConfigError(
            "train.precision=fp16 with parallel.zero_stage=0 trains wrongly in DeepSpeed, whose optimizer takes a "
            "step before the first; use parallel.zero_stage=1"
        )


def check_torch(config: RunConfig) -> None:
    """Refuse more than one rank, and what needs a master copy of the weights."""
    parallel = config.parallel
    if parallel.world_size > 1 or parallel.zero_stage > 0:
        raise ConfigError(
            f"parallel.engine=torch runs one rank without ZeRO, not tp={parallel.tp} x pp={parallel.pp} x "
            f"dp={parallel.dp} with zero_stage={parallel.zero_stage}; use parallel.engine=deepspeed"
        )
    if config.train.precision != "fp32":
        raise ConfigError(
            f"parallel.engine=torch trains in fp32, not in train.precision={config.train.precision}; "
            "use parallel.engine=deepspeed"
        )
    if config.deepspeed:
        raise ConfigError("parallel.engine=torch reads no deepspeed.* settings; leave them out")


ENGINES: dict[str, EngineKind] = {
    "deepspeed": EngineKind("harness.run.engines.deepspeed.engine", check_deepspeed, splits_backward=True),
    "torch": EngineKind("harness.run.engines.torch.engine", check_torch),
}


def engine_kind(name: str) -> EngineKind:
    """An engine by its name.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in ENGINES:
        raise ConfigError(f"parallel.engine={name} is not available; use one of {', '.join(ENGINES)}")
    return ENGINES[name]
