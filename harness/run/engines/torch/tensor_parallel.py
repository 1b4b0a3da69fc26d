"""Tensor parallelism as torch has it: a model of plain modules that DTensor splits, to compare with.

The model is of the same shape as the harness's and written as users of `parallelize_module` would who want it fast.
As it stands it reduces no more often than the harness does: per micro-batch four times in each block, once for the
embedding, once before the head, and three numbers per token in the loss.

- What the harness fuses (query, key and value; gate and up) is one `nn.Linear` here, too. DTensor gives each rank a
  run of its rows, so they lie in the order of ranks: a rank's is its query, key and value, one below the other. On two
  cores (8 layers of width 512, tp=2) a step with three projections instead took 1.10 times as long, as each of them
  reduces the gradient of its input, and 1.02 times with a `PrepareModuleInput` that shares the input between them.
- Only matrices and their biases are DTensors, whose dispatch costs some hundred microseconds an operation. Activations
  are plain tensors between the projections, as are the parameters that every rank holds whole.
- The loss stays split over the vocabulary (`loss_parallel`).
- The optimizer works on the plain tensors inside of the DTensors, all of them in one fused operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

from harness.model.block import RotaryPositions, norm_class
from harness.model.context import PassContext
from harness.model.groups import TensorParallel
from harness.model.layers import ACTIVATIONS
from harness.model.loss import IGNORE_INDEX
from harness.record.heartbeat import Phase
from harness.run.data import MicroBatch
from harness.run.engines.torch.engine import TorchEngine, build_as, gradients_of, norm_over_ranks
from harness.spec.architecture import DOWN, OUTPUT, QKV, UP
from harness.spec.config import Model, RunConfig
from harness.spec.parameters import mlp_parts, qkv_parts

PLAN = {
    "embedding": RowwiseParallel(input_layouts=Replicate()),
    "blocks.*.attention.qkv": ColwiseParallel(),
    "blocks.*.attention.output": RowwiseParallel(),
    "blocks.*.mlp.up": ColwiseParallel(),
    "blocks.*.mlp.down": RowwiseParallel(),
    "head": ColwiseParallel(use_local_output=False),
}
"""How modules are split, by name."""


def build(config: RunConfig, rank: int, weights: Callable[[str], Tensor] | None, phase: Phase) -> TensorParallelEngine:
    """As `harness.run.engines.engine.build_engine`."""
    return build_as(TensorParallelEngine, config, rank, weights, phase)


class Attention(nn.Module):
    """Self-attention, of this rank's heads."""

    def __init__(self, model: Model, tp: int) -> None:
        super().__init__()
        architecture, sizes = model.architecture, [size for _, size in qkv_parts(model)]
        self.head_dim, self.causal = model.head_dim, model.causal
        self.grouped = model.num_key_value_heads < model.num_attention_heads
        self.local_sizes = [size // tp for size in sizes]
        self.rotary = RotaryPositions(model, PassContext()) if architecture.positions == "rotary" else None
        self.qkv = nn.Linear(model.hidden_size, sum(sizes), QKV in architecture.biases)
        self.output = nn.Linear(sizes[0], model.hidden_size, OUTPUT in architecture.biases)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, sequence, hidden] -> the same."""
        query, key, value = (
            torch.unflatten(features, -1, (-1, self.head_dim)).transpose(1, 2)
            for features in self.qkv(hidden).split(self.local_sizes, dim=-1)
        )
        if self.rotary is not None:
            query, key = self.rotary(query), self.rotary(key)
        context = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal, enable_gqa=self.grouped)
        output: Tensor = self.output(context.transpose(1, 2).flatten(-2))
        return output


class FeedForward(nn.Module):
    """Feed-forward layer, of this rank's share of its width."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        architecture, sizes = model.architecture, [size for _, size in mlp_parts(model)]
        self.gated, self.activation = architecture.gated, ACTIVATIONS[architecture.activation]
        self.up = nn.Linear(model.hidden_size, sum(sizes), UP in architecture.biases)
        self.down = nn.Linear(model.intermediate_size, model.hidden_size, DOWN in architecture.biases)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, sequence, hidden] -> the same."""
        if self.gated:
            gate, up = self.up(hidden).chunk(2, dim=-1)
            activated = self.activation(gate) * up
        else:
            activated = self.activation(self.up(hidden))
        output: Tensor = self.down(activated)
        return output


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to its input."""

    def __init__(self, model: Model, tp: int) -> None:
        super().__init__()
        build_norm = norm_class(model)
        self.attention_norm = build_norm(model.hidden_size, model.norm_epsilon)
        self.attention = Attention(model, tp)
        self.mlp_norm = build_norm(model.hidden_size, model.norm_epsilon)
        self.mlp = FeedForward(model)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, sequence, hidden] -> the same."""
        hidden = hidden + self.attention(self.attention_norm(hidden))
        output: Tensor = hidden + self.mlp(self.mlp_norm(hidden))
        return output


class Transformer(nn.Module):
    """The whole model; its parameters have the harness's names."""

    def __init__(self, model: Model, tp: int, activation_checkpointing: bool) -> None:
        super().__init__()
        self._checkpoints = activation_checkpointing
        vocab_size = model.padded_vocab_size(tp)
        self.embedding = nn.Embedding(vocab_size, model.hidden_size)
        learned = model.architecture.positions == "learned"
        self.position_embedding = nn.Embedding(model.max_position_embeddings, model.hidden_size) if learned else None
        self.blocks = nn.ModuleList(Block(model, tp) for _ in range(model.num_hidden_layers))
        self.final_norm = norm_class(model)(model.hidden_size, model.norm_epsilon)
        self.head = nn.Linear(model.hidden_size, vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, sequence] integers -> logits [batch, sequence, padded_vocab], split."""
        hidden = self.embedding(tokens)
        if self.position_embedding is not None:
            hidden = hidden + self.position_embedding.weight[: tokens.shape[-1]]
        for block in self.blocks:
            if self._checkpoints and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = block(hidden)
        logits: Tensor = self.head(self.final_norm(hidden))
        return logits


class TensorParallelEngine(TorchEngine):
    """An `Engine` of ranks that share every layer."""

    is_parallel = True

    def __init__(self, config: RunConfig, *arguments: Any, **named: Any) -> None:
        super().__init__(config, *arguments, **named)
        self.topology = config.parallel.topology

    def _build_model(self) -> nn.Module:
        config, tp = self.config, self.config.parallel.tp
        self.tp = TensorParallel(None, self.rank, tp, None, 1)
        assert self.group is not None
        # DTensor's caches take meshes that look alike for the same one, also of a group that was left long ago.
        self._mesh = DeviceMesh.from_group(
            self.group, self.device.type, mesh_dim_names=(f"tp_{self.group.group_name}",)
        )
        with torch.device("meta"):
            model = Transformer(config.model, tp, config.train.activation_checkpointing == "full")
        parallelize_module(model, self._mesh, PLAN)
        model.to(self.dtype).to_empty(device=self.device)
        if config.model.tie_word_embeddings:
            model.head.weight = model.embedding.weight
        self._inner = {
            name: nn.Parameter(parameter.to_local().detach()) if isinstance(parameter, DTensor) else parameter
            for name, parameter in model.named_parameters()
        }
        return model

    def train_step(self, data: Iterator[MicroBatch]) -> float:
        """Train on the next global batch; its loss."""
        with loss_parallel():
            return super().train_step(data)

    def evaluate(self, data: Iterator[MicroBatch], num_micro_batches: int) -> float:
        """Loss of some micro-batches, without learning from them."""
        with loss_parallel():
            return super().evaluate(data, num_micro_batches)

    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The sum of token losses of a micro-batch, [1]."""
        logits = self._without_padding(self.model(tokens)).flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        assert isinstance(loss, DTensor)
        return loss.to_local().view(1)

    def _without_padding(self, logits: Tensor) -> Tensor:
        """Logits of the padding of the vocabulary, which the last ranks have, as small as can be."""
        vocab_size = self.config.model.vocab_size
        if logits.shape[-1] == vocab_size:
            return logits
        assert isinstance(logits, DTensor)
        local = logits.to_local()
        columns = torch.arange(local.shape[-1], device=self.device) + self.rank * local.shape[-1]
        local = local.masked_fill(columns >= vocab_size, torch.finfo(local.dtype).min)
        return DTensor.from_local(local, self._mesh, [Shard(-1)])

    def _reduce_gradients(self) -> None:
        """Hand the gradients to the plain tensors that the optimizer works on."""
        for name, parameter in self.model.named_parameters():
            if isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor):
                # DTensor computes that of an embedding whole on every rank.
                own = parameter.grad.redistribute(placements=parameter.placements)
                self._inner[name].grad = own.to_local()

    def _take_step(self) -> None:
        super()._take_step()
        self.model.zero_grad()

    def _gradient_norm(self) -> Tensor:
        """What every rank holds whole counts on the first."""
        counted = (
            (name, parameter)
            for name, parameter in self.parameters()
            if self.rank == 0 or getattr(parameter, "tensor_model_parallel", False)
        )
        return norm_over_ranks(gradients_of(counted), self.device, self.group)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's slices by name."""
        return iter(self._inner.items())
