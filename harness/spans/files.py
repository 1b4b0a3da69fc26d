"""The span file of a rank, written and read: a header, a line per span, and a last line that says there are no more."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.spans.clock import ClockOffset, to_reference
from harness.spans.span import PHASES, STEP, Span
from harness.strict_json import dumps


class SpanFile(NamedTuple):
    """Content of one rank's span file."""

    header: dict[str, Any]
    """Of the first line, and of the last one, which only a run that came to its end wrote."""
    spans: list[Span]
    memory: Sequence[tuple[int, int]] = ()
    """Clock in nanoseconds, bytes in use; of the steps in `tracking.trace_steps`."""

    @property
    def complete(self) -> bool:
        """Whether it holds all that its rank measured; a killed run's file is cut off somewhere."""
        return bool(self.header.get("num_spans") == len(self.spans))

    def instructions(self, step: int) -> list[Span]:
        """What the rank did in a step."""
        return [span for span in self.spans if span.step == step and span.kind not in (STEP, *PHASES)]

    def phases(self, step: int) -> dict[str, list[Span]]:
        """What it did in each phase of a step; in one that has no name where the step has no phases."""
        around = {span.kind: span for span in self.spans if span.step == step and span.kind in PHASES}
        spans = self.instructions(step)
        if not around:
            return {"": spans}
        return {
            kind: [span for span in spans if phase.start_ns <= span.start_ns < phase.end_ns]
            for kind, phase in around.items()
        }

    def step_seconds(self) -> dict[int, float]:
        """Duration of every step by the clock around it, or around its phases."""
        seconds: dict[int, float] = defaultdict(float)
        for span in self.spans:
            if span.kind in (STEP, *PHASES):
                seconds[span.step] += span.seconds
        return dict(seconds)


def span_lines(spans: Iterable[Span]) -> Iterator[str]:
    """JSON lines as the span files hold them."""
    for span in spans:
        yield dumps(span, separators=(",", ":")) + "\n"


def read_spans(path: Path) -> SpanFile:
    """Read a span file; a line cut off by a killed run ends it.

    Raises:
        ValueError: the file has no header.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        try:
            header = json.loads(next(file))
        except (StopIteration, ValueError):
            header = None
        if not isinstance(header, dict):
            raise ValueError(f"{path} is no span file: its first line is not a header")
        spans, memory = [], list[tuple[int, int]]()
        for line in file:
            try:
                content = json.loads(line)
                if isinstance(content, dict) and "num_spans" in content:
                    header |= content
                elif isinstance(content, dict):
                    memory += [(int(moment), int(size)) for moment, size in content["memory"]]
                else:
                    spans.append(Span(*content))
            except (ValueError, TypeError, KeyError):
                break
    return SpanFile(header, spans, memory)


def aligned(file: SpanFile) -> SpanFile:
    """The same spans on rank 0's clock, by the offsets that the file names."""
    start, end = (file.header.get(f"clock_offset_{when}") for when in ("start", "end"))
    if start is None:
        return file
    shift = to_reference(ClockOffset(*start), end and ClockOffset(*end))
    spans = [span._replace(start_ns=shift(span.start_ns), end_ns=shift(span.end_ns)) for span in file.spans]
    return SpanFile(file.header, spans, [(shift(moment), size) for moment, size in file.memory])


class SpanWriter:
    """Writes a header, spans, and a last line that says there are no more.

    Args:
        header: who the rank is.
        clock_offset: of its clock as the run starts.
    """

    def __init__(self, path: Path, header: dict[str, Any], clock_offset: ClockOffset) -> None:
        path.parent.mkdir(exist_ok=True)
        self._file = path.open("w")
        self._num_spans = 0
        clock = {"clock": "CLOCK_MONOTONIC, nanoseconds", "clock_offset_start": clock_offset}
        self._file.write(dumps(header | clock) + "\n")

    def write(self, spans: Iterable[Span]) -> None:
        """Add spans of one step."""
        lines = list(span_lines(spans))
        self._num_spans += len(lines)
        self._file.writelines(lines)

    def write_memory(self, samples: Sequence[tuple[int, int]]) -> None:
        """Add moments of the rank's clock, in nanoseconds, with the bytes in use then."""
        self._file.write(dumps({"memory": samples}, separators=(",", ":")) + "\n")

    def close(self, clock_offset: ClockOffset) -> None:
        """End the file, with the offset of the rank's clock as the run ends."""
        self._file.write(dumps({"clock_offset_end": clock_offset, "num_spans": self._num_spans}) + "\n")
        self._file.close()
