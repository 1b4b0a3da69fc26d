"""The measured bubble beside a known truth: emulated stages that wait for set times in DeepSpeed's real engine.

    python tests/benchmarks/known_truth.py

For p stages and m micro-batches of 30 ms forward and 60 ms backward it prints the bubble fraction that the formula
gives, that the simulator gives for the measured durations, and that was measured. Then a stage that is half as fast
and a link that is slow (by a wait in DeepSpeed's point-to-point call, below the tracer): idle time per stage and step
that they cause, as set and as the explanation of the bubble finds it. One start of p ranks for each p.

The ranks hardly compute, and what else goes on in the machine only adds time. Where that is permitted they run with
real-time priority. All cases are measured in two rounds, so that a disturbance of some seconds spares one of them, and
the fastest step of a case stands for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

FORWARD_SECONDS, BACKWARD_SECONDS = 0.03, 0.06
ROUNDS, WARMUP_STEPS, TIMED_STEPS = 2, 1, 2
STAGES = (2, 4, 8)
SLOW_STAGE, SLOW_LINK = 2, 1
"""The slow stage, and the one whose sends to the next are slow."""
SLOW_FACTOR, SLOW_LINK_SECONDS = 2.0, 0.04


@dataclass(frozen=True)
class Case:
    """What is emulated."""

    p: int
    m: int
    slow_stage: bool = False
    slow_link: bool = False

    @property
    def factors(self) -> list[float]:
        """Of the stages' waits."""
        return [SLOW_FACTOR if self.slow_stage and stage == SLOW_STAGE else 1.0 for stage in range(self.p)]

    @property
    def overrides(self) -> list[str]:
        """Configuration."""
        return [
            "model=emulated", f"model.num_hidden_layers={self.p}", f"model.stage_factors={self.factors}",
            f"model.forward_seconds={FORWARD_SECONDS}", f"model.backward_seconds={BACKWARD_SECONDS}",
            f"parallel.pp={self.p}", "data=synthetic", "train.sequence_length=16", f"train.global_batch_size={self.m}",
            f"train.steps={WARMUP_STEPS + TIMED_STEPS}", f"train.warmup_steps={WARMUP_STEPS}",
        ]  # fmt: skip


def cases(p: int) -> list[Case]:
    """What one start of p ranks measures."""
    equal = [Case(p, m) for m in (p, 2 * p, 4 * p)]
    return equal if p != 4 else [*equal, Case(p, 2 * p, slow_stage=True), Case(p, 2 * p, slow_link=True)]


def measure(p: int, folder: Path) -> list[tuple[Case, dict[str, Any]]]:
    """`bubble` and `accounting` of each case of p stages, with `link_seconds`, the mean time of a send by stage."""
    from distributed import run_ranks

    answers = run_ranks(p, "benchmarks.known_truth", [asdict(case) for case in cases(p)], folder)
    return list(zip(cases(p), answers, strict=True))


def injected_seconds(case: Case) -> float:
    """Idle seconds per stage and step that a case's slow stage or link causes, by the set times alone."""
    from harness.plan.schedule import build_schedule
    from harness.plan.simulate import simulate
    from harness.timeline import activity, measured_bubble

    def idle_seconds(factors: list[float], link_seconds: float) -> float:
        seconds = {
            "forward": [FORWARD_SECONDS * factor for factor in factors],
            "backward": [BACKWARD_SECONDS * factor for factor in factors],
            "send_activation": [link_seconds if stage == SLOW_LINK else 0.0 for stage in range(case.p)],
        }
        stages = simulate(build_schedule("1f1b", case.p, case.m), seconds)
        return measured_bubble([[activity(spans)] for spans in stages]).seconds

    mean = sum(case.factors) / case.p
    injected = idle_seconds(case.factors, SLOW_LINK_SECONDS if case.slow_link else 0.0)
    return injected - idle_seconds([mean] * case.p, 0.0)


def found_seconds(case: Case, bubble: dict[str, Any], undisturbed: dict[str, Any]) -> float:
    """What the explanation of a measured bubble finds of `injected_seconds`, beyond a run without."""
    cause = "imbalance" if case.slow_stage else "transfer"
    return float(bubble["causes_seconds"][cause] - undisturbed["causes_seconds"][cause])


