"""Shardwright: choose, run and trust a parallel layout for training transformers with DeepSpeed."""
