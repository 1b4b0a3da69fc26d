"""The simulator against published rates, closed formulas and cases worked out by hand."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.plan.simulate import Seconds, simulate
from harness.spans.span import RECEIVE_OF_SEND, Bubble, Span, activity, measured_bubble
from harness.spec import schedules
from harness.spec.schedules import Instruction, Schedule, ScheduleKind, Stage, build_schedule, fill_and_drain

# arXiv 2401.10241, tables 5 and 9: p, m, t_F, t_B, t_W and t_comm in ms, bubble rate of 1F1B.
PUBLISHED = [
    (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431),
    (8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240),
    (8, 32, 29.802, 29.428, 19.530, 0.577, 0.1898),
    (16, 48, 11.347, 11.248, 8.132, 0.377, 0.2552),
    (16, 128, 11.325, 11.308, 8.109, 0.378, 0.1251),
    (32, 96, 10.419, 10.207, 7.715, 0.408, 0.2646),
]


def last_backward(stages: list[list[Span]]) -> int:
    return max(span.end_ns for stage in stages for span in stage)


def bubble(stages: list[list[Span]]) -> Bubble:
    return measured_bubble([[activity(spans)] for spans in stages])


@pytest.mark.parametrize(("p", "m", "forward", "grad", "weight", "transfer", "rate"), PUBLISHED)
def test_published_bubble_rates(
    p: int, m: int, forward: float, grad: float, weight: float, transfer: float, rate: float
) -> None:
    milliseconds = {"forward": forward, "backward": grad + weight, "send_activation": transfer}
    seconds = {kind: value / 1e3 for kind, value in (milliseconds | {"send_gradient": transfer}).items()}
    spans = simulate(build_schedule("1f1b", p, m), seconds, blocking=False)
    cost = last_backward(spans) / 1e6
    assert round((cost - m * (forward + grad + weight)) / cost, 4) == rate
    assert round(bubble(spans).fraction, 4) == rate


@pytest.mark.parametrize(("name", "blocking"), list(product(["1f1b", "gpipe"], [True, False])))
def test_equal_stages_and_free_transfers_give_the_ideal_bubble(name: str, blocking: bool) -> None:
    for p, m in product(range(1, 9), range(1, 17)):
        for forward, backward in [(1, 1), (3, 7), (8, 2)]:
            spans = simulate(build_schedule(name, p, m), {"forward": forward, "backward": backward}, blocking=blocking)
            assert last_backward(spans) == (m + p - 1) * (forward + backward) * 10**9
            assert bubble(spans).fraction == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 10**9), st.integers(1, 10**9), st.booleans())
@settings(max_examples=60, deadline=None)
def test_ideal_bubble_for_any_times(p: int, m: int, forward_ns: int, backward_ns: int, blocking: bool) -> None:
    seconds = {"forward": forward_ns / 1e9, "backward": backward_ns / 1e9}
    spans = simulate(build_schedule("1f1b", p, m), seconds, blocking=blocking)
    assert last_backward(spans) == (m + p - 1) * (forward_ns + backward_ns)


@pytest.mark.parametrize(("p", "groups", "v"), list(product([2, 3, 4, 8], [1, 2, 4], [2, 3, 4])))
def test_interleaved_bubble_is_smaller_by_the_number_of_chunks(p: int, groups: int, v: int) -> None:
    m = p * groups
    for forward, backward in [(1, 1), (2, 5), (5, 2)]:
        seconds = {"forward": forward * v * 1e-3, "backward": backward * v * 1e-3}
        spans = simulate(build_schedule("interleaved", p, m, v), seconds, blocking=False)
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
    spans = simulate(build_schedule("gpipe", len(times), m), seconds, blocking=False)
    shops = [sum(half) + (m - 1) * max(half) + (len(times) - 1) * transfer for half in (forward, backward)]
    assert last_backward(spans) == sum(shops) * 10**9


def by_kind(spans: list[Span], kind: str) -> list[tuple[int, int]]:
    return [(s.start_ns // 10**9, s.end_ns // 10**9) for s in spans if s.kind == kind]


def test_a_blocking_send_occupies_the_sender_by_hand() -> None:
    """Two stages, two micro-batches, forward 3, transfer 1."""
    seconds = {"forward": 3, "backward": 4, "send_activation": 1, "send_gradient": 1}
    first, last = simulate(build_schedule("gpipe", 2, 2), seconds)
    assert by_kind(first, "forward") == [(0, 3), (4, 7)]
    assert by_kind(first, "send_activation") == [(3, 4), (7, 8)]
    assert by_kind(last, "recv_activation") == [(0, 4), (7, 8)]
    assert by_kind(last, "forward") == [(4, 7), (8, 11)]
    assert by_kind(last, "backward") == [(11, 15), (16, 20)]
    assert by_kind(first, "recv_gradient") == [(8, 16), (20, 21)]
    first, last = simulate(build_schedule("gpipe", 2, 2), seconds, blocking=False)
    assert by_kind(first, "forward") == [(0, 3), (3, 6)]
    assert by_kind(first, "send_activation") == [(3, 3), (6, 6)]
    assert by_kind(last, "recv_activation") == [(0, 4), (7, 7)]
    assert by_kind(last, "forward") == [(4, 7), (7, 10)]


def test_a_blocking_send_waits_for_the_receiver() -> None:
    first, _ = simulate(build_schedule("gpipe", 2, 3), {"forward": [1, 5], "backward": 1})
    assert by_kind(first, "send_activation") == [(1, 1), (2, 6), (7, 11)]


def test_one_slow_micro_batch_and_one_slow_link() -> None:
    schedule = build_schedule("1f1b", 3, 4)
    ideal = {"forward": 1.0, "backward": 2.0}
    total = last_backward(simulate(schedule, ideal))
    slow = [[1.0] * 4, [1.0, 1.0, 1.5, 1.0], [1.0] * 4]
    spans = simulate(schedule, ideal | {"forward": slow})
    assert [s.seconds for s in spans[1] if s.kind == "forward"] == [1.0, 1.0, 1.5, 1.0]
    assert last_backward(spans) == total + 5 * 10**8
    link = simulate(schedule, ideal | {"send_activation": [0.25, 0, 0]}, blocking=False)
    assert last_backward(link) > total
    assert by_kind(link[2], "recv_activation")[0] == (0, 2)
    unused = simulate(schedule, ideal | {"send_activation": [0, 0, 0.25], "send_gradient": [0.25, 0, 0]})
    assert last_backward(unused) == total  # the ends of the pipeline send nothing there


@pytest.mark.parametrize(
    ("name", "v", "blocking"), [("1f1b", 1, True), ("1f1b", 1, False), ("gpipe", 1, True), ("interleaved", 2, False)]
)
def test_spans_follow_the_schedule_and_causes_come_first(name: str, v: int, blocking: bool) -> None:
    p, m = 4, 8
    schedule = build_schedule(name, p, m, v)
    seconds: dict[str, Seconds] = {
        "forward": [1, 2, 1, 3], "backward": [2, 4, 1, 3], "send_activation": 0.5, "send_gradient": 0.25,
        "load": 0.125, "reduce_gradients": 1, "optimizer": [2, 1, 1, 2],
    }  # fmt: skip
    stages = simulate(schedule, seconds, blocking=blocking, step=7)
    for spans, order in zip(stages, schedule.stages, strict=True):
        assert [(span.kind, span.micro_batch, span.chunk) for span in spans] == [i[:3] for i in order]
        assert {span.step for span in spans} == {7}
        occupying = [span for span in spans if blocking or span.kind not in RECEIVE_OF_SEND]
        assert all(a.end_ns == b.start_ns for a, b in pairwise(occupying))
    assert [spans[-2].seconds for spans in stages] == [2, 1, 1, 2]


def zb_h1(stage: Stage) -> Iterator[Instruction]:
    """ZB-H1 (arXiv 2401.10241, figure 2): 1F1B whose weight gradients come a few micro-batches later."""
    ahead = stage.num_stages - 1 - stage.index
    for number in range(stage.num_micro_batches + ahead + stage.index):
        grad, weight = number - ahead, number - ahead - stage.index
        if number < stage.num_micro_batches:
            yield from stage.forward(number)
        if 0 <= grad < stage.num_micro_batches:
            yield from stage.receive_gradient(grad)
            yield Instruction("backward_input", grad)
            yield from stage.send_gradient(grad)
        if 0 <= weight < stage.num_micro_batches:
            yield Instruction("backward_weight", weight)


@pytest.mark.parametrize(("p", "groups"), list(product(range(1, 7), [1, 2, 4])))
def test_a_further_schedule_is_one_generator(p: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZB-H1 has a bubble of (p - 1)(t_F + t_B - t_W) (arXiv 2401.10241, table 2)."""
    monkeypatch.setitem(schedules.SCHEDULES, "zb-h1", ScheduleKind(zb_h1, fill_and_drain))
    m = p * groups
    for forward, grad, weight in [(1, 1, 1), (2, 2, 1), (4, 4, 3)]:
        seconds = {"forward": forward, "backward_input": grad, "backward_weight": weight}
        spans = simulate(build_schedule("zb-h1", p, m), seconds, blocking=False)
        idle = last_backward(spans) / 10**9 - m * (forward + grad + weight)
        assert idle == (p - 1) * (forward + grad - weight)
        assert bubble(spans).seconds == pytest.approx(idle)


