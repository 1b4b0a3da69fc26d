"""Which datasheet peak a device has: what the user gives, what conf/cluster/ names, or none."""

from __future__ import annotations

import shlex

import pytest
from helpers import make_config

from harness.machine import Machine
from harness.plan.hardware import peak_flops_per_second

BF16, FP16 = "train.precision=bf16", "train.precision=fp16 parallel.zero_stage=1"
GIVEN = "cluster.peak_flops.bf16=362e12"


@pytest.mark.parametrize(
    ("device", "overrides", "peak"),
    [
        # nothing given: the file that names the device in full
        ("NVIDIA H200", BF16, 989.4e12),
        ("NVIDIA H200", "", 67.0e12),
        ("NVIDIA A100-SXM4-80GB", BF16, 312.0e12),
        ("NVIDIA H200 NVL", BF16, None),
        ("NVIDIA L40S", BF16, None),
        # given for this machine
        ("NVIDIA L40S", f"{BF16} {GIVEN}", 362e12),
        ("NVIDIA H200", f"{BF16} {GIVEN}", 362e12),
        ("NVIDIA L40S", f"{FP16} {GIVEN}", None),
        ("NVIDIA H200", f"{FP16} {GIVEN}", 989.4e12),
        ("some cpu", "cluster.peak_flops.fp32=1e11", 1e11),
        # given for a device by a part of its name
        ("NVIDIA L40S", f"{BF16} {GIVEN} cluster.device_name=L40S", 362e12),
        ("NVIDIA L40S", f"{BF16} {GIVEN} 'cluster.device_name=NVIDIA L40S'", 362e12),
        ("NVIDIA L40", f"{BF16} {GIVEN} cluster.device_name=L40S", None),
        # given for hardware that one does not have
        ("NVIDIA H200", f"{BF16} cluster=dgx_a100_80gb", 989.4e12),
        ("NVIDIA L40S", f"{BF16} cluster=dgx_a100_80gb {GIVEN}", None),
        ("some cpu", "cluster=h200", None),
    ],
)
def test_peak_of_a_device(device: str, overrides: str, peak: float | None) -> None:
    machine = Machine("cpu" if "cpu" in device else "cuda", device, 8, 8, 2**33)
    config = make_config(*shlex.split(overrides), machine=machine)
    assert peak_flops_per_second(config, machine) == peak
