"""Plain torch on one rank: what parity compares with, and the smallest engine there is."""
