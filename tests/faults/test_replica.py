"""The engine replica dies, with a request at each moment; and together with a gateway."""

import time

import pytest

from serve.billing.ledger.checkpoints import FLUSH_S
from tests.faults.conftest import ENGINE, Ask, Seen, Site, since
from tests.faults.failpoints import (
    AFTER_SETTLE,
    BEFORE_DISPATCH,
    BEFORE_FIRST_TOKEN,
    BEFORE_SETTLE,
    DURING_SETTLE,
    IN_MID_STREAM,
    MID_TOKENS,
    STOP,
    at,
)
from tests.serve.conftest import wait_until

pytestmark = pytest.mark.slow

LONG_TOKENS, SHORT_TOKENS = 900, 20
# The last stands still in a transaction, and with it all that is the same tenant's.
ORDER = (BEFORE_DISPATCH, BEFORE_FIRST_TOKEN, BEFORE_SETTLE, AFTER_SETTLE, IN_MID_STREAM, DURING_SETTLE)


def test_an_engine_that_is_killed_costs_no_more_than_it_has_told(whole: Site) -> None:
    """One kill for all six moments: each request stands at its own."""
    asks: dict[str, tuple[Ask, str, str, str]] = {}
    for number, moment in enumerate(ORDER):
        who = "engine" if moment == BEFORE_FIRST_TOKEN else "gateway"
        point, marker = at(who, moment), f"engine-{number}"
        whole.traps.set(point, marker, STOP)
        ask = Ask(whole, marker, LONG_TOKENS if moment == IN_MID_STREAM else SHORT_TOKENS)
        asks[moment] = ask, point, marker, whole.wait_hit(point, marker).request_id
    whole.kill(ENGINE)
    killed_s = time.monotonic()
    seen: dict[str, Seen] = {}
    for moment in reversed(ORDER):
        ask, point, marker, request_id = asks[moment]
        whole.traps.release(point, marker)
        ask.wait_ended()
        whole.wait_closed(request_id)
        seen[moment] = whole.observe("engine", moment, ask, request_id, since(killed_s))
    for moment in (BEFORE_SETTLE, DURING_SETTLE, AFTER_SETTLE):
        assert seen[moment].client == "the whole answer"
        assert (seen[moment].ledger, seen[moment].billed_tokens) == ("settled, complete", SHORT_TOKENS)
    cut = seen[IN_MID_STREAM]
    assert (cut.client, cut.ledger) == ("an error event (engine_failed)", "settled, failed")
    assert MID_TOKENS <= cut.sent_tokens <= cut.billed_tokens < LONG_TOKENS
    for moment in (BEFORE_DISPATCH, BEFORE_FIRST_TOKEN):
        assert "service_unavailable" in seen[moment].client
        assert seen[moment].ledger.startswith("void")
        assert (seen[moment].sent_tokens, seen[moment].billed_tokens) == (0, 0)


def test_what_a_gateway_and_its_engine_had_counted_when_both_die_is_billed_from_the_checkpoints(
    whole: Site,
) -> None:
    point, marker = at("gateway", IN_MID_STREAM), "both-at-once"
    whole.traps.set(point, marker, STOP)
    ask = Ask(whole, marker, LONG_TOKENS)
    hit = whole.wait_hit(point, marker)
    whole.traps.release(point, marker)
    wait_until(lambda: ask.tokens >= LONG_TOKENS // 3, 60, 0.005)
    whole.kill(ENGINE, also=hit.pid)
    killed_s = time.monotonic()
    ask.wait_ended()
    whole.wait_closed(hit.request_id, 150)  # the steward gives a new engine a minute to come
    seen = whole.observe("engine and gateway at once", IN_MID_STREAM, ask, hit.request_id, since(killed_s))
    assert seen.ledger == "settled, incomplete"
    # A flush may be late on a busy machine; what came to the client before it is billed.
    assert ask.tokens_at(killed_s - 5 * FLUSH_S) <= seen.billed_tokens < LONG_TOKENS
