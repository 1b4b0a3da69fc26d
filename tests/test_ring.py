"""The ring's instructions fit together, and its closed formulas are what the simulation gives."""

from __future__ import annotations

from collections import defaultdict
from itertools import product
from typing import Any

import pytest
from helpers import make_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batching import Case, cases

from harness.plan.simulate import simulate
from harness.spans.span import RECEIVE_OF_SEND, SEND_OF_RECEIVE, activity, measured_bubble
from harness.spec.batching import Batcher, Passes, Phase, Row, Work
from harness.spec.config import RunConfig
from harness.spec.generation import has_phases
from harness.spec.kv_cache import limits, num_groups
from harness.spec.ring import (
    first_stage,
    ideal_bubble_of,
    ideal_decode_bubble,
    ideal_prefill_bubble,
    later_stage,
    ring_schedule,
)
from harness.spec.schedules import Instruction, Schedule


def batcher_of(case: Case) -> Batcher:
    batcher = Batcher(
        case.prompts, case.counts, case.num_slots, case.num_groups, case.chunk, case.prefill_rows, first=case.first
    )
    batcher.offer(range(len(case.prompts)))
    return batcher


def phases_of(batcher: Batcher, num_stages: int) -> dict[Phase, tuple[Schedule, list[Work]]]:
    """One after the other."""
    found: dict[Phase, tuple[Schedule, list[Work]]] = {}
    for phase in ("prefill", "decode"):
        batcher.phases = frozenset([phase])
        found[phase] = ring_schedule(batcher, num_stages)
    return found


def check_messages(schedule: Schedule) -> None:
    """On every way between two stages what is sent is received, in the same order."""
    sent: dict[Any, list[int]] = defaultdict(list)
    received: dict[Any, list[int]] = defaultdict(list)
    for stage, instructions in enumerate(schedule.stages):
        for kind, number, _, peer in instructions:
            if kind in RECEIVE_OF_SEND:
                sent[stage, peer, kind].append(number)
            elif kind in SEND_OF_RECEIVE:
                received[peer, stage, SEND_OF_RECEIVE[kind]].append(number)
    assert sent == received


def seconds_of(schedule: Schedule, forward: Any = 1.0, **others: float) -> tuple[int, float]:
    """Until the last forward has ended, and the idle share."""
    spans = simulate(schedule, {"forward": forward, **others})
    ends = [span.end_ns for stage in spans for span in stage if span.kind == "forward"]
    return max(ends) / 1e9, measured_bubble([[activity(stage, learns=False)] for stage in spans]).fraction


@settings(max_examples=300, deadline=None)
@given(cases(), st.integers(1, 5))
def test_messages_have_both_ends_and_nobody_waits_for_ever(case: Case, num_stages: int) -> None:
    batcher = batcher_of(case)
    whole: list[tuple[Schedule, list[Work]]] = []
    while not whole or whole[-1][1]:
        alone = case.alone and phases_of(batcher, num_stages)
        whole += alone.values() if alone else [ring_schedule(batcher, num_stages)]
    for schedule, works in whole:
        check_messages(schedule)
        for stage in schedule.stages:
            assert [i.micro_batch for i in stage if i.kind == "forward"] == list(range(len(works)))
        choosing = [number for number, work in enumerate(works) if work.choosing]
        back = [i.micro_batch for i in schedule.stages[-1] if i.kind == "send_tokens"]
        assert back == (choosing if num_stages > 1 else [])
        if works:
            assert len(simulate(schedule, {"forward": 1, "send_activation": 0.1, "send_tokens": 0.01})) == num_stages
    assert sum(len(work.choosing) for _, works in whole for work in works) == sum(case.counts)


def test_a_ring_of_three_stages() -> None:
    """Two sequences in groups of their own, the first of which gets a second token; by hand."""
    schedule, _ = ring_schedule(batcher_of(Case([4, 4], [2, 1], [None] * 2, 2, 2, first=7)), 3)
    assert [[(i.kind, i.micro_batch, i.peer) for i in stage] for stage in schedule.stages] == [
        [
            ("forward", 0, -1), ("send_activation", 0, 1),
            ("forward", 1, -1), ("send_activation", 1, 1),
            ("recv_tokens", 0, 2), ("forward", 2, -1), ("send_activation", 2, 1),
            ("recv_tokens", 1, 2),
            ("recv_tokens", 2, 2),
        ],
        [of for n in range(3) for of in (("recv_activation", n, 0), ("forward", n, -1), ("send_activation", n, 2))],
        [of for n in range(3) for of in (("recv_activation", n, 1), ("forward", n, -1), ("send_tokens", n, 0))],
    ]  # fmt: skip


def decode_of(num_stages: int, groups: int, rounds: int) -> Schedule:
    """Alone, of groups of a sequence."""
    batcher = Batcher([3] * groups, [rounds + 1] * groups, groups, groups)
    batcher.offer(range(groups))
    schedule, works = phases_of(batcher, num_stages)["decode"]
    assert len(works) == rounds * groups
    return schedule


def test_decode_takes_what_the_formulas_say() -> None:
    for p, groups, rounds in product(range(1, 6), range(1, 8), range(1, 10)):
        seconds, bubble = seconds_of(decode_of(p, groups, rounds))
        assert seconds == (rounds * groups + p - 1 if groups >= p else rounds * p + groups - 1)
        assert bubble == pytest.approx(1 - rounds * groups / seconds, abs=1e-12)
        assert ideal_decode_bubble(p, groups, rounds) == pytest.approx(bubble, abs=1e-12)