def main() -> None:
    """Print the tables in Markdown."""
    measured: list[tuple[Case, dict[str, Any]]] = []
    for p in STAGES:
        with tempfile.TemporaryDirectory() as folder:
            measured += measure(p, Path(folder))
    print("| stages p | micro-batches m | ideal | simulated | measured | measured - ideal |")
    print("|---:|---:|---:|---:|---:|---:|")
    bubbles = {case: answer["bubble"] for case, answer in measured}
    for case, bubble in bubbles.items():
        if not (case.slow_stage or case.slow_link):
            ideal, simulated, real = (bubble[key]["fraction"] for key in ("ideal", "simulated", "measured"))
            print(f"| {case.p} | {case.m} | {ideal:.3f} | {simulated:.3f} | {real:.3f} | {real - ideal:+.3f} |")
    print("\n| injected (p, m) | cause | idle ms per stage and step, as set | as found |\n|---|---|---:|---:|")
    for case, bubble in bubbles.items():
        if case.slow_stage or case.slow_link:
            what, cause = ("slow stage", "imbalance") if case.slow_stage else ("slow link", "transfer")
            found = found_seconds(case, bubble, bubbles[Case(case.p, case.m)])
            injected = injected_seconds(case)
            print(f"| {what} ({case.p}, {case.m}) | {cause} | {injected * 1e3:.1f} | {found * 1e3:.1f} |")


def rank_main() -> None:
    """One rank: the cases one after the other."""
    import torch
    from deepspeed.runtime.pipe import p2p
    from distributed import read_argument, write_answer
    from helpers import make_config

    from harness.breakdown import breakdown, read_run
    from harness.plan.explain import durations
    from harness.record.store import Attempt
    from harness.run.build import build_training
    from harness.run.data import CorpusSamples, micro_batches
    from harness.run.tracer import HostClock, Tracer
    from harness.run.train import Loop, share_corpus
    from harness.run.worker import initialize_distributed

    with contextlib.suppress(PermissionError):  # for this thread and those it starts from now on
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    initialize_distributed()
    torch.set_num_threads(1)
    rank, send = int(os.environ["RANK"]), p2p.send
    chosen = [Case(**fields) for fields in read_argument()]
    fastest: dict[Case, tuple[float, dict[str, Any]]] = {}

    def slow_send(tensor: torch.Tensor, dest_stage: int, **options: Any) -> Any:
        if dest_stage == SLOW_LINK + 1 and rank == SLOW_LINK:
            time.sleep(SLOW_LINK_SECONDS)
        return send(tensor, dest_stage, **options)

    for number, case in enumerate(chosen * ROUNDS):
        config = make_config(*case.overrides)
        attempt = Attempt(Path(sys.argv[1]) / f"attempt-{number}")
        attempt.path.mkdir(exist_ok=True)
        training = build_training(config, rank)
        tracer = Tracer(HostClock(), nested=True)
        tracer.attach(training.engine)
        loop = Loop(attempt, config, rank, training, tracer, torch.device("cpu"))
        data = micro_batches(config, CorpusSamples(config, share_corpus(config, rank)), dp_rank=0)
        p2p.send = slow_send if case.slow_link else send
        for step in range(1, config.train.steps + 1):
            loop.step(step, data)
        p2p.send = send
        loop.close()
        torch.distributed.barrier()
        if rank == 0:
            run = read_run(attempt, config)
            seconds, step = min((run.files[0].step_seconds()[step], step) for step in run.timed_steps)
            stages = [file.instructions(step) for file in run.files]
            link_seconds = durations(stages, run.schedule)["send_activation"].mean(axis=1).tolist()
            answer = {**breakdown(replace(run, timed_steps=[step])), "link_seconds": link_seconds}
            fastest[case] = min(fastest.get(case, (seconds, answer)), (seconds, answer), key=itemgetter(0))
        training.destroy()
    if rank == 0:
        write_answer([fastest[case][1] for case in chosen])
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    rank_main() if "RANK" in os.environ else main()
