"""Prompts of exact length and random content: a workload's numbers in, token ids or text out.

Content is random but seeded, so that a run can be repeated and no prefix cache helps unless the workload says so:
where a `RequestSpec` carries prefix ids, each id stands for one block of tokens, the same wherever it appears.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from kvarn.errors import KvarnError
from kvarn.models.sources import resolve
from kvarn.simulation.workloads import RequestSpec

DEFAULT_TOKENS = (1000, 20000)
"""Ids of plain text pieces in nearly every vocabulary: above bytes and control tokens, below 32,000."""
_MIN_WORDS = 200


@dataclass(frozen=True)
class PromptMaker:
    """Makes the prompt of each request of one run."""

    seed: int = 0
    tokens: tuple[int, int] = DEFAULT_TOKENS
    """Lowest id and one above the highest that may appear in a prompt."""
    words: tuple[str, ...] = ()
    """Text pieces that are one token each, wherever they stand; needed for `text`."""

    def token_ids(self, spec: RequestSpec, index: int) -> list[int]:
        """`spec.prompt_tokens` ids; `index` tells requests apart that share no prefix."""
        low, high = self.tokens
        return self._draw(spec, index, low, high).tolist()

    def text(self, spec: RequestSpec, index: int) -> str:
        """Text of `spec.prompt_tokens` tokens, by the tokenizer that chose the words."""
        if not self.words:
            raise KvarnError("text prompts of exact length need a tokenizer; name the model's with --tokenizer")
        return "".join(self.words[number] for number in self._draw(spec, index, 0, len(self.words)))

    def _draw(self, spec: RequestSpec, index: int, low: int, high: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        blocks = [
            np.random.default_rng([self.seed, 1, block]).integers(low, high, spec.prefix_block_tokens)
            for block in spec.prefix_ids
        ]
        shared = np.concatenate(blocks)[: spec.prompt_tokens] if blocks else np.empty(0, dtype=np.int64)
        own = np.random.default_rng([self.seed, 2, index]).integers(low, high, spec.prompt_tokens - len(shared))
        return np.concatenate([shared, own])


def load_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of a model by name, folder or file; KvarnError when it has no tokenizer.json."""
    file = resolve(model).folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise KvarnError(f"cannot read the tokenizer {file}: {error}") from error


def single_token_words(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Words with a leading space that are one token alone and stay one token each in a row."""
    letters = set(string.ascii_letters)
    words = []
    for token in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token])
        plain = len(text) > 2 and text[0] == " " and letters.issuperset(text[1:])
        if plain and tokenizer.encode(text, add_special_tokens=False).ids == [token]:
            words.append(text)
    if len(words) < _MIN_WORDS:
        raise KvarnError(
            f"the tokenizer has {len(words)} words that are one token each; {_MIN_WORDS} are needed. "
            "Use token-id prompts (--prompts tokens) instead"
        )
    return tuple(words)
