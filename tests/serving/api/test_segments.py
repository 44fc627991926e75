"""Prompts in parts: a shared text is the same tokens wherever it stands, and marks never change what a prompt says."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors

from kvarn.errors import RequestError
from kvarn.models.chat import ChatTemplate
from kvarn.models.tokenizer import Tokenizer
from kvarn.serving.api.segments import MOST_SEGMENTS, Part, Prompt, from_parts, split_text
from kvarn.serving.api.text import ModelText
from kvarn.serving.rounds.hints import Segment

STRIPS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
SWAPS = "{% for m in messages | reverse %}{{ m.content }}|{% endfor %}"
SHOUTS = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
REPEATS = "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"
TEXTS = [
    "one",
    " led by a space",
    "trailing \n",
    "日本語 🦊",
    "a\u0301 combined",
    "\n\n  both  \n",
    "<|im_end|> special",
]


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.load(model_folder)


@pytest.fixture(scope="module")
def template(model_folder: Path) -> ChatTemplate:
    return ChatTemplate.load(model_folder)


def spaced(kind: str) -> Tokenizer:
    """A vocabulary of letters that puts a space before texts, and a BOS before and an EOS behind prompts."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    backend = tokenizers.Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return Tokenizer(backend, config={}, eos=frozenset({2}))


def shared(prompt: Prompt) -> list[list[int]]:
    """The tokens of each shared segment."""
    found, place = [], 0
    for segment in prompt.segments:
        if segment.kind == "shared":
            found.append(prompt.tokens[place : place + segment.tokens])
        place += segment.tokens
    assert place == len(prompt.tokens)
    return found


def chat(tokenizer: Tokenizer, template: ChatTemplate, *messages: dict[str, Any]) -> Prompt:
    return asyncio.run(ModelText(tokenizer, template).encode_chat(list(messages), [], {}))


def message(*texts: str, role: str = "user", **marks: str) -> dict[str, Any]:
    """Texts that begin with + are shared parts."""
    parts = [
        {"type": "text", "text": text.removeprefix("+")} | ({"segment": "shared"} if text[:1] == "+" else {})
        for text in texts
    ]
    return {"role": role, "content": parts} | marks


# ---- plain prompts ---------------------------------------------------------------------------------------


@given(
    before=st.text(max_size=20), text=st.text(min_size=1, max_size=20), behind=st.text(max_size=20), first=st.booleans()
)
def test_a_shared_text_is_the_same_tokens_wherever_it_stands(
    tokenizer: Tokenizer, before: str, text: str, behind: str, first: bool
) -> None:
    """Law: neither what stands before nor what stands behind changes a part's tokens; nothing is added between."""
    parts = [Part("private", before)] * (not first) + [Part("shared", text, "x"), Part("task", behind)]
    prompt = from_parts(tokenizer, parts)
    alone = tokenizer.encode(text, add_special_tokens=False)
    assert shared(prompt) == ([alone] if alone else [])
    pieces = ["" if first else before, text, behind]
    assert prompt.tokens == [id for piece in pieces for id in tokenizer.encode(piece, add_special_tokens=False)]


@pytest.mark.parametrize("kind", ["prepend", "always", "first", "never"])
def test_vocabularies_that_begin_texts_with_a_space_begin_no_part_with_one(kind: str) -> None:
    tokenizer = spaced(kind)
    text = [Part("private", "ab"), Part("shared", "cd"), Part("task", " ef")]
    prompt = from_parts(tokenizer, text)
    assert prompt.tokens == tokenizer.encode("abcd ef")
    assert prompt.segments == (
        Segment("private", 3 if kind == "never" else 4), Segment("shared", 2), Segment("task", 4)
    )  # fmt: skip
    leading = from_parts(tokenizer, text[1:])
    assert shared(leading) == shared(prompt) and leading.segments[0] == Segment("private", 1)  # the BOS


def test_token_ids_stand_as_they_are(tokenizer: Tokenizer) -> None:
    prompt = from_parts(spaced("prepend"), [Part("shared", [5, 6]), Part("task", [7])])
    assert prompt == Prompt([5, 6, 7], (Segment("shared", 2), Segment("task", 1)))


