"""Small models with random parameters, and the rank program of test_tensor_parallel.py."""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import make_config
from torch import Tensor, nn

from harness.model import collectives
from harness.model.assembly import build_layers
from harness.model.block import TransformerBlock
from harness.model.context import PassContext
from harness.model.groups import TensorParallel, build_tensor_parallel
from harness.model.layers import (
    ColumnParallelLinear,
    OutputHead,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from harness.model.loss import PipelineLoss, vocab_parallel_cross_entropy
from harness.model.weights import load_full, shard
from harness.plan.memory import block_activation_bytes_per_token
from harness.run.shared_memory import BACKEND, register_backend
from harness.spec.config import Model
from harness.spec.parameters import ParameterSpec, parameter_table
from harness.spec.topology import Topology


def tiny_model(family: str = "gpt2", **changes: object) -> Model:
    """Two layers of 8 heads; 53 tokens are no multiple of any tensor-parallel size."""
    shape = {
        "name": "tiny", "family": family, "num_hidden_layers": 2, "hidden_size": 32, "head_dim": 4,
        "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 48, "vocab_size": 53,
        "max_position_embeddings": 16, "tie_word_embeddings": True, "norm_epsilon": 1e-5,
        "rope_theta": 10000.0, "initializer_range": 0.02, "dropout": 0.0,
    }  # fmt: skip
    return Model.model_validate(shape | changes)


def random_state(model: Model, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every full parameter random, also those that start as zeros and ones and hide mistakes there."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, spec in parameter_table(model).items():
        values = torch.randn(spec.shape, generator=generator, dtype=dtype)
        scale = 0.15 if values.dim() > 1 else 0.3
        state[name] = (spec.init == "ones") + scale * values
    return state


def fill(module: nn.Module, model: Model, state: dict[str, Tensor], tp: TensorParallel, prefix: str = "") -> None:
    """Load full parameters into a module whose global names begin with `prefix`."""
    named = [(prefix + name, parameter) for name, parameter in module.named_parameters()]
    load_full(named, parameter_table(model), state.__getitem__, tp)


def random_tokens(model: Model, seed: int = 0, batch: int = 3, sequence: int = 11) -> tuple[Tensor, Tensor]:
    """Tokens and targets [batch, sequence]; some targets are ignored."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tokens = torch.randint(model.vocab_size, (2, batch, sequence), generator=generator)
    tokens[1, 0, :4] = -100
    tokens[1, 2, 5] = -100
    return tokens[0], tokens[1]


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Largest difference in standard deviations of the reference."""
    assert ours.shape == reference.shape, f"{ours.shape} is not {reference.shape}"
    difference = (ours.detach().double() - reference.detach().double()).abs().max()
    return float(difference / reference.detach().double().std())


def saved_bytes(module: nn.Module, hidden: Tensor) -> int:
    """What PyTorch keeps for the backward pass of a module, its own parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(hidden)
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert output.requires_grad
    return num_bytes


TOLERANCE = 1e-10
"""Allowed difference of float64 results, in standard deviations of the reference."""

# What ranks run: each check yields (what, value of this rank, value it should have).
Comparison = tuple[str, Tensor, Tensor]
Check = Callable[[TensorParallel], Iterator[Comparison]]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loosened(ours: Tensor, exact: Tensor, tolerance: float) -> Tensor:
    """Shrinks the difference, so that one of `tolerance` standard deviations just passes."""
    return exact + (ours - exact) * (TOLERANCE / tolerance)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def column_parallel(tp: TensorParallel) -> Iterator[Comparison]:
    parts = (16, 8, 8)
    layer = ColumnParallelLinear(12, parts, bias=True, tp=tp)
    weight, bias, x = leaf(normal(32, 12, seed=1)), leaf(normal(32, seed=2)), leaf(normal(2, 5, 12, seed=3))
    spec = ParameterSpec("w", (32, 12), "normal", 0, (("a", 16), ("b", 8), ("c", 8)))
    bias_spec = ParameterSpec("b", (32,), "zeros", 0, spec.parts)
    with torch.no_grad():
        layer.weight.copy_(shard(weight, spec, tp.rank, tp.size))
        layer.bias.copy_(shard(bias, bias_spec, tp.rank, tp.size))
    local_x = leaf(x.detach())
    outputs = layer(local_x)
    cotangents = normal(2, 5, 32, seed=4).split(parts, dim=-1)
    references = F.linear(x, weight, bias).split(parts, dim=-1)
    for name, output, reference in zip("abc", outputs, references, strict=True):
        yield f"part {name}", output, reference.chunk(tp.size, -1)[tp.rank]
    sum((o * c.chunk(tp.size, -1)[tp.rank]).sum() for o, c in zip(outputs, cotangents, strict=True)).backward()
    sum((r * c).sum() for r, c in zip(references, cotangents, strict=True)).backward()
    yield "gradient of the input", grad(local_x), grad(x)
    yield "gradient of the weight", grad(layer.weight), shard(grad(weight), spec, tp.rank, tp.size)
    yield "gradient of the bias", grad(layer.bias), shard(grad(bias), bias_spec, tp.rank, tp.size)


def row_parallel(tp: TensorParallel) -> Iterator[Comparison]:
    layer = RowParallelLinear(24, 10, bias=True, tp=tp)
    weight, bias, x = leaf(normal(10, 24, seed=1)), leaf(normal(10, seed=2)), leaf(normal(2, 5, 24, seed=3))
    with torch.no_grad():
        layer.weight.copy_(weight.chunk(tp.size, 1)[tp.rank])
        layer.bias.copy_(bias)
    local_x = leaf(x.detach().chunk(tp.size, -1)[tp.rank])
    output, reference, cotangent = layer(local_x), F.linear(x, weight, bias), normal(2, 5, 10, seed=4)
    yield "output", output, reference
    output.backward(cotangent)
    reference.backward(cotangent)
    yield "gradient of the input", grad(local_x), grad(x).chunk(tp.size, -1)[tp.rank]
    yield "gradient of the weight", grad(layer.weight), grad(weight).chunk(tp.size, 1)[tp.rank]
    yield "gradient of the bias", grad(layer.bias), grad(bias)


def vocabulary(tp: TensorParallel) -> Iterator[Comparison]:
    """Embedding and head of 53 tokens, padded to 54 or 56."""
    model = tiny_model()
    spec = parameter_table(model)["embedding.weight"]
    padded = model.padded_vocab_size(tp.size)
    tokens, _ = random_tokens(model)
    weight = leaf(normal(*spec.shape, seed=1))
    embedding = VocabParallelEmbedding(padded, model.hidden_size, tp)
    head = OutputHead(padded, model.hidden_size, tp)
    with torch.no_grad():
        embedding.weight.copy_(shard(weight, spec, tp.rank, tp.size))
        head.weight.copy_(embedding.weight)

    output, reference, cotangent = embedding(tokens), F.embedding(tokens, weight), normal(3, 11, 32, seed=2)
    yield "embedding", output, reference
    output.backward(cotangent)
    reference.backward(cotangent)
    yield "gradient of the embedding", grad(embedding.weight), shard(grad(weight), spec, tp.rank, tp.size)

    weight.grad = None
    hidden = leaf(normal(3, 11, 32, seed=3))
    local_hidden = leaf(hidden.detach())
    padded_weight = torch.cat((weight, weight.new_zeros(padded - model.vocab_size, model.hidden_size)))
    output, reference, cotangent = head(local_hidden), F.linear(hidden, padded_weight), normal(3, 11, padded, seed=4)
    cotangent[..., model.vocab_size :] = 0  # as the loss leaves it
    yield "logits", output, reference.chunk(tp.size, -1)[tp.rank]
    output.backward(cotangent.chunk(tp.size, -1)[tp.rank])
    reference.backward(cotangent)
    yield "gradient of hidden", grad(local_hidden), grad(hidden)
    yield "gradient of the head", grad(head.weight), shard(grad(weight), spec, tp.rank, tp.size)


def gather(tp: TensorParallel) -> Iterator[Comparison]:
    """Every rank weighs the whole differently, so a gradient that is only sliced is wrong."""
    whole = normal(2, 5, 3 * tp.size, seed=1)
    local = leaf(whole.chunk(tp.size, -1)[tp.rank])
    output = collectives.gather_last_dim(local, tp.group)
    yield "output", output, whole
    cotangents = [normal(2, 5, 3 * tp.size, seed=10 + rank) for rank in range(tp.size)]
    output.backward(cotangents[tp.rank])
    yield "gradient", grad(local), torch.stack(cotangents).sum(0).chunk(tp.size, -1)[tp.rank]


def cross_entropy(tp: TensorParallel) -> Iterator[Comparison]:
    """53 tokens; then 5, so that the last of four ranks holds padding alone; large logits; bf16.

    Losses and gradients in fp32 are off by less than 100 roundings of 2^-24 (53 columns and what test_loss.py counts
    besides) of values up to 3. The gradient of bf16 logits is rounded to 2^-9 of values up to 3.
    """
    for vocab_size, scale, dtype in (
        (53, 1.0, torch.float32), (5, 1.0, torch.float32), (53, 3e4, torch.float32), (53, 3.0, torch.bfloat16),
    ):  # fmt: skip
        model = tiny_model(vocab_size=vocab_size)
        _, targets = random_tokens(model)
        full = leaf((scale * normal(3, 11, vocab_size, seed=1)).to(dtype))
        padding = torch.full((3, 11, model.padded_vocab_size(tp.size) - vocab_size), 7.0 * scale, dtype=dtype)
        local = leaf(torch.cat((full.detach(), padding), -1).chunk(tp.size, -1)[tp.rank].contiguous())
        losses = vocab_parallel_cross_entropy(local, targets, vocab_size, tp)
        assert losses.dtype == torch.float32
        reference = F.cross_entropy(full.double().transpose(1, 2), targets, reduction="none")
        case = f"{vocab_size} tokens, logits x {scale:g}, {dtype}"
        yield f"losses of {case}", loosened(losses, reference, 2e-5), reference
        yield f"ignored losses of {case}", losses * (targets < 0) + normal(3, 11, seed=2), normal(3, 11, seed=2)
        weights = normal(3, 11, seed=3).float()
        losses.backward(weights)
        reference.backward(weights.double())
        expected = torch.cat((grad(full), torch.zeros_like(padding)), -1).chunk(tp.size, -1)[tp.rank]
        # A rank of padding alone has a gradient of zeros: no deviation to measure by, so add one.
        offset = normal(*expected.shape, seed=4)
        found = loosened(grad(local).double(), expected.double(), 2e-5 if dtype == torch.float32 else 0.01)
        yield f"gradient of {case}", found + offset, expected.double() + offset


MODELS = {
    "gpt2": tiny_model(),
    "gpt2 untied": tiny_model(tie_word_embeddings=False),
    "llama": tiny_model("llama", tie_word_embeddings=False),
    "llama tied, 4 key-value heads": tiny_model("llama", num_key_value_heads=4),
    "llama, 2 key-value heads": tiny_model("llama", num_key_value_heads=2, tie_word_embeddings=False),
    "llama, 1 key-value head": tiny_model("llama", num_key_value_heads=1, head_dim=8),
    "mistral": tiny_model("mistral", sliding_window=4),
    "qwen2, 1 key-value head": tiny_model("qwen2", num_key_value_heads=1),
    "qwen3, 2 key-value heads": tiny_model("qwen3", num_key_value_heads=2),
    "bert": tiny_model("bert", causal=False, type_vocab_size=2),
    "encoder": tiny_model("encoder", causal=False, tie_word_embeddings=False),
}


def kv_parallel(model: Model, tp: TensorParallel) -> TensorParallel:
    """Groups for the model's key-value heads."""
    topology = Topology(pp=1, dp=dist.get_world_size() // tp.size, tp=tp.size)
    groups = build_tensor_parallel(topology, dist.get_rank(), model.num_key_value_heads, tp.group)
    return replace(groups, sequence_parallel=tp.sequence_parallel)


def own_slice(tensor: Tensor, tp: TensorParallel) -> Tensor:
    """[batch, sequence, hidden] -> what this rank holds of it between layers."""
    return tensor if tp.slice_rank is None else tensor.chunk(tp.size, dim=1)[tp.slice_rank]


def whole_gradient(parameter: Tensor, spec: ParameterSpec, tp: TensorParallel) -> Tensor:
    """The gradient after what a step does with parameters that are whole on every rank."""
    gradient = grad(parameter)
    if (tp.sequence_parallel and spec.shard_dim is None) or spec.of_heads:
        assert tp.group is not None
        collectives.all_reduce(gradient, tp.group)
    return gradient


def block(name: str, tp: TensorParallel) -> Iterator[Comparison]:
    model = MODELS[name]
    tp = kv_parallel(model, tp)
    single, state = TensorParallel.single(), random_state(model)
    results = []
    for place in (tp, single):
        layer = TransformerBlock(model, place, activation_checkpointing=False)
        fill(layer, model, state, place, "blocks.0.")
        hidden = leaf(own_slice(normal(3, 12, model.hidden_size, seed=1), place))
        output = layer(hidden)
        output.backward(own_slice(normal(3, 12, model.hidden_size, seed=2), place))
        results.append((output, hidden, dict(layer.named_parameters())))
    (output, hidden, parameters), (expected, expected_hidden, expected_parameters) = results
    yield "output", output, own_slice(expected, tp)
    yield "gradient of the input", grad(hidden), own_slice(grad(expected_hidden), tp)
    table = parameter_table(model)
    for key, parameter in parameters.items():
        spec, full = table[f"blocks.0.{key}"], grad(expected_parameters[key])
        yield f"gradient of {key}", whole_gradient(parameter, spec, tp), shard(full, spec, tp.rank, tp.size)


DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3], [0] * 12, [0] * 5 + [1] * 7])
"""[batch, sequence], with padding behind the others."""


