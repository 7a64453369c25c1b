"""Gets from web servers: redirects, time-outs, retries, and the token that stays home.  Bodies are read by the caller.

It says what went wrong as one DownloadError, and puts neither a token nor a URL's query, which may hold one, into it.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urljoin, urlsplit

from pyllamarun import __version__
from pyllamarun.errors import DownloadError, UsageError
from pyllamarun.models.refusals import AGAIN, BUSY, Place, refusal, wait_seconds

if TYPE_CHECKING:
    import requests

MAX_REDIRECTS = 8
# What may be under way when a body is left: a server that heeds no range is stopped by this.
RECEIVE_BUFFER_BYTES = 128 << 10


@dataclass(frozen=True)
class Patience:
    """How long to wait for a server, and how often to ask it again.

    A body must arrive at `least_bytes_per_second`, measured from `stall_seconds` on.  A wait that a server asks for is
    kept up to `longest_wait_seconds`; beyond, it is left to the user.
    """

    connect_seconds: float = 10.0
    stall_seconds: float = 30.0
    least_bytes_per_second: float = 1024.0
    attempts: int = 4
    longest_wait_seconds: float = 30.0
    sleep: Callable[[float], None] = time.sleep


class Interrupted(Exception):
    """A body ended before it should have, or stalled: its message says which.  Asking again may help."""


class Web:
    """One session with web servers: connections are kept open between requests."""

    def __init__(self, patience: Patience = Patience(), receive_buffer_bytes: int = RECEIVE_BUFFER_BYTES) -> None:
        """With 0, the system sizes the receive buffers, as far as a long line needs."""
        self.patience = patience
        self._session = _session(receive_buffer_bytes)

    def close(self) -> None:
        self._session.close()

    def get(self, place: Place, headers: Mapping[str, str], url: str = "") -> requests.Response:
        """The answer to a request for `place`, or for `url` where a redirect led before; its body is not yet read.

        The answer is 200, 206 or 416.  Asks again where the server is busy.  Raises DownloadError for any other.
        """
        url = url or place.url
        for attempt in range(self.patience.attempts):
            last = attempt == self.patience.attempts - 1
            try:
                response = self._follow(place, headers, url)
            except Interrupted as error:
                if last:
                    raise DownloadError(f"{place.shown} cannot be read.", why=f"{error}.", remedy=AGAIN) from None
                self.patience.sleep(2**attempt / 2)
                continue
            if response.status_code in (200, 206, 416):
                return response
            response.close()
            wait = wait_seconds(response.headers.get("Retry-After"), 2**attempt / 2)
            if response.status_code not in BUSY or last or wait > self.patience.longest_wait_seconds:
                raise refusal(place, response.status_code, response.headers)
            self.patience.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _follow(self, place: Place, headers: Mapping[str, str], url: str) -> requests.Response:
        """The first answer that is no redirect."""
        for _ in range(MAX_REDIRECTS + 1):
            response = self._request(place, headers, url)
            if response.status_code not in (301, 302, 303, 307, 308):
                return response
            response.close()
            target = _joined(url, response.headers.get("Location", ""))
            _check_redirect(place, url, target)
            url = target
        raise DownloadError(
            f"{place.shown} is redirected without end.",
            why=f"After {MAX_REDIRECTS} redirects there is one more.",
            remedy="Check the address; if it is right, the server is at fault.",
        )

    def _request(self, place: Place, headers: Mapping[str, str], url: str) -> requests.Response:
        import requests

        def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:  # and no ~/.netrc
            if place.token and origin(url) == origin(place.url):
                request.headers["Authorization"] = f"Bearer {place.token}"
            return request

        headers = {"User-Agent": f"pyllamarun/{__version__}", "Accept-Encoding": "identity", **headers}
        timeout = (self.patience.connect_seconds, self.patience.stall_seconds)
        try:
            response = self._session.get(
                url, headers=headers, auth=authorize, timeout=timeout, stream=True, allow_redirects=False
            )
        except requests.exceptions.SSLError as error:
            raise _unreachable(place, url, f"The connection is not secure: {_reason(error)}") from None
        except requests.exceptions.ReadTimeout:
            raise Interrupted(f"The server did not answer within {self.patience.stall_seconds:g} seconds") from None
        except requests.exceptions.ConnectionError as error:
            if _was_connected(error):
                raise Interrupted("The server closed the connection") from None
            raise _unreachable(place, url, _reason(error)) from None
        except (requests.exceptions.RequestException, ValueError) as error:
            raise _unreachable(place, url, type(error).__name__) from None
        self._session.cookies.clear()  # none that another host could see
        return response

    def body(self, response: requests.Response, piece_bytes: int = 64 << 10) -> Iterator[bytes]:
        """The pieces of a body as they come, each of `piece_bytes` at most.

        Raises Interrupted when it ends early, stalls or trickles.
        """
        import urllib3

        start, received = time.monotonic(), 0
        try:
            while piece := response.raw.read1(piece_bytes, decode_content=False):
                received += len(piece)
                yield piece
                seconds = time.monotonic() - start
                if seconds > self.patience.stall_seconds and received < self.patience.least_bytes_per_second * seconds:
                    raise Interrupted(f"Only {received:,} bytes came in {seconds:.0f} seconds")
        except urllib3.exceptions.ReadTimeoutError:
            raise Interrupted(f"Nothing came for {self.patience.stall_seconds:g} seconds") from None
        except (urllib3.exceptions.HTTPError, OSError):
            raise Interrupted(f"The connection broke after {received:,} bytes") from None


def _session(receive_buffer_bytes: int) -> requests.Session:
    import socket

    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.connection import HTTPConnection

    class Buffers(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **options: Any) -> None:
            buffer = [(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)] if receive_buffer_bytes else []
            options["socket_options"] = [*HTTPConnection.default_socket_options, *buffer]
            super().init_poolmanager(*args, **options)

    class NoRedirects(requests.Session):
        def get_redirect_target(self, resp: requests.Response) -> str | None:  # noqa: ARG002
            return None  # else it reads a redirect's body to its end, however long that is

    session = NoRedirects()
    for scheme in ("https://", "http://"):
        session.mount(scheme, Buffers(max_retries=0))
    return session


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port: what must agree for a token to be sent.  Without a host where it is no address."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "", "", None
    return parts.scheme.lower(), (parts.hostname or "").lower(), port_of(parts)


def port_of(parts: SplitResult) -> int | None:
    """The port, also where it is the scheme's own; None where it is no number."""
    try:
        return parts.port or {"https": 443, "http": 80}.get(parts.scheme.lower())
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_url(url: str) -> None:
    """Raises UsageError for an address that nothing should be got from: plain http is for this machine alone."""
    scheme, host, port = origin(url)
    remedy = "Write an address such as https://HOST/FOLDER/FILE.gguf."
    if not host or port is None:
        raise UsageError("The address names no host.", remedy=remedy)
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise UsageError("An address with a user name or password in it is not used.", remedy=remedy)
    if scheme == "http" and not is_loopback(host):
        raise UsageError(
            f"http://{host} is not used: anybody on the way could change the model.",
            why="Plain http is for this machine alone.",
            remedy="Write https://; or download the file by other means, and name it by its path.",
        )


