"""launchers/schedule.py: draws and writes any schedule, and what it wrote runs as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.launch.schedule import drawing, main
from harness.spec.schedules import SCHEDULES, build_schedule

SIZES = ["parallel.pp=2", "train.micro_batch_size=1", "train.global_batch_size=4"]


def test_it_draws_what_the_docstrings_draw() -> None:
    doc = SCHEDULES["zb_v"].generate.__doc__ or ""
    drawn = [line.strip() for line in doc.splitlines() if line.strip().startswith("stage")]
    assert drawing(build_schedule("zb_v", 2, 4)) == drawn


@pytest.mark.parametrize("name", ["1f1b", "zb_v"])
def test_what_it_writes_is_the_same_schedule(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv, png = tmp_path / "order.csv", tmp_path / "order.png"
    assert main([f"parallel.schedule={name}", *SIZES, "--csv", str(csv), "--png", str(png)]) == 0
    first = capsys.readouterr().out
    assert main([f"parallel.schedule={csv}", *SIZES]) == 0
    assert capsys.readouterr().out == first.replace(name, "order.csv")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_more_than_two_chunks_are_told_apart() -> None:
    (first, _) = drawing(build_schedule("interleaved", 2, 2, 3))
    assert first.startswith("stage 0   0F0 0F1 1F0 1F1 2F0 2F1 ")


def test_what_it_cannot_draw_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parallel.schedule=dualpipev", *SIZES[:2], "train.global_batch_size=2"]) == 2
    assert "DualPipeV needs 2 micro-batches per stage, and 2 are fewer than 4" in capsys.readouterr().err
    assert main([*SIZES, "--csv", str(tmp_path / "none" / "order.csv")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main([*SIZES, "--png", "order.foo"]) == 2
    assert "--png order.foo is no name of a PNG file" in capsys.readouterr().err
