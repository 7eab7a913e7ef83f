"""HTTP with an OCI registry's ways of logging in: what ``oci.py`` speaks through.

The OCI distribution specification 1.1 leaves authentication to the token scheme of Docker's registry ("Token Authentication
Specification"): a 401 names a realm, which gives a bearer token for a scope; or it asks for a user's name and password itself.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode, urljoin, urlsplit

from exports.registry.base import MANIFEST_BYTES, NotFound
from quantize.errors import InputError

TIMEOUT = 60.0  # seconds without a byte
ATTEMPTS = 4
PAUSE = 0.25  # seconds before the second attempt; doubled for each one after it
_BLOCK = 2**18
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::\d{1,5})?")
_LOOPBACK = re.compile(r"(?:localhost|127(?:\.\d+){3}|\[::1\])(?::\d+)?")
_PARAMETER = re.compile(r'(\w+)="([^"]*)"')
_PASSING = (429, 500, 502, 503, 504)


class Cut(Exception):
    """The connection failed or broke off; the same request may succeed."""


@dataclass(frozen=True)
class Response:
    """A server's answer: status, headers (any case), and the body, where it was not taken elsewhere."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def message(self) -> str:
        """What the server says went wrong: its errors' codes and messages, else the status."""
        try:
            errors = json.loads(self.body)["errors"]
            return (
                "; ".join(f"{error['code']}: {error.get('message', '')}" for error in errors)[:300] or f"status {self.status}"
            )
        except (ValueError, LookupError, TypeError):
            return f"status {self.status}"


