"""Parameters, FLOPs and bytes of a model: per layer, per stage, in all. One count serves prediction and
measurement.

A transformer is cut into pipeline layers: the embedding, N blocks, and the head (final norm and output
projection). FLOPs are the exact matrix products of a training step: forward once, backward twice that;
attention is counted in full (not halved for causality) unless asked, the output head once, the embedding
look-up not at all, and recomputation never.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.spec.config import Model, RunConfig

BYTES_PER_VALUE = {"fp32": 4, "bf16": 2, "fp16": 2}


def block_parameters(model: Model) -> int:
    """Parameters of one transformer block."""
    if model.family == "emulated":
        return model.hidden_size
    hidden, inner = model.hidden_size, model.intermediate_size
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    attention = hidden * (queries + 2 * keys) + queries * hidden
    if model.family == "gpt2":
        biases = queries + 2 * keys + hidden + inner + hidden
        return attention + 2 * hidden * inner + biases + 2 * 2 * hidden
    return attention + 3 * hidden * inner + 2 * hidden


def embedding_parameters(model: Model) -> int:
    """Token embedding, and the learned positions of gpt2."""
    positions = model.max_position_embeddings * model.hidden_size if model.family == "gpt2" else 0
    return model.vocab_size * model.hidden_size + positions


def head_parameters(model: Model) -> int:
    """Final norm and output projection; a tied projection is counted with the embedding."""
    norm = model.hidden_size * (2 if model.family == "gpt2" else 1)
    return norm + (0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size)


def parameters(model: Model) -> int:
    """All parameters, each counted once (tied ones too, padding of the vocabulary not)."""
    blocks = model.num_hidden_layers * block_parameters(model)
    return embedding_parameters(model) + blocks + head_parameters(model)


def block_forward_flops(model: Model, sequence_length: int, causal: bool = False) -> int:
    """Matrix-product FLOPs of one block's forward pass, per token.

    Args:
        causal: count only the half of the attention products that a causal mask leaves.
    """
    if model.family == "emulated":
        return 0
    hidden, inner = model.hidden_size, model.intermediate_size
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    projections = 2 * hidden * (queries + 2 * keys) + 2 * queries * hidden
    attention = 2 * 2 * sequence_length * queries // (2 if causal else 1)
    mlp = 2 * hidden * inner * (2 if model.family == "gpt2" else 3)
    return projections + attention + mlp


def head_forward_flops(model: Model) -> int:
    """Matrix-product FLOPs of the output projection's forward pass, per token."""
    return 2 * model.hidden_size * model.vocab_size


def training_flops_per_token(model: Model, sequence_length: int, causal: bool = False) -> int:
    """Matrix-product FLOPs of forward and backward, per token."""
    blocks = model.num_hidden_layers * block_forward_flops(model, sequence_length, causal)
    return 3 * (blocks + head_forward_flops(model))


def flops_conventions(model: Model, sequence_length: int) -> dict[str, float]:
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


def stage_counts(config: RunConfig, layers_per_stage: Sequence[int]) -> list[StageCounts]:
    """Counts of every stage, in order."""
    model, train = config.model, config.train
    tokens = train.micro_batch_size * train.sequence_length
    last = len(layers_per_stage) - 1
    counts = []
    for stage, layers in enumerate(layers_per_stage):
        held = layers * block_parameters(model)
        flops = layers * block_forward_flops(model, train.sequence_length)
        if stage == 0:
            held += embedding_parameters(model)
        if stage == last:
            held += head_parameters(model)
            flops += head_forward_flops(model)
            if model.tie_word_embeddings and last > 0:
                held += model.vocab_size * model.hidden_size
        counts.append(StageCounts(layers, held, flops * tokens))
    return counts
