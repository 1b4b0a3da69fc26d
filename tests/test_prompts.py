"""Prompts: the tokens that transformers would give, one sentence for each mistake, and text as it is in the end."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import make_config
from helpers_model import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from harness.checkpoints import CARRIED, FORMAT, META, Meta, SavedConfig
from harness.errors import ConfigError
from harness.prompts import (
    Prompt,
    TextStream,
    Tokenizer,
    load_tokenizer,
    random_prompt,
    read_prompts,
    stop_tokens_of,
    tokenizer_of,
)
from harness.spec.config import REPOSITORY, Generate, RunConfig

TEXT = "the quick brown fox jumps over the lazy dog, 日本語 naïve Straße 🦊🐕 the end.\n  the fox\n"
BYTES = load_tokenizer("bytes", "")
MODEL = tiny_model(vocab_size=256)
"""Of 16 positions."""


def save(folder: Path, tokenizer: Any, **settings: object) -> Path:
    """As `save_pretrained` does."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def byte_level() -> Any:
    """As GPT-2 and Llama 3 have it, which begins with a special token; 300 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT * 3], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def metaspace() -> Any:
    """Words with the space before them, which the first word of a text has and doesn't show."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT * 3], trainer)
    return tokenizer


def word_piece() -> Any:
    """BERT's, which puts texts between special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT * 3], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return tokenizer


def byte_fallback() -> Any:
    """Llama 2's: characters that are no tokens are their bytes, each a token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    words = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz", "▁t"]
    vocabulary = {word: number for number, word in enumerate([*words, "▁th"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "t"), ("▁t", "h")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


KINDS = {"byte level": byte_level, "metaspace": metaspace, "word piece": word_piece, "byte fallback": byte_fallback}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save(tmp_path_factory.mktemp(kind), build()) for kind, build in KINDS.items()}


@pytest.fixture(scope="session")
def tokenizers(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: load_tokenizer(str(folder), kind) for kind, folder in folders.items()} | {"bytes": BYTES}


def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# --- tokenizers


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_tokenized_as_transformers_does(kind: str, folders: Any, tokenizers: Any) -> None:
    reference = theirs(folders[kind])
    for text in (TEXT, "the", " a\n", "<s>the</s>"):
        assert tokenizers[kind].encode(text) == reference(text)["input_ids"]
    assert tokenizers[kind].num_ids == len(reference)
    assert tokenizers[kind].end_tokens == (1,)


def test_special_tokens_are_for_the_model_not_for_the_reader(tokenizers: Any) -> None:
    assert tokenizers["byte level"].encode("the")[0] == 0
    assert tokenizers["byte level"].decode([0, *tokenizers["byte level"].encode(TEXT), 1]) == TEXT


def test_bytes() -> None:
    assert BYTES.encode("ä\n") == [0xC3, 0xA4, 0x0A]
    assert BYTES.decode([0xC3, 0xA4, 0xC3, 65, 256, 50_000]) == "ä�A��"
    assert (BYTES.end_tokens, BYTES.num_ids) == ((), 256)


@pytest.mark.parametrize("kind", [*KINDS, "bytes"])
def test_a_token_that_no_tokenizer_has_is_no_error(kind: str, tokenizers: Any) -> None:
    assert tokenizers[kind].decode([10_000]) == ("�" if kind == "bytes" else "")


def test_bytes_need_no_heavy_import() -> None:
    code = (
        "import sys; from harness.prompts import load_tokenizer; load_tokenizer('bytes', '').encode('x'); "
        "print([name for name in ('torch', 'transformers', 'tokenizers') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert run.stdout == "[]\n"


# --- which tokenizer


def configure(weights: Path | None = None, tokenizer: Path | str = "bytes", **settings: Any) -> RunConfig:
    config = make_config()
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"weights": None if weights is None else str(weights)}),
            "data": config.data.model_copy(update={"tokenizer": str(tokenizer)}),
            "generate": Generate(**settings),
        }
    )


