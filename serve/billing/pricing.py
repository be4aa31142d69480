"""Price plans: what a token costs.

A plan is a YAML file (`configs/prices/`); loading it makes an immutable version of it in the store,
and each usage event names the version it was priced with. Prices are integers: nano-USD per million
tokens. Rounding happens once, per event, to the nearest nano-USD (half up).
"""

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import sqlalchemy as sa
import yaml
from pydantic import BaseModel, ConfigDict, Field

from serve.audit import SYSTEM, record
from serve.db import Store, UtcDateTime, metadata
from serve.errors import UnknownRecord

plans_table = sa.Table(
    "price_plans",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("document", sa.Text, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.UniqueConstraint("name", "version"),
    sa.UniqueConstraint("name", "sha256"),
)

subscriptions_table = sa.Table(
    "subscriptions",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("plan_id", sa.ForeignKey("price_plans.id"), nullable=False),
    sa.Column("effective_at", UtcDateTime, nullable=False),
    sa.Index("ix_subscriptions_tenant_id_effective_at", "tenant_id", "effective_at"),
)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token counts of one request. `cached` is the part of `prompt` that the prefix cache served."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    @property
    def uncached(self) -> int:
        return self.prompt - self.cached


class Rates(BaseModel):
    """Prices of one kind of model, each in nano-USD per million tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt_nanos_per_mtok: int = Field(ge=0, le=10**15)
    cached_prompt_nanos_per_mtok: int = Field(ge=0, le=10**15)
    completion_nanos_per_mtok: int = Field(ge=0, le=10**15)

    def cost_nanos(self, tokens: Tokens) -> int:
        """The price of `tokens`. The three classes are disjoint: cached ⊂ prompt is taken out first."""
        micro = (
            tokens.uncached * self.prompt_nanos_per_mtok
            + tokens.cached * self.cached_prompt_nanos_per_mtok
            + tokens.completion * self.completion_nanos_per_mtok
        )
        return (micro + 500_000) // 1_000_000

    def cost_nanos_max(self, prompt_tokens_max: int, completion_tokens_max: int) -> int:
        """The most that a request within these bounds can cost, whatever the cache does."""
        dearest = max(self.prompt_nanos_per_mtok, self.cached_prompt_nanos_per_mtok)
        micro = prompt_tokens_max * dearest + completion_tokens_max * self.completion_nanos_per_mtok
        return -(-micro // 1_000_000)


class BatchRates(BaseModel):
    """Prices of what runs as a batch, when there is room for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: Rates
    adapter: Rates


class PricePlan(BaseModel):
    """`batch` may be left out: a batch then costs what a direct request does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern="^[a-z0-9][a-z0-9-]{0,62}$")
    currency: Literal["USD"]
    base: Rates
    adapter: Rates
    batch: BatchRates | None = None

    def rates(self, *, adapter: bool, batch: bool = False) -> Rates:
        prices = self.batch if batch and self.batch is not None else self
        return prices.adapter if adapter else prices.base


@dataclass(frozen=True, slots=True)
class PriceVersion:
    """One immutable version of a plan, as stored."""

    id: int
    version: int
    plan: PricePlan

    def rates(self, *, adapter: bool, batch: bool = False) -> Rates:
        return self.plan.rates(adapter=adapter, batch=batch)

    @property
    def label(self) -> str:
        return f"{self.plan.name} v{self.version}"


def read_plan(path: Path) -> PricePlan:
    """Raises pydantic.ValidationError listing everything that is wrong with the file."""
    return PricePlan.model_validate(yaml.safe_load(path.read_text()))


class Prices:
    """The plans of one store and who subscribes to them. Methods block."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def publish(self, plan: PricePlan, *, at: datetime, actor: str = SYSTEM) -> PriceVersion:
        """Store `plan` as a new version; the same text again is the same version."""
        # Without what is absent: a plan from before batch prices is still the version it was.
        document = json.dumps(plan.model_dump(exclude_none=True), sort_keys=True)
        sha256 = hashlib.sha256(document.encode()).hexdigest()
        by_name = plans_table.c.name == plan.name
        with self._store.write() as connection:
            same = connection.execute(
                sa.select(plans_table).where(by_name, plans_table.c.sha256 == sha256)
            ).first()
            if same is not None:
                return _version(same)
            newest = connection.execute(sa.select(sa.func.max(plans_table.c.version)).where(by_name)).scalar()
            version = (newest or 0) + 1
            row = {"name": plan.name, "version": version, "sha256": sha256, "document": document}
            inserted = connection.execute(plans_table.insert().values(**row, created_at=at))
            assert inserted.inserted_primary_key is not None
            made = PriceVersion(inserted.inserted_primary_key[0], version, plan)
            record(connection, "price.publish", made.label, plan.model_dump(), actor=actor, at=at)
            return made

    def subscribe(self, tenant: str, plan: str, *, at: datetime, actor: str = SYSTEM) -> PriceVersion:
        """Put `tenant` on the newest version of `plan`, from `at` on.

        Raises UnknownRecord for an unknown tenant or plan.
        """
        newest = sa.select(plans_table).where(plans_table.c.name == plan).order_by(sa.desc("version"))
        try:
            with self._store.write() as connection:
                row = connection.execute(newest.limit(1)).first()
                if row is None:
                    raise UnknownRecord(f"There is no price plan '{plan}'.")
                values = {"tenant_id": tenant, "plan_id": row.id, "effective_at": at}
                connection.execute(subscriptions_table.insert().values(values))
                label = _version(row).label
                record(connection, "price.assign", label, actor=actor, tenant=tenant, at=at)
                return _version(row)
        except sa.exc.IntegrityError as error:
            raise UnknownRecord(f"There is no tenant '{tenant}'.") from error

    def at(self, connection: sa.Connection, tenant: str, at: datetime) -> PriceVersion | None:
        """The version in force for `tenant` at the time `at`; None before any subscription."""
        row = connection.execute(
            sa.select(plans_table)
            .join(subscriptions_table, subscriptions_table.c.plan_id == plans_table.c.id)
            .where(subscriptions_table.c.tenant_id == tenant, subscriptions_table.c.effective_at <= at)
            .order_by(subscriptions_table.c.effective_at.desc(), subscriptions_table.c.id.desc())
            .limit(1)
        ).first()
        return None if row is None else _version(row)

    def versions(self) -> list[PriceVersion]:
        with self._store.read() as connection:
            rows = connection.execute(sa.select(plans_table).order_by("name", "version"))
            return [_version(row) for row in rows]


def _version(row: "sa.Row[tuple[object, ...]]") -> PriceVersion:
    return PriceVersion(row.id, row.version, PricePlan.model_validate_json(row.document))
