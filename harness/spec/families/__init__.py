"""The table of families: every module here holds one, as `ARCHITECTURE`, and its name is the family's.

That name is the value of `model.family`, and of `model_type` in the config.json of `transformers`.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from harness.spec.architecture import Architecture

FAMILIES: dict[str, Architecture] = {
    module.name: import_module(f"{__name__}.{module.name}").ARCHITECTURE for module in pkgutil.iter_modules(__path__)
}
"""By name, in the order of names."""
