"""Training, as one rank does it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from harness.checkpoints import FOLDER
from harness.corpus import Corpus, prepare_corpus
from harness.machine import Machine, detect_machine
from harness.record.heartbeat import Heart
from harness.record.store import Attempt, write_json
from harness.run.carried import keep_beginning
from harness.run.checkpoint import load_checkpoint, save_checkpoint
from harness.run.compilation import gather_compilation
from harness.run.data import CorpusSamples, load_of, micro_batches, tell_documents
from harness.run.engines.engine import build_engine
from harness.run.evaluate import Evaluation
from harness.run.instruments.heartbeat import HeartbeatObserver
from harness.run.instruments.memory import reset_peak_memory
from harness.run.instruments.tracer import Tracer, build_clock
from harness.run.loop import Loop, is_due
from harness.run.result import write_result
from harness.spec.config import RunConfig


def train(attempt: Attempt, config: RunConfig, rank: int) -> None:
    """Train as configured and write metrics.jsonl, spans/ and, when every rank is done, result.json."""
    machine = detect_machine()
    device = set_up_device(config, machine)
    heart = Heart(attempt.path, rank)
    if rank == 0 and config.train.checkpoint_interval:
        keep_beginning(config, attempt.path / FOLDER)
    engine = build_engine(config, rank, phase=heart.phase)
    if rank == 0 and engine.settings is not None:
        write_json(attempt.ds_config_file, engine.settings)
    heart.phase("reading the data")
    corpus = share_corpus(config, rank)
    tracer = Tracer(build_clock(machine.device_kind), nested=config.tracking.trace_level == "collectives")
    tracer.attach(engine)
    num_chunks = config.parallel.num_chunks
    engine.observers.append(HeartbeatObserver(heart, lambda: engine.steps_taken, machine.device_kind, num_chunks))
    samples = CorpusSamples(config, corpus)
    tell_documents(engine.context, config, samples)
    load = partial(load_of, config, samples) if config.data.documents != "cut" else None
    loop = Loop(attempt, config, rank, engine, tracer, device, Evaluation(config, corpus, engine, rank), load)
    compiled = gather_compilation(engine.compilation, loop.group)
    heart.phase("reading the checkpoint" if config.train.resume else "beginning to train")
    done = load_checkpoint(Path(config.train.resume), engine, config, loop.group) if config.train.resume else 0
    if rank == 0 and done:
        print(f"goes on after step {done}, from {config.train.resume}", flush=True)
    data = micro_batches(config, samples, engine.topology.coordinate(rank).dp, first_step=done)
    reset_peak_memory()
    for step in range(done + 1, config.train.steps + 1):
        loop.step(step, data)
        if is_due(config.train.checkpoint_interval, step, config):
            heart.phase("writing a checkpoint")
            save_checkpoint(attempt.path / FOLDER, engine, config, step, loop.group)
    write_result(attempt, config, machine, device, loop, corpus, compiled, heart.phase)


def share_corpus(config: RunConfig, rank: int) -> Corpus:
    """The prepared corpus: rank 0 reads the text, or finds it in the cache, and tells the others."""
    train = config.train
    arguments = config.data, config.model.vocab_size, train.sequence_length, train.objective
    shared = [prepare_corpus(*arguments) if rank == 0 else None]
    dist.broadcast_object_list(shared, src=0)
    assert shared[0] is not None
    return shared[0]


def set_up_device(config: RunConfig, machine: Machine) -> torch.device:
    """Threads of the rank, and the device that `initialize_distributed` gave it."""
    torch.set_num_threads(config.launch.threads_per_rank)
    return torch.device("cpu") if machine.device_kind == "cpu" else torch.device("cuda", torch.cuda.current_device())
