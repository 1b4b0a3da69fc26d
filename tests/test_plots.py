"""The picture of a pipeline step."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from harness.record import plots
from harness.record.plots import timeline_picture
from harness.spans.span import Span

MS = 1_000_000


def two_stages() -> dict[int, list[Span]]:
    """1F1B with p = 2 and m = 2, t_f = 10 ms and t_b = 20 ms: 90 ms, then an optimizer step of 10 ms."""
    first = [("forward", 0, 0, 10), ("forward", 1, 10, 20), ("backward", 0, 40, 60), ("backward", 1, 70, 90)]
    last = [("forward", 0, 10, 20), ("backward", 0, 20, 40), ("forward", 1, 40, 50), ("backward", 1, 50, 70)]
    step = [("recv_activation", 0, 0, 10), ("optimizer", -1, 90, 100)]
    return {
        rank: [Span(3, kind, number, (7 + start) * MS, (7 + end) * MS) for kind, number, start, end in spans + step]
        for rank, spans in enumerate((first, last))
    }


def test_colours_show_what_each_rank_did(tmp_path: Path) -> None:
    timeline_picture({"": two_stages()}, tmp_path / "step.png", "1F1B, 2 stages: $ has no meaning")
    pixels = numpy.asarray(imread(tmp_path / "step.png"))[:, :, :3]
    height, width = pixels.shape[:2]
    assert width == plots.INCHES_WIDE * 150
    for kind in ("forward", "backward", "optimizer"):
        assert (numpy.abs(pixels - to_rgb(plots.FILLS[kind][0])).max(axis=2) < 0.01).any(), kind
    # Rank 0 computes from 0 to 20 ms, waits until 40 ms, and ends at 100 ms.
    row = pixels[int(height * 0.25)]
    left, right = numpy.flatnonzero(row.min(axis=1) < 0.7)[[0, -1]]
    at = {ms: row[left + int((right - left) * ms / 100)] for ms in (3, 12, 23, 30, 37, 43, 65)}
    blue, green, white = (to_rgb(colour) for colour in (plots.FILLS["forward"][0], plots.FILLS["backward"][0], "white"))
    for ms, colour in {3: blue, 12: blue, 23: white, 30: white, 37: white, 43: green, 65: white}.items():
        assert at[ms] == pytest.approx(colour, abs=0.01), ms


@pytest.mark.parametrize(("seconds", "numbers", "shown"), [(10, 10, True), (10, 1000, False), (1000, 1000, True)])
def test_numbers_are_left_out_where_they_do_not_fit(seconds: int, numbers: int, shown: bool) -> None:
    spans = [Span(1, "forward", number, 0, seconds * MS) for number in range(numbers)]
    assert (plots._font_size(spans, milliseconds=1000) >= plots.SMALLEST_FONT) is shown


def test_a_kind_that_never_ran_needs_no_font() -> None:
    assert plots._font_size([], milliseconds=1.0) == 0
