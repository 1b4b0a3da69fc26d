"""GPT-2 (Radford et al. 2019), GPT-3 (arXiv 2005.14165)."""

from harness.spec.architecture import DOWN, LAYER_NORM, OUTPUT, QKV, UP, Architecture, TransformersFormat

ARCHITECTURE = Architecture(
    summary="pre-LayerNorm, learned positions, GELU",
    norm=LAYER_NORM,
    positions="learned",
    activation="gelu_tanh",
    biases=frozenset({QKV, OUTPUT, UP, DOWN}),
    transformers=TransformersFormat(
        keys={
            "num_hidden_layers": "n_layer",
            "hidden_size": "n_embd",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "vocab_size": "vocab_size",
            "max_position_embeddings": "n_positions",
            "norm_epsilon": "layer_norm_epsilon",
            "initializer_range": "initializer_range",
            "tie_word_embeddings": "tie_word_embeddings",
        },
        defaults={
            "n_layer": 12, "n_embd": 768, "n_head": 12, "n_inner": None, "vocab_size": 50257, "n_positions": 1024,
            "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": True,
        },
        fixed={
            "activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False, "add_cross_attention": False,
        },
        dropout={"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1},
        modules={
            "embedding": ("transformer.wte",),
            "position_embedding": ("transformer.wpe",),
            "attention_norm": ("transformer.h.{i}.ln_1",),
            QKV: ("transformer.h.{i}.attn.c_attn",),
            OUTPUT: ("transformer.h.{i}.attn.c_proj",),
            "mlp_norm": ("transformer.h.{i}.ln_2",),
            UP: ("transformer.h.{i}.mlp.c_fc",),
            DOWN: ("transformer.h.{i}.mlp.c_proj",),
            "final_norm": ("transformer.ln_f",),
            "head": ("lm_head",),
        },
        transposed=frozenset({QKV, OUTPUT, UP, DOWN}),  # its Conv1D
        optional_prefix="transformer.",
        class_name="GPT2LMHeadModel",
        tied={"lm_head.weight": "embedding.weight"},
        unused=(r"\.attn\.(bias|masked_bias)$",),  # causal masks in older files
    ),
)  # fmt: skip