def checkpoint(place: Path, tokenizer: Path | str | None, kind: str = "text", carried: Any = None) -> Path:
    """What the launchers read of a checkpoint; tokenizer=None: one that was imported."""
    place.mkdir()
    saved: dict[str, Any] = {"model": {}, "train": {} if tokenizer is None else {"steps": 1}}
    if tokenizer is not None:
        saved["data"] = {"kind": kind, "tokenizer": str(tokenizer)}
    config = SavedConfig.model_validate(saved)
    meta = Meta(format=FORMAT, step=1, optimizer_step=1, scheduler_step=1, loss_scale={}, files={}, config=config)
    (place / META).write_text(meta.model_dump_json())
    if carried is not None:
        save(place / CARRIED, carried())
        (place / CARRIED / "config.json").write_text('{"eos_token_id": 7}')
    return place


def test_which_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    def kind(weights: Path | None, tokenizer: Path | str = "bytes") -> int:
        return tokenizer_of(configure(weights, tokenizer)).num_ids

    own, other = folders["byte level"], folders["word piece"]
    num_own, num_other = (len(theirs(folder)) for folder in (own, other))
    assert kind(None) == 256
    assert kind(None, own) == num_own
    assert kind(own) == num_own
    assert kind(own, other) == num_other
    assert kind(tmp_path) == 256  # a folder without a tokenizer
    assert kind(checkpoint(tmp_path / "imported", None, carried=byte_level)) == num_own
    assert kind(checkpoint(tmp_path / "fresh", "bytes")) == 256
    assert kind(checkpoint(tmp_path / "folder", other)) == num_other
    assert kind(checkpoint(tmp_path / "went on", other, carried=byte_level)) == num_other
    assert kind(checkpoint(tmp_path / "went on with bytes", "bytes", carried=byte_level)) == 256
    assert kind(checkpoint(tmp_path / "random", "bytes", "synthetic", carried=byte_level)) == num_own
    assert kind(checkpoint(tmp_path / "moved", "gone", carried=byte_level)) == num_own
    assert kind(tmp_path / "went on", own) == num_own
    lost = checkpoint(tmp_path / "lost", "gone")
    with pytest.raises(ConfigError, match=r"^the tokenizer 'gone' of model.weights='.*lost' holds no tokenizer that"):
        tokenizer_of(configure(lost))
    with pytest.raises(ConfigError, match=r"^data.tokenizer='gone' holds no tokenizer that transformers can load"):
        tokenizer_of(configure(None, "gone"))


def test_stop_tokens(folders: dict[str, Path], tokenizers: Any, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    model, tokenizer = tmp_path / "model", tokenizers["byte level"]
    model.mkdir()
    assert stop_tokens_of(configure(model), tokenizer) == [1]
    assert stop_tokens_of(configure(model), BYTES) == []
    (model / "config.json").write_text('{"eos_token_id": 5}')
    assert stop_tokens_of(configure(model), BYTES) == [5]
    GenerationConfig(eos_token_id=[2, 3]).save_pretrained(model)
    assert stop_tokens_of(configure(model), tokenizer) == GenerationConfig.from_pretrained(model).eos_token_id == [2, 3]
    assert stop_tokens_of(configure(model, stop_tokens=[8]), tokenizer) == [8]
    assert stop_tokens_of(configure(model, stop_tokens=[]), tokenizer) == []
    assert stop_tokens_of(configure(model, ignore_stop=True), tokenizer) == []
    GenerationConfig().save_pretrained(model)
    assert stop_tokens_of(configure(model), tokenizer) == [5]
    assert stop_tokens_of(configure(checkpoint(tmp_path / "a", None, carried=byte_level)), tokenizer) == [7]
    assert stop_tokens_of(configure(checkpoint(tmp_path / "b", "bytes", carried=byte_level)), BYTES) == []
    assert stop_tokens_of(configure(), BYTES) == []
    for content, problem in {
        "{": "is damaged",
        "[]": "is damaged",
        '{"eos_token_id": "x"}': "eos_token_id='x', no",
    }.items():
        (model / "generation_config.json").write_text(content)
        with pytest.raises(ConfigError, match=f"generation_config.json .*{problem}.*generate.stop_tokens"):
            stop_tokens_of(configure(model), tokenizer)


# --- prompts


def prompts(tokenizer: Tokenizer = BYTES, **settings: Any) -> list[Prompt]:
    return read_prompts(Generate(**settings), MODEL, tokenizer)


def written(folder: Path, content: str | bytes, name: str = "prompts.txt") -> str:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


def test_one_prompt(tokenizers: Any, folders: Any) -> None:
    assert prompts(prompt="Zü") == [Prompt("Zü", [0x5A, 0xC3, 0xBC])]
    (prompt,) = prompts(tokenizers["word piece"], prompt="the fox")
    assert prompt.tokens == theirs(folders["word piece"])("the fox")["input_ids"]


def test_a_prompt_per_line(tmp_path: Path) -> None:
    file = written(tmp_path, b"\xef\xbb\xbfone\r\n two \n\nth\xe2\x80\xa8ree\n\n\n")
    found = prompts(prompts_file=file)
    assert [prompt.prompt for prompt in found] == ["one", " two ", "", "th\u2028ree"]
    assert [prompt.tokens for prompt in found] == [[*text.encode()] for text in ("one", " two ", "", "th\u2028ree")]
    assert [bool(prompt.problem) for prompt in found] == [False, False, True, False]
    assert found[2].problem.startswith("the prompt is empty;")


def test_objects(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "a", "n": 1e999}',
        '{"prompt_tokens": [1, 255], "prompt": null}',
        '{"prompt": "b", "prompt_tokens": [3]}',
    ]
    found = prompts(prompts_file=written(tmp_path, "\n".join(lines), "prompts.jsonl"))
    assert found == [Prompt("a", [97]), Prompt(None, [1, 255]), Prompt("b", [3])]


