"""Schedules: the orders of torch and DeepSpeed to the letter, and what every schedule must keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from itertools import count, pairwise, product
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.pipe import schedule as deepspeed_schedule
from torch.distributed.pipelining import schedules as torch_schedules

from harness.plan.simulate import simulate
from harness.spans.span import KINDS, RECEIVE_OF_SEND, activity, measured_bubble
from harness.spec.engines import ENGINES
from harness.spec.placement import Placement
from harness.spec.schedules import (
    SCHEDULES,
    Instruction,
    Schedule,
    ScheduleKind,
    Stage,
    backward,
    backward_input,
    backward_weight,
    build_schedule,
    evaluation,
    executed_overhead,
    fill_and_drain,
    forward,
    ideal_bubble_overhead,
    most_held,
    with_transfers,
)

SIZES = [
    *[(name, p, m, 1) for name, p, m in product(["gpipe", "1f1b", "zb_h1"], [1, 2, 3, 5], [1, 2, 4, 9])],
    *[("interleaved", p, m * p, v) for p, m, v in product([2, 3, 4], [1, 2, 3], [2, 3])],
    *[("zb_auto", p, m, 1) for p, m in product([1, 2, 3, 5], [1, 2, 4, 9])],
    *[("zb_v", p, m, 2) for p, m in product([2, 3, 5], [1, 2, 4, 9])],
    *[("dualpipev", p, m, 2) for p in (2, 3, 5) for m in (2 * p, 2 * p + 1, 4 * p)],
]
DEEPSPEED_KINDS = {"ForwardPass": "forward", "BackwardPass": "backward"}
TORCH_KINDS = {"F": "forward", "B": "backward", "I": "backward_input", "W": "backward_weight"}


def passes(schedule: Schedule, stage: int) -> list[Instruction]:
    return [instruction for instruction in schedule.stages[stage] if instruction.kind in schedule.computes]


def in_torch(name: str, p: int, m: int, v: int) -> list[list[Instruction]]:
    """The passes of a schedule of torch.distributed.pipelining, which needs to know its stages' numbers only."""
    stages = [
        SimpleNamespace(
            group_size=p, group_rank=0, num_stages=p * v, stage_index=p * c, has_backward=True, is_first=c == 0,
            is_last=False, submod=torch.nn.Identity(), stage_index_to_group_rank={},
        )
        for c in range(v)
    ]  # fmt: skip
    schedule_class = torch_schedules.get_schedule_class(name)
    single = issubclass(schedule_class, torch_schedules.PipelineScheduleSingle)
    found = schedule_class(stages[0] if single else stages, m, loss_fn=lambda *_: None)
    orders = found._get_pipeline_order() if single else found.pipeline_order
    assert orders is not None
    actions = [
        [a for a in orders[rank] if a is not None and a.computation_type.value in TORCH_KINDS] for rank in range(p)
    ]
    return [
        [Instruction(TORCH_KINDS[a.computation_type.value], a.microbatch_index, a.stage_index // p) for a in stage]
        for stage in actions
    ]


@pytest.mark.parametrize("p", range(2, 9))
def test_orders_are_those_of_torch(p: int) -> None:
    """Its zero-bubble schedule with one part per stage is ZB-H1. Of 1F1B's last stage it counts forwards from 1."""
    pairs = [("gpipe", "GPipe", 1), ("1f1b", "1F1B", 1), ("zb_h1", "InterleavedZeroBubble", 1)]
    pairs += [("interleaved", "Interleaved1F1B", v) for v in (2, 3)]
    for m, (ours, theirs, v) in product((p, 2 * p, 4 * p), pairs):
        schedule = build_schedule(ours, p, m, v)
        compared = p - (ours == "1f1b")
        assert [passes(schedule, stage) for stage in range(compared)] == in_torch(theirs, p, m, v)[:compared]


@pytest.mark.parametrize("p", range(1, 9))
def test_1f1b_is_deepspeeds_order(p: int) -> None:
    for m in range(1, 17):
        schedule = build_schedule("1f1b", p, m)
        for stage in range(p):
            theirs = deepspeed_schedule.TrainSchedule(micro_batches=m, stages=p, stage_id=stage)
            commands = [c for step in theirs for c in step if c.name in DEEPSPEED_KINDS]
            counts = {kind: count() for kind in DEEPSPEED_KINDS.values()}
            kinds = [DEEPSPEED_KINDS[command.name] for command in commands]
            assert passes(schedule, stage) == [Instruction(kind, next(counts[kind])) for kind in kinds]


@pytest.mark.parametrize("p", range(2, 9))
def test_dualpipev_is_deepspeeds_order(p: int) -> None:
    for m in (2 * p, 2 * p + 1, 4 * p):
        schedule = build_schedule("dualpipev", p, m)
        for stage in range(p):
            theirs = deepspeed_schedule.DualPipeVSchedule(m, p, stage)
            assert passes(schedule, stage) == [
                Instruction(DEEPSPEED_KINDS[command.name], command.buffer_id % m, command.phase)
                for step in theirs
                for command in step
                if command.name in DEEPSPEED_KINDS
            ]


@pytest.mark.parametrize(("p", "v"), list(product([1, 2, 3, 4, 7], [1, 2, 3, 4])))
def test_a_placement_has_every_part_once(p: int, v: int) -> None:
    for is_v in (False, True):
        placement = Placement(p, v, is_v)
        places = [placement.place(part) for part in range(p * v)]
        assert sorted(places) == list(product(range(p), range(v)))
        assert [placement.part(*place) for place in places] == list(range(p * v))
        assert [part for stage in range(p) for part in placement.parts_of(stage)] == [
            placement.part(stage, chunk) for stage in range(p) for chunk in range(v)
        ]
        neighbours = {abs(a - b) for (a, _), (b, _) in pairwise(places)}
        assert neighbours <= ({0, 1} if is_v else {1, p - 1})
        assert [place for place in places if placement.begins(*place)] == places[:1]
        assert [place for place in places if placement.ends(*place)] == places[-1:]


def test_a_v_of_three_stages_is_as_drawn() -> None:
    assert [Placement(3, 2, is_v=True).parts_of(stage) for stage in range(3)] == [[0, 5], [1, 4], [2, 3]]
    assert [Placement(3, 2).parts_of(stage) for stage in range(3)] == [[0, 3], [1, 4], [2, 5]]


def test_a_table_says_which_schedules_split() -> None:
    for name, kind in SCHEDULES.items():
        assert build_schedule(name, 2, 4).splits_backward == kind.splits
    assert [name for name, engine in ENGINES.items() if engine.splits_backward] == ["deepspeed", "torch"]


def test_passes_that_are_left_out_or_done_twice_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(stage: Stage) -> Iterator[Instruction]:
        for number in range(stage.num_micro_batches - 1):
            yield from (forward(number), backward(number))

    def repeats(stage: Stage) -> Iterator[Instruction]:
        for number in range(stage.num_micro_batches):
            yield from (forward(number), backward(max(0, number - 1)))

    def confuses(stage: Stage) -> Iterator[Instruction]:
        for number in range(stage.num_micro_batches):
            yield from (forward(number), backward_weight(number), backward_input(number))

    def exceeds(stage: Stage) -> Iterator[Instruction]:
        yield forward(stage.num_micro_batches)

    wrong = {
        forgets: "computes nothing of micro-batch 3 and chunk 0 on stage 0; it must be forward, backward",
        repeats: "computes forward, backward, backward of micro-batch 0 and chunk 0 on stage 0",
        confuses: "computes forward, backward_weight, backward_input of micro-batch 0",
        exceeds: "has forward of micro-batch 4 and chunk 0 on stage 0, but there are 4 micro-batches and 1 chunks",
    }
    for generate, message in wrong.items():
        monkeypatch.setitem(SCHEDULES, "wrong", ScheduleKind(generate, fill_and_drain))
        with pytest.raises(ValueError, match=message):
            build_schedule("wrong", 2, 4)


@pytest.mark.parametrize(("name", "p", "m", "v"), SIZES)
def test_everything_is_computed_once_and_every_message_has_two_ends(name: str, p: int, m: int, v: int) -> None:
    schedule = build_schedule(name, p, m, v)
    for stage, instructions in enumerate(schedule.stages):
        done: Counter[tuple[str, int, int]] = Counter()
        for kind, micro_batch, chunk, _ in instructions:
            assert kind in KINDS
            done[kind, micro_batch, chunk] += 1
            if kind in ("backward", "backward_input"):
                assert done["forward", micro_batch, chunk] == 1
            if kind == "backward_weight":
                assert done["backward_input", micro_batch, chunk] == 1
        for kind in schedule.computes:
            assert {key for key in done if key[0] == kind} == {(kind, k, c) for k in range(m) for c in range(v)}
        assert set(done.values()) == {1}
        assert [i.kind for i in instructions[-4:]] == [
            "reduce_tied_gradients", "reduce_gradients", "optimizer", "reduce_loss"
        ]  # fmt: skip
        loads = [i.chunk for i in instructions if i.kind == "load"]
        ends = [c for c in range(v) if schedule.placement.part(stage, c) in (0, p * v - 1)]
        assert Counter(loads) == dict.fromkeys(ends, m)
    for send, receive in RECEIVE_OF_SEND.items():
        for stage, peer in product(range(p), repeat=2):
            assert messages(schedule, send, stage, peer) == messages(schedule, receive, peer, stage)


def messages(schedule: Schedule, kind: str, stage: int, peer: int) -> list[int]:
    """Micro-batches of the transfers of a kind between two stages, in order."""
    return [i.micro_batch for i in schedule.stages[stage] if i.kind == kind and i.peer == peer]


def test_a_hand_over_inside_a_stage_is_no_transfer() -> None:
    placement = Placement(2, 2, is_v=True)
    order = [*(forward(0, c) for c in (0, 1)), *(backward(0, c) for c in (1, 0))]
    kinds = [instruction.kind for instruction in with_transfers(order, placement, 1)]
    assert kinds == [
        "recv_activation", "forward", "forward", "send_activation", "recv_gradient", "backward", "backward",
        "send_gradient",
    ]  # fmt: skip
    first = [instruction.kind for instruction in with_transfers(order, placement, 0)]
    assert first == [
        "load", "forward", "send_activation", "recv_activation", "load", "forward", "backward", "send_gradient",
        "recv_gradient", "backward",
    ]  # fmt: skip


@pytest.mark.parametrize("is_v", [False, True])
def test_an_evaluation_passes_everything_forward(is_v: bool) -> None:
    schedule = evaluation(Placement(3, 2, is_v), 5)
    for instructions in schedule.stages:
        assert [(i.micro_batch, i.chunk) for i in instructions if i.kind == "forward"] == [
            (k, c) for c in range(2) for k in range(5)
        ]
        assert {i.kind for i in instructions} <= {"load", "forward", "send_activation", "recv_activation"}


@pytest.mark.parametrize(("name", "p", "m", "v"), SIZES)
def test_the_ideal_bubble_is_what_the_passes_take(name: str, p: int, m: int, v: int) -> None:
    """Whether or not there is a formula for it."""
    schedule = build_schedule(name, p, m, v)
    assert executed_overhead(schedule) == pytest.approx(ideal_bubble_overhead(name, p, m, v), abs=1e-12)
    if name == "zb_h1" and m >= p:  # arXiv 2401.10241: a third of 1F1B's is left
        assert executed_overhead(schedule) == Fraction(p - 1, 3 * m)
    seconds = {"forward": 1, "backward": 2, "backward_input": 1, "backward_weight": 1}
    spans = simulate(schedule, {kind: v * seconds[kind] for kind in schedule.computes})
    bubble = measured_bubble([[activity(of_stage)] for of_stage in spans])
    assert bubble.overhead == pytest.approx(float(executed_overhead(schedule)), abs=1e-12)


@pytest.mark.parametrize("name", ["zb_auto", "zb_v"])
def test_memory_is_a_limit_and_buys_time(name: str) -> None:
    p, m = 4, 16
    before = 10.0
    for memory in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0):
        schedule = build_schedule(name, p, m, memory=memory)
        assert max(schedule.most_in_flight) <= memory * p
        overhead = ideal_bubble_overhead(name, p, m, memory=memory)
        assert overhead <= before
        before = overhead
    assert before <= float(fill_and_drain(p, m, 1)) / 3  # as little as the first forwards of the last stage allow


@pytest.mark.parametrize(("p", "m"), list(product(range(1, 6), range(1, 9))))
def test_forward_passes_in_flight(p: int, m: int) -> None:
    """arXiv 2104.04473: GPipe keeps all micro-batches, 1F1B as many as stages follow, itself included."""
    assert build_schedule("gpipe", p, m).most_in_flight == [m] * p
    assert build_schedule("1f1b", p, m).most_in_flight == [min(p - s, m) for s in range(p)]
    assert build_schedule("zb_h1", p, m).most_in_flight == [min(p, m)] * p  # arXiv 2401.10241, section 3


def test_what_is_held_by_hand() -> None:
    split = [forward(0), forward(1), backward_input(0), backward_weight(0), backward_input(1), backward_weight(1)]
    assert most_held(split, [3.0]) == 6
    assert most_held(split, [3.0], waiting=[5.0]) == 8
    assert most_held([forward(0, 0), forward(0, 1), backward(0, 1), backward(0, 0)], [1.0, 10.0]) == 11


def test_interleaved_begins_as_in_the_paper() -> None:
    """arXiv 2104.04473, figure 4: 4 stages, 2 chunks, 8 micro-batches."""
    schedule = build_schedule("interleaved", 4, 8, 2)
    found = [[(i.kind[0], i.micro_batch, i.chunk) for i in passes(schedule, stage)] for stage in range(4)]
    warmup = [("f", k, c) for c in range(2) for k in range(4)]
    assert found[0][:8] == warmup
    assert found[3][:7] == [*warmup[:5], ("b", 0, 1), ("f", 1, 1)]
    assert [stage.index(("b", 0, 1)) for stage in found] == [11, 9, 7, 5]
    assert found[0][-1] == found[3][-1] == ("b", 7, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2f2b", 2, 4), "'2f2b' is not known; use one of gpipe, 1f1b"),
        (("1f1b", 0, 4), "at least 1 stage"),
        (("gpipe", 2, 0), "at least 1 micro-batch"),
        (("interleaved", 4, 6, 2), "6 micro-batches are no multiple of 4 stages; use 8 micro-batches"),
        (("interleaved", 4, 8, 1), "interleaved has 2 or more chunks per stage, not 1"),
        (("interleaved", 1, 8), "interleaved needs 2 stages or more, not 1; use 1f1b"),
        (("1f1b", 4, 8, 2), "1f1b has 1 chunk per stage, not 2"),
        (("dualpipev", 4, 7), "7 are fewer than 8 for 4 stages; use 8 micro-batches or more"),
        (("dualpipev", 4, 8, 3), "dualpipev has 2 chunks per stage, not 3"),
    ],
)
def test_sizes_that_cannot_run(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_schedule(*arguments)
