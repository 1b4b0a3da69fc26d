from __future__ import annotations

import math
import random
import time
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
from test_simulate import PUBLISHED, last_backward
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble

from harness.plan.simulate import simulate
from harness.spec.passes import Orders, Pass, PassSeconds, Timing, most_passes_held, time_passes
from harness.spec.placement import Placement
from harness.spec.schedules import Instruction, Schedule, with_transfers
from harness.spec.zero_bubble import list_schedule, zb_h1_passes, zb_v_passes

RATIOS = [(1, 1, 1), (1, 1.1, 0.6), (2, 2, 1), (1, 2, 1), *(row[2:5] for row in PUBLISHED)]
# arXiv 2401.10241, tables 5 and 9; the models' heads per width in table 3, whose sequences have 1024 tokens.
ZB_2P_RATES = [0.0433, 0.0026, 0.0022, 0.0066, 0.0028, 0.0038]
HEADS = [24 / 2304, 24 / 2304, 32 / 4096, 40 / 5120, 40 / 5120, 48 / 6144]
SLOW = pytest.mark.slow


def same(p: int, v: int, times: tuple[float, ...], transfer: float = 0) -> PassSeconds:
    return PassSeconds(*([[time] * v] * p for time in times), transfer)


def timed(orders: Orders, seconds: PassSeconds) -> Timing:
    return time_passes(orders, seconds, lambda stage, chunk: 2 * len(orders) - 1 - stage if chunk else stage)


def zb_h1(p: int, m: int) -> Orders:
    return [list(zb_h1_passes(stage, p, m)) for stage in range(p)]


def zb_v(p: int, m: int) -> Orders:
    return [list(zb_v_passes(stage, p, m)) for stage in range(p)]


def rate(cost: float, m: int, work: float) -> float:
    return round((cost - m * work) / cost, 4)


@pytest.mark.parametrize("number", [0, 1, 2, 3, *(pytest.param(n, marks=SLOW) for n in (4, 5))])
def test_published_bubble_rates(number: int) -> None:
    """With twice the memory the last stage is never idle once the first forward pass arrives: nothing is shorter."""
    p, m, f, b, w, transfer, _, of_zb_h1 = PUBLISHED[number]
    seconds, kept = same(p, 1, (f, b, w), transfer), 32 / (34 + 5 * 1024 * HEADS[number])
    assert rate(timed(zb_h1(p, m), seconds).makespan, m, f + b + w) == of_zb_h1
    once, twice = (list_schedule(p, m, 1, seconds, memory, kept) for memory in (1, 2))
    assert rate(timed(once, seconds).makespan, m, f + b + w) <= of_zb_h1
    assert rate(timed(twice, seconds).longest_stage, m, f + b + w) <= ZB_2P_RATES[number]
    assert timed(twice, seconds).makespan == pytest.approx(m * (f + b + w) + (p - 1) * (f + transfer), rel=1e-9)
    assert max(most_passes_held(order, kept) for order in once) <= p
    assert max(most_passes_held(order, kept) for order in twice) <= 2 * p


def test_the_longest_stage_where_nothing_is_freed_by_an_input_pass() -> None:
    """The last stage must run m - 2p weight passes before its last forward pass, and gradients go back from there."""
    p, m, (f, b, w, transfer) = 8, 32, PUBLISHED[2][2:6]
    bound = m * (f + b) + (p - 1) * (f + b + 2 * transfer) + (m - 2 * p + 1) * w
    seconds = same(p, 1, (f, b, w), transfer)
    longest = timed(list_schedule(p, m, 1, seconds, memory=2), seconds).longest_stage
    assert bound * (1 - 1e-9) <= longest <= 1.006 * bound


def test_what_is_held_by_hand() -> None:
    order = [Pass(kind, 0, 0) for kind in ("forward", "forward", "backward_input", "forward", "backward_weight")]
    assert [most_passes_held(order, kept) for kept in (0, 0.3, 1)] == [2, 2.3, 3]
    assert most_passes_held([*order, order[0]], 0.3) == 3


