"""Forward passes alone, as one rank does them: of the model through its pipeline, or of one layer."""

from __future__ import annotations

from harness.corpus import draw
from harness.machine import detect_machine
from harness.record.heartbeat import Heart
from harness.record.inference import InferenceRecord, PhaseRecord, inference_line
from harness.record.store import Attempt
from harness.run.inference.meter import Meter
from harness.run.inference.ring import Ring
from harness.run.inference.stage import Stage
from harness.run.instruments.heartbeat import HeartbeatObserver
from harness.run.instruments.memory import reset_peak_memory
from harness.run.tasks.generate import conclude
from harness.run.tasks.train import set_up_device
from harness.spec.batching import Passes, Row, Work
from harness.spec.config import RunConfig
from harness.strict_json import dumps


def forward(attempt: Attempt, config: RunConfig, rank: int) -> None:
    """Compute the scores of a global batch of random tokens again and again; write metrics.jsonl and result.json.

    The first `train.warmup_steps` passes are not timed. Nothing is kept from one pass for another, and no loss is
    computed.
    """
    machine, train = detect_machine(), config.train
    set_up_device(config, machine)
    heart = Heart(attempt.path, rank)
    prompts = random_rows(config)
    stage = Stage(config, rank, prompts, None, phase=heart.phase)
    heart.phase("meeting the other stages")
    ring = Ring(stage, rank, prompts, train.micro_batch_size)
    done = 0
    ring.observers.append(HeartbeatObserver(heart, lambda: done, machine.device_kind))
    meter = Meter(attempt, config, rank, ring, machine)
    reset_peak_memory()
    records: list[InferenceRecord] = []
    metrics = attempt.metrics_file.open("w") if rank == 0 else None
    tokens = train.global_batch_size * train.sequence_length
    for done in range(train.steps):
        is_timed = done >= train.warmup_steps
        kept = is_timed and done - train.warmup_steps < config.tracking.span_steps
        kept = kept or done + 1 in config.tracking.trace_steps
        feed = Passes(works_of(config, done)) if rank == 0 else None
        timed = meter.run(feed, lambda _: None, done + 1 if kept else None)
        if timed is None or metrics is None:
            continue
        phase = PhaseRecord(timed.seconds, tokens, timed.bubbles)
        record = InferenceRecord(done + 1, timed.seconds, tokens, timed.peak_memory_bytes, prefill=phase)
        metrics.write(dumps(inference_line(record)) + "\n")
        metrics.flush()
        if is_timed:
            records.append(record)
    heart.phase("writing the result")
    meter.close()
    if metrics is not None:
        metrics.close()
    conclude(attempt, config, machine, rank, ring, meter, records, [0] * config.parallel.pp)


def works_of(config: RunConfig, step: int) -> list[Work]:
    """The micro-batches of a global batch."""
    train, m = config.train, config.num_micro_batches
    size = train.micro_batch_size
    return [
        Work(
            step * m + number,
            "prefill",
            tuple(Row(i, number * size + i, 0, train.sequence_length, False) for i in range(size)),
        )
        for number in range(m)
    ]


def random_rows(config: RunConfig) -> list[list[int]]:
    """Tokens of each row of a global batch."""
    train, vocab_size = config.train, config.model.vocab_size
    return [
        [int(token) for token in draw(train.sequence_length, "forward", train.seed, number) % vocab_size]
        for number in range(train.global_batch_size)
    ]
