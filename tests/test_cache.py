"""What attention sees through the cache is what it would see with all keys and values of a sequence, kept in float64.

A reference keeps all of them, also of slots that are used again; passes are made up, or drawn at random.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import make_config
from helpers_model import random_state
from ranks_generate import config_of
from torch import Tensor

from harness.model.cache import KeyValueCache
from harness.model.context import PassContext
from harness.run.inference.ring import Ring
from harness.run.inference.stage import Stage
from harness.spec.batching import Batcher, Chosen, Row
from harness.spec.config import RunConfig
from harness.spec.kv_cache import CacheShape, cache_shape, kv_cache_bytes, limits, longest_sequence

BLOCKS = ("first", "second")
SLOTS, HEADS, KEY_HEADS, DIM, LONGEST = 4, 4, 2, 3, 13
GARBAGE = 1e6
"""Keys and values of padding: whoever sees one is far from the reference."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More wait for each other longer than such products take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Reference:
    """Everything that the sequences in the slots have had."""

    def __init__(self, window: int | None) -> None:
        self._window = window
        self._known: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def attend(self, block: str, row: Row, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Of a row's tokens, without padding: [heads, tokens, dim] in float64."""
        keys, values = key.double(), value.double()
        if row.start:
            before = self._known[block, row.slot]
            keys, values = torch.cat((before[0], keys), 1), torch.cat((before[1], values), 1)
        self._known[block, row.slot] = keys, values
        assert keys.shape[1] == row.end
        keys, values = (heads.repeat_interleave(len(query) // len(keys), 0) for heads in (keys, values))
        scores = query.double() @ keys.transpose(1, 2) / query.shape[-1] ** 0.5
        age = torch.arange(row.start, row.end).unsqueeze(1) - torch.arange(row.end)
        scores[:, (age < 0) | (age >= (self._window or row.end))] = -torch.inf
        return scores.softmax(2) @ values


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, window: int | None) -> Tensor:
    """As `harness.model.block` does."""
    is_square = keys.shape[-2] == query.shape[-2]
    if mask is None and is_square:
        mask = PassContext(0).mask(query, True, window)
    return F.scaled_dot_product_attention(
        query, keys, values, mask, is_causal=mask is None and is_square, enable_gqa=query.shape[1] != keys.shape[1]
    )


def check(
    passes: Sequence[Sequence[Row]],
    window: int | None,
    block_size: int,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-12,
    longest: int = LONGEST,
) -> None:
    shape = shape_of(window, block_size, longest)
    cache = KeyValueCache(BLOCKS, shape, longest, window, dtype, torch.device("cpu"))
    reference, generator = Reference(window), torch.Generator().manual_seed(1)
    for rows in passes:
        length = max(row.end - row.start for row in rows)
        cache.begin(rows, length)
        check_positions(cache.positions(), rows, length, longest)
        for block in BLOCKS:
            query, key, value = (
                torch.randn(len(rows), heads, length, DIM, generator=generator).to(dtype)
                for heads in (HEADS, KEY_HEADS, KEY_HEADS)
            )
            for i, row in enumerate(rows):
                key[i, :, row.end - row.start :] = value[i, :, row.end - row.start :] = GARBAGE
            with torch.inference_mode():
                found = attend(query, *cache.extend(block, key, value), window)
            for i, row in enumerate(rows):
                own = slice(0, row.end - row.start)
                expected = reference.attend(block, row, query[i, :, own], key[i, :, own], value[i, :, own])
                error = (found[i, :, own] - expected).abs().max().item()
                assert error < tolerance, (row, rows)


def check_positions(positions: Tensor | None, rows: Sequence[Row], length: int, longest: int) -> None:
    """Those of padding are any that there are."""
    if positions is None:
        assert not any(row.start for row in rows)
        return
    assert positions.shape == (len(rows), length)
    assert 0 <= positions.min() <= positions.max() < longest
    for row, found in zip(rows, positions.tolist(), strict=True):
        assert found[: row.end - row.start] == list(range(row.start, row.end))


def configure(window: int | None, block_size: int = 16, tp: int = 1) -> RunConfig:
    """Whatever the machine has, and as many heads as here."""
    config = make_config("task=generate", "model=llama_tiny")
    shape = {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "head_dim": DIM, "sliding_window": window}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=shape),
            "parallel": config.parallel.model_copy(update={"tp": tp}),
            "generate": config.generate.model_copy(update={"block_size": block_size}),
        }
    )


