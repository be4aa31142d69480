"""Tests invariant 7: limits hold across gateways and are never exceeded."""

import asyncio
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from serve.api.errors import render
from serve.errors import RateLimited, StoreUnavailable
from serve.formats.errors import body_of
from serve.rate_limits import Permit
from serve.rate_limits.leases import concurrency_table, grants_table
from serve.rate_limits.limits import Limits, Subject
from serve.storage.database import Store
from tests.support.gateways import CONCURRENCY_LEASE_S, LEASE_S, Gateways, attempt, burst, run, tenant


@pytest.fixture
def gateways(store: Store) -> Iterator[Gateways]:
    gateways = Gateways(store.url)
    yield gateways
    gateways.close()


def test_a_request_passes_after_the_time_that_its_refusal_named_and_none_before(gateways: Gateways) -> None:
    async def test() -> None:
        subjects, first = tenant(requests_per_min=5), gateways.clock.now
        for number in range(5):
            assert isinstance(await attempt(gateways.all[number % 3], subjects), Permit)
            gateways.clock.now += 3
        for gateway in gateways.all:
            await gateway.settle()
        refused = await attempt(gateways.all[0], subjects)
        assert isinstance(refused, RateLimited)
        assert refused.retry_after_s == 45  # the first of them leaves the window 60 s after it started
        assert refused.message == (
            "Rate limit reached for requests per min (RPM): Limit 5, Used 5, Requested 1. "
            "Please try again in 45s."
        )
        assert render(refused).headers["retry-after"] == "45"
        gateways.clock.now = first + 59.9
        assert isinstance(await attempt(gateways.all[1], subjects), RateLimited)
        gateways.clock.now = first + 60
        assert isinstance(await attempt(gateways.all[2], subjects), Permit)

    run(test)


def test_a_request_larger_than_the_limit_is_told_that_waiting_does_not_help(gateways: Gateways) -> None:
    async def test() -> None:
        refused = await attempt(gateways.all[0], tenant(tokens_per_min=100), 101)
        assert isinstance(refused, RateLimited)
        assert refused.message == "Request too large for tokens per min (TPM): Limit 100, Requested 101."
        assert gateways.writes == 0
        answer = render(refused)
        assert (answer.status_code, body_of(refused)["error"]["type"]) == (429, "tokens")
        assert answer.headers["x-should-retry"] == "false"
        assert "retry-after" not in answer.headers

    run(test)


def test_within_a_large_limit_almost_no_request_goes_to_the_store(gateways: Gateways) -> None:
    async def test() -> None:
        subjects = tenant(requests_per_min=100_000, tokens_per_min=100_000_000, concurrent_requests=1000)
        for number in range(1000):
            (await gateways.all[number % 3].admit(subjects, tokens=2000)).release(500)
        assert gateways.writes == 3
        assert len(await burst(gateways, subjects, 200)) == 200
        assert gateways.writes <= 3 + 2 * 3

    run(test)


def test_without_limits_nothing_goes_to_the_store(gateways: Gateways) -> None:
    async def test() -> None:
        gateways.stores[0].away = True
        permit = await gateways.all[0].admit(
            [Subject("tenant", "acme", Limits()), Subject("key", "k", Limits(context_tokens=5))], tokens=10
        )
        permit.release(3)
        assert permit.status is None
        await gateways.all[0].settle()
        assert gateways.writes == 0

    run(test)


def test_tokens_that_were_not_used_can_be_spent_again_here_at_once_and_elsewhere_soon(
    gateways: Gateways,
) -> None:
    async def test() -> None:
        subjects, (here, there, _) = tenant(tokens_per_min=1000), gateways.all
        first = await here.admit(subjects, tokens=1000)
        assert isinstance(await attempt(there, subjects, 100), RateLimited)
        first.release(400)
        second = await here.admit(subjects, tokens=600)
        gateways.clock.now += LEASE_S
        second.release(100)  # the lease has ended, so this goes back to the store
        await here.settle()
        assert isinstance(await attempt(there, subjects, 501), RateLimited)
        gateways.clock.now += 1
        await there.admit(subjects, tokens=500)

    run(test)


