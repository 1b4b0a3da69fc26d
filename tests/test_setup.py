"""launchers/setup.sh and quickstart.sh: what they install, and which grid they start on which machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.launch.compose import Composer
from harness.launch.points import expand
from harness.machine import Machine
from harness.spec.config import REPOSITORY
from harness.spec.resolve import load_config

SMI = REPOSITORY / "tests" / "cuda_standin" / "bin"
RECORDER = f"""#!{sys.executable}
import json, pathlib, sys
with (pathlib.Path(sys.argv[0]).parent / "calls.jsonl").open("a") as file:
    file.write(json.dumps([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
if sys.argv[1:] == ["show", "torch"]:
    print("Name: torch\\nVersion: 2.13.0+cpu")
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clone with a .venv whose programs only note how they are called."""
    shutil.copytree(REPOSITORY / "launchers", tmp_path / "launchers")
    shutil.copy(REPOSITORY / "requirements.txt", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "pip"):
        (tmp_path / ".venv" / "bin" / name).write_text(RECORDER)
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)
    return tmp_path


def quickstart(checkout: Path, num_gpus: int, **variables: str) -> list[list[str]]:
    """How it calls the programs of .venv, on a machine with so many GPUs."""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    environment |= {"STANDIN_GPUS": str(num_gpus), **variables}
    if num_gpus:
        environment["PATH"] = f"{SMI}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(checkout / "launchers" / "quickstart.sh"), "sweep.dry_run=true"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
    calls = checkout / ".venv" / "bin" / "calls.jsonl"
    found = [json.loads(line) for line in calls.read_text().splitlines()]
    calls.unlink()
    return found


def installs(calls: list[list[str]]) -> list[str]:
    return [" ".join(call[1:]) for call in calls if call[0] == "pip"]


def test_what_is_installed_follows_the_machine(checkout: Path) -> None:
    torch = next(line for line in (checkout / "requirements.txt").read_text().splitlines() if line.startswith("torch"))
    assert f"install --quiet {torch}+cpu" in installs(quickstart(checkout, 0))
    assert installs(quickstart(checkout, 0)) == []
    # The folder is shared with a GPU node: there it gets the other build, once, and the first machine can use that.
    later = installs(quickstart(checkout, 1))
    assert later == ["show torch", "uninstall --quiet --yes torch", "install --quiet --requirement requirements.txt"]
    assert installs(quickstart(checkout, 1)) == []
    assert installs(quickstart(checkout, 0)) == []
    assert installs(quickstart(checkout, 1, DS_ACCELERATOR="cpu")) == []
    with (checkout / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    assert installs(quickstart(checkout, 1))


LAYOUTS = {
    1: {(1, 1)},
    2: {(1, 1), (1, 2), (2, 1)},
    3: {(1, 1), (1, 2), (2, 1)},
    4: {(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 1)},
    8: {(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 1), (2, 4), (4, 2)},
}


@pytest.mark.parametrize("num_gpus", LAYOUTS)
def test_the_grid_fits_the_gpus(checkout: Path, num_gpus: int) -> None:
    gpus = Machine("cuda", "NVIDIA H100 80GB HBM3", num_gpus, 32, 2**38, compute_capability=9.0)
    overrides = quickstart(checkout, num_gpus)[-1][2:]
    assert overrides[0] == "sweep=quickstart_gpu"
    points = next(override.partition("=")[2] for override in overrides if override.startswith("sweep.points="))
    grid = expand(
        ["sweep=quickstart_gpu"], {"train.micro_batch_size": "2,4,8"}, [p.strip("'") for p in points[1:-1].split(",")]
    )
    composer = Composer()
    configs = [load_config(composer.compose(point), gpus) for point in grid]  # none is refused
    assert {(config.parallel.tp, config.parallel.pp) for config in configs} == LAYOUTS[num_gpus]
    assert {config.parallel.world_size for config in configs} == {2 if num_gpus == 3 else num_gpus}
    assert {config.model.name for config in configs} == {"gpt2_small"}


@pytest.mark.parametrize(("visible", "num_gpus"), [("0,1", 2), ("GPU-00000003", 1), ("3,1,2,0", 4), ("", 0), ("-1", 0)])
def test_the_grid_is_for_the_gpus_that_are_visible(checkout: Path, visible: str, num_gpus: int) -> None:
    assert quickstart(checkout, 8, CUDA_VISIBLE_DEVICES=visible)[-1] == quickstart(checkout, num_gpus)[-1]


def test_gpus_without_bf16_train_in_fp32(checkout: Path) -> None:
    overrides = quickstart(checkout, 1, STANDIN_COMPUTE_CAPABILITY="7.5")[-1]
    assert {"train.precision=fp32", "parallel.zero_stage=0"} <= set(overrides)
    assert "train.precision=fp32" not in quickstart(checkout, 1, STANDIN_COMPUTE_CAPABILITY="10.0")[-1]


def test_hidden_gpus_decide_nothing(checkout: Path) -> None:
    mixed = {"STANDIN_COMPUTE_CAPABILITY": "7.5,8.0,9.0", "CUDA_VISIBLE_DEVICES": "1,2"}
    assert "train.precision=fp32" not in quickstart(checkout, 3, **mixed)[-1]
    assert "train.precision=fp32" in quickstart(checkout, 3, **{**mixed, "CUDA_VISIBLE_DEVICES": "0,1"})[-1]


def test_without_gpus_it_is_the_grid_for_two_cores(checkout: Path) -> None:
    assert quickstart(checkout, 0)[-1] == ["python", "launchers/sweep.py", "sweep=quickstart", "sweep.dry_run=true"]
