"""Webhook delivery: checks a webhook's URL, signs the message, and posts it.

Signatures follow standardwebhooks.com: `webhook-signature` is "v1," and the base64 of HMAC-SHA-256 over
"id.timestamp.body". Each tenant has its own secret, derived from the server's.

URLs are customers' input and must not reach the operator's network. They must be https, and every address
that the host resolves to at sending must be public. Only an explicit loopback host may use http, and must
resolve to loopback.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from urllib.parse import SplitResult, urlsplit

import httpx

from serve.errors import InvalidRequest

URL_LENGTH_MAX = 512
TIMEOUT_S = 5.0
RESPONSE_BYTES_MAX = 4096

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Post = Callable[[str, Mapping[str, str], bytes], Awaitable[int]]


class UnsafeAddress(Exception):
    """Signals that the host resolves to an address that webhooks may not reach."""


def check_url(url: str) -> None:
    """Check a webhook's URL without resolving its host. Raises InvalidRequest."""
    if problem := _url_problem(url):
        raise InvalidRequest(f"'webhook_url' {problem}.", "webhook_url", "invalid_value")


def is_loopback(url: str) -> bool:
    """Return whether a URL that has passed `check_url` names this machine."""
    return _is_loopback_host(urlsplit(url).hostname or "")


def secret_of(server_secret: bytes, tenant: str) -> str:
    """Return the tenant's secret, in the form that receivers' libraries accept."""
    derived = hmac.new(server_secret, f"webhooks of {tenant}".encode(), hashlib.sha256).digest()
    return "whsec_" + base64.b64encode(derived).decode()


def signed_headers(secret: str, message_id: str, body: bytes, *, at: datetime) -> dict[str, str]:
    """Return the headers of a message sent at `at`. Receivers refuse a message with an old time."""
    timestamp = str(int(at.timestamp()))
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.new(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return {
        "content-type": "application/json",
        "user-agent": "bespoke-webhooks",
        "webhook-id": message_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": "v1," + base64.b64encode(digest).decode(),
    }


async def post(url: str, headers: Mapping[str, str], body: bytes) -> int:
    """Post a message and return the receiver's HTTP status, within `TIMEOUT_S` in all.

    Redirects are not followed and proxies are not used. Raises UnsafeAddress, TimeoutError, OSError,
    httpx.HTTPError.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    headers = {**headers, "host": parts.netloc, "accept-encoding": "identity"}
    async with asyncio.timeout(TIMEOUT_S), httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as client:
        # Connects to the addresses that were checked, so a second DNS answer cannot differ from the first.
        *others, last = await _resolve(host, port)
        for address in others:
            with contextlib.suppress(httpx.ConnectError):
                return await _post(client, _address_url(parts, address, port), host, headers, body)
        return await _post(client, _address_url(parts, last, port), host, headers, body)


async def _post(
    client: httpx.AsyncClient, target: str, host: str, headers: Mapping[str, str], body: bytes
) -> int:
    """Post to `target`, whose certificate must be for `host`."""
    extensions = {"sni_hostname": host}
    async with client.stream(
        "POST", target, content=body, headers=headers, extensions=extensions
    ) as response:
        received = 0
        async for chunk in response.aiter_raw():
            received += len(chunk)
            if received > RESPONSE_BYTES_MAX:
                break
        return response.status_code


def _address_url(parts: SplitResult, address: Address, port: int) -> str:
    literal = f"[{address}]" if address.version == 6 else str(address)
    return parts._replace(netloc=f"{literal}:{port}").geturl()


async def _resolve(host: str, port: int) -> list[Address]:
    """Return one address or more. Raises UnsafeAddress if webhooks may not reach one of them."""
    entries = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(entry[4][0])) for entry in entries]
    is_allowed = _is_loopback if _is_loopback_host(host) else _is_public
    if not addresses or not all(is_allowed(address) for address in addresses):
        raise UnsafeAddress()
    return addresses


def _url_problem(url: str) -> str | None:
    if not url.isascii() or not url.isprintable() or " " in url or len(url) > URL_LENGTH_MAX:
        return f"must be at most {URL_LENGTH_MAX} printable ASCII characters"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "is not a URL"
    if not host or port == 0 or parts.netloc.endswith(":"):
        return "names no host"
    if "@" in parts.netloc:
        return "must not hold credentials"
    if parts.fragment or "\\" in url:
        return "is not a URL"
    return _host_problem(parts, host)


def _host_problem(parts: SplitResult, host: str) -> str | None:
    if _is_loopback_host(host):
        return None if parts.scheme in ("http", "https") else "must be https"
    if parts.scheme != "https":
        return "must be https"
    try:
        return None if _is_public(ipaddress.ip_address(host)) else "names a private address"
    except ValueError:
        return None  # a name: its addresses are checked when it is resolved


def _is_loopback_host(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return _is_loopback(ipaddress.ip_address(host))
    except ValueError:
        return False


def _is_loopback(address: Address) -> bool:
    return address.is_loopback


def _is_public(address: Address) -> bool:
    """Return whether the address is public: not private, link-local, multicast, reserved or IPv4 in IPv6."""
    if address.version == 6 and (
        address.ipv4_mapped or address.sixtofour or address.teredo or address in _NAT64
    ):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


_NAT64 = ipaddress.ip_network("64:ff9b::/96")
