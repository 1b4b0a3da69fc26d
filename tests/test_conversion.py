"""Weights in and out: what came in goes out as it was, what was trained goes where it came from, nothing by halves."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import MACHINE, compose_raw
from helpers_pretrained import FAMILIES, loaded, reference_of, save_reference
from references import MODELS
from safetensors.torch import load_file, save_file
from states import to_transformers
from torch import Tensor

from harness.checkpoints import META, FileRecord, checksum, directory_of, find_checkpoint, read_meta, verify_files
from harness.errors import ConfigError
from harness.record.store import Attempt, write_json
from harness.run import conversion
from harness.run.carried import keep_beginning
from harness.run.checkpoint import load_checkpoint, save_checkpoint
from harness.run.conversion import export_weights, import_weights, main
from harness.run.engines.engine import build_engine
from harness.run.engines.torch.engine import TorchEngine
from harness.run.tasks import train as train_module
from harness.spec.config import REPOSITORY, RunConfig
from harness.spec.identity import identity
from harness.spec.initial_weights import weights_fingerprint
from harness.spec.resolve import load_config
from harness.spec.transformers_config import read_shape

SIZES = ["train.sequence_length=8", "train.global_batch_size=4", "train.micro_batch_size=2", "data.kind=synthetic",
         "train.steps=9", "train.warmup_steps=1", "parallel.engine=torch"]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module", autouse=True)
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Checkpoints of trainings are written by ranks; this process is the only one."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file in fp32, several in bf16, and all that a folder can hold besides; imported beside them."""
    made = {}
    for family, name in FAMILIES.items():
        for kind, size, dtype in (("", "1GB", torch.float32), (" sharded", "20KB", torch.bfloat16)):
            folder = tmp_path_factory.mktemp(family) / "saved"
            save_reference(folder, name, size, dtype=dtype)
            (folder / "tokenizer.json").write_text('{"version": "1.0"}')
            (folder / "assets").mkdir()
            (folder / "assets" / "merges.txt").write_bytes(b"\xff\x00 no text")
            made[family + kind] = folder
    made["bert full"] = _with_extras(made["bert"], made["bert"].with_name("full"))
    made["gpt2 old"] = _old_gpt2(made["gpt2"], made["gpt2"].with_name("old"))
    for name, folder in made.items():
        import_weights(folder, folder.with_name(f"{folder.name} imported"))
        assert name
    return made


