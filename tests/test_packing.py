"""Products of packed matrices are those of float64 within the bound of fp32, or of what int8 rounds away."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from helpers_model import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_products import assert_near
from torch import Tensor, nn

from harness.errors import ConfigError
from harness.model import layers, packing, products
from harness.model.assembly import build_layers
from harness.model.groups import TensorParallel
from harness.model.packing import PackedMatrix, RoundedMatrix, hidden_steps, pack_matrices

REPOSITORY = Path(__file__).resolve().parents[1]
ONE, HALF = TensorParallel.single(), TensorParallel(group=Mock(), rank=1, size=2, kv_group=None, kv_size=1)
SIZES, FEW = st.integers(1, 80), st.lists(st.integers(1, 5), min_size=1, max_size=3)

pytestmark = pytest.mark.skipif(not products.HAS_ONEDNN, reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def all_sizes() -> Iterator[None]:
    products.use_onednn(True)
    yield
    products.use_onednn(None)


def drawn(layer: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    return layer


def assert_rounded(found: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | float = 0.0) -> None:
    """Each weight and each activation errs by half a step of its scale at most."""
    hidden, weight, bias = hidden.double(), weight.double(), torch.as_tensor(bias).double()
    of_weight = weight.abs().amax(-1, keepdim=True).expand_as(weight) / 127 / 2
    of_hidden = hidden.abs().amax(-1, keepdim=True).expand_as(hidden) / hidden_steps() / 2
    bound = hidden.abs() @ of_weight.mT + of_hidden @ weight.abs().mT + of_hidden @ of_weight.mT
    exact = F.linear(hidden, weight) + bias
    assert found.shape == exact.shape
    assert ((found - exact).abs() <= bound * 1.0001 + exact.abs() * 2.0**-20).all()


@settings(deadline=None)
@given(FEW, SIZES, SIZES, st.booleans(), st.integers(0, 2**32))
def test_products_are_those_of_float64(batch: list[int], width: int, outputs: int, has_bias: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(*batch, width, generator=generator), torch.randn(outputs, width, generator=generator)
    bias = torch.randn(outputs, generator=generator) if has_bias else None
    with torch.inference_mode():
        found = products.packed_product(hidden, products.packed(weight), bias)
        rounded = RoundedMatrix(weight)(hidden, bias)
    assert_near(found, hidden, weight, 0.0 if bias is None else bias)
    assert_rounded(rounded, hidden, weight, 0.0 if bias is None else bias)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bf16")
def test_bf16_adds_up_in_fp32() -> None:
    hidden, weight = torch.randn(3, 2, 512).bfloat16(), torch.randn(40, 512).bfloat16()
    assert products.is_worth_packing(weight)
    found, exact = products.packed_product(hidden, products.packed(weight)), hidden.double() @ weight.double().mT
    assert found.dtype == torch.bfloat16
    assert ((found - exact).abs() <= 2.0**-8 * exact.abs() + 1e-3).all()


def whole(*shape: int, largest: int) -> Tensor:
    """Whole numbers that int8 holds as they are, as every row has the largest."""
    numbers = torch.randint(-largest, largest + 1, shape).float()
    numbers[..., 0] = largest
    return numbers


def test_int8_holds_whole_numbers() -> None:
    hidden, weight = whole(5, 3, 700, largest=hidden_steps()), whole(90, 700, largest=127)
    rows, outputs = torch.rand(5, 3, 1) + 0.5, torch.rand(90, 1) + 0.5
    exact = (hidden.double() @ weight.double().mT) * rows.double() * outputs.double().mT
    found = RoundedMatrix(outputs * weight)(rows * hidden, None)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))


def test_rows_of_int8_do_not_depend_on_each_other() -> None:
    matrix = RoundedMatrix(torch.randn(64, 96))
    hidden = torch.randn(4, 96) * torch.tensor([[1e-6], [1.0], [1e6], [0.0]])
    alone = torch.cat([matrix(row, None) for row in hidden.split(1)])
    assert torch.equal(matrix(hidden, None), alone)
    assert not alone[3].any()
    assert matrix(torch.full((1, 96), float("nan")), None).isnan().all()
    assert matrix(hidden.bfloat16(), None).dtype == torch.bfloat16


def test_outputs_without_weights_are_zero_in_int8() -> None:
    """Those of a padded vocabulary."""
    weight = torch.randn(8, 16)
    weight[5:] = 0
    scores = RoundedMatrix(weight)(torch.randn(3, 16), None)
    assert scores[:, :5].all()
    assert not scores[:, 5:].any()


def test_largest_numbers_do_not_overflow_on_older_processors() -> None:
    """Which oneDNN can be told to take this one for."""
    program = """
import torch
from harness.model.packing import PackedMatrix, RoundedMatrix, hidden_steps
for sign in (1, -1):
    error = RoundedMatrix(torch.ones(64, 256))(sign * torch.ones(8, 256), None) - sign * 256
    assert error.abs().max() < 1e-3, (hidden_steps(), error)
