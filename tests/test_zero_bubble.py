from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
from test_simulate import PUBLISHED, last_backward
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble

from harness.plan.simulate import simulate
from harness.spec.passes import Orders, PartOf, Pass, PassSeconds, Timing, most_held, time_passes
from harness.spec.schedules import Instruction, Schedule, Stage
from harness.spec.zero_bubble import list_schedule, zb_h1_passes, zb_v_passes

RATIOS = [(1, 1, 1), (1, 1.1, 0.6), (2, 2, 1), (1, 2, 1), *(row[2:5] for row in PUBLISHED)]
ZB_H1_RATES = [0.1585, 0.0674, 0.1045, 0.1397, 0.0576, 0.1421]
ZB_2P_RATES = [0.0433, 0.0026, 0.0022, 0.0066, 0.0028, 0.0038]  # arXiv 2401.10241, tables 5 and 9


def same(p: int, v: int, times: tuple[float, ...], transfer: float = 0) -> PassSeconds:
    return PassSeconds(*([[time] * v] * p for time in times), transfer)


def v_shape(p: int) -> PartOf:
    return lambda stage, chunk: 2 * p - 1 - stage if chunk else stage


def timed(orders: Orders, seconds: PassSeconds) -> Timing:
    return time_passes(orders, seconds, v_shape(len(orders)))


def zb_h1(p: int, m: int) -> Orders:
    return [list(zb_h1_passes(stage, p, m)) for stage in range(p)]


def zb_v(p: int, m: int) -> Orders:
    return [list(zb_v_passes(stage, p, m)) for stage in range(p)]


def rate(cost: float, m: int, work: float) -> float:
    return round((cost - m * work) / cost, 4)


def instructions(index: int, order: list[Pass], p: int, m: int) -> Iterator[Instruction]:
    stage = Stage(index, p, m)
    for kind, micro_batch, _ in order:
        if kind == "forward":
            yield from stage.forward(micro_batch)
        else:
            urgent = kind == "backward_input"
            yield from stage.receive_gradient(micro_batch) if urgent else ()
            yield Instruction(kind, micro_batch)
            yield from stage.send_gradient(micro_batch) if urgent else ()


@pytest.mark.parametrize(("row", "expected"), list(zip(PUBLISHED, ZB_H1_RATES, strict=True)))
def test_zb_h1_has_the_published_bubble_rates_and_one_times_the_memory_never_more(
    row: tuple[float, ...], expected: float
) -> None:
    p, m, (f, b, w, transfer) = int(row[0]), int(row[1]), row[2:6]
    seconds = same(p, 1, (f, b, w), transfer)
    assert rate(timed(zb_h1(p, m), seconds).makespan, m, f + b + w) == expected
    if p <= 16 and m < 128:
        assert rate(timed(list_schedule(p, m, 1, seconds, memory=1), seconds).makespan, m, f + b + w) <= expected


@pytest.mark.parametrize("row", PUBLISHED[:5])
def test_twice_the_memory_gives_no_bubble_but_the_ramp(row: tuple[float, ...]) -> None:
    """The last stage begins after p - 1 forward passes and transfers, and is busy from then on: nothing is shorter."""
    p, m, (f, b, w, transfer) = int(row[0]), int(row[1]), row[2:6]
    seconds = same(p, 1, (f, b, w), transfer)
    timing = timed(list_schedule(p, m, 1, seconds, memory=2), seconds)
    assert timing.makespan == pytest.approx(m * (f + b + w) + (p - 1) * (f + transfer), rel=1e-9)
    # The last stage must run m - 2p weight passes before its last forward pass; from its end to the first stage's end
    # all other stages compute a gradient: of the longest stage, no order at this memory has less than `bound`.
    bound = m * (f + b) + (p - 1) * (f + b + 2 * transfer) + (m - 2 * p + 1) * w
    assert bound * (1 - 1e-9) <= timing.longest_stage <= 1.006 * bound


