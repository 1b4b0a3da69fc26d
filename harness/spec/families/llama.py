"""Llama (arXiv 2302.13971, 2407.21783)."""

from harness.spec.architecture import DOWN, OUTPUT, QKV, RMS_NORM, UP, Architecture, TransformersFormat

TRANSFORMERS = TransformersFormat(
    keys={
        "num_hidden_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "intermediate_size": "intermediate_size",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_position_embeddings",
        "norm_epsilon": "rms_norm_eps",
        "rope_theta": "rope_theta",
        "initializer_range": "initializer_range",
        "tie_word_embeddings": "tie_word_embeddings",
    },
    defaults={
        "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": None,
        "head_dim": None, "intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "initializer_range": 0.02, "tie_word_embeddings": False,
    },
    fixed={
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
        "pretraining_tp": 1,
    },
    dropout={},
    modules={
        "embedding": ("model.embed_tokens",),
        "attention_norm": ("model.layers.{i}.input_layernorm",),
        QKV: tuple(f"model.layers.{{i}}.self_attn.{part}_proj" for part in ("q", "k", "v")),
        OUTPUT: ("model.layers.{i}.self_attn.o_proj",),
        "mlp_norm": ("model.layers.{i}.post_attention_layernorm",),
        UP: ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"),
        DOWN: ("model.layers.{i}.mlp.down_proj",),
        "final_norm": ("model.norm",),
        "head": ("lm_head",),
    },
    optional_prefix="model.",
    class_name="LlamaForCausalLM",
    tied={"lm_head.weight": "embedding.weight"},
    unused=(r"\.rotary_emb\.inv_freq$",),  # in older files
)  # fmt: skip

ARCHITECTURE = Architecture(
    summary="RMSNorm, rotary positions, SwiGLU",
    norm=RMS_NORM,
    positions="rotary",
    activation="silu",
    gated=True,
    transformers=TRANSFORMERS,
)
