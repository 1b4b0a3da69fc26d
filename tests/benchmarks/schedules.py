"""What a schedule gains: its step beside that of 1F1B, in turns.

    python tests/benchmarks/schedules.py [--pairs N] [--schedules a,b] [--emulated] [OVERRIDE ...]

All engines take a step in turn, on the same layers, data and threads: DeepSpeed's own pipeline engine with its own
1F1B, which waits at every transfer, and ours with each schedule. Compared is the wall time of a step, the slowest
rank's, as the median of paired ratios. Busy is what a stage computes in a step (forward and backward, the mean of the
stages), which splitting a backward pass shall not lengthen. The bubble and its causes (`harness.analyse.explain`) are
in per cent of the time from the first forward to the last backward. All are medians over the steps, so the causes add
up to the bubble only nearly. By default two stages compute on two cores. With `--emulated` four stages of two blocks
wait for 15 and 30 ms per block, whose backward pass splits into halves: then the gain of equal passes with free
transfers (`ideally`) is known beforehand.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

REAL = (
    "model=gpt2_tiny", "model.num_hidden_layers=8", "model.hidden_size=512", "model.num_attention_heads=8",
    "model.vocab_size=4096", "model.max_position_embeddings=256", "parallel.pp=2", "data=synthetic",
    "train.sequence_length=256", "train.micro_batch_size=1", "train.global_batch_size=8",
)  # fmt: skip
EMULATED = (
    "model=emulated", "model.num_hidden_layers=8", "model.forward_seconds=0.015", "model.backward_seconds=0.03",
    "parallel.pp=4", "data=synthetic", "train.sequence_length=16", "train.micro_batch_size=1",
    "train.global_batch_size=8", "launch.max_ranks_per_core=8",
)  # fmt: skip
CAUSES = ("ideal", "imbalance", "transfer", "jitter", "host")
"""Of the bubble."""


def main() -> None:
    """Start the ranks and print the table."""
    from benchmarks.circumstances import print_circumstances
    from benchmarks.turns import median_interval
    from distributed import run_ranks
    from helpers import make_config

    from harness.spec.schedules import SCHEDULES, ideal_bubble_overhead_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--schedules", default=",".join(SCHEDULES))
    parser.add_argument("--emulated", action="store_true")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    overrides = [*(EMULATED if arguments.emulated else REAL), *arguments.overrides]
    names = arguments.schedules.split(",")
    configs = {name: make_config(*overrides, f"parallel.schedule={name}") for name in ("1f1b", *names)}
    print_circumstances()
    with tempfile.TemporaryDirectory() as folder:
        case = {"overrides": overrides, "schedules": names, "pairs": arguments.pairs}
        answer = run_ranks(
            configs["1f1b"].parallel.world_size, "benchmarks.schedules", case, Path(folder), timeout=7200
        )
    print(
        "| schedule | step ms | stage busy ms | 1F1B of DeepSpeed / it | 95 % interval | ideally | bubble % "
        f"| {' | '.join(CAUSES)} |\n|---|---:|---:|---:|---:|---:|---:|{'---:|' * len(CAUSES)}"
    )
    stock = answer["stock"]["seconds"]
    print(f"| DeepSpeed's own 1f1b | {median(stock) * 1e3:.1f} | | 1 | | 1 | |{' |' * len(CAUSES)}")
    of_1f1b = ideal_bubble_overhead_of(configs["1f1b"])
    for name in names:
        found = answer[name]
        ratios = [theirs / ours for theirs, ours in zip(stock, found["seconds"], strict=True)]
        low, high = median_interval(ratios)
        overhead = ideal_bubble_overhead_of(configs[name])
        causes = (f"{round(median(of_step[cause] for of_step in found['causes']), 1) + 0:.1f}" for cause in CAUSES)
        print(
            f"| {name} | {median(found['seconds']) * 1e3:.1f} | {median(found['busy']) * 1e3:.1f} "
            f"| {median(ratios):.3f} | {low:.3f}-{high:.3f} | {(1 + of_1f1b) / (1 + overhead):.3f} "
            f"| {100 * median(found['bubble']):.1f} | {' | '.join(causes)} |"
        )


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One rank: a step of each engine in turn."""
    import torch.distributed as dist
    from benchmarks.overhead import build_bare
    from benchmarks.turns import join, take_turns
    from helpers import make_config

    from harness.analyse.explain import explain
    from harness.run.data import micro_batches
    from harness.run.engines.engine import build_engine
    from harness.run.instruments.tracer import Tracer, build_clock
    from harness.spans.span import activity
    from harness.spec.schedules import schedule_of

    rank, machine, plain, device, samples = join(case["overrides"])
    bare, bare_data = build_bare(plain, rank), micro_batches(plain, samples, dp_rank=0)
    steps: dict[str, Callable[[int], Any]] = {"stock": lambda _: float(bare.train_batch(data_iter=bare_data))}
    tracers: dict[str, tuple[Tracer, Any]] = {}

    def step_of(name: str) -> Callable[[int], Any]:
        config = make_config(*case["overrides"], f"parallel.schedule={name}", machine=machine)
        engine, data = build_engine(config, rank), micro_batches(config, samples, dp_rank=0)
        tracer = Tracer(build_clock(device.type))
        tracer.attach(engine)
        tracers[name] = tracer, schedule_of(config)

        def step(_: int) -> None:
            tracer.start_step()
            engine.train_step(data)

        return step

    steps |= {name: step_of(name) for name in case["schedules"]}
    found: dict[str, dict[str, list[Any]]] = {
        name: {"seconds": [], "busy": [], "bubble": [], "causes": []} for name in steps
    }
    pipeline = plain.parallel.topology.pipelines()[0]
    for name, seconds in take_turns(steps, case["pairs"], device):
        found[name]["seconds"].append(seconds)
        if name in tracers:
            tracer, schedule = tracers[name]
            of_ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(of_ranks, tracer.spans(1))
            busy = [activity(spans).busy_seconds for spans in of_ranks]
            found[name]["busy"].append(sum(busy) / len(busy))
            explained = explain([of_ranks[member] for member in pipeline], schedule, has_load=False)
            found[name]["bubble"].append(explained.measured.fraction)
            found[name]["causes"].append(explained.causes_percent)
    return found


if __name__ == "__main__":
    main()
