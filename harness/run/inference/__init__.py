"""Models that only run forward: a stage with its cache, the ring that feeds it, and what is measured of both."""
