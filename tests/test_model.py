"""The model on one rank, in float64, against transformers; and what its layers promise."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_model import fill, random_state, random_tokens, relative_error, tiny_model
from references import MODELS, build_reference, encoder_state, use_exact_norms
from states import to_transformers
from torch import Tensor

from harness.model import block as block_module
from harness.model.assembly import SingleStage, build_layers, describe_layers, layer_names
from harness.model.block import RotaryPositions, TransformerBlock
from harness.model.context import PassContext
from harness.model.groups import TensorParallel
from harness.model.loss import PipelineLoss
from harness.model.weights import initialize, shard
from harness.spec import counts
from harness.spec.config import Model
from harness.spec.parameters import parameter_table

SINGLE = TensorParallel.single()


def build_filled(model: Model, state: dict[str, Tensor], **options: bool) -> SingleStage:
    layers = build_layers(model, SINGLE, **options)
    fill(layers, model, state, SINGLE)
    return layers


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Any:
    use_exact_norms(monkeypatch)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_dropout_is_where_transformers_has_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a factor that depends on the rate in place of every draw."""
    model, attend = MODELS[name].model_copy(update={"dropout": 0.25}), F.scaled_dot_product_attention

    def scale(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * (1 - 2 * p) if training else x

    def attend_scaled(*tensors: Tensor, dropout_p: float = 0.0, **options: Any) -> Tensor:
        return scale(attend(*tensors, **options), dropout_p)

    monkeypatch.setattr(F, "dropout", scale)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend_scaled)
    reference = build_reference(model).train()
    for module in reference.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.25
        if hasattr(module, "attn_dropout"):
            module.attn_dropout.p = 0.25
    state, (tokens, _) = random_state(model, dtype=torch.float64), random_tokens(model)
    reference.load_state_dict(to_transformers(state, model), strict=False)
    expected = reference(tokens).logits
    assert relative_error(build_filled(model, state)(tokens), expected) < 1e-10
    assert relative_error(reference.eval()(tokens).logits, expected) > 1e-3


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", MODELS)
def test_equals_transformers(name: str) -> None:
    model = MODELS[name]
    state = random_state(model, dtype=torch.float64)
    tokens, targets = random_tokens(model)

    translate = encoder_state if model.family == "encoder" else partial(to_transformers, model=model)
    reference = build_reference(model)
    missing, unexpected = reference.load_state_dict(translate(state), strict=False)
    assert not unexpected
    copies = {"lm_head.weight", "head.weight", "cls.predictions.decoder.weight"} if model.tie_word_embeddings else set()
    assert set(missing) <= copies | {"cls.predictions.decoder.bias"}
    expected = reference(tokens).logits
    expected_loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    expected_loss.backward()
    expected_gradients = {key: parameter.grad for key, parameter in reference.named_parameters()}

    layers = build_filled(model, state)
    logits = layers(tokens)
    weight = 1.0 / (targets >= 0).sum()
    loss = PipelineLoss(model.vocab_size, SINGLE)(logits, (targets, weight))
    loss.backward()
    gradients = translate({key: parameter.grad for key, parameter in layers.named_parameters()})

    assert relative_error(logits, expected) < 1e-10
    assert abs(loss - expected_loss) < 1e-10
    assert gradients.keys() == expected_gradients.keys()
    for key in [key for key in gradients if key.endswith("self.key.bias")]:  # zero in theory: softmax takes no notice
        assert max(gradients.pop(key).abs().max(), expected_gradients.pop(key).abs().max()) < 1e-13
    errors = {key: relative_error(gradients[key], expected_gradients[key]) for key in gradients}
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_table(name: str) -> None:
    model = MODELS[name]
    for tp_size in (1, 2, 4):
        tp = TensorParallel(group=None, rank=tp_size - 1, size=tp_size, kv_group=None, kv_size=1)
        local = {key: parameter.shape for key, parameter in build_layers(model, tp).named_parameters()}
        table = parameter_table(model)
        full = {key: torch.empty(spec.shape) for key, spec in table.items()}
        assert local == {key: shard(full[key], spec, tp.rank, tp_size).shape for key, spec in table.items()}
    assert sum(tensor.numel() for tensor in full.values()) == counts.parameters(model)


