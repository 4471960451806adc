"""A web server on the loopback interface that offers one folder, for pictures made on this machine."""

from __future__ import annotations

import logging
import mimetypes
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar
from urllib.parse import unquote, urlsplit

_log = logging.getLogger(__name__)


@contextmanager
def serve_folder(folder: Path) -> Iterator[str]:
    """Offer a folder's files at a free port of 127.0.0.1 while the context lasts, and give the address: ``http://127.0.0.1:<port>``.

    Only regular files that really lie below the folder are offered; everything else is 404.
    """
    handler = type("_Handler", (_FileHandler,), {"root": folder.resolve()})
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="origin", daemon=True
        )
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        _log.info("offering %s at %s", folder, address)
        try:
            yield address
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    """A threading server that takes a burst of clients and does not wait for idle ones at the end."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256


class _FileHandler(BaseHTTPRequestHandler):
    """Answers GET and HEAD with a file of ``root``; logs nothing."""

    protocol_version = "HTTP/1.1"
    timeout = 30
    wbufsize = -1  # head and body leave in one packet
    root: ClassVar[Path]

    def do_GET(self) -> None:
        """Send the file."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """Send the file's head."""
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        body = self._file_bytes()
        status = HTTPStatus.OK if body is not None else HTTPStatus.NOT_FOUND
        self.send_response_only(status)
        kind = mimetypes.guess_type(self.path)[0] or "application/octet-stream"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if with_body and body:
            self.wfile.write(body)

    def _file_bytes(self) -> bytes | None:
        """Return the asked file's bytes, or None when there is no such file below the root."""
        asked = unquote(urlsplit(self.path).path).lstrip("/")
        try:
            path = (self.root / asked).resolve()
            return path.read_bytes() if path.is_relative_to(self.root) else None
        except (OSError, ValueError):
            return None

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: one line per picture helps nobody."""