class Client:
    """Requests to one host. Plain HTTP to this machine's own addresses and to hosts in ``OCI_PLAIN_HTTP``, else HTTPS.

    A user's name and password come from ``OCI_USERNAME`` and ``OCI_PASSWORD``, else from the file that ``docker login`` and
    ``oras login`` write. They go to this host, or over HTTPS (or this machine) to the realm that it names; nowhere else.
    """

    def __init__(self, host: str) -> None:
        if not _HOST.fullmatch(host):
            raise InputError(
                "an OCI registry is HOST or HOST:PORT, such as ghcr.io or 127.0.0.1:5000; credentials belong into OCI_USERNAME "
                "and OCI_PASSWORD"
            )
        plain = _LOOPBACK.fullmatch(host) or host in os.environ.get("OCI_PLAIN_HTTP", "").split(",")
        self.host, self.base = host, f"{'http' if plain else 'https'}://{host}"
        self._connections: dict[tuple[str, str], http.client.HTTPConnection] = {}
        self._authorization: dict[str, str] = {}  # by scope

    def request(
        self,
        method: str,
        url: str,
        scope: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        take: Callable[[bytes], None] | None = None,
        attempts: int = ATTEMPTS,
    ) -> Response:
        """Send a request; log in where it is asked for, follow redirects, try again where the server or the network is busy.

        Args:
            method: GET, HEAD, POST, PATCH, PUT or DELETE.
            url: absolute, or relative to the host.
            scope: what the token must allow: ``repository:NAME:pull,push``.
            body: the request's bytes.
            headers: besides those for authorization and length.
            take: gets the body in pieces, of a 206 answer where a ``Range`` was asked for, else of a 2xx one; None: it is
                in the answer, ``MANIFEST_BYTES`` at most.
            attempts: how many times it is sent, where the connection fails or the server is busy; with ``take`` once.

        Raises:
            Cut: the connection failed each time.
            InputError: the server wants other credentials.
        """
        url, logged_in, pause = urljoin(self.base, url), False, PAUSE
        attempts = 1 if take is not None else attempts
        for left in range(attempts + 9, -1, -1):
            try:
                response = self._once(method, url, scope, body, headers or {}, take)
            except (OSError, http.client.HTTPException) as error:
                attempts -= 1
                if attempts <= 0 or left == 0:
                    raise Cut(f"{self.host}: {type(error).__name__}: {error}") from error
                time.sleep(pause)
                pause *= 2
                continue
            if response.status == 401 and not logged_in and self._is_own(url):
                self._log_in(response, scope)
                logged_in = True
            elif response.status in (301, 302, 303, 307, 308) and method in ("GET", "HEAD"):
                url = urljoin(url, response.headers.get("Location", ""))
            elif response.status in _PASSING and attempts > 1 and left:
                attempts -= 1
                time.sleep(pause)
                pause *= 2
            else:
                break
        if response.status in (401, 403):
            raise InputError(
                f"{self.host} refuses access ({response.message()}); set OCI_USERNAME and OCI_PASSWORD, or use `docker login`"
            )
        return response

    def ok(self, response: Response, what: str, *also: int) -> Response:
        """The response, where its status is 2xx or one of ``also``.

        Raises:
            NotFound: it is 404.
            InputError: it is another one.
        """
        if 200 <= response.status < 300 or response.status in also:
            return response
        if response.status == 404:
            raise NotFound(f"{self.host} has no {what} ({response.message()})")
        raise InputError(f"{self.host} refuses {what}: {response.message()}")

    def _is_own(self, url: str) -> bool:
        return url.startswith(f"{self.base}/")

    def _once(
        self,
        method: str,
        url: str,
        scope: str,
        body: bytes | None,
        headers: Mapping[str, str],
        take: Callable[[bytes], None] | None,
    ) -> Response:
        parts = urlsplit(url)
        sent = {"User-Agent": "quantize", "Accept-Encoding": "identity", **headers}
        if self._is_own(url) and scope in self._authorization:
            sent["Authorization"] = self._authorization[scope]
        key = (parts.scheme, parts.netloc)
        connection = self._connections.pop(key, None) or _connection(*key)
        try:
            connection.request(method, parts.path + (f"?{parts.query}" if parts.query else ""), body=body, headers=sent)
            answer = connection.getresponse()
            if "Range" in headers and answer.status == 200:
                content = b""  # the whole file from its start, which is not what was asked for: not read
            elif take is not None and 200 <= answer.status < 300:
                expected, got = answer.length, 0
                while piece := answer.read(_BLOCK):
                    got += len(piece)
                    take(piece)
                if expected is not None and got < expected:
                    raise http.client.IncompleteRead(b"", expected - got)
                content = b""
            else:
                content = answer.read(MANIFEST_BYTES + 1)
        except BaseException:
            connection.close()
            raise
        if answer.isclosed():
            self._connections[key] = connection
        else:
            connection.close()
        return Response(answer.status, answer.headers, content)

    def _log_in(self, refusal: Response, scope: str) -> None:
        challenge = refusal.headers.get("WWW-Authenticate", "")
        user = self._credentials()
        if challenge.lower().startswith("basic") and user:
            self._authorization[scope] = f"Basic {user}"
        elif challenge.lower().startswith("bearer"):
            wanted = dict(_PARAMETER.findall(challenge))
            realm = wanted.get("realm", "")
            parts = urlsplit(realm)
            if parts.scheme != "https" and not _LOOPBACK.fullmatch(parts.netloc):
                raise InputError(
                    f"{self.host} sends logins to {parts.scheme}://{parts.netloc}, which is not https; none was sent"
                )
            query = urlencode(
                {key: value for key, value in {"service": wanted.get("service", ""), "scope": scope}.items() if value}
            )
            headers = {"Authorization": f"Basic {user}"} if user else {}
            try:
                answer = self._once("GET", f"{realm}?{query}", "", None, headers, None)
                told = json.loads(answer.body) if answer.status == 200 else {}
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise InputError(f"{self.host}: logging in at {parts.netloc} failed ({type(error).__name__})") from error
            if token := told.get("token") or told.get("access_token"):
                self._authorization[scope] = f"Bearer {token}"

    def _credentials(self) -> str | None:
        """base64 of ``user:password``; None where there is none for this host."""
        user, password = os.environ.get("OCI_USERNAME"), os.environ.get("OCI_PASSWORD")
        if user and password:
            return base64.b64encode(f"{user}:{password}".encode()).decode()
        path = Path(os.environ.get("DOCKER_CONFIG", str(Path.home() / ".docker"))) / "config.json"
        try:
            found = json.loads(path.read_bytes())["auths"][self.host]["auth"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return found if isinstance(found, str) and found else None


def _connection(scheme: str, host: str) -> http.client.HTTPConnection:
    if scheme not in ("http", "https"):
        raise InputError(f"the registry leads to {scheme}:// of {host}; only http and https are followed")
    made = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    return made(host, timeout=TIMEOUT)
