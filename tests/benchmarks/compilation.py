"""What `model.compile=true` gains: a step of one rank with it beside one without.

    python tests/benchmarks/compilation.py [--pairs N] [OVERRIDE ...]

Both engines take turns step by step in one process of one thread, on the model of the table in docs/costs.md unless
overrides say otherwise. Compared is the wall time of a step, as the median of paired ratios. The compiler begins
without its cache, so that what it takes is what a first run waits for.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

MODEL = (
    "model=gpt2", "model.num_hidden_layers=8", "model.hidden_size=512", "model.num_attention_heads=8",
    "model.vocab_size=4096", "train.sequence_length=256", "train.micro_batch_size=1", "train.global_batch_size=8",
    "launch.threads_per_rank=1",
)  # fmt: skip


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
    case = {"overrides": [*MODEL, *arguments.overrides], "pairs": arguments.pairs}
    with tempfile.TemporaryDirectory() as folder:
        variables = {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "compiled")}
        answer = run_ranks(1, "benchmarks.compilation", case, Path(folder), variables=variables)
    without, compiled = answer["without"], answer["compiled"]
    ratios = [a / b for a, b in zip(without, compiled, strict=True)]
    low, high = median_interval(ratios)
    print(f"compiled: {answer['outcome']}, in {answer['seconds']:.1f} s")
    print(f"step ms: {statistics.median(without) * 1e3:.1f} without, {statistics.median(compiled) * 1e3:.1f} with")
    print(f"without / with: {statistics.median(ratios):.4f} ({low:.4f}-{high:.4f})")


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The rank: alternate the two engines."""
    from benchmarks.turns import join, take_turns

    from harness.run.compilation import gather_compilation
    from harness.run.data import micro_batches
    from harness.run.engines.engine import build_engine

    rank, _, config, device, samples = join(case["overrides"])
    steps: dict[str, Callable[[int], Any]] = {}
    seconds: dict[str, list[float]] = {"without": [], "compiled": []}
    outcome = None
    for name in seconds:
        model = config.model.model_copy(update={"compile": name == "compiled"})
        engine = build_engine(config.model_copy(update={"model": model}), rank)
        outcome = gather_compilation(engine.compilation, None)
        steps[name] = partial(_step, engine, micro_batches(config, samples, dp_rank=0))
    for name, taken in take_turns(steps, case["pairs"], device):
        seconds[name].append(taken)
    assert outcome is not None
    return {**seconds, "outcome": outcome.outcome, "seconds": outcome.seconds}


def _step(engine: Any, data: Any, _: int) -> None:
    engine.train_step(data)


if __name__ == "__main__":
    main()
