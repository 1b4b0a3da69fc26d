"""Schedules from files: torch's own files are read, what is written is read again, and what can't run is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import make_config
from test_schedule import in_torch, passes

from harness.errors import ConfigError
from harness.launch.points import repeat_command
from harness.spec.config import RunConfig
from harness.spec.identity import identity
from harness.spec.schedule_files import read_schedule, write_schedule
from harness.spec.schedules import (
    SCHEDULES,
    build_schedule,
    ideal_bubble_fraction,
    ideal_bubble_fraction_of,
    passes_with_parts,
    placement_of,
    schedule_of,
)
from harness.spec.twin import twin_of

P, M = 2, 4
SIZES = ("parallel.pp=2", "model.num_hidden_layers=4", "train.micro_batch_size=1", f"train.global_batch_size={M}")


def config_of(path: Path, *overrides: str) -> RunConfig:
    return make_config(*SIZES, f"parallel.schedule={path}", *overrides)


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_written_is_read_again(name: str, tmp_path: Path) -> None:
    original = build_schedule(name, P, M)
    write_schedule(tmp_path / "order.csv", passes_with_parts(original))
    config = config_of(tmp_path / "order.csv")
    schedule = schedule_of(config)
    assert schedule.stages == original.stages
    assert placement_of(config.parallel) == original.placement
    assert config.parallel.num_chunks == original.num_chunks
    assert ideal_bubble_fraction_of(config) == pytest.approx(ideal_bubble_fraction(name, P, M))
    assert schedule_of(twin_of(config)).stages == original.stages


def test_files_of_torch_are_read(tmp_path: Path) -> None:
    """With idle time, transfers and two passes that overlap."""
    text = "0F0,0F1,,0I0,0W0,0B1\n1RECV_F0,1F0,1I0,1SEND_B0,(1F1;1W0)OVERLAP_F_B,1UNSHARD,1B1,1REDUCE_GRAD\n\n"
    (tmp_path / "torch.csv").write_text(text)
    rows = read_schedule(tmp_path / "torch.csv")
    assert rows == ["0F0 0F1 0I0 0W0 0B1", "1F0 1I0 1F1 1W0 1B1"]
    config = make_config(
        "parallel.pp=2", "train.micro_batch_size=1", "train.global_batch_size=2",
        f"parallel.schedule={tmp_path / 'torch.csv'}",
    )  # fmt: skip
    assert schedule_of(config).computes == {"forward", "backward", "backward_input", "backward_weight"}
    assert [i.kind for i in passes(schedule_of(config), 1)] == [
        "forward", "backward_input", "forward", "backward_weight", "backward"
    ]  # fmt: skip


def test_torchs_zero_bubble_v_runs_from_its_file(tmp_path: Path) -> None:
    orders = in_torch("ZBVZeroBubble", 4, 8, 2)
    assert [len(order) for order in orders] == [48] * 4
    parts = [[(i.kind, i.micro_batch, s if i.chunk == 0 else 7 - s) for i in order] for s, order in enumerate(orders)]
    write_schedule(tmp_path / "zbv.csv", parts)
    config = make_config(
        "parallel.pp=4", "model.num_hidden_layers=8", "train.micro_batch_size=1", "train.global_batch_size=8",
        "launch.max_ranks_per_core=4", f"parallel.schedule={tmp_path / 'zbv.csv'}",
    )  # fmt: skip
    schedule = schedule_of(config)
    assert schedule.placement.is_v
    assert [passes(schedule, stage) for stage in range(4)] == orders
    assert ideal_bubble_fraction_of(config) == ideal_bubble_fraction("zb_v", 4, 8)


def test_content_counts_and_not_its_place(tmp_path: Path) -> None:
    for name in ("one.csv", "two.csv"):
        write_schedule(tmp_path / name, passes_with_parts(build_schedule("zb_h1", P, M)))
    one, two = (config_of(tmp_path / name) for name in ("one.csv", "two.csv"))
    assert (one.parallel.schedule, two.parallel.schedule) == ("one.csv", "two.csv")
    assert identity(one, "data") == identity(two, "data")
    write_schedule(tmp_path / "three.csv", passes_with_parts(build_schedule("gpipe", P, M)))
    assert identity(one, "data") != identity(config_of(tmp_path / "three.csv"), "data")


REFUSED = {
    "0F0,0B0,0F1,0B1\n1F0,1B0,1F1": "computes forward of micro-batch 1 and chunk 0 on stage 1; it must be",
    "0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1": "stages wait for each other for ever: stage 0 at backward of micro-batch 0",
    "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1,1B1": "computes forward, backward, backward of micro-batch 1",
    "0F0,0B0\n1F0,1B0": "it has passes of 1 micro-batches, but a step has 2; change train.global_batch_size",
    "0F0,0F1,0B0,0B1": "it has rows for 1 stages, but parallel.pp=2; make them equal",
    "0F0,0F1,0B0,0B1\n2F0,2F1,2B0,2B1": r"its stages have the parts \[0\], \[2\]; with 1 parts each, place",
    "0F0,0F1,oops\n1F0": "has 'oops' in row 1, which is no pass; write part, F, B, I or W, and micro-batch",
    "\n": "is empty; give a row of passes per stage",
    "0SEND_F0\n1RECV_F0": "it has no pass; give a row of passes per stage",
    "0F0,((0F1;0B0)OVERLAP_F_B;0B1)OVERLAP_F_B\n1F0": "in row 1, which is no pass",
    "0F0,0B99999999999\n1F0": "has '0B99999999999' in row 1, which is no pass",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_run_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.csv").write_text(text)
    with pytest.raises(ConfigError, match=REFUSED[text]):
        config_of(tmp_path / "wrong.csv", "train.global_batch_size=2")


def test_a_file_from_a_spreadsheet_is_read(tmp_path: Path) -> None:
    (tmp_path / "ORDER.CSV").write_bytes(b"\xef\xbb\xbf0F0, 0B0,\r\n1F0,,1B0\r\n")
    config = config_of(tmp_path / "ORDER.CSV", "train.global_batch_size=1")
    assert config.parallel.schedule_passes == ["0F0 0B0", "1F0 1B0"]


def test_the_command_of_a_point_finds_the_file_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_schedule(tmp_path / "one.csv", passes_with_parts(build_schedule("zb_h1", P, M)))
    monkeypatch.chdir(tmp_path)
    config = config_of(Path("one.csv"))
    assert f"parallel.schedule={tmp_path / 'one.csv'}" in repeat_command(["parallel.schedule=one.csv"], config)


def test_passes_are_those_of_a_file() -> None:
    given = "parallel.schedule_passes=[0F0 0F1 0B0 0B1,1F0 1F1 1B0 1B1]"
    with pytest.raises(ConfigError, match=r"is what a file holds, but parallel\.schedule=1f1b is none; leave it out"):
        make_config(*SIZES, "parallel.schedule=1f1b", given)
    for nothing in ("[]", "['','']"):
        with pytest.raises(ConfigError, match=r"parallel\.schedule=FILE\.csv: it has no pass"):
            make_config(*SIZES, "parallel.schedule=FILE.csv", f"parallel.schedule_passes={nothing}")


def test_a_file_that_holds_too_much_or_is_not_there(tmp_path: Path) -> None:
    write_schedule(tmp_path / "gpipe.csv", passes_with_parts(build_schedule("gpipe", P, M)))
    assert config_of(tmp_path / "gpipe.csv", "parallel.schedule_memory=2")
    with pytest.raises(ConfigError, match="holds the activations of 4 micro-batches, but schedule_memory=1 allows 2"):
        config_of(tmp_path / "gpipe.csv", "parallel.schedule_memory=1")
    with pytest.raises(ConfigError, match=r"can't be read: .*No such file.* or give parallel\.schedule_passes"):
        config_of(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match=r"gpipe keeps to no limit of memory, but schedule_memory=1; use zb_auto"):
        make_config(*SIZES, "parallel.schedule=gpipe", "parallel.schedule_memory=1")
