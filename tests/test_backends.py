"""Launch backends: another one is one entry of the table, and without it there is no trace of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from examples import launch_backend
from examples.launch_backend import Bare

from harness.launch import sweep, train
from harness.launch.backends import BACKENDS
from harness.record.store import SweepDirectory

REFUSED = f"error: launch.backend='bare' is not available; choose one of {', '.join(BACKENDS)}\n"

# Stands for the worker: what a rank of a run does, as far as the harness sees it.
RANK = """
import json, os, sys
from pathlib import Path

line = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} does {sys.argv[2]}\\n"
os.write(1, line.encode())  # at once: ranks share the pipe
if os.environ["RANK"] == "0":
    (Path(sys.argv[1]) / "result.json").write_text(json.dumps({"row": {"tokens_per_second": 7.0}}))
"""


@pytest.fixture
def request_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "toy_rank.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(launch_backend, "WORKER", "toy_rank")
    settings = ["parallel.pp=2", "tracking.wandb.mode=disabled", f"results_dir={tmp_path / 'results'}"]
    return ["launch.backend=bare", "launch.threads_per_rank=1", *settings]


def test_a_backend_is_one_entry(
    request_of_a_run: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(BACKENDS, "bare", Bare())
        assert train.main(request_of_a_run) == 0
    (point,) = SweepDirectory(tmp_path / "results", "runs").points()
    (attempt,) = point.attempts()
    assert attempt.status()["status"] == "ok"
    assert attempt.result() == {"row": {"tokens_per_second": 7.0}}
    assert sorted(attempt.log_file.read_text().splitlines()) == [f"rank {rank} of 2 does train" for rank in (0, 1)]
    assert "rank 1 of 2 does train" in capfd.readouterr().out
    assert attempt.command().startswith("python launchers/train.py launch.backend=bare ")
    assert "bare" not in BACKENDS
    assert train.main(request_of_a_run) == 2
    assert capfd.readouterr().err == REFUSED
    assert point.attempts() == [attempt]


def test_all_points_of_a_sweep_have_one_backend(
    request_of_a_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = "launch.backend=bare,local: all points of a sweep share launch.backend; give it one value"
    for backend, sentence in [("bare", REFUSED), ("bare,local", f"error: {shared}\n")]:
        assert sweep.main([*request_of_a_run[1:], f"launch.backend={backend}"]) == 2
        assert capsys.readouterr().err == sentence
    assert not (tmp_path / "results").exists()