def shape_of(window: int | None, block_size: int, longest: int = LONGEST) -> CacheShape:
    return cache_shape(configure(window, block_size), SLOTS, longest)


def drawn(seed: int, count: int = 14, longest: int = LONGEST) -> Iterator[list[Row]]:
    """Passes of some slots in any order: prompts, chunks of different lengths, single tokens, and new sequences."""
    choice = random.Random(seed)
    done, number = [0] * SLOTS, 0
    for _ in range(count):
        most = choice.choice([1, 1, 2, 3, 5, longest])
        rows = []
        slots = choice.sample(range(SLOTS), choice.randint(1, SLOTS))
        for slot in slots if choice.random() < 0.5 else sorted(slots):
            if done[slot] == longest or choice.random() < 0.15:
                done[slot] = 0
            number += 1
            end = min(longest, done[slot] + (most if choice.random() < 0.5 else choice.randint(1, most)))
            rows.append(Row(slot, number, done[slot], end, True))
            done[slot] = end
        yield rows


WINDOWS = [None, 1, 4, 6, 13, 20]
SIZES = [1, 4, 16]
"""Of blocks: capacities are the window's, or more, up to more than the longest sequence."""


@pytest.mark.parametrize("window", WINDOWS)
def test_attention_is_that_over_all_keys(window: int | None) -> None:
    for block_size, seed in product(SIZES, range(4)):
        check([*drawn(seed)], window, block_size)


def together(*lengths: int, slots: Sequence[int] = range(SLOTS)) -> list[list[Row]]:
    """So many tokens of all slots in each pass."""
    passes, start = [], 0
    for length in lengths:
        passes.append([Row(slot, slot, start, start + length, True) for slot in slots])
        start += length
    return passes