print(hidden_steps())
"""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() in ("63", "127"), ran.stderr
    assert hidden_steps() >= int(ran.stdout)


def test_sums_that_overflow_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_whole_product", lambda *_: torch.full((64, 64), 64.0 * 2**15))
    assert hidden_steps.__wrapped__() == 63


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("tp", [ONE, HALF], ids=["one", "half"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_layers_compute_what_they_did(
    quantization: str, tp: TensorParallel, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "reduce_from_tensor_parallel", lambda part, group: part)
    check = assert_near if quantization == "none" else assert_rounded
    stage = nn.ModuleDict({
        "column": layers.ColumnParallelLinear(32, (48, 16), has_bias, tp),
        "row": layers.RowParallelLinear(64, 24, has_bias, tp),
        "head": layers.OutputHead(70, 32, tp),
        "dense": layers.HeadDense(32, "relu", tp),
    })  # fmt: skip
    drawn(stage)
    weights = {name: copy.deepcopy(layer.weight.data) for name, layer in stage.items()}
    biases = {name: getattr(layer, "bias", None) for name, layer in stage.items()}
    biases = {name: 0.0 if bias is None else bias.data for name, bias in biases.items()}
    pack_matrices(stage, quantization)
    assert all(layer.weight is None for layer in stage.values())
    with torch.inference_mode():
        for name, layer in stage.items():
            hidden = torch.randn(2, 3, weights[name].shape[1])
            found = layer(hidden)
            if name == "column":
                assert [part.shape[-1] for part in found] == layer.local_parts
                found = torch.cat(found, dim=-1)
            if name == "dense":
                assert (found >= 0).all()
                exact = (F.linear(hidden.double(), weights[name].double()) + biases[name].double()).relu()
                torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5 if quantization == "none" else 0.5)
                continue
            check(found, hidden, weights[name], biases[name])
    assert products.library() == ("onednn" if quantization == "none" else "torch")


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize(("has_tied_head", "embeds"), [(True, True), (True, False), (False, True)])
def test_an_embedding_keeps_the_rows_that_are_looked_up(quantization: str, has_tied_head: bool, embeds: bool) -> None:
    embedding = drawn(layers.VocabParallelEmbedding(70, 32, ONE))
    weight, tokens, hidden = embedding.weight.data.clone(), torch.tensor([[3, 69]]), torch.randn(2, 3, 32)
    memory = weakref.ref(embedding.weight)
    pack_matrices(embedding, quantization, has_tied_head=has_tied_head, embeds=embeds)
    assert (embedding.packed is not None) == has_tied_head
    gc.collect()
    assert (memory() is None) == (not embeds)
    if embeds:
        assert torch.equal(embedding(tokens), weight[tokens])
    with torch.no_grad():
        scores = layers.vocab_parallel_logits(embedding, hidden)
    (assert_rounded if quantization == "int8" and has_tied_head else assert_near)(scores, hidden, weight)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_model_scores_as_in_float64(quantization: str) -> None:
    model = tiny_model()
    stage = build_layers(model, ONE)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            parameter.normal_(1.0 if is_norm else 0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    tokens = torch.randint(model.vocab_size, (3, 11))
    with torch.no_grad():
        exact = copy.deepcopy(stage).double()(tokens)
    pack_matrices(stage, quantization, has_tied_head=model.tie_word_embeddings)
    with torch.inference_mode():
        scores = stage(tokens)
    error = float((scores - exact).norm() / exact.norm())
    assert error < (1e-5 if quantization == "none" else 0.03)
    assert quantization == "none" or error > 1e-4
    if quantization == "none":
        assert torch.equal(scores.argmax(-1), exact.argmax(-1))


def test_what_would_not_gain_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = torch.randn(256, 256), torch.randn(255, 256)
    wanted: dict[bool | None, list[bool]] = {}
    for choice in (False, None, True):
        products.use_onednn(choice)
        wanted[choice] = [products.is_worth_packing(weight) for weight in (large, small, large.double())]
    assert wanted == {False: [False] * 3, None: [True, False, False], True: [True, True, False]}
    assert not products.is_worth_packing(large.to("meta"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not products.is_worth_packing(large)
    layer = drawn(layers.RowParallelLinear(8, 8, True, ONE))
    pack_matrices(layer, "none")
    assert layer.packed is None
    assert layer.weight is not None


def test_int8_is_refused_where_torch_can_not() -> None:
    layer = layers.RowParallelLinear(8, 8, True, ONE).to("meta")
    with pytest.raises(ConfigError, match=r"generate\.quantization=int8 is for CPUs, not for meta; use none"):
        pack_matrices(layer, "int8")


def test_int8_is_refused_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "HAS_ONEDNN", False)
    with pytest.raises(ConfigError, match=r"generate\.quantization=int8 needs oneDNN"):
        pack_matrices(layers.RowParallelLinear(8, 8, True, ONE), "int8")


def test_a_single_row_goes_by_the_plain_weight_where_that_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("harness.model.packing.packed_product", lambda hidden, *_: calls.append(len(hidden)))
    small, large = PackedMatrix(torch.randn(64, 64)), PackedMatrix(torch.randn(1024, 512))
    row = torch.randn(1, 1, 64)
    assert torch.equal(small(row, None), F.linear(row, small._plain))
    assert calls == []
    small(torch.randn(2, 64), None)
    large(torch.randn(1, 512), None)
    assert calls == [2, 1]
