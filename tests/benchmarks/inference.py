"""Is generation as fast as that of others, and do groups and stages bring what they should?

    python tests/benchmarks/inference.py [--rounds N] [--rows ROW,...]

Sides of a row take turns, in the same processes, with the same weights, prompts and threads, in rotating order;
compared is the whole of a measurement, from the prompts to the last token, as the median of paired ratios with its
95 % interval. Sequences have 64 tokens of prompt and get 64, greedily, in fp32, unless the row says otherwise.

- one_rank_1, one_rank_8: `transformers`' generate on llama_tiny, 1 and 8 sequences, one thread.
- gpt2_1_thread, gpt2_2_threads: the same on GPT-2 small, 8 sequences.
- tp, tp_compiled: DeepSpeed's AutoTP (`init_inference`) on a Llama of 110 million parameters, 8 sequences, two ranks:
  over gloo, and with the all-reduce through shared memory that DeepSpeed compiles where there is a compiler.
- tp_tiny, tp_tiny_compiled: the same on llama_tiny.
- int8_gpt2: ours as it is, GPT-2 small, 8 sequences, two threads; the ratio is what int8 weights bring.
- prefill_pp, prefill_tp: one rank's prefill of GPT-2 small with one thread, 8 prompts of 64 tokens in one pass; the
  ratio is what a second rank brings, as a pipeline with 4 micro-batches.
- continuous: 32 requests one after the other; the ratio is what offering them at once brings, llama_tiny.
- emulated_forward: one stage of 4 layers of 30 ms; the ratio is what 4 stages of one bring for 9 micro-batches; 3.0 is
  ideal. Layers wait instead of computing, so more stages than cores are no matter.
- emulated_decode: 4 stages with one group of one sequence; the ratio is what 4 groups of one bring.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

PEERS = ("transformers", "autotp", "autotp_compiled")
FORWARD_PASSES = 5
"""Of a side in a round; their median counts."""
PASSES = "task=forward model=emulated model.num_hidden_layers=4 train.global_batch_size=9 train.micro_batch_size=1"


class Row(NamedTuple):
    """One line of the table."""

    common: str
    """Overrides of both sides."""
    ours: str
    """Further ones."""
    peer: str
    """One of PEERS, or further overrides of our other side."""
    at_least: float
    threads: int = 1
    counts: str = "tokens_per_second"
    """What is compared: a number of the measurement."""


GPT2 = "model=gpt2_small generate.batch_size=8"
LLAMA = (
    "model=llama_tiny model.num_hidden_layers=12 model.hidden_size=768 model.num_attention_heads=12 "
    "model.num_key_value_heads=4 model.intermediate_size=2048 model.vocab_size=32000 generate.batch_size=8"
)
ROWS = {
    "one_rank_1": Row("model=llama_tiny generate.batch_size=1", "", "transformers", 1.2),
    "one_rank_8": Row("model=llama_tiny generate.batch_size=8", "", "transformers", 1.2),
    "gpt2_1_thread": Row(GPT2, "", "transformers", 1.0),
    "gpt2_2_threads": Row(GPT2, "", "transformers", 1.1, threads=2),
    "tp": Row(f"{LLAMA} parallel.tp=2", "", "autotp", 1.5),
    "tp_compiled": Row(f"{LLAMA} parallel.tp=2", "", "autotp_compiled", 1.5),
    "tp_tiny": Row("model=llama_tiny generate.batch_size=8 parallel.tp=2", "", "autotp", 1.5),
    "tp_tiny_compiled": Row("model=llama_tiny generate.batch_size=8 parallel.tp=2", "", "autotp_compiled", 1.0),
    "int8_gpt2": Row(GPT2, "generate.quantization=int8", "generate.quantization=none", 1.0, threads=2),
    "prefill_pp": Row(
        f"{GPT2} generate.max_new_tokens=2 generate.prefill_batch_size=2", "parallel.pp=2",
        "parallel.pp=1 generate.prefill_batch_size=8", 1.5,
        counts="prefill_tokens_per_second",
    ),
    "prefill_tp": Row(
        f"{GPT2} generate.max_new_tokens=2", "parallel.tp=2", "parallel.tp=1", 1.5, counts="prefill_tokens_per_second"
    ),
    "continuous": Row(
        "model=llama_tiny generate.num_requests=32", "generate.batch_size=32", "generate.batch_size=1", 4.0
    ),
    "emulated_forward": Row(PASSES, "parallel.pp=4", "parallel.pp=1", 2.85),
    "emulated_decode": Row(
        "model=emulated model.num_hidden_layers=4 parallel.pp=4 generate.max_new_tokens=17", "generate.batch_size=4",
        "generate.batch_size=1", 3.6, counts="decode_tokens_per_second",
    ),
}  # fmt: skip
"""Where the sides have different numbers of ranks, they are launched in turn instead."""


def main() -> None:
    """Start the ranks of each row and print the table."""
    from benchmarks.circumstances import print_circumstances
    from benchmarks.turns import median_interval

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", default=",".join(ROWS))
    arguments = parser.parse_args()
    print_circumstances()
    print("| row | ours | tokens/s | first token ms | beside | tokens/s | ratio | 95 % interval | at least |")
    print("|---|---|---:|---:|---|---:|---:|---:|---:|")
    for name in arguments.rows.split(","):
        row = ROWS[name]
        found = measure(row, name, arguments.rounds)
        ours, peer = (found[side]["rates"] for side in ("ours", "peer"))
        ratios = [our / their for our, their in zip(ours, peer, strict=True)]
        low, high = median_interval(ratios)
        first = median(found["ours"]["first"]) * 1e3
        print(
            f"| {name} | {row.ours} | {median(ours):,.1f} | {first:,.1f} | {row.peer} | {median(peer):,.1f} "
            f"| {median(ratios):.2f} | {low:.2f}-{high:.2f} | {row.at_least} |",
            flush=True,
        )


def measure(row: Row, name: str, rounds: int) -> dict[str, Any]:
    """Rates and times to the first token of both sides, round by round."""
    if row.peer in PEERS or ranks_of(row, row.ours) == ranks_of(row, row.peer):
        return launch(row, {"row": name, "rounds": rounds, "sides": ["ours", "peer"]}, row.ours)
    found: dict[str, Any] = {side: {"rates": [], "first": []} for side in ("ours", "peer")}
    for number in range(rounds):
        for side in ("ours", "peer") if number % 2 == 0 else ("peer", "ours"):
            case = {"row": name, "rounds": 1, "sides": [side]}
            answer = launch(row, case, row.ours if side == "ours" else row.peer)[side]
            found[side]["rates"] += answer["rates"]
            found[side]["first"] += answer["first"]
    return found


def ranks_of(row: Row, overrides: str) -> int:
    """Ranks that a side has."""
    from helpers import MACHINE, make_config

    return make_config(*row.common.split(), *overrides.split(), machine=MACHINE).parallel.world_size


def launch(row: Row, case: dict[str, Any], overrides: str) -> dict[str, Any]:
    """What the ranks of a launch measured."""
    from distributed import run_ranks

    variables = {"OMP_NUM_THREADS": str(row.threads)}
    with tempfile.TemporaryDirectory() as folder:
        answer: dict[str, Any] = run_ranks(
            ranks_of(row, overrides), "benchmarks.inference", case, Path(folder), timeout=3600, variables=variables
        )
    return answer


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One rank: measurements of each side in turn."""
    import torch
    import torch.distributed as dist
    from benchmarks.turns import rotations

    from harness.run.engines.deepspeed.join import initialize_distributed

    row = ROWS[case["row"]]
    torch.set_num_threads(row.threads)
    initialize_distributed()
    rank = int(os.environ["RANK"])
    sides: dict[str, Callable[[], tuple[float, float]]] = {}
    for side in case["sides"]:
        own = row.ours if side == "ours" else row.peer
        peers: dict[str, Callable[[Sequence[str]], Callable[[], tuple[float, float]]]] = {
            "transformers": with_transformers,
            "autotp": with_autotp,
            "autotp_compiled": partial(with_autotp, compiled=True),
        }
        build = peers.get(own)
        overrides = [*row.common.split(), "launch.threads_per_rank=1"]
        sides[side] = build(overrides) if build else ours([*overrides, *own.split()], rank, folder / side, row.counts)
    found: dict[str, Any] = {side: {"rates": [], "first": []} for side in sides}
    for number, names in enumerate(rotations([*sides], case["rounds"] + 1)):
        for side in names:
            dist.barrier()
            rate, first = sides[side]()
            if number > 0:
                found[side]["rates"].append(rate)
                found[side]["first"].append(first)
    return found


