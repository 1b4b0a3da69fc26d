"""docs/architectures.md says what works: each cell of its table is a test, and there are no others."""

from __future__ import annotations

import re
import subprocess
import sys

from helpers import make_config

from harness.spec.config import REPOSITORY
from harness.spec.families import FAMILIES

NAMES = [name for name, family in FAMILIES.items() if family.computes]
CELLS = {
    "train": "test_families_run.py::test_it_learns[{family}-cut]",
    "parity": "test_parity_of_families.py::test_families[{family}-layout]",
    "sequence parallelism": "test_parity_of_families.py::test_families[{family}-sequence]",
    "schedules": "test_parity_of_families.py::test_families[{family}-schedule]",
    "checkpoints": "test_families_run.py::test_it_goes_on_in_another_layout[{family}-cut]",
    "import": "test_conversion.py::test_transformers_computes_the_same[{family}-from a folder]",
    "export": "test_conversion.py::test_what_came_in_goes_out_byte_by_byte[{family}]",
    "padding": "test_documents.py::test_documents_train_as_on_their_own[padded-{family}]",
    "packing": "test_documents.py::test_documents_train_as_on_their_own[packed-{family}]",
    "generation": "test_generation.py::test_greedy_tokens_are_those_of_transformers_in_every_layout[4-{family}]",
}
ALONE = {"encoder": {"import", "export"}}
"""What a family has not: `transformers` has none of them."""


def test_the_page_names_every_family_and_what_works() -> None:
    text = (REPOSITORY / "docs" / "architectures.md").read_text()
    table = re.findall(r"^\|([^|]*)\|(.*)\|$", text[text.index("## What works") :], re.MULTILINE)
    head, _, *rows = table
    assert [cell.strip() for cell in head[1].split("|")] == list(CELLS)
    found = {name.strip(): [cell.strip() for cell in cells.split("|")] for name, cells in rows}
    assert found == {name: ["-" if column in ALONE.get(name, ()) else "yes" for column in CELLS] for name in [*found]}
    assert set(found) == set(NAMES)
    families = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", text, re.MULTILINE))
    assert set(families) == set(NAMES)
    for family, shapes in families.items():
        for shape in re.findall(r"\w+", shapes.replace(" to ", " ")):
            assert make_config(f"model={shape}").model.family == family


def test_every_cell_is_a_test() -> None:
    cells = {
        f"tests/{test.format(family=name)}"
        for name in NAMES
        for column, test in CELLS.items()
        if column not in ALONE.get(name, ())
    }
    files = sorted({cell.partition("::")[0] for cell in cells})
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    listed = subprocess.run(collect, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert sorted(cells - {*listed.splitlines()}) == []
