"""Tokenising and streaming text back: never a torn character, always the text of the whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from kvarn.errors import ModelError, RequestError
from kvarn.models.tokenizer import Tokenizer

TEXTS = [
    "Hello, world!",
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧 family 🎉🎊",
    "  two  spaces\n\ttab",
    "مرحبا",
    "a\u0000b",
    "",
]


@pytest.fixture(scope="module")
def byte_level(model_folder: Path) -> Tokenizer:
    return Tokenizer.load(model_folder)


def sentence_piece(strip: bool) -> Tokenizer:
    """A vocabulary of Llama 2's kind: a mark for the space, bytes for what it lacks."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁he",
        "llo",
        "▁wor",
        "ld",
        "日",
    ]
    backend = tokenizers.Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend, config={"bos_token": {"content": "<s>"}}, eos=frozenset({2}))


def unigram() -> Tokenizer:
    """A vocabulary whose spaces depend on context: decoded through a window."""
    pieces = [
        ("<unk>", 0.0),
        *((piece, -float(rank)) for rank, piece in enumerate(["▁he", "llo", "▁", "ld", "日", "🎉"])),
    ]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend, config={}, eos=frozenset())


def stream(tokenizer: Tokenizer, ids: list[int]) -> str:
    decoder = tokenizer.incremental_decoder()
    return "".join([decoder.push([id]) for id in ids]) + decoder.flush()


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_streaming(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    assert byte_level.decode(ids) == text
    assert stream(byte_level, ids) == text


@given(ids=st.lists(st.integers(0, 49_200), max_size=40))
def test_streamed_text_is_the_library_s_decoding_of_the_whole(byte_level: Tokenizer, ids: list[int]) -> None:
    """Law: for any tokens, torn and invalid bytes and unknown ids included, pushes + flush = the full decoding."""
    assert stream(byte_level, ids) == byte_level._backend.decode(ids, skip_special_tokens=True)


@given(text=st.text(max_size=30))
def test_no_push_ends_inside_a_character(byte_level: Tokenizer, text: str) -> None:
    """Law: what is pushed of a text that is whole is whole, and nothing is left for the flush."""
    ids = byte_level.encode(text)  # drops the few control characters that this vocabulary lacks
    whole = byte_level._backend.decode(ids, skip_special_tokens=False)
    decoder = byte_level.incremental_decoder(skip_special_tokens=False)
    assert "".join([decoder.push([id]) for id in ids]) == whole or whole.endswith("\ufffd")


@given(text=st.text(alphabet="helowrd 日é🎉", max_size=20), strip=st.booleans())
def test_sentence_piece_text_streams_whole(text: str, strip: bool) -> None:
    tokenizer = sentence_piece(strip)
    ids = tokenizer.encode(text.replace(" ", "▁"), add_special_tokens=False)
    assert stream(tokenizer, ids) == tokenizer._backend.decode(ids)


@given(ids=st.lists(st.integers(0, 264), max_size=30), cut=st.integers(0, 30))
def test_sentence_piece_streams_as_it_decodes_whatever_the_bytes(ids: list[int], cut: int) -> None:
    tokenizer = sentence_piece(strip=True)
    decoder = tokenizer.incremental_decoder()
    assert decoder.push(ids[:cut]) + decoder.push(ids[cut:]) + decoder.flush() == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 6), max_size=40))
@settings(max_examples=50)
def test_window_decoding_gives_the_text_of_the_whole(ids: list[int]) -> None:
    tokenizer = unigram()
    assert stream(tokenizer, ids) == tokenizer._backend.decode(ids, skip_special_tokens=False)


def test_a_continuation_keeps_its_leading_space() -> None:
    tokenizer = sentence_piece(strip=True)
    world = tokenizer.encode("▁wor", add_special_tokens=False)
    assert tokenizer.incremental_decoder().push(world) == "wor"
    assert tokenizer.incremental_decoder(context=[1]).push(world) == " wor"


def test_special_tokens_are_recognised_and_left_out(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("<|im_start|>user")
    assert ids[0] == 1
    assert byte_level.decode(ids) == "user"
    assert byte_level.decode(ids, skip_special_tokens=False) == "<|im_start|>user"
    assert byte_level.eos_tokens == {2} and byte_level.eos_token == "<|im_end|>"


def test_token_bytes_add_up_to_the_text(byte_level: Tokenizer) -> None:
    text = "日本 🎉 ok"
    assert b"".join(map(byte_level.token_bytes, byte_level.encode(text))) == text.encode()


def test_unknown_ids_stand_for_nothing_and_are_not_remembered(byte_level: Tokenizer) -> None:
    assert byte_level.decode(range(10**6, 10**6 + 1000), skip_special_tokens=False) == ""
    assert all(id < byte_level.vocab_size for id in byte_level._bytes)


def test_text_that_is_not_unicode_is_the_request_s_fault(byte_level: Tokenizer) -> None:
    with pytest.raises(RequestError, match="Unicode"):
        byte_level.encode("\ud800")


def test_a_corrupt_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_an_older_tokenizer_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": 3}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (folder / "vocab.json").write_text(json.dumps({"h": 0, "i": 1, "hi": 2, "<|endoftext|>": 3}))
    (folder / "merges.txt").write_text("#version: 0.2\nh i\n")
    assert Tokenizer.load(folder).encode("hi") == [2]
    (folder / "vocab.json").unlink()
    assert Tokenizer.load(folder).decode([2, 3]) == "hi"


def test_the_api_side_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, kvarn.models.tokenizer, kvarn.models.chat, kvarn.models.tool_parsers, kvarn.models.sources\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
