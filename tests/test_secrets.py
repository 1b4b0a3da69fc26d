"""Secrets come from the environment, reach DeepSpeed, and stand in no file and no output."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from helpers import MACHINE, make_config
from pydantic import BaseModel, ValidationError

from harness.errors import ConfigError
from harness.launch.backends.local import child_environment
from harness.launch.compose import Composer, compose
from harness.launch.points import expand
from harness.launch.sweep import run_batch
from harness.record.store import Point, SweepDirectory, read_json
from harness.run import worker
from harness.secrets import TYPED_OUT, fill_in, hide, refuse_typed_out, settle, variables
from harness.spec.config import REPOSITORY
from harness.spec.identity import identity
from harness.spec.resolve import load_config

SECRET = "hunter2-0123456789abcdef"
TEXT = "${oc.env:MONITOR_API_KEY}"
QUICK = "train.steps=3 train.warmup_steps=1 train.global_batch_size=2 train.sequence_length=16".split()


@pytest.fixture(autouse=True)
def in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONITOR_API_KEY", SECRET)


@pytest.mark.slow
def test_a_sweep_hands_a_secret_to_deepspeed_and_writes_it_nowhere(tmp_path: Path) -> None:
    """With checkpoints, wandb's offline files, and DeepSpeed printing all of its configuration."""
    monitor = '{enabled: true, output_path: "${oc.env:MONITOR_FOLDER}", job_name: events}'
    point = f"deepspeed.comet.api_key={TEXT} 'deepspeed.csv_monitor={monitor}'"
    command = [sys.executable, REPOSITORY / "launchers" / "sweep.py", *QUICK, "deepspeed.log_level=info"]
    command += [f"sweep.points=[{json.dumps(point)}]", "train.checkpoint_interval=3", "results_dir=${oc.env:PLACE}"]
    environment = os.environ | {"MONITOR_FOLDER": str(tmp_path / "monitor"), "PLACE": str(tmp_path / "results")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in done.stdout + done.stderr
    written = {path.name: path.read_text() for path in files if path.suffix in (".yaml", ".json", ".txt")}
    for name in ("config.yaml", "ds_config.json", "command.txt", "sweep.yaml", "log.txt"):
        assert TEXT in written[name], name
    assert (tmp_path / "monitor").is_dir()  # what else came from the environment got there
    assert any(path.suffix == ".wandb" for path in files)
    assert any(path.name == "meta.json" for path in files)


@pytest.mark.parametrize(
    "override",
    [
        f"deepspeed.comet.api_key={SECRET}",
        f"+deepspeed.comet.api_key={SECRET}",
        f"++deepspeed.comet.API-Key='{SECRET}'",
        f"deepspeed.comet={{api_key: {SECRET}}}",
        f"deepspeed={{comet: {{workspace: w, 'api_key': \"{SECRET}\"}}}}",
        f"deepspeed.x=[{{a: 1}}, {{password: {SECRET}}}]",
        f"deepspeed.x.hf_token={SECRET}",
        f"deepspeed.comet.api_key={SECRET}=that=can=not=be=read",
        f"deepspeed.comet.api_key={SECRET},other",
        f"train.secret={SECRET}",
        f"deepspeed.comet.api_key=true-{SECRET}",
        f"deepspeed.comet.api_key=${{oc.env:MONITOR_API_KEY,{SECRET}}}",
        f"deepspeed.x.api_keys=[{SECRET}]",
        f"deepspeed.x.aws_access_key_id={SECRET}",
        f"deepspeed.x.password1={SECRET}",
        f"deepspeed.x.pwd={SECRET}",
        f"deepspeed.x.authorization='Bearer {SECRET}'",
        f"sweep.points=['deepspeed.comet.api_key={SECRET}']",
        f"sweep.points=['train.steps=3 \"deepspeed.x={{password: {SECRET}}}\"']",
    ],
)
def test_a_secret_that_is_typed_out_is_refused_and_not_repeated(override: str) -> None:
    with pytest.raises(ConfigError, match="put it into an environment variable, and write ") as error:
        refuse_typed_out([override])
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        f"deepspeed.comet.api_key={TEXT}",
        f"deepspeed.comet={{api_key: '{TEXT}', token: null}}",
        f"deepspeed.comet.header='Bearer {TEXT}'",
        "deepspeed.comet.api_key=null",
        "data.tokenizer=/models/tokenizer",
        "deepspeed.x.tokens_per_second=3",
        "deepspeed.x.token_dropping=5",
        "deepspeed.x.use_token=true",
        "deepspeed.x={use_token: true, token: false}",
        "deepspeed.x.max_tokens=8",
        f"deepspeed.x.authorization='Bearer {TEXT}'",
        "data.path=/home/secretary/credentials.txt",
        "model.vocab_size=257",
        "deepspeed.x.secretary=bob",
    ],
)
def test_what_is_no_secret_passes(override: str) -> None:
    refuse_typed_out([override])
    key, _, value = override.partition("=")
    assert not TYPED_OUT.search(f"{key}: {value}")


