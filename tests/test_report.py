"""Ranking, ties, tables and files of a sweep's report."""

from __future__ import annotations

import csv
import io
import itertools
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest
from helpers import MACHINE, record_attempt, record_inference
from rich.console import Console

from harness.launch import report as launch_report
from harness.machine import Machine
from harness.record import report
from harness.record.columns import names, number
from harness.record.report import collect, csv_text, headline, legend, markdown, print_report, rank
from harness.record.store import SweepDirectory, environment, write_json
from harness.spec.config import REPOSITORY

HOSTILE = "a|b\n## heading `tick` <b>bold</b> [red]markup[/red] *star* \\ ```"


def make_row(seconds: float | None = None, low: float | None = None, high: float | None = None, **values: Any) -> dict:
    """A row of 1000 tokens per step; measured when it has seconds."""
    row = dict.fromkeys(names()) | {"status": "ok" if seconds else "crashed", "world_size": 2, "oversubscribed": False}
    row |= {"point": "p", "tp": 1, "pp": 2, "dp": 1} | values
    if seconds:
        row |= {"step_seconds": seconds, "step_seconds_p10": low or seconds, "step_seconds_p90": high or seconds}
        row |= {"tokens_per_second": 1000 / seconds}
        row |= {"tokens_per_second_per_device": 1000 / seconds / row["world_size"]}
    return row


def ranks(*rows: dict) -> list[tuple[str, str]]:
    return [(row["point"], row["rank"]) for row in rank(rows)]


class TestRank:
    def test_by_throughput(self) -> None:
        assert ranks(make_row(2.0, point="slow"), make_row(1.0, point="fast")) == [("fast", "1"), ("slow", "2")]

    def test_overlapping_ranges_are_a_tie(self) -> None:
        a, b = make_row(1.0, 0.9, 1.1, point="a"), make_row(1.2, 1.1, 1.3, point="b")
        c, d = make_row(1.5, 1.4, 1.6, point="c"), make_row(1.6, 1.55, 1.7, point="d")
        e = make_row(3.0, 2.9, 3.1, point="e")
        assert ranks(e, d, c, b, a) == [("a", "1"), ("b", "1="), ("c", "3"), ("d", "3="), ("e", "5")]

    def test_a_range_that_only_just_fails_to_overlap_is_no_tie(self) -> None:
        assert ranks(make_row(1.0, 0.9, 1.1, point="a"), make_row(1.2, 1.11, 1.3, point="b"))[1] == ("b", "2")

    def test_every_pair_that_overlaps_shares_a_rank(self) -> None:
        # b is narrow; c overlaps with a, not with b between them.
        a, b = make_row(1.1, 1.0, 2.0, point="a"), make_row(1.2, 1.2, 1.2, point="b")
        assert ranks(a, b, make_row(1.6, 1.5, 3.0, point="c")) == [("a", "1"), ("b", "1="), ("c", "1=")]

    def test_across_sizes_by_device(self) -> None:
        one = make_row(1.0, point="one", world_size=1)
        two = make_row(0.6, point="two", world_size=2)  # faster, but less per device
        assert ranks(two, one) == [("one", "1"), ("two", "2")]
        assert "across world sizes" in legend(rank([one, two]))[0]
        assert ranks(two, one | {"status": "oom"}) == [("two", "1"), ("one", "")]
        assert "tokens_per_second among 2-rank layouts" in legend(rank([two]))[0]

    def test_ties_across_sizes_compare_ranges_per_device(self) -> None:
        one, two = make_row(1.0, 0.9, 1.1, world_size=1), make_row(0.51, 0.5, 0.52, world_size=2, point="two")
        assert ranks(one, two) == [("p", "1"), ("two", "1=")]  # 909-1111 and 962-1000 tokens/s per device

    def test_oversubscribed_rows_follow_without_a_rank_and_failed_ones_are_last(self) -> None:
        fast = make_row(0.1, point="over", world_size=4, oversubscribed=True)
        rows = [make_row(point="bad", reason="boom"), fast, make_row(1.0, point="good")]
        assert ranks(*rows) == [("good", "1"), ("over", ""), ("bad", "")]

    def test_a_stale_row_is_shown_but_neither_ranked_nor_recommended(self) -> None:
        stale = make_row(0.1, 0.1, 9.0, point="stale", stale=True, command="old", world_size=4)
        rows = [stale, make_row(1.0, point="now", command="new"), make_row(0.9, point="over", oversubscribed=True)]
        assert ranks(*rows) == [("now", "1"), ("over", ""), ("stale", "")]
        text = terminal(rank(rows))
        assert text.endswith("Rank 1, tp1 pp2 dp1, is run again by\nnew\n")
        assert "-*" in text
        assert "Ranked by tokens_per_second among 2-rank layouts" in text  # one size among those that compare

    def test_result_without_times_is_not_ranked(self) -> None:
        assert ranks(make_row(status="ok", point="odd"), make_row(1.0)) == [("p", "1"), ("odd", "")]

    def test_order_asked_for_does_not_matter(self) -> None:
        rows = [make_row(1.0, 0.9, 1.2, point=p) | {"step_seconds": 1 + i / 10} for i, p in enumerate("abc")]
        rows += [make_row(point="d"), make_row(2.0, point="e", oversubscribed=True)]
        assert len({tuple(ranks(*order)) for order in itertools.permutations(rows)}) == 1

    def test_nothing(self) -> None:
        assert rank([]) == []

    def test_legend_tells_of_points_that_ran_at_once(self) -> None:
        alone, beside = make_row(1.0, 0.9, 1.1, slots=1), make_row(1.05, 1.0, 1.1, slots=2, point="q")
        told = "Points that ran at once (results.csv: slots) shared memory bandwidth and disturbed each other; "
        assert ranks(alone, beside) == [("p", "1"), ("q", "1=")]
        assert any(sentence.startswith(told) for sentence in legend(rank([alone, beside])))
        assert not any(sentence.startswith(told) for sentence in legend(rank([alone])))
        assert "at once" in markdown(SweepDirectory("nowhere", "none"), rank([alone, beside]))

    def test_legend_tells_of_repeats_and_drift(self) -> None:
        told = legend(rank([make_row(1.0, repeats=3, drift=0.05), make_row(2.0, repeats=3, drift=0.01)]))
        assert any("Measured several times" in sentence for sentence in told)
        assert "Step times of 1 of 2 points drifted (results.csv: drift)." in told
        assert not any("times" in sentence for sentence in legend(rank([make_row(1.0, repeats=1)]))[:-1])