def whole_model(
    name: str, checkpointing: bool, tp: TensorParallel, has_documents: bool = False
) -> Iterator[Comparison]:
    model = MODELS[name]
    tp = kv_parallel(model, tp)
    single, state = TensorParallel.single(), random_state(model)
    tokens, targets = random_tokens(model, sequence=12 if tp.sequence_parallel else 11)
    weight = torch.tensor(1.0 / float((targets >= 0).sum()))
    results = []
    for place in (tp, single):
        context = PassContext()
        if has_documents:
            context.documents = lambda *_: DOCUMENTS[:, : tokens.shape[1]]
        layers = build_layers(model, place, checkpointing and place is tp, context)
        fill(layers, model, state, place)
        logits = layers(tokens)
        loss = PipelineLoss(model.vocab_size, place)(logits, (targets, weight))
        loss.backward()
        results.append((logits, loss, dict(layers.named_parameters())))
    (logits, loss, parameters), (expected, expected_loss, expected_parameters) = results
    padding = (0, model.padded_vocab_size(tp.size) - model.vocab_size)
    yield "logits", logits, F.pad(expected, padding).chunk(tp.size, -1)[tp.rank]
    yield "loss", torch.stack((loss, torch.ones(()))), torch.stack((expected_loss, torch.ones(())))
    table = parameter_table(model)
    assert set(parameters) == set(expected_parameters) == set(table)
    for key, parameter in parameters.items():
        spec, full = table[key], grad(expected_parameters[key])
        yield f"gradient of {key}", whole_gradient(parameter, spec, tp), shard(full, spec, tp.rank, tp.size)
    assert tp.group is not None
    for key, spec in table.items():
        if spec.shard_dim is None:  # equal bit by bit, or ranks drift apart
            for other in collectives.all_gather(grad(parameters[key]), tp.group).wait():
                assert torch.equal(other, grad(parameters[key])), f"{key} differs between ranks"


