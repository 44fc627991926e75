"""Pages for a browser: files beside this one, sent as they are. What they show they ask of the API, with its keys.

Nothing comes from elsewhere, and the headers forbid it: no scripts, styles, fonts or pictures but these files, no
requests but to this server, no frames around a page.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

_FOLDER: Final = Path(__file__).parent
_TYPES: Final = {".html": "text/html", ".css": "text/css", ".svg": "image/svg+xml", ".js": "text/javascript"}
_PAGES: Final = {"/dashboard": "dashboard.html"}
_PARTS: Final = (
    "icon.svg", "style.css", "agents.css", "client.js", "parts.js", "dashboard.js", "agents.js", "graph.js",
    "layout.js", "rounds.js",
)  # fmt: skip
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_pages(app: FastAPI) -> None:
    """Serve the pages and their parts. They hold no data, so they need no key."""
    for path, name in _PAGES.items() | {(f"/pages/{name}", name) for name in _PARTS}:
        app.add_api_route(path, _sends(_FOLDER / name), methods=["GET"], include_in_schema=False)


def _sends(file: Path) -> Callable[[Request], Awaitable[Response]]:
    content, media_type = file.read_bytes(), f"{_TYPES[file.suffix]}; charset=utf-8"

    async def send(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return send