def make_generated(seconds: float, low: float | None = None, high: float | None = None, **values: Any) -> dict:
    """A row of task=generate, of 1000 tokens."""
    row = make_row(seconds, **values) | {"step_seconds": None, "step_seconds_p10": None, "step_seconds_p90": None}
    row |= {"task": "generate", "part": "model", "batch_size": 8} | values
    name = "generation_seconds"
    return row | {name: seconds, f"{name}_p10": low or seconds, f"{name}_p90": high or seconds}


class TestInference:
    def test_generation_is_ranked_by_its_own_seconds(self) -> None:
        a, b = make_generated(1.0, 0.9, 1.1, point="a"), make_generated(1.2, 1.1, 1.3, point="b")
        c = make_generated(1.5, 1.4, 1.6, point="c")
        assert ranks(c, b, a) == [("a", "1"), ("b", "1="), ("c", "3")]
        first, tie, *_ = legend(rank([a, b, c]))
        assert first == (
            "Ranked by tokens_per_second among 2-rank layouts, from the median measurement of generate.repeats."
        )
        assert tie == "= is a tie: the p10-p90 range of their times overlaps with one above of the same rank."

    def test_oversubscribed_generation_has_no_rank(self) -> None:
        shared = make_generated(0.1, point="shared", oversubscribed=True)
        assert ranks(shared, make_generated(1.0, point="good")) == [("good", "1"), ("shared", "")]

    def test_what_measures_something_else_is_ranked_apart(self) -> None:
        layer = make_row(0.1, point="layer", task="forward", part="layer", command="run layer")
        model = make_row(1.0, point="model", task="forward", part="model", command="run model")
        one = make_generated(2.0, point="one", world_size=1, command="run one")
        two = make_generated(1.1, point="two")
        rows = rank([one, two, model, layer])
        assert [(row["point"], row["rank"]) for row in rows] == [
            ("layer", "1"), ("model", "1"), ("one", "1"), ("two", "2")
        ]  # fmt: skip
        told = legend(rows)
        assert told[0] == "Tasks and parts of the model are ranked apart."
        assert "task=forward model.part=layer is ranked by tokens_per_second among 2-rank layouts" in told[1]
        assert "task=generate model.part=model is ranked by tokens_per_second_per_device across world sizes" in told[3]
        text = terminal(rows)
        assert [text.count(f"\nrun {name}\n") for name in ("layer", "model", "one")] == [1, 1, 1]
        assert "a tie" not in text

    def test_offered_rates_are_curves_by_layout(self) -> None:
        rows = [
            make_generated(1.0 / rate, point=f"tp{tp} {rate}", tp=tp, world_size=tp, request_rate=rate)
            for rate in (8.0, 2.0)
            for tp in (2, 1)
        ]
        found = rank([*rows, make_generated(3.0, point="at once")])
        assert [(row["point"], row["rank"]) for row in found] == [
            ("at once", "1"), ("tp1 2.0", ""), ("tp1 8.0", ""), ("tp2 2.0", ""), ("tp2 8.0", "")
        ]  # fmt: skip
        assert any("curves of latency over load" in sentence for sentence in legend(found))

    def test_speedups_are_over_one_rank_with_the_same_settings(self, tmp_path: Path) -> None:
        machine = replace(MACHINE, num_cores=4, num_devices=4)
        sweep = SweepDirectory(tmp_path, "grid")
        sweep.prepare({"environment": environment(machine)})
        threads = "launch.threads_per_rank=1"
        record_inference(sweep, threads, seconds=[1.2] * 3, machine=machine)
        record_inference(sweep, "parallel.tp=2", "parallel.pp=2", threads, seconds=[0.4] * 3, machine=machine)
        record_inference(sweep, "parallel.tp=2", threads, "generate.batch_size=4", machine=machine)
        record_inference(sweep, "parallel.tp=2", "launch.threads_per_rank=2", machine=machine)
        record_inference(sweep, threads, "generate.request_rate=5", machine=machine)
        rows = report.write_report(sweep)
        by_layout = {(row["tp"], row["pp"]): row for row in rows if row["speedup"] is not None}
        assert set(by_layout) == {(1, 1), (2, 2)}
        names_ = ("speedup", "efficiency", "prefill_speedup", "decode_speedup", "time_to_first_token_speedup",
                  "inter_token_speedup")  # fmt: skip
        assert [by_layout[1, 1][name] for name in names_] == pytest.approx([1] * 6)
        assert [by_layout[2, 2][name] for name in names_] == pytest.approx([3, 0.75, 3, 3, 3, 3])
        frame = pandas.read_csv(sweep.path / "results.csv")
        assert sorted(frame["speedup"].dropna()) == pytest.approx([1, 3])
        text = (sweep.path / "results.md").read_text()
        table = text[text.index("## Speed-up over one rank") :]
        assert "| 4 | 2 | 2 | 1 | 8 | 2 | 2,500 | 3.00 | 75.0 | 3.00 | 3.00 | 3.00 | 3.00 |" in table
        assert "2 of 5 points have no speed-up" in text
        assert "Speed-up over one rank" in terminal(rows)

    def test_oversubscribed_speedups_are_marked_and_stale_rows_have_none(self, tmp_path: Path) -> None:
        sweep = SweepDirectory(tmp_path, "grid")
        sweep.prepare({"environment": environment(MACHINE)})
        passes = ("task=forward", "launch.threads_per_rank=1")
        record_inference(sweep, *passes, seconds=[9, 9, 0.8])
        record_inference(sweep, *passes, "parallel.tp=2", "parallel.pp=2", seconds=[9, 9, 0.4])
        rows = report.write_report(sweep)
        assert [(row["world_size"], row["speedup"]) for row in report.speedups(rows)] == [(1, 1), (4, pytest.approx(2))]
        assert "| 2.00 | 50.0 | yes |" in (sweep.path / "results.md").read_text()
        assert "Shared cores: oversubscribed" in terminal(rows)
        sweep.prepare({"environment": environment(MACHINE) | {"code": "another"}})
        assert report.speedups(report.write_report(sweep)) == []

    def test_training_has_no_speedup(self, sweep: SweepDirectory) -> None:
        record_attempt(sweep, "parallel.tp=1", step_seconds=[1, 1, 0.3])
        rows = report.write_report(sweep)
        assert all(row["speedup"] is None for row in rows)
        assert "speed-up" not in terminal(rows).lower()


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(None, 3, ""), (0, 3, "0"), (0.0512345, 3, "0.0512"), (98.76, 3, "98.8"), (12345.6, 3, "12,346"),
     (160.224, 4, "160.2"), (0.999999, 3, "1.000"), (float("nan"), 3, "nan"), (-4.56789, 3, "-4.57")],
)  # fmt: skip
def test_numbers(value: float | None, digits: int, text: str) -> None:
    assert number(value, digits) == text


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> SweepDirectory:
    """Two measured layouts, one out of memory, one refused."""
    sweep = SweepDirectory(tmp_path_factory.mktemp("results"), "grid")
    sweep.prepare({"environment": environment(MACHINE)})
    record_attempt(sweep, "parallel.pp=2", step_seconds=[9, 9, 0.2, 0.2, 0.2], command="deepspeed slow")
    record_attempt(sweep, "parallel.tp=2", step_seconds=[9, 9, 0.1, 0.1, 0.1], command="deepspeed 'fast one'")
    record_attempt(sweep, "parallel.tp=2", "train.micro_batch_size=8", status="oom", reason=HOSTILE, command=HOSTILE)
    sweep.record_invalid(["parallel.tp=3"], None, "parallel.tp=3 does not divide", "python launchers/train.py")
    return sweep


