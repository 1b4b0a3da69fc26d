"""What this machine has, as nvidia-smi, CUDA_VISIBLE_DEVICES and the control group tell it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import machine as module
from harness.machine import detect_machine

TWO_GPUS = "0, GPU-aaaa-1111, NVIDIA H200\n3, GPU-bbbb-2222, NVIDIA A100-SXM4-80GB\n"
Detect = Callable[..., dict[int, str]]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Detect:
    """GPUs found for an answer of nvidia-smi and a value of CUDA_VISIBLE_DEVICES."""

    def detect(answer: str = TWO_GPUS, visible: str | None = None) -> dict[int, str]:
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}")
        result = subprocess.CompletedProcess([], 0, stdout=answer)
        monkeypatch.setattr(module.subprocess, "run", lambda *args, **kwargs: result)
        return module._gpus()

    return detect


@pytest.mark.parametrize(
    ("visible", "numbers"),
    [(None, [0, 3]), ("3", [3]), ("3, 0", [3, 0]), ("", []), ("-1", []), ("0,-1,3", [0]), ("7,0", []),
     ("GPU-bbbb", [3]), ("GPU-bbbb-2222,GPU-aaaa", [3, 0]), ("GPU-cccc", [])],
)  # fmt: skip
def test_visible_gpus(gpus: Detect, visible: str | None, numbers: list[int]) -> None:
    assert list(gpus(visible=visible)) == numbers


def test_names_and_odd_answers(gpus: Detect) -> None:
    assert gpus() == {0: "NVIDIA H200", 3: "NVIDIA A100-SXM4-80GB"}
    assert gpus("No devices were found\n") == {}
    assert gpus("") == {}


def test_cpu_wins_when_asked_for(gpus: Detect, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert module._gpus() == {}


@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("150000 100000", 1),
        ("50000 100000", 1),
        ("9900000 100000", 8),
        ("", 8),
    ],
)
def test_cores_of_a_container(limit: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(module, "CGROUP_CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: set(range(8)))
    assert module._num_cores() == cores
    monkeypatch.setattr(module, "CGROUP_CPU_MAX", tmp_path / "missing")
    assert module._num_cores() == 8


def test_this_machine() -> None:
    machine = detect_machine()
    assert machine.num_devices >= 1
    assert machine.num_cores >= 1
    assert machine.memory_bytes > 2**28
    description = machine.describe()
    assert {"device_kind", "device_name", "num_cores", "host", "system"} <= set(description)
    assert "visible_devices" not in description
