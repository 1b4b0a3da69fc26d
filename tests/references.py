"""The families' models as others built them: from `transformers`, or of torch's own layers."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from helpers_model import tiny_model
from torch import Tensor, nn

from harness.spec.config import Model, RopeScaling

SCALED = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=2.0, original_max_position_embeddings=24)
"""Of four pairs, with theta 100, one is fast, one between and two are slow."""

MODELS: dict[str, Model] = {
    "gpt2": tiny_model(),
    "gpt2 untied": tiny_model(tie_word_embeddings=False),
    "llama": tiny_model("llama", tie_word_embeddings=False),
    "llama tied": tiny_model("llama"),
    "llama grouped": tiny_model("llama", num_key_value_heads=2, rope_theta=500.0, tie_word_embeddings=False),
    "llama wide heads": tiny_model("llama", num_key_value_heads=4, head_dim=6),
    "llama scaled": tiny_model("llama", head_dim=8, rope_theta=100.0, rope_scaling=SCALED),
    "mistral": tiny_model("mistral", num_key_value_heads=4, sliding_window=4, tie_word_embeddings=False),
    "qwen2": tiny_model("qwen2", num_key_value_heads=2),
    "qwen3": tiny_model("qwen3", num_key_value_heads=2, head_dim=6, tie_word_embeddings=False),
    "bert": tiny_model("bert", causal=False, type_vocab_size=2, norm_epsilon=1e-12),
    "bert causal": tiny_model("bert", type_vocab_size=2),
    "encoder": tiny_model("encoder", causal=False),
    "encoder causal": tiny_model("encoder", tie_word_embeddings=False),
}
"""Of every family what it has that others have not."""

CLASSES = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "bert": ("BertConfig", "BertForMaskedLM"),
}


def transformers_config(model: Model, **changes: Any) -> Any:
    """The same shape there."""
    import transformers  # takes seconds

    written = model.architecture.transformers
    assert written is not None
    settings = {theirs: getattr(model, ours) for ours, theirs in written.keys.items()}
    settings |= dict.fromkeys(written.dropout, 0.0)
    if (theta := settings.pop("rope_theta", None)) is not None:
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
        if model.rope_scaling is not None:
            settings["rope_parameters"] |= {"rope_type": "llama3", **model.rope_scaling.model_dump()}
    if model.family == "bert" and model.causal:
        settings["is_decoder"] = True
    name, _ = CLASSES[model.family]
    return getattr(transformers, name)(**settings, **changes)


def build_reference(model: Model, **changes: Any) -> Any:
    """The model of `transformers`, or of torch's layers where it has none."""
    if model.architecture.transformers is None:
        return Encoder(model)
    config = transformers_config(model, **changes)
    config._attn_implementation = changes.get("attn_implementation", "sdpa")
    _, name = CLASSES[model.family]
    if model.family == "bert" and model.causal:
        name = "BertLMHeadModel"
    return getattr(importlib.import_module("transformers"), name)(config)


def exact_norm(self: Any, hidden: Tensor) -> Tensor:
    """RMSNorm of `transformers` without its detour over fp32."""
    scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    normalized: Tensor = self.weight * hidden * scale
    return normalized


def use_exact_norms(patch: Any) -> None:
    """For models in float64; `patch` is pytest's monkeypatch."""
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        norm = next(found for name, found in vars(module).items() if name.endswith("RMSNorm"))
        patch.setattr(norm, "forward", exact_norm)


class Encoder(nn.Module):
    """The encoder of "Attention is all you need" of torch's own layers; its parameters have torch's names."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.causal, self.width = model.causal, model.hidden_size
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                model.hidden_size,
                model.num_attention_heads,
                model.intermediate_size,
                dropout=0.0,
                activation="relu",
                layer_norm_eps=model.norm_epsilon,
                batch_first=True,
                norm_first=False,
            )
            for _ in range(model.num_hidden_layers)
        )
        self.head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        if model.tie_word_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Any:
        """[batch, sequence] -> something with `logits`."""
        length = tokens.shape[1]
        hidden = self.embedding(tokens) * math.sqrt(self.width)
        hidden = hidden + torch.tensor(
            [[wave(place, column, self.width) for column in range(self.width)] for place in range(length)],
            dtype=hidden.dtype,
        )
        mask = torch.full((length, length), -math.inf, dtype=hidden.dtype).triu(1) if self.causal else None
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask)
        return Logits(F.linear(hidden, self.head.weight))


class Logits:
    """As `transformers` wraps them."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def wave(place: int, column: int, width: int) -> float:
    """arXiv 1706.03762, section 3.5."""
    angle = place / 10000 ** (column // 2 * 2 / width)
    return math.cos(angle) if column % 2 else math.sin(angle)


ENCODER_NAMES = {
    "attention.qkv": "self_attn.in_proj_", "attention.output": "self_attn.out_proj.", "attention_norm": "norm1.",
    "mlp.up": "linear1.", "mlp.down": "linear2.", "mlp_norm": "norm2.",
}  # fmt: skip


def encoder_state(full: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ours under the names that they have in `Encoder`."""
    state = {}
    for name, tensor in full.items():
        path, _, leaf = name.rpartition(".")
        if path.startswith("blocks."):
            _, index, path = path.split(".", 2)
            name = f"layers.{index}.{ENCODER_NAMES[path]}{leaf}"
        state[name] = tensor
    return state
