"""JSON as RFC 8259 defines it, which has no NaN and no infinities.

They are written as the strings "NaN", "Infinity" and "-Infinity", as Protocol Buffers and wandb do, so that the loss
of a run that diverged can be seen and any JSON parser reads the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def dumps(value: Any, **layout: Any) -> str:
    """As `json.dumps`, for every JSON text that the harness writes.

    Args:
        layout: arguments of `json.dumps`.
    """
    try:
        return json.dumps(value, allow_nan=False, **layout)
    except ValueError:
        return json.dumps(_named(value), allow_nan=False, **layout)


def _named(value: Any) -> Any:
    """The value with names for the numbers that are none."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _named(item) for key, item in value.items()}
    return [_named(item) for item in value] if isinstance(value, list | tuple) else value


def with_numbers(value: Any) -> Any:
    """What was read, with numbers for their names; for files of measurements, where these strings mean nothing else."""
    if isinstance(value, str):
        return NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: with_numbers(item) for key, item in value.items()}
    return [with_numbers(item) for item in value] if isinstance(value, list) else value
