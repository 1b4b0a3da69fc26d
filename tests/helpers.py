"""Shared by the tests: a small machine, configurations as Hydra composes them, and run directories."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from harness.launch.compose import Composer
from harness.machine import Machine
from harness.record.columns import inferred_columns, measured_columns
from harness.record.inference import Bubbles, InferenceRecord, MeasuredInference, PhaseRecord, inference_line
from harness.record.sources import MeasuredRun
from harness.record.steps import StepRecord, metrics_line
from harness.record.store import Attempt, Status, SweepDirectory, environment, write_atomically, write_json
from harness.spans.span import Bubble
from harness.spec.config import REPOSITORY, RunConfig
from harness.spec.identity import identity as hash_of
from harness.spec.resolve import load_config

MACHINE = Machine("cpu", "test cpu", num_devices=2, num_cores=2, memory_bytes=8 * 2**30)


def compose_raw(*overrides: str, config_name: str = "config") -> dict[str, Any]:
    """Plain containers of conf/ with `overrides`; `deepspeed.KEY=VALUE` may name new keys."""
    return composer(config_name).compose(overrides)


@cache
def composer(config_name: str) -> Composer:
    """Of all tests: Hydra takes 75 ms for each set of group choices."""

    def load(overrides: list[str]) -> DictConfig:
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            return compose(config_name, overrides=overrides)

    return Composer(load)


@cache
def make_config(*overrides: str, machine: Machine = MACHINE) -> RunConfig:
    """The checked configuration of a run on `machine`."""
    return load_config(compose_raw(*overrides), machine)


def agree(check: Callable[[int], None], tries: int = 3) -> None:
    """Call a check of measured times with 0, 1 ... until one passes: other work on the machine disturbs some of them.

    Raises:
        AssertionError: of the last try.
    """
    for number in range(tries - 1):
        with suppress(AssertionError):
            return check(number)
    return check(tries - 1)


def step_records(step_seconds: Sequence[float], bubble: float = 0.25) -> list[StepRecord]:
    """Records of a run whose loss falls by 0.1 per step."""
    return [
        StepRecord(
            step=step,
            loss=5.0 - 0.1 * step,
            learning_rate=1e-3,
            grad_norm=None if step == 1 else 0.5,
            step_seconds=seconds,
            bubble=Bubble(bubble, bubble / (1 - bubble), bubble * seconds),
            forward_seconds=[seconds / 3],
            backward_seconds=[2 * seconds / 3],
            peak_memory_bytes=2**20 * step,
        )
        for step, seconds in enumerate(step_seconds, start=1)
    ]


def record_attempt(
    sweep: SweepDirectory,
    *overrides: str,
    status: Status = "ok",
    reason: str | None = None,
    step_seconds: Sequence[float] = (9.0, 9.0, 0.1, 0.1, 0.1),
    machine: Machine = MACHINE,
    command: str = "deepspeed --num_gpus 2 launchers/train.py",
    identity: str = "",
) -> Attempt:
    """An attempt as a run leaves it: measured when its status is ok, cut off otherwise."""
    config = make_config(f"results_dir={sweep.results_dir}", f"sweep.name={sweep.name}", *overrides, machine=machine)
    attempt = sweep.point(config, identity or hash_of(config, "data")).new_attempt()
    attempt.write_config(config)
    write_atomically(attempt.command_file, command + "\n")
    attempt.write_status("running", environment=environment(machine))
    records = step_records(step_seconds)
    lines = [json.dumps(metrics_line(record, config)) + "\n" for record in records]
    if status == "ok":
        measured = measured_columns(MeasuredRun(config, records, machine, gemm_flops_per_second=1e11))
        write_json(attempt.result_file, {"row": measured})
    else:
        lines = [*lines[:2], lines[2][:10]]
    attempt.metrics_file.write_text("".join(lines))
    attempt.write_status(status, reason)
    return attempt


def inference_records(seconds: Sequence[float], tokens: int = 1000) -> list[InferenceRecord]:
    """Measurements of two requests, a quarter of whose time is prefill."""
    return [
        InferenceRecord(
            number=number,
            seconds=whole,
            tokens=tokens,
            peak_memory_bytes=2**20 * number,
            first_token_seconds=[whole / 10, whole / 5],
            inter_token_seconds=[whole / 100] * 3,
            queue_seconds=[0.0, whole / 10],
            prefill=PhaseRecord(whole / 4, 600, Bubbles(0.2, 0.25)),
            decode=PhaseRecord(whole * 3 / 4, tokens - 2, Bubbles(0.1, 0.125)),
        )
        for number, whole in enumerate(seconds, start=1)
    ]


def record_inference(
    sweep: SweepDirectory,
    *overrides: str,
    status: Status = "ok",
    seconds: Sequence[float] = (0.4, 0.5, 0.6),
    machine: Machine = MACHINE,
    command: str = "deepspeed --num_gpus 2 launchers/generate.py",
) -> Attempt:
    """An attempt as a run of task=generate, unless the overrides say otherwise, leaves it: cut off unless it is ok."""
    wanted = ("task=generate", *overrides, f"results_dir={sweep.results_dir}", f"sweep.name={sweep.name}")
    config = make_config(*wanted, machine=machine)
    attempt = sweep.point(config, hash_of(config, "data")).new_attempt()
    attempt.write_config(config)
    write_atomically(attempt.command_file, command + "\n")
    attempt.write_status("running", environment=environment(machine))
    records = inference_records(seconds)
    if config.task == "forward":
        none: dict[str, Any] = {"first_token_seconds": [], "inter_token_seconds": [], "queue_seconds": []}
        records = [replace(record, **none, decode=None) for record in records]
    lines = [json.dumps(inference_line(record)) + "\n" for record in records]
    if status == "ok":
        counting = records[config.train.warmup_steps :] if config.task == "forward" else records
        run = MeasuredInference(config, counting, machine, kv_cache_bytes=2**20)
        write_json(attempt.result_file, {"row": inferred_columns(run)})
    else:
        lines[-1] = lines[-1][:10]
    attempt.metrics_file.write_text("".join(lines))
    attempt.write_status(status, None if status == "ok" else "boom")
    return attempt


@dataclass
class OfflineRun:
    """What an offline wandb run file holds, as `wandb sync` would send it."""

    run: Any = None
    """The last `RunRecord`: run_id, project, run_group, job_type, display_name, tags."""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    """Name or pattern of a metric -> its axis."""
    exit_code: int | None = None


def read_offline_run(path: Path) -> OfflineRun:
    """Read a `run-ID.wandb` file: protocol buffers of wandb in the log format of LevelDB.

    https://github.com/google/leveldb/blob/main/doc/log_format.md, with a header of 7 bytes and a plain CRC-32.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    def put(target: dict[str, Any], item: Any) -> None:
        *parents, last = item.nested_key or [item.key]
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = json.loads(item.value_json)

    content, read = path.read_bytes(), OfflineRun()
    assert content.startswith(b":W&B")
    for message in _leveldb_messages(content, start=7):
        record = Record.FromString(message)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            read.run = record.run
        if kind in ("run", "config"):
            for item in (record.run.config if kind == "run" else record.config).update:
                put(read.config, item)
        elif kind == "history":
            read.history.append({})
            for item in record.history.item:
                put(read.history[-1], item)
        elif kind == "summary":
            for item in record.summary.update:
                put(read.summary, item)
        elif kind == "metric":
            read.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "exit":
            read.exit_code = record.exit.exit_code
    return read


def _leveldb_messages(content: bytes, start: int) -> Iterator[bytes]:
    """Messages of a LevelDB log: chunks with checksums that never cross a block of 32 KiB."""
    block_bytes, header, position, message = 32768, struct.Struct("<IHB"), start, b""
    while position < len(content):
        if block_bytes - position % block_bytes < header.size:
            position += block_bytes - position % block_bytes
            continue
        checksum, length, kind = header.unpack_from(content, position)
        position += header.size
        chunk = content[position : position + length]
        assert checksum == zlib.crc32(bytes([kind]) + chunk), f"damaged at byte {position}"
        position += length
        message += chunk
        if kind in (1, 4):  # whole, or last part
            yield message
            message = b""
