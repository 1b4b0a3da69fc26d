"""The numeric tests once more with the kernels of other processors, which add in another order and round otherwise.

torch, oneDNN and MKL choose kernels by the processor; variables forbid them the better ones. They are read when the
libraries load, so each set needs a process, and the ranks that tests start inherit it. Only x86 has AVX2.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from distributed import REPOSITORY

CAPABILITIES = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",  # Intel's processors only
    },
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "MKL_CBWR": "COMPATIBLE",  # SSE2, on every maker's processors
    },
}
PYTEST = "import pytest, sys, torch; print(torch.backends.cpu.get_cpu_capability()); sys.exit(pytest.main())"
"""Says first which kernels torch took."""

NUMERIC = [
    "test_loss.py",
    "test_model.py",
    "test_weights.py",
    "test_tensor_parallel.py",
    "test_dropout.py",
    "test_parity.py::test_parity[1]",
    "test_parity.py::test_parity[2]",
]


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_numbers_hold_with_the_kernels_of(capability: str) -> None:
    if capability == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has no AVX2")
    command = [sys.executable, "-c", PYTEST, "-q", "-p", "no:cacheprovider", *(f"tests/{file}" for file in NUMERIC)]
    environment = os.environ | CAPABILITIES[capability]
    child = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-5000:] + child.stderr[-1000:]
    first, *_, last = child.stdout.splitlines()
    assert first == capability.upper()
    assert re.fullmatch(r"\d+ passed(, \d+ warnings?)? in .*", last), last  # none skipped
