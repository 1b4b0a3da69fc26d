"""The transformer block, of every family whose blocks compute: what differs is in `model.architecture`.

One sub-layer costs one all-reduce forward and one backward (arXiv 1909.08053, section 3). With sequence
parallelism (arXiv 2205.05198) these are a gather and a reduce-scatter each, and backward one more gather; norms,
residuals and dropout then see a slice of the sequence. In shapes, `slice` is `sequence`, or then sequence/tp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.model.collectives import gather_last_dim
from harness.model.context import PassContext
from harness.model.dropout import Dropout
from harness.model.groups import TensorParallel
from harness.model.layers import ACTIVATIONS, ColumnParallelLinear, RowParallelLinear
from harness.spec.architecture import DOWN, OUTPUT, QKV, UP
from harness.spec.config import Model, RopeScaling
from harness.spec.parameters import mlp_parts, qkv_parts


def norm_class(model: Model) -> type[nn.LayerNorm] | type[nn.RMSNorm]:
    """Normalization of the family; takes (hidden_size, epsilon). Whole on every rank."""
    found: type[nn.LayerNorm] | type[nn.RMSNorm] = getattr(nn, model.architecture.norm.torch_class)
    return found


class RotaryPositions(nn.Module):
    """Rotary positions (arXiv 2104.09864), pairing value i with i + head_dim/2 as `transformers` does."""

    def __init__(self, model: Model, context: PassContext) -> None:
        super().__init__()
        self.head_dim = model.head_dim
        self.theta = model.rope_theta
        self.scaling = model.rope_scaling
        self.context = context
        # Not a buffer: casting the module to bf16 would round angles that must be computed in fp32.
        self._table = (torch.empty(0), torch.empty(0))

    def forward(self, heads: Tensor) -> Tensor:
        """Turn queries or keys: [batch, heads, sequence, head_dim] -> the same."""
        cos, sin = self._cos_and_sin(heads)
        # [-second half, first half] is the roll; its sign is in sin.
        return torch.addcmul(heads * cos, heads.roll(self.head_dim // 2, dims=-1), sin)

    def turn(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Turn both; together where passes are of few tokens, as calls take longer than what they do."""
        if self.context.cache is None:
            return self(query), self(key)
        turned: Tensor = self(torch.cat((query, key), dim=1))
        heads = query.shape[1]
        return turned[:, :heads], turned[:, heads:]

    def _cos_and_sin(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of cached tables with the length, type and device of `like`: [sequence, head_dim] or [batch, 1, ...]."""
        cache, cached = self.context.cache, self._table[0]
        length = like.shape[-2] if cache is None else cache.num_positions
        if cached.shape[0] < length or cached.dtype != like.dtype or cached.device != like.device:
            with torch.inference_mode(False):  # the table may serve training later
                self._table = self._build_table(length, like)
        cos, sin = self._table
        positions = self.context.positions(like.device)
        if positions is None:
            return cos[: like.shape[-2]], sin[: like.shape[-2]]
        turned = positions
        rows: tuple[Tensor, Tensor] = (self.context if cache is None else cache).shared(
            ("rotary", like.dtype, like.device), lambda: (cos[turned].unsqueeze(1), sin[turned].unsqueeze(1))
        )
        return rows

    def _build_table(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=like.device)
        positions = torch.arange(length, dtype=torch.float32, device=like.device)
        frequencies = 1.0 / self.theta ** (pairs / self.head_dim)
        if self.scaling is not None:
            frequencies = slowed(frequencies, self.scaling)
        angles = torch.outer(positions, frequencies)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1).to(like.dtype), torch.cat((-sin, sin), dim=-1).to(like.dtype)


def slowed(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Turns per position of the pairs, in radians, made slower (arXiv 2407.21783, as Llama 3.1's own code does)."""
    length, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / frequencies
    slow = torch.where(wavelength > length / low, frequencies / scaling.factor, frequencies)
    share = (length / wavelength - low) / (high - low)
    between = (1 - share) * slow / scaling.factor + share * slow
    is_between = (wavelength <= length / low) & (wavelength >= length / high)
    return torch.where(is_between, between, slow)


def shares_heads(query: Tensor, mask: Tensor | None) -> bool:
    """Whether a fused kernel lets queries share keys and values: on GPUs none does that takes a mask, too."""
    return mask is None or query.device.type == "cpu"


class ParallelAttention(nn.Module):
    """Self-attention; each rank computes num_attention_heads/tp heads.

    With fewer key-value heads than ranks, the tp/kv neighbours that serve one head own a slice of
    its rows each and exchange the slices of keys and values: no weight exists twice, so no gradient
    needs another sum.
    """

    def __init__(self, model: Model, tp: TensorParallel, name: str, context: PassContext) -> None:
        super().__init__()
        self.tp, self.name = tp, name
        self.head_dim = model.head_dim
        self.grouped = model.num_key_value_heads < model.num_attention_heads
        architecture, sizes = model.architecture, [size for _, size in qkv_parts(model)]
        self.causal, self.window, self.context = model.causal, model.sliding_window, context
        self.qkv = ColumnParallelLinear(model.hidden_size, sizes, QKV in architecture.biases, tp)
        self.query_norm, self.key_norm = (
            norm_class(model)(model.head_dim, model.norm_epsilon) if architecture.head_norms else None for _ in range(2)
        )
        self.rotary = RotaryPositions(model, context) if architecture.positions == "rotary" else None
        self.dropout = Dropout(model.dropout, context, f"{name}.probabilities", tp.rank)
        width = model.num_attention_heads * model.head_dim
        self.output = RowParallelLinear(width, model.hidden_size, OUTPUT in architecture.biases, tp)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, slice, hidden] -> [batch, slice, hidden]."""
        query, key, value = self.qkv(hidden)
        if self.tp.kv_group is not None:
            fractions = torch.stack((key, value), dim=-2)
            key, value = gather_last_dim(fractions, self.tp.kv_group).unbind(dim=-2)
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary is not None:
            query, key = self.rotary.turn(query, key)
        mask: Tensor | None = None
        if self.context.cache is not None:
            key, value, mask = self.context.cache.extend(self.name, key, value)
        is_square = key.shape[-2] == query.shape[-2]
        if mask is None and is_square:
            mask = self.context.mask(query, self.causal, self.window)
        grouped = self.grouped
        if grouped and not shares_heads(query, mask):
            key, value = (heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1) for heads in (key, value))
            grouped = False
        # enable_gqa beats repeated keys on CPU; without a mask either way this is flash attention (on CPU also with
        # one, but without dropout only).
        attend = partial(
            F.scaled_dot_product_attention,
            attn_mask=mask,
            dropout_p=self.dropout.current_rate,
            is_causal=self.causal and mask is None and is_square,
            enable_gqa=grouped,
        )
        attended = self.dropout.drawing(attend, query, key, value)
        output: Tensor = self.output(attended.transpose(1, 2).flatten(-2))
        return output

    def _heads(self, features: Tensor) -> Tensor:
        """[batch, sequence, heads x head_dim] -> [batch, heads, sequence, head_dim]."""
        return torch.unflatten(features, -1, (-1, self.head_dim)).transpose(1, 2)


class ParallelMLP(nn.Module):
    """Feed-forward layer: an activation between two projections, gated (arXiv 2002.05202) or not."""

    def __init__(self, model: Model, tp: TensorParallel) -> None:
        super().__init__()
        architecture, sizes = model.architecture, [size for _, size in mlp_parts(model)]
        self.gated = architecture.gated
        self.activation = ACTIVATIONS[architecture.activation]
        self.up = ColumnParallelLinear(model.hidden_size, sizes, UP in architecture.biases, tp)
        self.down = RowParallelLinear(model.intermediate_size, model.hidden_size, DOWN in architecture.biases, tp)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, slice, hidden] -> [batch, slice, hidden]."""
        if self.gated:
            gate, up = self.up(hidden)
            activated = self.activation(gate) * up
        else:
            (up,) = self.up(hidden)
            activated = self.activation(up)
        output: Tensor = self.down(activated)
        return output


