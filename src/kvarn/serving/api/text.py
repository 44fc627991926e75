"""The model's text side: tokenizer, chat template and tool-call format, loaded once for the API process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from kvarn.models.chat import ChatTemplate
from kvarn.models.tokenizer import IncrementalDecoder, Tokenizer
from kvarn.models.tool_parsers import detect_format
from kvarn.serving.api.segments import MarkedMessages, Part, Prompt, from_parts

Result = TypeVar("Result")

LONG_TEXT: Final = 20_000
"""Characters or tokens from which tokenising (about 1 µs each) would hold up the event loop: a thread does it."""
LONG_CONVERSATION: Final = 100
"""Messages from which rendering would."""
_DECODER_CONTEXT: Final = 8
"""Last prompt tokens that decide how the first output token is spelt."""
_RESERVED: Final = frozenset({"self", "messages", "tools", "add_generation_prompt"})


class ModelText:
    """Text to tokens and back."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.tool_format = detect_format(template)
        """How the model writes tool calls."""

    @classmethod
    def load(cls, folder: Path) -> ModelText:
        """Read a model folder. Raises ModelError."""
        return cls(Tokenizer.load(folder), ChatTemplate.load(folder))

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return (await self.encode_all([text], add_special_tokens=add_special_tokens))[0]

    async def encode_all(self, texts: list[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """The tokens of each text. Many short ones hold up the event loop as one long one does."""

        return await self._off_loop(
            sum(map(len, texts)),
            lambda: [self._tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts],
        )

    async def encode_parts(self, parts: list[Part]) -> Prompt:
        """The prompt of some parts. Raises RequestError."""
        return await self._off_loop(
            sum(len(part.content) for part in parts), lambda: from_parts(self._tokenizer, parts)
        )

    async def _off_loop(self, length: int, work: Callable[[], Result]) -> Result:
        """What `work` gives, made in a thread where the text is long."""
        return work() if length < LONG_TEXT else await asyncio.to_thread(work)

    async def encode_chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], variables: dict[str, Any]
    ) -> Prompt:
        """The prompt of a conversation (OpenAI messages, maybe marked, and tools). Raises RequestError.

        `variables` reach the template; those that would replace its own are left out.
        """
        variables = {name: value for name, value in variables.items() if name not in _RESERVED}
        # "developer" is the newer name of "system"; no template of the models at hand knows it.
        messages = [message | {"role": "system"} if message["role"] == "developer" else message for message in messages]
        marked = MarkedMessages(messages)

        def render(messages: list[dict[str, Any]]) -> str:
            return self._template.render(messages, tools or None, **variables)

        long = len(messages) >= LONG_CONVERSATION
        plain = await asyncio.to_thread(render, marked.plain) if long else render(marked.plain)
        if marked:
            cut = await asyncio.to_thread(render, marked.stand_ins) if long else render(marked.stand_ins)
            prompt = await self._off_loop(len(plain), lambda: marked.tokens(self._tokenizer, plain, cut))
            if prompt is not None:
                return prompt
        return Prompt(await self.encode(plain, add_special_tokens=False))

    async def decode(self, tokens: list[int]) -> str:
        """Text of `tokens`, special ones spelled out."""
        if len(tokens) < LONG_TEXT:
            return self._tokenizer.decode(tokens, skip_special_tokens=False)
        return await asyncio.to_thread(self._tokenizer.decode, tokens, skip_special_tokens=False)

    def decoder(self, show_special: bool, prompt: list[int]) -> IncrementalDecoder:
        """Decodes what follows `prompt`."""
        return self._tokenizer.incremental_decoder(
            skip_special_tokens=not show_special, context=prompt[-_DECODER_CONTEXT:]
        )

    def piece(self, token: int) -> bytes:
        """The bytes one token stands for."""
        return self._tokenizer.token_bytes(token)

    def without_end(self, tokens: list[int], finish_reason: str | None) -> list[int]:
        """`tokens` without the one that ended the text, which is no part of it."""
        if finish_reason == "stop" and tokens and tokens[-1] in self._tokenizer.eos_tokens:
            return tokens[:-1]
        return tokens
