"""What the tracer costs.

    python tests/benchmarks/tracer_cost.py [--pairs N] [OVERRIDE ...]

Counted: spans of a step x the measured cost of a span, over the step's time. Paired: the same engine with and without
the tracer, taking turns step by step in one start; the median difference with its 95 % interval. And the size of the
span files of 50 steps on 8 ranks.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

LAYOUTS = (("parallel.pp=2",), ("parallel.tp=2",))
LEVELS = ("instructions", "collectives")
RANKS, STEPS = 8, 50


def main() -> None:
    """Start the ranks of each layout and level, and print the table."""
    from benchmarks.circumstances import print_circumstances
    from benchmarks.turns import median_interval
    from distributed import run_ranks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    print_circumstances()
    print("| layout | level | spans of a step | us per span | counted | paired | 95 % interval | 50 steps, 8 ranks |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for layout in LAYOUTS:
        for level in LEVELS:
            case = {"overrides": [*arguments.overrides, *layout], "pairs": arguments.pairs, "level": level}
            with tempfile.TemporaryDirectory() as folder:
                answer = run_ranks(2, "benchmarks.tracer_cost", case, Path(folder))
            counted = answer["num_spans"] * answer["span_seconds"] / answer["step_seconds"]
            low, high = median_interval(answer["differences"])
            print(
                f"| {' '.join(layout)} | {level} | {answer['num_spans']} | {answer['span_seconds'] * 1e6:.2f} "
                f"| {counted:.4%} | {statistics.median(answer['differences']):+.2%} | {low:+.2%} to {high:+.2%} "
                f"| {answer['bytes_per_step'] * STEPS * RANKS / 1e6:.1f} MB |",
                flush=True,
            )


def span_seconds(calls: int = 100_000) -> float:
    """What a tracer adds to an instruction that it observes."""
    from harness.run.engines.engine import Observers
    from harness.run.instruments.tracer import HostClock, Tracer
    from harness.spec.schedules import Instruction

    def nothing() -> None:
        pass

    tracer, instruction = Tracer(HostClock()), Instruction("forward", 0)
    tracer.start_step()
    durations = []
    for observers in (Observers([tracer]), Observers()):
        start = time.perf_counter()
        for _ in range(calls):
            observers.execute(instruction, nothing)
        durations.append(time.perf_counter() - start)
    return (durations[0] - durations[1]) / calls


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One rank: one engine, whose instructions are traced in every other step."""
    import torch.distributed as dist
    from benchmarks.turns import join, take_turns

    from harness.run.data import micro_batches
    from harness.run.engines.engine import build_engine
    from harness.run.instruments.tracer import HostClock, Tracer
    from harness.spans.files import span_lines
    from harness.spans.span import Span

    rank, _, config, device, samples = join(case["overrides"])
    engine = build_engine(config, rank)
    data = micro_batches(config, samples, dp_rank=0)
    bare = list(engine.observers), list(engine.tp.parts.observers)
    tracer = Tracer(HostClock(), nested=case["level"] == "collectives")
    tracer.attach(engine)
    traced = list(engine.observers), list(engine.tp.parts.observers)
    spans: list[Span] = []

    def traced_step(step: int) -> None:
        engine.observers[:], engine.tp.parts.observers[:] = traced
        tracer.start_step()
        engine.train_step(data)
        spans[:] = tracer.spans(step)

    def bare_step(_: int) -> None:
        engine.observers[:], engine.tp.parts.observers[:] = bare
        engine.train_step(data)

    steps = {"traced": traced_step, "bare": bare_step}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name, elapsed in take_turns(steps, case["pairs"], device):
        seconds[name].append(elapsed)
    largest: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(largest, (len(spans), sum(map(len, span_lines(spans)))))
    return {
        "differences": [with_it / bare - 1 for with_it, bare in zip(seconds["traced"], seconds["bare"], strict=True)],
        "step_seconds": statistics.median(seconds["bare"]),
        "num_spans": max(count for count, _ in largest),
        "bytes_per_step": max(size for _, size in largest),
        "span_seconds": span_seconds() if rank == 0 else None,
    }


if __name__ == "__main__":
    main()
