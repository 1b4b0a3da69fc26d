"""A small model that computes the same way: what a parity check runs instead of the real one."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from harness.spec.config import Model, RunConfig
from harness.spec.partition import layers_per_part
from harness.spec.schedules import check_sizes

HEAD_DIM = 8
SEQUENCE_LENGTH = 20
VOCAB_SIZE = 60
MICRO_BATCHES = 4
MICRO_BATCH_SIZE = 2


def twin_of(config: RunConfig) -> RunConfig:
    """The configuration with few small layers and as few micro-batches as the schedule takes.

    Every option that changes the computation is kept: family, ties, precision, layout, kind of partition,
    ZeRO, sequence parallelism, checkpointing, whether key-value heads are grouped, fewer than tp or several on a rank,
    whether attention is as wide as the residual stream, whether a window hides anything, whether vocabulary and
    sequence divide by tp, and dropout where tp is 1. Beyond, it is switched off: where tensor-parallel ranks hold
    different values they draw different masks, so it is the same in every layout on average only.
    (`harness.run.tasks.verify` switches it off on GPUs as well.)
    Weights are random also where the model begins from others (`model.weights`), which are of its real size.
    """
    partition = _twin_partition(config)
    model = _twin_model(config, sum(partition) if isinstance(partition, list) else None)
    train = config.train
    micro_batch_size = min(train.micro_batch_size, MICRO_BATCH_SIZE)
    num_micro_batches = _twin_micro_batches(config)
    sequence_length = min(train.sequence_length, _like(train.sequence_length, SEQUENCE_LENGTH, config.parallel.tp))
    return config.model_copy(
        update={
            "model": model,
            "parallel": config.parallel.model_copy(update={"partition": partition}),
            "train": train.model_copy(
                update={
                    "micro_batch_size": micro_batch_size,
                    "global_batch_size": micro_batch_size * num_micro_batches * config.parallel.dp,
                    "sequence_length": sequence_length,
                }
            ),
        }
    )


def _twin_micro_batches(config: RunConfig) -> int:
    """As few as the schedule takes, from `MICRO_BATCHES` on."""
    parallel, most = config.parallel, config.num_micro_batches
    if parallel.schedule_passes is not None:  # a file has as many as it has
        return most
    for number in range(min(MICRO_BATCHES, most), most):
        with suppress(ValueError):
            check_sizes(parallel.schedule, parallel.pp, number, parallel.num_chunks, parallel.schedule_memory)
            return number
    return most


def reductions(config: RunConfig, twin: RunConfig) -> dict[str, tuple[Any, Any]]:
    """What the twin changed: key -> (configured, twin's)."""
    changed: dict[str, tuple[Any, Any]] = {}
    for section in ("model", "parallel", "train"):
        before, after = getattr(config, section).model_dump(), getattr(twin, section).model_dump()
        changed |= {f"{section}.{key}": (before[key], after[key]) for key in before if before[key] != after[key]}
    return changed


def _twin_model(config: RunConfig, num_layers: int | None) -> Model:
    model, tp, full = config.model, config.parallel.tp, config.model.num_hidden_layers
    num_parts = config.parallel.pp * config.parallel.num_chunks
    kv_heads = min(model.num_key_value_heads, 2 * tp)
    heads = max(kv_heads, tp) * min(2, model.num_attention_heads // max(model.num_key_value_heads, tp))
    shared = max(1, tp // kv_heads)  # ranks that hold a part of one key-value head
    head_dim = HEAD_DIM if HEAD_DIM % shared == 0 else 2 * shared
    width = heads * head_dim
    is_as_wide = model.hidden_size == model.num_attention_heads * model.head_dim
    return model.model_copy(
        update={
            "num_hidden_layers": num_layers or min(full, 2 * num_parts + full % num_parts),
            "hidden_size": width if is_as_wide else width + HEAD_DIM,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "intermediate_size": 3 * width,
            "vocab_size": _like(model.vocab_size, VOCAB_SIZE, tp),
            "sliding_window": _twin_window(model, config.train.sequence_length),
            "dropout": model.dropout if tp == 1 else 0.0,
            "weights": None,
        }
    )


def _twin_window(model: Model, sequence_length: int) -> int | None:
    """One that hides as large a share of a sample, if it hides any."""
    window = model.sliding_window
    if window is None or window >= sequence_length:
        return window
    return max(1, min(window, SEQUENCE_LENGTH * window // sequence_length))


def _twin_partition(config: RunConfig) -> str | list[int]:
    """Listed layers keep their order of sizes, with one to three layers each."""
    if not isinstance(config.parallel.partition, list):
        return config.parallel.partition
    sizes = layers_per_part(config.model, config.parallel, config.train.sequence_length)
    return [min(3, 1 + size - min(sizes)) for size in sizes]


def _like(size: int, small: int, tp: int) -> int:
    """About `small`, with the remainder that `size` leaves when divided by tp."""
    return -(-small // tp) * tp + size % tp
