"""Log-probabilities in OpenAI's two shapes: chat's list of objects, and the parallel arrays of plain completions."""

from __future__ import annotations

from typing import Any

from kvarn.serving.api.text import ModelText
from kvarn.serving.batch import TokenLogprobs

LEAST = -9999.0
"""What stands for minus infinity, which JSON cannot say."""


def chat_logprobs(text: ModelText, tokens: list[int], logprobs: list[TokenLogprobs]) -> dict[str, Any]:
    """{"content": [...]} of some output tokens."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        piece = text.piece(token)
        return {"token": piece.decode("utf-8", "replace"), "logprob": max(logprob, LEAST), "bytes": list(piece)}

    content = [
        entry(token, info.logprob) | {"top_logprobs": [entry(*other) for other in info.top]}
        for token, info in zip(tokens, logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    text: ModelText, tokens: list[int], logprobs: list[TokenLogprobs], offset: int
) -> tuple[dict[str, Any], int]:
    """The arrays of some output tokens, the first of which starts at character `offset`; and the next offset."""
    names = [_name(text, token) for token in tokens]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(text.piece(token).decode("utf-8", "ignore"))
    arrays = {
        "tokens": names,
        "token_logprobs": [max(info.logprob, LEAST) for info in logprobs],
        "top_logprobs": [
            {_name(text, token): max(value, LEAST) for token, value in [(chosen, info.logprob), *info.top]}
            for chosen, info in zip(tokens, logprobs, strict=True)
        ],
        "text_offset": offsets,
    }
    return arrays, offset


def _name(text: ModelText, token: int) -> str:
    """A token's text; its bytes spelled out where they are no whole characters, so that names stay distinct."""
    piece = text.piece(token)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
