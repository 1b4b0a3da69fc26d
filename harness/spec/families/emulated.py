"""Blocks that wait, between an embedding and a head that compute: measurements whose truth is known."""

from harness.spec.architecture import RMS_NORM, Architecture

ARCHITECTURE = Architecture(
    summary="blocks that wait for a set time instead of computing",
    norm=RMS_NORM,
    positions="none",
    activation="silu",  # no meaning where blocks wait
    computes=False,
)
