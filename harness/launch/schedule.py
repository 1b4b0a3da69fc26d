"""launchers/schedule.py: what the stages of a configured pipeline do, drawn and written without running it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.errors import ConfigError
from harness.launch.compose import compose
from harness.machine import detect_machine
from harness.plan.simulate import simulate
from harness.record.plots import timeline_picture
from harness.spans.span import Span
from harness.spec.config import RunConfig
from harness.spec.resolve import load_config
from harness.spec.schedule_files import write_schedule
from harness.spec.schedules import Schedule, ideal_bubble_fraction_of, passes_with_parts, schedule_of

UNITS = {"forward": 1, "backward": 2, "backward_input": 1, "backward_weight": 1}
"""Of time that a pass takes."""
LETTERS = {"forward": "F", "backward": "B", "backward_input": "I", "backward_weight": "W"}


def main(arguments: Sequence[str]) -> int:
    """Print a drawing, and write what is asked for; 2 for a configuration that can't run or a file that can't be."""
    parser = argparse.ArgumentParser(prog="schedule.py", add_help=False)  # the launcher's docstring is its help
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--png", type=Path)
    options, overrides = parser.parse_known_args(arguments)
    try:
        if options.png is not None and options.png.suffix != ".png":
            raise ConfigError(f"--png {options.png} is no name of a PNG file; let it end in .png")
        config = load_config(compose(overrides), detect_machine())
        schedule = schedule_of(config)
        print("\n".join([describe(config, schedule), "", *drawing(schedule)]))
        if options.csv is not None:
            write_schedule(options.csv, passes_with_parts(schedule))
        if options.png is not None:
            every = enumerate(of_equal_passes(schedule))
            spans = {stage: [span for span in spans if span.micro_batch >= 0] for stage, spans in every}
            timeline_picture({"": spans}, options.png, f"{describe(config, schedule)}; a forward pass takes 1 ms")
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def describe(config: RunConfig, schedule: Schedule) -> str:
    """A line with the facts of a schedule."""
    p, v = schedule.placement.num_stages, schedule.num_chunks
    chunks = f", {v} chunks per stage in a {'V' if schedule.placement.is_v else 'loop'}" if v > 1 else ""
    return (
        f"{schedule.name}, {p} stages, {schedule.num_micro_batches} micro-batches{chunks}: ideal bubble "
        f"{100 * ideal_bubble_fraction_of(config):.1f} %, holds {max(schedule.most_in_flight):g} micro-batches"
    )


def of_equal_passes(schedule: Schedule) -> list[list[Span]]:
    """Of every stage: forwards and halves of backwards take a millisecond, transfers nothing."""
    seconds = {kind: UNITS[kind] * schedule.num_chunks / 1e3 for kind in schedule.computes}
    return simulate(schedule, seconds)


def drawing(schedule: Schedule) -> list[str]:
    """A line per stage, a column per millisecond: pass and micro-batch.

    A second chunk has small letters; where there are more, the chunk stands before the letter.
    """
    rows = []
    for spans in of_equal_passes(schedule):
        rows.append(["."] * (max(span.end_ns for span in spans if span.kind in schedule.computes) // 10**6))
        for span in spans:
            if span.kind in schedule.computes:
                begin, end = span.start_ns // 10**6, span.end_ns // 10**6
                rows[-1][begin:end] = [_cell(span, schedule.num_chunks)] * (end - begin)
    width = max(len(cell) for row in rows for cell in row)
    return [
        f"stage {stage}   " + " ".join(cell.ljust(width) for cell in row).rstrip() for stage, row in enumerate(rows)
    ]


def _cell(span: Span, num_chunks: int) -> str:
    letter = LETTERS[span.kind]
    if num_chunks > 2:
        return f"{span.chunk}{letter}{span.micro_batch}"
    return f"{letter.lower() if span.chunk else letter}{span.micro_batch}"
