"""What weights in and out cost: `launchers/convert.py` on GPT-2 small, and the ranks that begin from it.

    python tests/benchmarks/conversion.py [--folder DIR]

Seconds are those of the command, Python's start and imports included. Memory is the peak of the process beyond that of
one that has done all the imports and nothing else, beside what it may be: two of the largest tensors and what a rank
holds, which is the whole model for a single one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).resolve().parents[1])]

MODEL_BYTES, LARGEST_BYTES = 4 * 124_439_808, 4 * 50257 * 768
NOTHING = "from harness.run import conversion"


def main() -> None:
    """Make a folder, take its weights in and out, and print the table."""
    from benchmarks.circumstances import print_circumstances
    from distributed import run_ranks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="on the disk to measure; default: the temporary folder")
    arguments = parser.parse_args()
    print_circumstances()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        saved, checkpoint, out = (folder / part for part in ("saved", "checkpoint", "out"))
        save_gpt2_small(saved)
        _, nothing = measure("-c", NOTHING)
        print(f"{'':<44}{'seconds':>9}{'MB beyond':>11}{'allowed MB':>12}")
        for command, source, target in (("import", saved, checkpoint), ("export", checkpoint, out)):
            seconds, peak = measure("launchers/convert.py", command, source, target)
            show(f"convert.py {command}", f"{seconds:.1f}", peak - nothing, MODEL_BYTES + 2 * LARGEST_BYTES)
        weights = (saved / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
        for origin in (saved, checkpoint):
            case = [f"model.weights={origin}", "parallel.tp=2", "train.sequence_length=8"]
            own, beyond, seconds = run_ranks(2, "benchmarks.conversion", case, folder)
            show(f"a rank of tp=2 from the {origin.name} folder", f"{seconds:.1f}", beyond, own + 2 * LARGEST_BYTES)
        print(f"\nwhat came out is{'' if weights else ' NOT'} what came in, byte by byte")


def show(what: str, seconds: str, beyond: float, allowed: float) -> None:
    """A line of the table."""
    print(f"{what:<44}{seconds:>9}{beyond / 1e6:>11.0f}{allowed / 1e6:>12.0f}", flush=True)


def save_gpt2_small(folder: Path) -> None:
    """With fresh weights, by another process, as `transformers` has a peak of its own."""
    code = f"import transformers as t; t.GPT2LMHeadModel(t.GPT2Config()).save_pretrained({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def measure(*command: object) -> tuple[float, int]:
    """Seconds and peak resident bytes of a Python process."""
    started = time.monotonic()
    child = subprocess.Popen([sys.executable, *map(str, command)], cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, command
    return time.monotonic() - started, usage.ru_maxrss * 1024


def run(overrides: list[str], folder: Path) -> tuple[int, int, float]:
    """One rank: bytes of its parameters, peak beyond what it had before filling them, and seconds of that."""
    import torch
    from helpers import make_config

    from harness.machine import peak_resident_bytes
    from harness.model.assembly import build_layers
    from harness.model.groups import build_tensor_parallel
    from harness.run.engines.deepspeed.join import initialize_distributed
    from harness.run.instruments.memory import reset_peak_memory
    from harness.run.weights import fill_parameters

    torch.set_num_threads(1)
    initialize_distributed()
    config = make_config(*overrides)
    tp: Any = build_tensor_parallel(config.parallel.topology, int(os.environ["RANK"]), 12)
    layers = build_layers(config.model, tp)
    reset_peak_memory()
    before, started = peak_resident_bytes(), time.monotonic()
    fill_parameters(layers.named_parameters(), config, tp)
    own = sum(parameter.nbytes for parameter in layers.parameters())
    return own, peak_resident_bytes() - before, time.monotonic() - started


if __name__ == "__main__":
    main()
