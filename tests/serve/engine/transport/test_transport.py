"""Connects gateways and replicas over real sockets. The engines behind them only say their names."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from serve.engine.client import RemoteEngine
from serve.engine.protocol import (
    Accepted,
    Delta,
    Event,
    Finished,
    GenerationRequest,
    Sampling,
    Take,
    Texts,
)
from serve.engine.transport.frames import Address, Hello
from serve.engine.transport.gateway_side import ReplicaListener
from serve.engine.transport.replica_side import ReplicaServer
from serve.errors import (
    BespokeError,
    ContextLengthExceeded,
    EngineFailed,
    EngineLost,
    EngineUnavailable,
    Overloaded,
)
from serve.registry.versions import AdapterVersion

BASE = "tiny"
T = TypeVar("T")


class Engine:
    """Answers with its replica's name, one token. The prompt "stay" runs until it is aborted or cancelled."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.loaded_adapters: list[int] = []
        self.running = 0
        self.cancelled = 0
        self.aborted: dict[str, asyncio.Event] = {}

    async def generate(self, request: GenerationRequest, take: Take) -> None:
        assert isinstance(request.prompt, Texts)
        (what,) = request.prompt.prompts
        self.running += 1
        aborted = self.aborted[request.request_id] = asyncio.Event()
        try:
            if what == "too long":
                raise ContextLengthExceeded(10, 9, 2, "messages")
            if what == "a bug":
                raise RuntimeError("a bug")
            take([Accepted(self.name, "boot", 1)])
            take([Delta(0, self.name, 1)])
            if what == "broken":
                raise EngineFailed()
            if what == "half a character":
                take([Delta(0, "\ud83d", 1)])
            if what == "stay":
                await aborted.wait()
            take([Finished(1, 0, 1, aborted=aborted.is_set())])
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def abort(self, request_id: str) -> None:
        self.aborted[request_id].set()


class Handle:
    """Stands in for Ray Serve's handle: calls the same method of every replica."""

    def __init__(self, replicas: list[ReplicaServer]) -> None:
        self.replicas = replicas

    def broadcast(self, method: str, *args: Any) -> Any:
        class Response:
            async def results_async(_self, **_options: Any) -> list[Any]:
                calls = (getattr(replica_server, method)(*args) for replica_server in self.replicas)
                return list(await asyncio.gather(*calls, return_exceptions=True))

        return Response()


class World:
    """Runs replicas a, b, … and one gateway that is connected to them."""

    def __init__(
        self, names: str = "a", *, load_max: int = 8, queued_max: int = 8, wait_s: float = 10
    ) -> None:
        self.engines = {name: Engine(name) for name in names}
        self.replicas = {
            name: ReplicaServer(engine, Hello(BASE, name, load_max)) for name, engine in self.engines.items()
        }
        self.handle = Handle(list(self.replicas.values()))
        self._queued_max = queued_max
        self._wait_s = wait_s
        self._numbers = iter(range(10_000))

    def gateway(self) -> RemoteEngine:
        self.listener = ReplicaListener("127.0.0.1")
        return RemoteEngine(
            BASE,
            self.handle,
            self.listener,
            context_tokens_max=100,
            queued_max=self._queued_max,
            accept_timeout_s=self._wait_s,
            classify=lambda _error: None,
        )

    async def __aenter__(self) -> "World":
        self.remote = self.gateway()
        self._following = asyncio.create_task(self.remote.discover())
        await until(lambda: len(self.remote._replicas) == len(self.replicas))
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._following.cancel()
        for replica_server in self.replicas.values():
            die(replica_server)

    async def ask(
        self, prompt: str = "", adapter: int | None = None, taken: list[list[Event]] | None = None
    ) -> str:
        """Which replica answered."""
        taken = [] if taken is None else taken
        await self.remote.generate(self.request(prompt, adapter), taken.append)
        return "".join(event.text for batch in taken for event in batch if isinstance(event, Delta))

    def request(self, prompt: str = "", adapter: int | None = None) -> GenerationRequest:
        ref = None if adapter is None else AdapterVersion(adapter, "acme", "support", "0" * 16)
        return GenerationRequest(f"req_{next(self._numbers)}", ref, Texts((prompt,)), Sampling(), "acme")

    @property
    def running(self) -> int:
        return sum(engine.running for engine in self.engines.values())