def bf16(name: str, tp: TensorParallel) -> Iterator[Comparison]:
    """Runs in bf16; the result is near the exact one."""
    model = MODELS[name]
    tp = kv_parallel(model, tp)
    state = random_state(model)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        layer = TransformerBlock(model, tp, activation_checkpointing=False)
        fill(layer, model, state, tp, "blocks.0.")
        hidden = leaf(own_slice(normal(3, 12, model.hidden_size, seed=1), tp).to(dtype))
        output = layer.to(dtype)(hidden)
        output.backward(own_slice(normal(3, 12, model.hidden_size, seed=2), tp).to(dtype))
        assert output.dtype == grad(hidden).dtype == dtype
        results.append((output, grad(hidden)))
    for what, ours, exact in zip(("output", "gradient"), *results, strict=True):
        yield what, loosened(ours.double(), exact, 0.2), exact


def dropout(tp: TensorParallel) -> Iterator[Comparison]:
    """Ranks draw the same masks where they share values; on average the loss is that of one rank."""
    model, number = tiny_model(dropout=0.2), 50
    tokens, targets = random_tokens(model, sequence=12)
    weight, results = 1.0 / (targets >= 0).sum(), []
    for place in (tp, TensorParallel.single()):
        context = PassContext(seed=1)
        layers = build_layers(model, place, context=context)
        fill(layers, model, random_state(model), place)
        loss = PipelineLoss(model.vocab_size, place)
        loss(layers(tokens), (targets, weight)).backward()
        if place.group is not None and not tp.sequence_parallel:
            for key, spec in parameter_table(model).items():
                if spec.shard_dim is None:
                    copies = collectives.all_gather(grad(layers.get_parameter(key)), place.group).wait()
                    assert all(torch.equal(copy, copies[0]) for copy in copies), f"{key} differs between ranks"
        losses = []
        with torch.no_grad():
            for step in range(number):
                context.forward_pass = (step, 0)
                losses.append(loss(layers(tokens), (targets, weight)).double())
        results.append(torch.stack(losses))
    ours, single = results
    # Means of two samples differ by less than 4 standard deviations of their difference.
    yield "mean loss", loosened(single - single.mean() + ours.mean(), single, 4 * (2 / number) ** 0.5), single


