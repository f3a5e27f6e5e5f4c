"""What stands before every request: exact host and origin, a header on what changes anything, a token off loopback.

A page elsewhere on the web can make this machine's browser send requests here. It cannot choose the Host header (so a
name that was rebound to 127.0.0.1 is refused), and it cannot add a header of its own without a preflight, which is never
answered.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from dataclasses import dataclass
from typing import final
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from undertow.core.errors import SpecError

HEADER = "x-undertow"
COOKIE = "undertow-token"
SAFE = ("GET", "HEAD")
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
          "base-uri 'none'; frame-ancestors 'none'")
_HEADERS = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "same-origin",
            "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin",
            "x-frame-options": "DENY"}


@final
@dataclass(frozen=True)
class Access:
    """Who may ask: Host headers that are answered, and the token that every request needs ("" on loopback: none)."""

    hosts: frozenset[str]
    token: str = ""


def is_loopback(host: str) -> bool:
    """Whether a host to bind is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def access_for(host: str, port: int, token: str) -> Access:
    """Access to a server bound to `host`. Raises SpecError if that is not loopback and there is no token."""
    if not is_loopback(host) and not token:
        raise SpecError(f"--host {host} lets other machines in, and there is no token",
                        "add --token SECRET, or leave --host out and use: ssh -L 8777:127.0.0.1:8777 THIS-MACHINE")
    names = {"127.0.0.1", "localhost", "[::1]", f"[{host}]" if ":" in host else host}
    if host in ("0.0.0.0", "::"):  # every address of this machine
        names |= {socket.gethostname(), *_own_addresses()}
    return Access(frozenset(f"{name}:{port}" for name in names) | (frozenset(names) if port == 80 else frozenset()), token)


def _own_addresses() -> list[str]:
    try:
        return [str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    except OSError:
        return []


@final
class Guard:
    """Middleware that refuses requests from elsewhere and adds the security headers to every answer."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if not scope["path"].startswith("/static/"):
                    headers.setdefault("cache-control", "no-store")
            await send(message)

        refusal = self._refusal(scope) or self._sign_in(scope)
        await (refusal or self._app)(scope, receive, with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that comes from elsewhere."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if host not in self._access.hosts:
            return _refused(421, f"this server is not {host!r}; open the address that undertow dashboard printed")
        if origin is not None and origin != f"{scope['scheme']}://{host}":
            return _refused(403, f"requests from {origin!r} are not answered")
        if scope["method"] not in SAFE and headers.get(HEADER) != "1":
            return _refused(403, f"a request that changes something needs the header {HEADER}: 1")
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            return _refused(403, "requests from another site are not answered")
        return None

    def _sign_in(self, scope: Scope) -> Response | None:
        """None if the request carries the token; with the token in the address, a cookie and the address without it."""
        token = self._access.token
        if not token:
            return None
        headers = Headers(scope=scope)
        cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if _equal(cookie, token) or _equal(bearer, token):
            return None
        params = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if scope["method"] in SAFE and any(name == "token" and _equal(value, token) for name, value in params):
            rest = urlencode([item for item in params if item[0] != "token"])
            answer = RedirectResponse("/" + scope["path"].lstrip("/") + (f"?{rest}" if rest else ""), 303)
            answer.set_cookie(COOKIE, token, httponly=True, samesite="strict")
            return answer
        return _refused(401, "this server needs its token: open the address with ?token=... that undertow dashboard printed")


def _equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


def _refused(status: int, why: str) -> Response:
    return PlainTextResponse(f"{why}\n", status)
