"""Routing: `rank` as a function of plain values, and the router in a real Serve with dummy engines."""

import asyncio
import json
import logging
import random
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import serve.deployment as deployment  # before anything else imports ray
from serve.adapters import AdapterRef
from serve.engine.base import GenerationRequest, Sampling, Texts
from serve.router import AdapterRouter, Candidate, rank

SLACK = 4
ROOM = 16
ONGOING_MAX = 2
BURST = 24
ADAPTERS = st.integers(1, 2**31)


def candidates(loads: st.SearchStrategy[int | None], adapter: int = 1) -> st.SearchStrategy[list[Candidate]]:
    """One to six replicas, some of which hold `adapter`."""
    one = st.builds(
        Candidate,
        id=st.text("abcdefgh01234567", min_size=8, max_size=8),
        load=loads,
        load_max=st.just(ROOM),
        adapters=st.sampled_from([frozenset(), frozenset({adapter}), frozenset({adapter + 1})]),
    )
    return st.lists(one, min_size=1, max_size=6, unique_by=lambda c: c.id)


ANY_LOAD = st.none() | st.integers(0, ROOM + 2)
EVEN_LOAD = st.none() | st.integers(0, SLACK)


def idle(*names: str) -> list[Candidate]:
    return [Candidate(name, 0, ROOM) for name in names]


def first(adapter: int, replicas: list[Candidate]) -> Candidate:
    return rank(adapter, replicas, SLACK)[0][0]


@given(st.none() | st.just(1), candidates(ANY_LOAD))
def test_every_replica_is_ranked_once(adapter: int | None, replicas: list[Candidate]) -> None:
    groups = rank(adapter, replicas, SLACK)
    assert all(groups)
    assert sorted(c.id for group in groups for c in group) == sorted(c.id for c in replicas)


@given(st.none() | st.just(1), candidates(ANY_LOAD))
def test_a_full_replica_never_precedes_one_with_room(adapter: int | None, replicas: list[Candidate]) -> None:
    fullness = [{c.full for c in group} for group in rank(adapter, replicas, SLACK)]
    assert all(len(group) == 1 for group in fullness)
    assert fullness == sorted(fullness, key=lambda group: group == {True})


@given(candidates(ANY_LOAD), st.randoms())
def test_all_routers_agree_on_an_adapter(replicas: list[Candidate], rng: random.Random) -> None:
    shuffled = rng.sample(replicas, len(replicas))
    assert rank(1, shuffled, SLACK) == rank(1, replicas, SLACK)


@given(ADAPTERS.flatmap(lambda a: st.tuples(st.just(a), candidates(EVEN_LOAD, a))), st.data())
def test_removing_a_replica_moves_only_the_adapters_it_had(
    case: tuple[int, list[Candidate]], data: st.DataObject
) -> None:
    adapter, replicas = case
    gone = data.draw(st.sampled_from(replicas))
    before = first(adapter, replicas)
    if gone != before:
        assert first(adapter, [c for c in replicas if c != gone]) == before


@given(ADAPTERS.flatmap(lambda a: st.tuples(st.just(a), candidates(EVEN_LOAD, a))))
def test_a_holder_comes_first_while_loads_are_even(case: tuple[int, list[Candidate]]) -> None:
    adapter, replicas = case
    holders = [c for c in replicas if adapter in c.adapters]
    assert not holders or first(adapter, replicas) in holders


@given(candidates(st.integers(0, ROOM - 1)))
def test_the_first_choice_is_within_the_slack_of_the_least_loaded(replicas: list[Candidate]) -> None:
    load = first(1, replicas).load
    assert load is not None
    assert load <= min(c.load for c in replicas if c.load is not None) + SLACK


def test_the_places_of_adapters_are_the_same_in_every_process() -> None:
    replicas = idle("a", "b", "c")
    assert "".join(first(adapter, replicas).id for adapter in range(20)) == "bbbbbababbccbbcaabca"


def test_adapters_are_spread_evenly() -> None:
    replicas = idle("a", "b", "c")
    homes = [first(adapter, replicas).id for adapter in range(3000)]
    assert all(900 < homes.count(c.id) < 1100 for c in replicas)


def test_a_hot_adapter_spreads_to_the_next_in_rendezvous_order() -> None:
    order = [group[0] for group in rank(1, idle("a", "b", "c"), SLACK)]
    loads: dict[str, int] = {c.id: 0 for c in order}
    for _ in range(3 * ROOM):
        replicas = [Candidate(c.id, loads[c.id], ROOM) for c in order]
        loads[first(1, replicas).id] += 1
        placed = [loads[c.id] for c in order]
        assert placed == sorted(placed, reverse=True)
        assert placed[0] - placed[-1] <= SLACK + 1 or max(placed) == ROOM
    assert set(loads.values()) == {ROOM}


def test_a_holder_that_is_too_busy_shares_with_another_holder_first() -> None:
    busy, other, cold = (
        Candidate("a", SLACK + 1, ROOM, frozenset({1})),
        Candidate("b", SLACK, ROOM, frozenset({1})),
        Candidate("c", 0, ROOM),
    )
    assert rank(1, [busy, cold, other], SLACK) == [[other], [cold], [busy]]


def test_unknown_loads_are_asked_for_before_a_busy_holder_is_left() -> None:
    busy, unknown = Candidate("a", SLACK + 1, ROOM, frozenset({1})), Candidate("b", None, ROOM)
    calm = Candidate("a", SLACK, ROOM, frozenset({1}))
    assert rank(1, [unknown, busy], SLACK) == [[busy, unknown]]
    assert rank(1, [unknown, calm], SLACK) == [[calm], [unknown]]


