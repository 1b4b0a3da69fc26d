"""Folders of `save_pretrained`: what of them a rank reads, and every way in which they can be wrong."""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import MACHINE, compose_raw
from helpers_pretrained import FAMILIES, place, reference_of, save_reference
from references import MODELS, build_reference
from safetensors.torch import load_file, save_file
from states import from_transformers
from torch import Tensor

from harness.errors import ConfigError
from harness.launch.compose import compose
from harness.launch.points import data_identity
from harness.machine import peak_resident_bytes
from harness.model.assembly import build_layers
from harness.model.pretrained import read_slice
from harness.model.weights import shard
from harness.run.conversion import import_weights
from harness.run.engines.engine import Held
from harness.run.engines.torch.engine import TorchEngine
from harness.run.instruments.memory import reset_peak_memory
from harness.run.weights import fill_masters, fill_parameters
from harness.spec import pretrained as pretrained_module
from harness.spec.config import Model, RunConfig
from harness.spec.families import FAMILIES as TABLE
from harness.spec.identity import identity
from harness.spec.parameters import parameter_table
from harness.spec.pretrained import content_hash, open_pretrained
from harness.spec.resolve import load_config
from harness.spec.twin import twin_of

SIZES = ["train.sequence_length=8", "train.global_batch_size=4", "train.micro_batch_size=2", "data.kind=synthetic"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each family: one file, and with `sharded` several, the tensors in bf16."""
    made = {}
    for family, name in FAMILIES.items():
        for kind, size, dtype in (("", "1GB", torch.float32), (" sharded", "20KB", torch.bfloat16)):
            made[family + kind] = tmp_path_factory.mktemp(family) / "saved"
            save_reference(made[family + kind], name, size, dtype=dtype)
    return made


def full_state(folder: Path, model: Model) -> dict[str, Tensor]:
    """By `safetensors` alone: all of all files, whole."""
    state = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {name: tensor.float() for name, tensor in from_transformers(state, model).items()}


def load(*overrides: str) -> RunConfig:
    return load_config(compose_raw(*SIZES, *overrides), MACHINE)


# --- reading


@pytest.mark.parametrize("kind", ["", " sharded"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_reads_its_slice(folders: dict[str, Path], family: str, tp_size: int, kind: str) -> None:
    """Two key-value heads over four ranks, and a vocabulary that no number of ranks divides."""
    folder, model = folders[family + kind], MODELS[FAMILIES[family]]
    assert len(list(folder.glob("*.safetensors"))) > 1 or not kind
    full, saved = full_state(folder, model), open_pretrained(folder, model)
    for rank in range(tp_size):
        for name, spec in parameter_table(model).items():
            local = read_slice(saved, spec, rank, tp_size)
            assert local.dtype == torch.float32
            assert torch.equal(local, shard(full[name], spec, rank, tp_size)), (name, rank)


def test_no_more_is_read_than_the_slice(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what ranks share; a file is closed again before the next tensor."""
    import harness.model.pretrained as module

    model, asked, open_files = MODELS[FAMILIES["llama"]], list[Any](), list[int]()
    opened = module.safe_open

    class Watched:
        def __init__(self, *arguments: Any, **named: Any) -> None:
            self.file = opened(*arguments, **named)

        def __enter__(self) -> Any:
            open_files.append(1)
            assert len(open_files) == 1
            self.inside = self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            open_files.pop()
            self.file.__exit__(*error)

        def get_tensor(self, name: str) -> Any:
            assert "norm" in name, f"{name} is read whole"
            return self.inside.get_tensor(name)

        def get_slice(self, name: str) -> Any:
            wanted = self.inside.get_slice(name)

            class Slice:
                def __getitem__(self, index: Any) -> Any:
                    read = wanted[index]
                    asked.append((name, read.numel() / torch.Size(wanted.get_shape()).numel()))
                    return read

            return Slice()

    monkeypatch.setattr(module, "safe_open", Watched)
    saved = open_pretrained(folders["llama"], model)
    for spec in parameter_table(model).values():
        read_slice(saved, spec, 1, 2)
    assert len(asked) == 2 * 7 + 2  # q, k, v, o, gate, up, down; embedding and head
    assert all(share == (0.5 if "layers" in name else 26 / 53) for name, share in asked)


@pytest.mark.parametrize("source", ["folder", "checkpoint"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_filled_from_model_weights(
    folders: dict[str, Path], family: str, source: str, tmp_path: Path
) -> None:
    origin = folders[f"{family} sharded"]
    if source == "checkpoint":
        import_weights(origin, tmp_path / "imported")
        origin = tmp_path / "imported"
    config = load(f"model.weights={origin}")
    full = full_state(folders[f"{family} sharded"], config.model)
    for rank in range(4):
        layers = build_layers(config.model, place(rank, 4))
        with torch.no_grad():
            for parameter in layers.parameters():
                parameter.fill_(float("nan"))
        fill_parameters(layers.named_parameters(), config, place(rank, 4))
        for name, parameter in layers.named_parameters():
            spec = parameter_table(config.model)[name]
            assert torch.equal(parameter, shard(full[name], spec, rank, 4)), name
            assert parameter.tensor_model_parallel == (spec.shard_dim is not None)
            assert parameter.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_computes_what_transformers_does(folders: dict[str, Path], family: str) -> None:
    config = load(f"model.weights={folders[family]}", "parallel.engine=torch")
    engine = TorchEngine(config, lambda _: 0.0)
    tokens = torch.randint(53, (2, 8), generator=torch.Generator().manual_seed(1))
    reference = reference_of(FAMILIES[family]).eval()
    with torch.no_grad():
        ours, theirs = engine.model.eval()(tokens)[..., :53], reference(tokens).logits
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_explicit_weights_come_first(folders: dict[str, Path]) -> None:
    """Those of a parity check, say."""
    config = load(f"model.weights={folders['gpt2']}")
    layers = build_layers(config.model, place(0, 1))
    fill_parameters(
        layers.named_parameters(), config, place(0, 1), lambda n: torch.ones(parameter_table(config.model)[n].shape)
    )
    assert all((parameter == 1).all() for parameter in layers.parameters())


# --- names of older files


def rewritten(folder: Path, target: Path, rename: Callable[[str], str], added: dict[str, Tensor]) -> Path:
    """The same weights under other names, in one file."""
    shutil.copytree(folder, target)
    state = {rename(name): tensor for name, tensor in load_file(target / "model.safetensors").items()}
    save_file(state | added, target / "model.safetensors")
    return target


def old_bert_name(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


OLD = {
    "gpt2": (
        lambda name: name.removeprefix("transformer."),
        {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.1.attn.masked_bias": torch.tensor(-1e4)},
    ),
    "llama": (lambda name: name, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}),
    "bert": (
        old_bert_name,
        {
            "bert.embeddings.position_ids": torch.arange(16).view(1, 16),
            "bert.pooler.dense.weight": torch.ones(32, 32),
            "bert.pooler.dense.bias": torch.ones(32),
            "cls.seq_relationship.weight": torch.ones(2, 32),
            "cls.seq_relationship.bias": torch.ones(2),
        },
    ),
}
COPIES = {
    "gpt2": {"lm_head.weight": "transformer.wte.weight"},
    "bert": {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
             "cls.predictions.decoder.bias": "cls.predictions.bias"},
}  # fmt: skip


@pytest.mark.parametrize("family", OLD)
def test_older_files_are_understood(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    rename, added = OLD[family]
    state = load_file(folders[family] / "model.safetensors")
    copies = {copy: state[source].clone() for copy, source in COPIES.get(family, {}).items()}
    old = rewritten(folders[family], tmp_path / "old", rename, added | copies)
    model, saved = MODELS[FAMILIES[family]], open_pretrained(old, MODELS[FAMILIES[family]])
    expected = full_state(folders[family], model)
    for name, spec in parameter_table(model).items():
        assert torch.equal(read_slice(saved, spec, 0, 1), expected[name]), name
    assert set(saved.assignment.unused) == set(added)
    assert set(saved.assignment.copies) == set(copies)


# --- what is refused


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(file: Path, header: Any, rest: bytes) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + rest)


def change_state(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return spoil


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def lengthen(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"1234")


def leave_a_gap(folder: Path) -> None:
    header, rest = header_of(folder / "model.safetensors")
    last = max((e for n, e in header.items() if n != "__metadata__"), key=lambda entry: entry["data_offsets"])
    last["data_offsets"] = [offset + 4 for offset in last["data_offsets"]]
    with_header(folder / "model.safetensors", header, rest + b"1234")


def replace_by(name: str, content: bytes) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return spoil


def shard_twice(folder: Path, names: dict[str, str] | None = None, only_first: bool = False) -> None:
    """All weights in two files, or the first of them alone, and an index."""
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"][: 1 if only_first else 2]
    for file in files:
        (folder / file).write_bytes(content)
    weight_map = names or {f"tensor {file}": file for file in files}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


NORM = "model.layers.1.input_layernorm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config.json": (lambda f: (f / "config.json").unlink(), "has no config.json, which says what its weights are"),
    "a tensor missing": (
        change_state(lambda s: s.pop(NORM)),
        f"saved: the weights have no {NORM}, which a LlamaForCausalLM has; the files are not",
    ),
    "no head": (change_state(lambda s: s.pop("lm_head.weight")), "have no lm_head.weight"),
    "a tensor too much": (
        change_state(lambda s: s.update({"model.layers.2.input_layernorm.weight": torch.ones(32)})),
        r"the weights hold model.layers.2.input_layernorm.weight, which model=saved does not have",
    ),
    "another shape": (
        change_state(lambda s: s.update({NORM: torch.ones(31)})),
        rf"saved/model.safetensors: {NORM} has shape \(31,\), but its config.json makes it \(32,\)",
    ),
    "transposed": (
        change_state(lambda s: s.update({"model.layers.0.mlp.up_proj.weight": torch.ones(32, 48)})),
        r"up_proj.weight has shape \(32, 48\), but its config.json makes it \(48, 32\)",
    ),
    "another config.json": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace(": 53", ": 54")),
        r"lm_head.weight has shape \(53, 32\), but its config.json makes it \(54, 32\)|embed_tokens.weight has",
    ),
    "integers": (
        change_state(lambda s: s.update({NORM: torch.ones(32, dtype=torch.int8)})),
        f"{NORM} is of type I8, but weights are taken as F32, BF16, F16; save the model unquantized",
    ),
    "doubles": (change_state(lambda s: s.update({NORM: torch.ones(32).double()})), f"{NORM} is of type F64, but"),
    "cut": (cut, r"model.safetensors is damaged: it has [\d,]+ bytes, and its header tells of [\d,]+; copy it again"),
    "too long": (lengthen, r"model.safetensors is damaged: it has [\d,]+ bytes, and its header tells of"),
    "a gap": (leave_a_gap, r"begins at byte [\d,]+ instead of [\d,]+"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "is damaged"),
    "cut in its header": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:100]),
        r"it has 100 bytes, and its header alone would have [\d,]+",
    ),
    "no header": (lambda f: with_header(f / "model.safetensors", [1], b""), "its header is none of safetensors"),
    "sizes that contradict": (
        lambda f: with_header(
            f / "model.safetensors", {NORM: {"dtype": "F32", "shape": [32], "data_offsets": [0, 64]}}, b"0" * 64
        ),
        f"{NORM} has 64 bytes instead of 128",
    ),
    "a file of the index missing": (
        replace_by("model.safetensors.index.json", b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
        "index.json names model-00001-of-00002.safetensors, which is not there",
    ),
    "a damaged index": (replace_by("model.safetensors.index.json", b'{"weight_map": 3'), "index.json is damaged"),
    "a pickle": (
        replace_by("pytorch_model.bin", b"PK"),
        r"holds its weights as a pickle, .* AutoModel.from_pretrained\(DIR\).save_pretrained\(DIR2\)",
    ),
    "an index that leads elsewhere": (
        replace_by("model.safetensors.index.json", b'{"weight_map": {"a": "../model.safetensors"}}'),
        r"index.json names '../model.safetensors', which is no name of a safetensors file",
    ),
    "too many layers": (
        lambda f: (f / "config.json").write_text(
            (f / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1000000000')
        ),
        "have [0-9]+ tensors, which are too few for num_hidden_layers=1000000000 in config.json",
    ),
    "a tensor twice": (
        lambda f: shard_twice(f),
        "model-00002-of-00002.safetensors holds lm_head.weight, and so does model-00001-of-00002.safetensors",
    ),
    "an index of other tensors": (
        lambda f: shard_twice(f, {"a": "model-00001-of-00002.safetensors"}, only_first=True),
        "says that a is in model-00001-of-00002.safetensors, but no file has it",
    ),
    "a name twice in a header": (
        lambda f: with_header(f / "model.safetensors", b'{"a": 1, "a": 2}', b""),
        "its header is none of safetensors",
    ),
    "metadata of numbers": (
        lambda f: with_header(f / "model.safetensors", {"__metadata__": {"a": 3}}, b""),
        "header is none of safetensors",
    ),
    "a header without end": (
        lambda f: with_header(f / "model.safetensors", b"[" * 200_000, b""),
        "its header is none of safetensors",
    ),
    "sizes that are no whole numbers": (
        lambda f: with_header(
            f / "model.safetensors", {NORM: {"dtype": "F32", "shape": [32.0], "data_offsets": [0, 128]}}, b"0" * 128
        ),
        "its header is none of safetensors",
    ),
    "an unknown type": (
        lambda f: with_header(
            f / "model.safetensors", {NORM: {"dtype": "F8_E4M3", "shape": [32], "data_offsets": [0, 32]}}, b"0" * 32
        ),
        f"{NORM} is of type F8_E4M3, which is not known",
    ),
    "a tokenizer that is too large": (
        lambda f: (f / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 53}]}'),
        "tokenizer.json has the token 53, but config.json says vocab_size=53; use the tokenizer that belongs",
    ),
    "a vocabulary that is too large": (
        lambda f: (f / "vocab.txt").write_text("\n".join(map(str, range(54)))),
        "vocab.txt has the token 53",
    ),
    "nothing": (replace_by("README.md", b""), "holds neither model.safetensors nor model.safetensors.index.json"),
}


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES.values(), ids=DAMAGES)
def test_bad_folders_are_refused(
    folders: dict[str, Path], damage: Callable[[Path], object], sentence: str, tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    shutil.copytree(folders["llama"], folder)
    load(f"model.weights={folder}")
    damage(folder)
    with pytest.raises(ConfigError, match=sentence) as refused:
        load(f"model.weights={folder}")
    assert "\n" not in str(refused.value)


def test_missing_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.weights='/missing' does not exist"):
        load("model.weights=/missing")
    with pytest.raises(ConfigError, match=r"model.weights='.*' holds no complete checkpoint"):
        load(f"model.weights={tmp_path}")


# --- the shape they bring


@pytest.mark.parametrize("model", ["gpt2_tiny", "llama_tiny", "hf", "emulated", "bert_tiny"])
def test_weights_bring_their_shape(folders: dict[str, Path], model: str) -> None:
    expected = MODELS[FAMILIES["llama"]].model_dump()
    shape = load(f"model={model}", f"model.weights={folders['llama']}").model
    assert type(shape) is Model
    differing = {key for key, value in shape.model_dump().items() if value != expected[key]}
    assert differing <= {"name", "weights", "initializer_range"}
    assert (shape.name, shape.weights) == ("saved", str(folders["llama"]))


def test_how_it_is_trained_stays_with_the_configuration(folders: dict[str, Path]) -> None:
    overrides = ("model.dropout=0.25", "model.initializer_range=0.5", "model.onednn=false", "model.compile=true")
    model = load(*overrides, f"model.weights={folders['gpt2']}").model
    assert (model.dropout, model.initializer_range, model.onednn, model.compile) == (0.25, 0.5, False, True)


def test_rates_of_dropout_there_mean_nothing_here(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["gpt2"], tmp_path / "saved")
    settings = json.loads((tmp_path / "saved/config.json").read_text())
    (tmp_path / "saved/config.json").write_text(json.dumps(settings | {"attn_pdrop": 0.3, "embd_pdrop": 0.2}))
    assert load(f"model.weights={tmp_path / 'saved'}").model.dropout == 0.0


def test_direction_follows_from_the_objective(folders: dict[str, Path]) -> None:
    assert load(f"model.weights={folders['bert']}", "train.objective=causal").model.causal


@pytest.mark.parametrize(
    "override", ["model.num_hidden_layers=7", "+model.head_dim=4", "model.family=gpt2", "++model.rope_scaling=null"]
)
def test_a_shape_beside_weights_is_refused_by_name(folders: dict[str, Path], override: str) -> None:
    key = override.lstrip("+").partition("=")[0]
    for composed in (compose_raw, lambda *overrides: compose(overrides)):
        with pytest.raises(ConfigError, match=f"can't be set beside model.weights=.*; leave {key} out"):
            composed(override, f"model.weights={folders['llama']}")
        with pytest.raises(ConfigError, match=f"leave {key} out"):
            composed(f"model.weights={folders['llama']}", override)
    compose_raw("model=llama_tiny", override, "model.weights=null")


def test_the_path_becomes_absolute(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders["llama"].parent)
    assert load("model.weights=saved").model.weights == str(folders["llama"])


def test_a_parity_check_takes_random_weights(folders: dict[str, Path]) -> None:
    config = load(f"model.weights={folders['llama']}")
    assert twin_of(config).model.weights is None


def test_a_tokenizer_needs_its_vocabulary(folders: dict[str, Path]) -> None:
    config = load(f"model.weights={folders['llama']}", "data.kind=text")
    with pytest.raises(ConfigError, match=r"model.vocab_size=53 is smaller than the 256 ids of the tokenizer"):
        data_identity(config)


# --- what names a point


def test_identity_follows_the_content(folders: dict[str, Path], tmp_path: Path) -> None:
    config = load(f"model.weights={folders['llama']}")
    shutil.copytree(folders["llama"], tmp_path / "moved" / "saved")
    moved = tmp_path / "moved" / "saved"
    assert identity(load(f"model.weights={moved}"), "data") == identity(config, "data")
    fresh = config.model_copy(update={"model": config.model.model_copy(update={"weights": None})})
    assert identity(fresh, "data") != identity(config, "data")
    content = bytearray((moved / "model.safetensors").read_bytes())
    content[-1] ^= 1
    before, digest = (moved / "model.safetensors").stat(), content_hash(moved)
    (moved / "model.safetensors").write_bytes(content)
    os.utime(moved / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))  # as if it were the same file
    assert content_hash(moved) != digest
    assert identity(load(f"model.weights={moved}"), "data") != identity(config, "data")


