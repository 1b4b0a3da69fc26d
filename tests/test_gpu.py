"""GPUs: every branch for them on a stand-in without one, and what only a real one can show (`pytest -m gpu`)."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import free_port, run_ranks, standin_environment
from ranks_parity import TINY

from harness.run.instruments.tracer import CudaClock
from harness.spec.config import REPOSITORY

STEPS = ["train.steps=4", "train.warmup_steps=1", "train.global_batch_size=8", "data=synthetic"]
SMALL = [*TINY, *STEPS, "tracking.trace_steps=[3]"]
LARGE = ["train.micro_batch_size=128", "train.global_batch_size=1024", "train.learning_rate=0.01"]
"""Steps are long beside what happens between two instructions, and a time slice that a rank loses there; and the few of
them make more of the loss than one batch differs from the next."""
FP16 = ["train.precision=fp16", "parallel.zero_stage=1"]
BF16 = ["train.precision=bf16"]
BENCH = ["comm_bench.min_bytes=1024", "comm_bench.max_bytes=65536", "comm_bench.repeats=2"]

GENERATE = [
    *TINY, "task=generate", "generate.max_new_tokens=4", "generate.prompt_length=7", "generate.repeats=1",
    "generate.batch_size=3",
]  # fmt: skip

TASKS: dict[int, list[tuple[str, list[str]]]] = {
    2: [
        # Before any engine, which would set the device.
        ("comm_bench", [*SMALL, *BENCH, *BF16, "parallel.tp=2"]),
        ("train", [*SMALL, *BF16, "parallel.tp=2"]),
        ("train", [*SMALL, *LARGE, *FP16, "parallel.pp=2"]),
        ("train", [*SMALL, *LARGE, *FP16, "parallel.dp=2", "train.checkpoint_interval=2", "model.dropout=0.1"]),
        ("train", [*SMALL, "parallel.tp=2", "parallel.sequence_parallel=true", "train.activation_checkpointing=full"]),
        ("verify", [*SMALL, *FP16, "parallel.tp=2"]),
        ("verify", [*SMALL, *BF16, "parallel.pp=2"]),
        ("comm_bench", [*SMALL, *BENCH, *FP16, "parallel.pp=2"]),
        ("generate", [*GENERATE, *BF16, "parallel.pp=2", "generate.temperature=1.0", "generate.prefill_chunk=3"]),
        ("generate", [*GENERATE, "train.precision=fp16", "parallel.tp=2", "generate.repetition_penalty=1.2"]),
        ("forward", [*TINY, "task=forward", *STEPS, *BF16, "parallel.pp=2"]),
        ("verify", [*GENERATE, "parallel.tp=2"]),
    ],
    4: [
        ("train", [*SMALL, *LARGE, *BF16, "parallel.tp=2", "parallel.pp=2"]),
        ("train", [*SMALL, *LARGE, *FP16, "parallel.pp=2", "parallel.dp=2"]),
        ("verify", [*SMALL, *FP16, "parallel.tp=2", "parallel.dp=2"]),
        ("comm_bench", [*SMALL, *BENCH, *BF16, "parallel.tp=2", "parallel.dp=2"]),
    ],
}


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_tasks_run_on_their_own_devices(world_size: int, tmp_path: Path) -> None:
    tasks = TASKS[world_size]
    answer = run_ranks(
        world_size, "ranks_gpu", tasks, tmp_path, variables=standin_environment(world_size, tmp_path / "cache")
    )
    for rank, device in enumerate(answer["devices"]):
        assert device["current"] == rank
        assert {call[1] for call in device["calls"]} == {rank}, "another device than its own was set or waited for"
        assert [index for index, peak in enumerate(device["peak"]) if peak] == [rank]
    for (task, overrides), result in zip(tasks, answer["results"], strict=True):
        check_result(task, overrides, result)


def check_result(task: str, overrides: list[str], result: dict[str, Any]) -> None:
    if task == "verify":
        wrong = [comparison for comparison in result["comparisons"] if not comparison["passed"]]
        assert not wrong, overrides
    elif task in ("generate", "forward"):
        assert result["row"]["tokens_per_second"] > 0
        assert result["kv_cache_bytes"]["measured"] == result["kv_cache_bytes"]["predicted"]
        assert result["transport"] == "nccl"
    elif task == "comm_bench":
        assert result["transport"] == "nccl"
        assert result["hardware"]["device_name"] == "Stand-in GPU"
        assert all(seconds > 0 for found in result["measurements"] for seconds in found["seconds"])
    else:
        row = result["row"]
        assert row["last_loss"] < row["first_loss"] or "model.dropout=0.1" in overrides, overrides
        buckets = 2 * 2 * 500_000_000 if FP16[0] in overrides else 0  # that DeepSpeed reduces ZeRO's gradients in
        assert 0 < row["peak_memory_bytes"] - buckets < 2**26  # of tensors on the device, not of the process
        assert row["gemm_utilization"] > 0
        assert all(accounting["closes"] for accounting in result["accounting"]), overrides


def check_trace(attempt: Path) -> None:
    """Memory is noted as instructions end, to the nanosecond; the trace's microseconds are rounded."""
    trace = json.loads((attempt / "trace.json").read_text())["traceEvents"]
    ends = {round((event["ts"] + event["dur"]) * 1e3) for event in trace if event["ph"] == "X"}
    memory = {round(event["ts"] * 1e3) for event in trace if event["ph"] == "C"}
    assert memory
    assert memory <= ends


