"""Prompts in parts: what clients mark as shared becomes tokens on its own, so it is the same tokens wherever it stands.

Plain prompts come as parts (`from_parts`). Of a conversation, some texts are marked: the chat template is rendered with
words in their places that it leaves alone, and what comes of it is cut there. The words must stand exactly where the
texts stand in the ordinary prompt, or the ordinary prompt is used without segments: marks never change a prompt's text.

White space around a marked text counts to what stands around it, since many templates strip it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import uuid4

from kvarn.errors import RequestError
from kvarn.models.tokenizer import Tokenizer
from kvarn.serving.rounds.hints import RoundHint, Segment, SegmentKind

Message = dict[str, Any]
LONGEST_NAME: Final = 200
LARGEST_ROUND: Final = 1024
MOST_SEGMENTS: Final = 1024
_MARKS: Final = frozenset({"segment", "segment_id"})


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids; with `segments`, which follow one another and cover them, where its client says of what parts."""

    tokens: list[int]
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a prompt, as text or as token ids."""

    kind: SegmentKind
    content: str | list[int]
    id: str = ""


@dataclass(slots=True)
class _Joined:
    """A prompt while it grows."""

    tokens: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def add(self, kind: SegmentKind, tokens: list[int], id: str = "") -> None:
        """Append a part. One without tokens is none, and neighbours of one kind that are not shared are one."""
        if not tokens:
            return
        self.tokens += tokens
        last = self.segments[-1] if self.segments else None
        if last is not None and kind == last.kind != "shared" and not id and not last.id:
            self.segments[-1] = Segment(kind, last.tokens + len(tokens))
        else:
            self.segments.append(Segment(kind, len(tokens), id))

    def prompt(self) -> Prompt:
        return Prompt(self.tokens, tuple(self.segments))


# ---- plain prompts ---------------------------------------------------------------------------------------


def from_parts(tokenizer: Tokenizer, parts: list[Part]) -> Prompt:
    """The prompt of some parts, with the special tokens of the model around it where its text has any.

    A private beginning is spelt as the beginning of any prompt; the special tokens before a shared one are private.
    """
    parts = [part for part in parts if part.content]
    joined = _Joined()
    before, behind = tokenizer.ends if any(isinstance(part.content, str) for part in parts) else ([], [])
    for place, part in enumerate(parts):
        if isinstance(part.content, list):
            tokens = part.content
        elif place == 0 and part.kind != "shared":
            tokens = tokenizer.encode(part.content, add_special_tokens=False)
        else:
            tokens = tokenizer.encode_part(part.content)
        if place == 0 and isinstance(part.content, str):
            joined.add(part.kind if part.kind != "shared" else "private", before)
        joined.add(part.kind, tokens, part.id)
    if parts and isinstance(parts[-1].content, str):
        joined.add("task", behind)
    return joined.prompt()


def split_text(text: str, separator: str) -> list[Part]:
    """The parts of a text between separators: private, then shared ones, then the task."""
    first, *shared, last = text.split(separator)
    return [Part("private", first), *(Part("shared", each) for each in shared), Part("task", last)]


# ---- conversations ---------------------------------------------------------------------------------------


class MarkedMessages:
    """A conversation some of whose texts are marked as shared.

    plain      the messages without marks
    stand_ins  the same with a word in the place of each shared text; equal to `plain` where none is marked
    """

    def __init__(self, messages: list[Message]) -> None:
        self._word = f"segment{uuid4().hex}"
        self._shared: list[tuple[str, str]] = []
        """(text without the white space around it, id) of each."""
        self.plain = [_unmarked(message) for message in messages]
        self.stand_ins = [self._stand_in(message) for message in messages]

    def __bool__(self) -> bool:
        """Whether anything is shared."""
        return bool(self._shared)

    def tokens(self, tokenizer: Tokenizer, plain: str, rendered: str) -> Prompt | None:
        """The prompt, of what the template made of `plain` and `stand_ins`; None where the two do not agree."""
        pieces = re.split(rf"{self._word}x(\d+)x", rendered)
        places = [int(number) for number in pieces[1::2]]
        if sorted(places) != list(range(len(self._shared))):
            return None
        pieces[1::2] = [self._shared[place][0] for place in places]
        if "".join(pieces) != plain:
            return None
        joined = _Joined()
        joined.add("private", tokenizer.encode(pieces[0], add_special_tokens=False))
        for number, place in enumerate(places, 1):
            text, id = self._shared[place]
            joined.add("shared", tokenizer.encode_part(text), id)
            behind = tokenizer.encode_part(pieces[2 * number])
            joined.add("task" if number == len(places) else "private", behind)
        return joined.prompt()

    def _stand_in(self, message: Message) -> Message:
        kind, id, content = message.get("segment"), message.get("segment_id", ""), message.get("content")
        changed = _unmarked(message)
        if isinstance(content, list):
            changed["content"] = [
                part | {"text": self._word_for(part["text"], part.get("segment_id", id))}
                if part.get("segment", kind) == "shared" and isinstance(part.get("text"), str)
                else part
                for part in content
            ]
        elif kind == "shared" and isinstance(content, str):
            changed["content"] = self._word_for(content, id)
        return changed

    def _word_for(self, text: str, id: str) -> str:
        core = text.strip()
        if not core:
            return text
        if len(self._shared) == MOST_SEGMENTS:
            raise RequestError(f"more than {MOST_SEGMENTS} texts are marked as shared; mark fewer", field="messages")
        self._shared.append((core, id))
        before, behind = text.split(core, 1)  # white space alone
        return f"{before}{self._word}x{len(self._shared) - 1}x{behind}"


def _unmarked(message: Message) -> Message:
    """A message as templates read it."""
    plain = {name: value for name, value in message.items() if name not in _MARKS}
    if isinstance(plain.get("content"), list):
        plain["content"] = [
            {name: value for name, value in part.items() if name not in _MARKS} for part in plain["content"]
        ]
    return plain


# ---- rounds ----------------------------------------------------------------------------------------------


def require_single(round: RoundHint | None, *, prompts: int, answers: int) -> None:
    """RequestError where a request with a round has several prompts or wants several answers."""
    if round is None:
        return
    if answers > 1:
        raise RequestError("a request of a round has one answer; leave out n and best_of", field="n")
    if prompts > 1:
        raise RequestError("a request of a round has one prompt; send one request for each", field="prompt")
