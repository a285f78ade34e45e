"""The guard in front of every route: Host, then Origin and Sec-Fetch, then the token, then type and size of the body.

A web page that the user has open must not reach the server (DNS rebinding, cross-site requests), nor a neighbor on the
network without the token. It is pure ASGI: nothing is read before it agrees.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from klein_mlx.server.errors import ApiError
from klein_mlx.server.settings import MAX_BODY, Settings

COOKIE = "klein_mlx"
FILES = "/api/files/"
DRAIN_SECONDS = 1.0
SECONDS_PER_BYTE = 1e-6  # a client's body may come this slowly, beside the read time
BODY_TYPES = ("application/json", "multipart/form-data")
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'; "
    "form-action 'self'"
)
_CLOSE = {"Connection": "close", "x-should-retry": "false"}
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


class Guard:
    """Wraps an application; replies itself to what must not reach it. port: on which the server really listens."""

    def __init__(self, app: ASGIApp, settings: Settings, port: int | None = None):
        self.app, self.settings = app, settings
        self.port = settings.port if port is None else port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        state = _Body("content-length" not in headers and "transfer-encoding" not in headers)
        send = _drained(self._with_headers(send, scope["path"], origin), receive, state)
        try:
            self._check_host(headers)
            self._check_origin(scope["method"], headers)
            if scope["method"] == "OPTIONS":  # a preflight brings no token, and learns nothing
                await self._preflight(origin)(scope, receive, send)
                return
            if (reply := self._check_token(scope, headers)) is not None:
                await reply(scope, receive, send)
                return
            self._check_body(headers)
        except ApiError as error:
            error.headers |= _CLOSE
            state.done |= "expect" in headers  # it waits for leave to send its body
            await error.response()(scope, receive, send)
            return
        await self.app(scope, self._counted(receive, state), send)

    def _counted(self, receive: Receive, state: "_Body") -> Receive:
        """The body, counted and timed. Raises ApiError where it is read."""
        loop = asyncio.get_running_loop()
        start, count = loop.time(), 0

        async def counted() -> Message:
            nonlocal count
            if state.done:
                return await receive()
            limit = self.settings.read_seconds + count * SECONDS_PER_BYTE
            try:
                message = await asyncio.wait_for(receive(), max(0.0, start + limit - loop.time()))
            except TimeoutError:
                state.done = True
                raise ApiError(408, "the body did not come in time", None, "timeout", _CLOSE) from None
            count += len(message.get("body", b""))
            if count > MAX_BODY:
                raise ApiError(413, f"the body is over {MAX_BODY >> 20} MB", None, "too_large", _CLOSE)
            state.done = message["type"] != "http.request" or not message.get("more_body")
            return message

        return counted

    # ---- checks, in order ----

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            raise ApiError(400, "a request must have one Host header", None, "bad_host")
        if not self._is_own(hosts[0].lower()):
            raise ApiError(421, "this host is not served here; add --allow-host to serve it", None, "bad_host")

    def _is_own(self, host: str) -> bool:
        name, port = _split_host(host)
        if any(host == allowed or name == allowed for allowed in map(str.lower, self.settings.hosts)):
            return True
        if port != self.port:
            return False
        # An address cannot be rebound, as a name can; a server that is open to the network has several.
        return name in ("127.0.0.1", "localhost", "[::1]") or (not self.settings.is_local and _is_address(name))

    def _check_origin(self, method: str, headers: Headers) -> None:
        origins = headers.getlist("origin")
        for origin in origins:
            host = headers["host"].lower()  # an own one, by now; https where a proxy speaks it
            if origin.lower() not in (f"http://{host}", f"https://{host}") and origin not in self.settings.origins:
                raise ApiError(403, "another site's page may not use this server", None, "forbidden_origin")
        site = headers.get("sec-fetch-site", "none").lower()
        navigates = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
        if not origins and site not in ("same-origin", "none") and not (method == "GET" and navigates):
            raise ApiError(403, "another site's page may not use this server", None, "forbidden_origin")

    def _check_token(self, scope: Scope, headers: Headers) -> Response | None:
        """A redirect for the visit that brings the token, else None."""
        token = self.settings.token
        if token is None:
            return None
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        if scope["method"] == "GET" and scope["path"] == "/" and "token" in query:
            if _same(query["token"][0], token):
                reply = RedirectResponse("/", 303)
                reply.set_cookie(COOKIE, _cookie(token), httponly=True, samesite="strict", path="/")
                return reply
        elif self._presents(headers, token):
            return None
        elif scope["path"].startswith(FILES) and _same(query.get("key", [""])[0], file_key(token, scope["path"])):
            return None
        words = "open the URL with the token that klein-mlx serve printed, or send Authorization: Bearer TOKEN"
        raise ApiError(401, words, None, "invalid_api_key", {"WWW-Authenticate": "Bearer"})

    @staticmethod
    def _presents(headers: Headers, token: str) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return _same(given.strip(), token)
        if kind.lower() == "basic":  # all that clients of web UIs can send
            with contextlib.suppress(ValueError):
                return _same(base64.b64decode(given, validate=True).decode().partition(":")[2], token)
            return False
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and _same(cookie.value, _cookie(token))

    def _check_body(self, headers: Headers) -> None:
        lengths = headers.getlist("content-length")
        if lengths and "transfer-encoding" in headers:  # a proxy in front may take the other one
            raise ApiError(400, "a body has a Content-Length or a Transfer-Encoding, not both", None, "bad_length")
        if "transfer-encoding" not in headers and (not lengths or lengths == ["0"]):
            return
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in BODY_TYPES:
            raise ApiError(415, f"a body must be {' or '.join(BODY_TYPES)}", None, "unsupported_media_type")
        if lengths and (not lengths[0].isdigit() or int(lengths[0]) > MAX_BODY):
            raise ApiError(413, f"the body is over {MAX_BODY >> 20} MB", None, "too_large")

    # ---- replies ----

    def _preflight(self, origin: str | None) -> Response:
        """200 to clients that ask what there is; the browser goes on only where the origin was allowed."""
        headers = {"Allow": "GET, POST, DELETE, OPTIONS"}
        if origin in self.settings.origins:
            headers |= {
                "Access-Control-Allow-Methods": "GET, POST, DELETE",
                "Access-Control-Allow-Headers": "authorization, content-type",
                "Access-Control-Max-Age": "600",
            }
        return Response(None, 200, headers)

    def _with_headers(self, send: Send, path: str, origin: str | None) -> Send:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
                if path.startswith(("/api", "/v1", "/sdapi")):
                    headers.setdefault("Cache-Control", "no-store")
                if origin in self.settings.origins and origin:
                    headers["Access-Control-Allow-Origin"] = origin
                    headers["Access-Control-Allow-Credentials"] = "true"
                    headers["Vary"] = "Origin"
                    headers["Cross-Origin-Resource-Policy"] = "cross-origin"
                message = {**message, "headers": headers.raw}
            await send(message)

        return sending


@dataclass
class _Body:
    """done: whether the request's body was read to its end, or there is none."""

    done: bool


