"""The bubble of a pipeline, against timelines whose bubble is known."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.spans.files import read_spans, span_lines
from harness.spans.span import (
    Bubble,
    Span,
    StageActivity,
    activity,
    as_dict,
    bubble_of_step,
    measured_bubble,
    median_bubble,
    replica_wait_seconds,
)
from harness.spec.schedules import ideal_bubble_fraction, ideal_bubble_overhead

SECOND = 10**9


def ideal_1f1b(p: int, m: int, forward_ns: int, backward_ns: int) -> list[list[Span]]:
    """Spans per stage of 1F1B (arXiv 2104.04473, figure 4) with equal stages and free transfers.

    Stage s runs min(p - s - 1, m) forwards ahead, then alternates; an instruction starts as soon as its
    stage is free and its input is there.
    """
    orders = []
    for stage in range(p):
        ahead = min(p - stage - 1, m)
        order = [("forward", i) for i in range(ahead)]
        for i in range(m - ahead):
            order += [("forward", ahead + i), ("backward", i)]
        orders.append(order + [("backward", i) for i in range(m - ahead, m)])
    ends: dict[tuple[str, int, int], int] = {}
    spans: list[list[Span]] = [[] for _ in range(p)]
    while any(len(done) < len(order) for done, order in zip(spans, orders, strict=True)):
        for stage, (done, order) in enumerate(zip(spans, orders, strict=True)):
            if len(done) == len(order):
                continue
            kind, i = order[len(done)]
            needs = ("forward", stage - 1, i) if kind == "forward" else ("backward", stage + 1, i)
            if 0 <= needs[1] < p and needs not in ends:
                continue
            start = max(ends.get(needs, 0), done[-1].end_ns if done else 0)
            end = ends[kind, stage, i] = start + (forward_ns if kind == "forward" else backward_ns)
            done.append(Span(0, kind, i, start, end))
    return spans


@pytest.mark.parametrize(("p", "m"), list(product(range(1, 5), range(1, 9))))
def test_ideal_1f1b(p: int, m: int) -> None:
    for forward, backward in [(SECOND, SECOND), (SECOND, 2 * SECOND), (3 * SECOND, SECOND)]:
        stages = [[activity(spans)] for spans in ideal_1f1b(p, m, forward, backward)]
        bubble = measured_bubble(stages)
        assert bubble.fraction == pytest.approx((p - 1) / (m + p - 1), abs=1e-15)
        assert bubble.overhead == pytest.approx((p - 1) / m, abs=1e-15)
        assert bubble.seconds == pytest.approx((p - 1) * (forward + backward) / SECOND, abs=1e-12)
        assert ideal_bubble_fraction("1f1b", p, m) == (p - 1) / (m + p - 1)
        assert ideal_bubble_overhead("1f1b", p, m) == (p - 1) / m


def test_speed_up_of_four_stages_and_nine_micro_batches() -> None:
    assert 4 * (1 - ideal_bubble_fraction("1f1b", 4, 9)) == pytest.approx(3.0)


def seconds(kind: str, start: float, end: float) -> Span:
    return Span(0, kind, 0, round(start * SECOND), round(end * SECOND))


def test_activity_sums_forwards_and_backwards_only() -> None:
    spans = [
        seconds("load", 0, 1),
        seconds("forward", 1, 2),
        seconds("send_activation", 2, 4),
        seconds("forward", 4, 5.5),
        seconds("recv_gradient", 5.5, 7),
        seconds("backward", 7, 9),
        seconds("optimizer", 9, 20),
    ]
    assert activity(spans) == StageActivity(1 * SECOND, 9 * SECOND, 2.5, 2.0)
    assert activity(reversed(spans)) == activity(spans)
    assert activity(spans).busy_seconds == 4.5
    with pytest.raises(ValueError, match="empty"):
        activity(spans[:5])


def test_bubble_by_hand() -> None:
    first = activity([seconds("forward", 0, 2), seconds("backward", 7, 10)])
    second = activity([seconds("forward", 3, 4), seconds("backward", 4, 6)])
    # T = 10 s, busy 5 s and 3 s.
    assert measured_bubble([[first], [second]]) == Bubble(fraction=pytest.approx(0.6), overhead=1.5, seconds=6.0)


def test_busy_time_of_a_stage_is_the_mean_of_its_tensor_parallel_ranks() -> None:
    def rank(busy: float) -> StageActivity:
        return StageActivity(0, 10 * SECOND, busy / 2, busy / 2)

    bubble = measured_bubble([[rank(2), rank(6)], [rank(4), rank(8)]])
    assert bubble.fraction == pytest.approx(1 - (4 + 6) / 2 / 10)
    # The earliest and the latest rank bound T, wherever they are.
    late = StageActivity(-5 * SECOND, 15 * SECOND, 4, 4)
    assert measured_bubble([[rank(2), late], [rank(4), rank(8)]]).seconds == pytest.approx(20 - 5.5)


def test_replicas_have_a_mean_bubble_and_a_run_the_median_of_its_steps() -> None:
    def replica(busy: float) -> list[list[StageActivity]]:
        return [[StageActivity(0, 10 * SECOND, busy, 0.0)]]

    assert bubble_of_step([replica(5), replica(2)]) == Bubble(pytest.approx(0.65), pytest.approx(2.5), 6.5)
    steps = [Bubble(0.1, 3.0, 2.0), Bubble(0.3, 1.0, 1.0), Bubble(0.2, 2.0, 4.0)]
    assert median_bubble(steps) == Bubble(0.2, 2.0, 2.0)


def test_replicas_wait_for_the_last_backward_of_all() -> None:
    def stage(*ends: int) -> list[StageActivity]:
        return [StageActivity(0, end * SECOND, 1.0, 2.0) for end in ends]

    # The first stage ends last, and of that the slowest tensor-parallel rank.
    replicas = [[stage(9, 10), stage(7, 7)], [stage(16, 13), stage(12, 12)], [stage(12, 12), stage(11, 9)]]
    assert replica_wait_seconds(replicas) == pytest.approx((6 + 0 + 4) / 3)
    assert replica_wait_seconds(replicas[:1]) is None


def test_one_busy_stage_has_no_bubble() -> None:
    bubble = measured_bubble([[activity([seconds("forward", 3, 4), seconds("backward", 4, 6)])]])
    assert bubble == Bubble(0.0, 0.0, 0.0)
    assert as_dict(bubble) == {"fraction": 0.0, "overhead": 0.0, "seconds": 0.0}


@given(
    st.integers(1, 4), st.integers(1, 8), st.integers(1, 10**9), st.integers(1, 10**9), st.integers(-(10**15), 10**15)
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_only_differences_of_times_matter(p: int, m: int, forward: int, backward: int, epoch: int) -> None:
    shifted = [
        [activity(s._replace(start_ns=s.start_ns + epoch, end_ns=s.end_ns + epoch) for s in spans)]
        for spans in ideal_1f1b(p, m, forward, backward)
    ]
    assert measured_bubble(shifted).fraction == pytest.approx(ideal_bubble_fraction("1f1b", p, m), abs=1e-9)


@st.composite
def busy_ranks(draw: st.DrawFn) -> list[list[StageActivity]]:
    """Stages of ranks that are never busy longer than they live."""

    def rank() -> StageActivity:
        start, length = draw(st.integers(0, 10**12)), draw(st.integers(1000, 10**12))
        busy = length / SECOND * draw(st.floats(0.01, 1))
        share = draw(st.floats(0, 1))
        return StageActivity(start, start + length, busy * share, busy * (1 - share))

    tp = draw(st.integers(1, 3))
    return [[rank() for _ in range(tp)] for _ in range(draw(st.integers(1, 4)))]


@given(busy_ranks())
@settings(max_examples=100, deadline=None)
def test_fraction_and_overhead_tell_the_same(stages: list[list[StageActivity]]) -> None:
    bubble = measured_bubble(stages)
    assert -1e-9 <= bubble.fraction < 1
    # This way round it is well conditioned: a fraction next to 1 has no digits left for its distance from 1.
    assert bubble.fraction == pytest.approx(bubble.overhead / (1 + bubble.overhead), abs=1e-12)
    assert measured_bubble(stages[::-1]).fraction == pytest.approx(bubble.fraction)


# --- files


SPANS = [Span(2, "forward", 0, 5, 17), Span(2, "optimizer", -1, 17, 10**18)]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_span_files_round_trip(tmp_path: Path) -> None:
    memory = '{"memory":[[5,100],[7,200]]}\n'
    file = write(tmp_path / "rank00000.jsonl", '{"rank":0}\n' + "".join(span_lines(SPANS)) + memory)
    assert read_spans(file) == ({"rank": 0}, SPANS, [(5, 100), (7, 200)])
    assert file.read_text().splitlines()[1] == '[2,"forward",0,5,17,0]'
    assert SPANS[0].seconds == 12e-9


def test_a_file_cut_off_anywhere_keeps_its_whole_lines(tmp_path: Path) -> None:
    content = '{"rank":0}\n' + "".join(span_lines(SPANS))
    for length in range(len('{"rank":0}\n'), len(content) + 1):
        spans = read_spans(write(tmp_path / "cut.jsonl", content[:length])).spans
        assert spans == SPANS[: len(spans)]
        assert len(spans) >= content[:length].count("\n") - 1


@pytest.mark.parametrize("rest", [b"\0" * 50, b"\xff\xfe\x00 garbage\n", b"{}\n", b"[1,2]\n", b"7\n"])
def test_what_follows_a_damaged_line_is_left_out(tmp_path: Path, rest: bytes) -> None:
    file = tmp_path / "damaged.jsonl"
    file.write_bytes(
        b'{"rank":0}\n' + "".join(span_lines(SPANS)).encode() + rest + next(iter(span_lines(SPANS))).encode()
    )
    assert read_spans(file).spans == SPANS


@pytest.mark.parametrize("content", ["", "{", '[2,"forward",0,5,17]\n', "\n", "\xff\n"])
def test_a_file_without_header_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(ValueError, match="is no span file"):
        read_spans(write(tmp_path / "x.jsonl", content))


@given(
    st.lists(
        st.tuples(st.integers(), st.sampled_from(["forward", "load"]), st.integers(), st.integers(), st.integers())
    )
)
@settings(max_examples=50, deadline=None)
def test_lines_hold_every_span(rows: list[tuple[int, str, int, int, int]]) -> None:
    spans = [Span(*row) for row in rows]
    assert [Span(*json.loads(line)) for line in span_lines(spans)] == spans
