"""Is it as fast as what torch ships? The harness's step beside that of torch's own engines, in turns.

    python tests/benchmarks/peers.py [--pairs N] [--rows ROW,...] [OVERRIDE ...]

All engines take a step in turn, in the same processes, on the same shape, data, optimizer and threads, in rotating
order; compared is the wall time of a step, the slowest rank's, as the median of paired ratios with its 95 % interval.
Where both sides compute the same layers, pairs are divided among eight launches: how an engine's memory lies in one of
them makes a percent.

- one_rank: the model's matrix products per second over the rate of large square ones by torch.mm, which take turns
  with the steps.
- one_rank_product: the same over the rate of large ones by oneDNN, where layers take that (`harness.model.products`).
- pp: the fastest of our schedules beside the fastest of torch.distributed.pipelining's (GPipe, 1F1B, interleaved,
  ZBV), two stages.
- tp: beside a model of the same shape under DTensor's `parallelize_module`, two ranks. Its products are torch's; the
  other peers have our layers, and so oneDNN's where we have.
- tp_torch_products: the same with `model.onednn=false`, so that both compute with one library.
- dp: beside DistributedDataParallel, two replicas.
- tail: the share of the quickstart's step after its last backward pass, two stages.
- quickstart: seconds of the whole sweep in a folder of its own, the installation left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

MODEL = (
    "model=gpt2_tiny", "model.num_hidden_layers=8", "model.hidden_size=512", "model.num_attention_heads=8",
    "model.vocab_size=4096", "model.max_position_embeddings=256", "data=synthetic", "train.sequence_length=256",
    "train.micro_batch_size=1", "train.global_batch_size=8", "launch.threads_per_rank=1",
)  # fmt: skip
PRODUCT_SIZE = 1024
"""Of square matrices, near the best rate of every CPU that was looked at."""


class Row(NamedTuple):
    """One line of the table."""

    layout: tuple[str, ...]
    ours: tuple[str, ...]
    """Overrides of each of our engines, of which the fastest counts."""
    peers: tuple[str, ...]
    at_least: float
    goal: float
    launches: int = 1
    """Among which the pairs are divided."""


ROWS = {
    "one_rank": Row((*MODEL,), ("",), ("torch.mm",), 0.80, 0.90),
    "one_rank_product": Row((*MODEL,), ("",), ("product",), 0.80, 0.90),
    "pp": Row(
        (*MODEL, "parallel.pp=2"),
        tuple(f"parallel.schedule={name}" for name in ("1f1b", "zb_h1", "zb_v", "interleaved")),
        tuple(f"parallel.engine=torch parallel.schedule={name}" for name in ("gpipe", "1f1b", "interleaved", "zb_v")),
        1.00,
        1.10,
        launches=8,
    ),
    "tp": Row((*MODEL, "parallel.tp=2"), ("",), ("parallel.engine=dtensor",), 1.50, 1.75),
    "tp_torch_products": Row(
        (*MODEL, "parallel.tp=2", "model.onednn=false"), ("",), ("parallel.engine=dtensor",), 1.50, 1.75
    ),
    "dp": Row(
        (*MODEL, "train.global_batch_size=16", "parallel.dp=2"), ("",), ("parallel.engine=ddp",), 1.00, 1.05, launches=8
    ),
    "tail": Row(("parallel.pp=2",), ("",), (), 0.05, 0.02),
}
QUICKSTART_SECONDS = 180


def main() -> None:
    """Start the ranks of each row and print the table."""
    from benchmarks.circumstances import print_circumstances
    from benchmarks.turns import median_interval

    from harness.model.products import IS_ONEDNN_FASTER

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--rows", default=",".join([*ROWS, "quickstart"]))
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    print_circumstances()
    print("| row | ours | ms | peer | ms | ratio | 95 % interval | at least | goal |")
    print("|---|---|---:|---|---:|---:|---:|---:|---:|")
    for name in arguments.rows.split(","):
        if name == "one_rank_product" and not IS_ONEDNN_FASTER:
            continue
        if name == "quickstart":
            print(f"| quickstart | | {1e3 * quickstart_seconds():,.0f} | | | | | at most {QUICKSTART_SECONDS} s | |")
            continue
        row, answer = ROWS[name], launch(name, arguments.pairs, arguments.overrides)
        ours = min(row.ours, key=lambda variant: median(answer[variant]["seconds"]))
        found = answer[ours]
        if not row.peers:
            ratios = [tail / step for tail, step in zip(found["tail"], found["seconds"], strict=True)]
            peer, peer_ms = "after the last backward", 1e3 * median(found["tail"])
        else:
            peer = min(row.peers, key=lambda variant: median(answer[variant]["seconds"]))
            theirs, peer_ms = answer[peer]["seconds"], 1e3 * median(answer[peer]["seconds"])
            ratios = [their / our for their, our in zip(theirs, found["seconds"], strict=True)]
        low, high = median_interval(ratios)
        limit = f"{row.at_least:.2f} | {row.goal:.2f}" if row.peers else f"at most {row.at_least} | {row.goal}"
        print(
            f"| {name} | {_short(ours)} | {1e3 * median(found['seconds']):.1f} | {_short(peer)} | {peer_ms:.1f} "
            f"| {median(ratios):.3f} | {low:.3f}-{high:.3f} | {limit} |",
            flush=True,
        )
        for variant in (*row.ours, *row.peers):
            accounts = answer[variant]["accounts"]
            parts = ", ".join(f"{kind} {1e3 * median(seconds):.1f}" for kind, seconds in accounts.items())
            print(
                f"  {_short(variant) or 'ours'}: {1e3 * median(answer[variant]['seconds']):.1f} ms ({parts})",
                file=sys.stderr,
            )


def _short(variant: str) -> str:
    return " ".join(part.partition("=")[2] or part for part in variant.split())


def launch(name: str, pairs: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Seconds, tails and accounts of each engine of a row, by its overrides."""
    from distributed import run_ranks
    from helpers import make_config

    row = ROWS[name]
    world_size = make_config(*row.layout, *overrides).parallel.world_size
    found: dict[str, Any] = {}
    for number in range(row.launches):
        share = pairs * (number + 1) // row.launches - pairs * number // row.launches
        case = {"row": name, "pairs": share, "overrides": list(overrides)}
        with tempfile.TemporaryDirectory() as folder:
            answer = run_ranks(world_size, "benchmarks.peers", case, Path(folder), timeout=7200)
        for variant, of_launch in answer.items():
            of_all = found.setdefault(variant, {"seconds": [], "tail": [], "accounts": {}})
            of_all["seconds"] += of_launch["seconds"]
            of_all["tail"] += of_launch["tail"]
            for kind, seconds in of_launch["accounts"].items():
                of_all["accounts"].setdefault(kind, []).extend(seconds)
    return found


