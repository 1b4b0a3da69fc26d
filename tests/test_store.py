"""Run directories: round trips, attempts, status, damage and folders that can't be written."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from helpers import MACHINE, make_config

from harness.errors import ConfigError
from harness.machine import Machine
from harness.record.store import (
    Attempt,
    Point,
    SweepDirectory,
    code_hash,
    environment,
    is_stale,
    read_json,
    read_jsonl,
    write_atomically,
    write_json,
)


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    sweep = SweepDirectory(tmp_path, "grid")
    sweep.prepare()
    return sweep.point(make_config(), "0123abcd").new_attempt()


class TestFiles:
    def test_replaces_as_a_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "file.txt"
        write_atomically(path, "old\n")
        write_atomically(path, "new ü\r\n")
        assert path.read_bytes() == "new ü\r\n".encode()
        assert list(tmp_path.iterdir()) == [path]
        assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def test_failure_keeps_the_old_content_and_cleans_up(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "file.txt"
        write_atomically(path, "old")

        def disk_full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", disk_full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, "new")
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_bytes_of_a_command_line_that_are_no_text(self, tmp_path: Path) -> None:
        write_atomically(tmp_path / "file.txt", os.fsdecode(b"data.path=\xff"))
        assert (tmp_path / "file.txt").read_text() == "data.path=\\udcff"

    @pytest.mark.parametrize("damage", ["", '{"row": {"step_sec', "[1]", "null", "\x00\xff"])
    def test_damaged_json_reads_as_absent(self, tmp_path: Path, damage: str) -> None:
        (tmp_path / "result.json").write_text(damage, encoding="latin-1")
        assert read_json(tmp_path / "result.json") is None

    def test_lines_end_at_the_first_damaged_one(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        assert read_jsonl(path) == []
        path.write_text('{"step": 1}\n{"step": 2}\n{"st')
        assert [line["step"] for line in read_jsonl(path)] == [1, 2]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class TestConfig:
    def test_round_trip_keeps_every_value_and_type(self, attempt: Attempt) -> None:
        config = make_config(
            "train.learning_rate=5e8",
            "train.adam_epsilon=1e-08",
            "train.weight_decay=0.1",
            "parallel.pp=2",
            "parallel.partition=[3,1]",
            "data.path='/a b: {c} # \"d\"'",
            "tracking.wandb.project='5e8'",
            "model.name='yes'",
            "deepspeed.zero_optimization.reduce_bucket_size=5e8",
            "deepspeed.zero_optimization.allgather_bucket_size=500000000",
            "deepspeed.comms_logger.enabled=true",
        )
        attempt.write_config(config)
        read = attempt.config()
        assert read == config
        assert read.model_dump_json() == config.model_dump_json()

    def test_plain_yaml_readers_see_numbers(self, attempt: Attempt) -> None:
        attempt.write_config(make_config("train.learning_rate=5e8", "train.adam_epsilon=1e-12"))
        train = yaml.safe_load(attempt.config_file.read_text())["train"]
        assert (train["learning_rate"], train["adam_epsilon"]) == (5e8, 1e-12)

    def test_damaged_config_is_a_value_error(self, attempt: Attempt) -> None:
        with pytest.raises(ValueError, match="validation error"):
            attempt.config()
        attempt.config_file.write_text("model: {name: [")
        with pytest.raises(ValueError, match="validation error"):
            attempt.config()
        assert attempt.raw_config() == {}


class TestStatus:
    def test_merges_and_keeps_what_was_known(self, attempt: Attempt) -> None:
        attempt.write_status("running", environment=environment(MACHINE))
        attempt.write_status("oom", "rank 1 ran out of memory")
        status = attempt.status()
        assert (status["status"], status["reason"]) == ("oom", "rank 1 ran out of memory")
        assert (status["host"], status["pid"]) == (platform.node(), os.getpid())
        assert status["environment"]["hardware"]["device_name"] == "test cpu"
        assert status["started"] <= status["ended"]

    def test_a_reason_does_not_outlive_its_status(self, attempt: Attempt) -> None:
        attempt.write_status("crashed", "once")
        write_json(attempt.result_file, {"row": {}})
        attempt.write_status("ok")
        assert attempt.status()["reason"] is None

    def test_ok_needs_a_complete_result(self, attempt: Attempt) -> None:
        attempt.write_status("ok")
        assert attempt.status()["status"] == "crashed"
        attempt.result_file.write_text('{"row": ')
        assert attempt.status()["status"] == "crashed"
        assert attempt.status()["reason"] == "result.json is missing or damaged"
        write_json(attempt.result_file, {"row": {}})
        assert attempt.status()["status"] == "ok"

    @pytest.mark.parametrize("damage", [None, "", '{"status": "o', "{}"])
    def test_without_a_readable_status_it_was_interrupted(self, attempt: Attempt, damage: str | None) -> None:
        if damage is not None:
            attempt.status_file.write_text(damage)
        assert attempt.status()["status"] == "interrupted"
        attempt.write_status("crashed", "now it is known")
        assert attempt.status()["status"] == "crashed"

    def test_a_run_whose_process_is_gone_was_interrupted(self, attempt: Attempt) -> None:
        attempt.write_status("running")
        assert attempt.status()["status"] == "running"
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        attempt.write_status("running", pid=ended.pid)
        assert attempt.status()["status"] == "interrupted"
        attempt.write_status("running", pid=ended.pid, host="another")
        assert attempt.status()["status"] == "running"


class TestAttempts:
    def test_numbers_are_never_used_twice(self, attempt: Attempt) -> None:
        point = attempt.point
        assert attempt.path.name == "attempt-1"
        assert [point.new_attempt().number for _ in range(9)] == list(range(2, 11))
        assert [a.number for a in point.attempts()] == list(range(1, 11))  # 10 after 9
        (point.path / "attempt-x").mkdir()
        (point.path / "attempt-99").write_text("a file")
        assert point.new_attempt().number == 11

    def test_attempts_made_at_once_differ(self, attempt: Attempt) -> None:
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda _: attempt.point.new_attempt().number, range(40)))
        assert sorted(made) == list(range(2, 42))

    def test_the_newest_finished_one_is_shown(self, attempt: Attempt) -> None:
        point = attempt.point
        assert Point(point.path.with_name("none")).shown() is None
        attempt.write_status("running")
        assert point.newest_finished() is None
        assert point.shown() == attempt
        write_json(attempt.result_file, {"row": {}})
        attempt.write_status("ok")
        point.new_attempt().write_status("interrupted", "stopped by SIGINT")
        assert point.shown() == attempt
        third = point.new_attempt()
        third.write_status("timeout", "took too long")
        assert point.shown() == third

    def test_names(self, attempt: Attempt) -> None:
        assert attempt.point.name == "tp1_pp1_dp1_mbs1_0123abcd"
        assert (attempt.point.slug, attempt.point.identity) == ("tp1_pp1_dp1_mbs1", "0123abcd")
        assert attempt.sweep.name == "grid"
        assert attempt.spans_file(3).relative_to(attempt.path) == Path("spans/rank00003.jsonl")
        assert attempt.error_file(12).name == "rank00012.json"


class TestSweepDirectory:
    @pytest.mark.parametrize("in_the_way", ["results", "results/grid", "results/grid/points"])
    def test_a_file_in_the_way_is_a_sentence(self, tmp_path: Path, in_the_way: str) -> None:
        (tmp_path / in_the_way).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / in_the_way).write_text("")
        with pytest.raises(ConfigError, match=r"results_dir='.*results' can't hold sweep 'grid': .*; set results_dir"):
            SweepDirectory(tmp_path / "results", "grid").prepare()

    @pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
    def test_a_protected_folder_is_a_sentence(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(ConfigError, match="Permission denied"):
            SweepDirectory(tmp_path, "grid").prepare()

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where nobody can make folders")
    def test_a_folder_that_takes_no_files_is_a_sentence(self) -> None:
        with pytest.raises(ConfigError, match="results_dir='/proc/results' can't hold"):
            SweepDirectory("/proc/results", "grid").prepare()

    def test_request_is_kept(self, tmp_path: Path) -> None:
        sweep = SweepDirectory(tmp_path, "grid")
        assert sweep.request() == {}
        request = {"overrides": ["parallel.tp=1,2", "a='x: y'"], "environment": environment(MACHINE)}
        sweep.prepare(request)
        sweep.prepare()
        assert sweep.request() == request

    def test_refused_points_are_kept_once(self, tmp_path: Path) -> None:
        sweep = SweepDirectory(tmp_path, "grid")
        sweep.prepare()
        overrides = ["parallel.tp=3", "model.name=[broken"]
        first = sweep.record_invalid(overrides, None, "tp=3 can't be", "python launchers/train.py parallel.tp=3")
        again = sweep.record_invalid(overrides[::-1], None, "tp=3 can't be", "python launchers/train.py parallel.tp=3")
        assert first == again
        assert len(sweep.points()) == 1
        assert first.raw_config() == {"parallel": {"tp": 3}, "model": {"name": "[broken"}}
        assert first.command() == "python launchers/train.py parallel.tp=3"
        status = first.status()
        assert (status["status"], status["reason"]) == ("invalid", "tp=3 can't be")
        assert status["overrides"] == overrides[::-1]
        sweep.forget_invalid(overrides)
        sweep.forget_invalid(overrides)
        assert sweep.points() == []

    @pytest.mark.parametrize(
        "override", ["=", "a", "~a.b", "a.b=2024-99-99", "a=1 b", "a.=1", ".=", "++a.b.c=1", "a=\t!"]
    )
    def test_refused_points_may_be_nonsense(self, tmp_path: Path, override: str) -> None:
        sweep = SweepDirectory(tmp_path, "grid")
        attempt = sweep.record_invalid(["a=1", override], None, "nonsense", "")
        assert attempt.status()["status"] == "invalid"


class TestEnvironment:
    def test_names_versions_hardware_and_code(self) -> None:
        found = environment(MACHINE)
        assert set(found["versions"]) == {"python", "torch", "deepspeed", "transformers", "hydra", "numpy"}
        assert found["versions"]["python"] == platform.python_version()
        assert found["hardware"]["num_cores"] == 2
        assert len(found["code"]) == 12
        int(found["code"], 16)

    def test_code_hash_sees_every_change(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("harness.record.store.REPOSITORY", tmp_path)
        (tmp_path / "harness" / "run").mkdir(parents=True)
        module = tmp_path / "harness" / "run" / "a.py"
        module.write_text("1")
        (tmp_path / "harness" / "notes.txt").write_text("not code")
        hashes = {code_hash()}
        (tmp_path / "harness" / "notes.txt").write_text("still not code")
        assert code_hash() in hashes
        module.write_text("2")
        hashes.add(code_hash())
        module.rename(module.with_name("b.py"))
        hashes.add(code_hash())
        assert len(hashes) == 3

    def test_stale_is_another_version_code_or_kind_of_hardware(self) -> None:
        now = environment(MACHINE)
        assert not is_stale(now, environment(MACHINE))
        assert not is_stale({**now, "hardware": {**now["hardware"], "host": "another"}}, now)
        assert is_stale({**now, "code": "0" * 12}, now)
        assert is_stale({**now, "versions": {**now["versions"], "torch": "1.0"}}, now)
        assert is_stale(environment(Machine("cpu", "other cpu", 2, 2, 2**30)), now)
        assert is_stale({}, now)