@pytest.mark.parametrize(("row", "published"), list(zip(PUBLISHED, ZB_2P_RATES, strict=True))[:4])
def test_zb_2p_rates_where_only_time_limits(row: tuple[float, ...], published: float) -> None:
    """The paper frees part of the memory after the input pass; here nothing is freed, so all of it is given."""
    p, m, (f, b, w, transfer) = int(row[0]), int(row[1]), row[2:6]
    seconds = same(p, 1, (f, b, w), transfer)
    cost = timed(list_schedule(p, m, 1, seconds, memory=math.inf), seconds).longest_stage
    assert rate(cost, m, f + b + w) <= published + 0.0003  # only the first row needs it


@pytest.mark.parametrize(("p", "m"), list(product([1, 2, 3, 5, 8], [1, 2, 7, 16])))
def test_one_chunk_takes_as_long_in_the_simulator(p: int, m: int) -> None:
    for times, memory in product([(1, 1, 1), (3, 4, 2)], [1, 2]):
        seconds = same(p, 1, times, 1)
        for orders in (zb_h1(p, m), list_schedule(p, m, 1, seconds, memory)):
            stages = [list(instructions(index, list(order), p, m)) for index, order in enumerate(orders)]
            durations = dict(zip(("forward", "backward_input", "backward_weight"), times, strict=True))
            durations |= {"send_activation": 1, "send_gradient": 1}
            spans = simulate(Schedule("zb", m, 1, stages), durations)
            assert last_backward(spans) == timed(orders, seconds).makespan * 10**9