def test_layer_names() -> None:
    assert layer_names(tiny_model()) == [
        "embedding", "position_embedding", "blocks.0", "blocks.1", "final_norm", "head",
    ]  # fmt: skip
    assert layer_names(tiny_model("llama")) == ["embedding", "blocks.0", "blocks.1", "final_norm", "head"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tied_layers_share_a_module_with_one_parameter(family: str) -> None:
    layers = describe_layers(tiny_model(family), SINGLE)
    tied = [layer for layer in layers if layer.tied_key is not None]
    assert [layer.name for layer in tied] == ["embedding", "head"]
    assert {layer.tied_key for layer in tied} == {"embedding"}
    assert tied[0].module_class is tied[1].module_class
    assert tied[0].args == tied[1].args
    assert [name for name, _ in tied[0].build().named_parameters()] == ["weight"]
    untied = describe_layers(tiny_model(family, tie_word_embeddings=False), SINGLE)
    assert all(layer.tied_key is None and layer.forward is None for layer in untied)


@pytest.mark.parametrize("name", ["gpt2", "llama grouped"])
def test_activation_checkpointing_changes_no_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]
    state, (tokens, _) = random_state(model), random_tokens(model)
    calls: list[int] = []
    body = TransformerBlock.compute
    monkeypatch.setattr(TransformerBlock, "compute", lambda self, hidden: (calls.append(1), body(self, hidden))[1])
    gradients = []
    for checkpointing in (False, True):
        layers = build_filled(model, state, activation_checkpointing=checkpointing)
        layers(tokens).square().sum().backward()
        gradients.append({key: parameter.grad for key, parameter in layers.named_parameters()})
    assert len(calls) == 2 + 4  # two blocks; then two blocks forward and again backward
    with torch.no_grad():
        layers(tokens)
    assert len(calls) == 2 + 4 + 2
    for key, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][key]), key


def test_later_tokens_change_nothing() -> None:
    for model in (MODELS["gpt2"], MODELS["llama grouped"]):
        layers, (tokens, _) = build_filled(model, random_state(model)), random_tokens(model)
        changed = tokens.clone()
        changed[:, 6:] = (changed[:, 6:] + 1) % model.vocab_size
        before, after = layers(tokens), layers(changed)
        assert relative_error(after[:, :6], before[:, :6]) < 1e-5
        assert relative_error(after[:, 6:], before[:, 6:]) > 0.1


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_fresh_model_predicts_nothing_yet(name: str) -> None:
    model = MODELS[name]
    layers = build_layers(model, SINGLE)
    initialize(layers.named_parameters(), model, SINGLE, seed=3)
    tokens, targets = random_tokens(model)
    weight = 1.0 / (targets >= 0).sum()
    loss = PipelineLoss(model.vocab_size, SINGLE)(layers(tokens), (targets, weight))
    assert loss.item() == pytest.approx(math.log(model.vocab_size), abs=0.05)


def test_bf16_is_near_fp32() -> None:
    model = MODELS["llama grouped"]
    layers, (tokens, _) = build_filled(model, random_state(model)), random_tokens(model)
    exact = layers(tokens)
    rounded = layers.bfloat16()(tokens)
    assert rounded.dtype == torch.bfloat16
    assert relative_error(rounded, exact) < 0.1


def test_rotary_angles_survive_casts_and_inference() -> None:
    rotary, heads = RotaryPositions(tiny_model("llama", head_dim=8), PassContext()), torch.randn(1, 2, 12, 8)
    with torch.inference_mode():
        rotary(heads[:, :, :5])
    trained = heads.clone().requires_grad_()
    rotary(trained).sum().backward()  # the table of inference mode could not be saved for this
    exact = rotary(heads)
    rotary.bfloat16()
    assert torch.equal(rotary(heads), exact)
    assert torch.equal(rotary(heads[:, :, :5]), exact[:, :, :5])
    assert torch.allclose(exact.norm(dim=-1), heads.norm(dim=-1), atol=1e-5)
    assert torch.equal(exact[:, :, 0], heads[:, :, 0])


@pytest.mark.parametrize("name", ["gpt2", "llama grouped"])
def test_attention_takes_the_flash_path(name: str) -> None:
    model = MODELS[name]
    block = TransformerBlock(model, SINGLE, activation_checkpointing=False)
    fill(block, model, random_state(model), SINGLE, "blocks.0.")
    attention = block.attention
    nodes, seen = [attention(torch.randn(2, 7, model.hidden_size, requires_grad=True)).grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [function for function, _ in node.next_functions]
    assert any("FlashAttention" in type(node).__name__ for node in seen)


@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_keys_that_are_repeated_attend_as_those_that_are_shared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs under a mask, and with the same gradients."""
    model, (tokens, _) = MODELS[name].model_copy(update={"sliding_window": 4}), random_tokens(MODELS[name])
    found = []
    for shares in (True, False):
        monkeypatch.setattr(block_module, "shares_heads", lambda *_, shares=shares: shares)
        layers = build_filled(model, random_state(model, dtype=torch.float64)).double()
        layers(tokens).square().sum().backward()
        found.append({key: parameter.grad for key, parameter in layers.named_parameters()})
    for key, gradient in found[0].items():
        assert relative_error(found[1][key], gradient) < 1e-12, key