@pytest.mark.parametrize("blocking", [True, False])
def test_64_stages_and_1024_micro_batches_are_fast(blocking: bool) -> None:
    """Five times what it takes to make that many spans: two seconds where a span takes a microsecond."""

    def is_fast() -> bool:
        start = time.process_time()
        stages = simulate(build_schedule("1f1b", 64, 1024), {"forward": 0.01, "backward": 0.02}, blocking=blocking)
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
        ({"forward": 1, "backward": [[1], [1]]}, r"one per stage and micro-batch \(2, 4\)"),
        ({"forward": 1}, "1f1b computes, backward, forward; they differ in backward"),
        ({"forward": 1, "backward": 1, "backward_weight": 1}, "they differ in backward_weight"),
        ({"forward": 1, "backward": 1, "recv_gradient": 1}, "'recv_gradient' has no duration of its own"),
        ({"forward": 1, "backward": 1, "transfer": 1}, "'transfer' has no duration of its own"),
    ],
)
def test_durations_that_mean_nothing(seconds: dict[str, Seconds], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(build_schedule("1f1b", 2, 4), seconds)


def test_blocking_sends_in_a_ring_wait_for_ever() -> None:
    with pytest.raises(ValueError, match="wait for each other for ever: stage 0 at send_activation of micro-batch"):
        simulate(build_schedule("interleaved", 4, 8, 2), {"forward": 1, "backward": 1})


def test_a_send_nobody_receives() -> None:
    stages = [[Instruction("forward", 0), Instruction("send_activation", 0, peer=1)],
              [Instruction("forward", 0), Instruction("recv_gradient", 0, peer=0)]]  # fmt: skip
    for blocking in (True, False):
        with pytest.raises(ValueError, match="stage 1 at recv_gradient of micro-batch 0"):
            simulate(Schedule("silent", 1, 1, stages), {"forward": 1}, blocking=blocking)
