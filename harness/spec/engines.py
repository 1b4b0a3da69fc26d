"""Engines by name: where their code is, and what they can run; no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
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
    has_own_order: bool = False
    """Whether stages of a pipeline take a library's order of passes for a schedule, and its transfers."""


TORCH_SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb_v", "dualpipev")
"""Those of ours that torch.distributed.pipelining has, too."""


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
    """Refuse what torch.distributed.pipelining can't run."""
    parallel = config.parallel
    _check_plain(config, "one rank or a pipeline", ("pp",))
    if parallel.schedule not in TORCH_SCHEDULES:
        raise ConfigError(
            f"parallel.schedule={parallel.schedule} is none of torch.distributed.pipelining's, which parallel.engine="
            f"torch takes its order of passes from; use {', '.join(TORCH_SCHEDULES)}, or parallel.engine=deepspeed"
        )
    if parallel.schedule == "1f1b" and config.num_micro_batches < parallel.pp:
        raise ConfigError(
            f"parallel.schedule=1f1b needs a micro-batch per stage under parallel.engine=torch, and "
            f"{config.num_micro_batches} are fewer than parallel.pp={parallel.pp}; use more, or gpipe"
        )


DTENSOR_TRAITS = frozenset({"summary", "norm", "positions", "activation", "gated", "biases", "transformers"})
"""In which families may differ that `harness.run.engines.torch.tensor_parallel` has layers for."""


def check_dtensor(config: RunConfig) -> None:
    """Refuse what our model under DTensor can't run."""
    model, tp = config.model, config.parallel.tp
    _check_plain(config, "tensor parallelism", ("tp",))
    family = model.architecture
    others = (field for field in fields(family) if field.name not in DTENSOR_TRAITS)
    has_others = any(getattr(family, field.name) != field.default for field in others)
    if has_others or family.positions not in ("learned", "rotary") or model.type_vocab_size > 0:
        raise ConfigError(
            f"parallel.engine=dtensor has no layers for model.family={model.family}; use parallel.engine=deepspeed"
        )
    if config.masks_documents:
        raise ConfigError(
            f"parallel.engine=dtensor has no masks for data.documents={config.data.documents}; use data.documents=cut, "
            "or parallel.engine=deepspeed"
        )
    if model.sliding_window is not None and model.sliding_window < config.train.sequence_length:
        raise ConfigError(
            f"parallel.engine=dtensor has no window, but model.sliding_window={model.sliding_window} is shorter than "
            f"train.sequence_length={config.train.sequence_length}; use parallel.engine=deepspeed"
        )
    if getattr(model, "compile", False):
        raise ConfigError(
            "parallel.engine=dtensor compiles nothing; use model.compile=false or parallel.engine=deepspeed"
        )
    if model.onednn:
        raise ConfigError(
            "parallel.engine=dtensor computes products as torch does; use model.onednn=null or "
            "parallel.engine=deepspeed"
        )
    if model.num_key_value_heads % tp:
        raise ConfigError(
            f"parallel.engine=dtensor can't share model.num_key_value_heads={model.num_key_value_heads} among "
            f"parallel.tp={tp} ranks, as DTensor splits weights by whole heads only; use a tp that divides them, or "
            "parallel.engine=deepspeed"
        )
    if model.dropout > 0:
        raise ConfigError(
            f"parallel.engine=dtensor draws no masks, but model.dropout={model.dropout:g}; use 0, or "
            "parallel.engine=deepspeed"
        )


def check_ddp(config: RunConfig) -> None:
    """Refuse what DistributedDataParallel can't run."""
    _check_plain(config, "data parallelism", ("dp",))
    if config.parallel.schedule != "1f1b":
        raise ConfigError(
            f"parallel.engine=ddp runs each micro-batch's backward pass before the next one's forward pass, not "
            f"parallel.schedule={config.parallel.schedule}; use 1f1b"
        )


def _check_plain(config: RunConfig, what: str, axes: tuple[str, ...]) -> None:
    """Refuse what none of torch's engines has: other axes, ZeRO, a master copy of the weights, DeepSpeed's settings."""
    parallel, name = config.parallel, f"parallel.engine={config.parallel.engine}"
    degrees = {axis: getattr(parallel, axis) for axis in ("tp", "pp", "dp")}
    if any(degree > 1 for axis, degree in degrees.items() if axis not in axes) or parallel.zero_stage > 0:
        layout = " x ".join(f"{axis}={degree}" for axis, degree in degrees.items())
        raise ConfigError(
            f"{name} runs {what} without ZeRO, not {layout} with zero_stage={parallel.zero_stage}; use "
            "parallel.engine=deepspeed"
        )
    if parallel.sequence_parallel:
        raise ConfigError(
            f"{name} slices no sequence; use parallel.sequence_parallel=false or parallel.engine=deepspeed"
        )
    if config.train.precision != "fp32":
        raise ConfigError(
            f"{name} trains in fp32, not in train.precision={config.train.precision}; use parallel.engine=deepspeed"
        )
    if config.deepspeed:
        raise ConfigError(f"{name} reads no deepspeed.* settings; leave them out")


ENGINES: dict[str, EngineKind] = {
    "deepspeed": EngineKind("harness.run.engines.deepspeed.engine", check_deepspeed, splits_backward=True),
    "torch": EngineKind("harness.run.engines.torch.pipelining", check_torch, splits_backward=True, has_own_order=True),
    "dtensor": EngineKind("harness.run.engines.torch.tensor_parallel", check_dtensor),
    "ddp": EngineKind("harness.run.engines.torch.data_parallel", check_ddp),
}


def engine_kind(name: str) -> EngineKind:
    """An engine by its name.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in ENGINES:
        raise ConfigError(f"parallel.engine={name} is not available; use one of {', '.join(ENGINES)}")
    return ENGINES[name]
