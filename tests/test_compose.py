"""Composition by Hydra, the quick way for grids, and errors in one sentence."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from allpairspy import AllPairs

from harness.errors import ConfigError
from harness.launch.compose import CONF, Composer, compose, one_sentence
from harness.machine import Machine
from harness.spec.resolve import load_config

AXES: list[list[list[str]]] = [
    [[], ["model=llama_tiny", "data=synthetic"], ["experiment=long_context", "sweep=quickstart"]],
    [["train.learning_rate=3e-4"], ["train.learning_rate=${train.weight_decay}"]],
    [
        ["parallel.pp=2", "parallel.partition=[1,3]"],
        ["launch.threads_per_rank=null", "data.path='a b.txt'", "cluster.peak_flops={fp32:1.5e12}"],
        ["parallel.tp=2", "parallel.tp=4", "train.precision=bf16", "tracking.live=true", "train.seed=0x10"],
        ["deepspeed.zero_optimization.reduce_bucket_size=5e8", "deepspeed.aio={block_size: 1}", "+train.new=1"],
        ["results_dir=/tmp/x", "~data.hub_split", "train={steps: 7}", "train.steps=9"],
    ],
]


def test_a_composer_gives_what_compose_gives() -> None:
    composer = Composer()
    for parts in AllPairs(AXES):
        overrides = list(itertools.chain(*parts))
        assert composer.compose(overrides) == compose(overrides), overrides


def test_points_do_not_touch_each_other() -> None:
    composer = Composer()
    before = composer.compose([])
    for others in (["train.steps=3"], ["train.steps=${train.seed}"], ["train.adam_betas=[0.1,0.2]", "train.steps=3"]):
        composer.compose([*others, "cluster.peak_flops.fp32=1.0"])["train"]["seed"] = 0
        assert composer.compose([]) == before, others
        with pytest.raises(ConfigError):
            composer.compose([*others, "train.seed=${nope}"])
        assert composer.compose([]) == before, others


def test_what_interpolates_goes_on_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    file = tmp_path / "conf" / "train" / "default.yaml"
    file.write_text(re.sub("(?m)^seed: .*$", "seed: ${train.steps}", file.read_text()))
    monkeypatch.setattr("harness.launch.compose.CONF", tmp_path / "conf")
    composer = Composer()
    for overrides, seed in ((["train.seed=5"], 5), (["train.steps=7"], 7), ([], 20)):
        assert composer.compose(overrides)["train"]["seed"] == seed


def test_a_grid_composes_once_per_set_of_choices() -> None:
    loaded: list[list[str]] = []

    def load(overrides: list[str]) -> Any:
        loaded.append(overrides)
        return Composer()._load(overrides)

    composer = Composer(load)
    for model, tp in itertools.product(["gpt2_tiny", "llama_tiny"], range(1, 20)):
        composer.compose([f"model={model}", f"parallel.tp={tp}"])
    assert loaded == [["model=gpt2_tiny"], ["model=llama_tiny"]]


def test_any_deepspeed_setting_can_be_named() -> None:
    raw = compose(["deepspeed.zero_optimization.reduce_bucket_size=5e8", "deepspeed.comms_logger={enabled: true}"])
    assert raw["deepspeed"] == {"zero_optimization": {"reduce_bucket_size": 5e8}, "comms_logger": {"enabled": True}}
    load_config(raw, Machine("cpu", "test", 2, 2, 2**33))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("train.stepz=3", "train.stepz is not a configuration key; did you mean train.steps?"),
        ("tarin.steps=3", "tarin.steps is not a configuration key; did you mean train.steps?"),
        ("modle=gpt2_tiny", "modle is not a configuration key; did you mean model?"),
        ("~train.stepz", "Could not delete from config. 'train.stepz' does not exist; correct the override"),
        ("xyz.abc=1", "xyz.abc is not a configuration key; launchers/train.py --cfg job lists them all"),
        ("model.path=/x", "model.path is not a configuration key; only model=hf has it"),
        ("sweep=nope", "sweep=nope is not available; choose one of default, quickstart"),
        ("train=5", "train=5 is not available; choose one of default"),
        ("train=null", "train=null is not available; choose one of default"),
        ("steps", "'steps' can't be read as an override; write KEY=VALUE, and quote texts with '=' or spaces"),
        ("a=[1", "'a=[1' can't be read as an override; write KEY=VALUE, and quote texts with '=' or spaces"),
        ("train.steps=1,2", "train.steps=1,2 names several values; use launchers/sweep.py to run each, "
                            "or train.steps=[1,2] for a list"),
        ("train.adam_betas.x=3", "train.adam_betas.x names no element of a list; write train.adam_betas=[...]"),
        ("train.steps=${nope}", "train.steps: Interpolation key 'nope' not found; correct its value"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(overrides: str, sentence: str) -> None:
    for composed_by in (compose, Composer().compose):
        with pytest.raises(ConfigError) as raised:
            composed_by([overrides])
        message = str(raised.value)
        if overrides.startswith("sweep="):  # grids come and go
            assert message.startswith("sweep=nope is not available; choose one of default, ")
        else:
            assert message == sentence


def test_an_error_of_ours_is_no_mistake_of_the_user() -> None:
    with pytest.raises(ValueError, match="invalid literal") as raised, one_sentence(["train.steps=3", "x=1"]):
        int("x")
    assert not isinstance(raised.value, ConfigError)


@pytest.mark.parametrize("content", [b"a: [", b"a: 'b", b"\xd2\x00"])
def test_a_file_that_is_no_yaml_is_one_sentence(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    monkeypatch.setattr("harness.launch.compose.CONF", tmp_path / "conf")
    (tmp_path / "conf" / "cluster" / "mine.yaml").write_bytes(content)
    assert compose([])["cluster"]["name"] == "local"
    for overrides in (["cluster=mine"], ["cluster=mine", "parallel.tp=2"]):
        with pytest.raises(ConfigError, match="a configuration file can't be read: "):
            compose(overrides)
        with pytest.raises(ConfigError, match="a configuration file can't be read: "):
            Composer().compose(overrides)


def test_a_file_that_is_no_yaml_is_not_what_a_misspelt_key_is_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    monkeypatch.setattr("harness.launch.compose.CONF", tmp_path / "conf")
    (tmp_path / "conf" / "cluster" / "mine.yaml").write_bytes(b"\xd2\x00")
    with pytest.raises(ConfigError, match=r"cluster\.nope is not a configuration key"):
        compose(["cluster.nope=1"])


@pytest.mark.parametrize("content", ["defaults: [mine, _self_]", "a: " + "[" * 3000 + "]" * 3000])
def test_a_file_without_an_end_is_one_sentence(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    monkeypatch.setattr("harness.launch.compose.CONF", tmp_path / "conf")
    (tmp_path / "conf" / "cluster" / "mine.yaml").write_text(content)
    for composed_by in (compose, Composer().compose):
        with pytest.raises(ConfigError, match=r"^cluster=mine leads in a circle or too deep: "):
            composed_by(["cluster=mine"])
