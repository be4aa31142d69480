"""Webhooks: where they may go, how they are signed, and how one is sent.

Signed as standardwebhooks.com says: `webhook-signature` is "v1," and the base64 of HMAC-SHA-256 over
"id.timestamp.body". Each tenant has a secret of its own, derived from the server's.

URLs are customers' input and must not reach into the operator's network: they are https, and what their host
resolves to when it is sent must be public. Only an explicit loopback host may be http, and must be loopback.
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
ANSWER_BYTES_MAX = 4096

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Post = Callable[[str, Mapping[str, str], bytes], Awaitable[int]]


class UnsafeAddress(Exception):
    """The host resolves to an address that webhooks may not reach."""


def check_url(url: str) -> None:
    """Raises InvalidRequest for a URL that no webhook may have, whatever its host resolves to."""
    if wrong := _wrong_with(url):
        raise InvalidRequest(f"'webhook_url' {wrong}.", "webhook_url", "invalid_value")


def is_loopback(url: str) -> bool:
    """Whether a URL that has passed `check_url` names this machine."""
    return _loopback_host(urlsplit(url).hostname or "")


def secret_of(server_secret: bytes, tenant: str) -> str:
    """The tenant's secret, as receivers' libraries take it."""
    derived = hmac.new(server_secret, f"webhooks of {tenant}".encode(), hashlib.sha256).digest()
    return "whsec_" + base64.b64encode(derived).decode()


def signed(secret: str, message_id: str, body: bytes, *, at: datetime) -> dict[str, str]:
    """The headers of a message that is sent at `at`. Receivers refuse one whose time is long past."""
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
    """The receiver's HTTP status, within `TIMEOUT_S` in all. Redirects are not followed, no proxy is asked.

    Raises UnsafeAddress, TimeoutError, OSError, httpx.HTTPError.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    headers = {**headers, "host": parts.netloc, "accept-encoding": "identity"}
    async with asyncio.timeout(TIMEOUT_S), httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as client:
        # The very addresses that were looked at are dialled: another answer of the resolver's cannot slip in.
        *others, last = await _resolve(host, port)
        for address in others:
            with contextlib.suppress(httpx.ConnectError):
                return await _post(client, _at(parts, address, port), host, headers, body)
        return await _post(client, _at(parts, last, port), host, headers, body)


async def _post(
    client: httpx.AsyncClient, target: str, host: str, headers: Mapping[str, str], body: bytes
) -> int:
    """`host` is whose certificate the other end must show."""
    named = {"sni_hostname": host}
    async with client.stream("POST", target, content=body, headers=headers, extensions=named) as response:
        received = 0
        async for chunk in response.aiter_raw():
            received += len(chunk)
            if received > ANSWER_BYTES_MAX:
                break
        return response.status_code


def _at(parts: SplitResult, address: Address, port: int) -> str:
    literal = f"[{address}]" if address.version == 6 else str(address)
    return parts._replace(netloc=f"{literal}:{port}").geturl()


async def _resolve(host: str, port: int) -> list[Address]:
    """One address or more. Raises UnsafeAddress if any is one that webhooks may not reach."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(entry[4][0])) for entry in found]
    wanted = _is_loopback if _loopback_host(host) else _is_public
    if not addresses or not all(wanted(address) for address in addresses):
        raise UnsafeAddress()
    return addresses


def _wrong_with(url: str) -> str | None:
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
    return _wrong_host(parts, host)


def _wrong_host(parts: SplitResult, host: str) -> str | None:
    if _loopback_host(host):
        return None if parts.scheme in ("http", "https") else "must be https"
    if parts.scheme != "https":
        return "must be https"
    try:
        return None if _is_public(ipaddress.ip_address(host)) else "names a private address"
    except ValueError:
        return None  # a name: it is looked at when it is resolved


def _loopback_host(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return _is_loopback(ipaddress.ip_address(host))
    except ValueError:
        return False


def _is_loopback(address: Address) -> bool:
    return address.is_loopback


def _is_public(address: Address) -> bool:
    """Not private, link-local, multicast or reserved; nor an IPv6 form that carries an IPv4 address."""
    if address.version == 6 and (
        address.ipv4_mapped or address.sixtofour or address.teredo or address in _NAT64
    ):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


_NAT64 = ipaddress.ip_network("64:ff9b::/96")
