"""A cell on a real model: the same agents, with KV that is moved while their tools run and without; equal tokens?

The model is a small Llama with random weights in float32, made where it runs. Some tools answer before they were
expected, some after, one never and its agent is closed; all conversations begin with the same system prompt.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvarn.serving.agents.events import CallFinish, CallStart, Close
from kvarn.serving.agents.hints import AgentHints
from kvarn.serving.assemble import load_engine
from kvarn.serving.clock import VirtualClock
from kvarn.serving.config import EngineConfig
from kvarn.serving.engine import Engine
from kvarn.serving.request import FinishReason, Request
from kvarn.serving.sampling.params import SamplingParams

_VOCABULARY = 199
_SYSTEM, _TASK, _RESULT, _OUTPUTS = 40, 24, 9, 16
_STEP_SECONDS = 0.01
_BLOCKS = 5
"""For each agent, whose conversation grows to more than twice as many."""


@dataclass(frozen=True)
class RealModel:
    """The cell: tokens that differ between a server that moves KV and one that has room for all."""

    agents: int
    turns: int
    repeat: int

    alone = False

    @property
    def cost(self) -> float:
        return float(self.agents * self.turns)

    def run(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            _save_model(Path(folder), self.repeat)
            moving = _engine(folder, _BLOCKS * self.agents, host=True)
            ours = self._play(moving)
            theirs = self._play(_engine(folder, 20 * self.agents, host=False))
        assert moving.agents is not None
        counters = moving.agents.held.counters
        differing = sum(a != b for name in theirs for a, b in zip(ours[name], theirs[name], strict=True))
        return {
            "tokens": sum(len(tokens) for tokens in theirs.values()), "differing": differing,
            "offloads": counters.offloads, "uploads": counters.uploads, "loads": moving.counters.loads,
        }  # fmt: skip

    def _play(self, engine: Engine) -> dict[str, list[int]]:
        """Agent -> all tokens that were generated for it."""
        rng = np.random.default_rng(self.repeat)
        system = rng.integers(3, _VOCABULARY, _SYSTEM)
        texts = [np.concatenate([system, rng.integers(3, _VOCABULARY, _TASK)]) for _ in range(self.agents)]
        results = rng.integers(3, _VOCABULARY, (self.agents, self.turns, _RESULT))
        steps = rng.integers(3, 60, (self.agents, self.turns))
        made: dict[str, list[int]] = {str(agent): [] for agent in range(self.agents)}
        turn, due = [0] * self.agents, dict[int, int]()
        for agent in range(self.agents):
            engine.add(_request(agent, 0, texts[agent]))
        step = 0
        while engine.has_work or due:
            for agent in [agent for agent, at in due.items() if at <= step]:
                del due[agent]
                if agent == 0 and turn[agent] == self.turns - 1:
                    engine.agent_event(Close(program="0"))  # gone for good, with its tool still running
                    continue
                if agent % 2:
                    engine.agent_event(CallFinish(f"{agent}/{turn[agent]}"))
                texts[agent] = np.concatenate([texts[agent], results[agent, turn[agent]]])
                turn[agent] += 1
                engine.add(_request(agent, turn[agent], texts[agent]))
            for emission in engine.step():
                agent = int(emission.request.id.partition("/")[0])
                if emission.token is not None:
                    made[str(agent)].append(emission.token)
                    texts[agent] = np.append(texts[agent], emission.token)
                if emission.finish_reason is FinishReason.LENGTH and turn[agent] < self.turns:
                    expected = _STEP_SECONDS * (30 if turn[agent] % 2 else int(steps[agent, turn[agent]]))
                    engine.agent_event(CallStart(emission.request.id, tool="search", seconds=expected))
                    due[agent] = step + int(steps[agent, turn[agent]])
            assert isinstance(engine.clock, VirtualClock)
            engine.clock.advance(_STEP_SECONDS)
            step += 1
        return made


def _request(agent: int, turn: int, tokens: np.ndarray[Any, Any]) -> Request:
    return Request.create(
        f"{agent}/{turn}",
        tokens.astype(np.int32),
        SamplingParams(temperature=0.0, max_tokens=_OUTPUTS, ignore_eos=True),
        arrival=0.0,
        agent=AgentHints(program=str(agent), agent=f"role {agent % 3}"),
        continues=f"{agent}/{turn - 1}" if turn else "",
    )


def _engine(folder: str, blocks: int, *, host: bool) -> Engine:
    config = EngineConfig(
        model=folder, precision="float32", policy="agentic" if host else "fcfs", max_running=8, token_budget=128,
        prefill_budget=64, kv_memory_bytes=blocks * 16 * _token_bytes(), speculation="off",
        host_memory_bytes=200 * 16 * _token_bytes() if host else 0,
    )  # fmt: skip
    return load_engine(config, clock=VirtualClock()).engine


def _token_bytes() -> int:
    """Keys and values of 2 heads of 16 elements in 3 layers, float32."""
    return 2 * 2 * 16 * 3 * 4


def _save_model(folder: Path, seed: int) -> None:
    """Weights large enough that every part of the model shows in its answers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
