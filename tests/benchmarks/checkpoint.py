"""What a checkpoint costs: `save_checkpoint` and `load_checkpoint` in several layouts, beside `torch.save`.

    python tests/benchmarks/checkpoint.py [--repeats N] [--folder DIR] [OVERRIDE ...]

`torch.save` writes the same tensors, weights and AdamW moments of the whole model, from one process into one
file, and waits for the disk as a checkpoint does. The two take turns; shown is the best of each, as whatever else
uses the disk only adds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

LAYOUTS = (
    (1, ""),
    (2, "parallel.tp=2"),
    (2, "parallel.pp=2"),
    (2, "parallel.dp=2"),
    (2, "parallel.dp=2 parallel.zero_stage=1"),
    (2, "parallel.tp=2 train.precision=bf16"),
    (4, "parallel.tp=2 parallel.dp=2 parallel.zero_stage=1 train.precision=bf16"),
)


def main() -> None:
    """Start the ranks of each layout and print the table."""
    from benchmarks.circumstances import print_circumstances
    from distributed import run_ranks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="on the disk to measure; default: the temporary folder")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    print_circumstances()
    print(f"{'ranks':<6}{'layout':<74}{'GB':>5}{'torch.save s':>14}{'save s':>8}{'ratio':>7}{'load s':>8}")
    for number, layout in LAYOUTS:
        case = {"overrides": ["model=gpt2_small", *layout.split(), *arguments.overrides], "repeats": arguments.repeats}
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            times = run_ranks(number, "benchmarks.checkpoint", case, Path(folder))
        plain, saved, loaded = (min(times[kind]) for kind in ("torch", "save", "load"))
        print(
            f"{number:<6}{layout:<74}{times['bytes'] / 1e9:>5.2f}{plain:>14.2f}{saved:>8.2f}{saved / plain:>7.2f}"
            f"{loaded:>8.2f}",
            flush=True,
        )


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One rank: save both ways, then load."""
    import torch
    import torch.distributed as dist
    from helpers import make_config

    from harness.checkpoints import directory_of
    from harness.machine import detect_machine
    from harness.run.checkpoint import load_checkpoint, save_checkpoint, tensor_shapes
    from harness.run.engines.deepspeed.join import initialize_distributed
    from harness.run.engines.engine import build_engine

    initialize_distributed()
    rank = int(os.environ["RANK"])
    config = make_config(*case["overrides"], machine=detect_machine())
    engine = build_engine(config, rank)
    tensors = {name: torch.randn(shape) for name, shape in tensor_shapes(config).items()} if rank == 0 else {}

    plain, target = folder / "plain.pt", directory_of(folder / "checkpoints", 1)

    def save_plainly() -> None:
        if rank == 0:
            with plain.open("wb") as file:
                torch.save(tensors, file)
                file.flush()
                os.fsync(file.fileno())

    def seconds(run: Callable[[], object]) -> float:
        dist.barrier()
        start = time.perf_counter()
        run()
        dist.barrier()
        return time.perf_counter() - start

    def clean() -> None:
        """Each write finds the pages that the last one leaves free: memory used for the first time is slow."""
        if rank == 0:
            shutil.rmtree(target, ignore_errors=True)
            plain.unlink(missing_ok=True)

    times: dict[str, list[float]] = {"torch": [], "save": [], "load": []}
    for _ in range(case["repeats"]):
        clean()
        times["torch"].append(seconds(save_plainly))
        clean()
        times["save"].append(seconds(lambda: save_checkpoint(target.parent, engine, config, 1, None)))
        times["load"].append(seconds(lambda: load_checkpoint(target, engine, config, None)))
    return {**times, "bytes": sum(tensor.nbytes for tensor in tensors.values())}


if __name__ == "__main__":
    main()
