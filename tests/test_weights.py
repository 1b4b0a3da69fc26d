"""Splitting, drawing and converting weights."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_model import random_state, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from states import from_transformers, to_transformers

from harness.errors import ConfigError
from harness.model.assembly import build_layers
from harness.model.groups import TensorParallel
from harness.model.weights import draw, initialize, load_full, shard, unshard
from harness.spec.parameters import ParameterSpec, parameter_table

GPT2 = tiny_model(tie_word_embeddings=False)
LLAMA = tiny_model("llama", num_key_value_heads=2, tie_word_embeddings=False)


def place(rank: int, size: int) -> TensorParallel:
    """A rank for building and filling layers, not for running them."""
    return TensorParallel(group=None, rank=rank, size=size, kv_group=None, kv_size=1)


@settings(deadline=None)
@given(
    shares=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    other=st.integers(1, 3),
    dims=st.integers(1, 3),
    data=st.data(),
    tp_size=st.integers(1, 5),
)
def test_unshard_undoes_shard(shares: list[int], other: int, dims: int, data: st.DataObject, tp_size: int) -> None:
    shard_dim = data.draw(st.integers(0, dims - 1))
    parts = tuple((f"part{i}", share * tp_size) for i, share in enumerate(shares))
    shape = [other] * dims
    shape[shard_dim] = sum(size for _, size in parts)
    spec = ParameterSpec("p", tuple(shape), "normal", shard_dim, parts)
    full = torch.arange(math.prod(shape)).reshape(shape)
    slices = [shard(full, spec, rank, tp_size) for rank in range(tp_size)]
    assert {local.shape[shard_dim] for local in slices} == {sum(shares)}
    assert torch.equal(unshard(slices, spec), full)


@settings(deadline=None)
@given(vocab_size=st.integers(1, 12), tp_size=st.integers(1, 5))
def test_vocabulary_is_padded_with_zeros_and_cut_again(vocab_size: int, tp_size: int) -> None:
    model = tiny_model(vocab_size=vocab_size)
    spec = parameter_table(model)["embedding.weight"]
    full = 1 + torch.rand(spec.shape)
    slices = [shard(full, spec, rank, tp_size) for rank in range(tp_size)]
    assert {len(local) for local in slices} == {model.padded_vocab_size(tp_size) // tp_size}
    assert not torch.cat(slices)[vocab_size:].any()
    assert torch.equal(unshard(slices, spec), full)


def test_weights_are_as_wide_as_configured() -> None:
    model = tiny_model(initializer_range=0.1)
    assert draw(parameter_table(model)["embedding.weight"], 1, model).std() == pytest.approx(0.1, rel=0.1)


def test_each_part_is_split_on_its_own() -> None:
    parts = (("q", 8), ("k", 4), ("v", 4))
    spec = ParameterSpec("p", (16,), "normal", 0, parts)
    slices = [shard(torch.arange(16), spec, rank, 4).tolist() for rank in range(4)]
    assert slices == [[0, 1, 8, 12], [2, 3, 9, 13], [4, 5, 10, 14], [6, 7, 11, 15]]


def test_what_is_replicated_is_whole_everywhere() -> None:
    for model in (GPT2, LLAMA):
        for name, spec in parameter_table(model).items():
            norm_or_row_bias = "norm" in name or name.endswith(("output.bias", "down.bias"))
            assert (spec.shard_dim is None) == (norm_or_row_bias or name == "position_embedding.weight"), name
            full = torch.rand(spec.shape)
            assert (shard(full, spec, 1, 2).shape == full.shape) == (spec.shard_dim is None)


def test_uneven_split_is_our_own_bug() -> None:
    spec = ParameterSpec("p", (6,), "normal", 0, (("p", 6),))
    with pytest.raises(AssertionError, match="6 can't be split over 4 ranks"):
        shard(torch.zeros(6), spec, 0, 4)


def test_draw_depends_on_seed_and_name_alone() -> None:
    table = parameter_table(GPT2)
    spec, other = table["blocks.0.mlp.up.weight"], table["blocks.1.mlp.up.weight"]
    torch.manual_seed(1)
    first = draw(spec, 7, GPT2)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(draw(spec, 7, GPT2), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(draw(spec, 8, GPT2), first)
    assert not torch.equal(draw(other, 7, GPT2), first)


def test_draw_has_the_deviations_of_gpt2() -> None:
    model = tiny_model(hidden_size=128, head_dim=16, intermediate_size=256, num_hidden_layers=8, vocab_size=500)
    expected = {"normal": 0.02, "residual": 0.02 / 4, "zeros": 0.0, "ones": 0.0}
    for name, spec in parameter_table(model).items():
        values = draw(spec, 0, model)
        assert values.dtype == torch.float32
        assert float(values.std()) == pytest.approx(expected[spec.init], rel=0.05), name
        assert float(values.mean()) == pytest.approx(float(spec.init == "ones"), abs=1e-3), name
    residual = {name.split(".", 2)[2] for name, spec in parameter_table(model).items() if spec.init == "residual"}
    assert residual == {"attention.output.weight", "mlp.down.weight"}


@pytest.mark.parametrize("model", [GPT2, LLAMA, tiny_model()], ids=["gpt2", "llama", "tied"])
def test_every_layout_starts_from_the_same_weights(model: object) -> None:
    full = build_layers(model, place(0, 1))
    initialize(full.named_parameters(), model, place(0, 1), seed=5)
    whole = dict(full.named_parameters())
    ranks = []
    for rank in range(4):
        layers = build_layers(model, place(rank, 4))
        initialize(layers.named_parameters(), model, place(rank, 4), seed=5)
        ranks.append(dict(layers.named_parameters()))
    for name, spec in parameter_table(model).items():
        assert torch.equal(unshard([rank[name].detach() for rank in ranks], spec), whole[name]), name
        assert {rank[name].tensor_model_parallel for rank in ranks} == {spec.shard_dim is not None}, name


def test_load_full_sets_every_parameter() -> None:
    state = random_state(GPT2)
    layers = build_layers(GPT2, place(1, 2))
    load_full(layers.named_parameters(), parameter_table(GPT2), state.__getitem__, place(1, 2))
    for name, parameter in layers.named_parameters():
        assert torch.equal(parameter, shard(state[name], parameter_table(GPT2)[name], 1, 2)), name
        assert parameter.requires_grad


@pytest.mark.parametrize("model", [GPT2, LLAMA, tiny_model("llama")], ids=["gpt2", "llama", "tied"])
def test_conversion_and_back(model: object) -> None:
    state = random_state(model)
    converted = to_transformers(state, model)
    assert ("lm_head.weight" in converted) != model.tie_word_embeddings
    restored = from_transformers(converted, model)
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[name], state[name]) for name in state)


def test_published_gpt2_files_are_understood() -> None:
    """Without prefix, with causal masks as buffers and a copy of the tied head."""
    model = tiny_model()
    state = random_state(model)
    published = {name.removeprefix("transformer."): t for name, t in to_transformers(state, model).items()}
    published |= {"h.0.attn.bias": torch.ones(1), "lm_head.weight": state["embedding.weight"]}
    restored = from_transformers(published, model)
    assert all(torch.equal(restored[name], state[name]) for name in state)


def test_weights_of_another_model_are_refused() -> None:
    converted = to_transformers(random_state(LLAMA), LLAMA)
    with pytest.raises(ConfigError, match=r"hold model.layers.0.self_attn.q_proj.bias, which model=tiny does not"):
        from_transformers(converted | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(1)}, LLAMA)
    with pytest.raises(ConfigError, match=r"embed_tokens.weight has shape \(53, 32\), but model=tiny needs \(54, 32\)"):
        from_transformers(converted, LLAMA.model_copy(update={"vocab_size": 54}))
    del converted["model.norm.weight"]
    with pytest.raises(ConfigError, match=r"have no model.norm.weight"):
        from_transformers(converted, LLAMA)
    with pytest.raises(ConfigError, match="can't be a gpt2 of transformers"):
        to_transformers({}, tiny_model(num_key_value_heads=2))
