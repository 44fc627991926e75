"""The tokenizer inside a GGUF file -> tokenizer.json and tokenizer_config.json.

Byte-level BPE vocabularies whose pre-tokenizer is known here are written directly, in under a second. All others
(SentencePiece, unusual splits) go through transformers, which knows many more and takes ten seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from kvarn.errors import ModelError
from kvarn.models.gguf_reader import GGUFFile

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_LLAMA3_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT: Final = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def write_tokenizer(file: GGUFFile, target: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `target`. ModelError when the file has no tokenizer."""
    meta = file.metadata
    if "tokenizer.ggml.tokens" not in meta:
        raise ModelError(f"{file.path} holds no tokenizer (tokenizer.ggml.tokens); it is not a complete model")
    splitter = _pre_tokenizer(meta.get("tokenizer.ggml.pre", "default"))
    if meta.get("tokenizer.ggml.model") == "gpt2" and splitter is not None and "tokenizer.ggml.merges" in meta:
        (target / "tokenizer.json").write_text(_byte_level(file, splitter).to_str(), encoding="utf-8")
    else:
        _write_with_transformers(file, target)
    config_path = target / "tokenizer_config.json"
    config = json.loads(config_path.read_text()) if config_path.exists() else {}
    config_path.write_text(json.dumps(config | _config(meta), indent=2, ensure_ascii=False) + "\n")


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer | None:
    """How text is cut before merging, by llama.cpp's name for it; None when unknown."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("gpt-2", "default"):
        return byte_level
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    split = {"llama-bpe": _LLAMA3_SPLIT, "llama3": _LLAMA3_SPLIT, "qwen2": _QWEN2_SPLIT}.get(name)
    if split is None:
        return None
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_level(file: GGUFFile, splitter: pre_tokenizers.PreTokenizer) -> Tokenizer:
    meta = file.metadata
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    # Llama 3 takes a whole pre-token that is in the vocabulary without merging its way there.
    whole = meta.get("tokenizer.ggml.pre") in ("llama-bpe", "llama3")
    try:
        model = BPE({token: index for index, token in enumerate(tokens)}, merges, ignore_merges=whole)
    except Exception as error:  # the bindings raise bare Exception
        raise ModelError(f"{file.path} has a tokenizer that contradicts itself ({error}); download it again") from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, meta.get("tokenizer.ggml.token_type", ()), strict=False):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    bos = meta.get("tokenizer.ggml.bos_token_id")
    # Absent means true for Llama 3 only: llama.cpp's default for that pre-tokenizer.
    if meta.get("tokenizer.ggml.add_bos_token", whole) and bos is not None:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A $B", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _write_with_transformers(file: GGUFFile, target: Path) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name).save_pretrained(target)
    except Exception as error:  # transformers raises whatever its mapping stumbles over
        raise ModelError(
            f"{file.path}: cannot convert its tokenizer ({type(error).__name__}: {error}); use the safetensors folder"
        ) from error


def _config(meta: dict[str, Any]) -> dict[str, Any]:
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = meta.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token, int) and token < len(tokens):
            config[f"{name}_token"] = tokens[token]
    if "tokenizer.chat_template" in meta:
        config["chat_template"] = meta["tokenizer.chat_template"]
    return config
