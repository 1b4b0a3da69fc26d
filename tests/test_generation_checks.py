"""What can't be generated with is refused before anything starts, with one sentence; what can be is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import make_config

from harness.errors import ConfigError
from harness.spec.config import Generate, RunConfig
from harness.spec.generation import check_generation

REFUSED = [
    ("model=bert_tiny data=synthetic", "predicts the next token, not model.family=bert with train.objective=masked"),
    ("parallel.dp=2", "parallel.dp=2 replicas share no work of task=generate; use parallel.dp=1"),
    ("parallel.tp=2 parallel.sequence_parallel=true", "parallel.sequence_parallel=true is for training"),
    ("parallel.engine=torch", "parallel.engine=torch only trains; leave parallel.engine at deepspeed"),
    ("parallel.pp=2 parallel.schedule=interleaved", "has parallel.num_chunks=2 parts of the model on each stage"),
    ("generate.top_k=257", "generate.top_k=257 exceeds model.vocab_size=256; use 0"),
    ("generate.stop_tokens=[3,256]", "has the token 256, but model.vocab_size=256"),
    ("generate.stop_strings=[a,'']", "has an empty text"),
    ("generate.num_groups=9", "generate.num_groups=9 exceeds generate.batch_size=8; use 8 or less"),
    ("generate.prefill_batch_size=3 generate.batch_size=2", "prefill_batch_size=3 exceeds generate.batch_size=2"),
    ("generate.prompt=a generate.num_requests=2", "random prompts, but generate.prompt gives others"),
    ("generate.prompts_file=a generate.num_requests=2", "random prompts, but generate.prompts_file gives others"),
    ("generate.prompt_length=1024", "no position for a new token at model.max_position_embeddings=1024; use 1023"),
    ("generate.output=nowhere/a.jsonl", "can't be written, as there is no folder nowhere; make it"),
    ("generate.output=a.jsonl", "generate.output='a.jsonl' is for what follows prompts, and there are none"),
    ("generate.output=.", "generate.output='.' is a folder; give a file in it"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "sentence"), REFUSED)
def test_what_is_refused(overrides: str, sentence: str) -> None:
    make_config(*overrides.split())  # as a training it is fine
    with pytest.raises(ConfigError) as caught:
        make_config("task=generate", *overrides.split())
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        "parallel.tp=2 parallel.pp=2",
        "generate.top_k=256 generate.top_p=0.5 generate.temperature=0.0",
        "generate.stop_tokens=[255] generate.num_groups=8 generate.prefill_batch_size=8",
        "generate.prompt_length=1023 generate.num_requests=3",
        "generate.prompt_length=1024 generate.prompt=a",
        "generate.max_new_tokens=1000 generate.output=generated.jsonl generate.prompt=a",
    ],
)
def test_what_is_not(overrides: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert make_config("task=generate", *overrides.split()).task == "generate"


def with_output(output: Path, prompts_file: Path | None = None) -> RunConfig:
    settings = Generate(output=str(output), prompts_file=None if prompts_file is None else str(prompts_file))
    return make_config("task=generate").model_copy(update={"generate": settings})


def test_prompts_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    file = tmp_path / "prompts.jsonl"
    with pytest.raises(ConfigError, match=r"is generate.prompts_file, which would be lost; give another file"):
        check_generation(with_output(tmp_path / "link" / file.name, file))
    check_generation(with_output(tmp_path / "other.jsonl", file))


def test_a_place_that_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("os.access", lambda path, mode: asked.append(path))  # root may write everywhere
    (tmp_path / "there").touch()
    for name, place in {"new": tmp_path, "there": tmp_path}.items():
        with pytest.raises(ConfigError, match=r"can't be written \(permission denied\); give a file where you can"):
            check_generation(with_output(tmp_path / name))
        assert asked.pop() == place


def test_a_cache_that_no_memory_holds() -> None:
    """8 GiB: of gpt2_tiny a position of a sequence takes 4 layers x 2 x 256 x 4 bytes, a slot 128 of them."""
    fits = 8 * 2**30 // (4 * 2 * 256 * 4 * 128)
    assert make_config("task=generate", f"generate.batch_size={fits}").generate.batch_size == fits
    with pytest.raises(ConfigError, match=rf"batch_size={fits + 1} sequences take 8.0 GiB, and this machine has 8.0"):
        make_config("task=generate", f"generate.batch_size={fits + 1}")
    for given in ("parallel.tp=2", "parallel.pp=2"):  # shared, not less
        with pytest.raises(ConfigError, match="smaller batch"):
            make_config("task=generate", f"generate.batch_size={fits + 1}", given)
    make_config("task=generate", f"generate.batch_size={fits + 1}", "generate.num_requests=8")
