"""Keys that come later: what an entry in the schema does, runs from before it, and runs of a version after this one."""

from __future__ import annotations

import copy
import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from examples.key import Parallel as WithCp
from helpers import MACHINE, compose_raw, make_config, record_attempt
from omegaconf import OmegaConf
from pydantic.fields import FieldInfo

from harness.checkpoints import FORMAT, META, check_resume
from harness.errors import ConfigError
from harness.launch.compose import Composer, compose, open_keys
from harness.launch.points import decide, expand, new_attempt
from harness.launch.report import main
from harness.record import report
from harness.record.store import Attempt, SweepDirectory, environment, write_json, write_yaml
from harness.spec.config import REPOSITORY, Launch, Model, Parallel, RunConfig, Section
from harness.spec.identity import identity
from harness.spec.resolve import load_config
from harness.spec.versions import later_in, later_keys, of_a_later_version

PUBLISHED = sorted((REPOSITORY / "results/published").glob("**/config.yaml"))
CP = WithCp.model_fields["cp"]


@contextmanager
def added(section: type[Section], name: str, field: FieldInfo) -> Iterator[None]:
    """The schema with one more field."""

    def rebuild() -> None:
        for kind in dict.fromkeys((section, RunConfig)):
            kind.model_rebuild(force=True)

    section.model_fields[name] = field
    rebuild()
    try:
        yield
    finally:
        del section.model_fields[name]
        rebuild()


@pytest.fixture
def cp() -> Iterator[None]:
    with added(Parallel, "cp", CP):
        yield


def configure(*overrides: str) -> RunConfig:
    return load_config(compose(overrides), MACHINE)


def identify(*overrides: str) -> str:
    return identity(configure(*overrides), "data")


class TestAKeyIsOneField:
    def test_has_its_default_without_a_line_in_conf(self, cp: None) -> None:
        assert configure().parallel.cp == 1  # type: ignore[attr-defined]
        assert later_keys()["parallel.cp"] == 1

    def test_the_command_line_sets_and_sweeps_it(self, cp: None) -> None:
        assert configure("parallel.cp=2").parallel.cp == 2  # type: ignore[attr-defined]
        assert Composer().compose(["parallel.cp=2"])["parallel"]["cp"] == 2
        points = expand(["parallel.cp=1,2"], {"parallel.tp": "1"}, [])
        assert [Composer().compose(point)["parallel"].get("cp") for point in points] == [1, 2]
        with pytest.raises(ConfigError, match=r"parallel\.ccp is not a configuration key; did you mean parallel\.cp\?"):
            compose(["parallel.ccp=2"])
        with pytest.raises(ConfigError, match=r"parallel\.cp='two' is not valid"):
            configure("parallel.cp=two")

    def test_it_is_in_an_identity_where_it_is_not_as_before(self, cp: None) -> None:
        assert identify() == identify("parallel.cp=1") == "07df4ed0"
        assert identify("parallel.cp=2") != identify()

    def test_what_was_written_before_means_its_default(self, cp: None) -> None:
        for file in PUBLISHED:
            assert RunConfig.model_validate(yaml.safe_load(file.read_text())).parallel.cp == 1  # type: ignore[attr-defined]

    def test_it_leaves_no_trace(self) -> None:
        with added(Parallel, "cp", CP):
            pass
        assert "cp" not in Parallel.model_fields
        with pytest.raises(ConfigError, match=r"parallel\.cp is not a configuration key"):
            configure("parallel.cp=2")
        assert open_keys(["parallel.cp=2", "deepspeed.a=1"]) == ["parallel.cp=2", "++deepspeed.a=1"]


class Stack(Section):
    """A section that comes later."""

    fused: bool = False


def test_a_section_may_come_later() -> None:
    with added(RunConfig, "stack", FieldInfo(annotation=Stack, default=Stack())):
        assert later_keys()["stack.fused"] is False
        assert identify() == identify("stack.fused=false") == "07df4ed0"
        assert identify("stack.fused=true") != identify()
        with pytest.raises(ConfigError, match="stack=5 is not valid"):
            load_config(compose([]) | {"stack": 5}, MACHINE)


def test_a_key_that_says_nothing_of_a_computation_stays_out_of_the_identity() -> None:
    with added(Launch, "label", FieldInfo(annotation=str, default="mine")):
        assert identify("launch.label=yours") == identify()


