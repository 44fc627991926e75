"""Whether an engine can ever serve a request; one that it cannot is refused before anything is kept of it."""

from __future__ import annotations

from kvarn.errors import RequestError
from kvarn.serving.request import Request


def require_fit(request: Request, max_context: int, vocab_size: int) -> None:
    """RequestError unless prompt and answer fit the context, in tokens, and all settings and token ids are valid."""
    request.params.validate(vocab_size)
    length, room = request.prompt_length, max_context
    if length < 1:
        raise RequestError("the prompt has no tokens; send at least one", field="prompt")
    if length + request.params.max_tokens > room:
        raise RequestError(
            f"the prompt has {length} tokens and max_tokens is {request.params.max_tokens}, together "
            f"{length + request.params.max_tokens}; this server's context is {room} tokens: shorten the prompt "
            "or lower max_tokens",
            field="max_tokens" if length < room else "prompt",
            code="context_length_exceeded",
        )
    tokens = request.tokens[:length]
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise RequestError(f"the prompt has a token id outside 0 to {vocab_size - 1}", field="prompt")
