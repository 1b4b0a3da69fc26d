"""A small model that computes the same way: what a parity check runs instead of the real one."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from harness.spec.config import Generate, Model, RunConfig
from harness.spec.generation import gives_prompts
from harness.spec.partition import layers_per_part
from harness.spec.schedules import check_sizes

HEAD_DIM = 8
SEQUENCE_LENGTH = 20
VOCAB_SIZE = 60
MICRO_BATCHES = 4
MICRO_BATCH_SIZE = 2
PROMPT_LENGTH = 20
NEW_TOKENS = 8
PREFILL_CHUNK = 6
BLOCK_SIZE = 4
WINDOW = 6
"""Of a generation: less than a prompt, as its chunks, and than what the cache holds in a few blocks."""
ROWS_OF_GROUP = 3
ENTERING_LATER = 3
"""Requests more than there are slots."""


def twin_of(config: RunConfig) -> RunConfig:
    """The configuration with few small layers and as few micro-batches as the schedule takes.

    Every option that changes the computation is kept: family, ties, precision, layout, kind of partition,
    ZeRO, sequence parallelism, checkpointing, whether key-value heads are grouped, fewer than tp or several on a rank,
    whether attention is as wide as the residual stream, whether a window hides anything, whether vocabulary and
    sequence divide by tp, and dropout where tp is 1. Beyond, it is switched off: where tensor-parallel ranks hold
    different values they draw different masks, so it is the same in every layout on average only.
    (`harness.run.tasks.verify` switches it off on GPUs as well.)
    Weights are random also where the model begins from others (`model.weights`), which are of its real size.

    Of a generation it keeps how tokens are chosen, the number of groups, and whether prompts pass in chunks, or fewer
    at a time than a group has. Prompts are random, and more than have a place at once. Its weights are not quantized:
    int8 is no rounding error of what one rank computes.
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
            "generate": _twin_generation(config) if config.task == "generate" else config.generate,
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
    for section in ("model", "parallel", "train", "generate"):
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
            "sliding_window": _twin_window(config),
            "dropout": model.dropout if tp == 1 else 0.0,
            "weights": None,
        }
    )


def _twin_generation(config: RunConfig) -> Generate:
    """Few short prompts, which need a place as long as the twin's window, or longer."""
    settings, model = config.generate, config.model
    count = min(settings.num_groups or config.parallel.pp, settings.batch_size)
    rows, uneven = divmod(settings.batch_size, count)
    own_rows = min(rows, ROWS_OF_GROUP)
    batch_size = count * own_rows + min(uneven, 1)
    chunk, at_once = settings.prefill_chunk, settings.prefill_batch_size
    if chunk is not None:
        has_several = gives_prompts(config) or chunk < settings.prompt_length
        chunk = min(chunk, PREFILL_CHUNK) if has_several else None
    if at_once is not None:
        at_once = min(at_once, batch_size if at_once >= rows else max(1, own_rows - 1))
    changes: dict[str, Any] = {
        "prompt": None,
        "prompts_file": None,
        "output": None,
        "prompt_length": max(1, min(settings.prompt_length, PROMPT_LENGTH, model.max_position_embeddings - 1)),
        "max_new_tokens": min(settings.max_new_tokens, NEW_TOKENS),
        "batch_size": batch_size,
        "num_requests": batch_size + ENTERING_LATER,
        "request_rate": None,
        "prefill_chunk": chunk,
        "prefill_batch_size": at_once,
        "block_size": min(settings.block_size, BLOCK_SIZE),
        "top_k": min(settings.top_k, _like(model.vocab_size, VOCAB_SIZE, config.parallel.tp) // 2),
        "stop_tokens": None,
        "stop_strings": [],
        "ignore_stop": True,
        "quantization": "none",
    }
    return settings.model_copy(update=changes)


def _twin_window(config: RunConfig) -> int | None:
    """One that hides as large a share of a sample, if it hides any; of a generation some of every longer prompt."""
    window, sequence_length = config.model.sliding_window, config.train.sequence_length
    if window is not None and config.task == "generate":
        return min(window, WINDOW) if window < config.model.max_position_embeddings else window
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