def test_tokens_released_after_their_slice_was_closed_still_come_back(gateways: Gateways) -> None:
    async def test() -> None:
        subjects, (here, there, _) = tenant(tokens_per_min=1000), gateways.all
        permit = await here.admit(subjects, tokens=1000)
        gateways.clock.now += 30
        await here.settle()
        permit.release(10)
        await here.admit(subjects, tokens=490)  # nothing is stranded in the gateway that was asked
        await there.admit(subjects, tokens=500)

    run(test)


def test_budget_that_a_gateway_does_not_use_is_free_elsewhere_when_its_lease_ends(gateways: Gateways) -> None:
    async def test() -> None:
        subjects, (here, there, _) = tenant(requests_per_min=100), gateways.all
        await here.admit(subjects, tokens=1)  # leases 5
        passed = [await attempt(there, subjects) for _ in range(99)]
        assert sum(isinstance(answer, Permit) for answer in passed) == 95
        gateways.clock.now += LEASE_S
        await here.settle()
        passed = [await attempt(there, subjects) for _ in range(5)]
        assert sum(isinstance(answer, Permit) for answer in passed) == 4

    run(test)


def test_a_gateway_that_stops_gives_back_everything(gateways: Gateways) -> None:
    async def test() -> None:
        subjects, (here, there, _) = tenant(requests_per_min=100, concurrent_requests=100), gateways.all
        (await here.admit(subjects, tokens=1)).release(1)
        await here.close()
        passed = [await attempt(there, subjects) for _ in range(100)]
        assert sum(isinstance(answer, Permit) for answer in passed) == 99

    run(test)


def test_releasing_twice_counts_once(gateways: Gateways) -> None:
    async def test() -> None:
        here, subjects = gateways.all[0], tenant(concurrent_requests=2, tokens_per_min=1000)
        first, second = [await here.admit(subjects, tokens=500) for _ in range(2)]
        first.release(400)
        first.release(0)
        first.release(-5)
        assert isinstance(await attempt(here, subjects, 101), RateLimited)
        third = await here.admit(subjects, tokens=100)
        assert isinstance(await attempt(here, subjects), RateLimited)
        second.release(10_000)  # more than was reserved gives back nothing
        third.release(100)

    run(test)


def test_what_the_tenant_gave_is_put_back_when_the_key_refuses(gateways: Gateways) -> None:
    async def test() -> None:
        key = Subject("key", "key_1", Limits(requests_per_min=1))
        subjects = [*tenant(requests_per_min=6, tokens_per_min=600, concurrent_requests=6), key]
        assert len(await burst(gateways, subjects, 30, tokens=10)) == 1
        gateways.clock.now += 1
        assert len(await burst(gateways, subjects[:1], 30, tokens=10)) == 5

    run(test)


def test_the_standing_is_that_of_the_tightest_subject(gateways: Gateways) -> None:
    async def test() -> None:
        key = Subject("key", "key_1", Limits(requests_per_min=3))
        permit = await gateways.all[0].admit(
            [*tenant(requests_per_min=100, tokens_per_min=50), key], tokens=20
        )
        assert permit.status is not None
        assert permit.status.requests is not None
        assert permit.status.tokens is not None
        assert (permit.status.requests.limit, permit.status.requests.remaining) == (3, 2)
        assert (permit.status.tokens.limit, permit.status.tokens.remaining) == (50, 30)

    run(test)


def test_concurrent_requests_are_limited_across_gateways_and_places_come_back(gateways: Gateways) -> None:
    async def test() -> None:
        subjects = tenant(concurrent_requests=4)
        for _ in range(3):
            passed = await burst(gateways, subjects, 30)
            assert len(passed) == 4
            for permit in passed:
                permit.release(0)
            gateways.clock.now += 1
            for gateway in gateways.all:
                await gateway.settle()

    run(test)


def test_one_request_after_another_passes_over_changing_gateways(store: Store) -> None:
    # The grace is longer than a place's way back, as it is by default; here the clock stands still.
    gateways = Gateways(store.url, refusal_s=0, grace_s=0.3)

    async def test() -> None:
        following = [asyncio.create_task(gateway.keep_settled()) for gateway in gateways.all]
        for number in range(6):
            (await gateways.all[number % 3].admit(tenant(concurrent_requests=1), tokens=1)).release(1)
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)

    run(test)
    gateways.close()


