"""The database is away for half a minute, under load."""

import time

import httpx
import pytest

from tests.faults.conftest import Ask, Site, body, since
from tests.serve.conftest import wait_until

pytestmark = pytest.mark.slow

DOWN_S = 30.0
STREAMS = 12
LONG_TOKENS = 900
REFUSED_S_MAX = 10.0


def test_a_database_that_is_down_for_30_s_costs_no_stream_and_bills_each_once(whole: Site) -> None:
    asks = [Ask(whole, f"outage-{number}", LONG_TOKENS) for number in range(STREAMS)]
    for ask in asks:
        ask.wait_begun()
    whole.postgres.kill()
    down_s = time.monotonic()
    sent = sum(ask.tokens for ask in asks)
    answers: list[tuple[int, float]] = []
    while since(down_s) < DOWN_S:
        for path in ("chat/completions", "models"):
            asked_s = time.monotonic()
            answers.append((_ask(whole, path).status_code, since(asked_s)))
        time.sleep(0.5)
    # Tokens need no store: all came meanwhile but the last pieces, which come with the settlements.
    waiting = [ask.tokens for ask in asks]
    assert [ask.finish_reason for ask in asks] == [None] * STREAMS
    whole.postgres.start()
    up_s = time.monotonic()
    for ask in asks:
        ask.wait_ended()
        assert (ask.finish_reason, ask.tokens) == ("length", LONG_TOKENS)
    closed_s = since(up_s)
    assert sum(waiting) > sent
    assert {status for status, _ in answers} == {503}, "neither 401 nor 500"
    assert max(took_s for _, took_s in answers) < REFUSED_S_MAX
    for ask in asks:
        event = whole.event(ask.request_id)
        assert event is not None
        assert (event["status"], event["completion_tokens"]) == ("complete", LONG_TOKENS)
    slowest_s = max(took_s for _, took_s in answers)
    said = f"{STREAMS} streams whole; {len(answers)} others 503, within {slowest_s:.1f} s"
    settled = f"{STREAMS} settled, complete, once each"
    whole.note(f"database down for {DOWN_S:.0f} s", f"{STREAMS} streams going on", said, settled, closed_s)
    wait_until(lambda: _ask(whole, "chat/completions").status_code == 200, 30)


def _ask(site: Site, path: str) -> httpx.Response:
    if path == "models":
        (key, *_) = site.keys.values()
        return httpx.get(f"{site.url}/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=60)
    return site.post(body("asked while the database is away", 1))
