"""Two engine replicas behind one gateway, when one of them dies, is replaced, is told to stop."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any

import httpx
import psutil
import pytest

from serve.engine.router import SLACK_REQUESTS, choose
from serve.registry.registry import AdapterRegistry
from serve.registry.versions import AdapterVersion, VersionState
from tests.replicas.conftest import SEQUENCES, TENANT, Pair, Stream
from tests.serve.conftest import NOON, TINY, enter, wait_until
from tests.serve.engine.test_router import Candidate
from tests.serve.test_live import HELLO, assert_reconciled

pytestmark = pytest.mark.slow

RUNNING = "bespoke_vllm_requests_running"


def body(model: str, tokens: int) -> dict[str, Any]:
    return {"model": model, "messages": HELLO, "max_tokens": tokens, "temperature": 0}


def ask(pair: Pair, model: str, tokens: int = 24) -> tuple[str, dict[str, Any]]:
    """The answer's text and its usage event."""
    answer = pair.post(body(model, tokens))
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"], pair.event(answer.headers["x-request-id"])


def burst(pair: Pair, model: str, size: int) -> tuple[set[str], set[str]]:
    """The texts of `size` requests at a time, and the replicas that answered them."""
    with ThreadPoolExecutor(size) as pool:
        answers = list(pool.map(lambda _: ask(pair, model), range(size)))
    return {text for text, _ in answers}, {event["replica"] for _, event in answers}


def assert_served_by_both(pair: Pair, model: str) -> None:
    """With more requests than a replica gets before the other does; a few may end before the last come."""
    texts: set[str] = set()
    replicas: set[str] = set()

    def served_by_both() -> bool:
        found = burst(pair, model, 3 * SLACK_REQUESTS)
        texts.update(found[0])
        replicas.update(found[1])
        return replicas == set(pair.pids())

    wait_until(served_by_both, 30)
    assert len(texts) == 1


def test_a_hot_adapter_is_served_by_both_replicas_alike(pair: Pair) -> None:
    texts = set()
    for adapter in pair.adapters:
        assert_served_by_both(pair, adapter.model)
        texts.add(ask(pair, adapter.model)[0])
    assert len(texts) == len(pair.adapters)
    resident = pair.samples("bespoke_adapters_resident", tier="memory")
    assert list(resident.values()) == [len(pair.adapters)] * 2


def place(pair: Pair, adapter: AdapterVersion) -> str:
    """The replica that all requests for `adapter` go to from now on, until it has more than its share.

    Where both hold it, that is the rendezvous hash's choice; the gateway hears every 2 s what they hold.
    """
    assert_served_by_both(pair, adapter.model)
    chosen = choose(adapter.id, [Candidate(replica, 0) for replica in pair.pids()])
    assert chosen is not None
    wait_until(lambda: bool(ask(pair, adapter.model, 1)[1]["replica"] == chosen.id), 20)
    return chosen.id


def test_requests_for_one_adapter_keep_to_one_replica_while_it_has_room(pair: Pair) -> None:
    for adapter in pair.adapters:
        chosen = place(pair, adapter)
        assert burst(pair, adapter.model, SLACK_REQUESTS)[1] == {chosen}


def test_a_client_that_leaves_stops_the_engine_and_pays_for_a_few_steps_more_at_most(pair: Pair) -> None:
    headers = {"Authorization": f"Bearer {pair.keys[TENANT]}"}
    request = body(pair.adapters[0].model, 900) | {"stream": True}
    delivered = 0
    with httpx.stream(
        "POST", f"{pair.url}/v1/chat/completions", json=request, headers=headers, timeout=60
    ) as answer:
        for line in answer.iter_lines():
            delivered += line.startswith("data: ")
            if delivered == 30:
                break
        request_id = answer.headers["x-request-id"]
    wait_until(lambda: set(pair.samples(RUNNING).values()) == {0}, 10)
    event = pair.event(request_id)
    assert (event["status"], event["finish_reason"]) == ("disconnected", "abort")
    assert delivered - 1 <= event["completion_tokens"] <= delivered + 25
    pair.wait_idle()
    assert_reconciled(pair)


def test_a_new_version_is_served_by_both_once_it_is_probed_and_a_retired_one_by_none(pair: Pair) -> None:
    registry, old = AdapterRegistry(pair.store, [TINY]), pair.adapters[3]
    alias = f"{old.tenant}/{old.name}"
    before, _ = ask(pair, alias)
    new = enter(registry, pair.publish(old.name, 99), pair.settings.home)
    wait_until(lambda: registry.state(new) == VersionState.READY, 15)
    after, event = ask(pair, alias)
    assert after != before
    assert event["adapter_version"] == new.model
    assert_served_by_both(pair, new.model)
    wait_until(lambda: list(pair.on_disk().values()) == [len(pair.adapters) + 1] * 2, 15)
    assert ask(pair, old.model)[0] == before

    registry.retire(old, NOON)
    assert pair.post(body(old.model, 1)).status_code == 404
    assert ask(pair, alias)[0] == after
    wait_until(lambda: list(pair.on_disk().values()) == [len(pair.adapters)] * 2, 15)


