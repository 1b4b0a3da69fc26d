"""The span file of one rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.clock import ClockOffset
from harness.strict_json import dumps
from harness.timeline import Span, span_lines


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
