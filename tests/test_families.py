"""The table of families: its entries are whole, and one entry is all that a new family needs."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import MACHINE, compose_raw
from helpers_model import fill, random_state, random_tokens, relative_error, tiny_model
from references import build_reference
from states import from_transformers, to_transformers

from harness.errors import ConfigError
from harness.model.assembly import build_layers
from harness.model.groups import TensorParallel
from harness.model.loss import PipelineLoss
from harness.plan.memory import memory_per_stage
from harness.spec import counts
from harness.spec.architecture import DOWN, OUTPUT, QKV, UP
from harness.spec.config import REPOSITORY, Model, RunConfig
from harness.spec.families import FAMILIES
from harness.spec.identity import identity
from harness.spec.parameters import parameter_table
from harness.spec.partition import layers_per_part
from harness.spec.resolve import load_config
from harness.spec.transformers_config import resolve_model
from harness.spec.twin import twin_of

SINGLE = TensorParallel.single()
WRITTEN = {name: family.transformers for name, family in FAMILIES.items() if family.transformers is not None}


def test_every_family_is_in_the_table() -> None:
    assert {"bert", "emulated", "encoder", "gpt2", "llama", "mistral", "qwen2", "qwen3"} == set(FAMILIES)
    assert all(family.biases <= {QKV, OUTPUT, UP, DOWN} for family in FAMILIES.values())


def untied(family: str) -> Model:
    """With every parameter that it can have."""
    return tiny_model(family, num_hidden_layers=1, tie_word_embeddings=False, type_vocab_size=2 * (family == "bert"))


@pytest.mark.parametrize("name", WRITTEN)
def test_every_module_and_key_has_its_counterpart(name: str) -> None:
    written, table = WRITTEN[name], parameter_table(untied(name))
    modules = {parameter.rpartition(".")[0].removeprefix("blocks.0.") for parameter in table}
    assert modules == set(written.modules)
    assert written.transposed <= modules
    assert set(written.defaults) == set(written.keys.values())
    assert not set(written.defaults) & set(written.dropout)
    assert all(written.defaults[key] == value for key, value in written.fixed.items() if key in written.defaults)


# --- a family of ten lines, put into the table and taken out again

EXAMPLE = REPOSITORY / "tests" / "examples" / "unbiased_qwen2.py"
"""What harness/spec/families/ would hold."""


@pytest.fixture
def unbiased_qwen2(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(FAMILIES, EXAMPLE.stem, runpy.run_path(str(EXAMPLE))["ARCHITECTURE"])
    return EXAMPLE.stem


def load(family: str, *overrides: str) -> RunConfig:
    return load_config(compose_raw("model=llama_tiny", f"model.family={family}", *overrides), MACHINE)


@pytest.fixture(autouse=True)
def _without_a_trace() -> Iterator[None]:
    before = dict(FAMILIES)
    yield
    assert before == FAMILIES


def test_without_its_entry_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"family='unbiased_qwen2' is not .* 'emulated', .*'qwen3'"):
        load("unbiased_qwen2")


def test_its_configuration_is_accepted_and_read_from_config_json(unbiased_qwen2: str, tmp_path: Path) -> None:
    config = load(unbiased_qwen2, "parallel.pp=2")
    assert config.model.family == unbiased_qwen2
    assert twin_of(config).model.family == unbiased_qwen2
    assert identity(config, "data") != identity(load("llama", "parallel.pp=2"), "data")
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
    (tmp_path / "config.json").write_text(json.dumps({"model_type": unbiased_qwen2, "rope_theta": 5e5}))
    assert resolve_model({"family": "hf", "path": str(tmp_path)})["rope_theta"] == 5e5


def test_its_parameters_are_counted(unbiased_qwen2: str) -> None:
    ours, qwens = load(unbiased_qwen2).model, load("qwen2").model
    width = (ours.num_attention_heads + 2 * ours.num_key_value_heads) * ours.head_dim
    assert counts.parameters(qwens) - counts.parameters(ours) == ours.num_hidden_layers * width
    assert counts.training_flops_per_token(ours, 64) == counts.training_flops_per_token(qwens, 64)
    assert parameter_table(ours) == parameter_table(load("llama").model)


@pytest.mark.parametrize("tp", [1, 2])
def test_its_memory_is_that_of_the_layers(unbiased_qwen2: str, tp: int) -> None:
    config = load(unbiased_qwen2, f"parallel.tp={tp}")
    layers = build_layers(config.model, TensorParallel(group=None, rank=0, size=tp, kv_group=None, kv_size=1))
    held = sum(parameter.numel() for parameter in layers.parameters())
    (stage,) = memory_per_stage(config, layers_per_part(config.model, config.parallel, config.train.sequence_length))
    assert stage.parameter_bytes == 4 * held


def test_it_computes_as_in_transformers(unbiased_qwen2: str) -> None:
    model = tiny_model(unbiased_qwen2, num_key_value_heads=2, tie_word_embeddings=False)
    state, (tokens, targets) = random_state(model), random_tokens(model)
    reference = build_reference(model.model_copy(update={"family": "llama"}))
    reference.load_state_dict(to_transformers(state, model))
    expected = reference(tokens).logits
    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()

    layers = build_layers(model, SINGLE)
    fill(layers, model, state, SINGLE)
    logits = layers(tokens)
    PipelineLoss(model.vocab_size, SINGLE)(logits, (targets, 1.0 / (targets >= 0).sum())).backward()
    gradients = to_transformers({key: parameter.grad for key, parameter in layers.named_parameters()}, model)

    assert relative_error(logits, expected) < 1e-4
    wanted = {key: parameter.grad for key, parameter in reference.named_parameters()}
    assert gradients.keys() == wanted.keys()
    assert max(relative_error(gradients[key], wanted[key]) for key in wanted) < 1e-4
    again = from_transformers(reference.state_dict(), model)
    assert all(torch.equal(again[name], state[name]) for name in state)
