"""The engine replica and one gateway die, with requests at each moment in the gateways that live on."""

import itertools
import time

import pytest

from serve.billing.ledger.checkpoints import FLUSH_S
from tests.support.waiting import wait_until
from tests.system.faults.fail_points import (
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
from tests.system.faults.fault_site import (
    ENGINE,
    STOP_ORDER,
    FaultSite,
    Observation,
    StoppedRequest,
    chat_body,
    since,
)

pytestmark = pytest.mark.slow

LONG_TOKENS, SHORT_TOKENS = 900, 20
PATIENCE_S_MAX = 150.0  # the steward gives a new engine a minute to come


def test_an_engine_and_a_gateway_that_are_killed_cost_no_more_than_they_have_told(site: FaultSite) -> None:
    """One kill for seven requests: six stand still at their moments, one streams by the dying gateway."""
    streaming = site.stop_at(at("gateway", BEFORE_DISPATCH), "both-at-once", LONG_TOKENS)
    victim_pid = streaming.hit.pid
    standing: dict[str, StoppedRequest] = {}
    strays: list[StoppedRequest] = []
    for number, moment in enumerate(STOP_ORDER):
        standing[moment] = stop_elsewhere(site, moment, f"engine-{number}", victim_pid, strays)
    site.resume(streaming)
    wait_until(lambda: streaming.request.tokens >= LONG_TOKENS // 3, 60, 0.005)
    site.kill(ENGINE, also=victim_pid)
    killed_s = time.monotonic()

    observations = {
        moment: observe_resumed(site, moment, standing[moment], killed_s) for moment in reversed(STOP_ORDER)
    }
    assert_of_the_engines_death(observations)
    assert_new_requests_are_refused(site)

    streaming.request.wait_ended()
    site.wait_closed(streaming.hit.request_id, PATIENCE_S_MAX)
    both = "engine and gateway at once"
    observation = site.observe(
        both, IN_MID_STREAM, streaming.request, streaming.hit.request_id, since(killed_s)
    )
    assert observation.ledger == "settled, incomplete"
    # A flush may be late on a busy machine; what came to the client before it is billed.
    assert streaming.request.tokens_at(killed_s - 5 * FLUSH_S) <= observation.billed_tokens < LONG_TOKENS
    for stray in strays:
        site.wait_closed(stray.hit.request_id, PATIENCE_S_MAX)
        closing = site.closing(stray.hit.request_id)
        assert closing is not None
        assert (closing["kind"], closing["reason"]) == ("void", "gateway died")

    site.wait_until_complete()
    assert site.post(chat_body("the-engine-is-back", 1)).status_code == 200


def stop_elsewhere(
    site: FaultSite, moment: str, marker: str, victim_pid: int, strays: list[StoppedRequest]
) -> StoppedRequest:
    """A request that stands still at `moment`, in a gateway that is not the victim.

    The kernel chooses the gateway of a connection. Requests that come to the victim stand still before their
    dispatch and are added to `strays`.
    """
    tokens = LONG_TOKENS if moment == IN_MID_STREAM else SHORT_TOKENS
    for attempt in itertools.count():
        name = f"{marker}-{attempt}"
        before = site.stop_at(at("gateway", BEFORE_DISPATCH), name, tokens)
        if before.hit.pid != victim_pid:
            break
        strays.append(before)
    if moment == BEFORE_DISPATCH:
        return before
    point = at("engine" if moment == BEFORE_FIRST_TOKEN else "gateway", moment)
    site.fail_points.set(point, name, STOP)
    site.resume(before)
    return StoppedRequest(before.request, point, name, site.wait_hit(point, name))


def assert_new_requests_are_refused(site: FaultSite) -> None:
    refused = site.post(chat_body("while-the-engine-is-away", 1))
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["type"] == "server_error"


def observe_resumed(site: FaultSite, moment: str, stopped: StoppedRequest, killed_s: float) -> Observation:
    site.resume(stopped)
    stopped.request.wait_ended()
    site.wait_closed(stopped.hit.request_id)
    return site.observe("engine", moment, stopped.request, stopped.hit.request_id, since(killed_s))


def assert_of_the_engines_death(observations: dict[str, Observation]) -> None:
    for moment in (BEFORE_SETTLE, DURING_SETTLE, AFTER_SETTLE):
        assert observations[moment].client == "the whole answer"
        assert (observations[moment].ledger, observations[moment].billed_tokens) == (
            "settled, complete",
            SHORT_TOKENS,
        )
    cut = observations[IN_MID_STREAM]
    assert (cut.client, cut.ledger) == ("an error event (engine_failed)", "settled, failed")
    assert MID_TOKENS <= cut.sent_tokens <= cut.billed_tokens < LONG_TOKENS
    for moment in (BEFORE_DISPATCH, BEFORE_FIRST_TOKEN):
        assert "service_unavailable" in observations[moment].client
        assert observations[moment].ledger.startswith("void")
        assert (observations[moment].sent_tokens, observations[moment].billed_tokens) == (0, 0)