@pytest.fixture
def sweep(original: SweepDirectory, tmp_path: Path) -> SweepDirectory:
    shutil.copytree(original.path, tmp_path / "grid")
    return SweepDirectory(tmp_path, "grid")


class TestFiles:
    def test_csv_through_pandas(self, sweep: SweepDirectory) -> None:
        rows = report.write_report(sweep)
        frame = pandas.read_csv(sweep.path / "results.csv")
        assert list(frame.columns) == names()
        assert list(frame["status"]) == ["ok", "ok", "invalid", "oom"]
        assert list(frame["point"]) == [row["point"] for row in rows]
        assert frame["step_seconds"][0] == rows[0]["step_seconds"]
        assert frame["tp"].tolist() == [2, 1, 3, 2]
        assert frame["mfu"].isna().all()
        assert frame["reason"][3] == HOSTILE
        assert frame["command"][3] == HOSTILE
        assert frame.loc[0, "oversubscribed"] is False or not frame.loc[0, "oversubscribed"]

    def test_csv_leaves_unknown_empty(self) -> None:
        lines = list(csv.DictReader(io.StringIO(csv_text(rank([make_row(1.0)])))))
        assert lines[0]["mfu"] == lines[0]["peak_memory_bytes"] == ""
        assert lines[0]["oversubscribed"] == "False"

    def test_rebuilding_changes_nothing(self, sweep: SweepDirectory) -> None:
        report.write_report(sweep)
        before = {path: path.read_bytes() for path in sweep.path.glob("results.*")}
        report.write_report(sweep)
        assert len(before) == 2
        assert before == {path: path.read_bytes() for path in sweep.path.glob("results.*")}

    def test_a_point_shows_its_newest_finished_attempt(self, sweep: SweepDirectory) -> None:
        other = replace(MACHINE, device_name="another cpu")
        record_attempt(sweep, "parallel.tp=2", step_seconds=[1, 1, 0.4], machine=other)
        record_attempt(sweep, "parallel.tp=2", status="interrupted", reason="stopped")
        shown = next(row for row in collect(sweep) if row["tp"] == 2 and row["micro_batch_size"] == 1)
        assert (shown["attempt"], shown["step_seconds"], shown["repeats"]) == (2, pytest.approx(0.4), 1)

    def test_damaged_attempts_are_rows(self, sweep: SweepDirectory) -> None:
        for point in sweep.points():
            for attempt in point.attempts():
                attempt.result_file.write_text('{"row": {"step_')
                attempt.config_file.write_bytes(b"\xff\x00")
        assert {row["status"] for row in collect(sweep)} == {"crashed", "oom", "invalid"}
        assert len(report.write_report(sweep)) == 4

    def test_stale_rows_are_marked(self, sweep: SweepDirectory) -> None:
        assert [row["stale"] for row in collect(sweep)] == [None, False, False, False]
        sweep.prepare({"environment": environment(MACHINE) | {"code": "another"}})
        rows = report.write_report(sweep)
        assert [row["stale"] for row in rows] == [True, True, None, True]
        assert any(sentence.startswith("* is stale and has no rank: ") for sentence in legend(rows))
        text = markdown(sweep, rows)
        assert "| -\\* |" in text
        assert "Run rank 1 again" not in text
        assert "run again" not in terminal(rows)

    @pytest.mark.parametrize("remains", [None, "- damaged"])
    def test_single_runs_are_stale_beside_the_newest(self, tmp_path: Path, remains: str | None) -> None:
        runs = SweepDirectory(tmp_path, "no_request")
        old = record_attempt(runs, "parallel.tp=2", step_seconds=[1, 1, 0.01])
        content = old.status()
        write_json(old.status_file, content | {"environment": content["environment"] | {"code": "of long ago"}})
        time.sleep(0.002)  # the times of statuses are in milliseconds
        record_attempt(runs, "parallel.pp=2", step_seconds=[1, 1, 0.1], command="the new one")
        if remains is not None:
            runs.request_file.write_text(remains)
        rows = report.write_report(runs)
        assert [(row["pp"], row["rank"], row["stale"]) for row in rows] == [(2, "1", False), (1, "", True)]
        assert "the new one" in markdown(runs, rows)

    def test_markdown(self, sweep: SweepDirectory) -> None:
        text = markdown(sweep, report.write_report(sweep))
        assert text.startswith("# Sweep grid\n\n4 points: 2 ok, 1 invalid, 1 oom.\n")
        for part in ("Hardware: test cpu, 2 cores", "torch", "shardwright code", "deepspeed 'fast one'",
                     "Ranked by tokens_per_second among 2-rank", "bubble % ideal | bubble % measured"):  # fmt: skip
            assert part in text, part

    def test_markdown_is_not_bent_by_what_it_quotes(self, sweep: SweepDirectory) -> None:
        text = markdown(sweep, report.write_report(sweep))
        assert "\n## heading" not in text
        line = next(line for line in text.splitlines() if "heading" in line)
        assert line.replace("\\|", "").count("|") == 5
        assert "\\<b\\>bold" in line

    def test_markdown_of_nothing(self, tmp_path: Path) -> None:
        empty = SweepDirectory(tmp_path, "none")
        empty.prepare()
        assert "0 points: none yet" in markdown(empty, report.write_report(empty))

    def test_command_with_a_fence_inside(self) -> None:
        assert report._fenced("echo ```")[0] == "````bash"


