"""The simulator against published rates, closed formulas and cases worked out by hand."""

from __future__ import annotations

import gc
import math
import time
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.plan.simulate import Seconds, simulate
from harness.spans.span import RECEIVE_OF_SEND, Bubble, Span, activity, measured_bubble
from harness.spec.placement import Placement
from harness.spec.schedules import SCHEDULES, Instruction, Schedule, build_schedule, with_transfers

# arXiv 2401.10241, tables 5 and 9: p, m, t_F, t_B, t_W and t_comm in ms, bubble rates of 1F1B and of ZB-H1.
PUBLISHED = [
    (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1585),
    (8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240, 0.0674),
    (8, 32, 29.802, 29.428, 19.530, 0.577, 0.1898, 0.1045),
    (16, 48, 11.347, 11.248, 8.132, 0.377, 0.2552, 0.1397),
    (16, 128, 11.325, 11.308, 8.109, 0.378, 0.1251, 0.0576),
    (32, 96, 10.419, 10.207, 7.715, 0.408, 0.2646, 0.1421),
]
V = Placement(2, 2, is_v=True)


def last_backward(stages: list[list[Span]]) -> int:
    return max(span.end_ns for stage in stages for span in stage)


def bubble(stages: list[list[Span]]) -> Bubble:
    return measured_bubble([[activity(spans)] for spans in stages])


@pytest.mark.parametrize(("p", "m", "forward", "grad", "weight", "transfer", "one_f_one_b", "zb_h1"), PUBLISHED)
def test_published_bubble_rates(
    p: int, m: int, forward: float, grad: float, weight: float, transfer: float, one_f_one_b: float, zb_h1: float
) -> None:
    whole, split = {"backward": grad + weight}, {"backward_input": grad, "backward_weight": weight}
    for name, backward, rate in (("1f1b", whole, one_f_one_b), ("zb_h1", split, zb_h1)):
        milliseconds = {"forward": forward, **backward, "send_activation": transfer, "send_gradient": transfer}
        spans = simulate(build_schedule(name, p, m), {kind: value / 1e3 for kind, value in milliseconds.items()})
        cost = last_backward(spans) / 1e6
        assert round((cost - m * (forward + grad + weight)) / cost, 4) == rate
        assert round(bubble(spans).fraction, 4) == rate


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_equal_stages_and_free_transfers_give_the_ideal_bubble(name: str) -> None:
    for p, m in product(range(1, 9), range(1, 17)):
        for forward, backward in [(1, 1), (3, 7), (8, 2)]:
            spans = simulate(build_schedule(name, p, m), {"forward": forward, "backward": backward})
            assert last_backward(spans) == (m + p - 1) * (forward + backward) * 10**9
            assert bubble(spans).fraction == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 10**9), st.integers(1, 10**9))
@settings(max_examples=60, deadline=None)
def test_ideal_bubble_for_any_times(p: int, m: int, forward_ns: int, backward_ns: int) -> None:
    seconds = {"forward": forward_ns / 1e9, "backward": backward_ns / 1e9}
    spans = simulate(build_schedule("1f1b", p, m), seconds)
    assert last_backward(spans) == (m + p - 1) * (forward_ns + backward_ns)


@pytest.mark.parametrize(("p", "groups", "v"), list(product([2, 3, 4, 8], [1, 2, 4], [2, 3, 4])))
def test_interleaved_bubble_is_smaller_by_the_number_of_chunks(p: int, groups: int, v: int) -> None:
    m = p * groups
    for forward, backward in [(1, 1), (2, 5), (5, 2)]:
        seconds = {"forward": forward * v * 1e-3, "backward": backward * v * 1e-3}
        spans = simulate(build_schedule("interleaved", p, m, v), seconds)
        assert last_backward(spans) == (m * v + p - 1) * (forward + backward) * 10**6
        assert bubble(spans).overhead == pytest.approx((p - 1) / (v * m), abs=1e-12)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6), st.integers(1, 9),
    st.integers(0, 5),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_gpipe_with_unequal_stages(times: list[tuple[int, int]], m: int, transfer: int) -> None:
    """Each half is a flow shop: every stage once, and m - 1 times the slowest."""
    forward, backward = [f for f, _ in times], [b for _, b in times]
    seconds: dict[str, Seconds] = {"forward": forward, "backward": backward}
    seconds |= {"send_activation": transfer, "send_gradient": transfer}
    spans = simulate(build_schedule("gpipe", len(times), m), seconds)
    shops = [sum(half) + (m - 1) * max(half) + (len(times) - 1) * transfer for half in (forward, backward)]
    assert last_backward(spans) == sum(shops) * 10**9