def _check_redirect(place: Place, url: str, target: str) -> None:
    """Follows to https, and from plain http also to this machine or back to the host where it began."""
    scheme, host, port = origin(target)
    plain = scheme == origin(place.url)[0] == "http" and (is_loopback(host) or origin(target) == origin(place.url))
    if not host or port is None or (scheme != "https" and not plain):
        raise DownloadError(
            f"{place.shown} is redirected to where it is not followed.",
            why=f"From {_host(url)} to {scheme or 'no scheme'}://{host}, which is not https.",
            remedy="Check the address; if it is right, the server is at fault.",
        )


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:
        return ""


def _host(url: str) -> str:
    return origin(url)[1]


def _unreachable(place: Place, url: str, reason: str) -> DownloadError:
    return DownloadError(
        f"{place.shown} cannot be reached.",
        why=f"{_host(url)}: {reason}.",
        remedy="Check the network, and HTTPS_PROXY where there is a proxy.",
    )


def _was_connected(error: BaseException) -> bool:
    import urllib3

    reason = getattr(error.args[0], "reason", error.args[0]) if error.args else None
    errors = urllib3.exceptions
    return not isinstance(reason, (errors.NewConnectionError, errors.ConnectTimeoutError, errors.ProxyError))


def _reason(error: BaseException) -> str:
    """What the system says of a connection that was not made, without the address that requests puts around it."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for one in reversed(chain):
        if isinstance(one, OSError) and one.strerror:
            return str(one.strerror)
    return type(error).__name__
