"""The paper's devices and loads, as far as it gives them; what it leaves open is chosen here: see `CONDITIONS`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvarn.reproduce.contract import Scope
from kvarn.reproduce.tokencake.cells import Device, Load, System

BLOCKS = 3050
"""KV blocks of the authors' port: Qwen2.5-14B on a card of 80 GB, at a memory fraction of 0.5."""
A100 = Device("a100-80", "qwen2.5-14b", BLOCKS)
H200 = Device("h200", "qwen2.5-32b", BLOCKS)
SMALL = replace(A100, blocks=320)
"""For loads of a quarter of the length: about as many compete for as many places."""
_PROGRAMS = {
    ("code-writer", "d1"): 64,
    ("code-writer", "d2"): 48,
    ("deep-research", "d1"): 96,
    ("deep-research", "d2"): 64,
}
_BACKLOG = {("code-writer", "d1"): 160, ("code-writer", "d2"): 96}
"""At one program a second: Code-Writer's latency is then seconds by the thousand, as in the paper."""
_QUICK = {"code-writer": 20, "deep-research": 24}
_SCALE = 0.25
"""Of lengths and times in a quick run."""

OURS = System()
RESIDENT = System(options=("like=resident",), host=False)
"""First come, first served; a tool runs inside a live request, whose KV stays where it is: the paper's baseline."""
STOCK = System("fcfs", host=False)
"""First come, first served; a request ends where its tool begins, and its KV is prefix cache: today's servers."""
REACTIVE = System("fcfs")
"""As that, and what the pool has no room for goes to the host, and comes back on a hit."""


@dataclass(frozen=True)
class Panel:
    """One application, data set and device."""

    app: str
    data_set: str
    device: Device

    @property
    def id(self) -> str:
        return f"{self.app}.{self.device.model.removeprefix('qwen2.5-')}.{self.data_set}"

    def load(self, scope: Scope, qps: float, *, backlog: bool = False) -> Load:
        """Programs that come at this rate; with `backlog` enough at the highest for a queue like the paper's."""
        if scope.quick:
            return Load(
                self.app, self.data_set, _QUICK[self.app], qps / _SCALE, stretch=_SCALE, token_scale=_SCALE
            )  # fmt: skip
        programs = _PROGRAMS[self.app, self.data_set]
        if backlog and qps >= 1.0:
            programs = _BACKLOG.get((self.app, self.data_set), programs)
        if scope.level == "full":
            programs = 160 if self.app == "deep-research" else 64
        return Load(self.app, self.data_set, programs, qps)


PANELS = tuple(
    Panel(app, data_set, device)
    for app in ("code-writer", "deep-research")
    for device in (A100, H200)
    for data_set in ("d1", "d2")
)


def panels(scope: Scope) -> tuple[Panel, ...]:
    """All eight; in a quick run one, in small."""
    return (replace(PANELS[0], device=SMALL),) if scope.quick else PANELS


def usual(scope: Scope) -> Panel:
    """The panel of experiments that need only one: Code-Writer with short texts, 14 B parameters."""
    return panels(scope)[0]


def rates(scope: Scope) -> tuple[float, ...]:
    """Programs a second; in a quick run of what a second stands for there."""
    return {"quick": (0.05, 1.0), "default": (0.05, 1.0), "full": (0.05, 0.1, 0.2, 0.5, 1.0)}[scope.level]


def seeds(scope: Scope) -> tuple[int, ...]:
    """Repeats cost too much here for as many as elsewhere."""
    return tuple(scope.seeds[: {"quick": 1, "default": 1, "full": 5}[scope.level]])


CONDITIONS = {
    "stall modes": (
        "resident (a tool runs inside a live request, whose KV stays) and finished (the request ends, its KV is prefix "
        "cache); the baseline of e1 and e3 to e6 is resident, that of e2 finished, with prefix caching on in both"
    ),
    "kv pool": f"{BLOCKS} blocks of 16 tokens on both devices, as in the authors' port (not in the paper)",
    "host memory": "100 GB for systems that use any, none for the others",
    "loads": (
        "finite batches of programs with Poisson arrivals: Code-Writer 64 (d1) and 48 (d2), in e1 and e2 at 1 "
        "program/s 160 and 96; Deep Research 96 and 64; --full: 64 and 160. At 0.2 programs/s and more they come "
        "faster than they can be served, so latencies are those of a drain, as in the paper, which does not say how "
        "many programs it had"
    ),
    "data sets": (
        "d1 lengths like ShareGPT's, d2 like AgentCode's: drawn, not read; the paper's d1 and d2 are presumed so"
    ),
    "tools": (
        "simulated; lognormal around the middle of the paper's table with deviation 0.8 of the logarithm (the paper: "
        "Poisson); their clients say the middle, not what they will take"
    ),
    "hints": "programs' graphs with loops unrolled, so a client knows how often its loops go round",
    "output lengths": "max_tokens is exactly what a request gets, for every system",
    "step times": "roofline of the maker's figures with assumed shares (src/kvarn/hardware/accelerators.toml)",
    "published": "seconds read off the paper's figures by pixel, about 1 % off",
    "intervals": "95 %, Student's t over seeds; of means over panels: over panels",
}
