"""The paper's devices and loads, as far as it gives them; what it leaves open is chosen here and said in `CONDITIONS`.

"SL" and "LL" in its tables are taken for short and long lengths: so both bursts of the H200 are 1.02 M tokens. The
other reading, a short prompt and a long output, cannot be excluded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvarn.reproduce.tokenflow.cells import RATE, Device, Load, about
from kvarn.simulation.workloads import Diurnal, LogNormal, Poisson, TruncatedNormal

RTX4090 = Device("rtx4090", "rtx4090", "llama3-8b", 0.88, host_gigabytes=64)
H200 = Device("h200", "h200", "llama3-8b", 0.3, host_gigabytes=160)
H200_32B = Device("h200-32b", "h200", "qwen2.5-32b", 0.6, host_gigabytes=160)
"""At 0.3 the weights of 32 B parameters would not fit; the paper does not say what its trace runs had."""
H200_SHORT = Device("h200-short", "h200", "llama3-8b", 0.3, host_gigabytes=160, scale=0.25)
"""A quarter of the KV memory, for requests of a quarter of the length: as many compete for as many places."""


@dataclass(frozen=True)
class Setup:
    """One of the paper's four conditions, (a) to (d)."""

    name: str
    load: Load
    device: Device

    @property
    def id(self) -> str:
        return f"{self.device.name}.{self.name}"


def _shape(load: Load) -> tuple[TruncatedNormal, TruncatedNormal]:
    assert isinstance(load.prompt, TruncatedNormal) and isinstance(load.output, TruncatedNormal)
    return load.prompt, load.output


def shortened(load: Load, share: float) -> Load:
    """The same requests, so much shorter."""
    prompt, output = _shape(load)
    return replace(load, prompt=about(prompt.mean * share), output=about(output.mean * share))


BURSTS = (
    Setup("a", Load(60, about(512), about(1024)), RTX4090),
    Setup("b", Load(80, about(1024), about(2048)), RTX4090),
    Setup("a", Load(400, about(512), about(2048)), H200),
    Setup("b", Load(200, about(1024), about(4096)), H200),
)
SHORT_BURST = Setup("a", shortened(BURSTS[2].load, H200_SHORT.scale), H200_SHORT)
"""The H200's burst (a) where there is less time: 400 requests of a quarter of the length."""


def stream(setup: Setup, name: str, rate: float, seconds: float) -> Setup:
    """Requests of the setup's lengths that come independently, `rate` a second for so many seconds."""
    count = max(1, round(rate * seconds))
    return Setup(name, replace(setup.load, requests=count, arrivals=Poisson(rate)), setup.device)


def trace(device: Device, rate: float, minutes: float) -> Setup:
    """Like BurstGPT: one day and night squeezed into that time, with bursts within, and long-tailed lengths."""
    load = Load(
        round(rate * minutes * 60),
        LogNormal(400, 1.0, high=4000),
        LogNormal(400, 0.8, high=2000),
        Diurnal(rate, cv=3.0, period=minutes * 60, swing=0.6),
    )
    return Setup("trace", load, device)


CONDITIONS = {
    "readers": f"{RATE:g} tokens/s where nothing else is said",
    "lengths": (
        "normal around the paper's means with a quarter of them as deviation, cut at 0 and four times the mean; "
        "RTX 4090 512/1024 (a, c, d) and 1024/2048 (b), H200 512/2048 and 1024/4096; SL and LL are read as short and "
        "long lengths, which the paper does not say"
    ),
    "output lengths": "known to every policy as max_tokens, since every request runs to its end",
    "rtx4090": "Llama3-8B, memory fraction 0.88, 64 GB of host memory: enough for all",
    "h200": "Llama3-8B, memory fraction 0.3, 160 GB of host memory: enough for all",
    "h200-32b": "Qwen2.5-32B, memory fraction 0.6 (weights do not fit in 0.3), 160 GB of host memory",
    "h200-short": "as h200 with a quarter of the KV memory, and requests of a quarter of the length",
    "host memory": "the same for every policy that moves requests there; qoe-recompute has none, as published",
    "step times": "roofline of the maker's figures with assumed shares (src/kvarn/hardware/accelerators.toml)",
    "intervals": "95 %, Student's t over seeds; ratios pairwise by seed and in logarithms",
}
