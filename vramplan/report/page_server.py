"""Serves the planner's page to this machine only: no other address, no request to anywhere, nothing kept."""

from __future__ import annotations

import json
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from ..errors import ConfigError, Problem, VramplanError
from .page import Page

HOST = "127.0.0.1"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What a browser may load for the page: nothing from elsewhere."""

LONGEST_QUERY = 4096


class PageServer(ThreadingHTTPServer):
    """The page on a port of the loopback address; port 0 takes any that is free. A context manager.

    Raises ConfigError when the port cannot be had.
    """

    daemon_threads = True

    def __init__(self, page: Page, port: int) -> None:
        self.page = page
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            rule = f"cannot be listened on ({error.strerror})"
            raise ConfigError(Problem("--port", port, rule, "name another, or leave it out")) from None

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that no longer waits for an answer is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        """Answer one request; what a user did wrong is an answer too."""
        if not self._is_for_us():
            self._send(HTTPStatus.FORBIDDEN, "text/plain", b"This page answers to its own address only.\n")
            return
        path, query = self._asked()
        page = self.server.page
        if path == "/":
            self._send(HTTPStatus.OK, "text/html", page.front().encode())
        elif path == "/page.js":
            script = (files(__package__) / "templates" / "page.js").read_bytes()
            self._send(HTTPStatus.OK, "text/javascript", script)
        elif path == "/configuration.toml":
            self._configuration(query)
        elif path in ("/view", "/more", "/best"):
            self._answer({"/view": page.view, "/more": page.more, "/best": page.best}[path], query)
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", b"There is nothing here.\n")

    def _answer(self, answer: Any, query: dict[str, str]) -> None:
        try:
            found = answer(query)
        except VramplanError as error:
            found = {"problem": str(error)}
        self._send(HTTPStatus.OK, "application/json", json.dumps(found).encode())

    def _configuration(self, query: dict[str, str]) -> None:
        try:
            text, status = self.server.page.configuration(query), HTTPStatus.OK
        except VramplanError as error:
            text, status = f"{error}\n", HTTPStatus.BAD_REQUEST
        kind = "application/toml" if status == HTTPStatus.OK else "text/plain"
        self._send(status, kind, text.encode(), attachment="run.toml" if status == HTTPStatus.OK else "")

    def _is_for_us(self) -> bool:
        """Whether the browser meant this server: a foreign page that resolves its own name to here did not."""
        port = self.server.server_port
        names = {
            f"{name}{end}" for name in (HOST, "localhost") for end in (f":{port}", "" if port == 80 else f":{port}")
        }
        return self.headers.get("Host") in names and self.headers.get("Sec-Fetch-Site") in (None, "none", "same-origin")

    def _asked(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path[:LONGEST_QUERY])
        return parts.path, dict(parse_qsl(parts.query, max_num_fields=50)) if parts.query.count("&") < 50 else {}

    def _send(self, status: HTTPStatus, kind: str, body: bytes, attachment: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        if attachment:
            self.send_header("Content-Disposition", f'attachment; filename="{attachment}"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: each movement of a slider is a request."""
