"""Products of few rows by one matrix: by which way of storing it are they as fast as memory?

    python tests/benchmarks/few_rows.py [--threads N] [--rows 1,8,...] [--shapes 768x2304,...] [--rounds N]

Each shape (inputs x outputs) has as many matrices as make 128 MB, so that each comes from memory, and four at least
where caches hold them. All ways take turns with all of them; printed are median microseconds of a product, and the GB/s
that reading the weights, 4, 2 or 1 bytes each, makes of them, below which stands the rate of a sum over as much memory.
The last rows are the products of a pass of GPT-2 small with its head: a step of generation for that many sequences,
without attention and norms.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

SHAPES = "768x2304,768x768,768x3072,3072x768,768x50257,256x768,256x256,256x1408,704x256"
"""Of GPT-2 small, then of llama_tiny."""
GPT2_SMALL = {(768, 2304): 12, (768, 768): 12, (768, 3072): 12, (3072, 768): 12, (768, 50257): 1}
"""How often a pass multiplies by each."""
BYTES, FEWEST = 128 * 2**20, 4

Product = Callable[[Tensor], Tensor]


def main() -> None:
    """Measure and print the table."""
    from benchmarks.circumstances import print_circumstances

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", default="1,2,4,8,16,64,512")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print_circumstances()
    memory = torch.ones(BYTES // 4)
    print(f"{arguments.threads} threads, {torch.backends.cpu.get_cpu_capability()}; a sum reads ", end="")
    print(f"{BYTES / seconds_in_turn({'sum': [lambda _: memory.sum()]}, memory, 20)['sum'] / 1e9:.0f} GB/s\n")
    all_rows = [int(rows) for rows in arguments.rows.split(",")]
    total: dict[tuple[int, str], float] = {}
    seen = set()
    with torch.inference_mode():
        for shape in arguments.shapes.split(","):
            inputs, outputs = (int(size) for size in shape.split("x"))
            seen.add((inputs, outputs))
            ways = stored(inputs, outputs)
            if len(seen) == 1:
                print(f"| inputs x outputs | rows | {' | '.join(f'{way} us (GB/s)' for way in ways)} |")
                print(f"|---|---:|{'---:|' * len(ways)}")
            for rows in all_rows:
                found = seconds_in_turn(ways, torch.randn(rows, inputs), arguments.rounds)
                cells = [
                    f"{1e6 * taken:.0f} ({inputs * outputs * weight_bytes(way) / taken / 1e9:.1f})"
                    for way, taken in found.items()
                ]
                print(f"| {inputs} x {outputs} | {rows} | {' | '.join(cells)} |", flush=True)
                for way, taken in found.items():
                    times = GPT2_SMALL.get((inputs, outputs), 0)
                    total[rows, way] = total.get((rows, way), 0.0) + times * taken
    if seen >= set(GPT2_SMALL):
        for rows in all_rows:
            cells = [f"{1e6 * total[rows, way]:.0f}" for way in ways]
            print(f"| a pass of GPT-2 small | {rows} | {' | '.join(cells)} |")


def weight_bytes(way: str) -> int:
    """What one weight takes so stored."""
    return 1 if way == "int8" else 2 if way.startswith("bf16") else 4


def stored(inputs: int, outputs: int) -> dict[str, list[Product]]:
    """By way, the products by each of the matrices; all have a bias."""
    from harness.model.packing import RoundedMatrix
    from harness.model.products import is_worth_packing, packed, packed_product, product_by_onednn, use_onednn

    weights = [torch.randn(outputs, inputs) for _ in range(max(FEWEST, BYTES // (4 * inputs * outputs)))]
    bias = torch.randn(outputs)

    def of_each(way: Callable[[Tensor], Product]) -> list[Product]:
        return [way(weight) for weight in weights]

    def transposed(weight: Tensor) -> Product:
        columns = weight.t().contiguous()
        return lambda rows: torch.addmm(bias, rows, columns)

    def in_blocks(weight: Tensor, dtype: torch.dtype = torch.float32) -> Product:
        blocks, own = packed(weight.to(dtype)), bias.to(dtype)
        return lambda rows: packed_product(rows.to(dtype), blocks, own)

    def whole(weight: Tensor) -> Product:
        matrix = RoundedMatrix(weight)
        return lambda rows: matrix(rows, bias)

    def half(weight: Tensor) -> Product:
        halved, own = weight.bfloat16(), bias.bfloat16()
        return lambda rows: F.linear(rows.bfloat16(), halved, own)

    ways = {
        "torch": of_each(lambda weight: lambda rows: F.linear(rows, weight, bias)),
        "transposed": of_each(transposed),
        "as columns": of_each(lambda weight: lambda rows: torch.addmm(bias[:, None], weight, rows.t()).t()),
        "onednn": of_each(lambda weight: lambda rows: product_by_onednn(rows, weight, bias)),
        "packed": of_each(in_blocks),
        "int8": of_each(whole),
    }
    use_onednn(True)
    if is_worth_packing(weights[0].bfloat16()):
        ways |= {"bf16": of_each(half), "bf16 packed": of_each(lambda weight: in_blocks(weight, torch.bfloat16))}
    return ways


def seconds_in_turn(ways: dict[str, list[Product]], rows: Tensor, rounds: int) -> dict[str, float]:
    """Of one product by each way, the median of rounds after a first."""
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(1 + rounds):
        for way, products in ways.items():
            start = time.perf_counter()
            for product in products:
                product(rows)
            taken[way].append((time.perf_counter() - start) / len(products))
    return {way: median(seconds[1:]) for way, seconds in taken.items()}


if __name__ == "__main__":
    main()
