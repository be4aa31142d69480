"""Checks the router as a function of plain values."""

import random
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from serve.engine.router import choose

SLACK = 4
ROOM = 16
ADAPTERS = st.integers(1, 2**31)


@dataclass(frozen=True)
class Candidate:
    id: str
    load: int
    load_max: int = ROOM
    adapters: set[int] = field(default_factory=set, hash=False)

    @property
    def full(self) -> bool:
        return self.load >= self.load_max


def candidates(loads: st.SearchStrategy[int], adapter: int = 1) -> st.SearchStrategy[list[Candidate]]:
    """Generates one to six replicas, some of which hold `adapter`."""
    candidate = st.builds(
        Candidate,
        id=st.text("abcdefgh01234567", min_size=8, max_size=8),
        load=loads,
        load_max=st.just(ROOM),
        adapters=st.sampled_from([set(), {adapter}, {adapter + 1}]),
    )
    return st.lists(candidate, min_size=1, max_size=6, unique_by=lambda c: c.id)


ANY_LOAD = st.integers(0, ROOM + 2)
EVEN_LOAD = st.integers(0, SLACK)


def idle(*names: str) -> list[Candidate]:
    return [Candidate(name, 0) for name in names]


def first(adapter: int, replicas: list[Candidate]) -> Candidate:
    replica = choose(adapter, replicas, SLACK)
    assert replica is not None
    return replica


def order(adapter: int, replicas: list[Candidate]) -> list[Candidate]:
    """Returns the replicas in the order in which they are chosen, each once those before it are gone."""
    left, order = list(replicas), []
    while left:
        order.append(first(adapter, left))
        left.remove(order[-1])
    return order


@given(st.none() | st.just(1), candidates(ANY_LOAD))
def test_one_with_room_is_chosen_unless_all_are_full(adapter: int | None, replicas: list[Candidate]) -> None:
    replica = choose(adapter, replicas, SLACK)
    assert (replica is None) == all(c.full for c in replicas)
    assert replica is None or not replica.full


@given(candidates(ANY_LOAD), st.randoms())
def test_all_gateways_agree_on_an_adapter(replicas: list[Candidate], rng: random.Random) -> None:
    shuffled = rng.sample(replicas, len(replicas))
    assert choose(1, shuffled, SLACK) == choose(1, replicas, SLACK)


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
def test_the_choice_is_within_the_slack_of_the_least_loaded(replicas: list[Candidate]) -> None:
    assert first(1, replicas).load <= min(c.load for c in replicas) + SLACK


def test_the_places_of_adapters_are_the_same_in_every_process() -> None:
    replicas = idle("a", "b", "c")
    assert "".join(first(adapter, replicas).id for adapter in range(20)) == "bbbbbababbccbbcaabca"


def test_adapters_are_spread_evenly() -> None:
    replicas = idle("a", "b", "c")
    homes = [first(adapter, replicas).id for adapter in range(3000)]
    assert all(900 < homes.count(c.id) < 1100 for c in replicas)


def test_a_hot_adapter_spreads_to_the_next_in_rendezvous_order() -> None:
    places = [c.id for c in order(1, idle("a", "b", "c"))]
    loads = dict.fromkeys(places, 0)
    for _ in range(3 * ROOM):
        loads[first(1, [Candidate(name, load) for name, load in loads.items()]).id] += 1
        placed = [loads[name] for name in places]
        assert placed == sorted(placed, reverse=True)
        assert placed[0] - placed[-1] <= SLACK + 1 or max(placed) == ROOM
    assert set(loads.values()) == {ROOM}


def test_a_holder_that_is_too_busy_shares_with_another_holder_first() -> None:
    busy = Candidate("a", SLACK + 1, adapters={1})
    other = Candidate("b", SLACK, adapters={1})
    cold = Candidate("c", 0)
    assert choose(1, [busy, cold, other], SLACK) == other
    assert choose(1, [busy, cold], SLACK) == cold


def test_of_two_for_the_base_the_less_loaded_is_chosen() -> None:
    busy, calm = Candidate("a", 3), Candidate("b", 2)
    assert all(choose(None, [busy, calm]) == calm for _ in range(20))


def test_the_base_reaches_every_replica() -> None:
    replicas = idle("a", "b", "c")
    assert {replica.id for _ in range(100) if (replica := choose(None, replicas))} == {"a", "b", "c"}
