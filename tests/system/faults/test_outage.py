"""The database is away for half a minute, under load."""

import time

import httpx
import pytest

from tests.support.waiting import wait_until
from tests.system.faults.fault_site import FaultSite, chat_body, since

pytestmark = pytest.mark.slow

DOWN_S = 30.0
STREAMS = 12
LONG_TOKENS = 900
REFUSED_S_MAX = 10.0


def test_a_database_that_is_down_for_30_s_costs_no_stream_and_bills_each_once(site: FaultSite) -> None:
    streams = [site.stream(f"outage-{number}", LONG_TOKENS) for number in range(STREAMS)]
    for stream in streams:
        stream.wait_begun()
    site.postgres.kill()
    down_s = time.monotonic()
    sent = sum(stream.tokens for stream in streams)
    answers: list[tuple[int, float]] = []
    while since(down_s) < DOWN_S:
        for path in ("chat/completions", "models"):
            sent_s = time.monotonic()
            answers.append((_ask(site, path).status_code, since(sent_s)))
        time.sleep(0.5)
    # Tokens need no store: all came meanwhile but the last pieces, which come with the settlements.
    tokens_while_down = [stream.tokens for stream in streams]
    assert [stream.finish_reason for stream in streams] == [None] * STREAMS
    site.postgres.start()
    up_s = time.monotonic()
    for stream in streams:
        stream.wait_ended()
        assert (stream.finish_reason, stream.tokens) == ("length", LONG_TOKENS)
    closed_s = since(up_s)
    assert sum(tokens_while_down) > sent
    assert {status for status, _ in answers} == {503}, "neither 401 nor 500"
    assert max(took_s for _, took_s in answers) < REFUSED_S_MAX
    for stream in streams:
        event = site.event(stream.request_id)
        assert event is not None
        assert (event["status"], event["completion_tokens"]) == ("complete", LONG_TOKENS)
    slowest_s = max(took_s for _, took_s in answers)
    client_got = f"{STREAMS} streams whole; {len(answers)} others 503, within {slowest_s:.1f} s"
    settled = f"{STREAMS} settled, complete, once each"
    site.note(
        f"database down for {DOWN_S:.0f} s", f"{STREAMS} streams going on", client_got, settled, closed_s
    )
    wait_until(lambda: _ask(site, "chat/completions").status_code == 200, 30)


def _ask(site: FaultSite, path: str) -> httpx.Response:
    if path == "models":
        (key, *_) = site.keys.values()
        return httpx.get(f"{site.url}/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=60)
    return site.post(chat_body("asked while the database is away", 1))