def test_the_whole_configuration_passes() -> None:
    for experiment in ("train.steps=5", "experiment=long_context", "model=emulated", "data=hub", "cluster=h200"):
        raw = compose([experiment])
        assert settle(raw) == raw


@pytest.mark.parametrize(
    ("raw", "refused"),
    [
        ({"deepspeed": {"comet": {"api_key": "abc"}}}, "deepspeed.comet.api_key is given a secret"),
        ({"deepspeed": {"comet": {"api_key": 123}}}, "deepspeed.comet.api_key is given a secret"),
        ({"deepspeed": {"x": [{"passwd": ["abc"]}]}}, "deepspeed.x.passwd is given a secret"),
        ({"deepspeed": {"credentials": {"user": "abc"}}}, "deepspeed.credentials.user is given a secret"),
        ({"tracking": {"wandb": {"entity": TEXT}}}, f"tracking.wandb.entity='{TEXT}' would be written to files"),
        ({"model": {"name": f"x-{TEXT}"}}, "would be written to files; only deepspeed.* and data.path"),
    ],
)
def test_files_of_the_user_are_checked_too(raw: dict[str, Any], refused: str) -> None:
    with pytest.raises(ConfigError) as error:
        settle(raw)
    assert refused in str(error.value)
    assert "abc" not in str(error.value)


def test_composition_leaves_the_text_and_fills_in_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDER", "/somewhere")
    overrides = ["results_dir=${oc.env:FOLDER}/results", "data.path=${results_dir}/text", f"deepspeed.x.a=b-{TEXT}"]
    overrides += ["deepspeed.x.c=${deepspeed.x.a}", "deepspeed.x.d=${oc.env:NOT_SET,default}"]
    for raw in (compose(overrides), Composer().compose(overrides)):
        assert (raw["results_dir"], raw["data"]["path"]) == ("/somewhere/results", "/somewhere/results/text")
        assert raw["deepspeed"]["x"] == {"a": f"b-{TEXT}", "c": f"b-{TEXT}", "d": "default"}