def traffic(tp: TensorParallel) -> Iterator[Comparison]:
    """Collectives of a block, forward and backward: all-reduces, gathers, reduce-scatters."""
    # With sequence parallelism backward gathers the inputs of both products again.
    usual = [0, 2, 2, 0, 4, 2] if tp.sequence_parallel else [2, 0, 0, 2, 0, 0]
    for name in ("gpt2", "llama, 1 key-value head"):
        model = MODELS[name]
        place = kv_parallel(model, tp)
        layer = TransformerBlock(model, place, activation_checkpointing=False)
        fill(layer, model, random_state(model), place, "blocks.0.")
        kinds = ("all_reduce", "all_gather", "reduce_scatter")
        with ExitStack() as stack:
            calls = [
                stack.enter_context(mock.patch.object(collectives, kind, wraps=getattr(collectives, kind)))
                for kind in kinds
            ]
            output = layer(leaf(own_slice(normal(3, 12, model.hidden_size, seed=1), place)))
            forward = [call.call_count for call in calls]
            output.sum().backward()
        found = torch.tensor([*forward, *(c.call_count - f for c, f in zip(calls, forward, strict=True))]).float()
        expected = torch.tensor(usual).float()
        if name != "gpt2":  # sharing a key-value head: a gather, and backward a reduce-scatter
            expected += torch.tensor([0, 1, 0, 0, 0, 1])
        yield name, found, expected


