"""Text <-> token ids, and text out of a stream of tokens. Built on `tokenizers` alone: the API process stays small.

Decoding works on bytes: each token stands for some, and text is their UTF-8 decoding with U+FFFD for what is invalid.
So a stream can be decoded token by token in constant time, and gives exactly the text that decoding all at once gives.
Vocabularies that are not spelled in bytes (WordPiece and others) are decoded through a sliding window instead.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol

import tokenizers
from tokenizers import normalizers, pre_tokenizers

from kvarn.errors import ModelError, RequestError
from kvarn.models.config import eos_tokens, read_config, read_json

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_TOOL_MARKERS: Final = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>")
"""Never skipped when decoding, even where a vocabulary calls them special: tool parsers must see them."""


class IncrementalDecoder(Protocol):
    """Text of one growing sequence of tokens. All pushes and the flush together give the text of the whole."""

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete; never a part of a character."""
        ...

    def flush(self) -> str:
        """What remains at the end: U+FFFD for an unfinished character."""
        ...


class Tokenizer:
    """A model's tokenizer.

    vocab_size      ids run from 0 to vocab_size - 1
    eos_tokens      ids that end a text
    special_tokens  ids that `decode` leaves out
    bos_token, eos_token  their text, "" where the model has none
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, config: dict[str, Any], eos: frozenset[int]) -> None:
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_tokens = eos
        self.bos_token = _token_text(config.get("bos_token"))
        self.eos_token = _token_text(config.get("eos_token"))
        self.special_tokens = frozenset(
            id
            for id, token in backend.get_added_tokens_decoder().items()
            if token.special and token.content not in _TOOL_MARKERS
        )
        self._spelling = _spelling(backend)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a model folder. Raises ModelError when there is none or it is corrupt."""
        path = tokenizer_file(folder)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the bindings raise bare Exception
            raise ModelError(f"{path} is not a readable tokenizer ({error}); download it again") from None
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path) if config_path.exists() else {}
        return cls(backend, config=config, eos=eos_tokens(folder, read_config(folder)))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, special tokens written in it included; `add_special_tokens` adds the model's own (BOS)."""
        return _ids(self._backend, text, add_special_tokens)

    def encode_part(self, text: str) -> list[int]:
        """Ids of a text that stands amid others, the same wherever it stands: nothing is put before or behind it.

        Vocabularies that begin a text with a space do not begin a part with one.
        """
        return _ids(self._amid, text, False)

    @cached_property
    def _amid(self) -> tokenizers.Tokenizer:
        return _amid(self._backend)

    @cached_property
    def ends(self) -> tuple[list[int], list[int]]:
        """The model's own special tokens before and behind a text."""
        whole, bare = self.encode("a"), self.encode("a", add_special_tokens=False)
        before = next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
        return whole[:before], whole[before + len(bare) :]

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`. Ids that the vocabulary does not have stand for nothing."""
        decoder = self.incremental_decoder(skip_special_tokens=skip_special_tokens)
        return decoder.push(token_ids) + decoder.flush()

    def incremental_decoder(
        self, *, skip_special_tokens: bool = True, context: Sequence[int] = ()
    ) -> IncrementalDecoder:
        """A decoder for one stream. `context` is what the stream goes on from (a prompt's last tokens are enough).

        Without context the stream begins a text, where SentencePiece vocabularies drop a leading space.
        """
        skipped = self.special_tokens if skip_special_tokens else frozenset()
        if self._spelling is None:
            return _WindowDecoder(self._backend, skipped, context)
        return _ByteDecoder(self.token_bytes, skipped, self._spelling.strips_leading_space and not context)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for inside a text: maybe part of a character, empty for unknown ids."""
        known = self._bytes.get(id)
        if known is None:
            token = self._backend.id_to_token(id)
            spelled = token if token is None or self._spelling is None else self._spelling.to_bytes(token)
            known = (spelled.encode() if isinstance(spelled, str) else spelled) or b""
            if token is not None:  # clients may name billions of others
                self._bytes[id] = known
        return known


def _ids(backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    try:
        ids: list[int] = backend.encode(text, add_special_tokens=add_special_tokens).ids
    except (TypeError, UnicodeEncodeError):
        raise RequestError("the text is not valid Unicode (it holds a lone surrogate)") from None
    return ids


def _amid(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same vocabulary for text amid other text: where spaces are put before texts, one that puts none."""
    steps = [_state(backend.normalizer), _state(backend.pre_tokenizer)]
    changed = [_without_space(step) for step in steps]
    if changed == steps:
        return backend
    normalizer, splitter = normalizers.Sequence([]), pre_tokenizers.Sequence([])
    normalizer.__setstate__(json.dumps({"type": "Sequence", "normalizers": changed[0]}).encode())
    splitter.__setstate__(json.dumps({"type": "Sequence", "pretokenizers": changed[1]}).encode())
    amid = tokenizers.Tokenizer(backend.model)  # shares the vocabulary
    amid.normalizer, amid.pre_tokenizer = normalizer, splitter
    added = sorted(backend.get_added_tokens_decoder().items())
    amid.add_tokens([token for _, token in added])  # in the order in which their file's loading adds them
    return amid


def _state(part: normalizers.Normalizer | pre_tokenizers.PreTokenizer | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, as tokenizer.json has them."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    steps: list[dict[str, Any]] = state.get("normalizers") or state.get("pretokenizers") or [state]
    return steps


def _without_space(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same steps, but none that puts a space before the text."""
    changed = []
    for step in steps:
        match step["type"]:
            case "Prepend":
                continue
            case "Metaspace":
                step = step | {"prepend_scheme": "never"}
            case "ByteLevel" if "add_prefix_space" in step:
                step = step | {"add_prefix_space": False}
        changed.append(step)
    return changed


def tokenizer_file(folder: Path) -> Path:
    """The tokenizer.json of a model folder; older formats are converted to one, once, in the cache."""
    path = folder / "tokenizer.json"
    if path.is_file():
        return path
    import hashlib

    from kvarn.models.sources import build_once, cache_dir

    def build(target: Path) -> None:
        from transformers import AutoTokenizer

        try:
            AutoTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(target)
        except Exception as error:  # by kind of tokenizer
            raise ModelError(f"{folder} has no tokenizer.json and none can be made of what it has ({error})") from error
        if not (target / "tokenizer.json").is_file():
            raise ModelError(f"{folder} has no tokenizer.json, and its tokenizer has no fast version to make one of")

    key = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=6).hexdigest()
    return build_once(cache_dir() / f"{folder.name}-{key}-tokenizer", build) / "tokenizer.json"


# ---- how vocabularies spell bytes ------------------------------------------------------------------------


class _ByteLevelSpelling:
    """GPT-2's: each byte is one printable character."""

    strips_leading_space = False

    def __init__(self) -> None:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        self._byte = {chr(byte): byte for byte in printable}
        self._byte |= {chr(256 + index): byte for index, byte in enumerate(others)}

    def to_bytes(self, token: str) -> bytes:
        try:
            return bytes([self._byte[character] for character in token])
        except KeyError:  # an added token, written as itself
            return token.encode()


class _SentencePieceSpelling:
    """SentencePiece's: a mark for the space, <0x..> for single bytes."""

    def __init__(self, strips_leading_space: bool) -> None:
        self.strips_leading_space = strips_leading_space

    def to_bytes(self, token: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()


def _spelling(backend: tokenizers.Tokenizer) -> _ByteLevelSpelling | _SentencePieceSpelling | None:
    """Which spelling the tokenizer's decoder undoes; None for any other kind."""
    # The decoder's pickled state is its part of tokenizer.json; writing the whole of it would take a second.
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    if decoder.get("type") == "ByteLevel":
        return _ByteLevelSpelling()
    steps = decoder.get("decoders", [])
    kinds = [step["type"] for step in steps]
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or kinds[3:] not in ([], ["Strip"]):
        return None
    replaces = steps[0]["pattern"] == {"String": "\u2581"} and steps[0]["content"] == " "
    strips = kinds[3:] == ["Strip"]
    if not replaces or (strips and (steps[3]["content"], steps[3]["start"], steps[3]["stop"]) != (" ", 1, 0)):
        return None
    return _SentencePieceSpelling(strips)


# ---- streams ---------------------------------------------------------------------------------------------


class _ByteDecoder:
    """Constant time a token: bytes in, whole characters out."""

    def __init__(
        self, token_bytes: Callable[[int], bytes], skipped: frozenset[int], strips_leading_space: bool
    ) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._strips = strips_leading_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        data = b"".join([self._token_bytes(id) for id in token_ids if id not in self._skipped])
        if self._strips and data:
            self._strips = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """For vocabularies whose tokens read differently by context: decodes the last few again with each new one."""

    _LONGEST_CHARACTER = 4
    """Tokens that one character can take; more pending ones are invalid, not unfinished."""

    def __init__(self, backend: tokenizers.Tokenizer, skipped: frozenset[int], context: Sequence[int]) -> None:
        self._backend = backend
        self._skipped = skipped
        self._context = list(context[-2 * self._LONGEST_CHARACTER :])
        """Tokens that are out already; they only give the next ones their context."""
        self._pending: list[int] = []

    def push(self, token_ids: Iterable[int]) -> str:
        text = ""
        for id in token_ids:
            if id not in self._skipped:
                self._pending.append(id)
                text += self._take(final=len(self._pending) > self._LONGEST_CHARACTER)
        return text

    def flush(self) -> str:
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._backend.decode(self._context, skip_special_tokens=False)
        after = self._backend.decode(self._context + self._pending, skip_special_tokens=False)
        if len(after) <= len(before) or (after.endswith("\ufffd") and not final):
            return ""
        self._context, self._pending = (self._context + self._pending)[-2 * self._LONGEST_CHARACTER :], []
        return str(after[len(before) :])


def _token_text(token: Any) -> str:
    """A token of tokenizer_config.json: text, or an object that holds it."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
