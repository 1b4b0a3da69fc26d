"""What this machine has: devices, cores, memory. Read without torch, so that launchers stay quick."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


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


def process_started(pid: int) -> int | None:
    """When a process of this host began, in clock ticks since boot: a process number is used again, the pair is not.

    None when there is no such process, or it is a zombie.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


@cache
def detect_machine() -> Machine:
    """The machine this process runs on."""
    gpus = _gpus()
    return Machine(
        device_kind="cuda" if gpus else "cpu",
        device_name=next(iter(gpus.values())) if gpus else _cpu_name(),
        num_devices=len(gpus) or _num_cores(),
        num_cores=_num_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        visible_devices=tuple(gpus),
    )


def _num_cores() -> int:
    """Cores this process may run on, within the share a container grants."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_CPU_MAX.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no control group, or "max": no limit
        return cores


def _gpus() -> dict[int, str]:
    """Number -> name of the NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = [[field.strip() for field in line.split(",", 2)] for line in answer.splitlines() if line.count(",") >= 2]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return {int(index): name for index, _, name in rows}
    gpus: dict[int, str] = {}
    for device in map(str.strip, visible.split(",")):  # numbers or beginnings of UUIDs; CUDA stops at the first unknown
        matches = [row for row in rows if device == row[0] or (device.startswith("GPU-") and row[1].startswith(device))]
        if not matches:
            break
        gpus[int(matches[0][0])] = matches[0][2]
    return gpus


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