def memory(tp: TensorParallel) -> Iterator[Comparison]:
    """A block saves for backward what `harness.plan.memory` counts."""
    model = MODELS["gpt2"]
    layer = TransformerBlock(model, tp, activation_checkpointing=False).float()
    found = saved_bytes(layer, leaf(own_slice(normal(2, 12, model.hidden_size, seed=1).float(), tp)))
    parallel = make_config(f"parallel.tp={tp.size}", f"parallel.sequence_parallel={tp.sequence_parallel}").parallel
    counted = 2 * 12 * block_activation_bytes_per_token(model, parallel, "fp32")
    yield "bytes", torch.tensor([found, 0.0]), torch.tensor([counted, 0.0])


def _bind(check: Callable[..., Iterator[Comparison]], *args: object) -> Check:
    return lambda tp: check(*args, tp)


DOCUMENTED = ("gpt2", "mistral", "qwen3, 2 key-value heads", "bert", "encoder")


def with_documents(name: str) -> Check:
    """The model, on rows of several documents; checkpointed, its masks are asked for again."""
    return lambda tp: whole_model(name, name == "mistral", tp, has_documents=True)


def sliced(check: Callable[..., Iterator[Comparison]], *args: object) -> Check:
    """The check with sequence parallelism."""
    return lambda tp: check(*args, replace(tp, sequence_parallel=True))