def test_prefill_takes_what_the_formula_says() -> None:
    for p, groups, m in product(range(1, 6), range(1, 8), range(1, 12)):
        batcher = Batcher([3] * m, [2] * m, m, min(groups, m), prefill_rows=1)
        batcher.offer(range(m))
        schedule, works = phases_of(batcher, p)["prefill"]
        assert len(works) == m
        check_messages(schedule)
        seconds, bubble = seconds_of(schedule)
        assert seconds == m + p - 1
        assert ideal_prefill_bubble(p, m) == pytest.approx(bubble, abs=1e-12) == pytest.approx((p - 1) / (m + p - 1))


def test_passes_that_depend_on_nothing_are_a_pipeline() -> None:
    for p, m in product(range(1, 6), range(1, 9)):
        works = [Work(20 + number, "prefill", (Row(0, number, 0, 4, False),)) for number in range(m)]
        schedule, found = ring_schedule(Passes(works), p)
        assert found == works
        assert not any(i.kind.endswith("tokens") for stage in schedule.stages for i in stage)
        assert seconds_of(schedule) == (m + p - 1, pytest.approx(ideal_prefill_bubble(p, m), abs=1e-12))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 7), st.integers(0, 3))
def test_a_round_takes_the_slowest_stage_or_the_way_round(stages: list[int], groups: int, transfer: int) -> None:
    """Max-plus algebra: in the long run a round takes the largest mean of a circle."""
    p, few, many = len(stages), 30, 60
    ways = {"send_activation": transfer, "send_tokens": transfer} if p > 1 else {}
    begin, end = (seconds_of(decode_of(p, groups, rounds), stages, **ways)[0] for rounds in (few, many))
    round_seconds = max(max(stages) * groups, sum(stages) + (transfer * p if p > 1 else 0))
    assert (end - begin) / (many - few) == pytest.approx(round_seconds, rel=1e-9)


def test_who_executes_delivers_before_the_next_instruction() -> None:
    """`first_stage` decides what comes next only when it is asked."""
    batcher = Batcher([1], [9], 1, 1, ends=lambda _, token: "stop" if token == 2 else None)
    batcher.offer([0])
    told, under_way = [], {}
    for step in first_stage(batcher, 2):
        if isinstance(step, Work):
            under_way[step.number] = step
        elif step.kind == "recv_tokens":
            told += batcher.deliver(under_way.pop(step.micro_batch), [len(told)])
    assert [of.token for of in told] == [0, 1, 2]
    assert not under_way


def test_a_later_stage_sends_tokens_only_where_some_are_chosen() -> None:
    kinds = [i.kind for i in later_stage(1, 2, [4, 5], [False, True])]
    assert kinds == ["recv_activation", "forward", "recv_activation", "forward", "send_tokens"]
    middle = list(later_stage(1, 3, [4], iter(())))
    assert middle[-1] == Instruction("send_activation", 4, peer=2)


# --- of configurations


def configure(pp: int = 1, positions: int = 1024, **values: Any) -> RunConfig:
    """Whatever the machine has."""
    config = make_config("task=generate")
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update={"pp": pp}),
            "generate": config.generate.model_copy(update=values),
            "model": config.model.model_copy(update={"max_position_embeddings": positions}),
        }
    )


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_ideal_bubbles_are_those_of_the_run(pp: int) -> None:
    """As `harness.run.inference.generation` runs it; with more positions than are asked for, and with fewer."""
    requests = [(None, None), (3, None), (1, 4), (5, 2), (6, 6)]
    passes = [(None, None), (5, None), (4, 1), (None, 2), (1, 6)]
    lengths = [(1, 64), (2, 64), (7, 64), (64, 12)]
    for (num_requests, groups), (chunk, rows), (new, positions) in product(requests, passes, lengths):
        config = configure(
            pp, positions, batch_size=6, num_requests=num_requests, num_groups=groups, prompt_length=9,
            prefill_chunk=chunk, prefill_batch_size=rows, max_new_tokens=new,
        )  # fmt: skip
        prompts = [9] * (num_requests or 6)
        num_slots = len(prompts)
        batcher = Batcher(prompts, limits(config, prompts), num_slots, num_groups(config, num_slots), chunk, rows)
        batcher.offer(range(num_slots))
        for phase, (schedule, works) in phases_of(batcher, pp).items():
            check_messages(schedule)
            ideal = ideal_bubble_of(config, phase)
            if works:
                assert ideal == pytest.approx(seconds_of(schedule)[1], abs=1e-12)
            else:
                assert (phase, new, ideal) == ("decode", 1, None)


def test_which_runs_have_phases() -> None:
    """Random prompts that all have a place and come at once."""
    expected = {
        (): True,
        (("num_requests", 8),): True,
        (("num_requests", 3), ("num_groups", 8)): True,
        (("num_requests", 9),): False,
        (("request_rate", 2.0),): False,
        (("prompt", "a"),): False,
        (("prompts_file", "a"),): False,
    }
    for values, has in expected.items():
        config = configure(2, **dict(values))
        assert has_phases(config) == has, values
        for phase in ("prefill", "decode"):
            assert (ideal_bubble_of(config, phase) is not None) == has


def test_no_group_is_without_a_slot() -> None:
    assert [num_groups(configure(pp=4), slots) for slots in range(7)] == [0, 1, 2, 3, 4, 4, 4]
    assert [num_groups(configure(pp=2, num_groups=3), slots) for slots in range(5)] == [0, 1, 2, 3, 3]


def test_a_prompt_leaves_only_so_many_positions() -> None:
    config = configure(positions=12, max_new_tokens=5)
    assert limits(config, [1, 7, 8, 11, 12]) == [5, 5, 4, 1, 0]
