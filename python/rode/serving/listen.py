"""The socket, and uvicorn on it."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

import uvicorn

from rode.serving.limits import Limits

if TYPE_CHECKING:
    from fastapi import FastAPI


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet.

    Raises:
        OSError: the address is taken, or none of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except OSError as error:
        raise OSError(
            f"--host {host} --port {port}: cannot listen there: {error.strerror or error}"
        ) from None
    return found


def server(app: FastAPI, limits: Limits, *, quiet: bool = False) -> uvicorn.Server:
    """uvicorn for the application. On SIGTERM it takes no more requests, and answers those that it has."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        # Its own configuration would close the handlers of all others, and absl's then closes the stream that it writes to.
        log_config=None,
        log_level="warning" if quiet else "info",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=int(limits.timeout) + 5,
    )
    return uvicorn.Server(config)


def listen(app: FastAPI, bound: socket.socket, limits: Limits, *, quiet: bool, names: Sequence[str]) -> None:
    """Serve until a signal comes."""
    host, port = bound.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    print(f"http://{address}/v1 serves {', '.join(names)}", flush=True)
    server(app, limits, quiet=quiet).run(sockets=[bound])
