"""The measured bubble beside a known truth: emulated stages that wait for set times in DeepSpeed's real engine.

    python tests/benchmarks/known_truth.py [--normal-priority] [--schedules]

For p stages and m micro-batches of 30 ms forward and 60 ms backward it prints the bubble fraction that the formula
gives, that the simulator gives for the measured durations, and that was measured: in the fastest of the timed steps,
and the median of them, as rows of results.csv report it. Then a stage that is half as fast and a link that is slow
(whose messages leave late, below the tracer): idle time per stage and step that they cause, as set and as the
explanation of the bubble finds it. One start of p ranks for each p. `--schedules` measures every schedule with every p
and m instead, which takes eight minutes.

How far may the measured bubble be from the set one on the machine at hand, which takes time of its own for
instructions and transfers? A step is as long as the longest path through its instructions, and a longest path grows by
at most as much as the longest path of what is added. So what the machine adds to a step of short waits, by the clock
of the waits and without any span, is the most that it adds to one of long waits: `bounds`.

The ranks hardly compute, and what else goes on in the machine only adds time. Where that is permitted, and unless
`--normal-priority` is given, they run with real-time priority. The cases take turns step by step, so that a
disturbance of some seconds spares most steps of each.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from harness.spec.schedules import SCHEDULES, Schedule, build_schedule, check_sizes  # noqa: E402

FORWARD_SECONDS, BACKWARD_SECONDS = 0.03, 0.06
LOADING_SECONDS = 0.06
"""Wait of the first stage for the first micro-batch of a step: before the first forward, so not in the bubble."""
SHORT = 0.2
"""Share of the waits in the steps that tell what the machine adds."""
SCALES = [SHORT, *[1.0, SHORT] * 5]
"""Of the waits, step by step; the first step is not timed."""
STAGES = (2, 4, 8)
SLOW_STAGE, SLOW_LINK = 2, 1
"""The slow stage, and the one whose sends to the next are slow."""
SLOW_FACTOR, SLOW_LINK_SECONDS, SLOW_HOST_SECONDS = 2.0, 0.04, 0.002


@dataclass(frozen=True)
class Case:
    """What is emulated."""

    p: int
    m: int
    slow_stage: bool = False
    slow_link: bool = False
    slow_host: bool = False
    """Every instruction keeps the processor for `SLOW_HOST_SECONDS` more, as that of a slower machine would."""
    schedule: str = "1f1b"
    """A stage's waits are shared by its chunks, and those of a split backward pass by its halves."""

    @property
    def factors(self) -> list[float]:
        """Of the stages' waits."""
        return [SLOW_FACTOR if self.slow_stage and stage == SLOW_STAGE else 1.0 for stage in range(self.p)]

    @property
    def built(self) -> Schedule:
        """Its instructions."""
        return build_schedule(self.schedule, self.p, self.m)

    @property
    def undisturbed(self) -> Case:
        """The same without a slow stage or link."""
        return replace(self, slow_stage=False, slow_link=False)

    @property
    def overrides(self) -> list[str]:
        """Configuration."""
        chunks = self.built.num_chunks
        return [
            "model=emulated", f"model.num_hidden_layers={self.p * chunks}", f"model.stage_factors={self.factors}",
            f"model.forward_seconds={FORWARD_SECONDS / chunks}", f"model.backward_seconds={BACKWARD_SECONDS / chunks}",
            f"parallel.pp={self.p}", f"parallel.schedule={self.schedule}",
            "data=synthetic", "train.sequence_length=16", f"train.global_batch_size={self.m}",
            f"train.steps={len(SCALES)}", "train.warmup_steps=1",
        ]  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """What a launch found for a case."""

    bubble: dict[str, Any]
    """As in result.json, of the fastest step."""
    accounting: list[dict[str, Any]]
    """As in result.json, of the fastest step."""
    link_seconds: list[float]
    """Mean time of a send of activations by stage, in the fastest step."""
    median_fraction: float
    """Of the bubble in metrics.jsonl, over the timed steps, as rows report it."""
    waits_fraction: float
    """Median over the same steps of the bubble fraction between and around the waits, by their own clock."""
    excess_seconds: float
    """How much longer than the set waits a step of short ones takes, by their own clock: the median."""


