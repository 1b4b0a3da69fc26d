"""What the stages of a pipeline did where a library decides it, whose transfers nobody sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from harness.spans.files import SpanFile
from harness.spans.span import COMPUTE_KINDS, NESTED_KINDS, RECEIVE_OF_SEND, SEND_OF_RECEIVE, STEP, Span
from harness.spec.placement import Placement
from harness.spec.schedules import Instruction, Schedule, with_transfers


def executed(line: Sequence[SpanFile], step: int, schedule: Schedule) -> tuple[list[list[Span]], Schedule]:
    """Spans of every stage in a step, those of transfers among them, and the schedule that they are.

    A stage that receives what a pass needs has nothing else to do before it: the time since its last instruction is
    the receive's. What a pass sends leaves at its end.

    Args:
        line: the files of ranks that pass micro-batches to each other, by stage.
        schedule: that was asked for, of whose name the library has one with the same placement.
    """
    stages = [list(_with_transfers(file, step, schedule.placement, stage)) for stage, file in enumerate(line)]
    orders = [[instruction for instruction, _ in stage if instruction.kind not in NESTED_KINDS] for stage in stages]
    return [[span for _, span in stage] for stage in stages], replace(schedule, stages=orders)


def _with_transfers(file: SpanFile, step: int, placement: Placement, stage: int) -> Iterator[tuple[Instruction, Span]]:
    ended_ns = next(span.start_ns for span in file.spans if span.kind == STEP and span.step == step)
    for span in file.instructions(step):
        own = Instruction(span.kind, span.micro_batch, span.chunk)
        for instruction in with_transfers([own], placement, stage) if span.kind in COMPUTE_KINDS else [own]:
            if instruction.kind in SEND_OF_RECEIVE:
                yield instruction, span._replace(kind=instruction.kind, start_ns=ended_ns, end_ns=span.start_ns)
            elif instruction.kind in RECEIVE_OF_SEND:
                yield instruction, span._replace(kind=instruction.kind, start_ns=span.end_ns)
            elif instruction == own:
                yield instruction, span
        if span.kind not in NESTED_KINDS:
            ended_ns = span.end_ns
