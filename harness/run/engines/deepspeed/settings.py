"""The DeepSpeed configuration of a run.

Every DeepSpeed default that changes the computation is written out. DeepSpeed clips at norm 1.0 when
`gradient_clipping` is absent, and with fp32 and pipeline stages it clips each stage by a norm of its own
part; the key is therefore always present, and 0 where `harness.run.engines.deepspeed.clipping` does the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.spec.config import RunConfig


def clips_by_itself(config: RunConfig) -> bool:
    """Whether DeepSpeed's optimizer takes the true global norm; the plain fp32 path does not."""
    return config.train.precision != "fp32" or config.parallel.zero_stage > 0


def build_deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """Settings for `deepspeed.initialize`, with the user's `deepspeed.*` merged last."""
    train, parallel = config.train, config.parallel
    settings: dict[str, Any] = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": config.num_micro_batches,
        "gradient_clipping": train.gradient_clipping if clips_by_itself(config) else 0.0,
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "fp16": {"enabled": train.precision == "fp16", "loss_scale": 0, "initial_scale_power": 16},
        "bf16": {"enabled": train.precision == "bf16"},
        "data_types": {"grad_accum_dtype": config.gradient_dtype},
        "zero_optimization": {"stage": parallel.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": train.optimizer == "sgd",
        "pipeline": {
            "pipe_partitioned": False,
            "grad_partitioned": False,
            "activation_checkpoint_interval": 0,
            "use_reentrant": False,
        },
    }
    return _merge(settings, config.deepspeed)


def _merge(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `extra` laid over it, section by section."""
    merged = dict(base)
    for key, value in extra.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged
