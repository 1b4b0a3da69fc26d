"""Tensor-parallel layers: linear maps split by columns or rows and the vocabulary (arXiv 1909.08053).

What passes between layers is the same on every rank or, with sequence parallelism (arXiv 2205.05198), a slice of
the sequence: in shapes, `slice` is `sequence`, or then sequence/tp.

Parameters are allocated, not drawn: `harness.model.weights` fills them. Shapes are those of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.model.collectives import (
    copied_linear,
    gathered_linear,
    reduce_from_tensor_parallel,
    scatter_sum,
)
from harness.model.context import PassContext
from harness.model.groups import TensorParallel
from harness.model.weight_gradients import embedding, linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class MatrixLayer(nn.Module):
    """What multiplies by one matrix. weight: [out, in] of this rank; None: only `packed` has it."""

    weight: nn.Parameter
    packed: Callable[[Tensor, Tensor | None], Tensor] | None = None
    """The product and a bias, of inference (`harness.model.packing`): [..., in], [out] -> [..., out]."""

    def __init__(self, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp

    def product(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """By this rank's matrix: [..., in], [out] -> [..., out]."""
        if self.packed is not None:
            return self.packed(hidden, bias)
        return linear(hidden, self.weight, bias, self.tp.later)

    def split_product(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """f and the product, where it is split over its outputs: [batch, slice, in] -> [batch, sequence, out/tp]."""
        if self.tp.group is None or self.packed is not None:
            return self.product(hidden, bias)
        product = gathered_linear if self.tp.sequence_parallel else copied_linear
        return product(hidden, self.weight, bias, self.tp.group, self.tp.later)


def sum_of_parts(part: Tensor, tp: TensorParallel) -> Tensor:
    """g, of the terms of a sum that ranks hold: [batch, sequence, out] -> [batch, slice, out]; may overwrite `part`."""
    if tp.sequence_parallel:
        assert tp.group is not None
        return scatter_sum(part, tp.group)
    return reduce_from_tensor_parallel(part, tp.group)


class ColumnParallelLinear(MatrixLayer):
    """Several projections of one input in a single matrix product, each split over its outputs.

    Holds the slice of every part, one below the other, so that a rank's query, key and value belong
    to the same heads. weight: [sum(parts)/tp, in_features], bias: [sum(parts)/tp].
    """

    def __init__(self, in_features: int, parts: Sequence[int], bias: bool, tp: TensorParallel) -> None:
        super().__init__(tp)
        self.local_parts = [tp.share(size) for size in parts]
        self.weight = nn.Parameter(torch.empty(sum(self.local_parts), in_features))
        self.bias = nn.Parameter(torch.empty(sum(self.local_parts))) if bias else None

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """[batch, slice, in_features] -> per part [batch, sequence, part/tp], views of one tensor."""
        output = self.split_product(hidden, self.bias)
        # The gradient of a split is a copy, of one part too.
        return torch.split(output, self.local_parts, dim=-1) if len(self.local_parts) > 1 else (output,)


class RowParallelLinear(MatrixLayer):
    """A projection split over its inputs; every rank gets the sum. The bias is whole on every rank.

    weight: [out_features, in_features/tp], bias: [out_features].
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, tp: TensorParallel) -> None:
        super().__init__(tp)
        self.weight = nn.Parameter(torch.empty(out_features, tp.share(in_features)))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, sequence, in_features/tp] -> [batch, slice, out_features]."""
        if self.tp.group is None:
            return self.product(hidden, self.bias)
        output = sum_of_parts(self.product(hidden, None), self.tp)
        # After the sum, or it would count once per rank.
        return output if self.bias is None else output + self.bias


class VocabularyMatrix(MatrixLayer):
    """One row per token, split over ranks. weight: [padded_vocab/tp, hidden]."""

    def __init__(self, padded_vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        super().__init__(tp)
        self.weight = nn.Parameter(torch.empty(tp.share(padded_vocab_size), hidden_size))


class VocabParallelEmbedding(VocabularyMatrix):
    """Token embedding: each rank looks up the tokens it owns, the sum completes the others."""

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, sequence] integers -> [batch, slice, hidden]."""
        if self.tp.group is None:
            return embedding(tokens, self.weight, self.tp.later)
        num_rows = self.weight.shape[0]
        rows = tokens - self.tp.rank * num_rows
        elsewhere = (rows < 0) | (rows >= num_rows)
        embedded = embedding(rows.masked_fill_(elsewhere, 0), self.weight, self.tp.later)
        embedded = embedded.masked_fill_(elsewhere.unsqueeze(-1), 0)
        return sum_of_parts(embedded, self.tp)


class OutputHead(VocabularyMatrix):
    """Output projection with a weight of its own."""

    def forward(self, hidden: Tensor) -> Tensor:
        """See `vocab_parallel_logits`."""
        return vocab_parallel_logits(self, hidden)


def vocab_parallel_logits(matrix: VocabularyMatrix, hidden: Tensor) -> Tensor:
    """Scores of this rank's tokens: [batch, slice, hidden] -> [batch, sequence, padded_vocab/tp].

    The output head, also of a token embedding whose weight it shares.
    """
    return matrix.split_product(hidden, None)


class HeadBias(nn.Module):
    """Of the output head, split like the vocabulary. bias: [padded_vocab/tp]."""

    def __init__(self, padded_vocab_size: int, tp: TensorParallel) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(tp.share(padded_vocab_size)))

    def forward(self, logits: Tensor) -> Tensor:
        """[batch, sequence, padded_vocab/tp] -> the same."""
        return logits + self.bias


class HeadDense(MatrixLayer):
    """A projection and its activation before the output head, whole on every rank, like the norm after it."""

    def __init__(self, hidden_size: int, activation: str, tp: TensorParallel) -> None:
        super().__init__(tp)
        self.activation = ACTIVATIONS[activation]
        self.weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, slice, hidden] -> the same."""
        return self.activation(self.product(hidden, self.bias))


class Positions(nn.Module):
    """Adds to each token a vector of its position: in the sequence, or in its document (`PassContext`)."""

    def __init__(self, tp: TensorParallel, context: PassContext) -> None:
        super().__init__()
        self.tp = tp
        self.context = context

    def rows(self, table: Tensor, length: int) -> Tensor:
        """Those of this rank's slice: [max_positions, hidden] -> [slice, hidden] or [batch, slice, hidden]."""
        first = length * (self.tp.slice_rank or 0)
        positions = self.context.positions(table.device)
        if positions is None:
            return table[first : first + length]
        return F.embedding(positions[:, first : first + length], table)


class PositionEmbedding(Positions):
    """Learned absolute positions, whole on every rank. weight: [max_positions, hidden]."""

    def __init__(
        self, max_position_embeddings: int, hidden_size: int, tp: TensorParallel, context: PassContext
    ) -> None:
        super().__init__(tp, context)
        self.weight = nn.Parameter(torch.empty(max_position_embeddings, hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, slice, hidden] -> the same, plus the embedding of its positions."""
        return hidden + self.rows(self.weight, hidden.shape[-2])


class SinusoidalPositions(Positions):
    """Waves of the position, added to the embedding times the root of its width (arXiv 1706.03762, section 3.5)."""

    def __init__(
        self, max_position_embeddings: int, hidden_size: int, tp: TensorParallel, context: PassContext
    ) -> None:
        super().__init__(tp, context)
        self.scale = math.sqrt(hidden_size)
        self._shape = max_position_embeddings, hidden_size
        # Not a buffer: it is no weight, and has the type of what it is added to.
        self._table = torch.empty(0)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, slice, hidden] -> the same, scaled, plus the waves of its positions."""
        if self._table.dtype != hidden.dtype or self._table.device != hidden.device or not len(self._table):
            with torch.inference_mode(False):  # the table may serve training later
                self._table = sinusoids(*self._shape).to(hidden.device, hidden.dtype)
        return hidden * self.scale + self.rows(self._table, hidden.shape[-2])


def sinusoids(num_positions: int, width: int) -> Tensor:
    """[num_positions, width]: sin(position / 10000^(2i/width)) in column 2i, its cosine in the next."""
    columns = torch.arange(0, width, 2, dtype=torch.float64)
    angles = torch.arange(num_positions, dtype=torch.float64).unsqueeze(1) / 10000.0 ** (columns / width)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :width]


class TokenTypeEmbedding(nn.Module):
    """Adds the vector of the first kind of tokens, which all are of, whole on every rank. weight: [types, hidden]."""

    def __init__(self, type_vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(type_vocab_size, hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, slice, hidden] -> the same."""
        return hidden + self.weight[0]
