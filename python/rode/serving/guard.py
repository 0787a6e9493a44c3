"""Who may ask: the Host header, and the key."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from rode.serving.errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_OPEN = ("/health",)
"""Paths that need no key: they tell a supervisor whether the server lives, and nothing else."""


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_names(bound: str, more: Iterable[str] = ()) -> frozenset[str]:
    """The names that a request's Host may have: those of the loopback, the address bound to, and `more`."""
    return frozenset(name.lower() for name in (*_LOOPBACK, bound, *more) if name not in ("0.0.0.0", "::"))


def _host(header: str) -> str:
    """A Host header without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.rpartition(":")[0].lower() if header.count(":") == 1 else header.lower()


class Guard:
    """Lets requests through whose Host is known, and which carry the key, if there is one.

    A web page that has its name resolve to this machine (DNS rebinding) sends its own name as Host.

    Args:
        app: behind it. hosts: see `host_names`. api_key: None for a server without.
    """

    def __init__(self, app: App, hosts: frozenset[str], api_key: str | None) -> None:
        self.app, self.hosts = app, hosts
        self.key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as error:
            await JSONResponse(error.body(), error.status, error.headers())(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        if scope["type"] != "http":
            raise ApiError(404, "no such address")
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        named = hosts[0].decode("latin-1") if len(hosts) == 1 else ""
        if _host(named) not in self.hosts:
            raise ApiError(
                403,
                f"Host: expected one of {', '.join(sorted(self.hosts))}, got {named[:80]!r}; --allowed-host adds a name",
                code="unknown_host",
            )
        if self.key is None or scope["path"] in _OPEN:
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        kind, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.key):
            raise ApiError(
                401, "expected the server's key: Authorization: Bearer KEY", code="invalid_api_key"
            )
