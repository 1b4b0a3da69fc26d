"""BERT (arXiv 1810.04805), its prediction of masked tokens."""

from harness.spec.architecture import DOWN, LAYER_NORM, OUTPUT, QKV, UP, Architecture, TransformersFormat

ARCHITECTURE = Architecture(
    summary="post-LayerNorm, learned positions, kinds of tokens, GELU, prediction head, sees both directions",
    norm=LAYER_NORM,
    positions="learned",
    activation="gelu",
    biases=frozenset({QKV, OUTPUT, UP, DOWN}),
    norm_after=True,
    embedding_norm=True,
    head_transform=True,
    causal=False,
    transformers=TransformersFormat(
        keys={
            "num_hidden_layers": "num_hidden_layers",
            "hidden_size": "hidden_size",
            "num_attention_heads": "num_attention_heads",
            "intermediate_size": "intermediate_size",
            "vocab_size": "vocab_size",
            "max_position_embeddings": "max_position_embeddings",
            "type_vocab_size": "type_vocab_size",
            "norm_epsilon": "layer_norm_eps",
            "initializer_range": "initializer_range",
            "tie_word_embeddings": "tie_word_embeddings",
        },
        defaults={
            "num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
            "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
            "initializer_range": 0.02, "tie_word_embeddings": True,
        },
        fixed={"hidden_act": "gelu", "position_embedding_type": "absolute", "add_cross_attention": False},
        dropout={"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
        modules={
            "embedding": ("bert.embeddings.word_embeddings",),
            "position_embedding": ("bert.embeddings.position_embeddings",),
            "token_type_embedding": ("bert.embeddings.token_type_embeddings",),
            "embedding_norm": ("bert.embeddings.LayerNorm",),
            QKV: tuple(f"bert.encoder.layer.{{i}}.attention.self.{part}" for part in ("query", "key", "value")),
            OUTPUT: ("bert.encoder.layer.{i}.attention.output.dense",),
            "attention_norm": ("bert.encoder.layer.{i}.attention.output.LayerNorm",),
            UP: ("bert.encoder.layer.{i}.intermediate.dense",),
            DOWN: ("bert.encoder.layer.{i}.output.dense",),
            "mlp_norm": ("bert.encoder.layer.{i}.output.LayerNorm",),
            "head_dense": ("cls.predictions.transform.dense",),
            "head_norm": ("cls.predictions.transform.LayerNorm",),
            "head": ("cls.predictions.decoder",),
            "head_bias": ("cls.predictions",),
        },
        optional_prefix="bert.",
    ),
)  # fmt: skip
