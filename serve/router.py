"""Which engine replica takes a request: the one that holds its adapter, as long as loads stay even.

To load an adapter takes time and a slot that another adapter may need, so requests for one adapter go
together. Gateways do not talk to one another, and what replicas report arrives late; so an adapter
that nobody is known to hold has its place by rendezvous hashing, which every gateway computes alike.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serve.engine.base import GenerationRequest

ADAPTERS_STAT = "adapters"
SLACK_REQUESTS = 4


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a router knows of a replica. `load` counts its ongoing requests; None means unknown."""

    id: str
    load: int | None
    load_max: int
    adapters: frozenset[int] = frozenset()

    @property
    def full(self) -> bool:
        return self.load is not None and self.load >= self.load_max


def rank(adapter: int | None, candidates: Sequence[Candidate], slack: int) -> list[list[Candidate]]:
    """Groups of candidates, best first; within a group the least loaded is meant.

    For an adapter: its holders first, then the others, each in the order of their rendezvous weights
    (Thaler & Ravishankar 1998, "Using name-based mappings to increase hit rates"), so that a replica
    that goes moves only the adapters that were its own. Behind all these come candidates with more than
    `slack` requests above the least loaded, which spreads a hot adapter (cf. Mirrokni, Thorup &
    Zadimoghaddam 2018, "Consistent hashing with bounded loads").

    For the base (`adapter` None): two at random, of which the less loaded is meant (Mitzenmacher 2001,
    "The power of two choices in randomized load balancing"); the caller has shuffled `candidates`.

    Full ones always come last, and are listed because they may have room again.
    """
    if adapter is not None:
        candidates = sorted(candidates, key=lambda c: _affinity(adapter, c), reverse=True)
    free = [c for c in candidates if not c.full]
    groups = [free[:2], free[2:]] if adapter is None else _within_bounds(free, slack)
    groups.append([c for c in candidates if c.full])
    return [group for group in groups if group]


def _affinity(adapter: int, candidate: Candidate) -> tuple[bool, bytes]:
    """Holders above others, then by weight: a hash that is the same in every process, unlike `hash`."""
    weight = blake2b(f"{adapter}/{candidate.id}".encode(), digest_size=8).digest()
    return adapter in candidate.adapters, weight


def _within_bounds(free: list[Candidate], slack: int) -> list[list[Candidate]]:
    bound = min((c.load for c in free if c.load is not None), default=0) + slack
    near = [c for c in free if c.load is None or c.load <= bound]
    far = [c for c in free if c.load is not None and c.load > bound]
    groups = [[c] for c in near]
    if near and (near[0].load or 0) > slack:
        # Perhaps too much, if only the unknown were known: Serve takes the known and asks the others
        # meanwhile, so that the next request is ranked with their loads.
        unknown = [c for c in near if c.load is None]
        groups = [[near[0], *unknown]] + [[c] for c in near[1:] if c.load is not None]
    return [*groups, far]


class AdapterRouter(RequestRouter):  # type: ignore[misc] # ray is untyped here
    """`rank` as Ray Serve's request router of an engine deployment; each handle has one of its own.

    Serve tries the groups in turn and takes from each the least loaded replica with room: by its cache
    of queue lengths, or, where that knows none (after 10 s without news) or shows a full one, by asking.

    None of Serve's mixins: FIFOMixin gives the replica chosen for one request to whichever has waited
    longest, LocalityMixin puts the gateway's node before the adapter, and MultiplexMixin does not
    look at loads. Ray 2.60 pickles this module by value, so it keeps no state of its own.
    """

    # Serve's 0.1 s is soon missed by a busy machine, and to leave a holder costs more than to wait for it.
    queue_len_response_deadline_s = 0.5

    def initialize_state(self, slack_requests: int = SLACK_REQUESTS, reserved: int = 0) -> None:
        """`reserved` of a replica's places are for other calls than requests: aborts and the like."""
        self._slack = slack_requests
        self._reserved = reserved

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One round of routing; Serve calls it again after a pause while no replica has room."""
        if pending_request is not None:
            # Without a mixin nobody else sets it, and Serve would try again without any pause.
            pending_request.routing_context.should_backoff = True
        # One routing task may place a whole burst before any of it is sent, thus counted: let them go first.
        await asyncio.sleep(0)
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        known = [self._candidate(replica) for replica in candidate_replicas]
        random.shuffle(known)
        groups = rank(_adapter_of(pending_request), known, self._slack)
        if self._reserved:  # Serve would find room in a full one: that which is reserved
            groups = [group for group in groups if not group[0].full]
        return [[replicas[candidate.id] for candidate in group] for group in groups]

    def _candidate(self, replica: RunningReplica) -> Candidate:
        """The load is the last total that the replica told, ± what this router sent and saw finished."""
        return Candidate(
            id=replica.replica_id.unique_id,
            # A property of the public class, undocumented; RunningReplica itself tells no queue length.
            load=self.replica_queue_len_cache.get(replica.replica_id),
            load_max=replica.max_ongoing_requests - self._reserved,
            adapters=frozenset(replica.routing_stats.get(ADAPTERS_STAT, ())),
        )


def _adapter_of(pending: PendingRequest | None) -> int | None:
    if pending is None:
        return None
    for argument in (*pending.args, *pending.kwargs.values()):
        if isinstance(argument, GenerationRequest) and argument.adapter is not None:
            return argument.adapter.id
    return None