def test_the_content_is_hashed_once(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, hashed = folders["llama sharded"], list[Path]()
    compute = pretrained_module.sha256_of
    monkeypatch.setattr(pretrained_module, "sha256_of", lambda file: hashed.append(file) or compute(file))
    digest = content_hash(folder)
    files = 1 + len(list(folder.glob("*.safetensors")))
    assert content_hash(folder) == digest
    assert len(hashed) == files
    (entry,) = (tmp_path / "cache/shardwright/weights").iterdir()
    for damaged in ("", "xyz", digest[:-2]):
        entry.write_text(damaged)
        assert content_hash(folder) == digest
        assert entry.read_text() == digest
    assert len(hashed) == 4 * files
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # can't be written
    assert content_hash(folder) == digest


def test_every_family_says_how_it_is_exchanged() -> None:
    for name, family in TABLE.items():
        if (written := family.transformers) is not None:
            assert written.class_name, name
            table = parameter_table(MODELS[FAMILIES[name]])
            assert set(written.tied.values()) <= set(table), name


@pytest.mark.parametrize("source", ["folder", "checkpoint"])
def test_masters_are_filled_in_full_precision(folders: dict[str, Path], source: str, tmp_path: Path) -> None:
    """As ZeRO holds them: one flat tensor for the second half of every parameter, which is itself rounded."""
    origin = folders["llama"]
    if source == "checkpoint":
        import_weights(origin, tmp_path / "imported")
        origin = tmp_path / "imported"
    config, full = load(f"model.weights={origin}"), full_state(folders["llama"], MODELS[FAMILIES["llama"]])
    table = parameter_table(config.model)
    local = {name: shard(full[name], spec, 1, 2) for name, spec in table.items()}
    halves = {name: tensor.numel() // 2 for name, tensor in local.items()}
    flat = torch.full((7 + sum(tensor.numel() - halves[name] for name, tensor in local.items()),), float("nan"))
    held, first = {}, 7
    for name, tensor in local.items():
        held[name] = Held(flat, first, halves[name], tensor.numel() - halves[name])
        first += held[name].length
    engine: Any = SimpleNamespace(
        config=config,
        tp=place(1, 2),
        parameters=lambda: ((name, tensor.bfloat16()) for name, tensor in local.items()),
        held=lambda tied_copies: held.items(),
    )
    fill_masters(engine)
    assert flat[:7].isnan().all()
    assert torch.equal(flat[7:], torch.cat([tensor.reshape(-1)[halves[name] :] for name, tensor in local.items()]))


@pytest.mark.parametrize("source", ["folder", "checkpoint"])
def test_filling_holds_two_tensors_beside_the_slice(source: str, tmp_path: Path) -> None:
    """Of 100 MB in 8 blocks a rank of two fills 50, and the largest tensor has 4."""
    transformers: Any = importlib.import_module("transformers")
    shape = transformers.GPT2Config(n_layer=8, n_embd=512, n_head=8, vocab_size=60, n_positions=16)
    transformers.GPT2LMHeadModel(shape).save_pretrained(tmp_path / "saved")
    origin = tmp_path / "saved"
    if source == "checkpoint":
        import_weights(origin, tmp_path / "imported")
        origin = tmp_path / "imported"
    config = load(f"model.weights={origin}")
    largest = 4 * max(spec.size for spec in parameter_table(config.model).values())
    gc.collect()
    reset_peak_memory()
    before = peak_resident_bytes()
    layers = build_layers(config.model, place(1, 2))
    fill_parameters(layers.named_parameters(), config, place(1, 2))
    own = sum(parameter.nbytes for parameter in layers.parameters())
    assert 45e6 < own < 55e6
    assert peak_resident_bytes() - before < own + 2 * largest + 8e6  # what the allocator keeps


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_without_its_head_has_names_without_a_prefix(tmp_path: Path, family: str) -> None:
    """As a `LlamaModel` is saved; a tied head is the embedding."""
    from safetensors.torch import load_file, save_file

    model = MODELS["llama tied" if family == "llama" else "gpt2"]
    build_reference(model).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    prefix = {"llama": "model.", "gpt2": "transformer."}[family]
    assert all(name.startswith(prefix) for name in state)
    before = open_pretrained(tmp_path, model).assignment.sources
    save_file({name.removeprefix(prefix): tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    after = open_pretrained(tmp_path, model).assignment.sources
    assert after == {ours: [name.removeprefix(prefix) for name in theirs] for ours, theirs in before.items()}
