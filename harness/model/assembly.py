"""A model as a list of pipeline layers; one tensor passes between them.

It is [batch, sequence, hidden], or with sequence parallelism [batch, sequence/tp, hidden].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from harness.model.block import TransformerBlock, norm_class
from harness.model.context import PassContext
from harness.model.dropout import Dropout
from harness.model.emulated import EmulatedBlock
from harness.model.groups import TensorParallel
from harness.model.layers import (
    HeadBias,
    HeadDense,
    OutputHead,
    PositionEmbedding,
    SinusoidalPositions,
    TokenTypeEmbedding,
    VocabParallelEmbedding,
    vocab_parallel_logits,
)
from harness.spec.config import Model

POSITIONS: dict[str, type[nn.Module]] = {"learned": PositionEmbedding, "sinusoidal": SinusoidalPositions}
"""Those that are added to the embedding."""


@dataclass(frozen=True)
class LayerDescription:
    """A layer before it is built, on whichever stage that will be."""

    name: str
    """Begins the global names of its parameters, except in a tied layer after the first."""
    module_class: type[nn.Module]
    args: tuple[Any, ...]
    tied_key: str | None = None
    """Layers of one key share one module; its only parameter is `weight`. The key is the first's name."""
    forward: Callable[[Any, Tensor], Tensor] | None = None
    """What the layer computes with its module, where that is not the module's own forward."""

    def build(self) -> nn.Module:
        """The module, with uninitialized weights."""
        return self.module_class(*self.args)


def describe_layers(
    model: Model, tp: TensorParallel, activation_checkpointing: bool = False, context: PassContext | None = None
) -> list[LayerDescription]:
    """All layers in order: tokens [batch, sequence] in, logits [batch, sequence, padded_vocab/tp] out.

    Args:
        context: of this rank's passes; without, dropout draws the same in each, and a row is one sequence.
    """
    context, architecture = context or PassContext(), model.architecture
    norm = norm_class(model), (model.hidden_size, model.norm_epsilon)
    vocabulary = (model.padded_vocab_size(tp.size), model.hidden_size, tp)
    key = "embedding" if model.tie_word_embeddings else None
    layers = [LayerDescription("embedding", VocabParallelEmbedding, vocabulary, key)]
    if architecture.positions in POSITIONS:
        positions = (model.max_position_embeddings, model.hidden_size, tp, context)
        layers.append(LayerDescription("position_embedding", POSITIONS[architecture.positions], positions))
    if model.type_vocab_size > 0:
        types = (model.type_vocab_size, model.hidden_size)
        layers.append(LayerDescription("token_type_embedding", TokenTypeEmbedding, types))
    if architecture.embedding_norm:
        layers.append(LayerDescription("embedding_norm", *norm))
    if model.dropout > 0:
        dropout = (model.dropout, context, "embedding", tp.slice_rank)
        layers.append(LayerDescription("embedding_dropout", Dropout, dropout))
    block_class = TransformerBlock if architecture.computes else EmulatedBlock
    for name in (f"blocks.{index}" for index in range(model.num_hidden_layers)):
        block = (model, tp, activation_checkpointing, name, context)
        layers.append(LayerDescription(name, block_class, block))
    if not architecture.norm_after:
        layers.append(LayerDescription("final_norm", *norm))
    if architecture.head_transform:
        layers.append(LayerDescription("head_dense", HeadDense, (model.hidden_size, architecture.activation, tp)))
        layers.append(LayerDescription("head_norm", *norm))
    if model.tie_word_embeddings:
        layers.append(LayerDescription("head", VocabParallelEmbedding, vocabulary, key, vocab_parallel_logits))
    else:
        layers.append(LayerDescription("head", OutputHead, vocabulary))
    if architecture.head_transform:
        layers.append(LayerDescription("head_bias", HeadBias, (vocabulary[0], tp)))
    return layers


def layer_names(model: Model) -> list[str]:
    """Names of all layers in order."""
    return [layer.name for layer in describe_layers(model, TensorParallel.single())]


def part_boundaries(layers: Sequence[LayerDescription], blocks_per_part: Sequence[int]) -> list[int]:
    """Index of each part's first layer, and of the end: embeddings go first, norm and head last."""
    first_block = next(i for i, layer in enumerate(layers) if layer.name.startswith("blocks."))
    boundaries = [0]
    for blocks in blocks_per_part[:-1]:
        boundaries.append((boundaries[-1] or first_block) + blocks)
    return [*boundaries, len(layers)]


def build_steps(layers: Sequence[LayerDescription], built: dict[str, nn.Module]) -> list[Callable[[Tensor], Tensor]]:
    """What layers compute, each of the output of the one before.

    Args:
        built: modules by what begins the global names of their parameters. Those that layers share are taken from
            here, the others are built and added.
    """
    steps: list[Callable[[Tensor], Tensor]] = []
    for layer in layers:
        key = layer.tied_key or layer.name
        if key not in built:
            built[key] = layer.build()
        steps.append(built[key] if layer.forward is None else partial(layer.forward, built[key]))
    return steps


class SingleStage(nn.Module):
    """All layers in one module; `named_parameters` yields global names."""

    def __init__(self, layers: Sequence[LayerDescription]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        built: dict[str, nn.Module] = {}
        self._steps = build_steps(layers, built)
        for name, module in built.items():
            if name.startswith("blocks."):
                self.blocks.append(module)
            else:
                self.add_module(name, module)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, sequence] integers -> logits [batch, sequence, padded_vocab/tp]."""
        hidden = tokens
        for step in self._steps:
            hidden = step(hidden)
        return hidden


def build_layers(
    model: Model, tp: TensorParallel, activation_checkpointing: bool = False, context: PassContext | None = None
) -> SingleStage:
    """The whole model as one pipeline stage, with uninitialized weights; arguments as in `describe_layers`."""
    return SingleStage(describe_layers(model, tp, activation_checkpointing, context))
