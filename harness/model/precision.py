"""The type of tensors that a precision of the configuration stands for."""

from __future__ import annotations

import torch

from harness.spec.precision import PRECISIONS, PrecisionName


def dtype_of(precision: PrecisionName) -> torch.dtype:
    """torch's type of a precision."""
    dtype = getattr(torch, PRECISIONS[precision].torch_dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype
