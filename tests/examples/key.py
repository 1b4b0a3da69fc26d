"""A configuration key that comes later: a field with a default, as its section in harness/spec/config.py has it."""

from harness.spec import config


class Parallel(config.Parallel):
    """The section, with one key more."""

    cp: int = 1
    """Ranks that share a sequence."""
