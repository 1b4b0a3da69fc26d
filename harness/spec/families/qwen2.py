"""Qwen2 (arXiv 2407.10671): Llama with biases on query, key and value."""

from dataclasses import replace

from harness.spec.architecture import QKV
from harness.spec.families import llama

ARCHITECTURE = replace(
    llama.ARCHITECTURE,
    summary="Llama with biases on query, key and value",
    biases=frozenset({QKV}),
    transformers=replace(
        llama.TRANSFORMERS,
        defaults={
            **llama.TRANSFORMERS.defaults,
            "num_key_value_heads": 32, "intermediate_size": 22016, "vocab_size": 151936,
            "max_position_embeddings": 32768,
        },
        fixed={"hidden_act": "silu", "attention_dropout": 0.0},
        class_name="Qwen2ForCausalLM",
        switches={"use_sliding_window": ("sliding_window", "max_window_layers")},
    ),
)  # fmt: skip
