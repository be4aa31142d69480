"""Checks which requests wait for a slot, for how long, and in which order."""

import asyncio
import itertools
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.engine.adapters.slots import Slots
from tests.support.simulated_loop import SimulatedLoop, simulate

PATIENCE_S, LONGEST_S, TICK_S = 0.5, 2.0, 0.01
HOT = (1, 2)


async def held(slots: Slots, adapter: int, seconds: float) -> float:
    """Holds a slot for `seconds`. Returns how long it took to get it."""
    asked_s = asyncio.get_running_loop().time()
    async with slots.hold(adapter):
        waited_s = asyncio.get_running_loop().time() - asked_s
        await asyncio.sleep(seconds)
    return waited_s


async def customer(slots: Slots, adapter: int, rng: random.Random) -> None:
    while True:
        await held(slots, adapter, rng.uniform(0.1, LONGEST_S))


@given(seed=st.integers(0, 2**16), customers=st.integers(1, 12), cold=st.integers(1, 5))
def test_a_cold_adapter_waits_at_most_the_patience_and_one_adapters_running_requests(
    seed: int, customers: int, cold: int
) -> None:
    """Each `slots` adapters ahead of it in the queue add one longest request."""

    async def scenario() -> list[float]:
        rng, slots = random.Random(seed), Slots(len(HOT), PATIENCE_S)
        async with asyncio.TaskGroup() as group:
            crowd = [
                group.create_task(customer(slots, adapter, rng)) for adapter in HOT for _ in range(customers)
            ]
            await asyncio.sleep(rng.uniform(0, 10))
            waits = await asyncio.gather(*(held(slots, 10 + i, LONGEST_S) for i in range(cold)))
            for task in crowd:
                task.cancel()
        return waits

    for place, waited_s in enumerate(simulate(scenario())):
        assert waited_s <= PATIENCE_S + LONGEST_S * (1 + place // len(HOT)) + TICK_S


def test_hot_adapters_get_their_slots_back_after_the_cold_one() -> None:
    async def scenario() -> tuple[Counter[int], int]:
        rng, slots, done = random.Random(0), Slots(2, PATIENCE_S), Counter[int]()

        async def counted(adapter: int) -> None:
            while True:
                await held(slots, adapter, rng.uniform(0.1, LONGEST_S))
                done[adapter] += 1

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(counted(adapter)) for adapter in (1, 1, 1, 2, 2, 2, 3)]
            await asyncio.sleep(1000)
            for task in tasks:
                task.cancel()
        return done, slots.waits

    done, waits = simulate(scenario())
    assert min(done.values()) > 100
    assert waits > 100


def test_with_a_free_slot_nobody_waits() -> None:
    async def scenario() -> tuple[list[float], int]:
        slots = Slots(3, PATIENCE_S)
        waits = await asyncio.gather(*(held(slots, adapter, 1) for adapter in (1, 2, 3, 1, 2, 3)))
        return waits, slots.waits

    assert simulate(scenario()) == ([0.0] * 6, 0)


def test_who_gives_up_while_waiting_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        slots = Slots(1, PATIENCE_S)
        async with slots.hold(1):
            waiting = asyncio.create_task(held(slots, 2, 1))
            await asyncio.sleep(PATIENCE_S / 2)
            assert slots.waiting == 1
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert slots.waiting == 0
        assert await held(slots, 3, 0) == 0

    simulate(scenario())


def test_who_gives_up_in_the_moment_of_being_let_in_frees_the_slot() -> None:
    async def scenario() -> None:
        slots = Slots(1, PATIENCE_S)
        leave = asyncio.Event()

        async def first() -> None:
            async with slots.hold(1):
                await leave.wait()

        running = asyncio.create_task(first())
        await asyncio.sleep(0)
        waiting = asyncio.create_task(held(slots, 2, 1))
        await asyncio.sleep(0)
        leave.set()
        await running  # its leaving has let the other in, who has not run since
        assert slots.waiting == 0
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await held(slots, 3, 0) == 0

    simulate(scenario())


def test_who_gives_up_in_the_moment_in_which_another_leaves_harms_nobody() -> None:
    async def scenario() -> None:
        slots = Slots(1, PATIENCE_S)
        running = asyncio.create_task(held(slots, 1, 10))
        await asyncio.sleep(0)
        leaver, stayer = (asyncio.create_task(held(slots, adapter, 1)) for adapter in (2, 3))
        await asyncio.sleep(0)
        running.cancel()
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await stayer == 0
        assert await held(slots, 4, 0) == 0

    simulate(scenario())