def quickstart_seconds() -> float:
    """From the command to the ranked table."""
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        command = [sys.executable, "launchers/sweep.py", "sweep=quickstart", f"results_dir={folder}"]
        subprocess.run(command, cwd=root, check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - began


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One rank: a step of each engine in turn."""
    import torch.distributed as dist
    from benchmarks.turns import join, take_turns
    from helpers import make_config

    from harness.model.precision import dtype_of
    from harness.run.data import micro_batches
    from harness.run.engines.engine import build_engine
    from harness.run.instruments.gemm import build_product
    from harness.run.instruments.tracer import Tracer, build_clock
    from harness.spec.counts import training_flops_per_token

    row = ROWS[case["row"]]
    common = [*row.layout, *case["overrides"]]
    rank, machine, plain, device, samples = join(common)
    steps: dict[str, Callable[[int], Any]] = {}
    tracers: dict[str, Tracer] = {}

    def add_engine(variant: str) -> None:
        config = make_config(*common, *variant.split(), machine=machine)
        engine = build_engine(config, rank)
        data = micro_batches(config, samples, engine.topology.coordinate(rank).dp)
        tracer = tracers[variant] = Tracer(build_clock(device.type), nested=True)
        tracer.attach(engine)

        def step(_: int) -> None:
            tracer.start_step()
            engine.train_step(data)

        steps[variant] = step

    def add_products(name: str) -> None:
        by = "onednn" if name == "product" else "torch"
        product = build_product(PRODUCT_SIZE, dtype_of(plain.train.precision), device, by)
        flops = training_flops_per_token(plain.model, plain.train.sequence_length)
        flops *= plain.train.global_batch_size * plain.train.sequence_length
        number = round(flops / (2 * PRODUCT_SIZE**3))
        steps[name] = lambda _: [product() for _ in range(number)]

    for variant in (*row.ours, *row.peers):
        add_products(variant) if variant in ("torch.mm", "product") else add_engine(variant)
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "tail": [], "accounts": {}} for name in steps}
    for name, seconds in take_turns(steps, case["pairs"], device):
        found[name]["seconds"].append(seconds)
        if name in tracers:
            spans = tracers[name].spans(1)
            of_ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(of_ranks, [(span.kind, span.start_ns, span.end_ns) for span in spans])
            backwards = [end for rank_spans in of_ranks for kind, _, end in rank_spans if kind.startswith("backward")]
            ends = [end for rank_spans in of_ranks for _, _, end in rank_spans]
            found[name]["tail"].append((max(ends) - max(backwards)) / 1e9)
            sums: dict[str, float] = {}
            for kind, start, end in of_ranks[0]:
                sums[kind] = sums.get(kind, 0.0) + (end - start) / 1e9
            for kind, total in sums.items():
                found[name]["accounts"].setdefault(kind, []).append(total)
    return found


if __name__ == "__main__":
    main()
