"""What this machine has, as nvidia-smi, CUDA_VISIBLE_DEVICES, the driver and the control group tell it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import compose_raw

from harness import machine as module
from harness.errors import ConfigError
from harness.machine import Gpu, Machine, detect_machine, gpu_versions
from harness.record.store import environment
from harness.spec.resolve import load_config

TWO_GPUS = "0, GPU-aaaa-1111, NVIDIA H200, 580.1, 9.0\n3, GPU-bbbb-2222, NVIDIA A100-SXM4-80GB, 580.1, 8.0\n"
SPLIT = "0, GPU-a, NVIDIA H100, 580.1, 9.0, Disabled\n1, GPU-b, NVIDIA H100, 580.1, 9.0, Enabled\n"
Detect = Callable[..., list[Gpu]]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Detect:
    """GPUs found for what nvidia-smi does (a text to answer, an exception, None: it is absent), on a machine whose
    driver knows a GPU, or none."""
    for variable in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(module, "DRIVER_FOLDER", tmp_path / "driver")
    monkeypatch.setattr(module, "DEVICE_FOLDER", tmp_path / "dev")

    def detect(answer: Any = TWO_GPUS, visible: str | None = None, driver: bool = True, status: int = 0) -> list[Gpu]:
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        if driver:
            (tmp_path / "driver" / "0000:0f:00.0").mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(module.shutil, "which", lambda name: None if answer is None else f"/usr/bin/{name}")

        def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            if isinstance(answer, Exception):
                raise answer
            return subprocess.CompletedProcess(command, status, stdout=answer, stderr="")

        monkeypatch.setattr(module.subprocess, "run", run)
        return module._gpus()

    return detect


@pytest.mark.parametrize(
    ("visible", "numbers"),
    [(None, [0, 3]), ("3", [3]), ("3, 0", [3, 0]), ("", []), ("-1", []), ("0,-1,3", [0]), ("0,7", [0]),
     ("GPU-bbbb", [3]), ("GPU-bbbb-2222,GPU-aaaa", [3, 0])],
)  # fmt: skip
def test_visible_gpus(gpus: Detect, visible: str | None, numbers: list[int]) -> None:
    assert [gpu.index for gpu in gpus(visible=visible)] == numbers


def test_what_is_known_of_a_gpu(gpus: Detect) -> None:
    assert gpus("No devices were found\n", driver=False) == []
    assert gpus("", driver=False) == []
    assert gpus() == [
        Gpu(0, "GPU-aaaa-1111", "NVIDIA H200", "580.1", 9.0),
        Gpu(3, "GPU-bbbb-2222", "NVIDIA A100-SXM4-80GB", "580.1", 8.0),
    ]
    assert gpus("0, GPU-a, Old GPU, 400.0, [N/A]\n") == [Gpu(0, "GPU-a", "Old GPU", "400.0")]
    assert gpus(SPLIT, visible="0") == [Gpu(0, "GPU-a", "NVIDIA H100", "580.1", 9.0)]


def test_an_nvidia_smi_that_knows_less(gpus: Detect, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        fields = command[1].partition("=")[2]
        if "compute_cap" in fields:
            return subprocess.CompletedProcess(command, 2, stdout='Field "compute_cap" is not valid.\n', stderr="")
        return subprocess.CompletedProcess(command, 0, stdout="0, GPU-a, A GPU, with a comma\n", stderr="")

    gpus()
    monkeypatch.setattr(module.subprocess, "run", run)
    assert module._gpus() == [Gpu(0, "GPU-a", "A GPU, with a comma")]


@pytest.mark.parametrize(
    ("answer", "visible", "sentence"),
    [
        (TWO_GPUS, "MIG-4fa1", "CUDA_VISIBLE_DEVICES=MIG-4fa1 names a part of a GPU"),
        (TWO_GPUS, "7,0", "CUDA_VISIBLE_DEVICES=7,0 names none of this machine's GPUs 0, 3"),
        (TWO_GPUS, "GPU-cccc", "CUDA_VISIBLE_DEVICES=GPU-cccc names none of this machine's GPUs 0, 3"),
        (None, None, "has an NVIDIA GPU, but nvidia-smi is not on the PATH"),
        (subprocess.TimeoutExpired("nvidia-smi", 120), None, "nvidia-smi did not answer within 120 s"),
        (PermissionError(13, "Permission denied"), None, "nvidia-smi can't be started (Permission denied)"),
        ("No devices were found\n", None, "nvidia-smi failed with 'No devices were found'"),
        (SPLIT, None, "GPU 1 (NVIDIA H100) is split into parts (MIG)"),
        (SPLIT, "GPU-b", "GPU 1 (NVIDIA H100) is split into parts (MIG)"),
    ],
)
def test_a_gpu_that_cannot_be_read_is_no_cpu(gpus: Detect, answer: Any, visible: str | None, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        gpus(answer, visible)
    assert sentence in str(error.value)
    assert str(error.value).endswith("or set DS_ACCELERATOR=cpu to run on the CPU")


def test_a_failing_nvidia_smi_is_an_error_where_there_is_a_gpu(gpus: Detect, tmp_path: Path) -> None:
    said = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"
    assert gpus(said, driver=False, status=9) == []  # a login node with the tools alone
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    with pytest.raises(ConfigError, match=r"nvidia-smi failed with .NVIDIA-SMI has failed"):
        gpus(said, driver=False, status=9)


def test_cpu_wins_when_asked_for(gpus: Detect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert gpus() == []
    assert gpus(None) == []
    assert gpus(visible="MIG-1") == []


def test_a_build_of_torch_for_cpu_is_refused_on_gpus(gpus: Detect, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus()
    monkeypatch.setattr(module, "torch_cuda_version", lambda: None)
    with pytest.raises(ConfigError, match=r"has GPUs \(NVIDIA H200\), but the installed PyTorch is a build for CPU"):
        detect_machine.__wrapped__()
    monkeypatch.setattr(module, "torch_cuda_version", lambda: "13.0")
    found = detect_machine.__wrapped__()
    assert (found.device_kind, found.num_devices, found.visible_devices) == ("cuda", 2, (0, 3))
    assert (found.compute_capability, found.driver_version) == (8.0, "580.1")


@pytest.mark.parametrize(
    ("capability", "cuda", "driver", "sentence"),
    [
        ("9.0", "13.0", 12, "driver 535.1 runs CUDA up to version 12, but the installed PyTorch needs CUDA 13.0; "),
        ("7.0", "13.0", 13, "compute capability 7.0, but the installed PyTorch is for CUDA 13.0, which needs 7.5"),
        ("7.0", "12.6", 13, None), ("7.5", "13.0", 13, None), ("9.0", "13.2", None, None), ("[N/A]", "13.0", 13, None),
    ],
)  # fmt: skip
def test_gpus_that_torch_cannot_use_are_refused(
    capability: str,
    cuda: str,
    driver: int | None,
    sentence: str | None,
    gpus: Detect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus(f"0, GPU-a, A GPU, 535.1, {capability}, Disabled\n")
    monkeypatch.setattr(module, "torch_cuda_version", lambda: cuda)
    monkeypatch.setattr(module, "driver_cuda_version", lambda: driver)
    if sentence is None:
        assert detect_machine.__wrapped__().device_kind == "cuda"
        return
    with pytest.raises(ConfigError, match=re.escape(sentence)) as error:
        detect_machine.__wrapped__()
    assert str(error.value).endswith("or set DS_ACCELERATOR=cpu to run on the CPU")


def test_a_machine_without_a_driver_knows_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(module.ctypes, "CDLL", missing)
    assert module.driver_cuda_version() is None


@pytest.mark.parametrize(
    ("text", "version"),
    [("cuda: Optional[str] = None\n", None), ("cuda: Optional[str] = '13.0'\n", "13.0"), ("cuda = '12.8'\n", "12.8")],
)
def test_what_torch_was_built_for(
    text: str, version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{text}hip: Optional[str] = None\n")
    monkeypatch.setattr(module, "find_spec", lambda name: type("Spec", (), {"origin": str(tmp_path / "__init__.py")}))
    assert module.torch_cuda_version() == version


def test_versions_below_torch_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "torch_cuda_version", lambda: "13.0")
    package = type("Package", (), {"name": "nvidia-nccl-cu13", "version": "2.29.7"})
    monkeypatch.setattr(module, "distributions", lambda: [package])
    gpu = Machine("cuda", "a GPU", 1, 8, 2**33, driver_version="580.1")
    below = {"cuda": "13.0", "nccl": "2.29.7", "driver": "580.1"}
    assert gpu_versions(gpu) == below
    assert environment(gpu)["versions"].items() >= below.items()
    assert gpu_versions(Machine("cpu", "a CPU", 1, 8, 2**33)) == {}


@pytest.mark.parametrize(
    ("precision", "capability", "remedy"),
    [("bf16", 7.5, "use fp32 or fp16"), ("bf16", 6.1, "use fp32"), ("fp16", 6.1, "use fp32"), ("fp16", 7.0, None),
     ("bf16", 8.0, None), ("bf16", None, None), ("fp32", 5.2, None)],
)  # fmt: skip
def test_a_precision_the_gpu_lacks_is_refused(precision: str, capability: float | None, remedy: str | None) -> None:
    gpu = Machine("cuda", "some GPU", 1, 8, 2**33, compute_capability=capability)
    raw = compose_raw(f"train.precision={precision}", "parallel.zero_stage=1")
    if remedy is None:
        assert load_config(raw, gpu).train.precision == precision
        return
    with pytest.raises(ConfigError) as error:
        load_config(raw, gpu)
    assert str(error.value).startswith(f"train.precision={precision} needs a GPU of compute capability")
    assert str(error.value).endswith(remedy)


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
