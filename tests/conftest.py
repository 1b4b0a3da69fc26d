"""What every run of the tests does: it leaves no process behind, and says with its times how fast the machine is."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from distributed import servers
from xdist.scheduler import LoadScopeScheduling

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
        self._launches = 0  # of the workers

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker has ended."""
        self._launches += getattr(node, "workeroutput", {}).get("launches", 0)  # none if it crashed

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        launches = self._launches + num_launches()
        terminalreporter.section("machine and launches")
        terminalreporter.line(
            f"{self._gflops:.0f} GFLOP/s in fp32 products of 1024 x 1024 on one thread, when the tests began"
        )
        terminalreporter.line(f"{launches} launches of ranks, {num_attempts(config)} of `deepspeed`")


class Worker:
    """One of the processes of `-n`."""

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Tell `Run`."""
        session.config.workeroutput["launches"] = num_launches()  # type: ignore[attr-defined]


def num_launches() -> int:
    """Launches of ranks by this process."""
    return sum(server.num_launches for server in servers().values())


def num_attempts(config: pytest.Config) -> int:
    """Attempts in the tests' folders whose ranks `deepspeed` started: they have a guard or a heartbeat."""
    folder = config._tmp_path_factory.getbasetemp()
    return sum(started(file) for file in folder.rglob("attempt-*/status.json"))


def started(status_file: Path) -> bool:
    guard = (read_json(status_file) or {}).get("guard", {})
    return guard.get("pid", 1) > 1 or (status_file.parent / "heartbeat").exists()


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Worker())
    elif not config.option.collectonly:
        config.pluginmanager.register(Run())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # the long ones first


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Of the workers' tests: one by one, but those of a file that has fixtures of its own to the same worker."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if has_fixtures(self.config.rootpath / file) else nodeid


@cache
def has_fixtures(file: Path) -> bool:
    """Whether a test file makes something once for several tests."""
    return 'scope="module"' in file.read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    config.option.loadscopereorder = False  # by the number of tests
    return Scheduling(config, log)