def die(replica_server: ReplicaServer) -> None:
    """Ends a replica's connections, as the kernel does when its process is gone."""
    for connection in replica_server._connections.values():
        connection._transport.abort()


async def until(true: Callable[[], bool], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not true():
            await asyncio.sleep(0.005)


def run(scenario: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(scenario, 30))


def test_what_a_replica_says_arrives_as_it_was_said() -> None:
    async def scenario() -> list[list[Event]]:
        async with World() as world:
            taken: list[list[Event]] = []
            await world.ask(taken=taken)
            return taken

    events = [event for batch in run(scenario()) for event in batch]
    assert events == [Accepted("a", "boot", 1), Delta(0, "a", 1), Finished(1, 0, 1, aborted=False)]


@pytest.mark.parametrize(
    ("prompt", "error"),
    [("too long", ContextLengthExceeded), ("a bug", EngineFailed), ("broken", EngineFailed)],
)
def test_a_failure_arrives_as_its_own_type(prompt: str, error: type[BespokeError]) -> None:
    async def scenario() -> None:
        async with World() as world:
            with pytest.raises(error):
                await world.ask(prompt)
            assert await world.ask() == "a"

    run(scenario())


def test_events_that_cannot_be_written_end_their_request_and_no_other() -> None:
    async def scenario() -> None:
        async with World() as world:
            asked = (world.ask("half a character"), world.ask(), world.ask())
            failed, *others = await asyncio.gather(*asked, return_exceptions=True)
            assert isinstance(failed, EngineFailed)
            assert others == ["a", "a"]
            await until(lambda: not world.running)

    run(scenario())


def test_a_replica_that_dies_ends_its_requests_and_no_other() -> None:
    async def scenario() -> None:
        async with World("ab", load_max=1) as world:
            taken: dict[str, list[list[Event]]] = {"a": [], "b": []}
            tasks = [asyncio.create_task(world.ask("stay", taken=one)) for one in taken.values()]
            await until(lambda: world.running == 2)
            die(world.replicas["a"])
            done, (left,) = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            with pytest.raises(EngineLost):
                done.pop().result()
            await until(lambda: world.engines["a"].cancelled == 1)  # nobody bills what it would go on to do
            await world.remote.abort("req_0")
            await world.remote.abort("req_1")
            assert await left == "b"

    run(scenario())


def test_a_gateway_that_dies_takes_its_requests_along_and_no_others() -> None:
    async def scenario() -> None:
        async with World() as world:
            other = world.gateway()
            following = asyncio.create_task(other.discover())
            mine = asyncio.create_task(world.ask("stay"))
            await until(lambda: bool(other._replicas))
            theirs = asyncio.create_task(other.generate(world.request("stay"), lambda _batch: None))
            await until(lambda: world.running == 2)
            following.cancel()
            other._replicas[0]._transport.abort()
            await until(lambda: world.running == 1)
            assert not mine.done()
            with pytest.raises(EngineLost):
                await theirs
            await world.remote.abort("req_0")
            assert await mine == "a"

    run(scenario())


def test_an_aborted_request_ends_with_its_counts() -> None:
    async def scenario() -> None:
        async with World() as world:
            taken: list[list[Event]] = []
            asking = asyncio.create_task(world.ask("stay", taken=taken))
            await until(lambda: len(taken) >= 1 and world.running == 1)
            await world.remote.abort("req_0")
            await asking
            assert taken[-1][-1] == Finished(1, 0, 1, aborted=True)

    run(scenario())


def test_a_request_that_nobody_waits_for_is_cancelled() -> None:
    async def scenario() -> None:
        async with World() as world:
            asking = asyncio.create_task(world.ask("stay"))
            await until(lambda: world.running == 1)
            asking.cancel()
            await until(lambda: world.running == 0)
            assert world.engines["a"].cancelled == 1

    run(scenario())


def test_while_all_are_full_requests_wait_in_line_and_then_are_refused() -> None:
    async def scenario() -> None:
        async with World("ab", load_max=1, queued_max=2) as world:
            staying = [asyncio.create_task(world.ask("stay")) for _ in range(2)]
            await until(lambda: world.running == 2)
            waiting = [asyncio.create_task(world.ask(adapter=7)) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded):
                await world.ask()
            await world.remote.abort("req_0")
            await world.remote.abort("req_1")
            assert sorted(await asyncio.gather(*staying)) == ["a", "b"]
            assert {*await asyncio.gather(*waiting)} <= {"a", "b"}

    run(scenario())


def test_a_place_in_line_that_is_given_up_is_nobodys() -> None:
    async def scenario() -> None:
        async with World(load_max=1) as world:
            staying = asyncio.create_task(world.ask("stay"))
            await until(lambda: world.running == 1)
            leaving, waiting = (asyncio.create_task(world.ask()) for _ in range(2))
            await asyncio.sleep(0)
            leaving.cancel()
            await world.remote.abort("req_0")
            assert await staying == await waiting == "a"

    run(scenario())


def test_a_request_that_is_not_accepted_in_time_is_unavailable() -> None:
    async def scenario() -> None:
        async with World(load_max=1, wait_s=0.2) as world:
            staying = asyncio.create_task(world.ask("stay"))
            await until(lambda: world.running == 1)
            with pytest.raises(EngineUnavailable):
                await world.ask()
            staying.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await staying

    run(scenario())


def test_without_a_replica_a_request_is_refused_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.engine.client.REPLICA_WAIT_S", 0.1)

    async def scenario() -> None:
        async with World("") as world:
            with pytest.raises(EngineUnavailable):
                await world.ask()

    run(scenario())


def test_a_replica_that_comes_back_is_met_when_it_is_missed() -> None:
    async def scenario() -> None:
        async with World() as world:
            die(world.replicas["a"])
            await until(lambda: not world.remote._replicas)
            assert await world.ask() == "a"

    run(scenario())


def test_one_adapter_keeps_to_one_replica_and_follows_who_holds_it() -> None:
    async def scenario() -> None:
        async with World("abc") as world:
            (home,) = {await world.ask(adapter=7) for _ in range(5)}
            holder = next(name for name in "abc" if name != home)
            world.engines[home].loaded_adapters, world.engines[holder].loaded_adapters = [], [7]
            async with asyncio.timeout(10):
                while await world.ask(adapter=7) != holder:
                    await asyncio.sleep(0.05)

    run(scenario())


def test_a_draining_replica_finishes_its_requests_and_gets_no_more() -> None:
    async def scenario() -> None:
        async with World("ab") as world:
            staying = [asyncio.create_task(world.ask("stay", adapter=n)) for n in range(6)]
            await until(lambda: world.running == 6)
            draining = asyncio.create_task(world.replicas["a"].drain(10))
            await until(lambda: any(replica.draining for replica in world.remote._replicas))
            assert {await world.ask(adapter=n) for n in range(10)} == {"b"}
            assert not draining.done()
            for number in range(6):
                await world.remote.abort(f"req_{number}")
            await asyncio.gather(*staying)
            await draining

    run(scenario())


def test_other_gateways_requests_count_as_load() -> None:
    async def scenario() -> None:
        async with World("ab") as world:
            other = world.gateway()
            following = asyncio.create_task(other.discover())
            await until(lambda: len(other._replicas) == 2)
            tasks = [asyncio.create_task(world.ask("stay", adapter=7)) for _ in range(6)]
            await until(lambda: world.running == 6)
            await until(lambda: sum(replica.load for replica in other._replicas) == 6)
            for task in (*tasks, following):
                task.cancel()

    run(scenario())


@pytest.mark.parametrize("first", [b"x" * 32, b"x" * 7, b"\xff" * 100])
def test_who_does_not_bear_the_token_is_not_listened_to(
    first: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.engine.transport.gateway_side._TOKEN_TIMEOUT_S", 0.2)

    async def scenario() -> None:
        async with World() as world:
            address: Address = await world.listener.address()
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(first)
            assert await reader.read() == b""
            writer.close()
            assert len(world.remote._replicas) == 1
            assert await world.ask() == "a"

    run(scenario())


@pytest.mark.parametrize("rubbish", [b"\x00\x00\x00\x03abc", b"\xff\xff\xff\xff"])
def test_a_replica_that_sends_rubbish_is_hung_up_on(rubbish: bytes) -> None:
    async def scenario() -> None:
        async with World() as world:
            (connection,) = world.replicas["a"]._connections.values()
            asking = asyncio.create_task(world.ask("stay"))
            await until(lambda: world.running == 1)
            connection._transport.write(rubbish)
            with pytest.raises(EngineLost):
                await asking
            assert await world.ask() == "a"

    run(scenario())
