"""The table of precisions against torch's own types."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from harness.model.precision import dtype_of
from harness.spec.precision import PRECISIONS, PrecisionName

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def test_every_name_is_in_the_table() -> None:
    assert list(PRECISIONS) == list(get_args(PrecisionName)) == list(TYPES)


@pytest.mark.parametrize("name", PRECISIONS)
def test_types_and_their_sizes_are_those_of_torch(name: PrecisionName) -> None:
    assert dtype_of(name) == TYPES[name]
    assert PRECISIONS[name].bytes_per_value == TYPES[name].itemsize
