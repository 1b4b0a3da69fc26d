"""Where the processes of a run are started: the table of backends, from which `launch.backend` names one."""

from __future__ import annotations

from harness.errors import ConfigError
from harness.launch.backends.base import Backend
from harness.launch.backends.local import Local
from harness.spec.config import RunConfig

BACKENDS: dict[str, Backend] = {"local": Local()}
"""Name -> backend; an entry is all that another one needs."""


def backend_of(config: RunConfig) -> Backend:
    """The backend that a configuration names.

    Raises:
        ConfigError: there is none of that name.
    """
    name = config.launch.backend
    if name not in BACKENDS:
        raise ConfigError(f"launch.backend={name!r} is not available; choose one of {', '.join(BACKENDS)}")
    return BACKENDS[name]
