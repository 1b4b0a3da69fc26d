"""Start ranks for tests: real processes over gloo, as the launcher sets them up but without its seconds.

A rank program is a module with a function `run(argument, folder)`; what it returns in rank 0 is the answer of the
launch. The ranks are forked by a process that has imported torch and DeepSpeed once: `rank_server`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any

from harness.launch.backends.local import reserve_port

REPOSITORY = Path(__file__).resolve().parent.parent
RANK_VARIABLES = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}",
    # What most programs would import by themselves; the harness is not among it, as programs patch it.
    "RANK_IMPORTS": "deepspeed.runtime.pipe.engine deepspeed.runtime.zero.muon.muon_optimizer hydra psutil pydantic "
    "torch.distributed.checkpoint",
}
"""Environment of every rank, unless a test says otherwise."""


def free_port() -> int:
    """One for the life of this process, and never one that the kernel may give to a connection meanwhile."""
    return reserved.enter_context(reserve_port())


reserved = ExitStack()


def standin_environment(num_gpus: int, cache: Path) -> dict[str, str]:
    """Variables with which every Python finds as many GPUs that are none: `cuda_standin`.

    Args:
        cache: an empty one, as what was measured once is not measured again.
    """
    folder = REPOSITORY / "tests" / "cuda_standin"
    return {
        "STANDIN_GPUS": str(num_gpus),
        "DS_ACCELERATOR": "cuda",
        "XDG_CACHE_HOME": str(cache),
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(map(str, [folder, REPOSITORY, REPOSITORY / "tests"])),
    }


def run_ranks(
    world_size: int,
    module: str,
    argument: Any,
    folder: Path,
    timeout: float = 600,
    variables: dict[str, str] | None = None,
) -> Any:
    """Call `run(argument, folder)` of a module in `world_size` ranks, and return what it returns in rank 0.

    Args:
        argument: what JSON can hold, as is the answer.
        folder: where the ranks work, and leave their logs.
        timeout: seconds after which they are killed.
        variables: of the ranks' environment, over those that every rank has.
    """
    statuses = start_ranks(world_size, module, argument, folder, timeout, variables).wait()
    logs = "\n".join(f"--- rank {r}\n" + (folder / f"rank{r}.log").read_text()[-3000:] for r in range(world_size))
    assert not any(statuses), f"exit statuses {statuses}\n{logs}"
    return json.loads((folder / "answer.json").read_text())


def start_ranks(
    world_size: int,
    module: str,
    argument: Any,
    folder: Path,
    timeout: float = 600,
    variables: dict[str, str] | None = None,
) -> Ranks:
    """Start the ranks of `run_ranks`."""
    chosen = RANK_VARIABLES | (variables or {})
    port = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    launch = {
        "world_size": world_size,
        "module": module,
        "argument": argument,
        "timeout": timeout,
        "environment": os.environ | chosen | port,
    }
    (folder / "launch.json").write_text(json.dumps(launch))
    ranks = ranks_with(tuple(sorted(chosen.items())))
    ranks.start(folder)
    return ranks


def ranks_with(variables: tuple[tuple[str, str], ...]) -> Ranks:
    """The one server of this process for ranks with these variables."""
    if variables not in servers():
        servers()[variables] = Ranks(dict(variables))
    return servers()[variables]


@cache
def servers() -> dict[tuple[tuple[str, str], ...], Ranks]:
    """Of this process, by the variables of their ranks."""
    return {}


class Ranks:
    """Launches of ranks, one at a time, by a server that starts with the first and ends with this process."""

    def __init__(self, variables: dict[str, str]) -> None:
        self._variables = variables
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the server writes
        self._server: subprocess.Popen[bytes] | None = None
        self._pids: list[int] = []
        self.num_launches = 0

    def start(self, folder: Path) -> None:
        """Start the launch described in a folder; the one before must have ended."""
        if self._server is None:
            self._server = self._start_server()
        assert self._server.stdin
        self.num_launches += 1
        self._server.stdin.write(f"{folder}\n".encode())
        self._pids = self._reply()

    def has_ended(self) -> bool:
        """Whether all ranks have ended; soon after one has failed, they do."""
        assert self._server
        return bool(select.select([self._server.stdout], [], [], 0)[0])

    def kill(self) -> None:
        """Kill the ranks that run."""
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait(self) -> list[int]:
        """Exit statuses of the ranks, when all have ended."""
        try:
            return self._reply()
        except BaseException:  # Ctrl-C
            self.kill()
            if self._server:
                self._server.kill()
                self._server.wait()
            self._server = None
            raise

    def _reply(self) -> list[int]:
        assert self._server
        assert self._server.stdout
        line = self._server.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"the server of ranks has ended:\n{self._log.read().decode()[-3000:]}")
        numbers: list[int] = json.loads(line)
        return numbers

    def _start_server(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "rank_server"],
            bufsize=0,
            env=os.environ | self._variables,
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