def test_a_key_that_conf_lists_is_set_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that commands hold what the user wrote; one that only some files list is opened."""
    later = dict.fromkeys(("parallel.schedule", "model.jitter", "stack.fused", "results_dir", "later"))
    monkeypatch.setattr("harness.launch.compose.later_keys", lambda: later)
    assert [override[:2] == "++" for override in open_keys([f"{key}=1" for key in later])] == [
        False, True, True, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.parent.name)
def test_published_runs_are_readable(file: Path) -> None:
    raw = yaml.safe_load(file.read_text())
    whole = OmegaConf.create()
    for key, value in later_keys().items():
        OmegaConf.update(whole, key, value)
    assert RunConfig.model_validate(raw).model_dump(mode="json") == OmegaConf.merge(whole, raw)  # nothing else is added
    assert of_a_later_version(raw) == ""


def test_every_key_that_came_later_may_be_missing() -> None:
    raw = make_config().model_dump(mode="json")
    for key in later_keys():
        *sections, name = key.split(".")
        node = raw
        for section in sections:
            node = node.get(section, {})
        node.pop(name, None)
    assert RunConfig.model_validate(raw) == make_config()


# --- checkpoints


def checkpoint(folder: Path, **model: Any) -> str:
    config = make_config().model_dump(mode="json")
    meta = {"format": FORMAT, "step": 1, "optimizer_step": 1, "scheduler_step": 1, "loss_scale": {}, "files": {}}
    folder.mkdir()
    write_json(folder / META, meta | {"config": config | {"model": config["model"] | model}})
    return str(folder)


def test_a_checkpoint_from_before_a_key_is_resumed_where_the_key_is_as_before(tmp_path: Path) -> None:
    before, train = checkpoint(tmp_path / "before"), make_config().train.model_dump()
    after = checkpoint(tmp_path / "after", gate="swish")
    with added(Model, "gate", FieldInfo(annotation=str, default="none")):
        for path, gate, works in ((before, "none", True), (after, "swish", True), (before, "swish", False)):
            model = configure(f"model.gate={gate}").model
            assert later_in(model)["gate"] == "none"
            if works:
                check_resume(path, model.model_dump(), train, later_in(model))
            else:
                with pytest.raises(ConfigError, match=r"its model\.gate is 'none', here it is 'swish'"):
                    check_resume(path, model.model_dump(), train, later_in(model))


def test_a_checkpoint_without_an_objective_was_causal(tmp_path: Path) -> None:
    path, model = checkpoint(tmp_path / "before"), make_config().model
    with pytest.raises(
        ConfigError, match=r"was trained with train\.objective=causal, not masked; use train\.objective=c"
    ):
        check_resume(path, model.model_dump(), make_config().train.model_dump() | {"objective": "masked"}, {})


# --- runs of a later version


def make_later(attempt: Attempt, **settings: Any) -> None:
    """As a later version would have written it: keys by section, or a section as a whole."""
    raw = attempt.raw_config()
    for section, values in settings.items():
        raw[section] = raw.get(section, {}) | values
    write_yaml(attempt.config_file, raw)


@pytest.fixture
def sweep(tmp_path: Path) -> SweepDirectory:
    sweep = SweepDirectory(tmp_path, "grid")
    sweep.prepare({"environment": environment(MACHINE)})
    record_attempt(sweep, "parallel.tp=2")
    make_later(record_attempt(sweep, "parallel.pp=2"), parallel={"cp": 2})
    return sweep


class TestOfALaterVersion:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"parallel": {"cp": 2}}, "parallel.cp=2 is not known"),
            ({"parallel": {"schedule": "zb-v"}}, "parallel.schedule=zb-v is not known"),
            ({"parallel": {"engine": "fsdp2"}}, "parallel.engine=fsdp2 is not known"),
            ({"model": {"family": "mixtral"}}, "model.family=mixtral is not known"),
            (
                {"stack": {"fused": True, "kernel": {"name": "x"}}},
                "stack.fused=True, stack.kernel.name=x are not known",
            ),
            ({"train": dict.fromkeys("abcde", 0)}, "train.a=0, train.b=0, train.c=0 and 2 more are not known"),
            ({"tracking": {"hub_token": "hf_abc"}}, "tracking.hub_token=... is not known"),
            ({"server": {"url": "x?api_key=abc"}}, "server.url=... is not known"),
            ({"server": {"list": [{"password": "abc"}]}}, "server.list=... is not known"),
            ({"train": {"text": "a\n" + "b" * 200}}, f"train.text=a {'b' * 67}... is not known"),
        ],
    )
    def test_is_told_by_what_is_not_known(self, settings: dict[str, Any], words: str) -> None:
        raw = make_config().model_dump(mode="json")
        for section, values in settings.items():
            raw[section] = raw.get(section, {}) | values
        assert of_a_later_version(raw) == words

    def test_an_emulated_model_is_known(self) -> None:
        raw = make_config("model=emulated", "data=synthetic").model_dump(mode="json")
        assert of_a_later_version(raw) == ""
        raw["model"]["pace"] = 3
        assert of_a_later_version(raw) == "model.pace=3 is not known"

    def test_is_reported_and_in_no_table(self, sweep: SweepDirectory, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([str(sweep.path)]) == 0
        printed = capsys.readouterr()
        path = "points/" + next(p.name for p in sweep.points() if p.name.startswith("tp1_pp2")) + "/attempt-1"
        assert printed.err == f"warning: {path} is of a later version (parallel.cp=2 is not known); left out\n"
        assert "1 point: 1 ok" in printed.out
        rows = list(csv.DictReader((sweep.path / "results.csv").open()))
        assert [(row["tp"], row["pp"]) for row in rows] == [("2", "1")]

    def test_refused_and_damaged_points_stay_rows(self, sweep: SweepDirectory) -> None:
        raw = compose_raw() | {"parallel": {"ttp": 2}}
        sweep.record_invalid(["parallel.ttp=2"], raw, "parallel.ttp is not a key", "x")
        record_attempt(sweep, "parallel.dp=2", status="crashed").config_file.write_text("parallel: [")
        assert len(report.left_out(sweep)) == 1
        assert sorted(row["status"] for row in report.collect(sweep)) == ["crashed", "invalid", "ok"]

    def test_is_neither_measured_nor_touched(self, sweep: SweepDirectory) -> None:
        """Its point is asked for again: it runs, and what the later version left stays as it is."""
        (point,) = (point for point in sweep.points() if point.name.startswith("tp1_pp2"))
        config, now = make_config("parallel.pp=2"), environment(MACHINE)
        assert decide(config, point, now).why == "not measured yet"
        before = {path: path.read_bytes() for path in point.path.glob("**/*") if path.is_file()}
        attempt = new_attempt(config, sweep, point.identity, [])
        assert (attempt.point, attempt.number) == (point, 2)
        assert before == {path: path.read_bytes() for path in before}

    def test_what_this_version_measured_counts_beside_it(self, sweep: SweepDirectory) -> None:
        ours = record_attempt(sweep, "parallel.pp=2", step_seconds=[9, 9, 0.2])
        make_later(record_attempt(sweep, "parallel.pp=2"), parallel={"cp": 2})
        assert ours.number == 2
        assert decide(make_config("parallel.pp=2"), ours.point, environment(MACHINE)).attempts == [ours]
        shown = next(row for row in report.collect(sweep) if row["pp"] == 2)
        assert (shown["attempt"], shown["repeats"], shown["step_seconds"]) == (2, 1, pytest.approx(0.2))

    def test_an_attempt_that_waited_is_not_taken_over(self, sweep: SweepDirectory) -> None:
        config = make_config("parallel.dp=2")
        waiting = new_attempt(config, sweep, identity(config, "data"), [])
        write_json(waiting.status_file, {"status": "interrupted"})
        make_later(waiting, parallel={"cp": 2})
        assert new_attempt(config, sweep, identity(config, "data"), []).number == 2

    def test_is_nothing_that_others_are_compared_with(self, tmp_path: Path) -> None:
        """Single runs are stale beside the newest, unless that is of a later version."""
        runs = SweepDirectory(tmp_path, "single")
        record_attempt(runs, "parallel.tp=2")
        later = record_attempt(runs, "parallel.pp=2")
        make_later(later, parallel={"cp": 2})
        status = copy.deepcopy(later.status())
        write_json(later.status_file, status | {"environment": status["environment"] | {"code": "later"}})
        assert [row["stale"] for row in report.collect(runs)] == [False]
