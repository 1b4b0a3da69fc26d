"""Files of conf/cluster/, as people write them."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from helpers import MACHINE, make_config

from harness.config import REPOSITORY
from harness.machine import Machine
from harness.plan import hardware


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
