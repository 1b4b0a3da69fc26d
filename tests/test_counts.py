"""Parameters and FLOPs: by hand, and as PyTorch counts them in a model of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.spec.config import Model
from harness.spec.counts import (
    block_forward_flops,
    block_parameters,
    embedding_parameters,
    head_forward_flops,
    head_parameters,
    parameters,
    stage_counts,
    training_flops_per_token,
)
from tests.helpers import make_config
from tests.references import build_reference

SHAPE: dict[str, Any] = {
    "name": "hand", "num_hidden_layers": 3, "hidden_size": 8, "num_attention_heads": 4, "head_dim": 2,
    "intermediate_size": 20, "vocab_size": 11, "max_position_embeddings": 16, "norm_epsilon": 1e-5,
    "rope_theta": 10000.0, "initializer_range": 0.02, "dropout": 0.0,
}  # fmt: skip
GPT2 = Model(family="gpt2", num_key_value_heads=4, tie_word_embeddings=True, **SHAPE)
LLAMA = Model(family="llama", num_key_value_heads=2, tie_word_embeddings=False, **SHAPE)
BERT = Model(
    family="bert", num_key_value_heads=4, tie_word_embeddings=True, causal=False, type_vocab_size=2, **SHAPE
)  # fmt: skip
QWEN3 = Model(family="qwen3", num_key_value_heads=2, tie_word_embeddings=False, **SHAPE)
ENCODER = Model(family="encoder", num_key_value_heads=4, tie_word_embeddings=True, causal=False, **SHAPE)


def test_gpt2_by_hand() -> None:
    attention = (8 * 24 + 24) + (8 * 8 + 8)  # fused qkv, output
    mlp = (8 * 20 + 20) + (20 * 8 + 8)
    norms = 2 * (8 + 8)
    assert block_parameters(GPT2) == attention + mlp + norms
    assert embedding_parameters(GPT2) == 11 * 8 + 16 * 8
    assert head_parameters(GPT2) == 8 + 8  # the projection is the embedding
    assert parameters(GPT2) == 216 + 3 * 668 + 16
    assert block_forward_flops(GPT2, 10) == 2 * (8 * 24 + 8 * 8 + 2 * 8 * 20) + 2 * 2 * 10 * 8
    assert head_forward_flops(GPT2) == 2 * 8 * 11


def test_llama_by_hand() -> None:
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8  # q, k and v of two heads, output
    assert block_parameters(LLAMA) == attention + 3 * 8 * 20 + 2 * 8
    assert embedding_parameters(LLAMA) == 11 * 8
    assert head_parameters(LLAMA) == 8 + 11 * 8
    assert parameters(LLAMA) == 88 + 3 * 688 + 96
    assert block_forward_flops(LLAMA, 10) == 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 20) + 2 * 2 * 10 * 8


def test_bert_by_hand() -> None:
    """A block is GPT-2's; before it are kinds of tokens and a norm, behind it a dense layer, a norm and a bias."""
    assert block_parameters(BERT) == block_parameters(GPT2) == block_parameters(ENCODER)
    assert embedding_parameters(BERT) == embedding_parameters(GPT2) + 2 * 8 + (8 + 8)
    assert head_parameters(BERT) == (8 * 8 + 8) + (8 + 8) + 11
    assert head_forward_flops(BERT) == 2 * 8 * 8 + 2 * 8 * 11
    assert (embedding_parameters(ENCODER), head_parameters(ENCODER)) == (11 * 8, 0)
    assert head_forward_flops(ENCODER) == 2 * 8 * 11


def test_norms_of_heads_by_hand() -> None:
    assert block_parameters(QWEN3) == block_parameters(LLAMA) + 2 * 2
    assert block_forward_flops(QWEN3, 10) == block_forward_flops(LLAMA, 10)


