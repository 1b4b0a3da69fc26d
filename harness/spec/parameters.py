"""Every parameter of a model by its global name: its full shape, how it is split over ranks, how it is drawn.

One table serves counts, memory, fresh weights, checkpoints and conversion. A global name is
`<layer name>.<parameter path>`, such as `blocks.3.attention.qkv.weight`, whatever the layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from harness.spec.architecture import DOWN, OUTPUT, QKV, UP
from harness.spec.config import Model

Parts = tuple[tuple[str, int], ...]
"""Name and size of what is fused along one dimension."""


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of the whole model."""

    name: str
    shape: tuple[int, ...]
    """Full shape, vocabulary not padded."""
    init: Literal["normal", "residual", "zeros", "ones"]
    """residual: normal, narrower the deeper the model."""
    shard_dim: int | None = None
    """Dimension split over tensor-parallel ranks; None: every rank holds the whole."""
    parts: Parts = ()
    """What is fused along `shard_dim`; each part is split on its own."""
    padded: bool = False
    """`shard_dim` is the vocabulary, padded with zeros to a multiple of the ranks."""
    of_heads: bool = False
    """Every rank holds the whole, and adds to its gradient what its own heads make of it."""

    @property
    def is_matrix(self) -> bool:
        """A projection or a table of embeddings, not a bias or the weight of a norm."""
        return len(self.shape) == 2

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    def size_per_rank(self, tp: int) -> int:
        """Numbers that each of `tp` ranks holds, padding included."""
        if self.shard_dim is None:
            return self.size
        held = sum(self.share(size, tp) for _, size in self.parts)
        return self.size // self.shape[self.shard_dim] * held

    def share(self, size: int, tp: int) -> int:
        """Rows or columns that each of `tp` ranks holds of a part of `size`."""
        assert self.padded or size % tp == 0, f"{self.name}: {size} can't be split over {tp} ranks"
        return -(-size // tp)


def parameter_table(model: Model) -> dict[str, ParameterSpec]:
    """All parameters by global name, in the order of the layers."""
    specs = embedding_specs(model)
    for index in range(model.num_hidden_layers):
        specs += block_specs(model, index)
    specs += head_specs(model)
    return {spec.name: spec for spec in specs}


def embedding_specs(model: Model) -> list[ParameterSpec]:
    """What comes before the blocks."""
    specs = [_vocabulary_spec(model, "embedding")]
    if model.architecture.positions == "learned":
        positions = (model.max_position_embeddings, model.hidden_size)
        specs.append(ParameterSpec("position_embedding.weight", positions, "normal"))
    if model.type_vocab_size > 0:
        types = (model.type_vocab_size, model.hidden_size)
        specs.append(ParameterSpec("token_type_embedding.weight", types, "normal"))
    if model.architecture.embedding_norm:
        specs += _norm_specs(model, "embedding_norm")
    return specs


def block_specs(model: Model, index: int) -> list[ParameterSpec]:
    """One block; all are alike."""
    block = f"blocks.{index}"
    if not model.architecture.computes:
        return [ParameterSpec(f"{block}.weight", (model.hidden_size,), "normal")]
    return [
        *_norm_specs(model, f"{block}.attention_norm"),
        *_column_specs(model, block, QKV, qkv_parts(model)),
        *_head_norm_specs(model, block),
        *_row_specs(model, block, OUTPUT, model.num_attention_heads * model.head_dim),
        *_norm_specs(model, f"{block}.mlp_norm"),
        *_column_specs(model, block, UP, mlp_parts(model)),
        *_row_specs(model, block, DOWN, model.intermediate_size),
    ]


def head_specs(model: Model) -> list[ParameterSpec]:
    """What comes after the blocks; without the matrix of a tied head, which is the embedding's."""
    specs = [] if model.architecture.norm_after else _norm_specs(model, "final_norm")
    if model.architecture.head_transform:
        specs.append(ParameterSpec("head_dense.weight", (model.hidden_size, model.hidden_size), "normal"))
        specs.append(ParameterSpec("head_dense.bias", (model.hidden_size,), "zeros"))
        specs += _norm_specs(model, "head_norm")
    if not model.tie_word_embeddings:
        specs.append(_vocabulary_spec(model, "head"))
    if model.architecture.head_transform:
        rows = (("vocabulary", model.vocab_size),)
        specs.append(ParameterSpec("head_bias.bias", (model.vocab_size,), "zeros", 0, rows, padded=True))
    return specs


def tied_specs(model: Model) -> list[ParameterSpec]:
    """What the head shares with the embedding, so that both the first and the last stage hold it."""
    return [_vocabulary_spec(model, "embedding")] if model.tie_word_embeddings else []


def qkv_parts(model: Model) -> Parts:
    """Outputs of the fused attention projection."""
    kv_size = model.num_key_value_heads * model.head_dim
    return (("q", model.num_attention_heads * model.head_dim), ("k", kv_size), ("v", kv_size))


def mlp_parts(model: Model) -> Parts:
    """Outputs of the first feed-forward projection."""
    names = ("gate", "up") if model.architecture.gated else ("up",)
    return tuple((name, model.intermediate_size) for name in names)


def _vocabulary_spec(model: Model, layer: str) -> ParameterSpec:
    shape, rows = (model.vocab_size, model.hidden_size), (("vocabulary", model.vocab_size),)
    return ParameterSpec(f"{layer}.weight", shape, "normal", 0, rows, padded=True)


def _norm_specs(model: Model, layer: str) -> list[ParameterSpec]:
    weight = ParameterSpec(f"{layer}.weight", (model.hidden_size,), "ones")
    bias = ParameterSpec(f"{layer}.bias", (model.hidden_size,), "zeros")
    return [weight, bias] if model.architecture.norm.has_bias else [weight]


def _head_norm_specs(model: Model, block: str) -> list[ParameterSpec]:
    if not model.architecture.head_norms:
        return []
    names = (f"{block}.attention.query_norm.weight", f"{block}.attention.key_norm.weight")
    return [ParameterSpec(name, (model.head_dim,), "ones", of_heads=True) for name in names]


def _column_specs(model: Model, block: str, projection: str, parts: Parts) -> list[ParameterSpec]:
    layer, out_features = f"{block}.{projection}", sum(size for _, size in parts)
    weight = ParameterSpec(f"{layer}.weight", (out_features, model.hidden_size), "normal", 0, parts)
    bias = ParameterSpec(f"{layer}.bias", (out_features,), "zeros", 0, parts)
    return [weight, bias] if projection in model.architecture.biases else [weight]


def _row_specs(model: Model, block: str, projection: str, in_features: int) -> list[ParameterSpec]:
    layer, parts = f"{block}.{projection}", (("input", in_features),)
    weight = ParameterSpec(f"{layer}.weight", (model.hidden_size, in_features), "residual", 1, parts)
    bias = ParameterSpec(f"{layer}.bias", (model.hidden_size,), "zeros")
    return [weight, bias] if projection in model.architecture.biases else [weight]