def cases(p: int) -> list[Case]:
    """What one start of p ranks measures."""
    equal = [Case(p, m) for m in (p, 2 * p, 4 * p)]
    unequal = [Case(p, 2 * p, slow_stage=True), Case(p, 2 * p, slow_link=True), Case(p, p, slow_host=True)]
    return [*equal, *unequal, *cases_of_schedules(p, [2 * p])] if p == 4 else equal


def cases_of_schedules(p: int, numbers: Sequence[int]) -> list[Case]:
    """Every schedule but 1F1B with so many micro-batches, where it takes them."""
    found = []
    for schedule, m in product(SCHEDULES, numbers):
        with contextlib.suppress(ValueError):
            check_sizes(schedule, p, m)
            found += [Case(p, m, schedule=schedule)] if schedule != "1f1b" else []
    return found


def measure(
    p: int, folder: Path, normal_priority: bool = False, measured: Sequence[Case] | None = None
) -> dict[Case, Measured]:
    """Cases of p stages, in one start of p ranks; those of `cases` where none are given."""
    from distributed import run_ranks

    measured = cases(p) if measured is None else measured
    argument = {"cases": [asdict(case) for case in measured], "normal_priority": normal_priority}
    answers = run_ranks(p, "benchmarks.known_truth", argument, folder, timeout=3600)
    return {case: Measured(**answer) for case, answer in zip(measured, answers, strict=True)}


def set_seconds(case: Case) -> tuple[float, float]:
    """By the set times alone: T from the first forward to the last backward, and the mean busy time of a stage."""
    from harness.plan.simulate import simulate

    halves = {"forward": FORWARD_SECONDS, "backward": BACKWARD_SECONDS}
    seconds = {
        **{
            kind: [halves.get(kind, BACKWARD_SECONDS / 2) * factor for factor in case.factors]
            for kind in case.built.computes
        },
        "send_activation": [SLOW_LINK_SECONDS * (case.slow_link and stage == SLOW_LINK) for stage in range(case.p)],
    }
    stages = simulate(case.built, seconds)
    busy = case.m * (FORWARD_SECONDS + BACKWARD_SECONDS) * sum(case.factors) / case.p
    return max(span.end_ns for spans in stages for span in spans if span.micro_batch >= 0) / 1e9, busy


def bounds(case: Case, excess_seconds: float) -> tuple[float, float]:
    """Between which fractions the bubble must be on a machine that adds so much to a step."""
    total, busy = set_seconds(case)
    return 1 - busy / total, 1 - busy / (total + excess_seconds)


def injected_seconds(case: Case) -> float:
    """Idle seconds per stage and step that a case's slow stage or link causes, by the set times alone."""
    total, busy = set_seconds(case)
    return total - busy - busy * (case.p - 1) / case.m


def found_seconds(case: Case, measured: dict[Case, Measured]) -> float:
    """What the explanation of a measured bubble finds of `injected_seconds`, beyond a run without."""
    cause = "imbalance" if case.slow_stage else "transfer"
    disturbed, without = (measured[which].bubble["causes_seconds"][cause] for which in (case, case.undisturbed))
    return float(disturbed - without)


