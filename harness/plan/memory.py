"""What one rank of each pipeline stage keeps in memory, counted.

Weights, gradients and optimizer state follow from the layout and from what DeepSpeed keeps besides the model.
Activations are what PyTorch saves for backward in `harness.model.block`, with the symbols of arXiv 2205.05198,
section 4: that paper's 34 bytes per token and hidden value become 32 here without dropout (its two masks), and its
quadratic term 5 a s / h is gone with flash attention, which keeps one fp32 number per head and token. With t
tensor-parallel ranks, u = t with sequence parallelism and else 1, h hidden, q and k the widths of all query and of
all key heads, f the feed-forward width, a heads and B bytes per value, a block saves per token

    gpt2   B (4 h / u + (2 q + 2 k) / t + 2 f / t) + 4 a / t + 16 / u
    llama  B (4 h / u + (3 q + 3 k) / t + 4 f / t) + 4 a / t + 8 / u

(ReLU keeps f / t less than GELU, whose input it doesn't need; norms of heads add 4 (a + a_k) / t, for a_k key heads),
and with dropout 2 h / u for masks of one byte (on CPU masks are of the values' type, and attention keeps its
probabilities). 4 h are the inputs of both norms and of both first projections, wherever the norms are; then query, key
and value (query and key before and after a rotation; the value is part of the first), the attention's output, and in
the feed-forward layer the input of the activation and what follows it (if gated: gate and up, the activated gate, their
product); then the attention's and the norms' statistics. PyTorch's RMSNorm on CPU is no single kernel and keeps
more. What lives for a moment only (workspaces, gradients of activations, buckets of reductions) is not counted.

A schedule that splits backward passes (arXiv 2401.10241) keeps, from the first half to the second, what the gradients
of weights are made of: the input of every matrix product and the gradient of its output,

    gpt2   B (2 h / u + 2 h + (2 q + 2 k + 2 f) / t)
    llama  B (2 h / u + 2 h + (2 q + 2 k + 3 f) / t)

per token and block, also where activation checkpointing had to compute the inputs again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness.spec.config import Model, Parallel, RunConfig
from harness.spec.counts import stage_parameters_per_rank
from harness.spec.precision import PRECISIONS, PrecisionName
from harness.spec.schedules import Schedule, most_held, schedule_of

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
    """What the stage receives into, ahead of its passes."""
    micro_batches_in_flight: float
    """Forward passes done whose backward pass is not, at most; a pass of one of v chunks is 1/v."""

    @property
    def total_bytes(self) -> float:
        """All parts; they peak together, in the backward pass."""
        parts = (self.parameter_bytes, self.gradient_bytes, self.optimizer_bytes)
        return sum(parts) + self.activation_bytes + self.buffer_bytes


def memory_per_stage(config: RunConfig, layers_per_part: Sequence[int]) -> list[StageMemory]:
    """Counted memory of one rank of every stage, in order."""
    parallel, train, schedule = config.parallel, config.train, schedule_of(config)
    placement, value = schedule.placement, PRECISIONS[train.precision].bytes_per_value
    stages = []
    for stage, instructions in enumerate(schedule.stages):
        parts = placement.parts_of(stage)
        first, last = 0 in parts, placement.num_parts - 1 in parts
        layers = sum(layers_per_part[part] for part in parts)
        held = stage_parameters_per_rank(config.model, parallel.tp, layers, first, last)
        received = train.micro_batch_size * train.sequence_length * config.model.hidden_size * value
        received //= parallel.num_slices
        lanes = {(i.kind, i.chunk) for i in instructions if i.kind in ("recv_activation", "recv_gradient")}
        stages.append(
            StageMemory(
                parameter_bytes=held * value,
                gradient_bytes=held * gradient_bytes_per_parameter(config),
                optimizer_bytes=held * optimizer_bytes_per_parameter(config),
                activation_bytes=activation_bytes(config, layers_per_part, schedule, stage),
                buffer_bytes=received * len(lanes),
                micro_batches_in_flight=schedule.most_in_flight[stage],
            )
        )
    return stages


def memory_beside_measured(
    config: RunConfig, layers_per_part: Sequence[int], peak_bytes: Sequence[int], device_kind: str
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
        for stage, (ranks, counted) in enumerate(zip(stages, memory_per_stage(config, layers_per_part), strict=True))
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


def block_activation_bytes_per_token(model: Model, parallel: Parallel, precision: PrecisionName) -> float:
    """What one block saves for backward, on one rank."""
    architecture = model.architecture
    if not architecture.computes:
        return 0.0
    tp, slices, value = parallel.tp, parallel.num_slices, PRECISIONS[precision].bytes_per_value
    queries = model.num_attention_heads // tp * model.head_dim
    keys = max(model.num_key_value_heads // tp, 1) * model.head_dim  # ranks may share a head
    inner = model.intermediate_size // tp
    attention = (3 if architecture.positions == "rotary" else 2) * (queries + keys)
    kept = 4 if architecture.gated else 1 if architecture.activation == "relu" else 2
    values = 4 * model.hidden_size / slices + attention + kept * inner
    statistics = model.num_attention_heads // tp + 2 * architecture.norm.num_statistics / slices
    if architecture.head_norms:
        statistics += (queries + keys) / model.head_dim * architecture.norm.num_statistics
    masks = 2 * model.hidden_size / slices if model.dropout > 0 else 0
    return values * value + statistics * FP32_BYTES + masks


def put_off_bytes_per_token(model: Model, parallel: Parallel, precision: PrecisionName) -> float:
    """What one block keeps between the halves of a split backward pass, on one rank."""
    architecture = model.architecture
    if not architecture.computes:
        return 0.0
    queries = model.num_attention_heads * model.head_dim / parallel.tp
    keys = model.num_key_value_heads * model.head_dim / parallel.tp
    inner = model.intermediate_size / parallel.tp
    inputs = 2 * model.hidden_size / parallel.num_slices + queries + inner
    outputs = 2 * model.hidden_size + queries + 2 * keys + (2 if architecture.gated else 1) * inner
    return (inputs + outputs) * PRECISIONS[precision].bytes_per_value


def window_bytes(config: RunConfig) -> int:
    """The mask of a window that hides something, one for all passes of a rank; documents bring masks of their own."""
    window, length = config.model.sliding_window, config.train.sequence_length
    if config.masks_documents or window is None or window >= length:
        return 0
    return PRECISIONS[config.train.precision].bytes_per_value * length**2


def head_inputs(model: Model) -> int:
    """Tensors of the hidden width that what comes after the blocks saves: its inputs, each once."""
    architecture = model.architecture
    return 1 + (not architecture.norm_after) + 3 * architecture.head_transform


def head_puts_off(model: Model) -> int:
    """Tensors of the hidden width that it keeps between the halves of a split backward pass: the inputs of products,
    and the gradient of the output of one whose output is as wide."""
    return 1 + 2 * model.architecture.head_transform


def activation_bytes(config: RunConfig, layers_per_part: Sequence[int], schedule: Schedule, stage: int) -> float:
    """Activations on one rank of a stage at their peak.

    Per micro-batch in flight with a chunk: what its blocks save (with activation checkpointing their inputs, and all
    of one block once, while it is computed again), and what it sends; with the last part the inputs of the head, of
    what is before it, and the exponentials of the loss. The logits live for a moment, of one micro-batch.
    """
    model, train, placement = config.model, config.train, schedule.placement
    value, slices = PRECISIONS[train.precision].bytes_per_value, config.parallel.num_slices
    hidden = model.hidden_size * value / slices
    block = block_activation_bytes_per_token(model, config.parallel, train.precision)
    put_off = put_off_bytes_per_token(model, config.parallel, train.precision)
    checkpointing = train.activation_checkpointing == "full"
    masks = value * train.sequence_length if config.masks_documents else 0  # of attention, one for all blocks of a pass
    columns = model.padded_vocab_size(config.parallel.tp) // config.parallel.tp
    sends = {i.chunk for i in schedule.stages[stage] if i.kind == "send_activation"}
    held, waiting = [], []
    for chunk, part in enumerate(placement.parts_of(stage)):
        first, last = placement.begins(stage, chunk), placement.ends(stage, chunk)
        of_blocks = layers_per_part[part] * (hidden if checkpointing else block) + hidden * (chunk in sends)
        dropped = model.hidden_size / slices if first and model.dropout > 0 else 0
        normalized = hidden if first and model.architecture.embedding_norm else 0
        seen = masks * (not checkpointing)
        held.append(
            of_blocks + seen + dropped + normalized + (head_inputs(model) * hidden + FP32_BYTES * columns) * last
        )
        of_ends = model.hidden_size * value * first + (head_puts_off(model) * hidden + value * columns) * last
        waiting.append(layers_per_part[part] * put_off + of_ends)
    per_token = most_held(schedule.stages[stage], held, waiting if schedule.splits_backward else held)
    if checkpointing:
        per_token += block + masks
    if placement.num_parts - 1 in placement.parts_of(stage):
        per_token += value * columns * (2 if value < FP32_BYTES else 1)
    return per_token * train.micro_batch_size * train.sequence_length + window_bytes(config)
