"""Rank program: what the parity check of generation says of layouts, and when a part is replaced by a wrong one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MACHINE, make_config
from torch import Tensor

import harness.model.layers as layers
import harness.run.inference.stage as stages
import harness.run.inference_parity as inference_parity
from harness.machine import Machine
from harness.model.cache import KeyValueCache
from harness.model.sampling import Sampler
from harness.run.engines.deepspeed.join import initialize_distributed
from harness.run.inference.ring import Ring
from harness.spec.batching import Row, Work
from harness.spec.kv_cache import CacheShape
from harness.spec.twin import twin_of

Patch = Callable[[pytest.MonkeyPatch], None]
DEFECTS: dict[str, Patch] = {}
FOUR_CORES = Machine("cpu", "test cpu", num_devices=4, num_cores=4, memory_bytes=MACHINE.memory_bytes)


def defect(patch: Patch) -> Patch:
    DEFECTS[patch.__name__] = patch
    return patch


@defect
def none(patch: pytest.MonkeyPatch) -> None:
    pass


@defect
def positions_one_too_far(patch: pytest.MonkeyPatch) -> None:
    right = KeyValueCache.positions

    def shifted(cache: KeyValueCache) -> Tensor | None:
        positions = right(cache)
        return None if positions is None else positions + 1

    patch.setattr(KeyValueCache, "positions", shifted)


@defect
def positions_of_the_first_row(patch: pytest.MonkeyPatch) -> None:
    right = KeyValueCache.positions

    def first(cache: KeyValueCache) -> Tensor | None:
        positions = right(cache)
        return None if positions is None else positions[:1].expand_as(positions)

    patch.setattr(KeyValueCache, "positions", first)


def with_starts(patch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Masks as if rows began elsewhere."""
    right = KeyValueCache._make_mask

    def other(cache: KeyValueCache, dtype: torch.dtype) -> Tensor | None:
        starts, slots = kept = cache._index
        cache._kept_index = change(starts), slots
        try:
            return right(cache, dtype)
        finally:
            cache._kept_index = kept

    patch.setattr(KeyValueCache, "_make_mask", other)


@defect
def mask_one_too_late(patch: pytest.MonkeyPatch) -> None:
    with_starts(patch, lambda starts: starts + 1)


@defect
def mask_one_too_early(patch: pytest.MonkeyPatch) -> None:
    with_starts(patch, lambda starts: (starts - 1).clamp(min=0))


@defect
def mask_left_out(patch: pytest.MonkeyPatch) -> None:
    """A sequence sees what the one before left in its slot."""
    right = KeyValueCache._mask
    patch.setattr(KeyValueCache, "_mask", lambda cache, dtype: None if cache._length == 1 else right(cache, dtype))


@defect
def window_one_too_wide(patch: pytest.MonkeyPatch) -> None:
    right = KeyValueCache._make_mask

    def wider(cache: KeyValueCache, dtype: torch.dtype) -> Tensor | None:
        assert cache._window is not None
        cache._window += 1
        try:
            return right(cache, dtype)
        finally:
            cache._window -= 1

    patch.setattr(KeyValueCache, "_make_mask", wider)


@defect
def key_value_heads_swapped(patch: pytest.MonkeyPatch) -> None:
    """Of those that come from memory."""
    right = KeyValueCache._read
    patch.setattr(KeyValueCache, "_read", lambda cache, memory: right(cache, memory).flip(1))


@defect
def slots_of_the_neighbours(patch: pytest.MonkeyPatch) -> None:
    """Tokens after the prompt look at the slots of a pass in another order."""
    right = KeyValueCache.begin

    def begin(cache: KeyValueCache, rows: Sequence[Row], length: int) -> None:
        right(cache, rows, length)
        if length == 1:
            starts, slots = cache._index
            cache._range, cache._kept_index = None, (starts, slots.flip(0))

    patch.setattr(KeyValueCache, "begin", begin)


@defect
def last_tokens_of_chunks_not_kept(patch: pytest.MonkeyPatch) -> None:
    right = KeyValueCache._store

    def store(cache: KeyValueCache, pair: tuple[Tensor, Tensor], key: Tensor, value: Tensor) -> None:
        if cache._length > 1:
            key, value = key.clone(), value.clone()
            key[:, :, -1], value[:, :, -1] = 0, 0
        right(cache, pair, key, value)

    patch.setattr(KeyValueCache, "_store", store)


@defect
def scores_of_the_padding(patch: pytest.MonkeyPatch) -> None:
    """The last position of a pass is taken for that of each row."""
    right = stages.Stage._choose

    def choose(stage: stages.Stage, work: Work, hidden: Tensor) -> Tensor:
        for i, row in enumerate(work.rows):
            hidden[i, row.end - row.start - 1] = hidden[i, -1].clone()
        return right(stage, work, hidden)

    patch.setattr(stages.Stage, "_choose", choose)