def test_a_secret_that_is_typed_out_ends_a_sweep_before_it_leaves_a_trace(tmp_path: Path) -> None:
    """As one of several values, which only the expansion tells apart."""
    grid = expand([f"deepspeed.comet.api_key={TEXT},{SECRET}", "parallel.tp=1,3"], {}, [])
    grid = [[*point, f"results_dir={tmp_path}"] for point in grid]
    with pytest.raises(ConfigError, match=r"deepspeed\.comet\.api_key is given a secret"):
        run_batch(grid, Composer(), SweepDirectory(tmp_path, "grid"), {}, first=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("override", ["deepspeed.credentials.user=hunter2", "deepspeed.x.token.value=hunter2"])
def test_a_secret_that_only_the_composition_shows_ends_a_sweep_as_well(override: str, tmp_path: Path) -> None:
    """Of a point: no row and no file repeats it."""
    grid = [[override, f"results_dir={tmp_path}"], ["train.seed=5", f"results_dir={tmp_path}"]]
    refuse_typed_out(grid[0])
    with pytest.raises(ConfigError, match="is given a secret") as error:
        run_batch(grid, Composer(), SweepDirectory(tmp_path, "grid"), {}, first=True)
    assert "hunter2" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


LONG, ODD = "sk-live-" + "ABCDEFGH" * 10, "p4ss'w\"ord\\with\nnewline"


@pytest.mark.parametrize("secret", [SECRET, LONG, ODD, f"'{LONG}", "ümläut-ß"])
def test_a_secret_is_hidden_however_it_is_quoted(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Monitor(BaseModel):
        enabled: bool

    monkeypatch.setenv("MONITOR_API_KEY", secret)
    texts = [secret, repr(secret), json.dumps(secret), json.dumps([secret], ensure_ascii=False)]
    for value in (
        secret,
        [secret],
        f"Bearer {secret}",
        {"api_key": secret, "x": 1},
        {"mode": {"auth": [f"a {secret}"]}},
    ):
        with pytest.raises(ValidationError) as error:
            Monitor(enabled=value)  # type: ignore[arg-type]
        texts.append(str(error.value))
    for hidden in hide(texts, ["MONITOR_API_KEY"]):
        assert TEXT in hidden
        assert not any(part in hidden for part in (secret[:12], secret[-10:]))


def test_the_identity_of_a_point_does_not_tell_its_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    def named() -> str:
        return identity(load_config(compose([f"deepspeed.comet.api_key={TEXT}"]), MACHINE), "data")

    first = named()
    monkeypatch.setenv("MONITOR_API_KEY", "another")
    assert named() == first != identity(make_config(), "data")


def test_ranks_fill_in_and_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"comet": {"api_key": TEXT, "enabled": True}, "list": [f"a {TEXT}", 1]}
    assert variables(settings) == {"MONITOR_API_KEY"}
    assert fill_in(settings) == {"comet": {"api_key": SECRET, "enabled": True}, "list": [f"a {SECRET}", 1]}
    assert hide(fill_in(settings), variables(settings)) == settings
    monkeypatch.delenv("MONITOR_API_KEY")
    with pytest.raises(ConfigError, match="names a variable that is not in the environment; set MONITOR_API_KEY"):
        fill_in(settings)


def test_ranks_inherit_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that look like those of another job's ranks are dropped otherwise."""
    monkeypatch.setenv("MASTER_API_KEY", SECRET)
    assert "MASTER_API_KEY" not in child_environment(make_config(), MACHINE)
    config = load_config(compose(["deepspeed.comet.api_key=${oc.env:MASTER_API_KEY}"]), MACHINE)
    assert child_environment(config, MACHINE)["MASTER_API_KEY"] == SECRET


def end_with(status: int) -> NoReturn:
    raise SystemExit(status)


@pytest.mark.parametrize("can_report", [True, False])
def test_a_rank_that_fails_tells_no_secret(
    can_report: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    attempt = Point(tmp_path / "grid" / "points" / "point").new_attempt()
    attempt.write_config(load_config(compose([f"deepspeed.comet.api_key={TEXT}"]), MACHINE))

    def fail(*_: object) -> None:
        logger = logging.getLogger("DeepSpeed")
        logger.addHandler(caplog.handler)
        logger.warning("json = %s", {"api_key": SECRET})
        raise ValueError(f"input_value={SECRET!r} is no flag")

    logger = logging.getLogger("DeepSpeed")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("harness.run.engines.deepspeed.join.initialize_distributed", lambda: None)
    monkeypatch.setattr(worker, "_print_whole_lines", lambda: None)
    monkeypatch.setattr(worker, "_finish", end_with)
    monkeypatch.setitem(worker.TASKS, "fail", __name__)
    monkeypatch.setattr(sys.modules[__name__], "fail", fail, raising=False)
    if not can_report:
        (attempt.path / "errors").write_text("in the way")
    with pytest.raises(SystemExit, match="1"):
        worker.main([str(attempt.path), "fail"])
    said, error = "".join(capsys.readouterr()), read_json(attempt.error_file(0)) or {}
    assert error.get("message") == (f"input_value='{TEXT}' is no flag" if can_report else None)
    assert ("rank 0 can't report in errors/: " in said) != can_report
    assert f"input_value='{TEXT}' is no flag" in said
    assert SECRET not in json.dumps(error) + said + caplog.text
    assert TEXT in caplog.text


def test_a_refused_point_is_recorded_as_it_was_typed(tmp_path: Path) -> None:
    overrides = ["parallel.tp=3", f"deepspeed.comet.api_key={TEXT}"]
    raw = Composer().compose(overrides)
    attempt = SweepDirectory(tmp_path, "grid").record_invalid(overrides, raw, "no", "python launchers/train.py")
    assert attempt.raw_config()["deepspeed"] == {"comet": {"api_key": TEXT}}
