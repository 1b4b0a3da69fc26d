"""What torch.compile leaves as it is, where it compiles what is around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """An autograd function that communicates, leaves work for later or takes oneDNN: no compiler looks into it."""
    output: Tensor = _apply(function, *arguments)
    return output


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    return function.apply(*arguments)  # type: ignore[no-untyped-call]
