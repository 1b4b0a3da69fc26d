"""What one rank of each pipeline stage keeps in memory, counted.

Weights, gradients and optimizer state follow from the layout and from what DeepSpeed keeps besides the model.
Activations are what PyTorch saves for backward in `harness.model.block`, with the symbols of arXiv 2205.05198,
section 4: that paper's 34 bytes per token and hidden value become 32 here without dropout (its two masks), and its
quadratic term 5 a s / h is gone with flash attention, which keeps one fp32 number per head and token. With t
tensor-parallel ranks, u = t with sequence parallelism and else 1, h hidden, q and k the widths of all query and of
all key heads, f the feed-forward width, a heads and B bytes per value, a block saves per token

    gpt2   B (4 h / u + (2 q + 2 k) / t + 2 f / t) + 4 a / t + 16 / u
    llama  B (4 h / u + (3 q + 3 k) / t + 4 f / t) + 4 a / t + 8 / u

and with dropout 2 h / u for masks of one byte (on CPU masks are of the values' type, and attention keeps its
probabilities). 4 h are the inputs of both norms and of both first projections; then query, key and value
(query and key before and after a rotation; the value is part of the first), the attention's output, and in the
feed-forward layer the input of the activation and what follows it (if gated: gate and up, the activated gate, their
product); then the attention's and the norms' statistics. PyTorch's RMSNorm on CPU is no single kernel and keeps
more. What lives for a moment only (workspaces, gradients of activations, buckets of reductions) is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness.spec.config import Model, Parallel, RunConfig
from harness.spec.counts import stage_parameters_per_rank
from harness.spec.precision import PRECISIONS, PrecisionName
from harness.spec.schedules import schedule_of

FP32_BYTES = PRECISIONS["fp32"].bytes_per_value


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one rank of a stage."""

    parameter_bytes: float
    gradient_bytes: float
    """At their most: with what adds up over micro-batches beside the gradients of one."""
    optimizer_bytes: float
    """fp32 copies of the weights and the moments."""
    activation_bytes: float
    """At their peak, with all micro-batches in flight."""
    buffer_bytes: float
    """What the stage receives into."""
    micro_batches_in_flight: int
    """Forward passes done whose backward pass is not, at most."""

    @property
    def total_bytes(self) -> float:
        """All parts; they peak together, in the backward pass."""
        parts = (self.parameter_bytes, self.gradient_bytes, self.optimizer_bytes)
        return sum(parts) + self.activation_bytes + self.buffer_bytes


def memory_per_stage(config: RunConfig, layers_per_stage: Sequence[int]) -> list[StageMemory]:
    """Counted memory of one rank of every stage, in order."""
    parallel, train = config.parallel, config.train
    p, value = len(layers_per_stage), PRECISIONS[train.precision].bytes_per_value
    in_flight = schedule_of(config).micro_batches_in_flight
    stages = []
    for stage, layers in enumerate(layers_per_stage):
        held = stage_parameters_per_rank(config.model, parallel.tp, layers, stage == 0, stage == p - 1)
        received = train.micro_batch_size * train.sequence_length * config.model.hidden_size * value
        received //= num_slices(parallel)
        stages.append(
            StageMemory(
                parameter_bytes=held * value,
                gradient_bytes=held * gradient_bytes_per_parameter(config),
                optimizer_bytes=held * optimizer_bytes_per_parameter(config),
                activation_bytes=activation_bytes(config, layers, stage, p, in_flight[stage]),
                buffer_bytes=received * ((stage > 0) + (stage < p - 1)),
                micro_batches_in_flight=in_flight[stage],
            )
        )
    return stages


def memory_beside_measured(
    config: RunConfig, layers_per_stage: Sequence[int], peak_bytes: Sequence[int], device_kind: str
) -> list[dict[str, Any]]:
    """Counted parts of one rank of every stage, and the measured peak of the stage's largest rank.

    Args:
        peak_bytes: measured, by rank; on CPU all that is resident, so also the interpreter, the libraries and the
            buffers of communication: a few hundred MiB that are not counted.
    """
    stages = config.parallel.topology.stages()
    measured = "resident memory of the process" if device_kind == "cpu" else "allocated by torch on the device"
    return [
        {
            "stage": stage,
            **asdict(counted),
            "total_bytes": counted.total_bytes,
            "measured_peak_bytes": max(peak_bytes[rank] for rank in ranks),
            "measured": measured,
        }
        for stage, (ranks, counted) in enumerate(zip(stages, memory_per_stage(config, layers_per_stage), strict=True))
    ]


