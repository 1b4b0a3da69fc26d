"""Each fact has one home, and the script that counts them sees those that have two."""

from __future__ import annotations

import ast

import house
import pytest


@pytest.mark.parametrize("count", house.counts(), ids=lambda count: count.what)
def test_a_fact_is_said_once(count: house.Count) -> None:
    assert len(count.places) <= count.most, count.places


@pytest.mark.parametrize(
    ("wanted", "code"),
    [
        (house.rewrites_the_instruction_map, "engine._INSTRUCTION_MAP = {}"),
        (house.rewrites_the_instruction_map, "engine._INSTRUCTION_MAP[ForwardPass] = act"),
        (house.counts_micro_batches, "micro_batch = seen[kind]"),
        (house.counts_micro_batches, "self.micro_batch = next(numbers) % m"),
        (house.counts_micro_batches, "micro_batch = self._forwards % m"),
        (house.counts_micro_batches, "self._micro_batch += 1"),
        (house.counts_micro_batches, "for micro_batch, x in enumerate(data): pass"),
        (house.rewrites_the_instruction_map, "setattr(engine, '_INSTRUCTION_MAP', {})"),
        (house.rewrites_the_instruction_map, "engine._INSTRUCTION_MAP.update(x)"),
        (house.names_a_private_thing_of_deepspeed, "engine._exec_schedule(x)"),
        (house.imports_deepspeed, "import_module('deepspeed')"),
        (house.compares_families, "{'gpt2': 1}[model.family]"),
        (house.compares_families, "match model.family:\n    case 'gpt2': pass"),
        (house.compares_families, "model.family == 'gpt2'"),
        (house.compares_families, "model.get('family') in ('gpt2', 'llama')"),
        (house.imports_deepspeed, "import deepspeed.comm as dist"),
        (house.imports_deepspeed, "from deepspeed.runtime import pipe"),
        (house.table_by_precision, "{'fp32': torch.float32, 'bf16': torch.bfloat16}"),
        (house.table_by_precision, "{'fp32': 4, 'bf16': 2}"),
        (house.calls("max_memory_allocated"), "torch.cuda.max_memory_allocated()"),
        (house.defines("IGNORE_INDEX"), "IGNORE_INDEX = -100"),
    ],
)
def test_a_second_home_would_be_seen(wanted: object, code: str) -> None:
    assert callable(wanted)
    assert any(map(wanted, ast.walk(ast.parse(code))))
    assert not any(map(wanted, ast.walk(ast.parse("micro_batch, family = instruction.micro_batch, model.name"))))


def test_a_circle_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = {
        "harness/a.py": "from harness import b",
        "harness/b.py": "import harness.c",
        "harness/c.py": "if TYPE_CHECKING:\n    from harness.a import y",
        "harness/d.py": "import harness.a",
    }
    monkeypatch.setattr(house, "trees", lambda: {path: ast.parse(code) for path, code in made_up.items()})
    assert house.circles() == ["harness.a", "harness.b", "harness.c"]