def ours(overrides: Sequence[str], rank: int, folder: Path, counts: str) -> Callable[[], tuple[float, float]]:
    """A measurement of the harness, as its tasks make them: rate and seconds to the first token, on rank 0."""
    from helpers import MACHINE, make_config

    from harness.record.heartbeat import Heart
    from harness.record.store import Attempt
    from harness.run.inference.generation import Generation, share_requests
    from harness.run.inference.meter import Meter
    from harness.run.inference.ring import Ring
    from harness.run.inference.stage import Stage
    from harness.run.tasks.forward import random_rows, works_of
    from harness.spec.batching import Passes

    folder.mkdir(exist_ok=True)
    attempt = Attempt(folder)
    is_forward = "task=forward" in overrides
    config = make_config(*([] if is_forward else ["task=generate"]), *overrides, machine=MACHINE)
    if is_forward:
        rows = random_rows(config)
        ring = Ring(Stage(config, rank, rows, None), rank, rows, config.train.micro_batch_size)
        meter = Meter(attempt, config, rank, ring, MACHINE)
        tokens = config.train.global_batch_size * config.train.sequence_length
        step = 0

        def forward() -> tuple[float, float]:
            nonlocal step
            seconds = [0.0] * FORWARD_PASSES
            for number in range(FORWARD_PASSES):
                timed = meter.run(Passes(works_of(config, step)) if rank == 0 else None, lambda _: None, None)
                seconds[number] = timed.seconds if timed else 1.0
                step += 1
            return tokens / median(seconds), median(seconds)

        return forward
    requests, _ = share_requests(config, rank)
    generation = Generation(attempt, config, rank, requests, MACHINE, Heart(folder, rank))

    def generate() -> tuple[float, float]:
        record = generation.run(None)
        if record is None:
            return 0.0, 0.0
        phase = {"prefill_tokens_per_second": record.prefill, "decode_tokens_per_second": record.decode}.get(counts)
        rate = record.tokens / record.seconds if phase is None else phase.tokens / phase.seconds
        return rate, median(record.first_token_seconds)

    return generate


