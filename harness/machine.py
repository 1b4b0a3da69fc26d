"""What this machine has: devices, cores, memory. Read without torch, so that launchers stay quick."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import resource
import shutil
import subprocess
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from harness.errors import ConfigError

CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
DRIVER_FOLDER = Path("/proc/driver/nvidia/gpus")
"""Has an entry for each GPU that the NVIDIA driver knows."""
DEVICE_FOLDER = Path("/dev")
NAMES_OF_GPU = "index,uuid,name"
"""What every nvidia-smi can be asked for."""
NVIDIA_SMI_SECONDS = 120.0
"""It takes half a minute where many GPUs wake up."""
ON_CPU = "set DS_ACCELERATOR=cpu to run on the CPU"
SMALLEST_CAPABILITY_OF_CUDA = {13: 7.5}
"""Major version of CUDA -> compute capability of the oldest GPUs it compiles for (CUDA 13 release notes: Turing)."""


@dataclass(frozen=True)
class Machine:
    """Hardware of one node as the harness sees it."""

    device_kind: Literal["cpu", "cuda"]
    device_name: str
    num_devices: int
    """GPUs; without any, CPU cores."""
    num_cores: int
    """Cores this process may use."""
    memory_bytes: int
    """Host memory."""
    visible_devices: tuple[int, ...] = ()
    """GPU numbers to start ranks on."""
    compute_capability: float | None = None
    """Of the GPUs, the lowest; None where nvidia-smi doesn't tell."""
    driver_version: str | None = None
    """Of the NVIDIA driver."""

    def describe(self) -> dict[str, Any]:
        """For result files: the fields by name, and the host."""
        description = asdict(self)
        del description["visible_devices"]
        return {**description, "host": platform.node(), "system": platform.platform()}


def cache_file(kind: str, machine: Machine, *circumstances: str) -> Path:
    """Where something measured on this kind of machine under some circumstances is kept in the user's cache."""
    device = "".join(c if c.isalnum() else "-" for c in machine.device_name)
    return cache_folder(kind) / f"{'_'.join([device, *circumstances, version('torch')])}.json"


def cache_folder(kind: str) -> Path:
    """The user's cache for one kind of content: `$XDG_CACHE_HOME/shardwright/KIND`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardwright" / kind


def peak_resident_bytes() -> int:
    """Largest memory this process had in RAM, since it began or its peak was reset (proc(5), clear_refs)."""
    with contextlib.suppress(OSError):
        if match := re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(match[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of its parent, too, before it was loaded


def process_started(pid: int) -> int | None:
    """When a process of this host began, in clock ticks since boot: a process number is used again, the pair is not.

    None when there is no such process, or it is a zombie.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def gpu_versions(machine: Machine) -> dict[str, str]:
    """What lies between torch and the GPUs of a machine: CUDA, NCCL and the driver; nothing without GPUs."""
    if machine.device_kind == "cpu":
        return {}
    nccl = [package.version for package in distributions() if package.name.startswith("nvidia-nccl-cu")]
    found = {"cuda": torch_cuda_version(), "nccl": next(iter(nccl), None), "driver": machine.driver_version}
    return {name: value or "unknown" for name, value in found.items()}


@cache
def detect_machine() -> Machine:
    """The machine this process runs on.

    Raises:
        ConfigError: there are GPUs that can't be used as they are, and nobody asked for the CPU.
    """
    gpus = _gpus()
    known = [gpu.compute_capability for gpu in gpus if gpu.compute_capability is not None]
    if gpus:
        _check_torch(gpus[0], min(known, default=None))
    return Machine(
        device_kind="cuda" if gpus else "cpu",
        device_name=gpus[0].name if gpus else _cpu_name(),
        num_devices=len(gpus) or _num_cores(),
        num_cores=_num_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        visible_devices=tuple(gpu.index for gpu in gpus),
        compute_capability=min(known, default=None),
        driver_version=gpus[0].driver_version if gpus else None,
    )


def _check_torch(gpu: Gpu, compute_capability: float | None) -> None:
    """Refuse GPUs that the installed torch can't use: its ranks would end in a traceback each.

    Args:
        gpu: one of them.
        compute_capability: the lowest.
    """
    cuda = torch_cuda_version()
    if cuda is None:
        raise ConfigError(
            f"this machine has GPUs ({gpu.name}), but the installed PyTorch is a build for CPU; run "
            f"./launchers/quickstart.sh here, which installs the one for GPUs, or {ON_CPU}"
        )
    major, driver = int(cuda.partition(".")[0]), driver_cuda_version()
    if driver is not None and driver < major:
        raise ConfigError(
            f"the NVIDIA driver {gpu.driver_version or ''} runs CUDA up to version {driver}, but the installed PyTorch "
            f"needs CUDA {cuda}; update the driver, install a PyTorch for CUDA {driver}, or {ON_CPU}"
        )
    smallest = SMALLEST_CAPABILITY_OF_CUDA.get(major, 0.0)
    if compute_capability is not None and compute_capability < smallest:
        raise ConfigError(
            f"this machine has a GPU of compute capability {compute_capability}, but the installed PyTorch is for CUDA "
            f"{cuda}, which needs {smallest} or more; choose newer GPUs by CUDA_VISIBLE_DEVICES, install a PyTorch for "
            f"an older CUDA, or {ON_CPU}"
        )


