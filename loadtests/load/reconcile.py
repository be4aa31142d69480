"""Do the clients, the bill and the engines tell the same story? Only arithmetic: see `books` for the reading.

A client knows what a complete answer used. Of a request that it left, or that broke, it knows bounds: what it
has seen was generated, and more than it asked for was not. Of a request that was refused it knows that
nothing is billed. So complete answers must be billed exactly, the others within their bounds; and what is
billed must be, in sum, what the engines counted, which says the rest about the requests without an end.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

from loadtests.load.exchange import Exchange, Outcome
from serve.billing.metering.reconciliation import EngineCount, Reconciliation


@dataclass(frozen=True, slots=True)
class Counts:
    """`cached` tokens are part of `prompt`."""

    requests: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


NOTHING = Counts()
TEMPLATE_TOKENS_MAX = 64
# Exit codes.
FAILED, DIFFERS = 1, 3


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a bill must be, at least and at most."""

    least: Counts = NOTHING
    most: Counts = NOTHING

    def __add__(self, other: "Bounds") -> "Bounds":
        return Bounds(self.least + other.least, self.most + other.most)


@dataclass(frozen=True, slots=True)
class Bill:
    """What the ledger says of one request."""

    tenant: str
    model: str
    counts: Counts


@dataclass(frozen=True, slots=True)
class Difference:
    """`who` is a request, a tenant's model or an engine; `seen` is what should have been `billed`."""

    who: str
    what: str
    seen: str
    billed: str


@dataclass(slots=True)
class Verdict:
    """`checks` says what was compared, and how much of it; `notes` what could not be."""

    checks: dict[str, int] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        return bool(self.checks) and not self.differences

    def add(self, check: str, compared: int, differences: list[Difference]) -> None:
        self.checks[check] = compared
        self.differences += differences

    def exit_code(self, *, complete: int, failed: int) -> int:
        """Of a run in which so many requests were answered and so many failed."""
        if not self.agrees:
            return DIFFERS
        return FAILED if failed or not complete else 0


def bounds(exchange: Exchange) -> Bounds:
    """What its client knows of the bill."""
    if exchange.outcome is Outcome.COMPLETE and exchange.tokens is not None:
        t = exchange.tokens
        exact = Counts(1, t.prompt, t.cached, t.completion)
        return Bounds(exact, exact)
    if 400 <= exchange.status < 500:
        return Bounds()
    least = Counts(1, 1, 0, exchange.pieces) if exchange.pieces else NOTHING  # a piece is a token or more
    # A token is a byte or more; beside the prompt there is what the chat template adds.
    prompt_most = exchange.prompt_bytes + TEMPLATE_TOKENS_MAX
    return Bounds(least, Counts(1, prompt_most, prompt_most, exchange.max_tokens))


def by_request(exchanges: Iterable[Exchange], bills: Mapping[str, Bill]) -> list[Difference]:
    """Each request against its bill; then the bills that nobody has asked for.

    A client whose connection broke before an answer began does not know its request's id: as many bills as
    there are such clients may be theirs.
    """
    found, unclaimed, nameless = [], dict(bills), 0
    for exchange in exchanges:
        if exchange.request_id is None:
            nameless += exchange.status == 0
            continue
        bill = unclaimed.pop(exchange.request_id, None)
        who = f"{exchange.request_id} ({exchange.outcome.value}, {exchange.model})"
        if bill and (bill.tenant, bill.model) != (exchange.tenant, exchange.model):
            asked, billed = f"{exchange.tenant} {exchange.model}", f"{bill.tenant} {bill.model}"
            found.append(Difference(who, "who and what", asked, billed))
        found += _outside(who, bounds(exchange), bill.counts if bill else NOTHING)
    if len(unclaimed) > nameless:
        found += [
            Difference(request_id, "completion tokens", "no client asked", str(bill.counts.completion))
            for request_id, bill in unclaimed.items()
        ]
    return found


def by_model(exchanges: Iterable[Exchange], used: Mapping[tuple[str, str], Counts]) -> list[Difference]:
    """The sums of each tenant's model against what the usage API says was used meanwhile."""
    wanted: dict[tuple[str, str], Bounds] = defaultdict(Bounds)
    for exchange in exchanges:
        wanted[exchange.tenant, exchange.model] += bounds(exchange)
    found = []
    for tenant, model in sorted({*wanted, *used}):
        counts = used.get((tenant, model), NOTHING)
        found += _outside(f"{tenant}: {model}", wanted[tenant, model], counts)
    return found


def by_engine(entries: Iterable[Reconciliation]) -> list[Difference]:
    """Each engine process against what the ledger says of it, since both began."""
    found = []
    for entry in entries:
        who, e = f"engine {entry.engine.base} {entry.engine.boot[:8]}", entry.engine
        for what, counted, billed in (
            ("prompt tokens", e.prompt_tokens - e.probe_prompt_tokens, entry.billed_prompt_tokens),
            (
                "completion tokens",
                e.completion_tokens - e.probe_completion_tokens,
                entry.billed_completion_tokens,
            ),
        ):
            if counted != billed:
                found.append(Difference(who, what, str(counted), str(billed)))
    return found


def engines_counted(before: Iterable[EngineCount], after: Iterable[EngineCount]) -> Counts:
    """What the engines that are there after the run counted in it, their checks left out."""
    known = {(one.replica, one.boot): one for one in before}
    total = NOTHING
    for one in after:
        total += _own(one)
        if (old := known.get((one.replica, one.boot))) is not None:
            total -= _own(old)
    return total


def engines_at_least(counted: Counts, used: Counts) -> list[Difference]:
    """Where others use the engines too: they must have counted what we were billed, or more."""
    return [
        Difference("all engines", f"{what} tokens", f"{most} counted", str(billed))
        for what, most, billed in (
            ("prompt", counted.prompt, used.prompt),
            ("completion", counted.completion, used.completion),
        )
        if billed > most
    ]


def _own(one: EngineCount) -> Counts:
    return Counts(
        prompt=one.prompt_tokens - one.probe_prompt_tokens,
        completion=one.completion_tokens - one.probe_completion_tokens,
    )


def _outside(who: str, wanted: Bounds, counts: Counts) -> list[Difference]:
    found = []
    for f in fields(Counts):
        least, billed, most = (getattr(c, f.name) for c in (wanted.least, counts, wanted.most))
        if not least <= billed <= most:
            what = f.name if f.name == "requests" else f"{f.name} tokens"
            seen = str(least) if least == most else f"{least} to {most}"
            found.append(Difference(who, what, seen, str(billed)))
    return found
