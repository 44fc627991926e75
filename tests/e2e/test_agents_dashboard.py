"""The dashboard's panel of agents in a browser: over the real model, and with more than it can draw."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.conftest import ServerProcess, serve
from tests.e2e.test_agents import ask, ask_for_a_call

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

pytestmark = pytest.mark.browser
EVIL = "<img src=x onerror=document.title='hit'>"


@pytest.fixture(scope="module")
def agents() -> Iterator[ServerProcess]:
    with serve("--policy", "agentic", "--kv-memory", "24MiB", "--host-memory", "128MiB") as server:
        yield server


def hints(program: str, node: str, **fields: Any) -> dict[str, Any]:
    return {"extra_body": {"kv_hints": {"agent": {"program": program, "node": node, **fields}}}}


def close(server: ServerProcess, program: str) -> None:
    answer = httpx.post(f"{server.url}/v1/agents/events", json={"type": "close", "program": program}, timeout=30)
    assert answer.status_code == 200


def test_a_program_is_drawn_as_it_goes(agents: ServerProcess, page: Page) -> None:
    from playwright.sync_api import expect

    page.goto(f"{agents.url}/dashboard")
    expect(page.locator("#no-programs")).to_be_visible()
    stalled = page.locator("#block-counts li", has_text="stalled").locator("b")
    kept = page.locator("#call-counts li", has_text="kept").locator("b")
    expect(stalled).to_have_text("0")

    answer, conversation = ask_for_a_call(
        agents, **hints("trip", "plan", agent="planner", critical=True, tool_seconds=90)
    )
    node = page.get_by_role("button", name=re.compile(r"^plan \(planner\): get_weather \d+ of 90 s"))
    expect(node).to_have_class(re.compile("calling.*critical"))
    expect(kept).to_have_text("1")
    expect(stalled).not_to_have_text("0")
    assert page.locator("#block-states .held-stalled").evaluate("part => part.offsetWidth") > 0
    ring = node.locator(".ring")
    before = ring.get_attribute("stroke-dasharray")
    assert before is not None
    expect(ring).not_to_have_attribute("stroke-dasharray", before)

    node.click()
    facts = page.locator(".facts:visible")
    for text in (answer.id, "get_weather", "on the device", "90 s", "given up in", "held blocks"):
        expect(facts).to_contain_text(text)
    facts.locator("dd", has_text=answer.id).evaluate("fact => getSelection().selectAllChildren(fact)")
    expect(facts.locator("dt", has_text="so far").locator("+ dd")).not_to_have_text("0.0 s")
    shown = facts.inner_text()
    expect(facts).not_to_have_text(shown)  # it goes on, and what was selected still is
    assert page.evaluate("String(getSelection())") == answer.id
    node.press("Enter")
    expect(facts).to_have_count(0)

    ask(agents, conversation, max_completion_tokens=4, **hints("trip", "write", agent=EVIL, after=["plan"]))
    expect(page.get_by_role("button", name=f"write ({EVIL}): ended")).to_be_visible()
    expect(page.get_by_role("button", name="plan (planner): ended")).to_be_visible()
    expect(page.locator(".lines path")).to_have_count(1)
    page.get_by_role("button", name="write").press(" ")
    expect(facts).to_contain_text(EVIL)
    expect(page.locator("#board img")).to_have_count(0)
    assert "hit" not in page.title()
    expect(stalled).to_have_text("0")
    close(agents, "trip")
    expect(page.locator(".program")).to_have_count(0)


def test_a_tool_that_takes_longer_than_forecast_is_told_apart(agents: ServerProcess, page: Page) -> None:
    from playwright.sync_api import expect

    for name, seconds in (("slow", 600), ("late", 0.2)):
        ask_for_a_call(agents, **hints(name, "plan", agent=name, tool_seconds=seconds))
    page.goto(f"{agents.url}/dashboard")
    expect(page.locator(".program")).to_have_count(2)
    expect(page.locator(".node.overdue .state")).to_have_text(re.compile(r" s over$"))
    expect(page.locator(".node.overdue")).to_have_attribute("aria-label", re.compile(r"^plan \(late\)"))
    expect(page.locator(".program h3")).to_have_text(["late", "slow"])  # the newest first
    for name in ("slow", "late"):
        close(agents, name)


def made_up(number: int, nodes: int) -> dict[str, Any]:
    """A program as the server tells of it: a chain whose last call has not ended."""
    blocks = {"needed": 9, "device": 4, "host": 3, "disk": 0, "reserved": 2}
    common = {"agent": "coder", "join": "", "depth": 0, "critical": False, "importance": 0, "tool": "", "tokens": 9}
    chain = [
        common | {
            "name": f"n{i}", "request": f"cmpl-{number}-{i}", "after": [f"n{i - 1}"], "blocks": blocks, "call": None,
            "age_seconds": number, "state": "waiting" if i == nodes - 1 else "ended",
        }
        for i in range(nodes)
    ]  # fmt: skip
    times = {"age_seconds": 900 - number, "idle_seconds": 1, "remaining_seconds": None, "total_seconds": None}
    return {"id": f"p{number}", "work_tokens": 1, "nodes": chain, **times}


def test_thousands_of_model_calls_do_not_freeze_the_page(agents: ServerProcess, page: Page) -> None:
    from playwright.sync_api import expect

    with agents.client() as http:
        told = http.get("/v1/agents").json()
    crowd = json.dumps(told | {"data": [made_up(number, 256) for number in range(40)], "programs": 1700})
    asked = []

    def answer(route: Route) -> None:
        asked.append(route.request.url)
        route.fulfill(body=crowd, content_type="application/json")

    page.route("**/v1/agents?*", answer)
    page.goto(f"{agents.url}/dashboard")
    expect(page.locator(".program")).to_have_count(20)
    expect(page.locator(".node")).to_have_count(20 * 40)
    expect(page.locator("#programs-listed")).to_have_text("20 programs, 1,680 more not shown")
    expect(page.locator(".program").first).to_contain_text("216 earlier calls not drawn")
    expect(page.locator(".program h3").first).to_have_text("p19")  # the newest of those seen last
    page.locator(".program").nth(5).evaluate("card => { card.seen = true }")
    already = len(asked)
    while len(asked) < already + 2:
        page.wait_for_timeout(50)  # lets the page ask
    assert page.locator(".program").nth(5).evaluate("card => card.seen"), "the same elements are shown again"
    page.get_by_label("sort by").select_option("waited")
    expect(page.locator(".program h3").first).to_have_text("p39")  # who has waited for 39 seconds


def reached(edges: list[list[int]], start: int) -> set[int]:
    found, left = {start}, [start]
    while left:
        node = left.pop()
        new = {to for come, to in edges if come == node} - found
        found |= new
        left += new
    return found


def test_a_layout_keeps_order_and_room_whatever_clients_say(agents: ServerProcess, page: Page) -> None:
    """Edges go to the right, none is said twice, who is reached stays reached; boxes of a column do not overlap."""
    rng = random.Random(3)
    names = [f"n{i}" for i in range(24)] + ["__proto__", "nobody"]
    graphs = [
        [
            {"name": name, "after": rng.sample(names, rng.randrange(4))}
            for name in rng.sample(names, rng.randrange(1, 25))
        ]
        for _ in range(100)
    ]
    page.goto(f"{agents.url}/dashboard")
    script = "async (graphs) => { const { layout } = await import('/pages/layout.js'); return graphs.map(layout); }"
    for nodes, drawn in zip(graphs, page.evaluate(script, graphs), strict=True):
        at = {node["name"]: index for index, node in enumerate(nodes)}
        said = [[at[a], i] for i, node in enumerate(nodes) for a in node["after"] if at.get(a, i) < i]
        places, edges = drawn["places"], drawn["edges"]
        assert all(edge in said for edge in edges)
        assert all(places[a]["column"] < places[b]["column"] for a, b in edges)
        assert all(reached(edges, i) == reached(said, i) for i in range(len(nodes)))
        assert min(place["row"] for place in places) == 0
        for place in places:
            rows = sorted(each["row"] for each in places if each["column"] == place["column"])
            assert all(b - a > 0.999 for a, b in pairwise(rows))