def test_one_that_is_of_no_use_among_others(tmp_path: Path) -> None:
    tokens = [[], [1] * 15, [1] * 16, [256], [-1], [255]]
    content = "".join(json.dumps({"prompt_tokens": row}) + "\n" for row in tokens)
    found = prompts(prompts_file=written(tmp_path, content, "prompts.jsonl"))
    assert [prompt.tokens for prompt in found] == tokens
    assert [prompt.problem.partition(";")[0] for prompt in found] == [
        "the prompt is empty",
        "",
        "the prompt has 16 tokens, but model.max_position_embeddings=16 has room for 15 and a new one",
        "the prompt has the token 256, but model.vocab_size=256",
        "the prompt has the token -1, but model.vocab_size=256",
        "",
    ]


def test_random_prompts_depend_on_seed_and_number_alone() -> None:
    found = prompts(prompt_length=7, batch_size=3)
    assert [len(prompt.tokens) for prompt in found] == [7, 7, 7]
    assert len({tuple(prompt.tokens) for prompt in found}) == 3
    assert prompts(prompt_length=7, batch_size=2, num_requests=5)[:3] == found
    assert prompts(prompt_length=7, batch_size=3, seed=5) != found
    assert random_prompt(Generate(prompt_length=7), MODEL, 2) == found[2].tokens
    many = random_prompt(Generate(prompt_length=20_000), tiny_model(vocab_size=53), 0)
    assert {*many} == {*range(53)}
    assert max(many.count(token) for token in range(53)) < 1.25 * 20_000 / 53


