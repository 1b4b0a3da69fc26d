"""Corpus: tokens of the right text, cached once, refused with a sentence; samples that depend on nothing else."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from harness import corpus as module
from harness.corpus import Corpus, document_lengths, draw, load_tokens, prepare_corpus, sample_start
from harness.errors import ConfigError
from harness.spec.config import Data


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shardwright" / "tokens"


def data(path: Path | str | None = None, kind: str = "text", tokenizer: Path | str = "bytes") -> Data:
    fields = {"kind": kind, "path": None if path is None else str(path), "tokenizer": str(tokenizer)}
    return Data.model_validate({**fields, "hub_split": "train", "hub_column": "text"})


def text_of(corpus: Corpus) -> str:
    assert corpus.path is not None
    return bytes(load_tokens(corpus.path).astype(np.uint8)).decode()


@pytest.fixture
def story(tmp_path: Path) -> Path:
    file = tmp_path / "story.txt"
    file.write_text("Ein Käfer läuft über die Straße. " * 40, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 60 ids as `save_pretrained` writes it, without transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<end>"], show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 5], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


# --- which text


def test_default_text_is_the_documentation_of_cpython() -> None:
    corpus = prepare_corpus(data(), 256, 128)
    assert text_of(corpus) == "\n\n".join(topics[key] for key in sorted(topics))
    assert corpus.num_tokens > 400_000
    assert "pydoc_data.topics" in corpus.description
    assert "sha256" in corpus.description


def test_file_folder_and_glob(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name, content in {"b.txt": "second", "a.txt": "first", "inner/c.md": "third", ".git/x": "hidden"}.items():
        (folder / name).write_text(content)
    assert text_of(prepare_corpus(data(folder / "b.txt"), 256, 4)) == "second"
    assert text_of(prepare_corpus(data(folder), 256, 4)) == "first\n\nsecond\n\nthird"
    assert text_of(prepare_corpus(data(folder / "*.txt"), 256, 4)) == "first\n\nsecond"
    assert text_of(prepare_corpus(data(folder / "**/*.md"), 256, 4)) == "third"


def test_fingerprint_is_of_the_content(story: Path, tmp_path: Path) -> None:
    corpus = prepare_corpus(data(story), 256, 8)
    moved = story.rename(tmp_path / "other name.txt")
    assert prepare_corpus(data(moved), 300, 9).fingerprint == corpus.fingerprint
    moved.write_text(moved.read_text(encoding="utf-8").replace("K", "k", 1), encoding="utf-8")
    assert prepare_corpus(data(moved), 256, 8).fingerprint != corpus.fingerprint


def test_synthetic_has_no_file() -> None:
    corpus = prepare_corpus(data(kind="synthetic"), 1000, 128)
    assert (corpus.path, corpus.num_tokens) == (None, 0)
    assert corpus.fingerprint == prepare_corpus(data(kind="synthetic"), 1000, 64).fingerprint
    assert corpus.fingerprint != prepare_corpus(data(kind="synthetic"), 1001, 128).fingerprint


def test_hub_reads_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> dict[str, list[str]]:
        asked.append((name, split))
        return {"text": ["once upon", "a time"]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    assert text_of(prepare_corpus(data("someone/tales", "hub"), 256, 8)) == "once upon\n\na time"
    assert asked == [("someone/tales", "train")]


# --- tokenizers


def test_transformers_tokenizer(tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer

    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "1").write_text("the lazy fox")
    (texts / "2").write_text("the quick dog")
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    expected = [
        *tokenizer.encode("the lazy fox").ids,
        tokenizer.token_to_id("<end>"),
        *tokenizer.encode("the quick dog").ids,
    ]
    corpus = prepare_corpus(data(texts, tokenizer=tokenizer_folder), 60, 4)
    assert corpus.path is not None
    assert load_tokens(corpus.path).tolist() == expected
    # The cache needs no transformers, and still knows the tokenizer's size.
    monkeypatch.setattr(module, "_load_tokenizer", pytest.fail)
    assert prepare_corpus(data(texts, tokenizer=tokenizer_folder), 60, 4) == corpus
    with pytest.raises(ConfigError, match=r"model.vocab_size=59 is smaller than the 60 ids of the tokenizer"):
        prepare_corpus(data(texts, tokenizer=tokenizer_folder), 59, 4)


def test_a_changed_tokenizer_is_another_cache_entry(tokenizer_folder: Path, tmp_path: Path) -> None:
    def identity(**files: str) -> str:
        folder = tmp_path / "-".join(files)
        folder.mkdir()
        for file in tokenizer_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        for name, content in files.items():
            (folder / name.replace("_", ".")).write_text(content)
        return module._tokenizer_identity(str(folder))

    assert (
        identity(model_safetensors="weights")
        == identity(README_md="words")
        == module._tokenizer_identity(str(tokenizer_folder))
    )
    assert identity(vocab_txt="a") != identity(merges_txt="a")


def test_many_ids_need_four_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, story: Path) -> None:
    wide = module._Tokenizer(70_000, [], lambda text: [69_999] * len(text))
    monkeypatch.setattr(module, "_load_tokenizer", lambda name: wide)
    corpus = prepare_corpus(data(story), 70_000, 8)
    assert corpus.path is not None
    assert (corpus.dtype, int(load_tokens(corpus.path).max())) == ("uint32", 69_999)


def test_long_documents_are_tokenized_in_pieces(story: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 7)
    assert text_of(prepare_corpus(data(story), 256, 8)) == story.read_text(encoding="utf-8")


# --- cache


def test_second_call_reads_the_cache(story: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_corpus(data(story), 256, 8)
    assert first.path is not None
    assert first.path.parent == cache
    assert {file.suffix for file in cache.iterdir()} == {".npy", ".json"}
    assert isinstance(load_tokens(first.path), np.memmap)
    monkeypatch.setattr(module, "_tokenize", pytest.fail)
    assert prepare_corpus(data(story), 256, 8) == first


@pytest.mark.parametrize("suffix", [".npy", ".json", ".documents.npy"])
@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "flipped", "gone"])
def test_damaged_cache_is_rebuilt(story: Path, suffix: str, damage: str) -> None:
    corpus = prepare_corpus(data(story), 256, 8)
    assert corpus.path is not None
    file = corpus.path.with_suffix(suffix)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    broken = {"cut": content[: len(content) // 2], "empty": b"", "garbage": b"[1, 2]\n" * 9, "flipped": content}
    file.unlink()
    if damage != "gone":
        file.write_bytes(broken[damage])
    assert prepare_corpus(data(story), 256, 8) == corpus
    assert text_of(corpus) == story.read_text(encoding="utf-8")


def _prepare(path: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    results.put(prepare_corpus(data(path), 256, 8))


def test_processes_at_once_agree(story: Path, cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_prepare, args=(story, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    corpora = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert corpora == [corpora[0]] * 4
    assert text_of(corpora[0]) == story.read_text(encoding="utf-8")
    assert len(list(cache.iterdir())) == 3  # nothing half-written left


# --- mistakes


def refusal(source: Data, vocab_size: int = 256, sequence_length: int = 128, objective: str = "causal") -> str:
    with pytest.raises(ConfigError) as error:
        prepare_corpus(source, vocab_size, sequence_length, objective)
    return str(error.value)


def test_mistakes_are_sentences(story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, short, binary, latin = (tmp_path / name for name in ("empty.txt", "short.txt", "binary.dat", "latin.txt"))
    empty.touch()
    short.write_text("x" * 128)
    binary.write_bytes(b"text\0text")
    latin.write_bytes("Käfer".encode("latin-1"))
    (tmp_path / "folder").mkdir()
    assert "does not exist; give a file, a folder or a glob" in refusal(data(tmp_path / "missing.txt"))
    assert "data.path='' is empty" in refusal(data(""))
    assert "matches no file" in refusal(data(tmp_path / "*.nothing"))
    assert "has 0 tokens, fewer than the 129 of one sample" in refusal(data(empty))
    assert "has 0 tokens" in refusal(data(tmp_path / "folder"))
    assert "has 128 tokens, fewer than the 129 of one sample at train.sequence_length=128" in refusal(data(short))
    assert prepare_corpus(data(short), 256, 127).num_tokens == 128
    assert "binary.dat is not UTF-8 text" in refusal(data(binary))
    assert "latin.txt is not UTF-8 text" in refusal(data(latin))
    assert "model.vocab_size=100 is smaller than the 256 ids of the tokenizer" in refusal(data(story), vocab_size=100)
    assert "is no folder" in refusal(data(story, tokenizer=tmp_path / "missing"))
    assert "no tokenizer that transformers can load" in refusal(data(story, tokenizer=tmp_path / "folder"))
    assert "needs data.path" in refusal(data(kind="hub"))
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    assert "pip install datasets" in refusal(data("someone/tales", "hub"))

    def load_dataset(name: str, split: str) -> None:
        raise ConnectionError("no route to the Hub\nat line 7")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    assert "data.path='someone/tales'" in (message := refusal(data("someone/tales", "hub")))
    assert "(no route to the Hub)" in message


def test_unwritable_cache(story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(story))  # a file where a folder should be
    assert "set XDG_CACHE_HOME" in refusal(data(story))


# --- ranges and samples


@pytest.mark.parametrize(
    ("num_tokens", "sequence_length", "num_held_out"),
    [(10_000, 128, 500), (1_000, 128, 129), (258, 128, 129), (257, 128, 0), (129, 128, 0), (0, 128, 0)],
)
def test_held_out_part(num_tokens: int, sequence_length: int, num_held_out: int) -> None:
    training, held_out = Corpus(None, num_tokens, "uint16", "", "").ranges(sequence_length)
    assert [*training, *held_out] == list(range(num_tokens))
    assert len(held_out) == num_held_out


def test_draws_are_pure_and_stay_the_same_in_later_versions() -> None:
    """A measured point must still be comparable: these values are part of the format."""
    assert len({sample_start(*key, 10**9) for key in [(7, 3, 11), (8, 3, 11), (7, 4, 11), (7, 3, 12), (7, 31, 1)]}) == 5
    assert [sample_start(1234, step, number, 1000) for step, number in [(0, 0), (0, 1), (1, 0)]] == [166, 304, 114]
    assert (draw(5, 1234, 0, 0) % 50257).tolist() == [32225, 42576, 45198, 6620, 36551]


def test_starts_cover_every_position_evenly() -> None:
    starts = [sample_start(1, step, number, 50) for step in range(100) for number in range(100)]
    counts = np.bincount(starts, minlength=50)
    assert ((counts - 200) ** 2 / 200).sum() < 85  # chi-square of 49 degrees of freedom: p > 0.001


def test_random_tokens_cover_the_vocabulary_evenly() -> None:
    tokens = np.concatenate([draw(100, 1, 0, number) % 50 for number in range(100)])
    counts = np.bincount(tokens.astype(np.int64), minlength=50)
    assert len(counts) == 50
    assert ((counts - 200) ** 2 / 200).sum() < 85


# --- documents, and what a mask is


def documents_of(corpus: Corpus) -> list[str]:
    assert corpus.path is not None
    assert corpus.documents is not None
    tokens = load_tokens(corpus.path)
    return [bytes([*tokens[a:b], *corpus.end]).decode() for a, b, _ in load_tokens(corpus.documents)]


def test_documents_end_with_what_separates_them_and_empty_ones_are_none(tmp_path: Path) -> None:
    for name, content in {"a.txt": "first", "b.txt": "", "c.txt": "third", "d.txt": ""}.items():
        (tmp_path / name).write_text(content)
    corpus = prepare_corpus(data(tmp_path / "*.txt"), 256, 4)
    assert text_of(corpus) == "first\n\n\n\nthird\n\n"
    assert documents_of(corpus) == ["first\n\n", "third\n\n"]
    assert document_lengths(corpus).tolist() == [7, 7]
    assert corpus.documents is not None
    assert load_tokens(corpus.documents)[:, 2].tolist() == [0, 2]
    assert corpus.num_ids == 256
    assert (corpus.mask_token, corpus.special_tokens) == (256, ())


def test_the_same_letters_in_other_documents_are_another_text(tmp_path: Path) -> None:
    found = []
    for parts in (("ab", "c"), ("a", "bc")):
        folder = tmp_path / "-".join(parts)
        folder.mkdir()
        for name, content in zip("12", parts, strict=True):
            (folder / name).write_text(content)
        found.append(documents_of(prepare_corpus(data(folder), 256, 3)))
    assert found == [["ab\n\n", "c\n\n"], ["a\n\n", "bc\n\n"]]


def test_a_document_longer_than_a_sample_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "0.txt").touch()
    (tmp_path / "a.txt").write_text("x" * 8)
    (tmp_path / "b.txt").write_text("y" * 10)
    for documents in ("padded", "packed"):
        source = data(tmp_path / "*.txt").model_copy(update={"documents": documents})
        prepare_corpus(source, 256, 11)
        prepare_corpus(source, 257, 12, "masked")
        with pytest.raises(ConfigError, match=rf"b\.txt has 12 tokens, but with data.documents={documents} a document "
                           r"has 11 at most at train\.sequence_length=10; raise that"):  # fmt: skip
            prepare_corpus(source, 256, 10)
        with pytest.raises(ConfigError, match=r"b\.txt has 12 tokens, .* has 11 at most at train.sequence_length=11"):
            prepare_corpus(source, 257, 11, "masked")
    with pytest.raises(ConfigError, match=r"'assert' of pydoc_data|'\w+' of pydoc_data.topics"):
        prepare_corpus(data().model_copy(update={"documents": "padded"}), 256, 128)


def test_texts_without_a_document_that_can_be_learned_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").touch()
    source = data(tmp_path / "*.txt").model_copy(update={"documents": "padded"})
    for objective in ("causal", "masked"):
        with pytest.raises(
            ConfigError, match=r"has no document of [12] tokens or more; give another text, or use data\."
        ):
            prepare_corpus(source, 257, 8, objective)
    (tmp_path / "a.txt").write_text("x")
    assert documents_of(prepare_corpus(source, 257, 8)) == ["x\n\n"]
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ConfigError, match=r"matches no file"):
        prepare_corpus(source, 256, 8)


def test_a_mask_needs_room_in_the_vocabulary(story: Path, tokenizer_folder: Path) -> None:
    assert (
        "model.vocab_size=256 has no room for the mask token 256 of data.tokenizer=bytes; use model.vocab_size=257"
        in (refusal(data(story), objective="masked"))
    )
    assert prepare_corpus(data(story), 257, 8, "masked").mask_token == 256
    synthetic = prepare_corpus(data(kind="synthetic"), 100, 8, "masked")
    assert (synthetic.mask_token, synthetic.num_ids) == (99, 99)
    assert "has no room for a mask token beside another" in refusal(data(kind="synthetic"), 1, objective="masked")
    assert "needs a tokenizer with a mask token, which that of data.tokenizer=" in (
        refusal(data(story, tokenizer=tokenizer_folder), 60, 4, "masked")
    )


def test_a_tokenizer_of_bert_begins_and_ends_documents(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fox", "dog"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("fox dog")
    (texts / "b.txt").write_text("dog")
    corpus = prepare_corpus(data(texts, tokenizer=folder), 7, 3, "masked")
    assert corpus.path is not None
    assert corpus.documents is not None
    assert load_tokens(corpus.path).tolist() == [2, 5, 6, 3, 2, 6]
    assert load_tokens(corpus.documents).tolist() == [[0, 3, 0], [4, 6, 1]]
    assert (corpus.mask_token, corpus.end, corpus.num_ids) == (4, (3,), 7)
    assert corpus.special_tokens == (0, 2, 3, 4)  # an unknown word is a word


def test_the_fingerprint_is_that_of_the_samples(story: Path, tmp_path: Path) -> None:
    """Cut texts keep that of their tokens; other samples of the same tokens have another."""
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "a.txt").write_text("one\n\ntwo")
    (folder / "b.txt").write_text("three")
    whole = tmp_path / "whole.txt"
    whole.write_text("one\n\ntwo\n\nthree")
    kinds: list[dict[str, Any]] = [{"documents": "padded"}, {"documents": "packed"}]
    cut = [prepare_corpus(data(place), 257, 11).fingerprint for place in (folder, whole)]
    assert cut[0] == cut[1] == hashlib.sha256(np.frombuffer(whole.read_bytes(), np.uint8).astype(np.uint16)).hexdigest()
    others = [
        prepare_corpus(data(place).model_copy(update=kind), 257, 19, objective).fingerprint
        for place in (folder, whole)
        for kind in kinds
        for objective in ("causal", "masked")
    ]
    assert len({*cut, *others, prepare_corpus(data(folder), 257, 11, "masked").fingerprint}) == 10
