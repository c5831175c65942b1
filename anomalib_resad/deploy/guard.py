# SPDX-License-Identifier: Apache-2.0

"""What a request must show before anything is served: ASGI middleware for the page, and for all that stands beside it.

A page of another site, open in the same browser, can send requests to this machine too. The name under which it reaches
the server (Host) and where it comes from (Origin) give it away. See SECURITY.md.
"""

import ipaddress
import secrets
from base64 import b64decode
from collections.abc import Callable, Sequence
from contextlib import suppress
from urllib.parse import urlsplit

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.formparsers import MultiPartException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL = ("localhost", "127.0.0.1", "[::1]")
EVERYWHERE = ("0.0.0.0", "::", "[::]")  # noqa: S104  # no names under which a page is opened
MOST_FILES = 20  # of one request; 2 to 8 are usual
LONGEST_BOUNDARY = 70  # bytes, of RFC 2046; what parses forms fails on much longer ones
MOST_JSON = 1_000_000  # bytes of a request without files
LARGEST_AT_ONCE = 2  # of the largest requests; those that wait for the model hold their photos in memory
PRODUCTS = "/v1/products/"  # photos come to these addresses in bodies of any type
SHORTEST_TOKEN = 16
# What Gradio serves beside the page: video through ffmpeg, and files of other servers.
CLOSED = ("/gradio_api/process_recording", "/gradio_api/proxy=", "/gradio_api/file=http")
HEADERS = {"content-security-policy": "frame-ancestors 'none'", "x-content-type-options": "nosniff"}


