"""Content of result.json of an inference: what it measured, beside what was predicted of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from harness.record.columns import inferred_columns
from harness.record.inference import MeasuredInference


def build_inference_result(
    run: MeasuredInference,
    cache_bytes: Sequence[int],
    predicted_cache_bytes: Sequence[int],
    peak_memory_bytes: Sequence[int],
    transport: str,
    matrix_products: str,
) -> dict[str, Any]:
    """What is written, as rank 0 knows it.

    Args:
        cache_bytes: of keys and values, by rank.
        predicted_cache_bytes: by rank, before anything ran.
        peak_memory_bytes: by rank.
        transport: what carries messages between ranks; empty for one.
        matrix_products: what computed them.
    """
    return {
        "row": inferred_columns(run),
        "kv_cache_bytes": {"measured": list(cache_bytes), "predicted": list(predicted_cache_bytes)},
        "peak_memory_bytes": list(peak_memory_bytes),
        "transport": transport or None,
        "matrix_products": matrix_products,
        "held_out": run.held_out and asdict(run.held_out),
        "missing": [],
    }
