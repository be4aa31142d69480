"""Compares the ledger with the engines. Drift is what an engine counted and the ledger did not."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from serve.billing.metering.events import EngineTotal


@dataclass(frozen=True, slots=True)
class EngineCount:
    """Holds one engine process's own counters. `probe_*` is its start-up check, which is not billed."""

    base: str
    replica: str
    boot: str
    prompt_tokens: int
    completion_tokens: int
    probe_prompt_tokens: int
    probe_completion_tokens: int


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """Compares one engine process's counters with the ledger's sums for it."""

    engine: EngineCount
    billed_prompt_tokens: int
    billed_completion_tokens: int

    @property
    def prompt_drift(self) -> int:
        e = self.engine
        return e.prompt_tokens - e.probe_prompt_tokens - self.billed_prompt_tokens

    @property
    def completion_drift(self) -> int:
        e = self.engine
        return e.completion_tokens - e.probe_completion_tokens - self.billed_completion_tokens

    @property
    def agrees(self) -> bool:
        return self.prompt_drift == 0 and self.completion_drift == 0


def reconcile(
    engines: Iterable[EngineCount], billed: Mapping[tuple[str, str], EngineTotal]
) -> list[Reconciliation]:
    """Return one entry per live engine process, compared with the ledger's totals for it."""
    entries = []
    for engine in engines:
        total = billed.get((engine.replica, engine.boot))
        prompt, completion = (total.prompt_tokens, total.completion_tokens) if total else (0, 0)
        entries.append(Reconciliation(engine, prompt, completion))
    return entries
