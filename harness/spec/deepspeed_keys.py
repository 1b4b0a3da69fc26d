"""Settings of DeepSpeed: which it reads, and which the harness derives."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from harness.errors import ConfigError

# Top-level keys DeepSpeed reads; it ignores any other in silence, so a misspelt one is refused, and so are
# those it has removed (it stops on them) and `bfloat16`, its old name of bf16.
DEEPSPEED_KEYS = frozenset(
    """activation_checkpointing aio autotuning bf16 checkpoint comet comms_logger communication_data_type compile
    csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather
    disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps
    gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine log_level
    managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients scheduler
    seq_parallel_communication_data_type steps_per_print tensor_parallel tensorboard timers torch_autocast
    train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization""".split()
)
DEEPSPEED_PIPELINE_KEYS = frozenset(
    "use_reentrant activation_checkpoint_interval pipe_partitioned grad_partitioned".split()
)

# Keys the harness derives: dotted name -> what to set instead.
DEEPSPEED_DERIVED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "train.gradient_clipping",
    "optimizer": "train.optimizer",
    "scheduler": "train.learning_rate_decay",
    "steps_per_print": "nothing: each step is a line of metrics.jsonl",
    "fp16.enabled": "train.precision",
    "bf16.enabled": "train.precision",
    "torch_autocast": "train.precision",
    "data_types.grad_accum_dtype": "train.precision",
    "data_types.param_dtype": "train.precision",
    "zero_optimization.stage": "parallel.zero_stage",
    "tensor_parallel": "parallel.tp",
    "expert_parallel": "nothing: the models have no experts",
    "managed_gradient_accumulation": "nothing: the pipeline engine accumulates",
    "gradient_allreduce_op": "nothing: the gradients of replicas are averaged",
    "pipeline.pipe_partitioned": "parallel.sequence_parallel, with which slices of activations cross stages",
    "pipeline.grad_partitioned": "parallel.sequence_parallel, with which slices of gradients cross stages",
    "pipeline.activation_checkpoint_interval": "train.activation_checkpointing",
    "activation_checkpointing": "train.activation_checkpointing",
    "wall_clock_breakdown": "nothing: spans/ holds every instruction",
    "wandb": "tracking.wandb",
}


def check_deepspeed_settings(settings: Mapping[str, Any]) -> None:
    """Refuse `deepspeed.*` keys that the harness derives or DeepSpeed does not know.

    Raises:
        ConfigError: with the key and what to set instead.
    """
    sections = {dotted.split(".")[0] for dotted in DEEPSPEED_DERIVED if "." in dotted}
    for key, value in settings.items():
        children = list(value) if isinstance(value, Mapping) else []
        for dotted in (key, *(f"{key}.{child}" for child in children)):
            if dotted in DEEPSPEED_DERIVED:
                raise ConfigError(f"deepspeed.{dotted} is derived by the harness; set {DEEPSPEED_DERIVED[dotted]}")
        _check_known("deepspeed", [key], DEEPSPEED_KEYS)
        if key in sections and not isinstance(value, Mapping):
            raise ConfigError(f"deepspeed.{key}={value!r} is not a section; give it keys, such as deepspeed.{key}.KEY")
        if key == "pipeline":
            _check_known("deepspeed.pipeline", children, DEEPSPEED_PIPELINE_KEYS)


def _check_known(section: str, keys: list[str], known: frozenset[str]) -> None:
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(key, sorted(known), n=1)
            remedy = f"did you mean {section}.{close[0]}?" if close else "remove it"
            raise ConfigError(f"{section}.{key} is not a setting DeepSpeed reads; {remedy}")
