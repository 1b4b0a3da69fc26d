"""What the cache of keys and values holds and takes, on each rank, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.spec.partition import layers_per_part
from harness.spec.precision import PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.spec.config import RunConfig


@dataclass(frozen=True)
class CacheShape:
    """What a block keeps on one rank, once of keys and once of values: [num_slots, num_heads, capacity, head_dim]."""

    num_slots: int
    """Sequences at a time."""
    num_heads: int
    """Key-value heads that the rank's queries use; ranks that share one keep it each."""
    capacity: int
    """Positions of a slot."""
    head_dim: int

    @property
    def num_values(self) -> int:
        """Of keys and values."""
        return 2 * self.num_slots * self.num_heads * self.capacity * self.head_dim


def cache_shape(config: RunConfig, num_slots: int, num_positions: int) -> CacheShape:
    """Of each block.

    Args:
        num_slots: sequences at a time.
        num_positions: of the longest sequence; a window bounds what is kept of them, and so do the model's positions
            what their last block adds.
    """
    model, generate = config.model, config.generate
    kept = min(num_positions, model.sliding_window or num_positions)
    blocks = -(-kept // generate.block_size) * generate.block_size
    capacity = min(blocks, model.max_position_embeddings, model.sliding_window or blocks)
    heads = max(1, model.num_key_value_heads // config.parallel.tp)
    return CacheShape(num_slots, heads, capacity, model.head_dim)


def longest_sequence(config: RunConfig, prompts: Sequence[int]) -> int:
    """Positions that the longest sequence takes; its last token is chosen, and never looked at.

    Args:
        prompts: tokens of each.
    """
    return max((prompt + limit - 1 for prompt, limit in zip(prompts, limits(config, prompts), strict=True)), default=1)


def limits(config: RunConfig, prompts: Sequence[int]) -> list[int]:
    """The most tokens that each sequence gets: there are only so many positions."""
    most, new = config.model.max_position_embeddings, config.generate.max_new_tokens
    return [max(0, min(new, most - prompt)) for prompt in prompts]


def num_groups(config: RunConfig, num_slots: int) -> int:
    """Of the slots: one for each stage, if nothing else is asked for, and none without a slot."""
    return min(config.generate.num_groups or config.parallel.pp, num_slots)


def kv_cache_bytes(config: RunConfig, num_slots: int, num_positions: int) -> list[int]:
    """Of one tensor-parallel rank of every stage."""
    model = config.model
    values = cache_shape(config, num_slots, num_positions).num_values if model.architecture.computes else 0
    layers = layers_per_part(model, config.parallel, config.train.sequence_length)
    return [blocks * values * PRECISIONS[config.train.precision].bytes_per_value for blocks in layers]
