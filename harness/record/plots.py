"""Pictures of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from harness.spans.accounting import PART_LABELS
from harness.spans.span import COMPUTE_KINDS, PHASES, Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Forward blue and backward green, as pipelines are drawn since arXiv 2104.04473; waiting stays white.
FILLS = {
    "forward": ("#4f7fd0", "forward"),
    "prefill": ("#4f7fd0", "prefill"),
    "decode": ("#3a9d9a", "decode"),
    "backward": ("#63b179", "backward"),
    "backward_input": ("#63b179", "backward of inputs"),
    "backward_weight": ("#9dbb55", "backward of weights"),
    "reduce_tied_gradients": ("#c9b8dd", "reduce gradients"),
    "reduce_gradients": ("#c9b8dd", "reduce gradients"),
    "optimizer": ("#ecd3a4", "optimizer"),
}
PART_COLOURS = {
    "forward": FILLS["forward"][0], "backward": FILLS["backward"][0], "recomputation": "#a8d5b5",
    "tp_communication": "#8a63b1", "pp_transfer": "#d0704f", "dp_reduction": FILLS["reduce_gradients"][0],
    "optimizer": FILLS["optimizer"][0], "data": "#7f7f7f", "host_gap": "#c4c4c4", "pp_wait": "#f4f4f4",
}  # fmt: skip
INCHES_WIDE, INCHES_PER_RANK, INCHES_OF_AXIS = 12.0, 0.5, 0.55
LARGEST_FONT, SMALLEST_FONT = 9.0, 5.0


def timeline_picture(panels: Mapping[str, Mapping[int, Sequence[Span]]], path: Path, title: str) -> None:
    """Draw a step of a pipeline: a row per rank, a box per forward and backward with its micro-batch number.

    Passes of a stage's second chunk are lighter than those of its first, and so on.

    Args:
        panels: by their names, one above the other, each with a time of its own: by rank the spans of one step, or of a
            part of it, on one clock; rows keep this order, the first on top.
        path: PNG file to write.
        title: one line above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    heights = [INCHES_PER_RANK * len(panel) + INCHES_OF_AXIS for panel in panels.values()]
    figure = Figure(figsize=(INCHES_WIDE, sum(heights) + 0.55), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    drawn = list(figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0])
    spans = [
        span
        for axes, (name, panel) in zip(drawn, panels.items(), strict=True)
        for span in _draw_panel(axes, panel, f"{name}, ms" if name else "ms")
    ]
    drawn[0].set_title(title, loc="left", size=12, parse_math=False)
    kinds = {span.kind for span in spans}
    patches = [Patch(facecolor=colour, label=label) for label, colour in
               {label: colour for kind, (colour, label) in FILLS.items() if kind in kinds}.items()]  # fmt: skip
    if any(span.chunk for span in spans):
        patches.append(Patch(facecolor=_lighter(FILLS["forward"][0], 1), label="lighter: later chunks"))
    drawn[-1].legend(handles=patches, loc="upper right", bbox_to_anchor=(1, 0), borderaxespad=1.7, ncols=len(patches),
                     frameon=False, handlelength=1, handleheight=1, columnspacing=1.4)  # fmt: skip
    figure.savefig(path)


def _draw_panel(axes: Axes, spans_by_rank: Mapping[int, Sequence[Span]], time_label: str) -> list[Span]:
    """Draw the spans that have a colour, and return them."""
    boxes = [(row, span) for row, spans in enumerate(spans_by_rank.values()) for span in spans if span.kind in FILLS]
    origin = min(span.start_ns for _, span in boxes)
    milliseconds = (max(span.end_ns for _, span in boxes) - origin) / 1e6
    numbered = (*COMPUTE_KINDS, *PHASES)
    fonts = {kind: _font_size([span for _, span in boxes if span.kind == kind], milliseconds) for kind in numbered}
    for row, span in boxes:
        start, length = (span.start_ns - origin) / 1e6, span.seconds * 1e3
        fill = _lighter(FILLS[span.kind][0], span.chunk)
        axes.barh(row, length, left=start, height=0.86, color=fill, edgecolor="white", linewidth=0.8)
        if fonts.get(span.kind, 0) >= SMALLEST_FONT:
            axes.text(start + length / 2, row, str(span.micro_batch), size=fonts[span.kind], color="white",
                      weight="bold", ha="center", va="center_baseline", clip_on=True)  # fmt: skip
    axes.set_yticks(range(len(spans_by_rank)), [f"rank {rank}" for rank in spans_by_rank])
    axes.set_ylim(len(spans_by_rank) - 0.5, -0.5)
    axes.set_xlim(0, milliseconds)
    axes.set_xlabel(time_label, loc="left")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", colors="#555555")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#999999")
    return [span for _, span in boxes]


def accounting_picture(accounting: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw where the time of a step goes: a bar per stage, a mark at the step's time by the other clock.

    Args:
        accounting: as in result.json, one for each stage.
        path: PNG file to write.
        title: one line above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES_WIDE, INCHES_PER_RANK * len(accounting) + 1.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = range(len(accounting))
    ends = [0.0] * len(accounting)
    for part, label in PART_LABELS.items():
        lengths = [stage["seconds"][part] * 1e3 for stage in accounting]
        if any(lengths):
            colour = PART_COLOURS[part]
            edge = "#999999" if part == "pp_wait" else colour
            axes.barh(rows, lengths, left=ends, height=0.7, color=colour, edgecolor=edge, linewidth=0.5, label=label)
            ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    steps = [stage["step_seconds"] * 1e3 for stage in accounting]
    axes.plot(steps, rows, linestyle="none", marker="|", markersize=18, color="black", label="step, by its own clock")
    axes.set_title(title, loc="left", size=12, parse_math=False)
    residuals = [100 * stage["residual_seconds"] / stage["step_seconds"] for stage in accounting]
    labels = [f"stage {row}, residual {residual:+.2f} %" for row, residual in zip(rows, residuals, strict=True)]
    axes.set_yticks(rows, labels)
    axes.set_ylim(len(accounting) - 0.5, -0.5)
    axes.set_xlim(0, 1.02 * max(*steps, *ends))
    axes.set_xlabel("ms of a step")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, handlelength=1, handleheight=1)
    figure.savefig(path)


def _lighter(colour: str, times: int) -> tuple[float, float, float]:
    """A colour, each time a third nearer to white."""
    from matplotlib.colors import to_rgb

    red, green, blue = (1 - (1 - part) * (2 / 3) ** times for part in to_rgb(colour))
    return red, green, blue


def _font_size(spans: Sequence[Span], milliseconds: float) -> float:
    """Points at which the longest micro-batch number fits into the median box."""
    if not spans:
        return 0.0
    digits = len(str(max(span.micro_batch for span in spans)))
    points = median(span.seconds for span in spans) * 1e3 / milliseconds * 0.9 * INCHES_WIDE * 72
    return min(LARGEST_FONT, points / (0.85 * digits))