REFUSED: list[tuple[str, bytes | None, str]] = [
    ("p.txt", None, "can't be read (No such file or directory); give a file with a prompt per line"),
    ("", None, "is no regular file"),
    ("p.txt", b"", "is empty; give a file with a prompt per line"),
    ("p.txt", b"\r\n\n", "is empty"),
    ("p.jsonl", b"\n", "is empty"),
    ("p.txt", "ä".encode("latin-1"), "is not UTF-8 text (byte 0); save it as UTF-8"),
    ("p.txt", b"0123456789abcdef", "the prompt has 16 tokens, but model.max_position_embeddings=16"),
    ("p.txt", b"0123456789abcdef\n\n0123456789abcdef", "none of the 3 prompts can be generated from, the first as"),
    ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": "a"}', "line 2 of generate.prompts_file="),
    *(
        ("p.jsonl", b'{"prompt": "a"}\n' + line, f"is {line.decode()!r}, no object with a text as `prompt` or a list")
        for line in (
            b"a", b'"a"', b"[1]", b"null", b"{}", b'{"prompt": null}', b'{"prompt": 1}', b'{"prompt_tokens": 1}',
            b'{"prompt_tokens": [1.0]}', b'{"prompt_tokens": [true]}', b'{"prompt": ["a"]}', b'{"prompt": "\\udc80"}',
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "sentence"), REFUSED)
def test_files_that_are_refused(tmp_path: Path, name: str, content: bytes | None, sentence: str) -> None:
    path = str(tmp_path / name) if content is None else written(tmp_path, content, name)
    with pytest.raises(ConfigError) as caught:
        prompts(prompts_file=path)
    assert sentence in str(caught.value)
    assert f"generate.prompts_file={path!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prompts_that_are_refused() -> None:
    for settings, sentence in [
        (
            {"prompt": "a", "prompts_file": "b"},
            "generate.prompt='a' and generate.prompts_file='b' are both given; leave",
        ),
        ({"prompt": ""}, "generate.prompt='': the prompt is empty; give it a text, or tokens"),
        ({"prompt": "a\udcff"}, r"generate.prompt='a\udcff' is not UTF-8; set the terminal to UTF-8"),
        ({"prompt_length": 16}, "generate.prompt_length=16: none of the 8 prompts can be generated from, the first as"),
    ]:
        with pytest.raises(ConfigError) as caught:
            prompts(**settings)
        assert str(caught.value).startswith(sentence)


def test_a_tokenizer_of_another_model(tokenizers: Any) -> None:
    with pytest.raises(ConfigError, match=r"has the token \d+, but model.vocab_size=256; .* data.tokenizer=FOLDER$"):
        prompts(tokenizers["byte level"], prompt="the")


# --- text as it comes


def stream(tokenizer: Tokenizer, tokens: Sequence[int], **arguments: Any) -> tuple[list[str], TextStream]:
    """Pieces of all tokens and of the end."""
    made = TextStream(tokenizer, **arguments)
    return [*map(made.push, tokens), made.finish()], made


@given(st.data())
@pytest.mark.parametrize("kind", ["bytes", "byte level", "metaspace", "word piece"])
def test_pieces_are_the_text(tokenizers: Any, kind: str, data: Any) -> None:
    tokens = data.draw(st.lists(st.integers(0, tokenizers[kind].num_ids + 5), max_size=30))
    pieces, made = stream(tokenizers[kind], tokens)
    assert "".join(pieces) == made.text == tokenizers[kind].decode(tokens)


@given(st.text(st.sampled_from(TEXT), max_size=20), st.lists(st.integers(0, 2), max_size=4), st.randoms())
@pytest.mark.parametrize("kind", [*KINDS, "bytes"])
def test_pieces_of_texts_with_special_tokens_anywhere(
    tokenizers: Any, kind: str, text: str, special: list[int], chance: random.Random
) -> None:
    tokens = tokenizers[kind].encode(text)
    if kind in ("byte level", "metaspace", "word piece"):
        for token in special:
            tokens.insert(chance.randint(0, len(tokens)), token)
    pieces, _ = stream(tokenizers[kind], tokens)
    assert "".join(pieces) == tokenizers[kind].decode(tokens)


@given(st.text(st.sampled_from(TEXT), min_size=1, max_size=20), st.integers(1, 20))
@pytest.mark.parametrize("kind", [*KINDS, "bytes"])
def test_text_goes_on_from_the_prompt(tokenizers: Any, kind: str, text: str, cut: int) -> None:
    tokens, decode = tokenizers[kind].encode(text), tokenizers[kind].decode
    whole = decode(tokens)
    begins = [begin for size in range(cut + 1) if whole.startswith(begin := decode(tokens[:size]))]
    pieces, _ = stream(tokenizers[kind], tokens[cut:], after=tokens[:cut])
    assert max(begins, key=len) + "".join(pieces) == whole


def test_a_prompt_that_ends_with_bytes_that_are_none_of_utf8() -> None:
    assert "".join(stream(BYTES, [*b"ab"], after=[65, *[0xFF] * 9])[0]) == "ab"
    assert "".join(stream(BYTES, [0x9F, 97], after=[65, 0xC3])[0]) == "ßa"


def test_a_character_comes_whole_and_at_once(tokenizers: Any) -> None:
    pieces, _ = stream(BYTES, [*"aä🦊b".encode()])
    assert pieces == ["a", "", "ä", "", "", "", "🦊", "b", ""]
    for kind in ("byte level", "byte fallback"):
        pieces, _ = stream(tokenizers[kind], tokenizers[kind].encode("a 🐈 ♞ z"))
        assert not any("�" in piece for piece in pieces)
        assert "".join(pieces) == "a 🐈 ♞ z"
        assert pieces[-1] == ""  # nothing waits for the end


def test_bytes_that_are_none_of_utf8() -> None:
    pieces, _ = stream(BYTES, [0xFF, 65, 0xC3, 66, 0xE2, 0x82])
    assert pieces == ["", "�A", "", "�B", "", "", "�"]


def test_text_stays_the_same_for_long_sequences(tokenizers: Any) -> None:
    made = TextStream(tokenizers["byte level"])
    tokens = tokenizers["byte level"].encode(TEXT * 50)
    assert "".join(map(made.push, tokens)) + made.finish() == TEXT * 50
    assert len(made._last) + len(made._new) < 10  # each token costs the same


# --- stop strings


def cut(text: str, stop_strings: Sequence[str]) -> tuple[str, bool]:
    """The shortest text that ends with a stop string, without the longest that it ends with."""
    ends = [text.find(stop) + len(stop) for stop in stop_strings if stop in text]
    if not ends:
        return text, False
    return min((text[: min(ends)].removesuffix(stop) for stop in stop_strings), key=len), True


@given(
    st.lists(st.text(st.sampled_from("abcä"), min_size=0, max_size=4), max_size=12),
    st.lists(st.text(st.sampled_from("abcä"), min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_across_any_border(parts: list[str], stop_strings: list[str]) -> None:
    vocabulary = [*dict.fromkeys(parts)]
    words = Tokenizer(lambda _: [], lambda tokens: "".join(vocabulary[token] for token in tokens), (), len(vocabulary))
    made = TextStream(words, stop_strings)
    given_so_far, text = "", ""
    for part in parts:
        text += part
        given_so_far += made.push(vocabulary.index(part))
        before, found = cut(text, stop_strings)
        assert made.stopped == found
        assert before.startswith(given_so_far) if not found else given_so_far == before
        # what is held back could still become one
        held = before[len(given_so_far) :]
        assert not held or any(stop.startswith(held) for stop in stop_strings)
    assert given_so_far + made.finish() == made.text == cut(text, stop_strings)[0]


@given(st.text(st.sampled_from("ab ä🦊\n"), max_size=20), st.text(st.sampled_from("ab ä🦊\n"), min_size=1, max_size=3))
@pytest.mark.parametrize("kind", ["bytes", "byte level"])
def test_stop_strings_of_tokenizers(tokenizers: Any, kind: str, text: str, stop: str) -> None:
    _, made = stream(tokenizers[kind], tokenizers[kind].encode(text), stop_strings=[stop])
    assert (made.text, made.stopped) == (text[: text.find(stop)] if stop in text else text, stop in text)


def test_nothing_comes_after_a_stop_string() -> None:
    pieces, made = stream(BYTES, [*b"ab\n\nUser: c"], stop_strings=["\n\nUser:", "\n\n\n"])
    assert pieces == ["a", "b", *[""] * 10]
    assert made.stopped
    pieces, made = stream(BYTES, [*b"ab\n\nUse it"], stop_strings=["\n\nUser:"])
    assert pieces == ["a", "b", *[""] * 5, "\n\nUse ", "i", "t", ""]
    assert not made.stopped


def test_a_stop_string_may_be_complete_only_at_the_end() -> None:
    pieces, made = stream(BYTES, [*b"ab", 0xC3], stop_strings=["b�"])
    assert (pieces, made.text, made.stopped) == (["a", "", "", ""], "a", True)


@pytest.mark.parametrize("parts", [["xabcd"], ["xa", "bcd"], [*"xabcd"]])
def test_the_stop_string_that_is_complete_first_counts(parts: list[str]) -> None:
    words = Tokenizer(lambda _: [], lambda tokens: "".join(parts[token] for token in tokens), (), len(parts))
    assert stream(words, range(len(parts)), stop_strings=["abcd", "bc"])[1].text == "xa"
    assert stream(words, range(len(parts)), stop_strings=["c", "abc", "bc"])[1].text == "x"


def test_a_prompt_is_not_searched() -> None:
    _, made = stream(BYTES, [*b"op, stop"], stop_strings=["stop"], after=[*b"st"])
    assert made.text == "op, "


def test_a_stop_string_in_a_token_that_begins_a_character_is_noticed_at_once() -> None:
    pieces = [b"a", b"STOP\xe2", b"\x82\xac"]
    tokenizer = Tokenizer(
        lambda _: [], lambda tokens: b"".join(pieces[t] for t in tokens).decode(errors="replace"), (), 3
    )
    stream = TextStream(tokenizer, ["STOP"])
    assert (stream.push(0), stream.stopped) == ("a", False)
    assert (stream.push(1), stream.stopped, stream.text) == ("", True, "a")
