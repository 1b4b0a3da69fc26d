"""What the ranks of an inference did, from their span files: for its picture, and for its trace."""

from __future__ import annotations

from collections.abc import Sequence

from harness.spans.files import SpanFile
from harness.spans.span import KINDS, Span
from harness.spec.schedules import Instruction

MOST_PASSES = 24
"""Of a phase, in a picture: more can't be told apart."""


def ring_orders(line: Sequence[SpanFile]) -> list[list[Instruction]]:
    """What every stage did, in order, with who was at the other end of each message.

    Args:
        line: the files of the first tensor-parallel rank of every stage: they carry the messages.
    """
    last = len(line) - 1

    def peer(kind: str, stage: int) -> int:
        others = {"send_activation": stage + 1, "recv_activation": stage - 1, "send_tokens": 0, "recv_tokens": last}
        return others.get(kind, -1)

    return [
        [Instruction(s.kind, s.micro_batch, s.chunk, peer(s.kind, stage)) for s in file.spans if s.kind in KINDS]
        for stage, file in enumerate(line)
    ]


def without_hearing(file: SpanFile) -> SpanFile:
    """The same, where the other ranks of the first stage receive no tokens, but hear from rank 0 what begins."""
    if not file.header or file.header["tp"] == 0:
        return file
    return file._replace(spans=[s._replace(kind="hear") if s.kind == "recv_tokens" else s for s in file.spans])


def first_passes(files: Sequence[SpanFile], step: int) -> dict[str, dict[int, list[Span]]]:
    """The forward passes that a picture of a step shows, by what each panel shows and by rank: the first of each phase.

    They are numbered from 0 in the step, and of the kind of their phase, if it has one.
    """
    numbers = [span.micro_batch for span in files[0].instructions(step) if span.kind == "forward"]
    panels = {}
    for phase, spans in files[0].phases(step).items():
        passes = sorted(span.micro_batch for span in spans if span.kind == "forward")
        shown = passes[:MOST_PASSES]
        if not shown:
            continue
        part = f"the first {MOST_PASSES} of {len(passes)} passes" if len(passes) > MOST_PASSES else ""
        panels[", ".join(filter(None, (phase, part)))] = {
            rank: [
                span._replace(kind=phase or span.kind, micro_batch=span.micro_batch - min(numbers))
                for span in file.phases(step).get(phase, ())
                if span.kind == "forward" and span.micro_batch <= shown[-1]
            ]
            for rank, file in enumerate(files)
        }
    return panels
