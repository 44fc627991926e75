"""The dashboard's panel of rounds in a browser, over the stand-in engine: hidden until there are rounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

from tests.serving.api.conftest import running

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
EVIL = "<img src=x onerror=document.title='hit'>"


def test_the_last_rounds_are_shown_once_there_are_any(page: Page) -> None:
    from playwright.sync_api import expect

    with running() as server:
        page.goto(f"{server.url}/dashboard")
        expect(page.get_by_role("status")).to_have_text("live")
        expect(page.locator("#rounds-panel")).to_be_hidden()
        for id in ("first", EVIL):
            segments = [{"kind": "shared", "content": [5] * 900}, {"kind": "task", "content": "x"}]
            body = {"segments": segments[id != "first" :], "round": {"id": id, "size": 3}, "max_tokens": 2}
            assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).status_code == 200
        rows = page.locator("#rounds tr")
        expect(rows).to_have_count(2)
        expect(rows.nth(0).locator("td").first).to_have_attribute("title", EVIL)
        expect(rows.nth(1)).to_have_text("first1 of 3250 mscollective19002")
        expect(page.locator("#rounds-listed")).to_have_text("2 so far, 1 waiting")
        expect(page.locator("#round-totals")).to_contain_text("900 tokens reused")
        expect(page.locator("#board img")).to_have_count(0)
        assert "hit" not in page.title()