@pytest.mark.parametrize(("p", "m"), list(product([1, 2, 3, 5, 8], [1, 7, 16])))
def test_one_chunk_takes_as_long_in_the_simulator(p: int, m: int) -> None:
    for times, memory in product([(1, 1, 1), (3, 4, 2)], [1, 2]):
        seconds = same(p, 1, times, 1)
        for orders in (zb_h1(p, m), list_schedule(p, m, 1, seconds, memory)):
            stages = [
                list(with_transfers((Instruction(*step) for step in order), Placement(p), index))
                for index, order in enumerate(orders)
            ]
            kinds = ("forward", "backward_input", "backward_weight", "send_activation", "send_gradient")
            durations = dict(zip(kinds, (*times, 1, 1), strict=True))
            spans = simulate(Schedule("zb", m, Placement(p), stages), durations)
            assert last_backward(spans) == timed(orders, seconds).makespan * 10**9


@pytest.mark.parametrize(("p", "m"), [(p, m) for p in (1, 2, 3, 8) for m in (1, 4, 8, 33)])
def test_fixed_schedules_are_those_of_torch(p: int, m: int) -> None:
    """ZB-H1 is torch's interleaved zero-bubble schedule with one stage per rank."""
    torch = SimpleNamespace(pp_group_size=p, _n_microbatches=m, num_stages=2 * p, n_local_stages=1)
    torch.microbatches_per_round = min(p, m)
    pairs = [(ScheduleZBVZeroBubble, zb_v(p, m))]
    if m % max(1, m // p) == 0:  # others are refused by torch
        pairs.append((ScheduleInterleavedZeroBubble, zb_h1(p, m)))
    for (theirs, ours), rank in product(pairs, range(p)):
        assert ours[rank] == [
            Pass(a.computation_type.name.lower(), a.microbatch_index, int(a.stage_index != rank))
            for a in theirs._calculate_single_rank_operations(torch, rank)
            if a is not None
        ]


@pytest.mark.parametrize("p", range(1, 9))
def test_equal_times_in_a_v_leave_no_bubble_but_the_ramp(p: int) -> None:
    seconds = same(p, 2, (1, 1, 1))
    for m in (p, 3 * p):
        assert timed(list_schedule(p, m, 2, seconds, memory=1), seconds).makespan == 6 * m + p - 1


@pytest.mark.parametrize(("p", "groups"), [*product([2, 3, 4], [1, 2, 4]), (8, 1)])
def test_never_longer_than_zb_v_or_zb_h1(p: int, groups: int) -> None:
    m = p * groups
    for times, (transfer, head) in product(RATIOS[(p + groups) % 5 :: 5], ((0, 2), (0.05, 1), (0.05, 2))):
        for v, fixed, part in ((1, zb_h1(p, m), (p - 1, 0)), (2, zb_v(p, m), (0, 1))):
            tables = [[[time] * v for _ in range(p)] for time in times]
            for table in tables:
                table[part[0]][part[1]] *= head
            seconds = PassSeconds(*tables, transfer * times[0])
            orders = list_schedule(p, m, v, seconds, memory=1)
            assert timed(orders, seconds).makespan <= timed(fixed, seconds).makespan * (1 + 1e-9)
            assert max(map(most_passes_held, orders)) <= p * v


@pytest.mark.parametrize(("p", "m", "passes", "idle"), [(6, 12, 4, 0.681), (6, 12, 10, 0.125), (12, 24, 23, 0.1)])
def test_every_pass_that_memory_allows_is_used(p: int, m: int, passes: int, idle: float) -> None:
    seconds = same(p, 2, (1, 1, 1))
    orders = list_schedule(p, m, 2, seconds, passes / (2 * p))
    assert timed(orders, seconds).makespan / (6 * m) - 1 <= idle
    assert max(map(most_passes_held, orders)) <= passes


@pytest.mark.parametrize("unit", [1e-300, 1e-10, 1e-3, 7, 1e300])
def test_only_ratios_of_durations_matter(unit: float) -> None:
    """But for 1e-9 of the longest."""
    p, m = 4, 8
    scaled = [same(p, 2, tuple(factor * time for time in (1, 1.1, 0.7)), factor * 0.05) for factor in (1, unit)]
    orders = [list_schedule(p, m, 2, seconds, memory=0.75) for seconds in scaled]
    assert timed(orders[1], scaled[0]).makespan == pytest.approx(timed(orders[0], scaled[0]).makespan, rel=1e-6)


@pytest.mark.parametrize("p", [4, 6, 9])
def test_little_memory_in_a_v(p: int) -> None:
    """Idle time of V-Min and V-Half: about 4p and 3p passes (arXiv 2405.15362, table 1)."""
    seconds, m = same(p, 2, (1, 1, 1)), 4 * p
    for micro_batches, idle in (((p + 4) // 3, 4 * p), ((p + 2) // 2, 3 * p)):
        orders = list_schedule(p, m, 2, seconds, micro_batches / p)
        assert max(map(most_passes_held, orders)) <= 2 * micro_batches
        assert timed(orders, seconds).makespan - 6 * m <= idle


@pytest.mark.parametrize("seed", range(12))
def test_any_times_and_memory_give_an_order_and_more_memory_none_that_is_longer(seed: int) -> None:
    draw = random.Random(seed)
    p, m, v = draw.randint(1, 5), draw.randint(1, 8), draw.choice((1, 2))
    tables = [[[draw.choice((0, 1, 2, 3, 0.5, 1.7)) for _ in range(v)] for _ in range(p)] for _ in range(3)]
    seconds = PassSeconds(*tables, draw.choice((0, 0.1, 1)))
    kept, spans = draw.choice((0, 0.366, 0.7, 1)), []
    assert list_schedule(p, m, v, seconds, 1, kept) == list_schedule(p, m, v, seconds, 1, kept)
    for held in range(v, 2 * p * v + 1):
        orders = list_schedule(p, m, v, seconds, held / (p * v), kept)
        spans.append(timed(orders, seconds).makespan)
        for order in orders:
            assert len(order) == len(set(order)) == 3 * m * v
            assert most_passes_held(order, kept) <= held
    assert all(more <= less + 1e-9 for less, more in pairwise(spans))


def test_an_unsplit_backward_by_hand() -> None:
    """Stage 1 waits for the transfer, and its gradient leaves after both halves."""
    orders = [[Pass(kind, i, 0) for i in range(2)] for kind in ("forward", "backward")]
    both = [[*orders[0], *orders[1]], [orders[0][0], orders[1][0], orders[0][1], orders[1][1]]]
    timing = timed(both, same(2, 1, (3, 2, 2), 1))
    assert timing.ends == [[3, 6, 16, 23], [7, 11, 14, 18]]
    assert (timing.makespan, timing.longest_stage) == (23, 23)


def test_orders_that_wait_for_each_other() -> None:
    first = [Pass("backward", 0, 0), Pass("forward", 0, 0)]
    with pytest.raises(ValueError, match=r"stage 0 at backward of micro-batch 0, chunk 0, waits for the gradient of .*"
                                         r"part 1 on stage 1; stage 1 at forward .* part 0 on stage 0"):  # fmt: skip
        timed([first, first[::-1]], same(2, 1, (1, 1, 1)))


@pytest.mark.parametrize(
    ("sizes", "backward", "limits", "message"),
    [
        ((4, 8, 2), 1, (0.2,), "memory of 0.2 times .* 4 stages hold a micro-batch's 2 passes; give at least 0.25"),
        ((4, 8, 1), 1, (math.nan,), "give at least 0.25"),
        ((4, 8, 3), 1, (1,), "1 or 2 chunks, not 4, 8 and 3"),
        ((4, 8, 1), math.inf, (1,), "backward_input has the duration inf; times must be finite"),
        ((4, 8, 1), -1, (1,), "backward_input has the duration -1"),
        ((4, 8, 1), 1, (1, 1.1), "kept is 1.1; .* give 0 to 1"),
        ((4, 8, 1), 1, (1, math.nan), "kept is nan; .* give 0 to 1"),
    ],
)
def test_what_cannot_be(sizes: tuple[int, ...], backward: float, limits: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list_schedule(*sizes, same(sizes[0], sizes[2], (1, backward, 1)), *limits)


@pytest.mark.parametrize("size", [(8, 64, 1), *(pytest.param(s, marks=SLOW) for s in [(16, 128, 5), (32, 96, 8)])])
def test_fast_enough_to_be_computed_by_every_rank(size: tuple[int, int, float]) -> None:
    (p, m, limit), start = size, time.process_time()
    list_schedule(p, m, 2, same(p, 2, (1, 1.1, 0.6), 0.05), memory=1)
    assert time.process_time() - start < limit