class TransformerBlock(nn.Module):
    """Attention and feed-forward layer, each dropped out and added to its input; norms are before them or after that.

    With `activation_checkpointing` only the input is kept for backward and the block computed again.
    """

    compiled: Callable[[Tensor], Tensor] | None = None
    """What computes the block in training, if not its own code (`harness.run.compilation`)."""

    def __init__(
        self,
        model: Model,
        tp: TensorParallel,
        activation_checkpointing: bool,
        name: str = "block",
        context: PassContext | None = None,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.context = context or PassContext()
        self.parts = tp.parts
        build_norm, self.norm_after = norm_class(model), model.architecture.norm_after
        self.attention_norm = build_norm(model.hidden_size, model.norm_epsilon)
        self.attention = ParallelAttention(model, tp, f"{name}.attention", self.context)
        self.attention_dropout = Dropout(model.dropout, self.context, f"{name}.attention", tp.slice_rank)
        self.mlp_norm = build_norm(model.hidden_size, model.norm_epsilon)
        self.mlp = ParallelMLP(model, tp)
        self.mlp_dropout = Dropout(model.dropout, self.context, f"{name}.mlp", tp.slice_rank)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, slice, hidden] -> [batch, slice, hidden]."""
        if not torch.is_grad_enabled():
            return self.compute(hidden)
        compute = self.compiled or self.compute
        if self.activation_checkpointing:
            output: Tensor = checkpoint(
                self.context.repeatable(compute),  # no state of torch's generator needs to be kept
                hidden,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=self.parts.checkpoint_contexts,
            )
            return output
        return compute(hidden)

    def compute(self, hidden: Tensor) -> Tensor:
        """[batch, slice, hidden] -> [batch, slice, hidden], by the block's own code."""
        if self.norm_after:
            return self._compute_norm_after(hidden)
        hidden = hidden + self.attention_dropout(self.attention(self.attention_norm(hidden)))
        output: Tensor = hidden + self.mlp_dropout(self.mlp(self.mlp_norm(hidden)))
        return output

    def _compute_norm_after(self, hidden: Tensor) -> Tensor:
        hidden = self.attention_norm(hidden + self.attention_dropout(self.attention(hidden)))
        output: Tensor = self.mlp_norm(hidden + self.mlp_dropout(self.mlp(hidden)))
        return output
