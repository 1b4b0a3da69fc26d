"""Start ranks for tests: real processes over gloo, as the launcher sets them up but without its seconds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
    tmp_path: Path,
    timeout: float = 600,
    variables: dict[str, str] | None = None,
) -> Any:
    """Run `python -m MODULE` as `world_size` ranks and return what rank 0 wrote.

    The module finds its argument and the place of its answer with `read_argument` and `write_answer`.

    Args:
        variables: of the ranks' environment, over those that every rank has.
    """
    ranks = start_ranks(world_size, module, argument, tmp_path, variables)
    deadline = time.monotonic() + timeout
    try:
        while None in (statuses := [process.poll() for process in ranks]) and time.monotonic() < deadline:
            if any(statuses):  # the others wait for it; let them say so
                deadline = min(deadline, time.monotonic() + 5)
            time.sleep(0.02)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    logs = "\n".join(f"--- rank {r}\n" + (tmp_path / f"rank{r}.log").read_text()[-3000:] for r in range(world_size))
    assert all(process.returncode == 0 for process in ranks), logs
    return json.loads((tmp_path / "answer.json").read_text())


def start_ranks(
    world_size: int, module: str, argument: Any, tmp_path: Path, variables: dict[str, str] | None = None
) -> list[subprocess.Popen[bytes]]:
    """Start the processes of `run_ranks`."""
    (tmp_path / "argument.json").write_text(json.dumps(argument))
    port = free_port()
    ranks = []
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}",
            **(variables or {}),
        }
        log = (tmp_path / f"rank{rank}.log").open("w")
        command = [sys.executable, "-m", module, str(tmp_path)]
        ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path))
    return ranks


def read_argument() -> Any:
    """In a rank: the argument of `run_ranks`."""
    return json.loads(Path(sys.argv[1], "argument.json").read_text())


def write_answer(answer: Any) -> None:
    """In rank 0: the answer of `run_ranks`."""
    Path(sys.argv[1], "answer.json").write_text(json.dumps(answer))
