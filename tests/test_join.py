"""What a rank does before it meets the others."""

from __future__ import annotations

import subprocess
import sys

from distributed import RANK_VARIABLES, REPOSITORY


def test_muon_is_imported_and_not_compiled() -> None:
    code = """
import sys
from deepspeed.runtime import compiler
from harness.run.engines.deepspeed.join import _import_muon
compile = compiler.compile
_import_muon()
assert compiler.compile is compile
assert "deepspeed.runtime.zero.muon.original_muon" in sys.modules
print(*(name for name in sys.modules if name in ("torch._dynamo", "torch._inductor")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=RANK_VARIABLES, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""
