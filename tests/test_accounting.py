"""Every nanosecond of a step has a part, and the bubble has causes: by hand and on simulated steps."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from itertools import product
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.analyse.explain import durations, explain
from harness.plan.simulate import Seconds, simulate
from harness.spans.accounting import PARTS, Accounting, account
from harness.spans.span import KINDS, Span, activity, measured_bubble, transfers
from harness.spec.schedules import Schedule, build_schedule, ideal_bubble_fraction

SECOND = 10**9
UNEQUAL: dict[str, Seconds] = {
    "forward": [1, 2, 1, 3], "backward": [2, 4, 1, 3], "send_activation": 0.5, "send_gradient": [0, 0.25, 1, 0],
    "load": 0.125, "reduce_gradients": 1, "optimizer": [2, 1, 1, 2],
}  # fmt: skip


def span(kind: str, micro_batch: int, start: float, end: float) -> Span:
    return Span(3, kind, micro_batch, round(start * SECOND), round(end * SECOND))


def order_of(spans: list[Span], peer: int = -1) -> list[tuple[str, int, int, int]]:
    nested = ("recompute", "tp_all_reduce")
    talks = ("send_", "recv_")
    return [(s.kind, s.micro_batch, 0, peer if s.kind.startswith(talks) else -1) for s in spans if s.kind not in nested]


def account_one(spans: list[Span], step_seconds: float) -> Accounting:
    return account([spans], [order_of(spans)], [step_seconds])[0]


def parts(accounting: Accounting) -> dict[str, float]:
    return {part: seconds for part, seconds in accounting.seconds.items() if seconds}


def test_nested_spans_count_for_themselves_by_hand() -> None:
    spans = [
        span("load", 0, 0, 1),
        span("forward", 0, 1, 11), span("tp_all_reduce", 0, 3, 5), span("tp_all_reduce", 0, 7, 8),
        span("backward", 0, 11.5, 31.5), span("recompute", 0, 12, 20), span("tp_all_reduce", 0, 13, 14),
        span("tp_all_reduce", 0, 20, 22),
        span("optimizer", -1, 32, 36),
    ]  # fmt: skip
    accounting = account_one(spans, 36.2)
    assert parts(accounting) == {
        "data": 1, "forward": 7, "tp_communication": 2 + 1 + 1 + 2, "backward": 20 - 8 - 2, "recomputation": 7,
        "optimizer": 4, "host_gap": 0.5 + 0.5,
    }  # fmt: skip
    assert accounting.residual_seconds == pytest.approx(0.2)
    assert accounting.closes(0.01)
    assert not accounting.closes(0.005)
    assert set(accounting.seconds) == set(PARTS)


def test_waiting_and_transfer_of_a_receive_by_hand() -> None:
    first = [span("forward", 0, 0, 4), span("send_activation", 0, 5, 7), span("recv_gradient", 0, 7, 21),
             span("backward", 0, 21, 25)]  # fmt: skip
    last = [span("recv_activation", 0, 0, 7), span("forward", 0, 7, 11), span("backward", 0, 11, 19),
            span("send_gradient", 0, 19.5, 20.5)]  # fmt: skip
    orders = [order_of(first, peer=1), order_of(last, peer=0)]
    accounts = account([first, last], orders, [25, 20.5])
    assert parts(accounts[0]) == {
        "forward": 4, "pp_transfer": 2 + 1.5, "pp_wait": 12.5, "backward": 4, "host_gap": 1
    }  # fmt: skip
    assert parts(accounts[1]) == {
        "pp_wait": 5, "pp_transfer": 2 + 1, "forward": 4, "backward": 8, "host_gap": 0.5
    }  # fmt: skip
    assert [t.seconds for t in transfers([first, last], orders)] == [2, 1.5]


def test_a_send_waits_unless_it_was_buffered() -> None:
    sends = [span("send_activation", 0, 0, 5), span("send_activation", 1, 5, 6)]
    receives = [span("recv_activation", 0, 3, 5), span("recv_activation", 1, 8, 9)]
    first, last = account([sends, receives], [order_of(sends, peer=1), order_of(receives, peer=0)], [6, 9])
    assert (first.seconds["pp_wait"], first.seconds["pp_transfer"]) == (3, 2 + 1)
    assert (last.seconds["pp_wait"], last.seconds["pp_transfer"], last.seconds["host_gap"]) == (0, 2 + 1, 3)


def test_a_tied_reduction_waits_for_its_last_stage() -> None:
    stages = [[span("reduce_tied_gradients", -1, 8, 10)], [span("reduce_tied_gradients", -1, 5, 5.5)],
              [span("reduce_tied_gradients", -1, 2, 10)]]  # fmt: skip
    accounts = account(stages, [order_of(spans) for spans in stages], [2, 0.5, 8])
    assert [(a.seconds["pp_wait"], a.seconds["dp_reduction"]) for a in accounts] == [(0, 2), (0, 0.5), (6, 2)]
    optimizers = [[s._replace(kind="optimizer") for s in spans] for spans in stages]
    apart, together = (account(optimizers, [order_of(s) for s in optimizers], [2, 0.5, 8], waiting_kinds=kinds)[2]
                       for kinds in ((), ("optimizer",)))  # fmt: skip
    assert parts(apart) == {"optimizer": 8}
    assert parts(together) == {"optimizer": 2, "pp_wait": 6}


def step_seconds(stages: list[list[Span]]) -> list[float]:
    return [spans[-1].end_ns / SECOND for spans in stages]


# What a stage waits for transfers: of one micro-batch all that it receives; of more, what does not arrive while it
# computes. The last stage is the slowest, and only its first activation is not there before it is wanted.
EXPOSED = {1: [0.25, 0.5 + 1, 0.5, 0.5], 3: [3 * 0.25, 3.5, 2 * 0.5, 0.5], 8: [8 * 0.25, 4.125, 3.5, 0.5]}


@pytest.mark.parametrize("m", EXPOSED)
def test_simulated_steps_close(m: int) -> None:
    schedule = build_schedule("1f1b", 4, m)
    stages = simulate(schedule, UNEQUAL)
    for stage, accounting in enumerate(account(stages, schedule.stages, step_seconds(stages))):
        assert accounting.residual_seconds == pytest.approx(0, abs=1e-9)
        assert accounting.closes(1e-9)
        assert accounting.seconds["forward"] == m * [1, 2, 1, 3][stage]
        assert accounting.seconds["backward"] == m * [2, 4, 1, 3][stage]
        assert accounting.seconds["optimizer"] == [2, 1, 1, 2][stage]
        assert accounting.seconds["host_gap"] == 0
        assert accounting.seconds["pp_transfer"] == pytest.approx(EXPOSED[m][stage])


def test_transfers_of_interleaved_chunks_go_around() -> None:
    schedule = build_schedule("interleaved", 3, 6, 2)
    stages = simulate(schedule, {"forward": 2, "backward": 4, "send_activation": 0.25})
    pairs = list(transfers(stages, schedule.stages))
    assert len(pairs) == sum(i.kind.startswith("send") for stage in schedule.stages for i in stage)
    assert all(t.send.start_ns <= t.receive.end_ns for t in pairs)
    assert {(t.sender, t.receiver) for t in pairs if t.send.kind == "send_activation"} == {(0, 1), (1, 2), (2, 0)}
    assert all(a.closes(1e-9) for a in account(stages, schedule.stages, step_seconds(stages)))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("backward_")])
def test_dropping_a_kind_of_span_is_noticed(kind: str) -> None:
    schedule = build_schedule("1f1b", 4, 8)
    whole = simulate(schedule, UNEQUAL)
    lossy = [[s for s in spans if s.kind != kind] for spans in whole]
    for stage, accounting in enumerate(account(lossy, schedule.stages, step_seconds(whole))):
        dropped = [s for s in whole[stage] if s.kind == kind]
        assert accounting.num_missing == len(dropped)
        # No gap takes the place of what is gone.
        assert accounting.residual_seconds == pytest.approx(sum(s.seconds for s in dropped), abs=1e-9)
        assert accounting.closes() == (not dropped)


def test_a_span_outside_the_schedule() -> None:
    with pytest.raises(ValueError, match="forward of micro-batch 2 is not, or not so often, in the schedule"):
        account([[span("forward", 2, 0, 1)]], [[("forward", 1, 0, -1)]], [1])
    with pytest.raises(ValueError, match="load of micro-batch 0 is not"):
        account([[span("load", 0, 0, 1), span("load", 0, 1, 2)]], [[("load", 0, 0, -1)]], [2])


CAUSES = ["ideal", "imbalance", "transfer", "load", "jitter", "host"]


def explained(seconds: dict[str, Seconds], p: int = 4, m: int = 8, name: str = "1f1b", v: int = 1) -> dict[str, float]:
    """Causes of a simulated step, checked for what holds in all."""
    schedule = build_schedule(name, p, m, v)
    stages = simulate(schedule, seconds)
    explanation = explain(stages, schedule)
    measured = measured_bubble([[activity(spans)] for spans in stages])
    assert explanation.measured == measured
    assert explanation.ideal.fraction == pytest.approx(ideal_bubble_fraction(name, p, m, v))
    assert sum(explanation.causes_seconds.values()) == pytest.approx(measured.seconds)
    assert sum(explanation.causes_percent.values()) == pytest.approx(100 * measured.fraction)
    assert list(explanation.causes_seconds) == CAUSES
    return {cause: round(seconds, 6) for cause, seconds in explanation.causes_seconds.items()}


NONE = dict.fromkeys(CAUSES[1:], 0.0)


def test_equal_stages_have_fill_and_drain_only() -> None:
    assert explained({"forward": 1, "backward": 2}) == NONE | {"ideal": 3 * 3}
    assert explained({"forward": 1, "backward": 2}, p=1) == NONE | {"ideal": 0}


@pytest.mark.parametrize(("slow", "p", "m"), [(0, 2, 4), (1, 4, 8), (3, 4, 8), (2, 8, 16)])
def test_a_slow_stage_is_imbalance(slow: int, p: int, m: int) -> None:
    """Forwards slower by d make the step (m - ahead) d longer: those ahead of the first backward are hidden."""
    p_1, ahead = p - 1, p - 1 - slow
    forward = [1.0 + 0.5 * (stage == slow) for stage in range(p)]
    causes = explained({"forward": forward, "backward": 2.0}, p, m)
    ideal = p_1 * (3 + 0.5 / p)
    bubble = p_1 * 3 + 0.5 * (m - ahead - m / p)
    assert causes == NONE | {"ideal": ideal, "imbalance": bubble - ideal}


def test_a_slow_link_is_transfer() -> None:
    seconds: dict[str, Seconds] = {"forward": 1, "backward": 2, "send_activation": [0, 0.25, 0, 0]}
    free = simulate(build_schedule("1f1b", 4, 8), {"forward": 1, "backward": 2})
    slow = simulate(build_schedule("1f1b", 4, 8), seconds)
    longer = max(step_seconds(slow)) - max(step_seconds(free))
    assert longer == 4 * 0.25  # on the longest path; the others arrive while their receiver computes
    assert explained(seconds) == NONE | {"ideal": 9, "transfer": longer}


FACTORS = [1.0, 0.5, 2.0, 0.25, 1.0, 1.25]
"""What is to do in each micro-batch."""


@pytest.mark.parametrize("p", [1, 2, 4])
def test_micro_batches_of_different_length_are_load(p: int) -> None:
    """Jobs that take each of p machines f_k, one after the other, are done after sum(f) + (p-1) max(f)."""
    forward, backward = ([seconds * factor for factor in FACTORS] for seconds in (1, 2))
    causes = explained({"forward": [forward] * p, "backward": [backward] * p}, p, len(FACTORS), "gpipe")
    ideal = (p - 1) * 3 * fmean(FACTORS)
    assert causes == NONE | {"ideal": ideal, "load": (p - 1) * 3 * max(FACTORS) - ideal}


@pytest.mark.parametrize(("name", "v"), [("1f1b", 1), ("interleaved", 2)])
def test_load_of_unequal_stages_and_chunks_is_no_jitter(name: str, v: int) -> None:
    def seconds(kind: int) -> Seconds:
        return [[[kind * (stage + 2 * chunk + 1) * f for f in FACTORS] for chunk in range(v)] for stage in range(2)]

    causes = explained({"forward": seconds(1), "backward": seconds(2), "send_activation": 0.125}, 2, 6, name, v)
    assert min(abs(causes[cause]) for cause in ("imbalance", "transfer", "load")) > 0.1
    assert (causes["jitter"], causes["host"]) == (0, 0)


def test_single_passes_are_jitter_but_for_their_share_of_a_micro_batch() -> None:
    """Each stage is slower by d in one micro-batch: all of them are on the way of m + p - 1 passes to the end."""
    p, m, d = 4, 8, 0.5
    forward = [[1 + d * (stage == k) for k in range(m)] for stage in range(p)]
    causes = explained({"forward": forward, "backward": 2}, p, m, "gpipe")
    mean = 1 + d / m
    load = (p - 1) * (1 + d / p - mean)
    bubble = (p - 1) * 2 + (m + p - 1 + p * d) - m * mean
    ideal = (p - 1) * (mean + 2)
    assert causes == NONE | {"ideal": ideal, "load": load, "jitter": bubble - ideal - load}
    assert causes["jitter"] > causes["load"]


@settings(deadline=None, max_examples=30)
@given(
    schedule=st.sampled_from(
        [build_schedule("1f1b", 3, 5), build_schedule("interleaved", 2, 4, 2), build_schedule("zb_h1", 3, 4)]
    ),
    seed=st.integers(0, 2**32),
)
def test_load_by_its_definition(schedule: Schedule, seed: int) -> None:
    p, v, m = len(schedule.stages), schedule.num_chunks, schedule.num_micro_batches
    stages, chunks, micro_batches = range(p), range(v), range(m)
    random_ = random.Random(seed)
    single = {
        kind: [[[random_.uniform(0.5, 2) for _ in micro_batches] for _ in chunks] for _ in stages]
        for kind in schedule.computes
    }
    loaded = defaultdict[str, list[list[list[float]]]](list)
    for kind, table in single.items():
        ratios = [[table[s][c][k] / fmean(table[s][c]) for s, c in product(stages, chunks)] for k in micro_batches]
        loaded[kind] = [
            [[fmean(table[s][c]) * fmean(ratios[k]) for k in micro_batches] for c in chunks] for s in stages
        ]
    explanation = explain(simulate(schedule, single), schedule)
    bubble = measured_bubble([[activity(spans)] for spans in simulate(schedule, loaded)])
    rounded = 1e-9 * 3 * m * p * v
    up_to_load = [explanation.causes_seconds[cause] for cause in CAUSES[: CAUSES.index("load") + 1]]
    assert sum(up_to_load) == pytest.approx(bubble.seconds, abs=rounded)
    assert sum(explanation.causes_seconds.values()) == pytest.approx(explanation.measured.seconds)


def test_where_all_have_the_same_to_do_there_is_no_load() -> None:
    schedule = build_schedule("gpipe", 2, 4)
    spans = simulate(schedule, {"forward": [[1, 2, 1, 1], [1, 2, 1, 1]], "backward": 2})
    told, untold = explain(spans, schedule), explain(spans, schedule, has_load=False)
    assert told.causes_seconds["load"] > 0
    assert list(untold.causes_seconds) == [cause for cause in CAUSES if cause != "load"]
    both = told.causes_seconds["load"] + told.causes_seconds["jitter"]
    assert untold.causes_seconds["jitter"] == pytest.approx(both)


def test_means_are_of_the_passes_there_are() -> None:
    """Equal passes of which some are split and some whole have no cause but the schedule."""
    whole = build_schedule("gpipe", 2, 4)
    halves = {("backward", 0): ("backward_input", "backward_weight")}
    stages = [
        [i._replace(kind=kind) for i in stage for kind in halves.get((i.kind, i.micro_batch), (i.kind,))]
        for stage in whole.stages
    ]
    schedule = replace(whole, stages=stages)
    spans = simulate(schedule, {"forward": 1, "backward": 2, "backward_input": 1, "backward_weight": 1})
    explanation = explain(spans, schedule)
    assert explanation.causes_seconds == pytest.approx(NONE | {"ideal": 3})


def test_slow_passes_are_jitter_and_loading_is_host() -> None:
    uneven = [[1.0 + 0.5 * (stage == k % 4) for k in range(8)] for stage in range(4)]
    schedule = build_schedule("1f1b", 4, 8)
    simulated = explain(simulate(schedule, {"forward": uneven, "backward": 2}), schedule).simulated
    assert simulated.fraction == pytest.approx(3 / 11)  # of the stages' means, which are equal
    causes = explained({"forward": uneven, "backward": 2})
    assert causes["jitter"] > 0
    assert causes | {"jitter": 0} == NONE | {"ideal": 3 * 3.125}
    causes = explained({"forward": 1, "backward": 2, "load": 0.125})
    assert causes["host"] > 0
    assert causes | {"host": 0} == NONE | {"ideal": 9}


def test_measured_durations_come_back() -> None:
    schedule: Schedule = build_schedule("1f1b", 4, 8)
    tables = durations(simulate(schedule, UNEQUAL), schedule)
    assert tables["forward"].tolist() == [[[seconds] * 8] for seconds in (1, 2, 1, 3)]
    assert tables["send_activation"].tolist()[:3] == [[[0.5] * 8]] * 3  # also of those for which nobody waited
    assert tables["send_gradient"].tolist()[1:3] == [[[seconds] * 8] for seconds in (0.25, 1)]


def test_explaining_needs_every_computation() -> None:
    schedule = build_schedule("1f1b", 2, 3)
    stages = simulate(schedule, {"forward": 1, "backward": 1})
    with pytest.raises(ValueError, match="stage 1 has 5 forward and backward spans, 1f1b has 6"):
        explain([stages[0], [s for s in stages[1] if s[1:3] != ("backward", 2)]], schedule)
