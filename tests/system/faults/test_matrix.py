"""kill -9 of each process at each moment of a request's life. docs/faults.md has the observations."""

import time

import pytest

from tests.support.waiting import wait_until
from tests.system.faults.fail_points import (
    AFTER_SETTLE,
    ANY,
    BEFORE_DISPATCH,
    BEFORE_SETTLE,
    DURING_SETTLE,
    IN_MID_STREAM,
    KILL,
    MID_TOKENS,
    MOMENTS,
    at,
)
from tests.system.faults.fault_site import STOP_ORDER, TOKENS, FaultSite, StoppedRequest, chat_body, since

pytestmark = pytest.mark.slow

DOWN_S = 1.0


def slug(*words: str) -> str:
    return "-".join(words).replace(",", "").replace(" ", "-")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_gateway_that_is_killed_leaves_nothing_open_and_nothing_unbilled(
    site: FaultSite, moment: str
) -> None:
    marker, point = slug("gateway", moment), at("gateway", moment)
    site.fail_points.set(point, marker, KILL)
    request = site.stream(marker, 600 if moment == IN_MID_STREAM else TOKENS)
    hit, killed_s = site.wait_hit(point, marker), time.monotonic()
    site.wait_closed(hit.request_id.removesuffix("-2"))
    closed_s = since(killed_s)
    request.wait_ended()
    observation = site.observe("gateway", moment, request, hit.request_id, closed_s)
    assert observation.billed_tokens >= observation.sent_tokens
    match moment:
        case _ if moment == BEFORE_DISPATCH:
            assert (observation.ledger, observation.billed_tokens) == ("void, gateway died", 0)
        case _ if moment == IN_MID_STREAM:
            assert MID_TOKENS <= observation.billed_tokens <= 600
        case _ if moment in (BEFORE_SETTLE, DURING_SETTLE, AFTER_SETTLE):
            assert observation.billed_tokens == TOKENS


def stop_one_at_each_moment(site: FaultSite, fault: str) -> dict[str, StoppedRequest]:
    return {moment: site.stop_at(at("gateway", moment), slug(fault, moment)) for moment in STOP_ORDER}


def assert_all_complete(
    site: FaultSite, fault: str, stopped: dict[str, StoppedRequest], killed_s: float
) -> None:
    """Each of the resumed requests is answered in full and billed."""
    for moment, one in stopped.items():
        one.request.wait_ended()
        site.wait_closed(one.hit.request_id)
        observation = site.observe(fault, moment, one.request, one.hit.request_id, since(killed_s))
        assert (one.request.finish_reason, one.request.tokens) == ("length", TOKENS)
        assert (observation.ledger, observation.billed_tokens) == ("settled, complete", TOKENS)


def test_a_database_that_is_killed_delays_the_settlements_and_spoils_none(site: FaultSite) -> None:
    """One kill for all six moments: a request stands still at each."""
    stopped = stop_one_at_each_moment(site, "database")
    site.postgres.kill()
    killed_s = time.monotonic()
    for one in stopped.values():
        site.resume(one)
    time.sleep(DOWN_S)
    refused = site.post(chat_body("while-the-database-is-away", 1))
    site.postgres.start()
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "service_unavailable", refused.text
    assert_all_complete(site, "database", stopped, killed_s)


def test_a_steward_that_is_killed_is_missed_by_no_request(site: FaultSite) -> None:
    """One kill for all six moments: a request stands still at each."""
    stopped = stop_one_at_each_moment(site, "steward")
    (old,) = site.running_pids("steward").values()
    site.kill("steward")
    killed_s = time.monotonic()
    for one in stopped.values():
        site.resume(one)
    assert_all_complete(site, "steward", stopped, killed_s)
    wait_until(lambda: set(site.running_pids("steward").values()) - {old} != set())


@pytest.mark.parametrize("moment", [BEFORE_SETTLE, DURING_SETTLE, AFTER_SETTLE])
def test_a_steward_that_is_killed_while_it_closes_a_dead_gateways_request_is_followed_by_another(
    site: FaultSite, moment: str
) -> None:
    marker, point = slug("both", moment), at("gateway", IN_MID_STREAM)
    site.fail_points.set(at("steward", moment), ANY, KILL)
    site.fail_points.set(point, marker, KILL)
    request = site.stream(marker, 600)
    hit, killed_s = site.wait_hit(point, marker), time.monotonic()
    assert site.wait_hit(at("steward", moment), ANY).request_id == hit.request_id
    site.fail_points.forget(at("steward", moment), ANY)
    site.wait_closed(hit.request_id)
    request.wait_ended()
    fault = "gateway in mid-stream, then the steward as it recovers"
    observation = site.observe(fault, moment, request, hit.request_id, since(killed_s))
    assert observation.ledger == "settled, incomplete"
    assert MID_TOKENS <= observation.billed_tokens <= 600
    assert observation.billed_tokens >= observation.sent_tokens
