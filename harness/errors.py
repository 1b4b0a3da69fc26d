"""The one kind of error that is the user's to mend."""


class ConfigError(ValueError):
    """What is wrong, the values and what to change, in one sentence; raised before anything starts."""