def driver_cuda_version() -> int | None:
    """Newest major version of CUDA that the driver runs, forward-compatibility packages included; None: unknown."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else version.value // 1000


def torch_cuda_version() -> str | None:
    """CUDA that the installed torch was built for, such as 13.0, read without importing it; None: a build for CPU."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=]*=\s*['\"](.+?)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def _num_cores() -> int:
    """Cores this process may run on, within the share a container grants."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_CPU_MAX.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no control group, or "max": no limit
        return cores


@dataclass(frozen=True)
class Gpu:
    """What nvidia-smi tells of a GPU."""

    index: int
    uuid: str
    name: str
    driver_version: str | None = None
    compute_capability: float | None = None
    is_split: bool = False
    """Into parts (MIG)."""


def _gpus() -> list[Gpu]:
    """The NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; none where the user asked for the CPU.

    Raises:
        ConfigError: GPUs are here and can't be read, or none of those that CUDA_VISIBLE_DEVICES names.
    """
    chosen = _chosen_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if split := [gpu for gpu in chosen if gpu.is_split]:
        raise ConfigError(
            f"GPU {split[0].index} ({split[0].name}) is split into parts (MIG), on which deepspeed can't start ranks; "
            f"choose whole GPUs by CUDA_VISIBLE_DEVICES, switch MIG off, or {ON_CPU}"
        )
    return chosen


def _chosen_gpus(visible: str | None) -> list[Gpu]:
    """All GPUs, or those that CUDA_VISIBLE_DEVICES names."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or (visible is not None and visible.strip() in ("", "-1")):
        return []
    gpus = _read_gpus()
    if visible is None or not gpus:
        return gpus
    chosen: list[Gpu] = []
    for device in map(str.strip, visible.split(",")):  # numbers or beginnings of UUIDs; CUDA stops at the first unknown
        if device.startswith("MIG-"):
            raise ConfigError(
                f"CUDA_VISIBLE_DEVICES={visible} names a part of a GPU (MIG), on which deepspeed can't start ranks; "
                f"name whole GPUs, or {ON_CPU}"
            )
        matches = [
            gpu
            for gpu in gpus
            if device == str(gpu.index) or (device[:4] == "GPU-" and gpu.uuid[: len(device)] == device)
        ]
        if not matches:
            break
        chosen.append(matches[0])
    if not chosen:
        there = ", ".join(str(gpu.index) for gpu in gpus)
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={visible} names none of this machine's GPUs {there}; name one, or {ON_CPU}"
        )
    return chosen


def _read_gpus() -> list[Gpu]:
    """All NVIDIA GPUs of this machine.

    Raises:
        ConfigError: there are some, and nvidia-smi does not tell which.
    """
    problem = "nvidia-smi is not on the PATH"
    if shutil.which("nvidia-smi") is not None:
        for fields in (f"{NAMES_OF_GPU},driver_version,compute_cap,mig.mode.current", NAMES_OF_GPU):  # old: know less
            try:
                answer = subprocess.run(
                    ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
                    capture_output=True,
                    text=True,
                    timeout=NVIDIA_SMI_SECONDS,
                )
            except subprocess.TimeoutExpired:
                problem = f"nvidia-smi did not answer within {NVIDIA_SMI_SECONDS:g} s"
                break
            except OSError as error:
                problem = f"nvidia-smi can't be started ({error.strerror})"
                break
            lines = [line for line in answer.stdout.splitlines() if line.count(",") >= 2]
            if answer.returncode == 0 and lines:
                return [_gpu(line, fields.count(",")) for line in lines]
            said = (answer.stdout + answer.stderr).strip().splitlines()
            problem = f"nvidia-smi failed with {said[0] if said else f'exit status {answer.returncode}'!r}"
    if any(DRIVER_FOLDER.glob("*")) or any(DEVICE_FOLDER.glob("nvidia[0-9]*")):
        raise ConfigError(f"this machine has an NVIDIA GPU, but {problem}; mend that, or {ON_CPU}")
    return []


def _gpu(line: str, num_commas: int) -> Gpu:
    """A line of nvidia-smi's answer; the name may hold commas where it comes last."""
    index, uuid, name, *rest = (field.strip() for field in line.split(",", num_commas))
    driver, capability, mig = [*rest, None, None, None][:3]
    known = re.fullmatch(r"\d+\.\d+", capability or "")  # or "[N/A]"
    return Gpu(int(index), uuid, name, driver, float(known[0]) if known else None, is_split=mig == "Enabled")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
