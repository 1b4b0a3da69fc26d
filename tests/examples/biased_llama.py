"""Llama with biases on query, key and value, as Qwen2 has them."""

from dataclasses import replace

from harness.spec.architecture import QKV
from harness.spec.families import llama

ARCHITECTURE = replace(
    llama.ARCHITECTURE,
    summary="Llama with biases on query, key and value",
    biases=frozenset({QKV}),
)
