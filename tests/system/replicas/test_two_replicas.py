"""Two engine replicas behind one gateway: which of them answers, and what happens when one dies."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from serve.engine.router import SLACK_REQUESTS, choose
from serve.registry.registry import AdapterRegistry
from serve.registry.versions import AdapterVersion, VersionState
from tests.serve.engine.test_router import Candidate
from tests.support.constants import NOON, TINY
from tests.support.live_service import HELLO, register_and_promote
from tests.support.streamed_request import StreamedRequest
from tests.support.waiting import wait_until
from tests.system.replicas.replica_service import ENGINE, PAIR_SEQUENCES, TENANT, ReplicaService

pytestmark = pytest.mark.slow

RUNNING = "bespoke_vllm_requests_running"


def body(model: str, tokens: int) -> dict[str, Any]:
    return {"model": model, "messages": HELLO, "max_tokens": tokens, "temperature": 0}


def ask(pair: ReplicaService, model: str, tokens: int = 24) -> tuple[str, dict[str, Any]]:
    """The answer's text and its usage event."""
    answer = pair.post(body(model, tokens))
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"], pair.event(answer.headers["x-request-id"])


def burst(pair: ReplicaService, model: str, size: int) -> tuple[set[str], set[str]]:
    """The texts of `size` requests at a time, and the replicas that answered them."""
    with ThreadPoolExecutor(size) as pool:
        answers = list(pool.map(lambda _: ask(pair, model), range(size)))
    return {text for text, _ in answers}, {event["replica"] for _, event in answers}


def assert_served_by_both(pair: ReplicaService, model: str) -> None:
    """With more requests than a replica gets before the other does; a few may end before the last come."""
    texts: set[str] = set()
    replicas: set[str] = set()

    def served_by_both() -> bool:
        found = burst(pair, model, 3 * SLACK_REQUESTS)
        texts.update(found[0])
        replicas.update(found[1])
        return replicas == set(pair.running_pids(ENGINE))

    wait_until(served_by_both, 30)
    assert len(texts) == 1


def test_a_hot_adapter_is_served_by_both_replicas_alike(pair: ReplicaService) -> None:
    texts = set()
    for adapter in pair.adapters:
        assert_served_by_both(pair, adapter.model)
        texts.add(ask(pair, adapter.model)[0])
    assert len(texts) == len(pair.adapters)
    resident = pair.samples("bespoke_adapters_resident", tier="memory")
    assert list(resident.values()) == [len(pair.adapters)] * 2


def place(pair: ReplicaService, adapter: AdapterVersion) -> str:
    """The replica that all requests for `adapter` go to from now on, until it has more than its share.

    Where both hold it, that is the rendezvous hash's choice; the gateway hears every 2 s what they hold.
    """
    assert_served_by_both(pair, adapter.model)
    chosen = choose(adapter.id, [Candidate(replica, 0) for replica in pair.running_pids(ENGINE)])
    assert chosen is not None
    wait_until(lambda: bool(ask(pair, adapter.model, 1)[1]["replica"] == chosen.id), 20)
    return chosen.id


def test_requests_for_one_adapter_keep_to_one_replica_while_it_has_room(pair: ReplicaService) -> None:
    for adapter in pair.adapters:
        chosen = place(pair, adapter)
        assert burst(pair, adapter.model, SLACK_REQUESTS)[1] == {chosen}


def test_a_client_that_leaves_stops_the_engine_and_pays_for_a_few_steps_more_at_most(
    pair: ReplicaService,
) -> None:
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
    pair.assert_reconciled()


def test_a_new_version_is_served_by_both_once_it_is_probed_and_a_retired_one_by_none(
    pair: ReplicaService,
) -> None:
    registry, old = AdapterRegistry(pair.store, [TINY]), pair.adapters[3]
    alias = f"{old.tenant}/{old.name}"
    before, _ = ask(pair, alias)
    new = register_and_promote(registry, pair.publish(old.name, 99), pair.settings.home)
    wait_until(lambda: registry.state(new) == VersionState.READY, 15)
    after, event = ask(pair, alias)
    assert after != before
    assert event["adapter_version"] == new.model
    assert_served_by_both(pair, new.model)
    wait_until(lambda: list(pair.adapters_on_disk().values()) == [len(pair.adapters) + 1] * 2, 15)
    assert ask(pair, old.model)[0] == before

    registry.retire(old, NOON)
    assert pair.post(body(old.model, 1)).status_code == 404
    assert ask(pair, alias)[0] == after
    wait_until(lambda: list(pair.adapters_on_disk().values()) == [len(pair.adapters)] * 2, 15)


def whole_replica(pid: int) -> list[psutil.Process]:
    replica = psutil.Process(pid)
    return [replica, *replica.children(recursive=True)]


def engine_core(pid: int) -> list[psutil.Process]:
    (engine,) = [p for p in whole_replica(pid) if p.name().startswith("VLLM::EngineCor")]
    return [engine]


def kill_one(pair: ReplicaService, victims: Callable[[int], list[psutil.Process]]) -> tuple[str, str]:
    """Kills a replica's processes and checks what becomes of its requests. Returns its id, and the answer."""
    adapter = pair.adapters[0]
    lost = place(pair, adapter)
    expected, _ = ask(pair, adapter.model)
    retried = pair.samples("bespoke_requests_retried_total")[""]
    pair.wait_idle()
    streams = [StreamedRequest(pair, body(adapter.model, 900)) for _ in range(PAIR_SEQUENCES)]
    for stream in streams:
        stream.wait_begun()
    with ThreadPoolExecutor(3) as pool:
        queued = [pool.submit(ask, pair, adapter.model) for _ in range(3)]
        wait_until(lambda: pair.samples("bespoke_requests_in_progress")[""] == len(streams) + len(queued))
        assert {replica for replica, count in pair.samples(RUNNING).items() if count} == {lost}
        for process in victims(pair.running_pids(ENGINE)[lost]):
            process.kill()
        answers = [future.result(60) for future in queued]
    assert {text for text, _ in answers} == {expected}
    assert lost not in {event["replica"] for _, event in answers}
    assert len({event["request_id"] for _, event in answers}) == len(queued)
    assert pair.samples("bespoke_requests_retried_total")[""] == retried + len(queued)
    for stream in streams:
        stream.wait_ended()
        assert stream.error_code == "engine_failed"
        event = pair.event(stream.request_id)
        assert (event["status"], event["replica"]) == ("failed", lost)
        assert stream.tokens <= event["completion_tokens"] < 900
    pair.wait_idle()
    pair.assert_reconciled()
    return lost, expected


def test_when_a_replicas_engine_dies_the_other_answers_and_it_comes_back_with_its_adapters(
    pair: ReplicaService,
) -> None:
    """Invariants 2 and 3 with kill -9 of vLLM's core alone: the replica's process ends itself."""
    lost, expected = kill_one(pair, engine_core)
    wait_until(lambda: len(pair.adapters_on_disk().keys() - {lost}) == 2, 180, 0.5)
    assert list(pair.adapters_on_disk().values()) == [len(pair.adapters)] * 2
    assert_served_by_both(pair, pair.adapters[0].model)
    assert ask(pair, pair.adapters[0].model)[0] == expected
    pair.wait_idle()
    pair.assert_reconciled()


def test_when_all_processes_of_a_replica_die_the_other_answers(pair: ReplicaService) -> None:
    """Last in this file, because it does not wait for the new one.

    `tests/system/faults/test_replica.py` sees a replica come back whose processes were all killed.
    """
    kill_one(pair, whole_replica)
