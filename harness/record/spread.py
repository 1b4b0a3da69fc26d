"""How steady the steps of a run are: warm-up that lasts, and drift. Medians throughout: one slow step says nothing."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

DEVIATION_OF_MAD = 1.4826
"""Standard deviation of normal noise over its median absolute deviation."""
ERROR_OF_MEDIAN = 1.2533
"""Standard error of a median of n values, over their standard deviation / sqrt(n)."""

SLOW_DEVIATIONS = 5
SLOW_AT_LEAST = 0.05
"""Of the steady step: less is no warm-up."""
DRIFT_ERRORS = 4
FEWEST_PER_THIRD = 6
"""With these, normal noise passes for drift in 2 % of runs of 18 timed steps and in 0.6 % of runs of 30."""
LARGE_DRIFT = 0.02
"""Worth a word to the user."""


def detect_warmup(seconds: Sequence[float]) -> int | None:
    """How many steps at the beginning are slow.

    These are the steps before the first that takes no more than the steady step and 5 standard deviations or 5 %,
    both from the median and the median absolute deviation of the last half.

    Args:
        seconds: of all steps of one launch.

    Returns:
        Fewer than three quarters of the steps; None for fewer than 6 steps.
    """
    if len(seconds) < 6:
        return None
    steady = seconds[len(seconds) // 2 :]
    level = median(steady)
    limit = level + max(SLOW_DEVIATIONS * _deviation(steady, level), SLOW_AT_LEAST * level)
    return next(number for number, value in enumerate(seconds) if value <= limit)


def drift(seconds: Sequence[float]) -> float | None:
    """Change of the median step from the first to the last third of a run, as a share; 0 where noise explains it.

    Noise is 4 standard errors of the difference of two medians, from the absolute deviations inside the thirds.

    Args:
        seconds: of the timed steps.

    Returns:
        0.1 when steps became a tenth slower; None for fewer than 18 steps.
    """
    third = len(seconds) // 3
    if third < FEWEST_PER_THIRD:
        return None
    first, last = seconds[:third], seconds[-third:]
    before, after = median(first), median(last)
    deviation = _deviation([value - before for value in first] + [value - after for value in last], 0.0)
    noise = DRIFT_ERRORS * ERROR_OF_MEDIAN * deviation * (2 / third) ** 0.5
    return after / before - 1 if abs(after - before) > noise else 0.0


def _deviation(values: Sequence[float], center: float) -> float:
    """Standard deviation of normal noise with the same median absolute deviation."""
    return DEVIATION_OF_MAD * median(abs(value - center) for value in values)