def terminal(rows: list[dict], width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    print_report(rows, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class TestTerminal:
    def test_fits_a_hundred_columns_and_says_it_all(self, sweep: SweepDirectory) -> None:
        rows = report.write_report(sweep)
        text = terminal(rows)
        assert max(map(len, text.splitlines())) <= 100
        for part in ("ideal measured", "tokens", "ms", "MiB", "of GEMM", "Ranked by", "parallel.tp=3 does not divide"):
            assert part in text, part
        assert text.endswith("is run again by\ndeepspeed 'fast one'\n")
        assert "[red]markup[/red]" in text

    def test_columns_that_differ_are_shown_and_others_make_room(self, sweep: SweepDirectory) -> None:
        assert "ZeRO" not in terminal(report.write_report(sweep))
        record_attempt(sweep, "parallel.dp=2", "parallel.zero_stage=1", "model=llama_tiny", "train.precision=bf16")
        text = terminal(report.write_report(sweep))
        for part in ("ZeRO", "llama_tiny", "bf16", "measured"):
            assert part in text, part
        assert max(map(len, text.splitlines())) <= 100

    def test_what_is_held_is_shown_where_schedules_differ_in_it(self) -> None:
        def table(held: float) -> str:
            rows = [make_row(1 + pp, pp=pp, micro_batches_in_flight=float(pp)) for pp in (2, 4)]
            return terminal(rank([*rows, make_row(1.2, pp=2, micro_batches_in_flight=held)]))

        assert "flight" not in table(2.0)  # it follows from pp
        assert "flight" in table(2.5)

    @pytest.mark.parametrize("width", [60, 80, 100, 200])
    def test_commands_are_never_broken(self, sweep: SweepDirectory, width: int) -> None:
        command = "deepspeed --num_gpus 2 launchers/train.py " + "parallel.tp=2 " * 20 + "[bold]"
        record_attempt(sweep, "parallel.tp=2", step_seconds=[0.05] * 3, command=command)
        assert command in terminal(report.write_report(sweep), width).splitlines()

    def test_tie_at_the_top(self) -> None:
        rows = rank([make_row(1.0, 0.9, 1.1, command="run a"), make_row(1.1, 1.0, 1.2)])
        assert "Rank 1 (a tie of 2), tp1 pp2 dp1, is run again by\nrun a" in terminal(rows)

    def test_mfu_appears_where_the_peak_is_known(self) -> None:
        assert "MFU" not in terminal(rank([make_row(1.0)]))
        assert "41.2" in terminal(rank([make_row(1.0, mfu=0.412)]))

    def test_only_failures(self) -> None:
        text = terminal(rank([make_row(reason=HOSTILE, command="x"), make_row(status="invalid")]))
        assert "2 points: 1 crashed, 1 invalid" in text
        assert "run again" not in text

    def test_headline(self) -> None:
        assert headline([make_row(1.0)]) == "1 point: 1 ok"

    def test_big_machines_fit(self) -> None:
        gpus = Machine("cuda", "NVIDIA H100 80GB HBM3", 8, 96, 2**40)
        row = make_row(1.234, 1.2, 1.3, mfu=0.41, gemm_utilization=0.5, tp=8, pp=16, dp=8, world_size=1024,
                       micro_batch_size=16, num_micro_batches=256, model_tflops_per_device=412.3, last_loss=2.345,
                       bubble_fraction_ideal=0.055, bubble_fraction_measured=0.071, peak_memory_bytes=75 * 2**30,
                       tokens_per_second=12345678.9)  # fmt: skip
        assert gpus.num_devices == 8
        lines = terminal(rank([row, row | {"world_size": 2, "oversubscribed": None}])).splitlines()
        assert max(map(len, lines)) <= 100
        assert not any("…" in line for line in lines)


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "launchers" / "report.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


class TestCommand:
    def test_rebuilds_from_any_folder(self, sweep: SweepDirectory) -> None:
        ended = run("grid", cwd=sweep.path.parent)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert "4 points: 2 ok, 1 invalid, 1 oom" in ended.stdout
        assert max(map(len, ended.stdout.splitlines())) <= 100
        assert (sweep.path / "results.csv").exists()

    @pytest.mark.parametrize("wrong", ["nowhere", ".", "file"])
    def test_wrong_path_is_a_sentence(self, tmp_path: Path, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").write_text("")
        assert launch_report.main([str(tmp_path / wrong)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        assert "give results/NAME" in printed.err

    def test_folder_that_cant_be_written_still_prints(
        self, sweep: SweepDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def read_only(*_: object) -> None:
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(os, "fsync", read_only)
        assert launch_report.main([str(sweep.path)]) == 1
        printed = capsys.readouterr()
        assert "2 ok" in printed.out
        assert "Read-only file system" in printed.err

    def test_invalid_result_types_do_not_stop_it(self, sweep: SweepDirectory) -> None:
        attempt = sweep.points()[1].attempts()[0]
        write_json(attempt.result_file, {"row": []})
        assert launch_report.main([str(sweep.path)]) == 0


class TestColumns:
    def test_are_printed_as_in_results_csv(self, sweep: SweepDirectory, capsys: pytest.CaptureFixture[str]) -> None:
        assert launch_report.main([str(sweep.path), "--columns", "status, step_seconds,mfu,tp"]) == 0
        header, _, *lines = capsys.readouterr().out.splitlines()
        assert header.split() == ["status", "step_seconds", "mfu", "tp"]
        frame = pandas.read_csv(sweep.path / "results.csv")
        assert [line.split() for line in lines[:2]] == [
            ["ok", str(seconds), str(tp)] for seconds, tp in zip(frame["step_seconds"][:2], frame["tp"], strict=False)
        ]
        assert len(lines) == len(frame)

    def test_long_values_are_whole(self, sweep: SweepDirectory, capsys: pytest.CaptureFixture[str]) -> None:
        long = "deepspeed launchers/train.py [bold] " + "x" * 300
        record_attempt(sweep, "parallel.tp=2", step_seconds=[0.05] * 3, command=long)
        assert launch_report.main([str(sweep.path), "--columns=command"]) == 0
        assert long.replace(" ", "") in "".join(capsys.readouterr().out.split())

    @pytest.mark.parametrize(
        ("wanted", "words"),
        [
            ("tp,tokens_per_sec", "no column 'tokens_per_sec'; near: tokens_per_second, tokens_per_second_per_device"),
            ("MFU", "no column 'MFU'; near: mfu"),
            ("loss", "near: first_loss, last_loss, eval_loss"),
            ("qqqq", "no column 'qqqq'; results/README.md lists them all"),
            ("tp,", "no column ''"),
        ],
    )
    def test_a_column_there_is_not_is_refused_before_anything_is_written(
        self, sweep: SweepDirectory, capsys: pytest.CaptureFixture[str], wanted: str, words: str
    ) -> None:
        assert launch_report.main([str(sweep.path), "--wandb", "--columns", wanted]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1)
        assert words in printed.err
        assert not list(sweep.path.glob("results.*"))
        assert not (sweep.path / "wandb").exists()