@defect
def sums_not_reduced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layers, "reduce_from_tensor_parallel", lambda tensor, group: tensor)


@defect
def row_bias_added_on_every_rank(patch: pytest.MonkeyPatch) -> None:
    def forward(self: layers.RowParallelLinear, hidden: Tensor) -> Tensor:
        output = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return layers.reduce_from_tensor_parallel(output, self.tp.group)

    patch.setattr(layers.RowParallelLinear, "forward", forward)


@defect
def one_head_off_by_a_thousandth(patch: pytest.MonkeyPatch) -> None:
    """Of the keys in memory, on one rank."""
    right = KeyValueCache._read

    def read(cache: KeyValueCache, memory: Tensor) -> Tensor:
        found = right(cache, memory).clone()
        if os.environ["RANK"] == "1":
            found[:, 0] *= 1.001
        return found

    patch.setattr(KeyValueCache, "_read", read)


@defect
def tokens_of_the_wrong_shard(patch: pytest.MonkeyPatch) -> None:
    """The numbers of tokens are those of the rank's columns."""
    right = Sampler._best

    def best(sampler: Sampler, scores: Tensor, tokens: Tensor) -> Tensor:
        return right(sampler, scores, tokens - sampler._tp.rank)

    patch.setattr(Sampler, "_best", best)


@defect
def each_shard_draws_for_itself(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sampler, "_joined", lambda sampler, tensor: tensor)


@defect
def noise_of_the_next_position(patch: pytest.MonkeyPatch) -> None:
    right = Sampler.choose

    def choose(sampler: Sampler, logits: Tensor, samples: Any, positions: Sequence[int], seen: Any) -> Tensor:
        late = 0 if sampler._tp.group is None else 1
        return right(sampler, logits, samples, [position + late for position in positions], seen)

    patch.setattr(Sampler, "choose", choose)


@defect
def padding_of_the_vocabulary_is_chosen(patch: pytest.MonkeyPatch) -> None:
    right = Sampler.adjusted

    def adjusted(sampler: Sampler, logits: Tensor, seen: Tensor | None) -> Tensor:
        scores = right(sampler, logits, seen)
        return scores.where(scores.isfinite(), 9.0)

    patch.setattr(Sampler, "adjusted", adjusted)


@defect
def a_sequence_ends_early(patch: pytest.MonkeyPatch) -> None:
    right = inference_parity.Batcher.deliver

    def deliver(batcher: inference_parity.Batcher, work: Work, tokens: Sequence[int]) -> Any:
        batcher._limits = [min(limit, 4) for limit in batcher._limits]
        return right(batcher, work, tokens)

    patch.setattr(inference_parity.Batcher, "deliver", deliver)


@defect
def penalty_of_who_was_there_before(patch: pytest.MonkeyPatch) -> None:
    """What the last sequence of a slot had is not forgotten."""
    right = stages.Stage._note_prompts

    def note(stage: stages.Stage, work: Work) -> None:
        assert stage._seen is not None
        seen = stage._seen.clone()
        right(stage, work)
        stage._seen |= seen

    patch.setattr(stages.Stage, "_note_prompts", note)


@defect
def cache_with_a_slot_too_many(patch: pytest.MonkeyPatch) -> None:
    right = stages.cache_shape

    def larger(config: Any, num_slots: int, num_positions: int) -> CacheShape:
        return right(config, num_slots + 1, num_positions)

    patch.setattr(stages, "cache_shape", larger)


@defect
def layer_differs_on_a_rank(patch: pytest.MonkeyPatch) -> None:
    """By far less than the tolerance."""
    right = inference_parity.Layout._keep

    def keep(layout: inference_parity.Layout, work: Work, scores: Tensor) -> None:
        right(layout, work, scores * (1 + 1e-6 * (layout.rank == 1)))

    patch.setattr(inference_parity.Layout, "_keep", keep)


@defect
def hidden_states_of_the_pass_before(patch: pytest.MonkeyPatch) -> None:
    right = Ring._send_activation

    def send(ring: Ring, instruction: Any) -> None:
        now, before = ring._hidden, getattr(ring, "_before", None)
        ring._before = now  # type: ignore[attr-defined]
        if before is not None and before.shape == now.shape:
            ring._hidden = before
        right(ring, instruction)

    patch.setattr(Ring, "_send_activation", send)


def run(argument: list[tuple[str, list[str]]], folder: Path) -> list[list[dict[str, Any]]]:
    """All comparisons, of each defect and the overrides of its run."""
    torch.set_num_threads(1)
    initialize_distributed()
    rank, answers = int(os.environ["RANK"]), []
    for name, overrides in argument:
        config = twin_of(make_config(*overrides, machine=FOUR_CORES))
        with pytest.MonkeyPatch.context() as patch:
            DEFECTS[name](patch)
            comparisons = inference_parity.check_inference(config, rank)
        answers.append([{**asdict(c), "passed": c.passed} for c in comparisons])
    return answers
