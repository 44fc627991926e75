"""A browser, for the tests of pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page


@pytest.fixture
def page() -> Iterator[Page]:
    """A page of a headless Chromium, which may log no error but answers that are errors."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert program, "these tests need Chromium (Debian: apt install chromium)"
    flags = ["--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update"]
    errors: list[str] = []
    with sync_playwright() as playwright:
        # Chromium's sandbox does not work for root, which tests in containers often are.
        browser = playwright.chromium.launch(executable_path=program, args=flags, chromium_sandbox=os.getuid() != 0)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
        browser.close()
    assert [error for error in errors if "Failed to load resource" not in error] == []  # refusals, which tests cause
