"""Chooses the engine replica for a request: one that holds its adapter, as long as loads stay even.

Loading an adapter takes time and a slot that another adapter may need, so requests for one adapter go to the
same replica. Gateways do not talk to one another, and replicas' load reports arrive late. So rendezvous
hashing, which every gateway computes alike, decides for an adapter that no replica is known to hold.
"""

import random
from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol, TypeVar

SLACK_REQUESTS = 4


class Candidate(Protocol):
    """Describes a replica to the router. `load` counts its requests."""

    @property
    def id(self) -> str: ...

    @property
    def load(self) -> int: ...

    @property
    def load_max(self) -> int: ...

    @property
    def adapters(self) -> set[int]: ...


C = TypeVar("C", bound=Candidate)


def choose(adapter: int | None, candidates: Sequence[C], slack: int = SLACK_REQUESTS) -> C | None:
    """The replica for a request; None if all are full.

    For an adapter: its holders first, then the others, each in the order of their rendezvous weights
    (Thaler & Ravishankar 1998, "Using name-based mappings to increase hit rates"). A replica that leaves
    then moves only its own adapters. Replicas more than `slack` requests busier than the least loaded one
    are skipped, so a popular adapter spreads over several replicas (cf. Mirrokni, Thorup & Zadimoghaddam
    2018, "Consistent hashing with bounded loads").

    For the base (`adapter` None): the less loaded of two at random (Mitzenmacher 2001, "The power of two
    choices in randomized load balancing").
    """
    free = [candidate for candidate in candidates if candidate.load < candidate.load_max]
    if not free:
        return None
    if adapter is None:
        return min(random.sample(free, min(2, len(free))), key=lambda candidate: candidate.load)
    bound = min(candidate.load for candidate in free) + slack
    eligible = [candidate for candidate in free if candidate.load <= bound]
    return max(eligible, key=lambda candidate: _affinity(adapter, candidate))


def _affinity(adapter: int, candidate: Candidate) -> tuple[bool, bytes]:
    """Sorts holders above others, then by weight: a hash that is equal in every process, unlike `hash`."""
    weight = blake2b(f"{adapter}/{candidate.id}".encode(), digest_size=8).digest()
    return adapter in candidate.adapters, weight
