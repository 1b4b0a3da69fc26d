"""Layers per stage: no split has a lighter heaviest stage."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.spec.config import Parallel
from harness.spec.counts import stage_counts
from harness.spec.partition import balance, layers_per_part
from harness.spec.placement import Placement
from tests.helpers import make_config


def every_split(num_layers: int, num_stages: int) -> Iterator[list[int]]:
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        edges = [0, *cuts, num_layers]
        yield [end - start for start, end in pairwise(edges)]


def heaviest(split: list[int], block: float, first: float, last: float) -> float:
    weights = [block * layers for layers in split]
    weights[0] += first
    weights[-1] += last
    return max(weights)


@pytest.mark.parametrize("num_layers", range(1, 11))
def test_no_split_is_better(num_layers: int) -> None:
    for num_stages in range(1, num_layers + 1):
        splits = list(every_split(num_layers, num_stages))
        for first, last in [(0, 0), (0, 3), (5, 0), (2, 2), (7, 1), (1, 29), (100, 100)]:
            for block in (1, 2, 10):
                found = balance(num_layers, Placement(num_stages), block, first, last)
                assert found in splits
                best = min(heaviest(split, block, first, last) for split in splits)
                assert heaviest(found, block, first, last) == best


@given(
    st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    st.floats(0.1, 10), st.floats(0, 50), st.floats(0, 50),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_no_split_is_better_for_any_weights(sizes: tuple[int, int], block: float, first: float, last: float) -> None:
    found = balance(sizes[0], Placement(sizes[1]), block, first, last)
    best = min(heaviest(split, block, first, last) for split in every_split(*sizes))
    assert heaviest(found, block, first, last) == pytest.approx(best)


def test_ties_go_to_the_earlier_stage() -> None:
    assert balance(7, Placement(3), 1) == [3, 2, 2]
    assert balance(5, Placement(4), 1) == [2, 1, 1, 1]


@pytest.mark.parametrize("is_v", [False, True])
@pytest.mark.parametrize(("p", "v"), [(2, 2), (2, 3), (3, 2)])
def test_with_chunks_no_stage_could_be_lighter(p: int, v: int, is_v: bool) -> None:
    placement = Placement(p, v, is_v)
    for num_layers, (first, last) in product(range(p * v, 11), [(0, 0), (1, 3), (0, 9)]):

        def worst(parts: list[int], first: int = first, last: int = last) -> int:
            weights = [2 * parts[0] + first, *(2 * layers for layers in parts[1:-1]), 2 * parts[-1] + last]
            return max(sum(weights[part] for part in placement.parts_of(stage)) for stage in range(p))

        found = balance(num_layers, placement, 2, first, last)
        assert worst(found) == min(map(worst, every_split(num_layers, p * v)))
        assert min(found) >= 1


def test_the_chunks_of_a_stage_are_alike() -> None:
    """A V of two stages, whose first stage holds the head, too, as heavy as two blocks."""
    assert balance(8, Placement(2, 2, is_v=True), 1, 0, 2) == [2, 3, 2, 1]


def split(method: str, pp: int, *overrides: str) -> list[int]:
    config = make_config(f"parallel.partition={method}", f"parallel.pp={pp}", *overrides)
    return layers_per_part(config.model, config.parallel, config.train.sequence_length)


def test_uniform_and_listed() -> None:
    assert split("uniform", 4, "model=gpt2_small") == [3, 3, 3, 3]
    assert split("uniform", 5, "model=gpt2_small") == [3, 3, 2, 2, 2]
    assert split("[7,1,4]", 3, "model=gpt2_small") == [7, 1, 4]
    for method in ("uniform", "parameters", "cost"):
        assert split(method, 1) == [4]
        assert split(method, 4) == [1, 1, 1, 1]


def test_cost_spares_the_stage_with_the_head() -> None:
    # The head of gpt2_small has the FLOPs of 5.3 blocks at sequence length 128.
    assert split("cost", 2, "model=gpt2_small") == [9, 3]
    assert split("cost", 4, "model=gpt2_small") == [4, 4, 3, 1]
    # A longer sequence makes attention, and so blocks, heavier; the head stays.
    assert split("cost", 2, "model=gpt2_small", "train.sequence_length=1024") == [8, 4]


def test_parameters_count_the_embedding_and_its_tied_copy() -> None:
    assert split("parameters", 2, "model=gpt2_small") == [6, 6]
    # Untied: the embedding of stage 0 weighs as much as the head.
    assert split("parameters", 2, "model=llama3_8b", "train.sequence_length=128") == [16, 16]
    assert split("parameters", 3, "model=gpt2_small") == [2, 8, 2]


@pytest.mark.parametrize("name", ["gpt2_small", "gpt2_tiny", "llama_1b", "llama_tiny"])
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_methods_balance_what_stage_counts_counts(name: str, pp: int) -> None:
    """The partition and the table of stages agree on what a stage weighs."""
    config = make_config(f"model={name}", f"parallel.pp={pp}")
    model, length = config.model, config.train.sequence_length
    for method, weight in [("parameters", "parameters"), ("cost", "forward_flops")]:
        found = layers_per_part(model, with_partition(config.parallel, method), length)

        def worst(layers: list[int], weight: str = weight) -> int:
            return max(getattr(stage, weight) for stage in stage_counts(config, layers))

        assert worst(found) == min(worst(layers) for layers in every_split(model.num_hidden_layers, pp))


def with_partition(parallel: Parallel, method: str) -> Parallel:
    return parallel.model_copy(update={"partition": method})


def test_a_listed_partition_is_copied() -> None:
    config = make_config("parallel.partition=[1,3]", "parallel.pp=2")
    layers_per_part(config.model, config.parallel, 1).append(5)
    assert config.parallel.partition == [1, 3]