def with_transformers(overrides: Sequence[str]) -> Callable[[], tuple[float, float]]:
    """The same of `transformers`' generate."""
    return _generating(_model(overrides), overrides)


def with_autotp(overrides: Sequence[str], compiled: bool = False) -> Callable[[], tuple[float, float]]:
    """The same with its layers split by DeepSpeed over all ranks, which talk through gloo.

    Args:
        compiled: through memory that they share, by what DeepSpeed compiles.
    """
    import torch
    import torch.distributed as dist
    from helpers import make_config

    from harness.run.shared_memory import share_memory

    size = make_config(*overrides).parallel.tp
    share_memory(False)  # that is ours; groups that there are keep it
    if compiled:
        importlib.import_module("deepspeed").ops.__compatible_ops__["deepspeed_shm_comm"] = True
        backend = importlib.import_module("deepspeed.comm.comm").cdb
        os.environ["LOCAL_SIZE"] = str(size)
        backend.shm_comm_op = importlib.import_module("deepspeed.comm.torch").build_shm_op()
        backend.shm_comm_op.initialize(size, dist.get_rank())
        backend.shm_vector_kernel_level = backend.shm_comm_op.vector_kernel_level()
    engine = importlib.import_module("deepspeed").init_inference(
        _model(overrides), tensor_parallel={"tp_size": size}, dtype=torch.float32, replace_with_kernel_inject=False
    )
    return _generating(engine.module, overrides)


def _model(overrides: Sequence[str]) -> Any:
    """With the weights that ours begins with."""
    from helpers import make_config
    from references import CLASSES, transformers_config
    from states import to_transformers

    from harness.model.weights import draw
    from harness.spec.parameters import parameter_table

    config = make_config(*overrides)
    kind = getattr(importlib.import_module("transformers"), CLASSES[config.model.family][1])
    model = kind(transformers_config(config.model)).eval()
    table = parameter_table(config.model)
    full = {name: draw(spec, config.train.seed, config.model) for name, spec in table.items()}
    model.load_state_dict(to_transformers(full, config.model), strict=False)
    if config.model.tie_word_embeddings:
        model.tie_weights()
    return model


def _generating(model: Any, overrides: Sequence[str]) -> Callable[[], tuple[float, float]]:
    import torch
    from helpers import make_config

    from harness.prompts import random_prompt

    config = make_config(*overrides)
    settings = config.generate
    prompts = torch.tensor([random_prompt(settings, config.model, number) for number in range(settings.batch_size)])
    mask, count = torch.ones_like(prompts), settings.max_new_tokens

    def generate() -> tuple[float, float]:
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                prompts, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None
            )
        seconds = time.perf_counter() - start
        return prompts.shape[0] * count / seconds, seconds

    return generate


if __name__ == "__main__":
    main()