def _drained(send: Send, receive: Receive, state: _Body) -> Send:
    """End a reply only when the body has come or a moment has passed: a client that still writes would get a reset
    instead of the reply."""

    async def drain() -> None:
        while (await receive()).get("more_body"):
            pass

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body") and not state.done:
            state.done = True
            await send({**message, "more_body": True})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(drain(), DRAIN_SECONDS)
            message = {"type": "http.response.body", "body": b""}
        await send(message)

    return sending


def _split_host(host: str) -> tuple[str, int | None]:
    """Name (an IPv6 address in brackets) and port, 80 where there is none; None for a port that is no number."""
    name, colon, port = host.rpartition(":")
    if not colon or host.endswith("]"):
        return host, 80
    return name, int(port) if port.isdecimal() and port.isascii() and len(port) < 6 else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _cookie(token: str) -> str:
    """The cookie's value: it proves that its bearer had the token, and is not the token."""
    return _proof(token, "klein_mlx cookie")


def file_key(token: str, path: str) -> str:
    """The query's `key` that opens one path below FILES without the token, to whom its URL was given."""
    return _proof(token, path)


def _proof(token: str, what: str) -> str:
    return hmac.new(token.encode(), what.encode(), hashlib.sha256).hexdigest()


def url(settings: Settings, port: int) -> str:
    """The one address to print."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    host = f"[{host}]" if ":" in host else host
    token = f"/?token={quote(settings.token)}" if settings.token else "/"
    return f"http://{host}:{port}{token}"