@pytest.mark.parametrize("window", [1, 4, 999, 1000, 1001, None])
def test_a_window_counts_what_it_leaves(window: int | None) -> None:
    """In full a window of keys for each query; causal what the masks leave of it, but for the diagonal's half."""
    model, length = LLAMA.model_copy(update={"sliding_window": window}), 1000
    seen = min(length, window or length)
    products = block_forward_flops(LLAMA, length) - 4 * length * 8
    assert block_forward_flops(model, length) == products + 4 * seen * 8
    left = sum(min(query + 1, seen) - 0.5 * (query < seen) for query in range(length)) / length
    assert block_forward_flops(model, length, causal=True) == round(products + 4 * left * 8)


@pytest.mark.parametrize("causal", [False, True])
def test_only_what_looks_back_is_halved(causal: bool) -> None:
    model = BERT.model_copy(update={"causal": causal})
    halved = training_flops_per_token(model, 10) != training_flops_per_token(model, 10, causal=True)
    assert halved == causal


def test_wide_heads_by_hand() -> None:
    """head_dim need not be hidden_size / num_attention_heads."""
    wide = LLAMA.model_copy(update={"head_dim": 6})
    assert block_parameters(wide) == 8 * 24 + 2 * 8 * 12 + 24 * 8 + 3 * 8 * 20 + 2 * 8
    assert block_forward_flops(wide, 10) == 2 * (8 * 24 + 2 * 8 * 12 + 24 * 8 + 3 * 8 * 20) + 2 * 2 * 10 * 24


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_training_flops(model: Model) -> None:
    forward = 3 * block_forward_flops(model, 10) + head_forward_flops(model)
    assert training_flops_per_token(model, 10) == 3 * forward
    # Causal: half of the two attention products is masked away.
    assert training_flops_per_token(model, 10) - training_flops_per_token(model, 10, causal=True) == 3 * 3 * 2 * 10 * 8


@pytest.mark.parametrize("model", [GPT2, LLAMA, BERT, QWEN3], ids=["gpt2", "llama", "bert", "qwen3"])
def test_pytorch_counts_the_same_flops(model: Model) -> None:
    batch, sequence = 2, 10
    reference = build_reference(model, attn_implementation="eager")
    tokens = torch.randint(model.vocab_size, (batch, sequence))

    def count(backward: bool) -> int:
        with FlopCounterMode(display=False) as counter:
            loss = reference(tokens, labels=tokens).loss
            if backward:
                loss.backward()
        by_module = counter.get_flop_counts()
        angles = sum(sum(by_module[name].values()) for name in by_module if name.endswith("rotary_emb"))
        return counter.get_total_flops() - angles

    forward = 3 * block_forward_flops(model, sequence) + head_forward_flops(model)
    assert count(backward=False) == batch * sequence * forward
    assert count(backward=True) == batch * sequence * training_flops_per_token(model, sequence)


def test_stage_counts_by_hand() -> None:
    config = make_config("parallel.pp=2", "train.micro_batch_size=2", "train.sequence_length=64")
    model, tokens = config.model, 2 * 64
    first, last = stage_counts(config, [3, 1])
    tied = model.vocab_size * model.hidden_size
    assert (first.layers, last.layers) == (3, 1)
    assert first.parameters == embedding_parameters(model) + 3 * block_parameters(model)
    assert last.parameters == block_parameters(model) + head_parameters(model) + tied
    assert first.forward_flops == tokens * 3 * block_forward_flops(model, 64)
    assert last.forward_flops == tokens * (block_forward_flops(model, 64) + head_forward_flops(model))


@pytest.mark.parametrize("name", ["gpt2_tiny", "llama_tiny"])
@pytest.mark.parametrize("layers", [[4], [2, 2], [1, 2, 1], [1, 1, 1, 1]])
def test_stages_add_up_to_the_model(name: str, layers: list[int]) -> None:
    config = make_config(f"model={name}", f"parallel.pp={len(layers)}")
    model, train = config.model, config.train
    stages = stage_counts(config, layers)
    copies = model.vocab_size * model.hidden_size if model.tie_word_embeddings and len(layers) > 1 else 0
    assert sum(stage.parameters for stage in stages) == parameters(model) + copies
    tokens = train.micro_batch_size * train.sequence_length
    assert 3 * sum(stage.forward_flops for stage in stages) == tokens * training_flops_per_token(
        model, train.sequence_length
    )
