"""The precisions a model can be trained in: what each costs, needs and is called by torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PrecisionName = Literal["fp32", "bf16", "fp16"]
"""Of weights and activations."""


@dataclass(frozen=True)
class Precision:
    """One type of numbers."""

    bytes_per_value: int
    torch_dtype: str
    """Its name in torch; `harness.model.precision.dtype_of` gives the type."""
    smallest_compute_capability: float = 0.0
    """Of a GPU: what DeepSpeed asks for (fp16), the first with matrix units for it (bf16: Ampere)."""


PRECISIONS: dict[PrecisionName, Precision] = {
    "fp32": Precision(4, "float32"),
    "bf16": Precision(2, "bfloat16", smallest_compute_capability=8.0),
    "fp16": Precision(2, "float16", smallest_compute_capability=7.0),
}
