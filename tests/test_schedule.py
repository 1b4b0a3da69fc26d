"""Schedules: DeepSpeed's order to the letter, and what every schedule must keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product

import pytest
from deepspeed.runtime.pipe import schedule as deepspeed_schedule

from harness.run.engines.deepspeed.commands import CLASS_OF_KIND, Commands
from harness.spans.span import KINDS, RECEIVE_OF_SEND
from harness.spec.engines import ENGINES
from harness.spec.schedules import (
    SCHEDULES,
    Instruction,
    Schedule,
    ScheduleKind,
    Stage,
    build_schedule,
    fill_and_drain,
)

SIZES = [
    *[(name, p, m, 1) for name, p, m in product(["gpipe", "1f1b"], [1, 2, 3, 5], [1, 2, 4, 9])],
    *[("interleaved", p, m * p, v) for p, m, v in product([2, 3, 4], [1, 2, 3], [2, 3])],
]


@pytest.mark.parametrize("p", range(1, 9))
def test_1f1b_is_deepspeeds_order_with_its_buffers(p: int) -> None:
    for m in range(1, 17):
        for stage, instructions in enumerate(build_schedule("1f1b", p, m).stages):
            theirs = deepspeed_schedule.TrainSchedule(micro_batches=m, stages=p, stage_id=stage)
            ours = Commands(instructions)
            assert ours.num_pipe_buffers() == theirs.num_pipe_buffers()
            assert [(CLASS_OF_KIND[c.instruction.kind].__name__, c.arguments) for step in ours for c in step] == [
                (command.name, command.kwargs) for step in theirs for command in step
            ]


@pytest.mark.parametrize("numbers", [[0, 1, 1, 2, 0, 2], [0, 1, 2, 3, 1, 4, 0, 4, 2, 3], [3, 0, 3, 0]])
def test_micro_batches_that_are_open_at_once_share_no_buffer(numbers: list[int]) -> None:
    instructions = [Instruction("load" if k not in numbers[:i] else "backward", k) for i, k in enumerate(numbers)]
    ours = Commands(instructions)
    buffer_of = {c.instruction.micro_batch: c.arguments["buffer_id"] for step in ours for c in step}
    for position in range(len(numbers)):
        open_now = set(numbers[: position + 1]) & set(numbers[position:])
        assert len({buffer_of[number] for number in open_now}) == len(open_now)
        assert max(buffer_of.values()) < ours.num_pipe_buffers()


def test_an_engine_says_what_it_executes() -> None:
    assert set(CLASS_OF_KIND) | {"reduce_loss"} == ENGINES["deepspeed"].kinds == ENGINES["torch"].kinds


def test_passes_that_are_left_out_or_done_twice_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(stage: Stage) -> Iterator[Instruction]:
        for number in range(stage.num_micro_batches - 1):
            yield from stage.forward(number)
            yield from stage.backward(number)
        yield from stage.load(stage.num_micro_batches - 1)

    def repeats(stage: Stage) -> Iterator[Instruction]:
        for number in range(stage.num_micro_batches):
            yield from stage.forward(number)
            yield from stage.backward(max(0, number - 1))

    for generate, passes in ((forgets, "3 forward passes on stage 0, 3"), (repeats, "4 backward passes on stage 0, 3")):
        monkeypatch.setitem(SCHEDULES, "wrong", ScheduleKind(generate, fill_and_drain))
        with pytest.raises(ValueError, match=f"schedule wrong has {passes} of them different, instead of 4"):
            build_schedule("wrong", 2, 4)


def test_a_split_backward_pass_is_known() -> None:
    assert not build_schedule("1f1b", 2, 2).splits_backward
    halves = [Instruction(kind, 0) for kind in ("forward", "backward_input", "backward_weight")]
    assert Schedule("halves", 1, 1, [halves]).splits_backward
    assert Schedule("halves", 1, 1, [halves]).micro_batches_in_flight == [1]


@pytest.mark.parametrize(("name", "p", "m", "v"), SIZES)
def test_everything_is_computed_once_and_every_message_has_two_ends(name: str, p: int, m: int, v: int) -> None:
    schedule = build_schedule(name, p, m, v)
    for instructions in schedule.stages:
        done: Counter[tuple[str, int, int]] = Counter()
        for kind, micro_batch, chunk, _ in instructions:
            assert kind in KINDS
            done[kind, micro_batch, chunk] += 1
            if kind == "backward":
                assert done["forward", micro_batch, chunk] == 1
        for kind in ("forward", "backward"):
            assert {key for key in done if key[0] == kind} == {(kind, k, c) for k in range(m) for c in range(v)}
        assert set(done.values()) == {1}
        assert [i.kind for i in instructions[-4:]] == [
            "reduce_tied_gradients", "reduce_gradients", "optimizer", "reduce_loss"
        ]  # fmt: skip
    for send, receive in RECEIVE_OF_SEND.items():
        for stage, peer in product(range(p), repeat=2):
            assert messages(schedule, send, stage, peer) == messages(schedule, receive, peer, stage)


def messages(schedule: Schedule, kind: str, stage: int, peer: int) -> list[int]:
    """Micro-batches of the transfers of a kind between two stages, in order."""
    return [i.micro_batch for i in schedule.stages[stage] if i.kind == kind and i.peer == peer]


@pytest.mark.parametrize(("p", "m"), list(product(range(1, 6), range(1, 9))))
def test_forward_passes_in_flight(p: int, m: int) -> None:
    """arXiv 2104.04473: GPipe keeps all micro-batches, 1F1B as many as stages follow, itself included."""
    assert build_schedule("gpipe", p, m).micro_batches_in_flight == [m] * p
    assert build_schedule("1f1b", p, m).micro_batches_in_flight == [min(p - s, m) for s in range(p)]


def test_interleaved_begins_as_in_the_paper() -> None:
    """arXiv 2104.04473, figure 4: 4 stages, 2 chunks, 8 micro-batches."""
    schedule = build_schedule("interleaved", 4, 8, 2)
    passes = [[(i.kind[0], i.micro_batch, i.chunk) for i in stage if i.kind in ("forward", "backward")]
              for stage in schedule.stages]  # fmt: skip
    warmup = [("f", k, c) for c in range(2) for k in range(4)]
    assert passes[0][:8] == warmup
    assert passes[3][:7] == [*warmup[:5], ("b", 0, 1), ("f", 1, 1)]
    assert [stage.index(("b", 0, 1)) for stage in passes] == [11, 9, 7, 5]
    assert passes[0][-1] == passes[3][-1] == ("b", 7, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2f2b", 2, 4), "'2f2b' is not known; use one of gpipe, 1f1b"),
        (("1f1b", 0, 4), "at least 1 stage"),
        (("gpipe", 2, 0), "at least 1 stage"),
        (("interleaved", 4, 6, 2), "6 micro-batches are no multiple of 4 stages; use 8 micro-batches"),
        (("interleaved", 4, 8, 1), "needs 2 stages and 2 chunks or more, not 4 and 1; use 1f1b"),
        (("1f1b", 4, 8, 2), "1f1b runs 1 chunk per stage, not 2; use interleaved"),
    ],
)
def test_sizes_that_cannot_run(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_schedule(*arguments)
