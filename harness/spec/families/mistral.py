"""Mistral (arXiv 2310.06825): Llama whose tokens see a window."""

from dataclasses import replace

from harness.spec.families import llama

ARCHITECTURE = replace(
    llama.ARCHITECTURE,
    summary="Llama with a sliding window",
    transformers=replace(
        llama.TRANSFORMERS,
        keys={**llama.TRANSFORMERS.keys, "sliding_window": "sliding_window"},
        defaults={
            **llama.TRANSFORMERS.defaults,
            "num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        fixed={"hidden_act": "silu", "attention_dropout": 0.0},
        class_name="MistralForCausalLM",
    ),
)  # fmt: skip
