"""Under every schedule gradients are the same, a trace is whole, a stop has its name, and a training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks

from harness.run.engines.deepspeed.transfers import lane_of
from harness.spans.files import SpanFile
from harness.spans.perfetto import chrome_trace, trace_problems
from harness.spans.span import RECEIVE_OF_SEND, Span
from harness.spec.schedules import SCHEDULES, Instruction, Schedule, build_schedule

P, M, STOPPED = 4, 8, 2
TINY = (
    "model=gpt2_tiny", "model.num_hidden_layers=8", "model.hidden_size=32", "model.num_attention_heads=4",
    "model.tie_word_embeddings=false", "train.sequence_length=16", "train.micro_batch_size=1",
    f"train.global_batch_size={M}", f"parallel.pp={P}",
)  # fmt: skip
OPTIONS = ("train.precision=bf16", "parallel.zero_stage=1", "train.activation_checkpointing=full")


def stop_of(schedule: Schedule) -> Instruction:
    """In the middle of the step: the last pass that a stage has of a micro-batch."""
    passes = [i for i in schedule.stages[STOPPED] if i.kind in schedule.computes]
    return [i for i in passes if i.micro_batch == M // 2][-1]


def where_all_stand(schedule: Schedule, stop: Instruction) -> list[str]:
    """By the order of the schedule alone: each stage goes on until it needs what can't come."""
    sent: set[Any] = set()
    positions = [0] * P

    def can_pass(stage: int, instruction: Instruction) -> bool:
        if instruction.kind in RECEIVE_OF_SEND.values():
            return (lane_of(instruction, schedule.placement, stage), instruction.micro_batch) in sent
        # The gradient's norm needs all stages.
        return instruction.kind != "optimizer" and not (stage == STOPPED and instruction == stop)

    moved = True
    while moved:
        moved = False
        for stage, order in enumerate(schedule.stages):
            while can_pass(stage, instruction := order[positions[stage]]):
                if instruction.kind in RECEIVE_OF_SEND:
                    sent.add((lane_of(instruction, schedule.placement, stage), instruction.micro_batch))
                positions[stage] += 1
                moved = True
    stand = [order[position] for order, position in zip(schedule.stages, positions, strict=True)]
    return [_sentence(instruction, schedule.num_chunks) for instruction in stand]


def _sentence(instruction: Instruction, num_chunks: int) -> str:
    what = f"in {instruction.kind}"
    if instruction.micro_batch >= 0:
        what += f" of micro-batch {instruction.micro_batch}"
        what += f", chunk {instruction.chunk}" if num_chunks > 1 else ""
    return f"{what}, step 2"


@pytest.mark.slow
def test_every_schedule_in_one_launch(tmp_path: Path) -> None:
    schedules = {name: build_schedule(name, P, M) for name in SCHEDULES}
    overrides = {name: [*TINY, f"parallel.schedule={name}"] for name in SCHEDULES}
    stands = {name: where_all_stand(schedule, stop_of(schedule)) for name, schedule in schedules.items()}
    argument = {
        "steps": [[*plain, *OPTIONS] for plain in overrides.values()],
        "under": [
            {"overrides": overrides[name], "stage": STOPPED, "at": stop_of(schedule), "expected": stands[name]}
            for name, schedule in schedules.items()
        ],
    }
    answer = run_ranks(P, "ranks_schedules", argument, tmp_path)
    plain = [[rank["gradients"] for rank in ranks] for ranks in answer["under"]]
    for of_schedules in (plain, answer["steps"]):
        wholes = [{name: digest for rank in ranks for name, digest in rank.items()} for ranks in of_schedules]
        assert len(wholes[0]) > 8 * 12
        for name, whole in zip(SCHEDULES, wholes, strict=True):
            assert whole == wholes[0], name  # bit by bit
    for (name, schedule), ranks in zip(schedules.items(), answer["under"], strict=True):
        assert ranks[STOPPED]["stands"] == stands[name], name
        assert [rank["resumed"] for rank in ranks] == [rank["stopped"] for rank in ranks], name
        files = [
            SpanFile({"rank": stage, "pp": stage, "dp": 0, "tp": 0}, [Span(*span) for span in rank["spans"]])
            for stage, rank in enumerate(ranks)
        ]
        trace = chrome_trace(files, [range(P)], schedule.stages)
        assert trace_problems(trace) == [], name
        arrows = [event for event in trace["traceEvents"] if event["ph"] == "s"]
        assert len(arrows) == sum(i.kind in RECEIVE_OF_SEND for stage in schedule.stages for i in stage), name