def whole(pid: int) -> list[psutil.Process]:
    replica = psutil.Process(pid)
    return [replica, *replica.children(recursive=True)]


def core(pid: int) -> list[psutil.Process]:
    (engine,) = [p for p in whole(pid) if p.name().startswith("VLLM::EngineCor")]
    return [engine]


@pytest.mark.parametrize("victims", [core, whole], ids=["its engine only", "all of it"])
def test_when_a_replica_dies_what_had_no_token_is_answered_by_the_other(
    pair: Pair, victims: Callable[[int], list[psutil.Process]]
) -> None:
    """Invariants 2 and 3 with kill -9; the replica comes back by itself, with its adapters."""
    adapter = pair.adapters[0]
    lost = place(pair, adapter)
    expected, _ = ask(pair, adapter.model)
    retried = pair.samples("bespoke_requests_retried_total")[""]
    pair.wait_idle()
    streams = [Stream(pair, body(adapter.model, 900)) for _ in range(SEQUENCES)]
    for stream in streams:
        stream.wait_begun()
    with ThreadPoolExecutor(3) as pool:
        queued = [pool.submit(ask, pair, adapter.model) for _ in range(3)]
        wait_until(lambda: pair.samples("bespoke_requests_in_progress")[""] == len(streams) + len(queued))
        assert {replica for replica, count in pair.samples(RUNNING).items() if count} == {lost}
        for process in victims(pair.pids()[lost]):
            process.kill()
        answers = [one.result(60) for one in queued]
    assert {text for text, _ in answers} == {expected}
    assert lost not in {event["replica"] for _, event in answers}
    assert len({event["request_id"] for _, event in answers}) == len(queued)
    assert pair.samples("bespoke_requests_retried_total")[""] == retried + len(queued)
    for stream in streams:
        stream.wait_ended()
        assert stream.error is not None
        assert stream.error["code"] == "engine_failed"
        event = pair.event(stream.request_id)
        assert (event["status"], event["replica"]) == ("failed", lost)
        assert stream.tokens <= event["completion_tokens"] < 900
    pair.wait_idle()
    assert_reconciled(pair)

    wait_until(lambda: len(pair.on_disk().keys() - {lost}) == 2, 180, 0.5)
    assert list(pair.on_disk().values()) == [len(pair.adapters)] * 2
    assert_served_by_both(pair, adapter.model)
    assert ask(pair, adapter.model)[0] == expected
    pair.wait_idle()
    assert_reconciled(pair)


def test_a_replica_that_is_told_to_stop_ends_its_streams_first(pair: Pair) -> None:
    """Redeployed with one replica, which replaces both; last in this file, because it does."""
    old = pair.pids()
    # More than fit in the replicas' batches: some have no token yet when the replicas are told to stop.
    streams = [Stream(pair, body(pair.adapters[0].model, 300)) for _ in range(3 * SLACK_REQUESTS)]
    wait_until(lambda: list(pair.samples(RUNNING).values()) == [SEQUENCES] * 2, 30)
    redeployed_s = monotonic()
    with ThreadPoolExecutor(1) as pool:
        redeployed = pool.submit(redeploy, pair, replicas=1)  # takes as long as a new engine's start
        for stream in streams:
            stream.wait_ended()
            assert (stream.error, stream.finish_reason) == (None, "length")
            event = pair.event(stream.request_id)
            assert (event["status"], event["completion_tokens"]) == ("complete", 300)
            assert event["replica"] in old
        left_s = redeployed_s + pair.settings.drain_timeout_s + 15 - monotonic()
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in old.values()), left_s)
        redeployed.result(180)
    wait_until(lambda: httpx.get(f"{pair.url}/readyz", timeout=60).status_code == 200, 180, 0.5)
    _, event = ask(pair, pair.adapters[0].model)
    assert event["replica"] not in old
    assert list(pair.on_disk().values()) == [len(pair.adapters)]
    pair.wait_idle()
    assert_reconciled(pair)


def redeploy(pair: Pair, replicas: int) -> None:
    from ray import serve as ray_serve

    from serve.deployment.ray_app import APP_NAME, build

    settings = pair.settings.model_copy(update={"engine_replicas": replicas})
    ray_serve.run(build(settings), name=APP_NAME, route_prefix="/")