def start(launcher: str, *arguments: str, num_gpus: int, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "launchers" / launcher), *arguments]
    environment = os.environ | standin_environment(num_gpus, cwd / "cache")
    del environment["DS_ACCELERATOR"]  # found by nvidia-smi
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_a_sweep_on_gpus_goes_from_the_command_line_to_its_rows(tmp_path: Path) -> None:
    options = [*SMALL, *FP16, "parallel.dp=fill", "sweep.verify=true", f"results_dir={tmp_path}", "sweep.name=gpus"]
    done = start("sweep.py", *options, "parallel.tp=1,2", "tracking.wandb.mode=disabled", num_gpus=2, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader((tmp_path / "gpus" / "results.csv").open()))
    assert [(row["status"], row["parity"], row["world_size"]) for row in rows] == [("ok", "pass", "2")] * 2
    assert {(row["tp"], row["dp"]) for row in rows} == {("1", "2"), ("2", "1")}
    status = json.loads(next((tmp_path / "gpus").glob("points/*/attempt-1/status.json")).read_text())
    assert status["environment"]["versions"].keys() >= {"cuda", "nccl", "driver"}
    assert status["environment"]["hardware"]["device_kind"] == "cuda"


@pytest.mark.slow
def test_the_users_own_deepspeed_runs_on_gpus(tmp_path: Path) -> None:
    arguments = [*SMALL, *BF16, "parallel.pp=2", f"results_dir={tmp_path}", "tracking.wandb.mode=disabled"]
    command = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    command += [REPOSITORY / "launchers" / "train.py", *arguments]
    environment = os.environ | standin_environment(2, tmp_path / "cache")
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600)
    result = next(tmp_path.glob("runs/points/*/attempt-1/result.json"), None)
    assert result is not None, done.stdout[-5000:] + done.stderr[-5000:]
    assert [stage["stage"] for stage in json.loads(result.read_text())["stages"]] == [0, 1]
    check_trace(result.parent)


# What only a real GPU can show; one is enough. `./launchers/test.sh -m gpu` runs these and nothing else.
REAL = [
    "model=gpt2_small",
    "train.sequence_length=1024",
    "train.global_batch_size=16",
    "train.micro_batch_size=8",
    "train.steps=12",
    "train.warmup_steps=4",
    "tracking.trace_steps=[6]",
    "tracking.wandb.mode=disabled",
]


def train_on_gpu(tmp_path: Path, *overrides: str) -> dict[str, Any]:
    """Result of a run of one rank on this machine's GPU."""
    command = [sys.executable, str(REPOSITORY / "launchers" / "train.py"), *overrides, f"results_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    newest = max(tmp_path.glob("runs/points/*/attempt-*/result.json"), key=lambda path: path.stat().st_mtime)
    result: dict[str, Any] = json.loads(newest.read_text())
    return result | {"folder": str(newest.parent)}


@pytest.fixture
def gpu() -> torch.device:
    assert torch.cuda.is_available(), "these tests need an NVIDIA GPU and a build of PyTorch for it"
    return torch.device("cuda", 0)


@pytest.mark.gpu
def test_events_agree_with_the_host(gpu: torch.device) -> None:
    """Products that take some tenths of a second, by CUDA events and by the host that waits for them."""
    a = torch.randn(8192, 8192, device=gpu)
    for _ in range(3):
        a @ a
    clock = CudaClock()
    clock.start_step()
    start, began = clock.mark(), time.monotonic_ns()
    for _ in range(30):
        a @ a
    end = clock.mark()
    launched = time.monotonic_ns()
    moments = clock.nanoseconds([start, end])
    host = time.monotonic_ns() - began
    assert moments[1] - moments[0] == pytest.approx(host, rel=0.02)
    assert moments[0] == pytest.approx(began, abs=2e6)
    assert launched - began < 0.2 * host  # the host is ahead: an asynchronous device


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_on_a_gpu(precision: str, gpu: torch.device, tmp_path: Path) -> None:
    result = train_on_gpu(tmp_path, *REAL, f"train.precision={precision}", "parallel.zero_stage=1")
    row, counted = result["row"], result["memory"][0]
    assert row["last_loss"] < row["first_loss"]
    assert all(accounting["closes"] for accounting in result["accounting"])
    assert row["bubble_fraction_measured"] < 0.1  # one stage
    assert 0 <= row["launch_gap_fraction_max"] <= 1
    assert 0 < row["gemm_utilization"] < 1
    # Weights, gradients, moments and activations are there; workspaces and buckets come on top.
    assert counted["total_bytes"] < 1.1 * counted["measured_peak_bytes"] < 4 * counted["total_bytes"]
    check_trace(Path(result["folder"]))


@pytest.mark.gpu
def test_a_light_model_waits_for_launches(gpu: torch.device, tmp_path: Path) -> None:
    heavy = train_on_gpu(tmp_path, *REAL, "train.precision=bf16", "parallel.zero_stage=1")
    light = train_on_gpu(tmp_path, "model=gpt2_tiny", "train.precision=bf16", "tracking.wandb.mode=disabled")
    assert light["row"]["launch_gap_fraction_max"] > 0.5 > heavy["row"]["launch_gap_fraction_max"]
    assert light["row"]["peak_memory_bytes"] < heavy["row"]["peak_memory_bytes"] / 10


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [["train.precision=fp32", "model.dropout=0.1"], ["train.precision=bf16"], FP16],
    ids=["fp32", "bf16", "fp16"],
)
def test_parity_on_a_gpu(options: list[str], gpu: torch.device, tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "launchers" / "verify.py"), *options, f"results_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parity: pass" in done.stdout
