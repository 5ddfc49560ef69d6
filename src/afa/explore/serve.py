"""Serves the page on this machine alone, until it is stopped. Only what the page needs is answered; no file is."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import webbrowser
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from afa.errors import AfaError
from afa.explore.explorer import Explorer
from afa.report.confusion import EXPLORER_PORT

_HOST: Final = "127.0.0.1"
_ANSWERED: Final = re.compile(
    r"/(assets/.*|static/.*|svelte/.*|theme\.css|favicon\.ico|manifest\.json|config/?|"
    r"gradio_api/(queue/(join|data)|heartbeat/\w+|cancel|reset/?|startup-events|app_id/?|info/?|theme\.css|user/?))?"
)
"""Paths of the page; gradio's others, for files, uploads and proxies, are refused."""

_POLICY: Final = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)


class _Guard:
    """Refuses what is not of the page, and other names of this machine; tells the browser to load from here alone."""

    def __init__(self, app: Any, hosts: frozenset[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        path = unquote(scope.get("path", ""))
        if host not in self.hosts or ".." in path or not _ANSWERED.fullmatch(path):
            await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return

        async def send_guarded(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", _POLICY.encode())
                message["headers"] = [*message["headers"], policy, (b"referrer-policy", b"no-referrer")]
            await send(message)

        await self.app(scope, receive, send_guarded)


def require_gradio() -> None:
    """Import gradio, with its telemetry off.

    Raises:
        AfaError: It is not installed, or cannot be imported.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise AfaError(f"the explorer needs gradio ({error}); pip install afa[explore]") from None


def serve(explorer: Explorer, *, port: int | None = None, browser: bool = True) -> None:
    """Serve the page until Ctrl-C; the first line on standard output is its address.

    Args:
        explorer: What the page shows.
        port: None takes that of the links of a report, or a free one if that is taken; 0 a free one.
        browser: Also open it in the browser.

    Raises:
        AfaError: gradio is missing; the port is taken.
    """
    require_gradio()
    import uvicorn

    listening = listen(port)
    port = listening.getsockname()[1]
    address = f"http://{_HOST}:{port}/"
    app = page_app(explorer, port)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1, timeout_keep_alive=60)
    )
    explorer.ranking.start()
    print(address, flush=True)
    print("Ctrl-C stops it", file=sys.stderr)
    if browser:
        threading.Timer(1.0, webbrowser.open, [address]).start()
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


def listen(port: int | None) -> socket.socket:
    """A socket that listens on a port of this machine alone, as `serve` takes it."""
    if port is None:
        with contextlib.suppress(AfaError):
            return listen(EXPLORER_PORT)
        print(f"port {EXPLORER_PORT} is taken, so the links of report.html do not lead here", file=sys.stderr)
        port = 0
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((_HOST, port))
        listening.listen()
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or error
        raise AfaError(f"--port {port}: {reason}; pass another, or leave it out for a free one") from None
    return listening


def page_app(explorer: Explorer, port: int) -> Any:
    """The ASGI application of the page on a port, as it may also be hosted."""
    import fastapi
    import gradio as gr

    from afa.explore.page import Page

    page = Page(explorer)
    page.blocks.queue(default_concurrency_limit=4)
    font = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=font, font_mono=["ui-monospace", "monospace"])
    layout = Path(__file__).with_name("layout.css")
    app = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None), page.blocks, path="/", server_name=_HOST, server_port=port, theme=theme,
        css_paths=[layout], footer_links=[], run_history=False, ssr_mode=False, pwa=False,
        allowed_paths=[], max_file_size=1,
    )  # fmt: skip
    return _Guard(app, frozenset({f"{_HOST}:{port}", f"localhost:{port}"}))
