"""The text side of the API process keeps the event loop free."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from kvarn.models.chat import ChatTemplate
from kvarn.models.tokenizer import Tokenizer
from kvarn.serving.api.text import LONG_TEXT, ModelText


class WatchedTokenizer(Tokenizer):
    """Notes in which threads it is used."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        threads.add(threading.current_thread())
        return super().encode(text, add_special_tokens=add_special_tokens)


threads: set[threading.Thread] = set()


@pytest.mark.parametrize(
    ("texts", "in_loop"),
    [(["short"], True), (["x " * LONG_TEXT], False), (["some words"] * (LONG_TEXT // 10), False)],
)
def test_long_texts_and_many_short_ones_are_tokenised_off_the_event_loop(
    model_folder: Path, texts: list[str], in_loop: bool
) -> None:
    threads.clear()
    tokenizer = WatchedTokenizer.load(model_folder)
    tokens = asyncio.run(ModelText(tokenizer, ChatTemplate.load(model_folder)).encode_all(texts))
    assert (threads == {threading.current_thread()}) is in_loop
    assert tokens == [tokenizer.encode(text) for text in texts]
