"""Limits are stored per tenant and key.

They are read together with the key, once per request. `limiter` enforces them across gateways.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import sqlalchemy as sa

from serve.errors import InvalidRequest
from serve.storage.database import Store, UtcDateTime, metadata

MODELS_MAX = 64
MODEL_LENGTH_MAX = 160
# The highest value of each limit: far above real use, and far below what the store's integers hold.
HIGHEST = {
    "requests_per_min": 10_000_000,
    "tokens_per_min": 1_000_000_000_000,
    "concurrent_requests": 1_000_000,
    "context_tokens": 100_000_000,
}

limits_table = sa.Table(
    "limits",
    metadata,
    sa.Column("kind", sa.String(8), primary_key=True),
    sa.Column("subject", sa.String(63), primary_key=True),
    sa.Column("requests_per_min", sa.BigInteger),
    sa.Column("tokens_per_min", sa.BigInteger),
    sa.Column("concurrent_requests", sa.BigInteger),
    sa.Column("context_tokens", sa.BigInteger),
    sa.Column("models", sa.Text),
    sa.Column("updated_at", UtcDateTime, nullable=False),
    sa.CheckConstraint("kind IN ('tenant', 'key')", name="kind_known"),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Holds a subject's limits. None means no limit of its own."""

    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    concurrent_requests: int | None = None
    context_tokens: int | None = None
    models: tuple[str, ...] | None = None
    """Exact names, or prefixes that end in '*', like 'acme/*'."""

    def allows(self, model: str) -> bool:
        """Return whether `models` permits `model`."""
        if self.models is None:
            return True
        return any(
            model.startswith(name[:-1]) if name.endswith("*") else model == name for name in self.models
        )

    def validate(self) -> None:
        """Raises InvalidRequest, naming the field, for a value that cannot be a limit."""
        for field, highest in HIGHEST.items():
            value = getattr(self, field)
            if value is not None and (type(value) is not int or not 1 <= value <= highest):
                raise InvalidRequest(
                    f"'{field}' must be a whole number from 1 to {highest}, or null for no limit.",
                    field,
                    "invalid_value",
                )
        if self.models is not None:
            _validate_models(self.models)


@dataclass(frozen=True, slots=True)
class Subject:
    """Names the tenant or key that limits apply to. Both a request's tenant and its key limit it."""

    kind: Literal["tenant", "key"]
    id: str
    limits: Limits


class LimitStore:
    """Reads and writes the limits of one store, inside the caller's transaction."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def of(self, connection: sa.Connection, kind: Literal["tenant", "key"], subject: str) -> Limits:
        """Return the subject's limits; all None if none were set."""
        c = limits_table.c
        row = connection.execute(sa.select(limits_table).where(c.kind == kind, c.subject == subject)).first()
        if row is None:
            return Limits()
        models = None if row.models is None else tuple(json.loads(row.models))
        return Limits(
            row.requests_per_min, row.tokens_per_min, row.concurrent_requests, row.context_tokens, models
        )

    def set(
        self,
        connection: sa.Connection,
        kind: Literal["tenant", "key"],
        subject: str,
        limits: Limits,
        *,
        at: datetime,
    ) -> None:
        """Replace the subject's limits. Gateways apply them from the next key look-up.

        Raises InvalidRequest, naming the field; then nothing changes.
        """
        limits.validate()
        c = limits_table.c
        values = {field: getattr(limits, field) for field in HIGHEST} | {
            "models": None if limits.models is None else json.dumps(limits.models),
            "updated_at": at,
        }
        changed = connection.execute(
            limits_table.update().where(c.kind == kind, c.subject == subject).values(values)
        )
        if changed.rowcount == 0:
            connection.execute(limits_table.insert().values(kind=kind, subject=subject, **values))


def _validate_models(models: tuple[str, ...]) -> None:
    # An empty list would lock the subject out; revoking its keys does that more clearly.
    if not 1 <= len(models) <= MODELS_MAX:
        raise InvalidRequest(
            f"'models' must have 1 to {MODELS_MAX} entries, or be null for no limit.",
            "models",
            "invalid_value",
        )
    for name in models:
        if not isinstance(name, str) or not 1 <= len(name) <= MODEL_LENGTH_MAX or "*" in name[:-1]:
            raise InvalidRequest(
                f"'models' takes names of 1 to {MODEL_LENGTH_MAX} characters; '*' may end a name, "
                "and then stands for every name that begins so.",
                "models",
                "invalid_value",
            )
