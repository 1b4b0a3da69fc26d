"""What finishes a run: time limits, by a clock of our own (`test_mirror` and `test_breakdown` have real children), and
the pictures of inference; those of training are in `test_breakdown`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy
import pytest
from helpers import record_inference
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from harness.analyse import finish
from harness.analyse.finish import PICTURES_SECONDS, Child, Finishing, write_pictures
from harness.analyse.rings import MOST_PASSES, first_passes
from harness.plan.simulate import simulate
from harness.record.plots import FILLS
from harness.record.store import Attempt, SweepDirectory
from harness.spans.clock import ClockOffset
from harness.spans.files import SpanFile, SpanWriter, read_spans
from harness.spans.perfetto import trace_problems
from harness.spans.span import Span
from harness.spec.batching import Batcher, Phase
from harness.spec.ring import ring_schedule

MS = 1_000_000


class Clock:
    """The time, which passes as children are waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.killed: list[int] = []
        monkeypatch.setattr(finish, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(finish.os, "killpg", lambda pid, _: self.killed.append(pid))

    def child(self, folder: Path, pid: int, seconds: float) -> Child:
        """A process that ends at so many seconds."""

        def wait(timeout: float | None = None) -> int:
            if timeout is None or pid in self.killed:
                return 0
            if self.now + timeout < seconds:
                self.now += timeout
                raise subprocess.TimeoutExpired("child", timeout)
            self.now = max(self.now, seconds)
            return 0

        path = folder / str(pid)
        path.mkdir()
        return Child(cast(Any, SimpleNamespace(pid=pid, wait=wait)), [path])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_all_mirrors_share_one_limit(clock: Clock, tmp_path: Path) -> None:
    begun = [Finishing(mirror=clock.child(tmp_path, pid, seconds)) for pid, seconds in ((1, 4), (2, 99), (3, 10.5))]
    warnings = finish.finish(begun, wandb_seconds=10)
    assert warnings == ["wandb is not complete (not done in 10 s); report.py --wandb writes what it lacks"] * 2
    assert (clock.now, clock.killed) == (10, [2, 3])


def test_pictures_of_each_run_have_a_limit_of_their_own(clock: Clock, tmp_path: Path) -> None:
    late = PICTURES_SECONDS + 1
    begun = [
        Finishing(pictures=clock.child(tmp_path, pid, seconds)) for pid, seconds in ((1, late), (2, late), (3, 1e9))
    ]
    names = [f"{tmp_path.name}/{pid}: no pictures within {PICTURES_SECONDS:g} s" for pid in (1, 3)]
    assert finish.finish(begun, wandb_seconds=0) == names
    assert (clock.now, clock.killed) == (late + PICTURES_SECONDS, [1, 3])


def test_pictures_are_waited_for_after_mirrors(clock: Clock, tmp_path: Path) -> None:
    begun = [Finishing(clock.child(tmp_path, 1, 99), clock.child(tmp_path, 2, 50))]
    assert len(finish.finish(begun, wandb_seconds=10)) == 1
    assert (clock.now, clock.killed) == (50, [1])


def test_a_late_child_ends_with_its_children(tmp_path: Path) -> None:
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout
    grandchild = Path("/proc") / process.stdout.readline().decode().strip()
    assert finish.finish([Finishing(mirror=Child(process, [tmp_path]))], wandb_seconds=0) != []
    deadline = time.monotonic() + 20
    while grandchild.exists() and (grandchild / "stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def write_ring(attempt: Attempt, rounds: int, steps: int = 2, tp: int = 2) -> None:
    """Span files of two stages of tp ranks, and two groups: 2 prefill passes, then `rounds` tokens of each group."""
    writers = []
    for rank in range(2 * tp):
        header = {"rank": rank, "pp": rank // tp, "dp": 0, "tp": rank % tp}
        writers.append(SpanWriter(attempt.spans_file(rank), header, ClockOffset(0, 0, 0)))
    passes, now = 0, 0
    for step in range(1, steps + 1):
        batcher = Batcher([4, 4], [rounds + 1] * 2, 2, 2, first=passes)
        batcher.offer(range(2))
        phases: tuple[Phase, ...] = ("prefill", "decode")
        for phase in phases:
            batcher.phases = frozenset([phase])
            schedule, works = ring_schedule(batcher, 2)
            begins, end = works[0].number, now
            seconds = {"forward": 0.02 if phase == "prefill" else 0.01, "send_activation": 0.001, "send_tokens": 0.001}
            for stage, spans in enumerate(simulate(schedule, seconds)):
                moved = [
                    span._replace(step=step, micro_batch=span.micro_batch + begins, start_ns=span.start_ns + now,
                                  end_ns=span.end_ns + now)
                    for span in spans
                ]  # fmt: skip
                end = max(end, *(span.end_ns for span in moved))
                for writer in writers[stage * tp : (stage + 1) * tp]:
                    writer.write(moved)
            for writer in writers:
                writer.write([Span(step, phase, -1, now, end + MS)])
            passes, now = begins + len(works), end + 2 * MS
    for writer in writers:
        writer.close(ClockOffset(0, 0, 0))


@pytest.fixture
def generated(tmp_path: Path) -> Attempt:
    sweep = SweepDirectory(tmp_path, "grid")
    overrides = ("parallel.tp=2", "parallel.pp=2", "generate.batch_size=2", "tracking.trace_steps=[2]")
    return record_inference(sweep, *overrides, seconds=[0.4, 0.5])


def test_a_picture_shows_prefill_and_the_first_rounds_of_decode(generated: Attempt) -> None:
    write_ring(generated, rounds=20)
    assert write_pictures(generated) == []
    assert not (generated.path / "accounting.png").exists()
    pixels = numpy.asarray(imread(generated.path / "timeline.png"))[:, :, :3]
    rows = {
        phase: numpy.flatnonzero((numpy.abs(pixels - to_rgb(FILLS[phase][0])).max(axis=2) < 0.01).mean(axis=1) > 0.3)
        for phase in ("prefill", "decode")
    }
    assert rows["prefill"].max() < rows["decode"].min()  # one above the other
    files = [read_spans(generated.spans_file(rank)) for rank in range(4)]
    panels = first_passes(files, step=2)
    assert list(panels) == ["prefill", f"decode, the first {MOST_PASSES} of 40 passes"]
    prefill, decode = panels.values()
    assert [span.micro_batch for span in prefill[3]] == [0, 1]
    assert [span.micro_batch for span in decode[3]] == list(range(2, 2 + MOST_PASSES))
    assert {span.kind for spans in decode.values() for span in spans} == {"decode"}


def test_a_trace_of_inference_has_an_arrow_for_every_message(generated: Attempt) -> None:
    write_ring(generated, rounds=3)
    assert write_pictures(generated) == []
    trace = json.loads((generated.path / "trace.json").read_text())
    assert trace_problems(trace) == []
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {event["args"]["step"] for event in slices} == {2}
    assert {event["name"] for event in slices}.isdisjoint(("prefill", "decode"))
    begins = [event["pid"] for event in trace["traceEvents"] if event["ph"] == "s"]
    ends = [event["pid"] for event in trace["traceEvents"] if event["ph"] == "f"]
    arrows = [*zip(begins, ends, strict=True)]
    # Activations of 2 + 6 passes for each of two tensor-parallel ranks; tokens go back between the first of them.
    assert {arrow: arrows.count(arrow) for arrow in set(arrows)} == {(1, 3): 8, (2, 4): 8, (3, 1): 8}


def test_steps_that_left_no_spans_are_named(generated: Attempt) -> None:
    write_ring(generated, rounds=3, steps=1)
    assert write_pictures(generated) == ["step 2 left no spans"]
    assert (generated.path / "timeline.png").exists()
    assert not (generated.path / "trace.json").exists()


def test_a_step_without_phases_is_one_panel() -> None:
    spans = [Span(5, "forward", number, number * MS, (number + 1) * MS) for number in range(7, 10)]
    files = [SpanFile({"rank": 0, "pp": 0, "dp": 0, "tp": 0}, [*spans, Span(5, "step", -1, 0, 99 * MS)])]
    assert first_passes(files, 5) == {"": {0: [span._replace(micro_batch=span.micro_batch - 7) for span in spans]}}
    assert files[0].step_seconds() == {5: pytest.approx(0.099)}