CHECKS: dict[str, Check] = {
    "column parallel": column_parallel,
    "row parallel": row_parallel,
    "vocabulary": vocabulary,
    "gather": gather,
    "cross entropy": cross_entropy,
    "traffic": traffic,
    "memory": memory,
    "sequence parallel, memory": sliced(memory),
    **{f"block of {name}": _bind(block, name) for name in MODELS},
    **{f"model {name}": _bind(whole_model, name, False) for name in MODELS},
    "model gpt2, checkpointed": _bind(whole_model, "gpt2", True),
    "model llama, 1 key-value head, checkpointed": _bind(whole_model, "llama, 1 key-value head", True),
    **{f"documents, model {name}": with_documents(name) for name in DOCUMENTED},
    **{f"sequence parallel, documents, model {name}": sliced(with_documents(name)) for name in DOCUMENTED},
    "dropout": dropout,
    "sequence parallel, dropout": sliced(dropout),
    "sequence parallel, traffic": sliced(traffic),
    **{f"sequence parallel, block of {name}": sliced(block, name) for name in MODELS},
    **{f"sequence parallel, model {name}": sliced(whole_model, name, name != "gpt2") for name in MODELS},
    "sequence parallel, bf16": sliced(bf16, "gpt2"),
    "bf16 gpt2": _bind(bf16, "gpt2"),
    "bf16 llama, 1 key-value head": _bind(bf16, "llama, 1 key-value head"),
}


def run(tp_sizes: list[int], folder: Path) -> None:
    """One rank: every check in every size; writes {(check, tp): {what: error} or traceback} to `folder`."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # rounding hides no mistake, whatever kernels a processor has
    register_backend()
    dist.init_process_group(BACKEND, timeout=datetime.timedelta(minutes=5))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results: dict[tuple[str, int], dict[str, float] | str] = {}
    try:
        for tp_size in tp_sizes:
            topology = Topology(pp=1, dp=world_size // tp_size, tp=tp_size)
            tp = build_tensor_parallel(topology, rank, num_key_value_heads=tp_size)
            for name, check in CHECKS.items():
                try:
                    results[name, tp_size] = {what: relative_error(a, b) for what, a, b in check(tp)}
                except Exception:  # the other ranks now wait in vain: what follows means nothing
                    results[name, tp_size] = traceback.format_exc()
                    return
    finally:
        torch.save(results, folder / f"rank{rank}.pt")
