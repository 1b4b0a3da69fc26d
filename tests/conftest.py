"""What every run of the tests does: it leaves no process behind, and says with its times how fast the machine is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import servers

from harness.record.store import read_json

FLOPS = """
import time, numpy
a = numpy.random.default_rng(0).random((1024, 1024), dtype=numpy.float32)
products, end = 0, time.perf_counter() + 0.3
a @ a
began = time.perf_counter()
while (now := time.perf_counter()) < end or not products:
    a @ a
    products += 1
print(products * 2 * 1024**3 / (now - began) / 1e9)
"""


class Run:
    """One run of pytest."""

    def __init__(self) -> None:
        folder = Path(__file__).parent
        mark = f"SHARDWRIGHT_PYTEST_{os.getpid()}"
        reaper = [sys.executable, "-I", "-S", folder / "reaper.py", mark]
        self._reaper = subprocess.Popen(reaper, stdin=subprocess.PIPE, start_new_session=True)
        os.environ[mark] = "1"  # of all that is started from now on
        one_thread = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        product = subprocess.run([sys.executable, "-c", FLOPS], env=one_thread, capture_output=True, text=True)
        self._gflops = float(product.stdout)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        launches = sum(server.num_launches for server in servers().values())
        terminalreporter.section("machine and launches")
        terminalreporter.line(
            f"{self._gflops:.0f} GFLOP/s in fp32 products of 1024 x 1024 on one thread, when the tests began"
        )
        terminalreporter.line(f"{launches} launches of ranks, {num_attempts(config)} of `deepspeed`")


def num_attempts(config: pytest.Config) -> int:
    """Attempts in the tests' folders whose ranks `deepspeed` started: they have a guard or a heartbeat."""
    folder = config._tmp_path_factory.getbasetemp()
    return sum(started(file) for file in folder.rglob("attempt-*/status.json"))


def started(status_file: Path) -> bool:
    guard = (read_json(status_file) or {}).get("guard", {})
    return guard.get("pid", 1) > 1 or (status_file.parent / "heartbeat").exists()


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.collectonly:
        config.pluginmanager.register(Run())
