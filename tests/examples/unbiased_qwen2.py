"""Qwen2 without its biases, which is Llama by another name."""

from dataclasses import replace

from harness.spec.families import qwen2

ARCHITECTURE = replace(
    qwen2.ARCHITECTURE,
    summary="Qwen2 without biases",
    biases=frozenset(),
)
