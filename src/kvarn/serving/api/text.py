"""The model's text side: tokenizer, chat template and tool-call format, loaded once for the API process."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

from kvarn.models.chat import ChatTemplate
from kvarn.models.tokenizer import IncrementalDecoder, Tokenizer
from kvarn.models.tool_parsers import detect_format

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

        def tokens() -> list[list[int]]:
            return [self._tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]

        if sum(map(len, texts)) < LONG_TEXT:
            return tokens()
        return await asyncio.to_thread(tokens)

    async def encode_chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], variables: dict[str, Any]
    ) -> list[int]:
        """The prompt of a conversation (OpenAI messages and tools). Raises RequestError.

        `variables` reach the template; those that would replace its own are left out.
        """
        variables = {name: value for name, value in variables.items() if name not in _RESERVED}
        # "developer" is the newer name of "system"; no template of the models at hand knows it.
        messages = [message | {"role": "system"} if message["role"] == "developer" else message for message in messages]
        if len(messages) < LONG_CONVERSATION:
            prompt = self._template.render(messages, tools or None, **variables)
        else:
            prompt = await asyncio.to_thread(self._template.render, messages, tools or None, **variables)
        return await self.encode(prompt, add_special_tokens=False)

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
