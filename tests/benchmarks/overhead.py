"""What the harness costs: its training loop beside a bare DeepSpeed `PipelineModule` loop.

    python tests/benchmarks/overhead.py [--pairs N] [OVERRIDE ...]

Both engines take turns step by step, on the same layers, data and threads. The bare one is `train_batch` with nothing
of ours around it; the other is the harness as users run it: tracer at its default level, heartbeat, metrics, global
gradient norm, live line. Compared is the wall time of a step, the slowest rank's, as the median of paired ratios. On
GPUs a step ends when its device is through.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

LAYOUTS = ("parallel.pp=1", "parallel.pp=2")
"""Of one rank and of two; on GPUs, of as many as there are."""


def main() -> None:
    """Start the ranks of each layout and print the table."""
    from benchmarks.circumstances import print_circumstances
    from benchmarks.turns import median_interval
    from distributed import run_ranks

    from harness.machine import detect_machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    print_circumstances()
    print(f"{'layout':<16}{'bare tokens/s':>14}{'harness':>10}{'ratio of tokens/s':>19}{'95 % interval':>18}")
    machine = detect_machine()
    # What is imported before the ranks are forked must not ask for CUDA.
    variables = {} if machine.device_kind == "cpu" else {"DS_ACCELERATOR": "cuda", "RANK_IMPORTS": ""}
    layouts = LAYOUTS if machine.device_kind == "cpu" else LAYOUTS[: machine.num_devices]
    for number, layout in enumerate(layouts, start=1):
        case = {"overrides": [*arguments.overrides, layout], "pairs": arguments.pairs}
        with tempfile.TemporaryDirectory() as folder:
            answer = run_ranks(number, "benchmarks.overhead", case, Path(folder), variables=variables)
        low, high = median_interval(answer["ratios"])
        bare, harness = (answer["tokens"] / statistics.median(answer[key]) for key in ("bare", "harness"))
        ratio = statistics.median(answer["ratios"])
        print(f"{layout:<16}{bare:>14,.0f}{harness:>10,.0f}{ratio:>19.4f}{f'{low:.4f}-{high:.4f}':>18}", flush=True)


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One rank: alternate the two engines."""
    from benchmarks.turns import join, take_turns

    from harness.record.heartbeat import Heart
    from harness.record.store import Attempt
    from harness.run.data import micro_batches
    from harness.run.engines.engine import build_engine
    from harness.run.instruments.heartbeat import HeartbeatObserver
    from harness.run.instruments.tracer import Tracer, build_clock
    from harness.run.loop import Loop

    rank, _, config, device, samples = join(case["overrides"])
    bare, engine = build_bare(config, rank), build_engine(config, rank)
    attempt = Attempt(folder)
    tracer = Tracer(build_clock(device.type), nested=config.tracking.trace_level == "collectives")
    tracer.attach(engine)
    heart = Heart(attempt.path, rank)
    engine.observers.append(HeartbeatObserver(heart, lambda: engine.steps_taken, device.type))
    loop = Loop(attempt, config, rank, engine, tracer, device)
    bare_data, data = (micro_batches(config, samples, dp_rank=0) for _ in range(2))
    steps = {
        "bare": lambda _: float(bare.train_batch(data_iter=bare_data)),
        "harness": lambda step: loop.step(step, data),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name, elapsed in take_turns(steps, case["pairs"], device):
        seconds[name].append(elapsed)
    ratios = [b / h for b, h in zip(seconds["bare"], seconds["harness"], strict=True)]
    tokens = config.train.global_batch_size * config.train.sequence_length
    return {**seconds, "ratios": ratios, "tokens": tokens}


def build_bare(config: Any, rank: int) -> Any:
    """DeepSpeed's engine on our layers; it clips by its own means."""
    import deepspeed
    from deepspeed.runtime.pipe.module import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    from harness.model.assembly import describe_layers, part_boundaries
    from harness.model.groups import build_tensor_parallel
    from harness.model.loss import PipelineLoss
    from harness.model.weights import initialize
    from harness.run.engines.deepspeed.pipeline import PartedPipeline
    from harness.run.engines.deepspeed.settings import build_deepspeed_config
    from harness.run.optimizer import build_learning_rate, build_optimizer
    from harness.run.shared_memory import share_memory
    from harness.spec.partition import layers_per_part
    from harness.spec.placement import Placement
    from harness.spec.topology import Topology

    share_memory(False)  # its groups are DeepSpeed's own, over gloo
    settings = {**build_deepspeed_config(config), "gradient_clipping": config.train.gradient_clipping}
    topology = Topology(pp=config.parallel.pp, dp=config.parallel.dp, tp=config.parallel.tp)
    tp = build_tensor_parallel(topology, rank, config.model.num_key_value_heads)
    layers = describe_layers(config.model, tp)
    with contextlib.redirect_stdout(io.StringIO()):
        module = PartedPipeline(
            layers,
            part_boundaries(layers, layers_per_part(config.model, config.parallel, 1)),
            Placement(config.parallel.pp),
            topology=PipeModelDataParallelTopology(topology.pp, topology.tp, topology.dp),
            loss_fn=PipelineLoss(config.model.vocab_size, tp),
        )
        assert isinstance(module, PipelineModule)
        initialize(module.global_parameters(), config.model, tp, config.train.seed)
        optimizer = build_optimizer(config.train, module.parameters())
        schedule = build_learning_rate(config.train, optimizer)
        engine, _, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, lr_scheduler=schedule, config=settings
        )
    return engine


if __name__ == "__main__":
    main()
