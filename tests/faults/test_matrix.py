"""kill -9 of each process at each moment of a request's life. docs/faults.md has what was seen."""

import time

import pytest

from tests.faults.conftest import TOKENS, Ask, Site, body, since
from tests.faults.failpoints import (
    AFTER_SETTLE,
    ANY,
    BEFORE_DISPATCH,
    BEFORE_SETTLE,
    DURING_SETTLE,
    IN_MID_STREAM,
    KILL,
    MID_TOKENS,
    MOMENTS,
    STOP,
    at,
)

pytestmark = pytest.mark.slow

DOWN_S = 1.0


def slug(*words: str) -> str:
    return "-".join(words).replace(",", "").replace(" ", "-")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_gateway_that_is_killed_leaves_nothing_open_and_nothing_unbilled(whole: Site, moment: str) -> None:
    marker, point = slug("gateway", moment), at("gateway", moment)
    whole.traps.set(point, marker, KILL)
    ask = Ask(whole, marker, 600 if moment == IN_MID_STREAM else TOKENS)
    hit, killed_s = whole.wait_hit(point, marker), time.monotonic()
    whole.wait_closed(hit.request_id.removesuffix("-2"))
    closed_s = since(killed_s)
    ask.wait_ended()
    seen = whole.observe("gateway", moment, ask, hit.request_id, closed_s)
    assert seen.billed_tokens >= seen.sent_tokens
    match moment:
        case _ if moment == BEFORE_DISPATCH:
            assert (seen.ledger, seen.billed_tokens) == ("void, gateway died", 0)
        case _ if moment == IN_MID_STREAM:
            assert MID_TOKENS <= seen.billed_tokens <= 600
        case _ if moment in (BEFORE_SETTLE, DURING_SETTLE, AFTER_SETTLE):
            assert seen.billed_tokens == TOKENS


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_database_that_is_killed_delays_a_settlement_and_spoils_none(whole: Site, moment: str) -> None:
    marker, point = slug("database", moment), at("gateway", moment)
    whole.traps.set(point, marker, STOP)
    ask = Ask(whole, marker)
    hit = whole.wait_hit(point, marker)
    whole.postgres.kill()
    killed_s = time.monotonic()
    whole.traps.release(point, marker)
    time.sleep(DOWN_S)
    refused = whole.post(body("while-the-database-is-away", 1))
    whole.postgres.start()
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "service_unavailable", refused.text
    ask.wait_ended()
    whole.wait_closed(hit.request_id)
    seen = whole.observe("database", moment, ask, hit.request_id, since(killed_s))
    assert (ask.finish_reason, ask.tokens) == ("length", TOKENS)
    assert (seen.ledger, seen.billed_tokens) == ("settled, complete", TOKENS)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_steward_that_is_killed_is_missed_by_no_request(whole: Site, moment: str) -> None:
    marker, point = slug("steward", moment), at("gateway", moment)
    whole.traps.set(point, marker, STOP)
    ask = Ask(whole, marker)
    hit = whole.wait_hit(point, marker)
    whole.kill("steward")
    killed_s = time.monotonic()
    whole.traps.release(point, marker)
    ask.wait_ended()
    whole.wait_closed(hit.request_id)
    seen = whole.observe("steward", moment, ask, hit.request_id, since(killed_s))
    assert (ask.finish_reason, ask.tokens) == ("length", TOKENS)
    assert (seen.ledger, seen.billed_tokens) == ("settled, complete", TOKENS)


@pytest.mark.parametrize("moment", [BEFORE_SETTLE, DURING_SETTLE, AFTER_SETTLE])
def test_a_steward_that_is_killed_while_it_closes_a_dead_gateways_request_is_followed_by_another(
    whole: Site, moment: str
) -> None:
    marker, point = slug("both", moment), at("gateway", IN_MID_STREAM)
    whole.traps.set(at("steward", moment), ANY, KILL)
    whole.traps.set(point, marker, KILL)
    ask = Ask(whole, marker, 600)
    hit, killed_s = whole.wait_hit(point, marker), time.monotonic()
    assert whole.wait_hit(at("steward", moment), ANY).request_id == hit.request_id
    whole.traps.forget(at("steward", moment), ANY)
    whole.wait_closed(hit.request_id)
    ask.wait_ended()
    fault = "gateway in mid-stream, then the steward as it recovers"
    seen = whole.observe(fault, moment, ask, hit.request_id, since(killed_s))
    assert seen.ledger == "settled, incomplete"
    assert MID_TOKENS <= seen.billed_tokens <= 600
    assert seen.billed_tokens >= seen.sent_tokens
