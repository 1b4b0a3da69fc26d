"""Files of conf/cluster/, as people write them, and which datasheet peak a device has."""

from __future__ import annotations

import logging
import re
import shlex
import shutil
from pathlib import Path

import pytest
from helpers import MACHINE, make_config

from harness.machine import Machine
from harness.plan import hardware
from harness.plan.hardware import peak_flops_per_second, unused_peak
from harness.spec.config import REPOSITORY


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """conf/cluster/ of a copy."""
    shutil.copytree(REPOSITORY / "conf", tmp_path / "conf")
    monkeypatch.setattr(hardware, "CONF", tmp_path / "conf")
    return tmp_path / "conf" / "cluster"


def test_a_file_may_build_on_another(conf: Path) -> None:
    mine = "defaults: [dgx_h100, _self_]\nname: mine\ndevice_name: My GPU\npeak_flops: {bf16: 5.0e14}\n"
    (conf / "mine.yaml").write_text(mine)
    gpu = Machine("cuda", "My GPU", num_devices=1, num_cores=8, memory_bytes=2**36)
    assert hardware.peak_flops_per_second(make_config("train.precision=bf16"), gpu) == 5.0e14
    assert hardware.peak_flops_per_second(make_config("train.precision=fp32"), gpu) == 67.0e12  # of dgx_h100


@pytest.mark.parametrize(
    "text", ["name: half", "- 1", "", "a: [", "defaults: [absent]", "# @package _global_\ndefaults: [dgx_h100]"]
)
def test_a_file_that_is_no_cluster_costs_a_warning(conf: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    (conf / "a_wrong_one.yaml").write_text(text)
    gpu = Machine("cuda", "NVIDIA H200", num_devices=1, num_cores=8, memory_bytes=2**36)
    with caplog.at_level(logging.WARNING):
        assert hardware.peak_flops_per_second(make_config("train.precision=bf16"), gpu) == 989.4e12
        assert hardware.peak_flops_per_second(make_config(), MACHINE) is None
    assert "a_wrong_one.yaml is left out" in caplog.text


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
        ("NVIDIA A100-SXM4-40GB", f"{BF16} {GIVEN} cluster.device_name=a100", 362e12),
        # given for hardware that one does not have
        ("NVIDIA H200 NVL", f"{BF16} cluster=h200", None),
        ("NVIDIA H100 PCIe", f"{BF16} cluster=dgx_h100 {GIVEN}", None),
        ("NVIDIA H200", f"{BF16} cluster=dgx_a100_80gb", 989.4e12),
        ("NVIDIA L40S", f"{BF16} cluster=dgx_a100_80gb {GIVEN}", None),
        ("some cpu", "cluster=h200", None),
    ],
)
def test_peak_of_a_device(device: str, overrides: str, peak: float | None) -> None:
    machine = Machine("cpu" if "cpu" in device else "cuda", device, 8, 8, 2**33)
    config = make_config(*shlex.split(overrides), machine=machine)
    assert peak_flops_per_second(config, machine) == peak


@pytest.mark.parametrize(
    ("device", "overrides", "is_unused"),
    [
        ("NVIDIA H100 PCIe", f"cluster=dgx_h100 {GIVEN}", True),
        ("NVIDIA H200", f"cluster=dgx_h100 {GIVEN}", True),
        ("NVIDIA L40", f"{GIVEN} cluster.device_name=L40S", True),
        ("NVIDIA L40S", f"{GIVEN} cluster.device_name=l40s", False),
        ("NVIDIA L40S", GIVEN, False),
        ("NVIDIA H200", f"cluster=h200 {GIVEN}", False),
        ("NVIDIA H200 NVL", "cluster=h200", True),  # whose name is a part, and whose peak is another
        ("NVIDIA H200", "cluster=dgx_h100", False),  # its own file's: a cluster one does not have
        ("some cpu", "cluster=h200", False),
        ("some cpu", "", False),
    ],
)
def test_a_peak_that_is_not_used_is_said(device: str, overrides: str, is_unused: bool) -> None:
    machine = Machine("cpu" if "cpu" in device else "cuda", device, 8, 8, 2**33)
    said = unused_peak(make_config(BF16, *shlex.split(overrides), machine=machine), machine)
    assert (said is not None) == is_unused
    if said is not None:
        assert re.match(r"MFU by cluster.peak_flops.bf16=[\de.+]+: that is of cluster.device_name=", said)
        assert f"this machine has {device}; set cluster.device_name=null" in said
