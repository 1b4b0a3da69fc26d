"""A sample of the slips of slips.py turns tests red; `python tests/slips.py` tries all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from slips import REPOSITORY, SLIPS, Slip, copied_repository, fault_of

SAMPLE = [slip for slip in SLIPS if not slip.starts_ranks][::12]


@pytest.fixture(scope="module")
def copy() -> Iterator[Path]:
    with copied_repository() as copy:
        yield copy


@pytest.mark.slow
@pytest.mark.parametrize("slip", SAMPLE, ids=lambda slip: slip.name)
def test_slip_is_noticed(slip: Slip, copy: Path) -> None:
    assert fault_of(slip, copy) is None


def test_every_slip_fits_the_code() -> None:
    assert len({slip.name for slip in SLIPS}) == len(SLIPS)
    misfits = [slip.name for slip in SLIPS if (REPOSITORY / slip.file).read_text().count(slip.right) != 1]
    assert misfits == [], "adapt tests/slips.py to the code"
