"""A local page to try a model on, over the standard library's server: it answers one person, and needs nothing more."""

import json
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

from gatewright.extras import require

Answer = Callable[[bytes], Mapping[str, Any]]
"""Says in JSON's types what a model makes of an upload; a `ValueError` says in one sentence why it cannot."""

LARGEST = {"image": 10 * 2**20, "byte": 100_000}
"""Bytes of the largest upload, by what the model reads."""
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
NO_OTHERS = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob:; connect-src 'self'"
)
"""The page may ask this server alone, and no other address."""
SECONDS = 30


class Server(ThreadingHTTPServer):
    """Serves the page and answers uploads, one after the other.

    Args:
        answer: What to call for an upload.
        title: The heading of the page.
        item: What the model reads: ``"image"``, or ``"byte"`` for a text.
        host: Address to listen on.
        port: Port to listen on; 0 takes one that is free.

    Raises:
        OSError: If the port is taken, or the address is not one of this machine.
    """

    daemon_threads = True

    def __init__(self, answer: Answer, *, title: str, item: str, host: str = "127.0.0.1", port: int = 8000) -> None:
        jinja2 = require("jinja2", "train")
        environment = jinja2.Environment(loader=jinja2.PackageLoader("gatewright.report"), autoescape=True)
        largest = LARGEST.get(item, LARGEST["image"])
        page = environment.get_template("serve.html").render(title=title, item=item, largest=largest)
        self.answer, self.page, self.largest, self.lock = answer, page.encode(), largest, Lock()
        self.is_local = host in LOOPBACK
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                f"Nothing can listen on port {port} of {host}: {reason}. Name another port or host."
            ) from error

    @property
    def address(self) -> str:
        """The address of the page."""
        return f"http://{self.server_address[0]!s}:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = SECONDS  # of a browser that says no more

    def do_GET(self) -> None:
        """Return the page."""
        if self._refused():
            return
        if self.path == "/":
            self._send(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
        else:
            self._say(HTTPStatus.NOT_FOUND, f"There is no page {self.path} here. Go to /.")

    def do_POST(self) -> None:
        """Answer an upload."""
        if self._refused():
            return
        length, largest = self.headers.get("Content-Length", ""), self.server.largest
        if self.path != "/ask":
            self._say(HTTPStatus.NOT_FOUND, f"Uploads go to /ask, not to {self.path}.")
        elif not (length.isascii() and length.isdecimal()):
            self._say(HTTPStatus.LENGTH_REQUIRED, "An upload says its length in the header Content-Length.")
        elif int(length) > largest:
            self._say(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"An upload has at most {largest:,} bytes; this one has {int(length):,}.",
            )
        else:
            self._answer(self.rfile.read(int(length)))

    def _answer(self, upload: bytes) -> None:
        try:
            with self.server.lock:  # A model's layers keep the routing of one forward.
                found = self.server.answer(upload)
        except ValueError as error:
            self._say(HTTPStatus.BAD_REQUEST, str(error))
        else:
            self._send_json(HTTPStatus.OK, found)

    def _refused(self) -> bool:
        """Refuse a page of another site that has its name lead to this machine."""
        name = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if self.server.is_local and name not in LOOPBACK:
            self._say(HTTPStatus.FORBIDDEN, f"This page is at {self.server.address}, and not at {name}.")
            return True
        return False

    def _say(self, status: HTTPStatus, sentence: str) -> None:
        self.close_connection = True  # What is left of the upload is not read.
        self._send_json(status, {"error": sentence})

    def _send_json(self, status: HTTPStatus, content: Mapping[str, Any]) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Content-Security-Policy": NO_OTHERS}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 the library's name
        """Print nothing for each request."""
