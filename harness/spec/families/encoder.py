"""The encoder of "Attention is all you need" (arXiv 1706.03762)."""

from harness.spec.architecture import DOWN, LAYER_NORM, OUTPUT, QKV, UP, Architecture

ARCHITECTURE = Architecture(
    summary="the original encoder: post-LayerNorm, sinusoidal positions, ReLU, sees both directions",
    norm=LAYER_NORM,
    positions="sinusoidal",
    activation="relu",
    biases=frozenset({QKV, OUTPUT, UP, DOWN}),
    norm_after=True,
    causal=False,
)
