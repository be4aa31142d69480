"""Compares what clients saw, what was billed and what engines counted; `billing_check` reads all three.

A client knows the exact usage of a complete answer. It knows bounds for a request that it left or that broke:
the text that arrived was generated, and no more than `max_tokens` were. A refused request must not be billed.
So complete answers must be billed exactly and the others within their bounds. The sum of all bills must be
what the engines counted, which covers the requests whose end no client saw.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

from loadtests.load.request_record import Outcome, RequestRecord
from serve.billing.metering.reconciliation import EngineCount, Reconciliation


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Counts requests and their tokens. `cached` tokens are part of `prompt`."""

    requests: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


NOTHING = TokenCounts()
TEMPLATE_TOKENS_MAX = 64  # that a chat template adds to a prompt
# Exit codes.
FAILED, DIFFERS = 1, 3


@dataclass(frozen=True, slots=True)
class BillBounds:
    """Bounds what a request or a sum of requests may be billed."""

    least: TokenCounts = NOTHING
    most: TokenCounts = NOTHING

    def __add__(self, other: "BillBounds") -> "BillBounds":
        return BillBounds(self.least + other.least, self.most + other.most)


@dataclass(frozen=True, slots=True)
class Bill:
    """Holds what the ledger says of one request."""

    tenant: str
    model: str
    counts: TokenCounts


@dataclass(frozen=True, slots=True)
class BillMismatch:
    """Names what was `billed` otherwise than `expected`. `subject` is a request, a model or an engine."""

    subject: str
    quantity: str
    expected: str
    billed: str


@dataclass(slots=True)
class Verdict:
    """Collects mismatches. `checks` counts what was compared; `notes` says what could not be compared."""

    checks: dict[str, int] = field(default_factory=dict)
    mismatches: list[BillMismatch] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        return bool(self.checks) and not self.mismatches

    def add(self, check: str, compared: int, mismatches: list[BillMismatch]) -> None:
        self.checks[check] = compared
        self.mismatches += mismatches

    def exit_code(self, *, complete: int, failed: int) -> int:
        """Returns the exit code of a run with so many complete and so many failed requests."""
        if not self.agrees:
            return DIFFERS
        return FAILED if failed or not complete else 0


def bill_bounds(record: RequestRecord) -> BillBounds:
    """Returns the bounds that the client knows for the bill of its request."""
    if record.outcome is Outcome.COMPLETE and record.tokens is not None:
        tokens = record.tokens
        exact = TokenCounts(1, tokens.prompt, tokens.cached, tokens.completion)
        return BillBounds(exact, exact)
    if 400 <= record.status < 500:
        return BillBounds()
    least = TokenCounts(1, 1, 0, record.pieces) if record.pieces else NOTHING  # a piece is a token or more
    # A token has at least one byte; the chat template adds tokens to the prompt's.
    prompt_most = record.prompt_bytes + TEMPLATE_TOKENS_MAX
    return BillBounds(least, TokenCounts(1, prompt_most, prompt_most, record.max_tokens))


def by_request(records: Iterable[RequestRecord], bills: Mapping[str, Bill]) -> list[BillMismatch]:
    """Compares each request with its bill, then looks for bills that no client asked for.

    A client whose connection broke before an answer began does not know its request's id. So many bills as
    there are such clients may be theirs.
    """
    mismatches, unclaimed, without_id = [], dict(bills), 0
    for record in records:
        if record.request_id is None:
            without_id += record.status == 0
            continue
        bill = unclaimed.pop(record.request_id, None)
        subject = f"{record.request_id} ({record.outcome.value}, {record.model})"
        if bill and (bill.tenant, bill.model) != (record.tenant, record.model):
            expected, billed = f"{record.tenant} {record.model}", f"{bill.tenant} {bill.model}"
            mismatches.append(BillMismatch(subject, "who and what", expected, billed))
        mismatches += _outside(subject, bill_bounds(record), bill.counts if bill else NOTHING)
    if len(unclaimed) > without_id:
        mismatches += [
            BillMismatch(request_id, "completion tokens", "no client asked", str(bill.counts.completion))
            for request_id, bill in unclaimed.items()
        ]
    return mismatches


def by_model(
    records: Iterable[RequestRecord], used: Mapping[tuple[str, str], TokenCounts]
) -> list[BillMismatch]:
    """Compares the sums of each tenant's model with the usage that the usage API reports for the run."""
    expected: dict[tuple[str, str], BillBounds] = defaultdict(BillBounds)
    for record in records:
        expected[record.tenant, record.model] += bill_bounds(record)
    mismatches = []
    for tenant, model in sorted({*expected, *used}):
        counts = used.get((tenant, model), NOTHING)
        mismatches += _outside(f"{tenant}: {model}", expected[tenant, model], counts)
    return mismatches


def by_engine(entries: Iterable[Reconciliation]) -> list[BillMismatch]:
    """Compares each engine process with the ledger's sums for it, since both began."""
    mismatches = []
    for entry in entries:
        engine, counted = entry.engine, _without_probes(entry.engine)
        subject = f"engine {engine.base} {engine.boot[:8]}"
        for quantity, expected, billed in (
            ("prompt tokens", counted.prompt, entry.billed_prompt_tokens),
            ("completion tokens", counted.completion, entry.billed_completion_tokens),
        ):
            if expected != billed:
                mismatches.append(BillMismatch(subject, quantity, str(expected), str(billed)))
    return mismatches


def engines_counted(before: Iterable[EngineCount], after: Iterable[EngineCount]) -> TokenCounts:
    """Returns what the engines that still run counted during the run, without their own checks."""
    counts_before = {(engine.replica, engine.boot): engine for engine in before}
    total = NOTHING
    for engine in after:
        total += _without_probes(engine)
        if (earlier := counts_before.get((engine.replica, engine.boot))) is not None:
            total -= _without_probes(earlier)
    return total


def engines_at_least(counted: TokenCounts, used: TokenCounts) -> list[BillMismatch]:
    """Compares engines that others use, too: they must have counted what we were billed, or more."""
    return [
        BillMismatch("all engines", f"{quantity} tokens", f"{most} counted", str(billed))
        for quantity, most, billed in (
            ("prompt", counted.prompt, used.prompt),
            ("completion", counted.completion, used.completion),
        )
        if billed > most
    ]


def _without_probes(engine: EngineCount) -> TokenCounts:
    return TokenCounts(
        prompt=engine.prompt_tokens - engine.probe_prompt_tokens,
        completion=engine.completion_tokens - engine.probe_completion_tokens,
    )


def _outside(subject: str, bounds: BillBounds, counts: TokenCounts) -> list[BillMismatch]:
    mismatches = []
    for f in fields(TokenCounts):
        least, billed, most = (getattr(c, f.name) for c in (bounds.least, counts, bounds.most))
        if not least <= billed <= most:
            quantity = f.name if f.name == "requests" else f"{f.name} tokens"
            within = str(least) if least == most else f"{least} to {most}"
            mismatches.append(BillMismatch(subject, quantity, within, str(billed)))
    return mismatches
