"""What can differ between families of transformers, as facts that need no torch.

A family is one `Architecture`, in a module of its own in `harness.spec.families`. The table of parameters, counts,
memory, the configuration's checks, the layers that are built and the exchange with `transformers` all follow from it.

What all have in common: an embedding, then blocks of attention and feed-forward layer, each with a norm and added to
the residual stream, then the output head, which may share the embedding's matrix. A family that differs in more needs
a trait here, and code in `harness.spec.parameters` and `harness.model.block`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Norm:
    """A normalization over the hidden dimension."""

    torch_class: str
    """Its name in `torch.nn`; takes (hidden_size, epsilon)."""
    has_bias: bool
    num_statistics: int
    """Numbers per token that it keeps for backward."""


LAYER_NORM = Norm("LayerNorm", has_bias=True, num_statistics=2)
"""Of mean and deviation (arXiv 1607.06450)."""
RMS_NORM = Norm("RMSNorm", has_bias=False, num_statistics=1)
"""Of the root mean square (arXiv 1910.07467)."""

QKV, OUTPUT, UP, DOWN = "attention.qkv", "attention.output", "mlp.up", "mlp.down"
"""Projections of a block by their place in it: query, key and value, back from attention, into and out of the
feed-forward layer."""


@dataclass(frozen=True)
class TransformersFormat:
    """How `transformers` writes a family down, in its config.json and in its files of weights."""

    keys: Mapping[str, str]
    """Key of our `model` section -> theirs. What a family of theirs has no key for follows from the others there:
    as many key-value heads as heads, head_dim = hidden_size / num_attention_heads."""
    defaults: Mapping[str, Any]
    """Value of each of their keys where a file leaves it out."""
    fixed: Mapping[str, Any]
    """The implemented value of a setting; another is refused."""
    dropout: Mapping[str, float]
    """Their rates of dropout, which must be one, and what each is where a file leaves it out."""
    modules: Mapping[str, tuple[str, ...]]
    """Module of ours, without `blocks.N.` -> theirs with `{i}` for N, one per part where they keep parts apart."""
    transposed: frozenset[str] = frozenset()
    """Modules of ours whose matrix is [in, out] there."""
    optional_prefix: str = ""
    """What names of theirs lack in files of the model without its head."""
    class_name: str = ""
    """Class of theirs with the output head, `architectures` of a config.json that is written."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Tensor of theirs that is a copy -> the parameter of ours that it equals, where the model has it and no other
    is written under this name."""
    unused: tuple[str, ...] = ()
    """Tensors that are no part of what is trained, as regular expressions: carried along, never read."""
    old_names: Mapping[str, str] = field(default_factory=dict)
    """Ends of names in older files -> what they are now."""
    harmless: frozenset[str] = frozenset()
    """Settings that say nothing about the computation in this family, besides those of all."""
    switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Setting -> those that mean nothing while it is false; true is refused unless a file sets the first of them to
    null."""
    remedies: Mapping[str, str] = field(default_factory=dict)
    """What to do instead of another value of a `fixed` setting, where that is not to change it in the file."""


@dataclass(frozen=True)
class Architecture:
    """One family."""

    summary: str
    """What it is, in a line."""
    norm: Norm
    positions: Literal["learned", "rotary", "sinusoidal", "none"]
    """learned: added to the embedding. rotary: turn queries and keys. sinusoidal: waves, added to the embedding after
    that is multiplied by the root of hidden_size (arXiv 1706.03762, sections 3.4 and 3.5)."""
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"]
    """Of the feed-forward layer; gelu is exact, gelu_tanh its usual approximation (arXiv 1606.08415)."""
    gated: bool = False
    """The activation of one projection multiplies another of the same width (arXiv 2002.05202)."""
    biases: frozenset[str] = frozenset()
    """Which projections of a block have one."""
    norm_after: bool = False
    """Norms follow the sums with the residual stream, and none is behind the last block (arXiv 1706.03762); else they
    are before attention and feed-forward layer, and one is behind the last block."""
    head_norms: bool = False
    """Every head of query and key is normalized before positions turn it (arXiv 2302.05442)."""
    embedding_norm: bool = False
    """The sum of all embeddings is normalized."""
    head_transform: bool = False
    """Before the output matrix are a dense layer, the activation and a norm, behind it a bias (arXiv 1810.04805)."""
    causal: bool = True
    """A token sees itself and those before it, no later ones; else `train.objective` says which it sees."""
    computes: bool = True
    """False: blocks wait for a set time instead (`harness.spec.config.EmulatedModel`), and hold one vector each."""
    transformers: TransformersFormat | None = None
    """None: `transformers` has no counterpart."""
