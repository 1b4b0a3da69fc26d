"""Matrices of layers stored for inference: in blocks that fit the processor's kernels, or rounded to 8 bits.

A pass that generates has one row per sequence, and waits for weights to come from memory. torch's product of 2 to 16
rows by a matrix as training stores it takes up to three times as long as memory does; by one packed in oneDNN's blocks,
about as long, and no number of rows is slower (tests/benchmarks/few_rows.py). Rounded to int8 a matrix is a quarter as
large.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.errors import ConfigError
from harness.model.layers import MatrixLayer, VocabParallelEmbedding
from harness.model.products import HAS_ONEDNN, is_worth_packing, packed, packed_product

WEIGHT_STEPS = 127
"""Whole numbers on each side of zero that weights are rounded to."""

LARGE_WEIGHTS = 2**19
"""Matrices from here on are packed alone: a single row takes no longer by them, and plain ones would take memory."""

WIDTH = 64
"""Outputs of a rounded matrix come in multiples of this, the last without weights: for odd numbers such as GPT-2's
50,257 tokens, oneDNN's kernels for AVX2 take twice as long."""


@cache
def hidden_steps() -> int:
    """Whole numbers on each side of zero that activations are rounded to, 127 or 63.

    Without instructions made for it, oneDNN adds pairs of products in 16 bits: of activations that are moved to where
    they are positive, 2 x 127 x (2 x 63 + 1) fits and 2 x 127 x (2 x 127 + 1) doesn't. A trial tells.
    """
    largest = torch.full((64, 64), 127)
    sums = _whole_product((largest + 128).to(torch.uint8), 128, _packed_whole(largest.to(torch.int8)), torch.ones(64))
    return 127 if bool((sums == 64 * 127**2).all()) else 63


def pack_matrices(
    stage: nn.Module, quantization: Literal["none", "int8"], *, has_tied_head: bool = False, embeds: bool = True
) -> None:
    """Store the matrices of a stage's layers so that products of few rows are fast; it is of no use for training then.

    What is packed takes the place of the weight, whose memory is free once nobody else holds it. Matrices that
    wouldn't gain stay as they are: on GPUs, small ones, and others as `products.is_worth_packing` says.

    Args:
        stage: its weights are filled in; without sequence parallelism.
        quantization: int8: all matrices that are multiplied by are rounded, see `RoundedMatrix`.
        has_tied_head: the stage's embedding is an output head.
        embeds: the stage's embedding is one, so that its rows are looked up. If it is a head too, it has both the
            weight and a packed copy: the head of GPT-2 small is 30 % of its weights, and twice as fast.

    Raises:
        ConfigError: for int8 where torch can't do it.
    """
    if quantization == "int8":
        _check_int8(stage)
    for layer in [module for module in stage.modules() if isinstance(module, MatrixLayer)]:
        is_embedding = isinstance(layer, VocabParallelEmbedding)
        if is_embedding and not has_tied_head:
            continue
        assert not layer.tp.sequence_parallel, "a packed product gathers no slices"
        if quantization == "int8":
            layer.packed = RoundedMatrix(layer.weight)
        elif is_worth_packing(layer.weight):
            layer.packed = PackedMatrix(layer.weight)
        else:
            continue
        if not (is_embedding and embeds):
            layer.register_parameter("weight", None)


class RoundedMatrix:
    """Product by a matrix rounded to int8, of rows that are rounded to int8 as they come; both symmetrically.

    Each output of the matrix has its scale, and so has each row: what a sequence gets doesn't depend on the others
    that are computed beside it. Sums are exact, in int32.
    """

    def __init__(self, weight: Tensor) -> None:
        """Rounds weight [out, in] to multiples of the largest of each output / 127."""
        self._outputs = len(weight)
        weight = F.pad(weight.detach().float(), (0, 0, 0, -len(weight) % WIDTH))
        scales = _scale(weight, WEIGHT_STEPS)
        self._matrix = _packed_whole(weight.div(scales).round_().to(torch.int8))
        self._scales = scales.squeeze(-1)
        self._steps = hidden_steps()

    def __call__(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """[..., in], [out] -> [..., out], of the type of `hidden`."""
        rows = hidden.float().reshape(-1, hidden.shape[-1])
        scale, zero = _scale(rows, self._steps), self._steps + 1
        whole = rows.div(scale).add_(zero + 0.5).to(torch.uint8)  # rounds by cutting off
        output = _whole_product(whole, zero, self._matrix, self._scales)[:, : self._outputs]
        output = output * scale if bias is None else torch.addcmul(bias.float(), output, scale)
        return output.to(hidden.dtype).view(*hidden.shape[:-1], self._outputs)


def _packed_whole(matrix: Tensor) -> Tensor:
    """int8 [out, in] in oneDNN's blocks, for `_whole_product` alone."""
    result: Tensor = torch.ops.onednn.qlinear_prepack(matrix, None)
    return result


def _whole_product(rows: Tensor, zero: int, matrix: Tensor, scales: Tensor) -> Tensor:
    """uint8 [rows, in] less `zero`, times a packed matrix, times the scale of each output: fp32 [rows, out].

    Signed rows would need no zero; where there is AVX-512, oneDNN takes hundreds of times as long for them.
    """
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    result: Tensor = torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, zero, matrix, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return result


def _scale(rows: Tensor, steps: int) -> Tensor:
    """What the largest of each row is `steps` times: [..., n] -> [..., 1]."""
    return (rows.abs().amax(dim=-1, keepdim=True) / steps).clamp_min(torch.finfo(rows.dtype).tiny)


class PackedMatrix:
    """Product by a matrix in oneDNN's blocks; a small one is kept as it was, too, which is faster for a single row."""

    def __init__(self, weight: Tensor) -> None:
        self._matrix = packed(weight)
        self._plain = weight.detach() if weight.numel() < LARGE_WEIGHTS else None

    def __call__(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """[..., in], [out] -> [..., out]."""
        if self._plain is not None and hidden.numel() == hidden.shape[-1]:
            return F.linear(hidden, self._plain, bias)
        return packed_product(hidden, self._matrix, bias)


def _check_int8(stage: nn.Module) -> None:
    devices = {parameter.device.type for parameter in stage.parameters()} - {"cpu"}
    if devices:
        raise ConfigError(f"generate.quantization=int8 is for CPUs, not for {', '.join(devices)}; use none")
    if not HAS_ONEDNN:
        raise ConfigError("generate.quantization=int8 needs oneDNN, which this torch hasn't; use none")