def _with_extras(folder: Path, target: Path) -> Path:
    """BERT with pooler, next-sentence head, a buffer of integers, copies of tied weights and old names of norms."""
    shutil.copytree(folder, target)
    state = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
        for name, tensor in load_file(target / "model.safetensors").items()
    }
    state |= {
        "bert.pooler.dense.weight": torch.randn(32, 32),
        "cls.seq_relationship.bias": torch.randn(2).half(),
        "bert.embeddings.position_ids": torch.arange(16).view(1, 16),
        "cls.predictions.decoder.weight": state["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": state["cls.predictions.bias"].clone(),
    }
    save_file(state, target / "model.safetensors", metadata={"format": "pt", "made": "by hand"})
    return target


def _old_gpt2(folder: Path, target: Path) -> Path:
    """GPT-2 without its prefix, with causal masks, a copy of the head, three types, and the old word for them."""
    shutil.copytree(folder, target)
    state = {
        name.removeprefix("transformer."): tensor.bfloat16() if "mlp" in name else tensor
        for name, tensor in load_file(target / "model.safetensors").items()
    }
    state["ln_f.weight"] = state["ln_f.weight"].half()
    state |= {
        "h.0.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.uint8),
        "lm_head.weight": state["wte.weight"].clone(),
    }
    save_file(state, target / "model.safetensors")
    settings = json.loads((target / "config.json").read_text())
    settings["torch_dtype"] = settings.pop("dtype")
    (target / "config.json").write_text(json.dumps(settings))
    return target


def imported(folder: Path) -> Path:
    return folder.with_name(f"{folder.name} imported")


def state_of(folder: Path) -> dict[str, Tensor]:
    """By `safetensors` alone."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def load(*overrides: str) -> RunConfig:
    return load_config(compose_raw(*SIZES, *overrides), MACHINE)


def trained(folder: Path, *overrides: str, step: int = 4) -> tuple[Path, TorchEngine]:
    """The checkpoint of a training, whose optimizer made every weight another one, and who wrote it."""
    config = load(*overrides)
    engine = TorchEngine(config, lambda _: 0.0)
    if config.train.resume is not None:
        load_checkpoint(Path(config.train.resume), engine, config, None)
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for _, parameter in engine.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    save_checkpoint(folder, engine, config, step, None)
    return directory_of(folder, step), engine


CASES = [*FAMILIES, *(f"{family} sharded" for family in FAMILIES), "bert full", "gpt2 old"]


# --- what was not trained


@pytest.mark.parametrize("case", CASES)
def test_what_came_in_goes_out_byte_by_byte(folders: dict[str, Path], case: str, tmp_path: Path) -> None:
    export_weights(imported(folders[case]), tmp_path / "out")
    before, after = contents(folders[case]), contents(tmp_path / "out")
    manifest = json.loads(after.pop("manifest.json"))
    assert after == before
    digests = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    assert digests == {name: hashlib.sha256(content).hexdigest() for name, content in after.items()}
    for name, tensor in state_of(tmp_path / "out").items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert manifest["tensors"][name]["sha256"] == hashlib.sha256(raw).hexdigest(), name
    assert manifest["tensors"].keys() == state_of(tmp_path / "out").keys()
    assert json.loads((imported(folders[case]) / "transformers" / "manifest.json").read_text()) == manifest


@pytest.mark.parametrize("case", CASES)
def test_an_import_is_a_checkpoint(folders: dict[str, Path], case: str) -> None:
    checkpoint = imported(folders[case])
    meta = read_meta(checkpoint)
    verify_files(checkpoint, meta)
    assert set(meta.files) == {name for name in contents(checkpoint) if name != META}
    assert (meta.step, meta.config.train) == (0, {})
    config = load(f"model.weights={checkpoint}")
    assert config.model.model_dump(exclude={"name", "weights", "initializer_range"}) == load(
        f"model.weights={folders[case]}"
    ).model.model_dump(exclude={"name", "weights", "initializer_range"})
    assert identity(config, "data") != identity(load(f"model.weights={folders[case]}"), "data")


def test_imported_weights_are_no_training_to_go_on_with(folders: dict[str, Path]) -> None:
    checkpoint = imported(folders["llama"])
    with pytest.raises(ConfigError, match=r"train.resume='.*' holds weights only, .* use model.weights="):
        load(f"train.resume={checkpoint}")


def test_an_export_can_be_imported_again(folders: dict[str, Path], tmp_path: Path) -> None:
    export_weights(imported(folders["gpt2 old"]), tmp_path / "out")
    import_weights(tmp_path / "out", tmp_path / "again")
    export_weights(tmp_path / "again", tmp_path / "twice")
    assert contents(tmp_path / "twice") == contents(tmp_path / "out")


def test_checkpoints_in_a_folder_stay_behind(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["llama"], saved := tmp_path / "saved")
    (saved / "sub").mkdir()
    for name in ("manifest.json", "meta.json"):  # whatever they are, there
        (saved / "sub" / name).write_text("[1]")
    before = contents(saved)
    for name in ("first", "second"):
        import_weights(saved, saved / name)
    assert not [name for name in read_meta(saved / "second").files if "first" in name]
    export_weights(saved / "second", tmp_path / "out")
    after = contents(tmp_path / "out")
    assert after.pop("manifest.json")
    assert after == before


def test_a_manifest_of_somebody_elses_is_not_replaced(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["llama"], saved := tmp_path / "saved")
    (saved / "manifest.json").write_text('{"icons": []}')
    with pytest.raises(ConfigError, match=r"saved/manifest.json is none that an export left, .*; move it elsewhere"):
        import_weights(saved, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"saved/manifest.json is none that an export left"):
        keep_beginning(load(f"model.weights={saved}"), tmp_path / "run")


# --- what was trained


@pytest.mark.parametrize("origin", ["folder", "checkpoint"])
@pytest.mark.parametrize("case", CASES)
def test_trained_weights_go_where_they_came_from(
    folders: dict[str, Path], case: str, origin: str, tmp_path: Path
) -> None:
    source = folders[case] if origin == "folder" else imported(folders[case])
    checkpoint, engine = trained(tmp_path / "run/checkpoints", f"model.weights={source}")
    verify_files(checkpoint, read_meta(checkpoint))
    manifest = json.loads((checkpoint / "transformers" / "manifest.json").read_text())
    assert {entry["sha256"] for entry in manifest["tensors"].values()} == {None}
    assert {name for name, entry in manifest["files"].items() if entry["sha256"] is None} == {
        file.name for file in folders[case].glob("*.safetensors")
    }
    export_weights(tmp_path / "run", tmp_path / "out")
    before, after = contents(folders[case]), contents(tmp_path / "out")
    assert after.keys() == before.keys() | {"manifest.json"}
    assert all(after[name] == before[name] for name in before if not name.endswith(".safetensors"))
    old, new = state_of(folders[case]), state_of(tmp_path / "out")
    assert {name: (t.dtype, t.shape) for name, t in new.items()} == {
        name: (t.dtype, t.shape) for name, t in old.items()
    }
    carried = ("pooler", "seq_relationship", "position_ids", ".attn.bias")
    unused = {name for name in old if any(part in name for part in carried)}
    assert {name for name in old if torch.equal(old[name], new[name])} == unused
    expected = to_transformers(
        {name: parameter.detach() for name, parameter in engine.parameters()}, engine.config.model
    )
    for name in new.keys() - unused:
        now = name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")
        now = COPIES.get(now, now) if COPIES.get(now, "") in {*expected, *new} else now
        value = expected[now if now in expected else f"transformer.{now}"]
        assert torch.equal(new[name], value.to(old[name].dtype)), name


COPIES = {
    "lm_head.weight": "wte.weight",
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


@pytest.mark.parametrize("began", ["from a folder", "fresh"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same(folders: dict[str, Path], family: str, began: str, tmp_path: Path) -> None:
    if began == "fresh":
        model = MODELS[FAMILIES[family]].model_dump(exclude={"name", "weights", "causal", "rope_scaling"})
        overrides = [f"++model.{key}={'null' if value is None else value}" for key, value in model.items()]
    else:
        overrides = [f"model.weights={folders[family]}"]
    _, engine = trained(tmp_path / "run/checkpoints", *overrides)
    assert engine.config.model.model_dump(exclude={"name", "weights", "initializer_range"}) == MODELS[
        FAMILIES[family]
    ].model_dump(exclude={"name", "weights", "initializer_range"})
    export_weights(tmp_path / "run", tmp_path / "out")
    reference, wrong = loaded(tmp_path / "out")
    assert wrong == []
    assert type(reference).__name__ == type(reference_of(FAMILIES[family])).__name__
    tokens = torch.randint(53, (2, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = engine.model.eval()(tokens)[..., :53], reference(tokens).logits
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_scaled_rotary_positions_go_out(tmp_path: Path) -> None:
    save_reference(tmp_path / "saved", "llama scaled")
    trained(tmp_path / "run", f"model.weights={tmp_path / 'saved'}")
    checkpoint = find_checkpoint(str(tmp_path / "run"))
    shutil.rmtree(checkpoint / "transformers")  # as if it had begun fresh
    meta = read_meta(checkpoint)
    kept = {name: record for name, record in meta.files.items() if "/" not in name}
    write_json(checkpoint / META, meta.model_copy(update={"files": kept}).model_dump())
    export_weights(tmp_path / "run", tmp_path / "out")
    written, before = (read_shape(tmp_path / folder / "config.json")[0] for folder in ("out", "saved"))
    assert written | {"name": ""} == before | {"name": ""}
    assert written["rope_scaling"] == MODELS["llama scaled"].rope_scaling.model_dump()


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "MOST_SHARD_BYTES", 20_000)
    trained(tmp_path / "run", "model=gpt2_tiny", "model.hidden_size=32", "model.num_hidden_layers=2")
    export_weights(tmp_path / "run", tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    number = len(files)
    assert [file.name for file in files] == [f"model-{k + 1:05d}-of-{number:05d}.safetensors" for k in range(number)]
    assert number > 2
    assert all(sum(t.nbytes for t in load_file(f).values()) <= 20_000 or len(load_file(f)) == 1 for f in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state_of(tmp_path / "out").values())
    _, wrong = loaded(tmp_path / "out")
    assert wrong == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["llama sharded", "gpt2 old", "fresh"])
def test_another_type(folders: dict[str, Path], case: str, dtype: str, tmp_path: Path) -> None:
    if case == "fresh":
        trained(tmp_path / "run", "model=gpt2_tiny", "model.hidden_size=32")
    checkpoint = tmp_path / "run" if case == "fresh" else imported(folders[case])
    export_weights(checkpoint, tmp_path / "plain")
    export_weights(checkpoint, tmp_path / "out", dtype)
    plain, out = state_of(tmp_path / "plain"), state_of(tmp_path / "out")
    assert out.keys() == plain.keys()
    for name, tensor in out.items():
        kept = name == "h.0.attn.bias"
        assert torch.equal(tensor, plain[name] if kept else plain[name].to(getattr(torch, dtype))), name
    settings = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("plain", "out")]
    assert ("torch_dtype" in settings[0]) == (case == "gpt2 old")
    settings[0].pop("torch_dtype", None)
    assert settings[1] == settings[0] | {"dtype": dtype}
    if (tmp_path / "out" / "model.safetensors.index.json").exists():
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in out.values())


# --- going on with a training that began from weights


def test_resumed_trainings_carry_along_what_they_began_from(folders: dict[str, Path], tmp_path: Path) -> None:
    origin = f"model.weights={folders['bert full']}"
    first, _ = trained(tmp_path / "first", origin)
    second, _ = trained(tmp_path / "second", origin, f"train.resume={first}", step=6)
    third, engine = trained(
        tmp_path / "third", "model=hf", f"model.path={second / 'transformers'}", f"train.resume={second}", step=7
    )
    assert engine.config.model.weights is None
    assert {read_meta(path).config.began_from for path in (first, second, third)} == {
        weights_fingerprint(str(folders["bert full"]))
    }
    export_weights(third, tmp_path / "out")
    assert contents(tmp_path / "out").keys() == contents(folders["bert full"]).keys() | {"manifest.json"}


def test_later_checkpoints_need_no_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["llama"], tmp_path / "saved")
    first, engine = trained(tmp_path / "run", f"model.weights={tmp_path / 'saved'}")
    shutil.rmtree(tmp_path / "saved")
    save_checkpoint(tmp_path / "run", engine, engine.config, 5, None)
    second = read_meta(directory_of(tmp_path / "run", 5))
    assert second.config.began_from == read_meta(first).config.began_from == weights_fingerprint(str(folders["llama"]))
    files = [contents(path / "transformers") for path in (first, directory_of(tmp_path / "run", 5))]
    assert files[0] == files[1]


def test_a_training_needs_its_folder_until_its_first_step(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands there later is not what it began from."""
    shutil.copytree(folders["bert full"], saved := tmp_path / "saved")

    def build(*arguments: Any, **named: Any) -> Any:
        engine = build_engine(*arguments, **named)
        for file in saved.glob("*.*"):
            file.write_bytes(b"changed")
        return engine

    monkeypatch.setattr(train_module, "build_engine", build)
    attempt = Attempt(tmp_path / "attempt-1")
    attempt.path.mkdir()
    config = load(f"model.weights={saved}", "train.steps=3", "train.checkpoint_interval=2")
    train_module.train(attempt, config, rank=0)
    checkpoint = find_checkpoint(str(attempt.path))
    assert read_meta(checkpoint).config.began_from == weights_fingerprint(str(folders["bert full"]))
    export_weights(checkpoint, tmp_path / "out")
    before, after = contents(folders["bert full"]), contents(tmp_path / "out")
    assert {name for name in before if after[name] != before[name]} == {"model.safetensors"}
    name = "bert.pooler.dense.weight"
    assert torch.equal(state_of(tmp_path / "out")[name], state_of(folders["bert full"])[name])


def test_resuming_beside_other_weights_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    checkpoint, _ = trained(tmp_path / "run", f"model.weights={folders['llama']}")
    moved = tmp_path / "moved" / "saved"
    shutil.copytree(folders["llama"], moved)
    load(f"model.weights={moved}", f"train.resume={checkpoint}")
    state = load_file(moved / "model.safetensors")
    state["model.norm.weight"] += 1
    save_file(state, moved / "model.safetensors")
    for other in (moved, imported(folders["llama"])):
        with pytest.raises(ConfigError, match=r"began from other weights than model.weights; leave model.weights out"):
            load(f"model.weights={other}", f"train.resume={checkpoint}")
    fresh, _ = trained(tmp_path / "fresh", "model=gpt2_tiny", "model.hidden_size=32")
    with pytest.raises(ConfigError, match="began from other weights"):
        load(f"model.weights={folders['gpt2']}", f"train.resume={fresh}")


def test_weights_alone_begin_at_step_0(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of a training's checkpoint: without its optimizer, in another shape than the configuration's."""
    checkpoint, engine = trained(tmp_path / "run/attempt-1/checkpoints", f"model.weights={folders['qwen3']}")
    config = load("model=gpt2_tiny", f"model.weights={tmp_path / 'run'}")
    assert config.model.weights == str(checkpoint)
    began = TorchEngine(config, lambda _: 0.0)
    assert (began.steps_taken, began.optimizer.state) == (0, {})
    after = dict(engine.parameters())
    assert all(torch.equal(parameter, after[name]) for name, parameter in began.parameters())
    (checkpoint / "__0_0.distcp").write_bytes(b"cut")
    with pytest.raises(ConfigError, match="the checkpoint is damaged"):
        load(f"model.weights={checkpoint}")
    (checkpoint / "__0_0.distcp").unlink()
    with pytest.raises(ConfigError, match=r"the checkpoint is damaged: .* is missing"):
        load(f"model.weights={checkpoint}")


# --- what is refused, and what it leaves


def test_a_copy_that_differs_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["gpt2 old"], tmp_path / "saved")
    state = load_file(tmp_path / "saved" / "model.safetensors")
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    save_file(state, tmp_path / "saved" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lm_head.weight differs from wte.weight, .* mend tie_word_embeddings"):
        import_weights(tmp_path / "saved", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"lm_head.weight differs from wte.weight, .* mend tie_word_embeddings"):
        load(f"model.weights={tmp_path / 'saved'}")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    state["lm_head.weight"] = state["wte.weight"].clone()
    save_file(state, tmp_path / "saved" / "model.safetensors")
    load(f"model.weights={tmp_path / 'saved'}")
    state["lm_head.weight"] = state["wte.weight"].bfloat16() + 1
    save_file(state, tmp_path / "saved" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lm_head.weight differs from wte.weight"):
        import_weights(tmp_path / "saved", tmp_path / "out")


def test_what_transformers_has_not_is_refused(tmp_path: Path) -> None:
    sizes = ["model.hidden_size=32", "model.num_hidden_layers=1"]
    trained(tmp_path / "encoder", "model=encoder_tiny", *sizes)
    with pytest.raises(ConfigError, match="has no counterpart in transformers"):
        export_weights(tmp_path / "encoder", tmp_path / "out")
    trained(tmp_path / "bert", "model=bert_tiny", *sizes, "train.objective=causal")
    with pytest.raises(ConfigError, match=r"was trained with train.objective=causal, for which no config.json"):
        export_weights(tmp_path / "bert", tmp_path / "out")
    masked = ("model=bert_tiny", *sizes, "train.objective=masked", "data.kind=synthetic")
    trained(tmp_path / "untied", *masked, "model.tie_word_embeddings=false")
    with pytest.raises(
        ConfigError, match=r"can't be a bert of transformers, as model.tie_word_embeddings is False and not"
    ):
        export_weights(tmp_path / "untied", tmp_path / "out")
    trained(tmp_path / "typeless", *masked, "model.type_vocab_size=0")
    with pytest.raises(
        ConfigError, match=r"can't be a bert of transformers, as model.type_vocab_size is 0, and one has"
    ):
        export_weights(tmp_path / "typeless", tmp_path / "out")
    trained(tmp_path / "gpt2", "model=gpt2_tiny", *sizes, "++model.sliding_window=4")
    with pytest.raises(ConfigError, match=r"can't be a gpt2 of transformers, which has no model.sliding_window"):
        export_weights(tmp_path / "gpt2", tmp_path / "out")
    trained(tmp_path / "emulated", "model=emulated", *sizes, "model.num_attention_heads=4")
    with pytest.raises(ConfigError, match="has no counterpart in transformers"):
        export_weights(tmp_path / "emulated", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Full(OSError):
    pass


@pytest.mark.parametrize("fails", ["import", "export"])
@pytest.mark.parametrize("at", ["weights", "other files", "the end"])
def test_a_failed_conversion_leaves_nothing(
    folders: dict[str, Path], fails: str, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {
        ("import", "weights"): (conversion, "read_part"), ("import", "other files"): (conversion, "carry"),
        ("export", "weights"): (conversion, "bytes_of"), ("export", "other files"): (conversion, "sha256_of_file"),
    }.get((fails, at), (conversion, "write_json"))  # fmt: skip
    calls, convert = list[int](), getattr(*where)

    def fail(*arguments: object, **named: object) -> object:
        calls.append(1)
        if len(calls) > (5 if at == "weights" else 0):
            raise Full(28, "No space left on device")
        return convert(*arguments, **named)

    monkeypatch.setattr(*where, fail)
    source = folders["llama"] if fails == "import" else imported(folders["llama"])
    assert main([fails, str(source), str(tmp_path / "out")]) == 2
    assert calls
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]
    monkeypatch.undo()
    assert main([fails, str(source), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("told", ["import", "export"])
def test_a_conversion_that_is_told_to_end_leaves_nothing(
    folders: dict[str, Path], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    name = "read_part" if told == "import" else "bytes_of"
    monkeypatch.setattr(conversion, name, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    source = folders["llama"] if told == "import" else imported(folders["llama"])
    with pytest.raises(SystemExit, match="143"):
        main([told, str(source), str(tmp_path / "out")])
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_killed_conversion_leaves_nothing_that_could_be_taken_for_one(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    leftovers = [tmp_path / f".out.unfinished-{pid}" for pid in (1, os.getpid())]  # ids come again
    for leftover in leftovers:
        leftover.mkdir()
        (leftover / "meta.json").write_text("{")
    (tmp_path / "out").mkdir()  # an empty folder will do
    import_weights(folders["gpt2"], tmp_path / "out")
    assert not any(leftover.exists() for leftover in leftovers)
    verify_files(tmp_path / "out", read_meta(tmp_path / "out"))


def test_conversions_to_one_target_leave_each_other_alone(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first to end has it."""
    carry, command = conversion.carry, [sys.executable, "launchers/convert.py", "import", str(folders["gpt2"])]

    def slow(*arguments: Any, **named: Any) -> None:
        carry(*arguments, **named)
        subprocess.run([*command, str(tmp_path / "out")], cwd=REPOSITORY, capture_output=True, check=True)

    monkeypatch.setattr(conversion, "carry", slow)
    with pytest.raises(ConfigError, match="out exists already"):
        import_weights(folders["llama"], tmp_path / "out")
    verify_files(tmp_path / "out", meta := read_meta(tmp_path / "out"))
    assert meta.config.model["family"] == "gpt2"
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["out"]


REFUSED = [
    (["import", "{missing}", "{new}"], "error: {missing} holds no config.json; give a folder that save_pretrained"),
    (["import", "{saved}", "{saved}"], "error: {saved} exists already; give a folder that does not, or an empty one"),
    (["export", "{imported}", "{saved}"], "error: {saved} exists already"),
    (["export", "{missing}", "{new}"], "error: CHECKPOINT_DIR='{missing}' does not exist"),
    (["export", "{saved}", "{new}"], "error: CHECKPOINT_DIR='{saved}' holds no complete checkpoint"),
    (["export", "{imported}", "{new}", "--dtype", "int8"], "invalid choice: 'int8'"),
    (["turn", "{imported}", "{new}"], "invalid choice: 'turn'"),
    (["import", "{saved}"], "the following arguments are required"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED)
def test_the_launcher_refuses(
    folders: dict[str, Path], arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"missing": tmp_path / "missing", "new": tmp_path / "new", "saved": folders["llama"],
              "imported": imported(folders["llama"])}  # fmt: skip
    try:
        status = main([argument.format(**places) for argument in arguments])
    except SystemExit as ended:  # argparse
        status = ended.code
    assert status == 2
    assert sentence.format(**places) in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_launcher_says_what_it_did(folders: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "launchers/convert.py", "import", str(folders["gpt2"]), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    num_bytes = sum(tensor.nbytes for tensor in state_of(folders["gpt2"]).values())
    assert first == f"gpt2 saved: {len(state_of(folders['gpt2']))} tensors, {num_bytes:,} bytes of weights"
    assert second.startswith(f"{tmp_path / 'out'} written in ")
    assert not done.stderr


def test_damaged_checkpoints_are_not_exported(folders: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "imported"
    shutil.copytree(imported(folders["gpt2"]), checkpoint)
    file = checkpoint / "transformers" / "config.json"
    file.write_text(file.read_text().replace("gpt2", "gpt3"))
    with pytest.raises(ConfigError, match=r"the content of .*transformers/config.json has changed"):
        export_weights(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"file": "model.safetensors"', '"file": "../../escaped.safetensors"', "is none of its .safetensors files"),
        ('"model.safetensors"', '"../../escaped.safetensors"', "is no path within a folder"),
        ('"model.safetensors"', '"/tmp/escaped.safetensors"', "is no path within a folder"),
        ('"model.safetensors"', '"sub/escaped.safetensors"', "is none of its .safetensors files"),
        ('"model.safetensors"', '"config.json"', "is none of its .safetensors files"),
    ],
)
def test_nothing_is_written_outside_of_a_target(
    folders: dict[str, Path], old: str, new: str, sentence: str, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "imported"
    shutil.copytree(imported(folders["gpt2"]), checkpoint)
    file = checkpoint / "transformers" / "manifest.json"
    file.write_text(file.read_text().replace(old, new))
    meta = read_meta(checkpoint)
    record = FileRecord(num_bytes=file.stat().st_size, crc32=checksum(file))
    changed = meta.files | {"transformers/manifest.json": record}
    write_json(checkpoint / META, meta.model_copy(update={"files": changed}).model_dump())
    with pytest.raises(ConfigError, match=rf"manifest.json is damaged \(.*{sentence}\); use another"):
        export_weights(checkpoint, tmp_path / "a/b/out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imported"]


def test_weights_in_files_of_another_name_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["llama sharded"], saved := tmp_path / "saved")
    index = saved / "model.safetensors.index.json"
    (saved / "model-00001.weights").write_bytes((first := min(saved.glob("*.safetensors"))).read_bytes())
    index.write_text(index.read_text().replace(first.name, "model-00001.weights"))
    with pytest.raises(ConfigError, match=r"names 'model-00001.weights', which is no name of a safetensors"):
        import_weights(saved, tmp_path / "out")