def test_a_dead_gateways_places_come_back_when_its_lease_ends(gateways: Gateways) -> None:
    async def test() -> None:
        subjects, (dead, alive, _) = tenant(concurrent_requests=2), gateways.all
        for _ in range(2):
            await dead.admit(subjects, tokens=1)
        gateways.clock.now += CONCURRENCY_LEASE_S - 0.1
        assert isinstance(await attempt(alive, subjects), RateLimited)
        gateways.clock.now += 0.1
        await alive.admit(subjects, tokens=1)
        # Under its old name, the dead one's successor starts with nothing.
        assert isinstance(await attempt(gateways.start(0), subjects), Permit)

    run(test)


def test_a_living_gateway_keeps_the_places_of_its_long_requests(gateways: Gateways) -> None:
    async def test() -> None:
        subjects, (busy, other, _) = tenant(concurrent_requests=1), gateways.all
        permit = await busy.admit(subjects, tokens=1)
        for _ in range(60):
            gateways.clock.now += 1
            await busy.settle()
        assert isinstance(await attempt(other, subjects), RateLimited)
        permit.release(0)
        await busy.settle()
        gateways.clock.now += 1
        await other.admit(subjects, tokens=1)

    run(test)


def test_a_gateway_cut_off_from_the_store_spends_its_leases_and_not_a_moment_longer(
    gateways: Gateways,
) -> None:
    async def test() -> None:
        subjects, here = tenant(requests_per_min=1000, concurrent_requests=1000), gateways.all[0]
        (await here.admit(subjects, tokens=1)).release(0)
        gateways.stores[0].away = True
        (await here.admit(subjects, tokens=1)).release(0)
        with pytest.raises(StoreUnavailable):
            await here.admit(tenant(tokens_per_min=5), tokens=1)
        gateways.clock.now += LEASE_S
        with pytest.raises(StoreUnavailable):
            await here.admit(subjects, tokens=1)
        places_only = tenant(concurrent_requests=1000)
        (await here.admit(places_only, tokens=1)).release(0)
        gateways.clock.now += CONCURRENCY_LEASE_S - LEASE_S
        with pytest.raises(StoreUnavailable):
            await here.admit(places_only, tokens=1)
        gateways.stores[0].away = False
        await here.admit(subjects, tokens=1)

    run(test)


def test_requests_that_are_cancelled_while_they_wait_leave_nothing_taken(gateways: Gateways) -> None:
    async def test() -> None:
        subjects, here = tenant(requests_per_min=3, concurrent_requests=3), gateways.all[0]
        for yields in range(0, 40, 2):
            waiting = asyncio.create_task(here.admit(subjects, tokens=1))
            for _ in range(yields):
                if not waiting.done():
                    await asyncio.sleep(0.0005)
            waiting.cancel()
            answer, *_ = await asyncio.gather(waiting, return_exceptions=True)
            if isinstance(answer, Permit):  # it was through before the cancellation
                answer.release(0)
                gateways.clock.now += 61
            else:
                assert isinstance(answer, asyncio.CancelledError)
            await here.settle()
        gateways.clock.now += 61
        assert len([await here.admit(subjects, tokens=1) for _ in range(3)]) == 3

    run(test)


def test_a_refused_client_does_not_make_a_transaction_of_every_refusal(gateways: Gateways) -> None:
    async def test() -> None:
        here, subjects = gateways.all[0], tenant(requests_per_min=1)
        for _ in range(500):
            await attempt(here, subjects)
        assert gateways.writes == 2

    run(test)


def test_old_rows_are_dropped(gateways: Gateways) -> None:
    async def test() -> None:
        await gateways.all[0].admit(tenant(requests_per_min=10, concurrent_requests=1), tokens=1)
        gateways.clock.now += 200
        await gateways.all[1].settle()
        with gateways.stores[0].read() as connection:
            for table in (grants_table, concurrency_table):
                assert connection.execute(sa.select(table)).all() == []

    run(test)
