"""What a sweep spends on a point besides its steps, part by part.

    python tests/benchmarks/point_cost.py [--points N] [OVERRIDE ...]

A real sweep of the tiny model with 2 ranks. The parts are cut at what every run leaves: the times of its status,
the start of its rank processes, its files; a module that ranks find through PYTHONPATH adds when the imports were
done. Medians over the points but the first, which warms the file cache.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from benchmarks.circumstances import print_circumstances  # noqa: E402

from harness.record.store import Attempt, SweepDirectory  # noqa: E402

FIXED = """parallel.pp=2 train.steps=5 train.global_batch_size=4 train.sequence_length=32 launch.threads_per_rank=1
tracking.wandb.mode=disabled""".split()

MARK_IMPORTS = """
import os, sys, time
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "harness.run.instruments.heartbeat":  # the last of our modules, after torch and deepspeed
            sys.meta_path.remove(self)
            open(next(a for a in sys.argv if "attempt-" in a) + "/imported", "w").close()
if os.environ.get("RANK") == "0":
    sys.meta_path.insert(0, Finder())
"""

PARTS = (
    "deepspeed starts: to the first rank's begin",
    "imports, and meeting the other ranks",
    "model and engine",
    "(steps, their data and evaluation)",
    "matrix-product rate, result",
    "end of the tree, status",
    "until the next point begins",
)


def main() -> None:
    """Run the sweep and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=4)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    if arguments.points < 2:
        parser.error(
            f"--points {arguments.points} are too few; the cost of a point ends where the next begins, so 2 or more"
        )
    print_circumstances()
    with tempfile.TemporaryDirectory() as folder:
        parts = measure(Path(folder), arguments.points, arguments.overrides)
    medians = [statistics.median(column) for column in zip(*parts, strict=True)]
    for name, seconds in zip(PARTS, medians, strict=True):
        print(f"{seconds:8.2f} s  {name}")
    own = statistics.median(sum(part) - part[3] for part in parts)
    print(f"{own:8.2f} s  the sweep's own cost of a point (without its steps), median of {len(parts)}; target 8 s")


def measure(folder: Path, num_points: int, overrides: list[str]) -> list[list[float]]:
    """Seconds of each part, for every point but the first and the last."""
    (folder / "sitecustomize.py").write_text(MARK_IMPORTS)
    grid = [f"train.seed=range(0,{num_points + 1})", f"results_dir={folder}", "sweep.name=cost", *FIXED, *overrides]
    command = [sys.executable, str(REPOSITORY / "launchers" / "sweep.py"), *grid]
    sweep = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(folder)}, stdout=subprocess.DEVNULL)
    begun: dict[Path, float] = {}
    while sweep.poll() is None:
        for process in psutil.process_iter(["cmdline", "create_time"]):
            line = process.info["cmdline"] or []
            if "harness.run.worker" in line and "deepspeed.launcher.launch" not in line and "--module" not in line:
                path = next(Path(argument) for argument in line if "attempt-" in argument)
                begun.setdefault(path, process.info["create_time"])
        time.sleep(0.1)
    attempts = [point.attempts()[0] for point in SweepDirectory(folder, "cost").points()]
    attempts.sort(key=_started)
    parts = []
    for attempt, following in itertools.pairwise(attempts[1:]):
        moments = [
            _started(attempt),
            begun[attempt.path],
            (attempt.path / "imported").stat().st_mtime,
            *(file.stat().st_mtime for file in (attempt.ds_config_file, attempt.metrics_file, attempt.result_file)),
        ]
        moments += [datetime.fromisoformat(attempt.status()["ended"]).timestamp(), _started(following)]
        parts.append([after - before for before, after in itertools.pairwise(moments)])
    return parts


def _started(attempt: Attempt) -> float:
    return datetime.fromisoformat(attempt.status()["started"]).timestamp()


if __name__ == "__main__":
    main()