def by_kind(spans: list[Span], kind: str) -> list[tuple[int, int]]:
    return [(s.start_ns // 10**9, s.end_ns // 10**9) for s in spans if s.kind == kind]


def test_transfers_cost_the_sender_nothing_by_hand() -> None:
    """Two stages, two micro-batches, forward 3, transfer 1."""
    seconds = {"forward": 3, "backward": 4, "send_activation": 1, "send_gradient": 1}
    first, last = simulate(build_schedule("gpipe", 2, 2), seconds)
    assert by_kind(first, "forward") == [(0, 3), (3, 6)]
    assert by_kind(first, "send_activation") == [(3, 3), (6, 6)]
    assert by_kind(last, "recv_activation") == [(0, 4), (7, 7)]
    assert by_kind(last, "forward") == [(4, 7), (7, 10)]
    assert by_kind(last, "backward") == [(10, 14), (14, 18)]
    assert by_kind(first, "recv_gradient") == [(6, 15), (19, 19)]


def test_chunks_may_take_different_times_by_hand() -> None:
    """A V of 2 stages, whose last part takes longer, with one micro-batch."""
    stages = [[Instruction("forward", 0, chunk) for chunk in (0, 1)] for _ in range(2)]
    stages = [
        [*with_transfers([*passes, *(Instruction("backward", 0, c) for c in (1, 0))], V, stage)]
        for stage, passes in enumerate(stages)
    ]
    forward, backward = [[[1], [5]], [[2], [3]]], [[[1], [6]], [[1], [1]]]
    spans = simulate(Schedule("v", 1, V, stages), {"forward": forward, "backward": backward})
    assert by_kind(spans[0], "forward") == [(0, 1), (6, 11)]
    assert by_kind(spans[1], "forward") == [(1, 3), (3, 6)]
    assert by_kind(spans[0], "backward") == [(11, 17), (19, 20)]
    assert by_kind(spans[1], "backward") == [(17, 18), (18, 19)]
    shared = simulate(Schedule("v", 1, V, stages), {"forward": [2, 4], "backward": 1})
    assert by_kind(shared[1], "forward") == [(1, 3), (3, 5)]


def test_one_slow_micro_batch_and_one_slow_link() -> None:
    schedule = build_schedule("1f1b", 3, 4)
    ideal = {"forward": 1.0, "backward": 2.0}
    total = last_backward(simulate(schedule, ideal))
    slow = [[1.0] * 4, [1.0, 1.0, 1.5, 1.0], [1.0] * 4]
    spans = simulate(schedule, ideal | {"forward": slow})
    assert [s.seconds for s in spans[1] if s.kind == "forward"] == [1.0, 1.0, 1.5, 1.0]
    assert last_backward(spans) == total + 5 * 10**8
    link = simulate(schedule, ideal | {"send_activation": [0.25, 0, 0]})
    assert last_backward(link) > total
    assert by_kind(link[2], "recv_activation")[0] == (0, 2)
    unused = simulate(schedule, ideal | {"send_activation": [0, 0, 0.25], "send_gradient": [0.25, 0, 0]})
    assert last_backward(unused) == total  # the ends of the pipeline send nothing there


@pytest.mark.parametrize("name", SCHEDULES)
def test_spans_follow_the_schedule_and_causes_come_first(name: str) -> None:
    schedule = build_schedule(name, 4, 8)
    seconds: dict[str, Seconds] = {
        "forward": [1, 2, 1, 3], **{kind: [2, 4, 1, 3] for kind in schedule.computes - {"forward"}},
        "send_activation": 0.5, "send_gradient": 0.25, "load": 0.125, "reduce_gradients": 1, "optimizer": [2, 1, 1, 2],
    }  # fmt: skip
    stages = simulate(schedule, seconds, step=7)
    for spans, order in zip(stages, schedule.stages, strict=True):
        assert [(span.kind, span.micro_batch, span.chunk) for span in spans] == [i[:3] for i in order]
        assert {span.step for span in spans} == {7}
        occupying = [span for span in spans if span.kind not in RECEIVE_OF_SEND]
        assert all(a.end_ns == b.start_ns for a, b in pairwise(occupying))
    assert [spans[-2].seconds for spans in stages] == [2, 1, 1, 2]


@pytest.mark.parametrize(("p", "groups"), list(product(range(1, 7), [1, 2, 4])))
def test_zb_h1_idles_as_the_paper_says(p: int, groups: int) -> None:
    """ZB-H1 has a bubble of (p - 1)(t_F + t_B - t_W) (arXiv 2401.10241, table 2)."""
    m = p * groups
    for forward, grad, weight in [(1, 1, 1), (2, 2, 1), (4, 4, 3)]:
        seconds = {"forward": forward, "backward_input": grad, "backward_weight": weight}
        spans = simulate(build_schedule("zb_h1", p, m), seconds)
        idle = last_backward(spans) / 10**9 - m * (forward + grad + weight)
        assert idle == (p - 1) * (forward + grad - weight)
        assert bubble(spans).seconds == pytest.approx(idle)


def test_64_stages_and_1024_micro_batches_are_fast() -> None:
    """Five times what it takes to make that many spans: two seconds where a span takes a microsecond."""

    def is_fast() -> bool:
        start = time.process_time()
        stages = simulate(build_schedule("1f1b", 64, 1024), {"forward": 0.01, "backward": 0.02})
        simulated = time.process_time()
        copies = [[Span(*span) for span in spans] for spans in stages]
        copied = time.process_time()
        assert last_backward(copies) == (1024 + 63) * 30 * 10**6
        return simulated - start < 5 * (copied - simulated)

    gc.freeze()  # what other tests have imported is not to be searched for garbage
    try:
        assert any(is_fast() for _ in range(4))  # a busy machine is slow now and then
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        ({"forward": -1, "backward": 1}, "forward has a duration below 0"),
        ({"forward": [1, math.nan], "backward": 1}, "forward has a duration below 0 or not finite"),
        ({"forward": 1, "backward": [1, 1, 1]}, r"shape \(3,\); give one number, one per stage \(2\)"),
        ({"forward": 1, "backward": [[1], [1]]}, r"one per stage and micro-batch \(2, 4\), or one per stage, chunk"),
        ({"forward": 1}, "1f1b computes, backward, forward; they differ in backward"),
        ({"forward": 1, "backward": 1, "backward_weight": 1}, "they differ in backward_weight"),
        ({"forward": 1, "backward": 1, "recv_gradient": 1}, "'recv_gradient' has no duration of its own"),
        ({"forward": 1, "backward": 1, "transfer": 1}, "'transfer' has no duration of its own"),
    ],
)
def test_durations_that_mean_nothing(seconds: dict[str, Seconds], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(build_schedule("1f1b", 2, 4), seconds)


def test_a_send_nobody_receives() -> None:
    stages = [[Instruction("forward", 0), Instruction("send_activation", 0, peer=1)],
              [Instruction("forward", 0), Instruction("recv_gradient", 0, peer=0)]]  # fmt: skip
    with pytest.raises(ValueError, match="stage 1 at recv_gradient of micro-batch 0"):
        simulate(Schedule("silent", 1, Placement(2), stages), {"forward": 1})