def main() -> None:
    """Print the tables in Markdown."""
    from benchmarks.circumstances import print_circumstances

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--normal-priority", action="store_true", help="without real-time priority")
    parser.add_argument("--schedules", action="store_true", help="every schedule with every p and m")
    arguments = parser.parse_args()
    print_circumstances()
    measured: dict[Case, Measured] = {}
    for p in STAGES:
        with tempfile.TemporaryDirectory() as folder:
            of_schedules = cases_of_schedules(p, [p, 2 * p, 4 * p]) if arguments.schedules else None
            measured |= measure(p, Path(folder), arguments.normal_priority, of_schedules)
    if arguments.schedules:
        print_schedules(measured)
        return
    print("| stages p | micro-batches m | ideal | simulated | fastest step | median step | machine ms | at most |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for case, found in measured.items():
        if not (case.slow_stage or case.slow_link) and case.schedule == "1f1b":
            stages = f"{case.p}, each instruction {SLOW_HOST_SECONDS * 1e3:.0f} ms longer" if case.slow_host else case.p
            fractions = [found.bubble[key]["fraction"] for key in ("ideal", "simulated", "measured")]
            columns = " | ".join(f"{fraction:.3f}" for fraction in [*fractions, found.median_fraction])
            excess, most = found.excess_seconds, bounds(case, found.excess_seconds)[1]
            print(f"| {stages} | {case.m} | {columns} | {excess * 1e3:.1f} | {most:.3f} |")
    print("\n| injected (p, m) | cause | idle ms per stage and step, as set | as found |\n|---|---|---:|---:|")
    for case in measured:
        if case.slow_stage or case.slow_link:
            what, cause = ("slow stage", "imbalance") if case.slow_stage else ("slow link", "transfer")
            injected, found_ms = injected_seconds(case) * 1e3, found_seconds(case, measured) * 1e3
            print(f"| {what} ({case.p}, {case.m}) | {cause} | {injected:.1f} | {found_ms:.1f} |")


def print_schedules(measured: dict[Case, Measured]) -> None:
    """A row per schedule, p and m."""
    print("| schedule | stages p | micro-batches m | as set | simulated | fastest step | median step | at most |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for case, found in measured.items():
        least, most = bounds(case, found.excess_seconds)
        fractions = [least, *(found.bubble[key]["fraction"] for key in ("simulated", "measured"))]
        columns = " | ".join(f"{fraction:.3f}" for fraction in [*fractions, found.median_fraction, most])
        print(f"| {case.schedule} | {case.p} | {case.m} | {columns} |")


class LateSend:
    """A send that begins after some time, while its stage goes on."""

    def __init__(self, send: Callable[[], Any], seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._begin)
        self._send = send
        self._timer.start()

    def _begin(self) -> None:
        self._work = self._send()

    def wait(self) -> None:
        """Until the tensor has left."""
        self._timer.join()
        self._work.wait()


class Waits:
    """The waits of one rank: of its blocks, its data and its link, as long as is set, and when the blocks' were."""

    def __init__(self, rank: int) -> None:
        """Put them into the emulated blocks and the sends of this process."""
        from harness.model.emulated import EmulatedBlock
        from harness.run.engines.deepspeed.transfers import Channels

        self.rank, self._wait, self._send = rank, EmulatedBlock._wait, Channels.send
        self._link_seconds = 0.0
        EmulatedBlock._wait = lambda block, seconds: self._noted(block, seconds)  # type: ignore[assignment,method-assign]
        Channels.send = lambda *arguments: self._send_late(*arguments)  # type: ignore[method-assign]

    def start_step(self, case: Case, scale: float) -> None:
        """Waits from now on are those of the case times `scale`."""
        self._case, self._scale = case, scale
        self._link_seconds = SLOW_LINK_SECONDS * scale if case.slow_link and self.rank == SLOW_LINK else 0.0
        self._moments: list[tuple[int, int]] = []

    def late(self, data: Iterator[Any], case: Case) -> Iterator[Any]:
        """Micro-batches of which the first of each step is late."""
        for number, micro_batch in enumerate(data):
            if number % case.m == 0 and self.rank == 0:
                time.sleep(LOADING_SECONDS * self._scale)
            yield micro_batch

    def window(self) -> tuple[float, float]:
        """Since `start_step`: seconds from the first wait to the end of the last of all ranks, and in waits (mean)."""
        import torch
        import torch.distributed as dist

        ends = torch.tensor([-self._moments[0][0], self._moments[-1][1]])
        busy = torch.tensor(sum(end - start for start, end in self._moments))
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        dist.all_reduce(busy)
        return int(ends.sum()) / 1e9, int(busy) / 1e9 / self._case.p

    def _noted(self, block: Any, seconds: float) -> None:
        start = time.monotonic_ns()
        self._wait(block, seconds * self._scale)
        self._moments.append((start, time.monotonic_ns()))

    def _send_late(self, channels: Any, tensor: Any, lane: Any, stage: int) -> Any:
        send = partial(self._send, channels, tensor, lane, stage)
        is_late = self._link_seconds > 0 and stage > self.rank  # one rank is one stage
        return LateSend(send, self._link_seconds) if is_late else send()


def work_a_while() -> None:
    """What an instruction takes more of the processor."""
    end = time.thread_time() + SLOW_HOST_SECONDS
    while time.thread_time() < end:
        pass


def run(argument: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """One rank: a step of each case in turn."""
    import torch
    from helpers import make_config

    from harness.record.store import Attempt
    from harness.run.data import CorpusSamples, micro_batches
    from harness.run.engines.deepspeed.join import initialize_distributed
    from harness.run.engines.engine import Before, build_engine
    from harness.run.instruments.tracer import HostClock, Tracer
    from harness.run.loop import Loop
    from harness.run.tasks.train import share_corpus
    from harness.spans.span import KINDS

    if not argument["normal_priority"]:
        with contextlib.suppress(PermissionError):  # for this thread and those it starts from now on
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    initialize_distributed()
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    waits = Waits(rank)
    runs: list[tuple[Case, Attempt, Loop, Iterator[Any]]] = []
    for number, fields in enumerate(argument["cases"]):
        case = Case(**fields)
        config = make_config(*case.overrides)
        attempt = Attempt(folder / f"attempt-{number}")
        attempt.path.mkdir(exist_ok=True)
        engine = build_engine(config, rank)
        if case.slow_host:
            for kind in KINDS:
                engine.observers.append(Before(kind, work_a_while))
        tracer = Tracer(HostClock(), nested=True)
        tracer.attach(engine)
        data = micro_batches(config, CorpusSamples(config, share_corpus(config, rank)), dp_rank=0)
        loop = Loop(attempt, config, rank, engine, tracer, torch.device("cpu"))
        runs.append((case, attempt, loop, waits.late(data, case)))
    windows: dict[Case, list[tuple[float, float]]] = {case: [] for case, *_ in runs}
    for step, scale in enumerate(SCALES, start=1):
        for case, _, loop, data in runs:
            waits.start_step(case, scale)
            loop.step(step, data)
            windows[case].append(waits.window())
    for *_, loop, _ in runs:
        loop.close()
    torch.distributed.barrier()  # all files are whole
    return [asdict(read_measured(case, attempt, windows[case])) for case, attempt, *_ in runs if rank == 0]


def read_measured(case: Case, attempt: Any, windows: list[tuple[float, float]]) -> Measured:
    """What the files of a case hold, beside the window of each step."""
    from helpers import make_config

    from harness.analyse.breakdown import breakdown, read_run
    from harness.analyse.explain import durations
    from harness.record.store import read_jsonl

    run = read_run(attempt, make_config(*case.overrides))
    timed = [step for step in run.timed_steps if SCALES[step - 1] == 1]
    fastest = min(timed, key=run.files[0].step_seconds().__getitem__)
    sends = durations([file.instructions(fastest) for file in run.files], run.schedule)["send_activation"]
    explained = breakdown(replace(run, timed_steps=[fastest]))
    reported = {int(line["step"]): line["perf/bubble_fraction"] for line in read_jsonl(attempt.metrics_file)}
    short = [total for (total, _), scale in list(zip(windows, SCALES, strict=True))[1:] if scale == SHORT]
    return Measured(
        bubble=explained["bubble"],
        accounting=explained["accounting"],
        link_seconds=sends.mean(axis=(1, 2)).tolist(),
        median_fraction=median(reported[step] for step in timed),
        waits_fraction=median(1 - windows[step - 1][1] / windows[step - 1][0] for step in timed),
        excess_seconds=median(short) - SHORT * set_seconds(case)[0],
    )


if __name__ == "__main__":
    main()
