"""Matrix products by either library are those of float64 within the bound of fp32, and only where one chose it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers import make_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.errors import ConfigError
from harness.model import products
from harness.model.weight_gradients import WeightGradients, add_gradients, linear
from harness.run.tasks import verify

SIZES, FEW = st.integers(1, 40), st.integers(1, 8)


@pytest.fixture(autouse=True)
def as_by_default() -> Iterator[None]:
    yield
    products.use_onednn(None)


def assert_near(found: Tensor, left: Tensor, right: Tensor, bias: Tensor | float = 0.0) -> None:
    """A sum of n products in fp32, in whatever order, errs by n units of rounding of the sum of their sizes at most."""
    left, right, bias = left.double(), right.double(), torch.as_tensor(bias).double()
    bound = (left.shape[-1] + 2) * 2.0**-24 * (left.abs() @ right.abs().mT + bias.abs())
    assert found.shape == bound.shape
    assert ((found - (left @ right.mT + bias)).abs() <= bound).all()


@pytest.mark.skipif(not products.HAS_ONEDNN, reason="this torch has no oneDNN")
@settings(deadline=None)
@given(st.lists(FEW, min_size=1, max_size=3), SIZES, SIZES, st.booleans(), st.booleans(), st.integers(0, 2**32))
def test_gradients_are_those_of_float64(
    batch: list[int], width: int, outputs: int, has_bias: bool, is_put_off: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, outgoing = (
        torch.randn(shape, generator=generator)
        for shape in ((*batch, width), (outputs, width), (*reversed(batch), outputs))
    )
    outgoing = outgoing.permute(*reversed(range(len(batch))), -1)  # not contiguous
    bias = torch.randn(2 * outputs, generator=generator)[::2] if has_bias else None
    leaves = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    later = WeightGradients() if is_put_off else None
    products.use_onednn(True)
    output = linear(hidden, weight, bias, later)
    output.mul_(1.0)  # what is fresh may be overwritten, as a sum over ranks does
    torch.autograd.backward(output, outgoing)
    if later is not None:
        add_gradients(later.take())
    assert products.library() == "onednn"
    with torch.no_grad():
        assert_near(output, hidden, weight, 0.0 if bias is None else bias)
        assert hidden.grad is not None
        assert weight.grad is not None
        assert_near(hidden.grad, outgoing, weight.mT)
        rows = outgoing.reshape(-1, outputs)
        assert_near(weight.grad, rows.mT, hidden.reshape(-1, width).mT)
        if bias is not None:
            assert bias.grad is not None
            assert_near(bias.grad[:, None], rows.mT, torch.ones(1, len(rows)))


@pytest.mark.parametrize("is_faster", [False, True])
def test_the_library_is_the_one_that_was_chosen(is_faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "IS_ONEDNN_FASTER", is_faster)
    small, large = torch.ones(8, 64), torch.ones(1024, 64)
    pairs = {
        "small": (small, small), "large": (large, large[:64]), "empty": (large[:0], large),
        "double": 2 * (large.double(),), "bf16": 2 * (large.bfloat16(),), "elsewhere": 2 * (large.to("meta"),),
    }  # fmt: skip
    chosen = {
        wanted: [name for name, pair in pairs.items() if through(wanted, *pair)] for wanted in (False, None, True)
    }
    assert chosen == {
        False: [], None: ["large"] if is_faster else [], True: ["small", "large"] if products.HAS_ONEDNN else []
    }  # fmt: skip


def through(wanted: bool | None, left: Tensor, right: Tensor) -> bool:
    products.use_onednn(wanted)
    assert products.library() == "torch"
    result = products.product(left, right)
    if not result.is_meta:
        torch.testing.assert_close(result, F.linear(left, right))
    assert products.library() == ("onednn" if products.goes_through_onednn(left, right) else "torch")
    return products.goes_through_onednn(left, right)


@pytest.mark.skipif(not products.HAS_ONEDNN, reason="this torch has no oneDNN")
def test_what_autograd_can_not_know_is_refused() -> None:
    products.use_onednn(True)
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    output = linear(hidden, weight, None, None)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    output = linear(hidden, weight, None, None)
    (gradient,) = torch.autograd.grad(output.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("is_faster", "device", "overrides", "changes"),
    [
        (True, "cpu", [], {"onednn": True}),
        (False, "cpu", [], {}),
        (True, "cuda", [], {"dropout": 0.0}),
        (True, "cpu", ["model.onednn=false"], {}),
        (True, "cpu", ["train.precision=bf16"], {}),
        (True, "cpu", ["parallel.engine=dtensor"], {}),
        (True, "cpu", ["parallel.engine=torch"], {"onednn": True}),
    ],
)
def test_a_twin_computes_as_the_real_model(
    is_faster: bool, device: str, overrides: list[str], changes: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose products are large."""
    monkeypatch.setattr(verify, "IS_ONEDNN_FASTER", is_faster)
    assert verify.changes_on(device, make_config(*overrides)) == changes


@pytest.mark.parametrize("overrides", [["train.precision=bf16"], ["model=emulated"]])
def test_what_onednn_can_do_nothing_for_is_refused(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"model\.onednn=true is for fp32 products, not for train\.precision"):
        make_config("model.onednn=true", *overrides)
