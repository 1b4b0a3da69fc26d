"""The models of conf/model have the published sizes, and those transformers builds from the same shape."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch

from harness.spec.config import REPOSITORY, Model
from harness.spec.counts import parameters
from tests.helpers import make_config
from tests.references import build_reference

SYNTHETIC = {"hf", "emulated"}  # no shape of their own, no computation
FILES = sorted(file.stem for file in (REPOSITORY / "conf" / "model").glob("*.yaml") if file.stem not in SYNTHETIC)

PUBLISHED = {
    "gpt2_small": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "llama_1b": 1_100_048_384,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama31_8b": 8_030_261_248,
    "mistral_7b": 7_241_732_096,
    "qwen2_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
    "bert_base": 109_514_298,
}


@cache
def model_of(name: str) -> Model:
    return make_config(f"model={name}").model


@pytest.mark.parametrize(("name", "number"), PUBLISHED.items())
def test_published_parameter_counts(name: str, number: int) -> None:
    assert parameters(model_of({"bert_base": "bert"}.get(name, name))) == number


def test_gpt3() -> None:
    assert parameters(model_of("gpt3_175b")) == pytest.approx(174.6e9, rel=5e-4)


@pytest.mark.parametrize("name", FILES)
def test_transformers_counts_the_same(name: str) -> None:
    model = model_of(name)
    with torch.device("meta"):
        reference = build_reference(model)
    assert parameters(model) == sum(parameter.numel() for parameter in reference.parameters())


@pytest.mark.parametrize("name", FILES)
def test_name_is_that_of_the_file(name: str) -> None:
    """A table's label is the word to write after `model=`; a family's file holds its reference size."""
    families = {"gpt2": "gpt2_small", "llama": "llama3_8b", "bert": "bert_base", "encoder": "encoder_base"}
    assert model_of(name).name == families.get(name, name)


@pytest.mark.parametrize("name", FILES)
def test_comment_gives_the_size(name: str) -> None:
    comment = (REPOSITORY / "conf" / "model" / f"{name}.yaml").read_text().splitlines()[0]
    if stated := re.match(r"# ([\d.]+) (million|billion)", comment):
        number, unit = stated.groups()
        count = parameters(model_of(name)) / {"million": 1e6, "billion": 1e9}[unit]
        assert f"{count:.{len(number.partition('.')[2])}f}" == number


OTHER_GROUPS = [file for file in sorted((REPOSITORY / "conf").glob("*/*.yaml")) if file.parent.name != "model"]


@pytest.mark.parametrize("file", OTHER_GROUPS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_choice_is_a_configuration(file: Path) -> None:
    make_config(f"{file.parent.name}={file.stem}")
