"""The review page over HTTP on this machine alone, so that decisions are written as they are made."""

from __future__ import annotations

import json
import os
import shutil
import threading
import webbrowser
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rode_food.unifood.golden.decisions import WORDS, read_decisions, write_decisions

_LONGEST = 64 * 1024  # bytes of one decision


class ReviewServer(ThreadingHTTPServer):
    """Serves `review.html` of a folder and keeps its `decisions.json`; see `make_server`."""

    daemon_threads = True
    folder: Path
    lock: threading.Lock
    decisions: dict[str, str]


class _Handler(BaseHTTPRequestHandler):
    server: ReviewServer

    def _ours(self) -> bool:
        """Whether the page itself asks: another site's page cannot set Host, nor send JSON without being asked first."""
        port = self.server.server_address[1]
        if self.headers.get("Host") in (f"127.0.0.1:{port}", f"localhost:{port}"):
            return True
        self._answer(HTTPStatus.FORBIDDEN, {"error": "ask for it by its own address"})
        return False

    def do_GET(self) -> None:
        if not self._ours():
            return
        if self.path == "/":
            try:
                page = (self.server.folder / "review.html").open("rb")
            except OSError as error:
                self._answer(HTTPStatus.NOT_FOUND, {"error": str(error)})
                return
            with page:
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(os.fstat(page.fileno()).st_size))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                shutil.copyfileobj(page, self.wfile)
        elif self.path == "/decisions":
            with self.server.lock:
                self._answer(HTTPStatus.OK, self.server.decisions)
        else:
            self._answer(HTTPStatus.NOT_FOUND, {"error": "no such page"})

    def do_POST(self) -> None:
        if not self._ours():
            return
        try:
            length = int(self.headers.get("Content-Length", ""))
            if self.path != "/decisions" or self.headers.get("Content-Type") != "application/json":
                raise ValueError("expected JSON at /decisions")
            if not 0 < length <= _LONGEST:
                raise ValueError(f"expected at most {_LONGEST} bytes")
            value = json.loads(self.rfile.read(length))
            id, word = value["id"], value["decision"]
            if not isinstance(id, str) or (word is not None and word not in WORDS):
                raise ValueError("expected an id and accept, reject or null")
            id.encode()  # half of a surrogate pair is no text, and no file could hold it
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self.close_connection = True  # what is left of the body is not read
            self._answer(HTTPStatus.BAD_REQUEST, {"error": str(error)})
            return
        with self.server.lock:
            decisions = {key: value for key, value in self.server.decisions.items() if key != id}
            if word is not None:
                decisions[id] = word
            try:
                write_decisions(self.server.folder, decisions)
            except OSError as error:  # a full disk: the page keeps it and says so
                self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)})
                return
            self.server.decisions = decisions
        self._answer(HTTPStatus.OK, {"decided": len(decisions)})

    def _answer(self, status: HTTPStatus, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass  # the terminal shows the address, not each click


def make_server(folder: str | os.PathLike[str], port: int = 0) -> ReviewServer:
    """A server on 127.0.0.1 that has not begun to serve; `server_address[1]` is its port.

    Raises:
        ValueError: for a folder without review.html, or decisions that cannot be read.
        OSError: for a port that is taken.
    """
    folder = Path(folder)
    if not (folder / "review.html").is_file():
        raise ValueError(
            f"{folder} has no review.html; the golden stage of `rode data build-unifood` writes it"
        )
    decisions = read_decisions(folder)
    server = ReviewServer(("127.0.0.1", port), _Handler)
    server.folder, server.lock, server.decisions = folder, threading.Lock(), decisions
    return server


def serve(folder: str | os.PathLike[str], *, port: int = 0, browser: bool = True) -> None:
    """Serves until interrupted.

    Args:
        folder: of the golden stage.
        port: 0 for a free one.
        browser: open the page in the user's browser.
    """
    with make_server(folder, port) as server:
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        print(f"{address}  (Ctrl-C ends; decisions are in {Path(folder) / 'decisions.json'})", flush=True)
        if browser:
            webbrowser.open(address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(f"\n{len(server.decisions)} decided")