def test_an_adapter_takes_new_requests_again_when_the_one_it_was_closed_for_gave_up() -> None:
    async def scenario() -> float:
        slots = Slots(1, PATIENCE_S)
        async with slots.hold(1):
            waiting = asyncio.create_task(held(slots, 2, 1))
            await asyncio.sleep(2 * PATIENCE_S)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            return await asyncio.wait_for(held(slots, 1, 0), LONGEST_S)

    assert simulate(scenario()) == 0


class Crowd(RuleBasedStateMachine):
    """Lets requests come, leave and give up in any order, with any pauses."""

    slots_max = 2

    def __init__(self) -> None:
        super().__init__()
        self.loop = SimulatedLoop()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("serve.engine.adapters.slots.monotonic", self.loop.time)
        self.slots = Slots(self.slots_max, PATIENCE_S)
        self.numbers = itertools.count()
        self.waiting: dict[int, tuple[int, asyncio.Task[None]]] = {}  # oldest first
        self.inside: dict[int, tuple[int, asyncio.Task[None]]] = {}
        self.leave: dict[int, asyncio.Event] = {}
        self.entered: list[int] = []

    async def _request(self, number: int, adapter: int) -> None:
        async with self.slots.hold(adapter):
            self.entered.append(number)
            await self.leave[number].wait()

    def _settle(self) -> None:
        running = {adapter for adapter, _ in self.inside.values()}
        self.loop.settle()
        self.inside = {n: kept for n, kept in self.inside.items() if not kept[1].done()}
        admitted, self.entered = self.entered, []
        for number in admitted:
            self.inside[number] = self.waiting.pop(number)
        now_running = {adapter for adapter, _ in self.inside.values()}
        for number in admitted:
            adapter = self.inside[number][0]
            for other, (wanted, _) in self.waiting.items():
                if other < number:
                    assert wanted != adapter, "overtaken in its own adapter's queue"
                    assert adapter in running or wanted in now_running, "overtaken in the queue for a slot"
            running.add(adapter)  # whoever waits for the same adapter enters with it

    @rule(adapter=st.integers(1, 4))
    def come(self, adapter: int) -> None:
        number = next(self.numbers)
        self.leave[number] = asyncio.Event()
        self.waiting[number] = (adapter, self.loop.create_task(self._request(number, adapter)))
        self._settle()

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.leave[data.draw(st.sampled_from(sorted(self.inside)))].set()
        self._settle()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        self._cancel(data.draw(st.sampled_from(sorted(self.waiting))))

    @precondition(lambda self: self.waiting and self.inside)
    @rule(data=st.data())
    def end_and_give_up_in_one_moment(self, data: st.DataObject) -> None:
        self.leave[data.draw(st.sampled_from(sorted(self.inside)))].set()
        self._cancel(data.draw(st.sampled_from(sorted(self.waiting))))

    def _cancel(self, number: int) -> None:
        _, task = self.waiting.pop(number)
        task.cancel()
        self._settle()
        assert task.cancelled()

    @rule(seconds=st.sampled_from([PATIENCE_S / 3, PATIENCE_S, 10.0]))
    def pass_time(self, seconds: float) -> None:
        self.loop.pass_time(seconds)
        self._settle()

    @invariant()
    def no_more_adapters_run_than_there_are_slots(self) -> None:
        assert len({adapter for adapter, _ in self.inside.values()}) <= self.slots_max

    @invariant()
    def nobody_waits_while_a_slot_is_free(self) -> None:
        if len({adapter for adapter, _ in self.inside.values()}) < self.slots_max:
            assert not self.waiting

    @invariant()
    def the_line_is_as_long_as_it_says(self) -> None:
        assert self.slots.waiting == len(self.waiting)

    def teardown(self) -> None:
        for event in self.leave.values():
            event.set()
        for _ in range(len(self.leave) + 1):
            self._settle()
        assert not self.waiting, "somebody waits though all have left"
        assert not self.inside
        self.loop.close()
        self.patch.undo()


TestCrowd = Crowd.TestCase
