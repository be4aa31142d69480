"""Tests webhook events: signed, sent to real servers on loopback, retried, kept out of private networks."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import sqlalchemy as sa

from serve.billing.webhooks import delivery
from serve.billing.webhooks.delivery import (
    UnsafeAddress,
    check_url,
    is_loopback,
    post,
    secret_of,
    signed_headers,
)
from serve.billing.webhooks.outbox import deliver_due as deliver
from serve.billing.webhooks.outbox import enqueue, webhook_events_table
from serve.errors import InvalidRequest
from serve.storage.database import Store
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON

SERVER_SECRET = b"a secret of the server's"


class Receiver(ThreadingHTTPServer):
    """Runs a customer's server with a given answer and delay, and records what it received."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.wait_s, self.drip = 204, 0.0, False
        self.headers: dict[str, str] = {}
        self.got: list[tuple[dict[str, str], bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
        time.sleep(self.server.wait_s)
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        while self.server.drip:
            self.wfile.write(b"x")
            time.sleep(0.05)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def receiving() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.drip = False
            server.shutdown()
            thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as server:
        yield server


def secret(tenant: str) -> str:
    return secret_of(SERVER_SECRET, tenant)


def deliver_due(store: Store, at: datetime) -> int:
    return deliver(store, at, post, secret)


def add_event(store: Store, event_id: str, url: str, tenant: str = "acme", at: datetime = NOON) -> None:
    with store.write() as connection:
        enqueue(connection, event_id, tenant, "budget.threshold", url, json.dumps({"id": event_id}), at=at)


def row(store: Store, event_id: str) -> "sa.Row[Any]":
    with store.read() as connection:
        return connection.execute(
            sa.select(webhook_events_table).where(webhook_events_table.c.id == event_id)
        ).one()


def test_a_notice_arrives_once_and_its_receiver_can_check_who_sent_it(
    shop: BillingFixture, receiver: Receiver
) -> None:
    add_event(shop.store, "ntc_1", receiver.url)
    assert deliver_due(shop.store, NOON) == 1
    assert deliver_due(shop.store, NOON + timedelta(hours=2)) == 0
    ((headers, body),) = receiver.got
    assert json.loads(body) == {"id": "ntc_1"}
    assert (headers["webhook-id"], headers["content-type"]) == ("ntc_1", "application/json")
    assert headers["webhook-timestamp"] == str(int(NOON.timestamp()))
    assert headers["host"] == f"127.0.0.1:{receiver.server_port}"
    key = base64.b64decode(secret("acme").removeprefix("whsec_"))
    message = f"ntc_1.{headers['webhook-timestamp']}.".encode() + body
    wanted = base64.b64encode(hmac.new(key, message, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{wanted}"
    assert row(shop.store, "ntc_1").delivered_at == NOON


def test_the_signature_is_the_one_that_the_standard_has_as_its_example() -> None:
    headers = signed_headers(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        b'{"test": 2432232314}',
        at=datetime.fromtimestamp(1614265330, tz=NOON.tzinfo),
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_each_tenant_has_a_secret_of_its_own() -> None:
    assert secret("acme") == secret("acme") != secret("rival")


def test_what_is_not_taken_is_tried_again_ever_later_and_given_up_after_a_day(
    shop: BillingFixture, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "serve.billing.webhooks.outbox")
    receiver.status = 500
    add_event(shop.store, "ntc_1", receiver.url)
    at, waits = NOON, []
    while True:
        assert deliver_due(shop.store, at) == 0
        following = row(shop.store, "ntc_1").next_try_at
        if following is None:
            break
        assert deliver_due(shop.store, following - timedelta(seconds=1)) == 0
        waits.append((following - at).total_seconds())
        at = following
    assert waits[:8] == [30, 60, 120, 240, 480, 960, 1920, 3600]
    assert set(waits[8:]) == {3600}
    assert timedelta(hours=22) < at - NOON <= timedelta(hours=24)
    assert len(receiver.got) == len(waits) + 1
    assert {headers["webhook-id"] for headers, _ in receiver.got} == {"ntc_1"}
    end = row(shop.store, "ntc_1")
    assert (end.tries, end.last_error, end.delivered_at) == (len(waits) + 1, "HTTP 500", None)
    assert "HTTP 500" in caplog.text
    assert receiver.url not in caplog.text


def test_a_notice_that_failed_arrives_when_its_receiver_is_back(
    shop: BillingFixture, receiver: Receiver
) -> None:
    receiver.status = 503
    add_event(shop.store, "ntc_1", receiver.url)
    deliver_due(shop.store, NOON)
    receiver.status = 200
    assert deliver_due(shop.store, NOON + timedelta(seconds=30)) == 1
    assert row(shop.store, "ntc_1").last_error is None


def test_slow_and_dead_receivers_hold_up_nobody_else(
    shop: BillingFixture, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "TIMEOUT_S", 0.5)
    shop.tenants.create("rival", at=NOON)
    with receiving() as slow, socket.socket() as deaf:
        slow.wait_s = 1.5
        deaf.bind(("127.0.0.1", 0))  # and listens to nobody
        for number in range(3):
            add_event(shop.store, f"ntc_slow{number}", slow.url)
        add_event(shop.store, "ntc_deaf", f"http://127.0.0.1:{deaf.getsockname()[1]}/")
        add_event(shop.store, "ntc_good", receiver.url, "rival")
        began_s = time.monotonic()
        assert deliver_due(shop.store, NOON) == 1
        assert time.monotonic() - began_s < 1.4
        assert len(receiver.got) == 1
        while row(shop.store, "ntc_slow2").tries == 0 or row(shop.store, "ntc_deaf").tries == 0:
            deliver_due(shop.store, NOON)
    assert row(shop.store, "ntc_slow0").last_error == "timed out"
    assert row(shop.store, "ntc_deaf").last_error == "ConnectError"
    assert row(shop.store, "ntc_deaf").next_try_at == NOON + timedelta(seconds=30)


@pytest.mark.parametrize("length", [None, "1000000000"])
def test_an_answer_that_never_ends_is_not_read_to_its_end(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, length: str | None
) -> None:
    receiver.status, receiver.drip = 200, True
    receiver.headers = {"content-length": length} if length else {}
    monkeypatch.setattr(delivery, "RESPONSE_BYTES_MAX", 5)
    assert asyncio.run(post(receiver.url, {}, b"{}")) == 200
    monkeypatch.setattr(delivery, "RESPONSE_BYTES_MAX", 10**6)
    monkeypatch.setattr(delivery, "TIMEOUT_S", 0.3)
    with pytest.raises(TimeoutError):
        asyncio.run(post(receiver.url, {}, b"{}"))


def test_redirects_are_not_followed(shop: BillingFixture, receiver: Receiver) -> None:
    with receiving() as other:
        receiver.status, receiver.headers = 307, {"location": other.url}
        add_event(shop.store, "ntc_1", receiver.url)
        assert deliver_due(shop.store, NOON) == 0
        assert (len(receiver.got), len(other.got)) == (1, 0)
    assert row(shop.store, "ntc_1").last_error == "HTTP 307"


def test_two_stewards_do_not_send_a_notice_side_by_side(shop: BillingFixture, receiver: Receiver) -> None:
    receiver.wait_s = 0.3
    add_event(shop.store, "ntc_1", receiver.url)
    stewards = [threading.Thread(target=deliver_due, args=(shop.store, NOON)) for _ in range(4)]
    for steward in stewards:
        steward.start()
    for steward in stewards:
        steward.join()
    assert len(receiver.got) == 1


def test_what_a_steward_claimed_and_did_not_live_to_send_is_sent_by_another(
    shop: BillingFixture, receiver: Receiver
) -> None:
    async def dies(*_: object) -> int:
        raise KeyboardInterrupt

    add_event(shop.store, "ntc_1", receiver.url)
    with pytest.raises(BaseException):  # noqa: B017, PT011 the process is gone
        deliver(shop.store, NOON, dies, secret)
    assert deliver_due(shop.store, NOON + timedelta(seconds=59)) == 0
    assert deliver_due(shop.store, NOON + timedelta(seconds=60)) == 1


def test_a_notice_without_a_webhook_is_never_sent(shop: BillingFixture) -> None:
    add_event(shop.store, "ntc_1", "")
    assert deliver_due(shop.store, NOON + timedelta(days=1)) == 0
    assert row(shop.store, "ntc_1").tries == 0


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/hook?x=1",
        "https://example.com:8443/",
        "https://1.1.1.1/",
        "http://localhost:9000/x",
        "http://127.0.0.1:9000/x",
        "http://[::1]:9000/",
        "https://localhost/",
    ],
)
def test_urls_that_may_be_a_webhook(url: str) -> None:
    check_url(url)
    assert is_loopback(url) == ("localhost" in url or "127" in url or "::1" in url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "ftp://example.com/",
        "http://example.com/",
        "http://localhost.example.com/",
        "https:///x",
        "https://",
        "https://user:pass@example.com/",
        "https://user@example.com/",
        "https://example.com/#part",
        "https://example.com:99999/",
        "https://example.com:0/",
        "https://exa mple.com/",
        "https://example.com\\@10.0.0.1/",
        "https://exämple.com/",
        "https://example.com/\n",
        "https://10.0.0.1/",
        "https://192.168.1.1/",
        "https://169.254.169.254/latest/meta-data",
        "https://[fe80::1]/",
        "https://[::ffff:10.0.0.1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[64:ff9b::a00:1]/",
        "https://[fd00::1]/",
        "https://0.0.0.0/",
        "https://224.0.0.1/",
        "https://[::1",
        "https://example.com/" + "x" * 500,
    ],
)
def test_urls_that_may_not(url: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_url(url)
    assert refused.value.param == "webhook_url"
    assert url not in refused.value.message or len(url) < 2


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("hooks.example.com", "10.0.0.7"),
        ("hooks.example.com", "127.0.0.1"),
        ("hooks.example.com", "169.254.169.254"),
        ("hooks.example.com", "::ffff:10.0.0.1"),
        ("hooks.example.com", "fe80::1%eth0"),
        ("2130706433", "127.0.0.1"),
        ("localhost", "10.0.0.7"),
    ],
)
def test_a_host_that_resolves_into_the_operators_network_is_not_reached(
    monkeypatch: pytest.MonkeyPatch, host: str, address: str
) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    answers = [(family, socket.SOCK_STREAM, 6, "", (address, 443))]
    if host != "localhost":  # one public address beside it does not help
        answers.insert(0, (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("1.1.1.1", 443)))

    async def resolved(*_: object, **__: object) -> Any:
        return answers

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolved)
    with pytest.raises(UnsafeAddress):
        asyncio.run(post(f"https://{host}/", {}, b"{}"))


def test_a_name_of_this_machine_is_tried_at_each_of_its_addresses(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolved(_loop: object, _host: str, port: int, **_: object) -> Any:
        first = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0))
        return [first, (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolved)
    url = f"http://localhost:{receiver.server_port}/"
    assert asyncio.run(post(url, {}, b"{}")) == 204
    assert receiver.got[0][0]["host"] == f"localhost:{receiver.server_port}"
