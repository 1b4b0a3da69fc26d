"""What layers take: measured beside a known truth, and what partition and schedule make of the numbers."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from distributed import run_ranks
from helpers import MACHINE, compose_raw, make_config

import harness.launch.points as points
from harness.errors import ConfigError
from harness.launch.points import check_configuration
from harness.machine import Machine
from harness.model.products import HAS_ONEDNN
from harness.record.store import write_json
from harness.spec.config import RunConfig
from harness.spec.identity import identity
from harness.spec.layer_seconds import LayerSeconds, NotMeasured, as_json, layer_seconds_file, read_layer_seconds
from harness.spec.resolve import load_config
from harness.spec.schedules import build_schedule, schedule_of

SECONDS = LayerSeconds(embedding=(1.0, 0.0, 1.0), block=(1.0, 1.0, 0.5), head=(2.0, 2.0, 2.0))
ASKED = [
    "parallel.pp=2", "parallel.schedule=zb_v", "parallel.partition=measured", "parallel.schedule_seconds=measured",
    "model.num_hidden_layers=8", "train.micro_batch_size=1", "train.global_batch_size=8",
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def keep(config: RunConfig, seconds: LayerSeconds) -> None:
    file = layer_seconds_file(config, MACHINE)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, as_json(seconds))


@pytest.mark.slow
def test_layers_that_wait_take_as_long_as_they_wait(tmp_path: Path) -> None:
    """On two tensor-parallel ranks; and those of a model that computes take some time."""
    waits = ["model=emulated", "model.forward_seconds=0.02", "model.backward_seconds=0.06", "data=synthetic"]
    small = ["model=llama_tiny", "train.sequence_length=32", "train.activation_checkpointing=full"]
    onednn = [f"model.onednn={str(HAS_ONEDNN).lower()}"]
    runs = [[*own, "parallel.tp=2"] for own in (waits, [*small, *onednn], [*small, "model.onednn=false"])]
    answers = run_ranks(2, "ranks_probe", runs, tmp_path)
    assert [answer["products"] for answer in answers] == ["torch", "onednn" if HAS_ONEDNN else "torch", "torch"]
    emulated, *computed = [answer["seconds"] for answer in answers]
    assert emulated["block"] == pytest.approx([0.02, 0.03, 0.03], abs=5e-3)
    assert all(seconds > 0 for layers in computed for layer in layers.values() for seconds in layer)


def test_parts_by_hand() -> None:
    assert SECONDS.of_parts([2, 1, 1]) == [[3.0, 2.0, 2.0], [1.0, 1.0, 0.5], [3.0, 3.0, 2.5]]
    assert SECONDS.of_parts([1]) == [[4.0, 3.0, 3.5]]


def test_numbers_and_not_where_they_come_from_are_in_the_configuration() -> None:
    raw = compose_raw(*ASKED)
    with pytest.raises(NotMeasured, match=r"partition=measured and parallel\.schedule_seconds=measured: the lay"):
        load_config(raw, MACHINE)
    neutral = make_config(*ASKED[:2], *ASKED[4:])
    keep(neutral, SECONDS)
    config = load_config(raw, MACHINE)
    # A block takes 2.5, the embedding 2 and the head 6, both on the first stage: with 2 and 6 blocks 13 and 15.
    assert config.parallel.partition == [1, 3, 3, 1]
    assert config.parallel.schedule_seconds == SECONDS.of_parts([1, 3, 3, 1])
    seconds = tuple((row[0], row[1], row[2]) for row in config.parallel.schedule_seconds)
    assert schedule_of(config).stages == build_schedule("zb_v", 2, 8, seconds=seconds).stages
    assert build_schedule("zb_v", 4, 8, seconds=seconds[:1]).stages != build_schedule("zb_v", 4, 8).stages
    before = identity(config, "data")
    keep(neutral, LayerSeconds((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)))
    even = load_config(raw, MACHINE)
    assert even.parallel.partition == [2, 2, 2, 2]
    assert identity(even, "data") != before
    *_, launcher, repeated = points.repeat_command(ASKED, config).partition("launchers/train.py")
    assert launcher
    assert "measured" not in repeated
    assert identity(load_config(compose_raw(*shlex.split(repeated)), MACHINE), "data") == before


def test_what_decides_how_long_layers_take_has_a_file_of_its_own() -> None:
    files = [
        layer_seconds_file(make_config(*overrides), MACHINE)
        for overrides in (
            [],
            ["parallel.tp=2"],
            ["train.micro_batch_size=2"],
            ["train.activation_checkpointing=full"],
            ["model.hidden_size=512"],
            ["launch.threads_per_rank=3"],
        )
    ]
    assert len(set(files)) == len(files)
    same = [["parallel.pp=2", "launch.threads_per_rank=3"], ["model.num_hidden_layers=9", "launch.threads_per_rank=3"],
            ["train.global_batch_size=64", "launch.threads_per_rank=3"]]  # fmt: skip
    assert {layer_seconds_file(make_config(*overrides), MACHINE) for overrides in same} == {files[-1]}


def test_they_are_measured_once_before_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(config: RunConfig, machine: Machine) -> None:
        measured.append(config)
        keep(config, SECONDS)

    monkeypatch.setattr(points, "measure_layers", measure)
    raw = compose_raw(*ASKED)
    with pytest.raises(ConfigError, match=r"were not measured on this machine yet; python launchers/train\.py"):
        check_configuration(raw, MACHINE, may_measure=False)
    assert check_configuration(raw, MACHINE).parallel.partition == [1, 3, 3, 1]
    assert check_configuration(raw, MACHINE).parallel.partition == [1, 3, 3, 1]
    assert len(measured) == 1


def test_nothing_is_measured_for_what_is_refused_or_has_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "measure_layers", lambda config, machine: pytest.fail("measured"))
    with pytest.raises(ConfigError, match=r"1f1b counts with no parallel\.schedule_seconds"):
        check_configuration(compose_raw("parallel.schedule_seconds=measured"), MACHINE)
    alone = check_configuration(compose_raw("parallel.partition=measured"), MACHINE)
    assert alone.parallel.partition == "uniform"


@pytest.mark.parametrize(
    "content",
    [
        *("", "{}", '{"embedding": 3, "block": [1], "head": []}', "[1, 2]"),
        *(
            f'{{"embedding": [1, 1, {wrong}], "block": [1, 1, 1], "head": [1, 1, 1]}}'
            for wrong in ("NaN", "-1", "1e999")
        ),
    ],
)
def test_a_damaged_file_counts_as_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "seconds.json").write_text(content)
    assert read_layer_seconds(tmp_path / "seconds.json") is None


def test_seconds_that_fit_no_schedule_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"schedule_seconds has 3 rows for 4 parts of the model; give one"):
        make_config(*ASKED[:2], *ASKED[4:], "parallel.schedule_seconds=[[1,1,1],[1,1,1],[1,1,1]]")
    with pytest.raises(ConfigError, match=r"1f1b counts with no parallel\.schedule_seconds; .* zb_auto or zb_v"):
        make_config("parallel.schedule_seconds=[[1,1,1]]")
    with pytest.raises(ConfigError, match=r"schedule_seconds=\[\[0\.0, 0\.0, 0\.0\]\] are all 0; give passes"):
        make_config(*ASKED[:2], *ASKED[4:], "parallel.schedule_seconds=[[0,0,0]]")
    with pytest.raises(ConfigError, match=r"schedule_seconds\.0=\[1, 1\] is not valid"):
        make_config(*ASKED[:2], *ASKED[4:], "parallel.schedule_seconds=[[1,1]]")
