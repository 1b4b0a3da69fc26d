"""Found through PYTHONPATH by every Python that a test starts: puts the stand-in for CUDA into torch as it is imported.

`harness.machine` then also believes that torch is a build for CUDA, which the launchers ask before they start ranks.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def install_in_torch(torch: ModuleType) -> None:
    from cuda_standin.standin import install

    install()


def claim_cuda_build(machine: ModuleType) -> None:
    machine.torch_cuda_version = lambda: "13.0"  # type: ignore[attr-defined]


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module right after it was imported for the first time."""

    def __init__(self, actions: dict[str, Callable[[ModuleType], None]]) -> None:
        self._actions = actions

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        action = self._actions.pop(name, None)
        spec = importlib.machinery.PathFinder.find_spec(name, path) if action else None
        if spec is None or spec.loader is None or action is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            action(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, AfterImport({"torch": install_in_torch, "harness.machine": claim_cuda_build}))
