"""What oneDNN gains for fp32 products on this processor: those of each shape of weight, and a step of one rank.

    python tests/benchmarks/products.py [--pairs N] [OVERRIDE ...]

Both libraries take turns for all products, also those that are too small to gain, on one thread and the model of
peers.py unless overrides say otherwise: for the forward product of each shape of weight and the products for the
gradients of its input and of the weight, for whole steps of an engine, and for a linear map of several sizes with its
backward pass: from which size on does it pay (`WORTHWHILE_FLOP` of harness/model/products.py)? Compared are seconds, as
the median of paired ratios with its 95 % interval. Then, by torch.profiler, the operations that a step with oneDNN
consists of.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from math import log2
from pathlib import Path
from statistics import median
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

LIBRARIES = {"torch": False, "onednn": True}
"""By name, what `use_onednn` is told."""
FEW_ROWS, WIDTHS, TIMES = 128, (64, 96, 128, 160, 192, 256, 384), 20
"""Linear maps, each that often in a turn."""
LEAST_SHARE = 0.005
"""Of a step, for an operation to be listed."""


def main() -> None:
    """Start the rank and print the table."""
    from benchmarks.circumstances import print_circumstances
    from benchmarks.turns import median_interval
    from distributed import run_ranks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    print_circumstances()
    case = {"overrides": arguments.overrides, "pairs": arguments.pairs}
    with tempfile.TemporaryDirectory() as folder:
        answer = run_ranks(1, "benchmarks.products", case, Path(folder), timeout=3600)
    print("| what | torch ms | onednn ms | torch GFLOP/s | onednn GFLOP/s | torch / onednn | 95 % interval |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for what, flop, seconds in answer["measured"]:
        ratios = [usual / other for usual, other in zip(*seconds.values(), strict=True)]
        low, high = median_interval(ratios)
        medians = [median(taken) for taken in seconds.values()]
        times = " | ".join(f"{1e3 * taken:.3f}" for taken in medians)
        rates = " | ".join(f"{flop / taken / 1e9:.0f}" for taken in medians)
        print(f"| {what} | {times} | {rates} | {median(ratios):.3f} | {low:.3f}-{high:.3f} |")
    print("\n| operation | % of a step |\n|---|---:|")
    for operation, share in answer["shares"].items():
        print(f"| {operation} | {100 * share:.1f} |")


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The rank: what was measured, its floating-point operations and the seconds by library; shares of a step."""
    import torch
    from benchmarks.peers import MODEL
    from benchmarks.turns import join, take_turns
    from torch.profiler import ProfilerActivity, profile

    from harness.model.products import product, use_onednn
    from harness.model.weight_gradients import linear
    from harness.run.data import micro_batches
    from harness.run.engines.engine import build_engine
    from harness.spec.counts import training_flops_per_token

    rank, _, config, device, samples = join([*MODEL, *case["overrides"]])
    engine = build_engine(config, rank)
    train = config.train
    rows = train.micro_batch_size * train.sequence_length
    shapes = {
        tuple(weight.shape) for name, weight in engine.parameters() if weight.dim() == 2 and "position" not in name
    }
    measured: list[tuple[str, float, Callable[[], Any]]] = []
    for outputs, inputs in sorted(shapes):
        hidden, weight, gradient = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
        for what, left, right in (
            ("output", hidden, weight),
            ("gradient of the input", gradient, weight.t()),
            ("gradient of the weight", gradient.t(), hidden.t()),
        ):
            multiply = partial(product, left, right)
            measured.append((f"{what}, {rows} rows, {inputs} -> {outputs}", 2.0 * rows * inputs * outputs, multiply))
    flop = (
        training_flops_per_token(config.model, train.sequence_length) * train.global_batch_size * train.sequence_length
    )
    data = micro_batches(config, samples, dp_rank=0)
    measured.append(("step", flop, partial(engine.train_step, data)))

    def pass_often(hidden: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        for _ in range(TIMES):
            torch.autograd.grad(linear(hidden, weight, None, None), (hidden, weight), gradient)

    for width in WIDTHS:
        hidden, weight = (torch.randn(size, width, requires_grad=True) for size in (FEW_ROWS, width))
        flop_of_one = 2.0 * FEW_ROWS * width**2
        passes = partial(pass_often, hidden, weight, torch.randn(FEW_ROWS, width))
        what = f"{TIMES} linear maps with backward, {FEW_ROWS} rows, {width} -> {width}: 2^{log2(flop_of_one):.1f} FLOP"
        measured.append((what, 3 * TIMES * flop_of_one, passes))

    found = []
    for what, operations, act in measured:
        seconds: dict[str, list[float]] = {name: [] for name in LIBRARIES}

        def by(wanted: bool, act: Callable[[], Any], _: int) -> None:
            use_onednn(wanted)
            act()

        steps: dict[str, Callable[[int], Any]] = {name: partial(by, wanted, act) for name, wanted in LIBRARIES.items()}
        for name, taken in take_turns(steps, case["pairs"], device):
            seconds[name].append(taken)
        found.append((what, operations, seconds))
    use_onednn(True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        engine.train_step(data)
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    shares = {operation: taken / sum(times.values()) for operation, taken in times.items()}
    largest = sorted(((share, operation) for operation, share in shares.items() if share >= LEAST_SHARE), reverse=True)
    rest = 1 - sum(share for share, _ in largest)
    return {"measured": found, "shares": {operation: share for share, operation in largest} | {"all others": rest}}


if __name__ == "__main__":
    main()