WAYS = {
    "token by token": together(*[1] * LONGEST),
    "a prompt, then tokens": together(5, *[1] * 8),
    "a prompt alone": together(LONGEST),
    "chunks": together(4, 4, 4, 1),
    "chunks that don't fit the window": together(5, 3, 2, 3),
    "a slot alone": together(4, 1, 3, 1, slots=[2]),
    "slots that are no range": together(4, 1, 3, 1, slots=[0, 2, 3]),
    "slots in another order": together(4, 1, 3, 1, slots=[3, 1, 0, 2]),
    "prompts of different lengths": [
        [Row(slot, slot, 0, end, True) for slot, end in enumerate((9, 1, 5, 12))],
        [Row(slot, slot, end, end + 1, True) for slot, end in enumerate((9, 1, 5, 12))],
    ],
    "one enters where another was": [*together(6, 1, 1), *together(2, 1, 1, 1), *together(1, 7, 1)],
    "one enters while others go on": [
        *together(6, 3),
        [Row(0, 0, 9, 10, True), Row(1, 9, 0, 4, True), Row(3, 3, 9, 12, True)],
        [Row(0, 0, 10, 11, True), Row(1, 9, 4, 5, True), Row(3, 3, 12, 13, True)],
    ],
    "padding around the end of the memory": [
        *together(3),
        [Row(0, 0, 3, 4, True), Row(1, 1, 3, 12, True)],
        [Row(0, 0, 4, 5, True), Row(1, 1, 12, 13, True)],
        [Row(0, 0, 5, 13, True)],
    ],
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way(way: str) -> None:
    for window, block_size in product(WINDOWS, SIZES):
        check(WAYS[way], window, block_size)


def test_in_bf16() -> None:
    """Whose numbers have 8 bits."""
    for window, seed in product([None, 4, 12], range(2)):
        check([*drawn(seed)], window, 4, torch.bfloat16, tolerance=0.04)


def test_a_window_bounds_the_memory_of_a_long_sequence() -> None:
    check(together(50, *[1] * 60, 20, 3, 1), 6, 4, longest=134)
    assert shape_of(6, 4, 134) == shape_of(6, 4, 8) == CacheShape(SLOTS, KEY_HEADS, 6, DIM)


# --- memory


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_formula(dtype: torch.dtype) -> None:
    for window, block_size in product(WINDOWS, SIZES):
        kept = LONGEST if window is None else min(window, LONGEST)
        positions = configure(window, block_size).model.max_position_embeddings
        capacity = min(-(-kept // block_size) * block_size, positions, window or positions)
        shape = shape_of(window, block_size)
        assert shape == CacheShape(SLOTS, KEY_HEADS, capacity, DIM)
        cache = KeyValueCache(BLOCKS, shape, LONGEST, window, dtype, torch.device("cpu"))
        assert cache.num_bytes == len(BLOCKS) * 2 * SLOTS * KEY_HEADS * capacity * DIM * dtype.itemsize


def test_bytes_of_every_stage() -> None:
    """Of fp32 and blocks of 16: a rank has its share of the key-value heads, or one that others have, too."""
    for tp, heads in ((1, 2), (2, 1), (4, 1)):
        config = configure(None, tp=tp)
        assert kv_cache_bytes(config, 3, 17) == [config.model.num_hidden_layers * 2 * 3 * heads * 32 * DIM * 4]


def test_the_last_token_needs_no_position() -> None:
    config = config_of({"model": "gpt2", "layout": (1, 1), "generate": {"max_new_tokens": 5}})
    assert longest_sequence(config, [3, 9, 4]) == 13
    most = config.model.max_position_embeddings
    assert longest_sequence(config, [most - 1]) == longest_sequence(config, [most - 3]) == most - 1
    assert longest_sequence(config, []) == 1


# --- with a model


def generated(model: str, prompts: list[list[int]], **values: Any) -> list[list[int]]:
    """What one rank makes of prompts, without any process group."""
    config = config_of({"model": model, "layout": (1, 1), "generate": values})
    slots, lengths = min(config.generate.batch_size, len(prompts)), [*map(len, prompts)]
    stage = Stage(config, 0, prompts, slots, weights=random_state(config.model).__getitem__)
    tokens: list[list[int]] = [[] for _ in prompts]

    def told(chosen: list[Chosen]) -> None:
        for request, token, _ in chosen:
            tokens[request].append(token)

    batcher = Batcher(
        lengths, limits(config, lengths), slots, config.generate.num_groups or 1, config.generate.prefill_chunk,
        config.generate.prefill_batch_size,
    )  # fmt: skip
    batcher.offer(range(len(prompts)))
    Ring(stage, 0, prompts, slots).run(batcher, told)
    return tokens


@pytest.mark.parametrize("model", ["gpt2", "llama grouped", "mistral"])
def test_padding_has_positions_that_the_model_has(model: str) -> None:
    """The end of a long prompt passes together with more tokens of another, up to the last position there is."""
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(211, (length,), generator=generator).tolist() for length in (47, 2, 44, 30)]
    settings = {"max_new_tokens": 2, "temperature": 1.0}
    alone = generated(model, prompts, **settings, batch_size=1)
    assert [len(tokens) for tokens in alone] == [1, 2, 2, 2]
    for chunk, slots in ((7, 2), (13, 3)):
        assert generated(model, prompts, **settings, batch_size=slots, prefill_chunk=chunk) == alone


def test_a_block_holds_no_positions_that_no_sequence_has() -> None:
    positions = configure(None, 1).model.max_position_embeddings
    assert shape_of(None, 10**9).capacity == positions
    assert shape_of(4, 10**9).capacity == 4


def test_a_slot_forgets_what_its_last_sequence_left() -> None:
    """NaN has no weight in attention, but weighs all the same; beside it a longer sequence reads as far as it did."""
    cache = KeyValueCache(BLOCKS, shape_of(None, 1), LONGEST, None, torch.float32, torch.device("cpu"))
    passes = [[Row(0, 0, 0, 5, True), Row(1, 1, 0, 5, True)], [Row(0, 2, 0, 2, True)]]
    for number, rows in enumerate(passes):
        cache.begin(rows, rows[0].end)
        shape = len(rows), KEY_HEADS, rows[0].end, DIM
        cache.extend(BLOCKS[0], *(torch.full(shape, torch.nan if number == 0 else 1.0) for _ in range(2)))
    cache.begin([Row(0, 2, 2, 3, True), Row(1, 1, 5, 6, True)], 1)
    keys, values, _ = cache.extend(BLOCKS[0], *(torch.ones(2, KEY_HEADS, 1, DIM) for _ in range(2)))
    assert not keys[0].isnan().any()
    assert not values[0].isnan().any()
    assert keys[1].isnan().any()