def gradient_bytes_per_parameter(config: RunConfig) -> int:
    """The gradient, and in bf16 DeepSpeed's separate sum over micro-batches."""
    sums = PRECISIONS[config.gradient_dtype].bytes_per_value if config.train.precision == "bf16" else 0
    return PRECISIONS[config.train.precision].bytes_per_value + sums


def optimizer_bytes_per_parameter(config: RunConfig) -> float:
    """AdamW's two moments and DeepSpeed's fp32 copy of the weights, which plain fp32 training has not.

    ZeRO splits both over the data-parallel ranks; DeepSpeed's bf16 optimizer does so without ZeRO too.
    """
    precision, zero = config.train.precision, config.parallel.zero_stage > 0
    moments = 2 * FP32_BYTES if config.train.optimizer == "adamw" else 0
    copy = FP32_BYTES if zero or precision != "fp32" else 0
    return (moments + copy) / (config.parallel.dp if zero or precision == "bf16" else 1)


def num_slices(parallel: Parallel) -> int:
    """Ranks over which what is between attention and feed-forward layers is sliced."""
    return parallel.tp if parallel.sequence_parallel else 1


def block_activation_bytes_per_token(model: Model, parallel: Parallel, precision: PrecisionName) -> float:
    """What one block saves for backward, on one rank."""
    architecture = model.architecture
    if not architecture.computes:
        return 0.0
    tp, slices, value = parallel.tp, num_slices(parallel), PRECISIONS[precision].bytes_per_value
    queries = model.num_attention_heads // tp * model.head_dim
    keys = max(model.num_key_value_heads // tp, 1) * model.head_dim  # ranks may share a head
    inner = model.intermediate_size // tp
    attention = (3 if architecture.positions == "rotary" else 2) * (queries + keys)
    values = 4 * model.hidden_size / slices + attention + (4 if architecture.gated else 2) * inner
    statistics = model.num_attention_heads // tp + 2 * architecture.norm.num_statistics / slices
    masks = 2 * model.hidden_size / slices if model.dropout > 0 else 0
    return values * value + statistics * FP32_BYTES + masks


def activation_bytes(
    config: RunConfig, layers: int, stage: int, num_stages: int, micro_batches_in_flight: int
) -> float:
    """Activations on one rank of a stage at their peak.

    Per micro-batch in flight: what the blocks save (with activation checkpointing their inputs, and all of
    one block once, while it is computed again), and DeepSpeed's copies of what came in and went out. On
    the last stage also the final norm, the logits and their fp32 exponentials; DeepSpeed holds the logits
    of the micro-batch before until they are overwritten.
    """
    model, train = config.model, config.train
    value = PRECISIONS[train.precision].bytes_per_value
    slices = num_slices(config.parallel)
    hidden = model.hidden_size * value / slices
    block = block_activation_bytes_per_token(model, config.parallel, train.precision)
    checkpointing = train.activation_checkpointing == "full"
    kept = layers * (hidden if checkpointing else block)
    ends = hidden * ((stage > 0) + (stage < num_stages - 1))
    if stage == 0 and model.dropout > 0:
        ends += model.hidden_size / slices  # the embedding's mask
    per_token = micro_batches_in_flight * (kept + ends)
    if checkpointing:
        per_token += block
    if stage == num_stages - 1:
        per_token += 2 * hidden + head_activation_bytes_per_token(config)
    return per_token * train.micro_batch_size * train.sequence_length


def head_activation_bytes_per_token(config: RunConfig) -> float:
    """Logits of this and the last micro-batch, their exponentials in fp32 and, below fp32, in the model's type."""
    value = PRECISIONS[config.train.precision].bytes_per_value
    columns = config.model.padded_vocab_size(config.parallel.tp) // config.parallel.tp
    logits = value * min(2, config.num_micro_batches)
    exponentials = FP32_BYTES + (value if value < FP32_BYTES else 0)
    return columns * (logits + exponentials)
