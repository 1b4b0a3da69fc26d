"""Parameters, FLOPs and bytes of a model: per layer, per stage, in all. One count serves prediction and
measurement.

A transformer is cut into pipeline layers: what comes before the blocks, N blocks, and the head (what comes
after them, with the output projection). FLOPs are the exact matrix products of a training step: forward once,
backward twice that; attention is counted in full (not halved for causality) unless asked, the output head once, the
embedding look-up not at all, and recomputation never. Both follow from the table of parameters
(`harness.spec.parameters`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.spec.config import Model, RunConfig
from harness.spec.parameters import ParameterSpec, block_specs, embedding_specs, head_specs, tied_specs
from harness.spec.schedules import placement_of


def block_parameters(model: Model) -> int:
    """Parameters of one transformer block."""
    return _total(block_specs(model, 0))


def embedding_parameters(model: Model) -> int:
    """What comes before the blocks: embeddings and their norm."""
    return _total(embedding_specs(model))


def head_parameters(model: Model) -> int:
    """What comes after the blocks; a tied output projection is counted with the embedding."""
    return _total(head_specs(model))


def tied_parameters(model: Model) -> int:
    """Of the head those that are the embedding's, so that the last stage holds a copy of them."""
    return _total(tied_specs(model))


def stage_parameters_per_rank(model: Model, tp: int, layers: int, first: bool, last: bool) -> int:
    """Parameters on one tensor-parallel rank of a stage, padding of the vocabulary included.

    A tied embedding is on the first and on the last stage.

    Args:
        layers: transformer blocks of the stage.
    """
    held = layers * _total(block_specs(model, 0), tp)
    if first:
        held += _total(embedding_specs(model), tp)
    if last:
        held += _total(head_specs(model), tp) + (0 if first else _total(tied_specs(model), tp))
    return held


def _total(specs: Iterable[ParameterSpec], tp: int = 1) -> int:
    return sum(spec.size_per_rank(tp) for spec in specs)


def parameters(model: Model) -> int:
    """All parameters, each counted once (tied ones too, padding of the vocabulary not)."""
    blocks = model.num_hidden_layers * block_parameters(model)
    return embedding_parameters(model) + blocks + head_parameters(model)


def block_forward_flops(model: Model, sequence_length: float, causal: bool = False) -> int:
    """Matrix-product FLOPs of one block's forward pass, per token.

    Args:
        sequence_length: tokens that attention is counted over; all of a window where there is one and it is shorter.
        causal: count only the part of the attention products that a causal mask leaves: half of them, without a window.
    """
    if not model.architecture.computes:
        return 0
    seen = min(sequence_length, model.sliding_window or sequence_length)
    if causal and model.causal:
        seen -= seen * seen / (2 * sequence_length)
    return _products(block_specs(model, 0)) + round(2 * 2 * seen * model.num_attention_heads * model.head_dim)


def head_forward_flops(model: Model) -> int:
    """Matrix-product FLOPs of what comes after the blocks, forward and per token."""
    return _products([*head_specs(model), *tied_specs(model)])


def _products(specs: Iterable[ParameterSpec]) -> int:
    """FLOPs per token: a multiplication and an addition with every number of a matrix."""
    return sum(2 * spec.size for spec in specs if spec.is_matrix)


def training_flops_per_token(model: Model, sequence_length: float, causal: bool = False) -> int:
    """Matrix-product FLOPs of forward and backward, per token."""
    blocks = model.num_hidden_layers * block_forward_flops(model, sequence_length, causal)
    return 3 * (blocks + head_forward_flops(model))


def flops_conventions(model: Model, sequence_length: float) -> dict[str, float]:
    """Training FLOPs per token as this project and its peers count them, so that any two tables compare.

    Returns:
        - shardwright: exact matrix products, full attention; what earlier versions of Megatron-LM log, too.
        - shardwright_causal: the same with the half of attention that a causal mask leaves.
        - megatron_lm: `num_floating_point_operations` of Megatron-LM's training.py (2025): causal attention,
          vocabulary padded to a multiple of 128.
        - megatron_paper: arXiv 2104.04473, equation 3: the blocks' forward pass counted again for recomputation.
        - palm: 6 N + 12 L H Q T of arXiv 2204.02311, appendix B, as nanoGPT's `estimate_mfu`: N without positions.
        - torchtitan: its `get_nparams_and_active_nparams`: 6 N + 12 L H Q T, N without embeddings, unless the
          head shares the token embedding.
    """
    exact = training_flops_per_token(model, sequence_length)
    causal = training_flops_per_token(model, sequence_length, causal=True)
    padding = -model.vocab_size % 128
    blocks = model.num_hidden_layers * block_forward_flops(model, sequence_length)
    tokens = model.vocab_size * model.hidden_size
    learned = parameters(model) - (embedding_parameters(model) - tokens)
    multiplied = learned - (0 if model.tie_word_embeddings else tokens)
    attention = 12 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * sequence_length
    return {
        "shardwright": exact,
        "shardwright_causal": causal,
        "megatron_lm": causal + 3 * 2 * model.hidden_size * padding,
        "megatron_paper": exact + blocks,
        "palm": 6 * learned + attention,
        "torchtitan": 6 * multiplied + attention,
    }


@dataclass(frozen=True)
class StageCounts:
    """What one pipeline stage holds and computes, over all its tensor-parallel ranks."""

    layers: int
    """Transformer blocks."""
    parameters: int
    """A tied embedding counts on both stages that hold it."""
    forward_flops: int
    """Of one micro-batch."""


def stage_counts(config: RunConfig, layers_per_part: Sequence[int]) -> list[StageCounts]:
    """Counts of every stage, in order."""
    model, train, placement = config.model, config.train, placement_of(config.parallel)
    tokens = train.micro_batch_size * train.sequence_length
    counts = []
    for stage in range(placement.num_stages):
        parts = placement.parts_of(stage)
        layers = sum(layers_per_part[part] for part in parts)
        first, last = 0 in parts, placement.num_parts - 1 in parts
        held = stage_parameters_per_rank(model, 1, layers, first, last)
        flops = layers * block_forward_flops(model, train.sequence_length)
        flops += head_forward_flops(model) if last else 0
        counts.append(StageCounts(layers, held, flops * tokens))
    return counts