def test_empty_parts_are_none_and_private_neighbours_are_one(tokenizer: Tokenizer) -> None:
    parts = [Part("shared", ""), Part("private", "a"), Part("private", "b"), Part("shared", []), Part("task", "c")]
    prompt = from_parts(tokenizer, parts)
    assert [segment.kind for segment in prompt.segments] == ["private", "task"]
    assert from_parts(tokenizer, [Part("task", "")]) == Prompt([])


def test_a_separator_divides_a_text() -> None:
    assert split_text("a<>b<>c<>d", "<>") == [
        Part("private", "a"), Part("shared", "b"), Part("shared", "c"), Part("task", "d")
    ]  # fmt: skip
    assert split_text("a<>d", "<>") == [Part("private", "a"), Part("task", "d")]


# ---- conversations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("source", [None, STRIPS])
def test_a_shared_text_of_a_conversation_is_the_same_tokens_in_every_place(
    tokenizer: Tokenizer, template: ChatTemplate, text: str, source: str | None
) -> None:
    """As a message, as its first, middle or last part, behind other texts; and the prompt says what it said."""
    used = template if source is None else ChatTemplate({"default": source})
    system = message("You are an agent.", role="system")
    places = [
        [{"role": "user", "content": text, "segment": "shared"}],
        [system, {"role": "user", "content": text, "segment": "shared"}, message("Go on.")],
        [system, message("+" + text, "And now?")],
        [system, message("Look: ", "+" + text, " Well?")],
        [message("Another history. " * 7), message("Look:", "+" + text)],
        [system, message("+" + text, segment="private"), message("Go on.", segment="task")],
    ]
    found = []
    for messages in places:
        prompt = chat(tokenizer, used, *messages)
        plain = chat(tokenizer, used, *json.loads(json.dumps(messages).replace('"shared"', '"private"')))
        assert plain.segments == ()
        assert tokenizer.decode(prompt.tokens, skip_special_tokens=False) == tokenizer.decode(
            plain.tokens, skip_special_tokens=False
        )
        found += shared(prompt)
    assert len(found) == len(places)
    assert all(tokens == tokenizer.encode(text.strip(), add_special_tokens=False) for tokens in found)


def test_what_stands_between_is_private_and_what_comes_last_the_task(
    tokenizer: Tokenizer, template: ChatTemplate
) -> None:
    prompt = chat(tokenizer, template, message("+one", "two", "+three", segment_id="all"), message("four"))
    assert [(segment.kind, segment.id) for segment in prompt.segments] == [
        ("private", ""), ("shared", "all"), ("private", ""), ("shared", "all"), ("task", "")
    ]  # fmt: skip
    names = [{"type": "text", "text": "one", "segment": "shared", "segment_id": "its own"}]
    prompt = chat(tokenizer, template, {"role": "user", "content": names, "segment_id": "all"})
    assert prompt.segments[1].id == "its own"


@pytest.mark.parametrize("source", [SHOUTS, REPEATS, "{{ messages[0].content | e }}", "{{ messages[1].content }}"])
def test_a_template_that_changes_a_text_makes_an_ordinary_prompt(tokenizer: Tokenizer, source: str) -> None:
    messages = [message("+<one> & two"), message("three")]
    prompt = chat(tokenizer, ChatTemplate({"default": source}), *messages)
    rendered = ChatTemplate({"default": source}).render([message("<one> & two"), message("three")])
    assert prompt == Prompt(tokenizer.encode(rendered, add_special_tokens=False))


def test_a_template_may_change_the_order(tokenizer: Tokenizer) -> None:
    prompt = chat(tokenizer, ChatTemplate({"default": SWAPS}), message("+one two"), message("+three"))
    assert tokenizer.decode(prompt.tokens) == "three|one two|"
    assert list(map(tokenizer.decode, shared(prompt))) == ["three", "one two"]


@pytest.mark.parametrize("content", ["", " \n", None])
def test_a_shared_text_without_words_is_none(tokenizer: Tokenizer, template: ChatTemplate, content: str | None) -> None:
    assert chat(tokenizer, template, {"role": "user", "content": content, "segment": "shared"}).segments == ()


def test_more_shared_texts_than_anybody_has_are_refused(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    with pytest.raises(RequestError, match="mark fewer"):
        chat(tokenizer, template, message(*["+x"] * (MOST_SEGMENTS + 1)))