@pytest.mark.parametrize(("p", "m"), list(product([1, 2, 3, 4, 8], [1, 2, 4, 8, 16])))
def test_zb_h1_is_the_interleaved_zero_bubble_schedule_of_torch_with_one_stage_per_rank(p: int, m: int) -> None:
    if m % max(1, m // p):
        pytest.skip("torch refuses these sizes")
    torch = SimpleNamespace(n_local_stages=1, pp_group_size=p, _n_microbatches=m, microbatches_per_round=min(p, m))
    for rank, order in enumerate(zb_h1(p, m)):
        actions = ScheduleInterleavedZeroBubble._calculate_single_rank_operations(torch, rank)
        assert [Pass(a.computation_type.name.lower(), a.microbatch_index, 0) for a in actions if a is not None] == list(
            order
        )


@pytest.mark.parametrize(("p", "m"), list(product([1, 2, 3, 4, 8], [1, 4, 8, 33])))
def test_zb_v_is_the_one_of_torch(p: int, m: int) -> None:
    torch = SimpleNamespace(pp_group_size=p, _n_microbatches=m, num_stages=2 * p)
    for rank, order in enumerate(zb_v(p, m)):
        actions = ScheduleZBVZeroBubble._calculate_single_rank_operations(torch, rank)
        assert [
            Pass(a.computation_type.name.lower(), a.microbatch_index, int(a.stage_index != rank))
            for a in actions
            if a is not None
        ] == list(order)


@pytest.mark.parametrize("p", range(1, 9))
def test_equal_times_in_a_v_leave_no_bubble_but_the_ramp(p: int) -> None:
    seconds = same(p, 2, (1, 1, 1))
    for m in (p, p + 1, 3 * p):
        assert timed(list_schedule(p, m, 2, seconds, memory=1), seconds).makespan == 6 * m + p - 1


@pytest.mark.parametrize(("p", "groups"), [*product([2, 3, 4], [1, 2, 4]), (8, 1)])
def test_never_longer_than_zb_v_or_zb_h1(p: int, groups: int) -> None:
    m = p * groups
    ratios = RATIOS[(p + groups) % 5 :: 5]
    for times, transfer, head in product(ratios, (0, 0.05), (1, 2)):
        for v, fixed, part in ((1, zb_h1(p, m), (p - 1, 0)), (2, zb_v(p, m), (0, 1))):
            tables = [[[time] * v for _ in range(p)] for time in times]
            for table in tables:
                table[part[0]][part[1]] *= head
            seconds = PassSeconds(*tables, transfer * times[0])
            orders = list_schedule(p, m, v, seconds, memory=1)
            assert timed(orders, seconds).makespan <= timed(fixed, seconds).makespan * (1 + 1e-9)
            assert max(map(most_held, orders)) <= p * v


@pytest.mark.parametrize("p", [4, 8, 12])
def test_little_memory_in_a_v(p: int) -> None:
    """Idle time of V-Min and V-Half: about 4p and 3p passes (arXiv 2405.15362, table 1)."""
    seconds, m = same(p, 2, (1, 1, 1)), 4 * p
    for micro_batches, idle in (((p + 4) // 3, 4 * p), ((p + 2) // 2, 3 * p)):
        orders = list_schedule(p, m, 2, seconds, micro_batches / p)
        assert max(map(most_held, orders)) <= 2 * micro_batches
        assert timed(orders, seconds).makespan - 6 * m <= idle


@pytest.mark.parametrize("seed", range(12))
def test_any_times_and_memory_give_an_order_and_more_memory_none_that_is_longer(seed: int) -> None:
    draw = random.Random(seed)
    p, m, v = draw.randint(1, 5), draw.randint(1, 8), draw.choice((1, 2))
    tables = [[[draw.choice((0, 1, 2, 3, 0.5, 1.7)) for _ in range(v)] for _ in range(p)] for _ in range(3)]
    seconds = PassSeconds(*tables, draw.choice((0, 0.1, 1)))
    spans = []
    assert list_schedule(p, m, v, seconds, 1) == list_schedule(p, m, v, seconds, 1)
    for held in [*range(v, 2 * p * v + 1, max(1, p // 2))]:
        orders = list_schedule(p, m, v, seconds, held / (p * v))
        spans.append(timed(orders, seconds).makespan)
        for order in orders:
            assert len(order) == len(set(order)) == 3 * m * v
            assert most_held(order) <= held
    assert all(more <= less + 1e-9 for less, more in pairwise(spans))


def test_an_unsplit_backward_by_hand() -> None:
    """Stage 1 waits for the transfer, and its gradient leaves after both halves."""
    orders = [[Pass(kind, i, 0) for i in range(2)] for kind in ("forward", "backward")]
    both = [[*orders[0], *orders[1]], [orders[0][0], orders[1][0], orders[0][1], orders[1][1]]]
    timing = time_passes(both, same(2, 1, (3, 2, 2), 1), lambda stage, _: stage)
    assert timing.ends == [[3, 6, 16, 23], [7, 11, 14, 18]]
    assert (timing.makespan, timing.longest_stage) == (23, 23)


def test_orders_that_wait_for_each_other() -> None:
    first = [Pass("backward", 0, 0), Pass("forward", 0, 0)]
    with pytest.raises(ValueError, match=r"stage 0 at backward of micro-batch 0, chunk 0, waits for the gradient of .*"
                                         r"part 1 on stage 1; stage 1 at forward .* part 0 on stage 0"):  # fmt: skip
        time_passes([first, first[::-1]], same(2, 1, (1, 1, 1)), lambda stage, _: stage)


@pytest.mark.parametrize(
    ("sizes", "times", "memory", "message"),
    [
        (
            (4, 8, 2),
            (1, 1, 1),
            0.2,
            "memory of 0.2 times .* 4 stages hold a micro-batch's 2 passes; give at least 0.25",
        ),
        ((4, 8, 1), (1, 1, 1), math.nan, "give at least 0.25"),
        ((4, 8, 3), (1, 1, 1), 1, "1 or 2 chunks, not 4, 8 and 3"),
        ((4, 8, 1), (1, -1, 1), 1, "backward_input has the duration -1"),
    ],
)
def test_what_cannot_be(sizes: tuple[int, int, int], times: tuple[int, ...], memory: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list_schedule(*sizes, same(sizes[0], sizes[2], times), memory)


@pytest.mark.parametrize(("p", "m", "limit"), [(8, 64, 1), (16, 128, 5)])
def test_fast_enough_to_be_computed_by_every_rank(p: int, m: int, limit: float) -> None:
    start = time.process_time()
    list_schedule(p, m, 2, same(p, 2, (1, 1.1, 0.6), 0.05), memory=1)
    assert time.process_time() - start < limit
