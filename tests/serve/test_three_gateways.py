"""Invariant 7 on three real gateways: a limit holds in sum, wherever the requests arrive."""

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import sqlalchemy as sa

from serve.billing.metering.events import usage_table
from serve.rate_limits.limits import Limits, LimitStore
from tests.support.constants import NOON, TENANTS, TINY
from tests.support.live_service import HELLO, LiveService
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow


def limited(live: LiveService, limits: Limits) -> tuple[str, str]:
    """A new key's id and secret."""
    key, secret = live.tenants.create_key(TENANTS[0], at=NOON)
    with live.store.write() as connection:
        LimitStore(live.store).set(connection, "key", key.id, limits, at=NOON)
    return key.id, secret


def ask(live: LiveService, secret: str, tokens: int = 1) -> httpx.Response:
    """One request, on a connection of its own, so that any of the gateways may get it."""
    return httpx.post(
        f"{live.url}/v1/chat/completions",
        content=json.dumps({"model": TINY, "messages": HELLO, "max_tokens": tokens}),
        headers={"Authorization": f"Bearer {secret}"},
        timeout=120,
    )


def burst(live: LiveService, secret: str, size: int, tokens: int = 1) -> list[httpx.Response]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda _: ask(live, secret, tokens), range(size)))


def test_200_parallel_requests_on_three_gateways_never_pass_the_limit(live: LiveService) -> None:
    """Overshoot is 0; quota that other gateways hold in leases is bounded too (docs/limits.md)."""
    assert len(live.running_pids("gateway")) == 3
    limit = 60
    key, secret = limited(live, Limits(requests_per_min=limit))
    answers = burst(live, secret, 200)
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}, [one.text for one in answers if one.status_code == 503]
    assert limit * 0.85 <= statuses[200] <= limit
    refused = ask(live, secret)
    if refused.status_code == 429:
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    live.wait_idle()
    query = sa.select(sa.func.count()).select_from(usage_table).where(usage_table.c.key_id == key)
    with live.store.read() as connection:
        assert connection.execute(query).scalar_one() <= limit


def test_tokens_per_minute_hold_in_sum_and_what_was_not_used_is_given_back(live: LiveService) -> None:
    limit = 3000
    key, secret = limited(live, Limits(tokens_per_min=limit))
    # Each reserves its prompt's bound and 20 tokens, and gives back most of the prompt's.
    statuses = Counter(answer.status_code for answer in burst(live, secret, 60, 20))
    assert set(statuses) == {200, 429}
    live.wait_idle()
    c = usage_table.c
    query = sa.select(sa.func.sum(c.prompt_tokens + c.completion_tokens)).where(c.key_id == key)
    with live.store.read() as connection:
        used = connection.execute(query).scalar_one()
    assert used <= limit
    wait_until(lambda: ask(live, secret, 20).status_code == 200, 10, 0.5)


def test_concurrent_requests_never_exceed_their_limit(live: LiveService) -> None:
    limit, running, most = 4, 0, 0
    _, secret = limited(live, Limits(concurrent_requests=limit))
    lock, done = threading.Lock(), Counter[int]()

    def stream() -> None:
        nonlocal running, most
        body = {"model": TINY, "messages": HELLO, "max_tokens": 40, "stream": True}
        headers = {"Authorization": f"Bearer {secret}"}
        with httpx.stream(
            "POST", f"{live.url}/v1/chat/completions", json=body, headers=headers, timeout=120
        ) as answer:
            done[answer.status_code] += 1
            if answer.status_code != 200:
                return
            lines = answer.iter_lines()
            next(lines)
            with lock:
                running += 1
                most = max(most, running)
            for line in lines:
                if line == "data: [DONE]":  # from here on the place may be another's
                    break
                if '"finish_reason":"length"' in line:
                    with lock:
                        running -= 1

    with ThreadPoolExecutor(40) as pool:
        for one in [pool.submit(stream) for _ in range(40)]:
            one.result()
    assert set(done) == {200, 429}
    assert most <= limit


def test_a_revoked_key_is_refused_by_every_gateway_within_two_seconds(live: LiveService) -> None:
    key, secret = live.tenants.create_key(TENANTS[0], at=NOON)
    url, headers = f"{live.url}/v1/models", {"Authorization": f"Bearer {secret}"}
    with ThreadPoolExecutor(12) as pool:
        assert {
            one.status_code for one in pool.map(lambda _: httpx.get(url, headers=headers), range(24))
        } == {200}
        live.tenants.revoke_key(key.id, at=NOON)
        time.sleep(2)
        assert {
            one.status_code for one in pool.map(lambda _: httpx.get(url, headers=headers), range(48))
        } == {401}


@pytest.mark.parametrize(
    "sent", [b"", b"GET /healthz HTTP/1.1\r\nHost: here\r\nX-Slow: "], ids=["nothing", "half"]
)
def test_a_connection_whose_headers_do_not_come_is_closed(live: LiveService, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", live.settings.port), timeout=30) as connection:
        connection.sendall(sent)
        assert connection.recv(100) == b""


def test_headers_without_end_are_cut_off(live: LiveService) -> None:
    with socket.create_connection(("127.0.0.1", live.settings.port), timeout=30) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: here\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 10_000_000:
                sent += connection.send(b"X-Header: " + b"x" * 1000 + b"\r\n")
                time.sleep(0.001)
    assert sent < 1_000_000
