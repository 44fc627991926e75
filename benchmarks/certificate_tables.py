"""What `kvarn model certify-reuse --json` printed, as the guide shows it."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import Rendered


def certificate_table(data: dict[str, Any]) -> Rendered:
    """A line for each way of reuse; no picture."""
    identity, limits, floor = data["identity"], data["limits"], data["floor"]
    allowed = [(each["mode"], each["share"]) for each in data["allowed"]]
    verdict = "allowed: " + ", ".join(f"{mode} at {share:g}" for mode, share in allowed) if allowed else "none allowed"
    about = f"{identity['precision']} weights, {identity['kv_dtype']} cache; segments {identity['encoding']}"
    size = f"{data['groups']} rounds, {floor['tokens']} tokens, {floor['questions']} facts that the exact engine finds"
    asked = f"KL {limits['mean_kl']:g}, same top-1 {limits['top1']:.0%}, facts {limits['needle']:.0%}"
    lines = [
        f"SmolLM2-135M-Instruct as it is served by default ({about}), {size}. Limits: {asked}; {verdict}.",
        "",
        "| mode | share | anew % | mean KL | P95 KL | same top-1 % | perplexity | facts % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    ways = [(each["mode"], f"{each['share']:g}" if each["share"] else "", each["quality"]) for each in data["measured"]]
    for mode, share, quality in [*ways, ("nothing reused", "", floor)]:
        needle = "" if quality["needle"] is None else f"{quality['needle']:.0%}".rstrip("%")
        lines.append(
            f"| {mode} | {share} | {100 * quality['refreshed']:.0f} | {quality['mean_kl']:.3f} | "
            f"{quality['p95_kl']:.3f} | {100 * quality['top1']:.1f} | x {quality['perplexity_ratio']:.3f} | {needle} |"
        )
    return lines, {}
