"""Qwen3 (arXiv 2505.09388): Llama whose heads of query and key are normalized."""

from dataclasses import replace

from harness.spec.families import llama

ARCHITECTURE = replace(
    llama.ARCHITECTURE,
    summary="Llama with a norm on every head of query and key",
    head_norms=True,
    transformers=replace(
        llama.TRANSFORMERS,
        defaults={
            **llama.TRANSFORMERS.defaults, "num_key_value_heads": 32, "head_dim": 128, "intermediate_size": 22016,
            "vocab_size": 151936, "max_position_embeddings": 32768,
        },
        fixed={"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0},
        class_name="Qwen3ForCausalLM",
        switches={"use_sliding_window": ("sliding_window", "max_window_layers")},
        modules={
            **llama.TRANSFORMERS.modules,
            "attention.query_norm": ("model.layers.{i}.self_attn.q_norm",),
            "attention.key_norm": ("model.layers.{i}.self_attn.k_norm",),
        },
    ),
)  # fmt: skip
