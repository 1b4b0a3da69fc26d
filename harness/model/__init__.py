"""What is computed? Tensor-parallel layers, blocks and losses in plain torch."""