def test_the_base_has_two_choices_and_then_the_rest() -> None:
    a, b, c = idle("a", "b", "c")
    full = Candidate("d", ROOM, ROOM)
    assert rank(None, [a, full, b, c], SLACK) == [[a, b], [c], [full]]


in_serve = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What `observe` saw, in a process of its own: a process can hold one Ray, and `live` has one here."""
    command = [sys.executable, "-m", "tests.serve.test_router"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@in_serve
def test_one_adapter_keeps_to_one_replica_and_all_agree_which(seen: dict[str, Any]) -> None:
    for adapter, replicas in seen["calm"].items():
        assert set(replicas) == {first(int(adapter), idle(*seen["replicas"])).id}


@in_serve
def test_when_its_replica_is_full_the_next_takes_over_until_there_is_room(seen: dict[str, Any]) -> None:
    order = [group[0].id for group in rank(7, idle(*seen["replicas"]), SLACK)]
    assert seen["filling"] == [order[0]] * ONGOING_MAX + [order[1]] * ONGOING_MAX + [order[2]]
    assert seen["after"][-1] == order[0]


@in_serve
def test_a_burst_larger_than_all_replicas_is_served_by_all_of_them(seen: dict[str, Any]) -> None:
    assert len(seen["burst"]) == BURST
    assert set(seen["burst"]) == set(seen["replicas"])


@in_serve
def test_base_requests_reach_every_replica(seen: dict[str, Any]) -> None:
    assert set(seen["base"]) == set(seen["replicas"])


@in_serve
def test_requests_follow_what_replicas_report_to_hold(seen: dict[str, Any]) -> None:
    assert seen["unreported"] != seen["holder"]
    assert seen["reported"][-1] == seen["holder"]


class Echo:
    """An engine that generates the name of its replica, and holds the adapters it is told to hold."""

    def __init__(self) -> None:
        from ray import serve as ray_serve

        deployment._keep_replica_port_on("127.0.0.1")
        self._id: str = ray_serve.get_replica_context().replica_id.unique_id
        self._adapters: set[int] = set()

    async def stream(self, request: GenerationRequest) -> AsyncIterator[str]:
        yield self._id
        if request.prompt == Texts(("stay",)):
            await asyncio.Event().wait()

    async def name(self) -> str:
        return self._id

    async def hold(self, replica: str, adapter: int) -> None:
        if replica == self._id:
            self._adapters.add(adapter)

    async def record_routing_stats(self) -> dict[str, Any]:
        return {"adapters": sorted(self._adapters)}


async def observe(handle: Any) -> dict[str, Any]:
    streaming = handle.options(stream=True).stream

    async def told(method: str, *arguments: object) -> list[Any]:
        return list(await handle.broadcast(method, *arguments).results_async(timeout_s=10))

    async def start(adapter: int | None, prompt: str = "") -> tuple[str, Any]:
        ref = None if adapter is None else AdapterRef(adapter, "acme", "support", "0" * 16)
        answer = streaming.remote(GenerationRequest("r", ref, Texts((prompt,)), Sampling(), ""))
        return await anext(answer), answer

    async def ask(adapter: int | None) -> str:
        name, rest = await start(adapter)
        async for _ in rest:
            pass
        return name

    async def ask_until(adapter: int, replica: str) -> list[str]:
        names = [await ask(adapter)]
        while names[-1] != replica:
            await asyncio.sleep(0.1)
            names.append(await ask(adapter))
        return names

    await ask(None)  # the router learns of the replicas with its first request
    seen: dict[str, Any] = {"replicas": await told("name")}
    seen["calm"] = {adapter: [await ask(adapter) for _ in range(4)] for adapter in (7, 8, 9, 10, 11)}
    seen["base"] = [await ask(None) for _ in range(30)]
    held = [await start(7, "stay") for _ in range(2 * ONGOING_MAX + 1)]
    seen["filling"] = [name for name, _ in held]
    for _, answer in held:
        answer.cancel()
    seen["after"] = await ask_until(7, held[0][0])
    seen["burst"] = await asyncio.gather(*(ask(7) for _ in range(BURST)))
    seen["holder"] = rank(99, idle(*seen["replicas"]), SLACK)[-1][0].id
    seen["unreported"] = await ask(99)
    await told("hold", seen["holder"], 99)
    seen["reported"] = await ask_until(99, seen["holder"])
    return seen


def main() -> None:
    import ray
    from ray import serve as ray_serve
    from ray.serve.config import RequestRouterConfig

    with tempfile.TemporaryDirectory(prefix="bespoke-", ignore_cleanup_errors=True) as scratch:
        try:
            ray.init(
                address="local",
                num_cpus=1,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=scratch,
            )
            deployment._check_node_on("127.0.0.1")
            ray_serve.start(proxy_location="Disabled")
            engine = ray_serve.deployment(Echo).options(
                num_replicas=3,
                max_ongoing_requests=ONGOING_MAX,
                ray_actor_options={"num_cpus": 0},
                request_router_config=RequestRouterConfig(
                    request_router_class=AdapterRouter,
                    request_router_kwargs={"slack_requests": SLACK},
                    request_routing_stats_period_s=0.5,
                ),
            )
            handle = ray_serve.run(engine.bind(), name="router", route_prefix=None)
            seen = asyncio.run(asyncio.wait_for(observe(handle), timeout=45))
            ray_serve.shutdown()
        finally:
            ray.shutdown()
    sys.stdout.write(json.dumps(seen) + "\n")


if __name__ == "__main__":
    main()
