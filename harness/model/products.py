"""Matrix products of layers: by torch's usual library, or in fp32 on CPUs by oneDNN where that is faster.

torch hands fp32 products to MKL, which keeps to AVX2 on processors that are not Intel's. oneDNN, which torch has as
well and takes for bf16, uses AVX-512 wherever it is: on Zen 5 it makes more than twice as many FLOP/s. Both round as
fp32 does.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

WORTHWHILE_FLOP = 2**23
"""Smaller products gain less than autograd functions of Python take."""


HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
"""Whether this torch has it."""


def _is_onednn_faster() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    is_amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
    return HAS_ONEDNN and is_amd and torch.backends.cpu.get_cpu_capability() == "AVX512"


IS_ONEDNN_FASTER = _is_onednn_faster()
"""For large products on one thread; measured on Zen 5 alone (tests/benchmarks/products.py)."""

_wanted: bool | None = None
_has_used_onednn = False


def use_onednn(wanted: bool | None) -> None:
    """Choose for all layers of this process.

    Args:
        wanted: for all fp32 products on CPUs; None: for those that it is faster for.
    """
    global _wanted, _has_used_onednn
    _wanted, _has_used_onednn = wanted, False


def library() -> str:
    """What computed since `use_onednn`: `onednn`, if only some of the products, or `torch`."""
    return "onednn" if _has_used_onednn else "torch"


def goes_through_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether `product` of them does."""
    if left.dtype != torch.float32 or left.device.type != "cpu":
        return False
    flop = 2 * left.numel() * len(right)
    if _wanted is None:
        return IS_ONEDNN_FASTER and flop >= WORTHWHILE_FLOP
    return _wanted and flop > 0 and HAS_ONEDNN


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left right^T + bias: [..., in], [out, in] and [out] -> [..., out]; has no gradient of its own."""
    global _has_used_onednn
    if not goes_through_onednn(left, right):
        return F.linear(left, right, bias)
    _has_used_onednn = True
    return product_by_onednn(left, right, bias)


def product_by_onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` of fp32 tensors on CPU, whatever was chosen."""
    dense = None if bias is None else bias.contiguous()
    rows = torch.ops.mkldnn._linear_pointwise(left.reshape(-1, left.shape[-1]), right, dense, "none", [], "")
    shape = (*left.shape[:-1], len(right))
    result: Tensor = torch.ops.aten._unsafe_view(rows, shape)  # unlike a view, it may be overwritten
    return result
