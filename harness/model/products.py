"""Matrix products of layers: by torch's usual library, or in fp32 on CPUs by oneDNN where that is faster.

torch hands fp32 products to MKL, which keeps to AVX2 on processors that are not Intel's. oneDNN, which torch has as
well and takes for bf16, uses AVX-512 wherever it is: on Zen 5 it makes more than twice as many FLOP/s. Both round as
fp32 does.

Products of few rows wait for the weight. oneDNN reads it at the memory's speed where it is stored in blocks that fit
its kernels, which takes a copy: worthwhile where weights stay as they are (`harness.model.packing`).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

WORTHWHILE_FLOP = 2**23
"""Smaller products gain less than autograd functions of Python take."""

WORTHWHILE_WEIGHTS = 2**16
"""Of smaller matrices a call of oneDNN, which takes 10 us longer than one of MKL, gains nothing."""

PACKED_FOR_ROWS = 8
"""What kernels a packed weight is for; those for one row would leave it as it is, those for 512 take the same blocks.
"""

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


def is_worth_packing(weight: Tensor) -> bool:
    """Whether products of several rows by this weight, [out, in], are faster once it is packed."""
    is_able = HAS_ONEDNN and weight.device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    if not is_able or _wanted is False:
        return False
    if weight.dtype == torch.bfloat16:
        is_able = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        is_able = weight.dtype == torch.float32
    return is_able and (_wanted or weight.numel() >= WORTHWHILE_WEIGHTS)


def packed(weight: Tensor) -> Tensor:
    """A copy in oneDNN's blocks, of the same shape; for `packed_product` alone."""
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), PACKED_FOR_ROWS)
    return result


def packed_product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` by a matrix that is `packed`, of its type."""
    global _has_used_onednn
    _has_used_onednn = True
    return product_by_onednn(left, right, bias)


def product_by_onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` of fp32 tensors, or by a `packed` matrix, on CPU, whatever was chosen."""
    dense = None if bias is None else bias.contiguous()
    rows = torch.ops.mkldnn._linear_pointwise(left.reshape(-1, left.shape[-1]), right, dense, "none", [], "")
    shape = (*left.shape[:-1], len(right))
    result: Tensor = torch.ops.aten._unsafe_view(rows, shape)  # unlike a view, it may be overwritten
    return result