def is_loopback(host: str) -> bool:
    """Whether an address that is listened on is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def checked_token(host: str, token: str | None) -> str | None:
    """The token that is asked for: the given one, or a new one where others can reach the page.

    Raises:
        ValueError: If the given one can be guessed.
    """
    if token is not None and len(token) < SHORTEST_TOKEN:
        msg = f"The token has {len(token)} characters; use at least {SHORTEST_TOKEN}, or none, and one is made."
        raise ValueError(msg)
    return token if token is not None or is_loopback(host) else secrets.token_urlsafe(24)


def guards(
    host: str, allowed_hosts: Sequence[str], token: str | None, most_bytes: int, tidy: Callable[[], None]
) -> list[Middleware]:
    """What stands before an application.

    Args:
        host (str): Address that is listened on.
        allowed_hosts (Sequence[str]): Further names under which it is opened, for instance that of a proxy.
        token (str | None): What clients must know; ``None`` for nothing.
        most_bytes (int): Most bytes of a request.
        tidy (Callable[[], None]): Run before each request that may leave files.

    Raises:
        ValueError: If a name is a pattern.
    """
    if any("*" in each or "/" in each for each in allowed_hosts):
        msg = f"--allowed_hosts {','.join(allowed_hosts)}: name hosts, without a scheme, and no patterns."
        raise ValueError(msg)
    names = [*LOCAL, *allowed_hosts, *([] if host in EVERYWHERE else [f"[{host}]" if ":" in host else host])]
    return [
        Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False),
        Middleware(Guard, origins=allowed_hosts, token=token, most_bytes=most_bytes, tidy=tidy),
    ]


class Guard:
    """Refuse foreign origins, clients without the token, and requests that are too large, alone or together.

    Args:
        app (ASGIApp): The application.
        origins (Sequence[str]): Names of hosts whose pages may call it, beside its own pages.
        token (str | None): The token: a bearer token, or the password of any user; ``None`` for none.
        most_bytes (int): Most bytes of a request with files.
        tidy (Callable[[], None]): Run before each request that may leave files.
    """

    def __init__(
        self, app: ASGIApp, origins: Sequence[str], token: str | None, most_bytes: int, tidy: Callable[[], None]
    ) -> None:
        self.app = app
        self.origins = [each.lower() for each in origins]
        self.token = token
        self.most_bytes = most_bytes
        self.tidy = tidy
        self._held = 0  # bytes of the requests that are being served; one event loop counts them

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it; there are no websockets."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            headers = Headers(scope=scope)
            with_photos = _is_form(headers) or (scope["method"] == "POST" and scope["path"].startswith(PRODUCTS))
            most = self.most_bytes if with_photos else MOST_JSON
            length = _length(headers, most)
            refused = self._refusal(scope["path"], headers, most) or self._too_much(length)
            if refused is not None:
                await refused(scope, receive, send)
                return
            self._held += length
            try:
                if scope["method"] == "POST":
                    await run_in_threadpool(self.tidy)
                with suppress(ClientDisconnect):  # nobody is left to be answered
                    await self.app(scope, _limited(headers, receive, most), _with_headers(send))
            finally:
                self._held -= length

    def _refusal(self, path: str, headers: Headers, most: int) -> Response | None:
        origin = headers.get("origin")
        if origin is not None and not self._is_own(origin, headers["host"]):
            return PlainTextResponse("Refused: this request comes from a page of another site.", 403)
        if self.token is not None and not _has_token(headers.get("authorization", ""), self.token):
            ask = {"www-authenticate": 'Basic realm="ResAD: the token is the password"'}
            return PlainTextResponse("The token is needed, as password or bearer token.", 401, ask)
        if path.lower().startswith(CLOSED):
            return PlainTextResponse("Not served here.", 404)
        if _length(headers, most) > most:
            return PlainTextResponse(_too_large(most), 413)
        if _is_form(headers) and len(_boundary(headers)) > LONGEST_BOUNDARY:
            return PlainTextResponse(f"The boundary of the form is longer than {LONGEST_BOUNDARY} bytes.", 400)
        return None

    def _too_much(self, length: int) -> Response | None:
        most = LARGEST_AT_ONCE * self.most_bytes
        if not length or self._held + length <= most:
            return None
        text = f"The requests that are being served have {most / 1e6:.0f} MB together. Try again."
        return PlainTextResponse(text, 429, {"retry-after": "1"})

    def _is_own(self, origin: str, host: str) -> bool:
        try:
            url = urlsplit(origin)
            return url.netloc == host.lower() or url.hostname in self.origins
        except ValueError:
            return False


def _length(headers: Headers, most: int) -> int:
    """Bytes of a body as they are stated; one that comes in pieces of unknown number counts as the largest."""
    return most if "transfer-encoding" in headers else int(headers.get("content-length", "0"))


def _too_large(most: int) -> str:
    # "maximum allowed size" is what Gradio makes status 413 of.
    return f"The request exceeds the maximum allowed size of {most / 1e6:.0f} MB."


def _limited(headers: Headers, receive: Receive, most: int) -> Receive:
    """Count bytes and files as they come; a sender may have said nothing, or something else, before."""
    size = files = 0

    def count() -> None:
        nonlocal files
        files += 1
        if files > MOST_FILES:
            msg = f"More than {MOST_FILES} files in a request. Send the others in another one."
            raise MultiPartException(msg)

    parser = None
    if _is_form(headers):
        boundary = _boundary(headers)
        parser = MultipartParser(boundary, {"on_part_begin": count}) if boundary else None

    async def limited() -> Message:
        nonlocal size
        message = await receive()
        body = message.get("body", b"")
        size += len(body)
        if size > most:
            raise MultiPartException(_too_large(most))
        if parser is not None:
            try:
                parser.write(body)
            except MultipartParseError as error:
                raise MultiPartException(str(error)) from error
        return message

    return limited


def _is_form(headers: Headers) -> bool:
    return headers.get("content-type", "").lower().startswith("multipart/")


def _boundary(headers: Headers) -> bytes:
    return parse_options_header(headers["content-type"])[1].get(b"boundary", b"")


def _has_token(authorization: str, token: str) -> bool:
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            given = b64decode(given, validate=True).decode().partition(":")[2]
        except ValueError:
            return False
    return secrets.compare_digest(given.encode(), token.encode())


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(HEADERS)
        await send(message)

    return sending
