"""Price plans define what a token costs; their versions are stored and assigned to tenants.

A plan is a YAML file (`configs/prices/`, docs/invoices.md). Loading it stores an immutable version, and each
usage event names the version it was priced with. Prices are integers: nanos of the plan's currency per
million tokens. An event is priced at the list price, the highest of its token class, and rounded once to the
nearest nano (half up). Prices that depend on the month's sums are rated on its invoice (`rating`).
"""

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import sqlalchemy as sa
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    Tag,
    ValidationInfo,
)
from pydantic_core import CoreSchema

from serve.billing.money import DEFAULT_CURRENCY, check_currency
from serve.billing.pricing.tables import plans_table, subscriptions_table
from serve.billing.pricing.tiers import Nanos, TokenPrice, list_price
from serve.errors import Conflict, UnknownRecord
from serve.storage import revision
from serve.storage.database import Store
from serve.tenants.audit import SYSTEM, record

MODELS_MAX = 200
PLAN_BYTES_MAX = 1 << 20
STORED = "stored"  # the context of validating a plan that was published before
Proration = Literal["day", "none"]
TiersOver = Literal["model", "kind", "all"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Counts the tokens of one request. `cached` is the part of `prompt` that the prefix cache served."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    @property
    def uncached(self) -> int:
        return self.prompt - self.cached


class Rates(BaseModel):
    """Sets flat prices of one kind of model, each in nanos of the plan's currency per million tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt_nanos_per_mtok: int = Field(ge=0, le=10**15)
    cached_prompt_nanos_per_mtok: int = Field(ge=0, le=10**15)
    completion_nanos_per_mtok: int = Field(ge=0, le=10**15)
    cold_load_nanos: int = Field(0, ge=0, le=10**12)  # when the request finds its adapter not in memory

    def cost_nanos(self, tokens: Tokens, *, cold_loads: int = 0) -> int:
        """Return the price of `tokens`. Cached tokens are first subtracted from the prompt's."""
        micro = (
            tokens.uncached * self.prompt_nanos_per_mtok
            + tokens.cached * self.cached_prompt_nanos_per_mtok
            + tokens.completion * self.completion_nanos_per_mtok
        )
        return (micro + 500_000) // 1_000_000 + cold_loads * self.cold_load_nanos

    def cost_nanos_max(self, prompt_tokens_max: int, completion_tokens_max: int) -> int:
        """Return the most that a request within these bounds can cost, whatever the cache serves."""
        dearest = max(self.prompt_nanos_per_mtok, self.cached_prompt_nanos_per_mtok)
        micro = prompt_tokens_max * dearest + completion_tokens_max * self.completion_nanos_per_mtok
        return -(-micro // 1_000_000) + self.cold_load_nanos


class TieredRates(BaseModel):
    """Sets prices like `Rates`, but a token class's price may depend on its sum in the month."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_nanos_per_mtok: TokenPrice
    cached_prompt_nanos_per_mtok: TokenPrice
    completion_nanos_per_mtok: TokenPrice
    cold_load_nanos: Annotated[int, Field(strict=True, ge=0, le=10**12)] = 0

    @property
    def at_list(self) -> Rates:
        return Rates(
            prompt_nanos_per_mtok=list_price(self.prompt_nanos_per_mtok),
            cached_prompt_nanos_per_mtok=list_price(self.cached_prompt_nanos_per_mtok),
            completion_nanos_per_mtok=list_price(self.completion_nanos_per_mtok),
            cold_load_nanos=self.cold_load_nanos,
        )


def _rates_form(value: Any) -> str:
    if isinstance(value, dict):
        tiered = any(isinstance(price, dict | BaseModel) for price in value.values())
        return "tiered" if tiered else "flat"
    return "tiered" if isinstance(value, TieredRates) else "flat"


class _AnyOf:
    """Turns `oneOf` into `anyOf` in the JSON Schema, because flat rates match both forms."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        json_schema = handler(schema)
        json_schema["anyOf"] = json_schema.pop("oneOf")
        return json_schema


AnyRates = Annotated[
    Annotated[Rates, Tag("flat")] | Annotated[TieredRates, Tag("tiered")],
    Discriminator(_rates_form),
    _AnyOf(),
]


class BatchRates(BaseModel):
    """Sets prices of batch requests, which run when there is spare capacity."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: AnyRates
    adapter: AnyRates


class ModelRates(BaseModel):
    """Sets prices of models by name. Without `batch`, a batch costs what a direct request does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    direct: AnyRates
    batch: AnyRates | None = None


class Included(BaseModel):
    """Counts tokens of a month that the plan's minimum, or the contract, has paid for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_tokens: Nanos = 0
    cached_prompt_tokens: Nanos = 0
    completion_tokens: Nanos = 0


def _percent(text: str) -> str:
    if Decimal(text) > 100:
        raise ValueError("a tax is at most 100 percent")
    return text


def _currency(code: str, info: ValidationInfo) -> str:
    """Refuse unknown currencies, but read the stored plans of those that have been withdrawn since."""
    return code if info.context == STORED else check_currency(code)


def _day(value: Any) -> date:
    """Parse a day from text or from YAML's date. A number is not a day."""
    if isinstance(value, str):
        return date.fromisoformat(value)
    if isinstance(value, date) and not isinstance(value, datetime):
        return value
    raise ValueError("write a day as 2026-12-01")


class Tax(BaseModel):
    """Sets a tax. `percent` is a decimal with at most four places, as text: "19", "8.875"."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=40)]
    percent: Annotated[
        str, StringConstraints(pattern=r"^[0-9]{1,3}(\.[0-9]{1,4})?$"), AfterValidator(_percent)
    ]

    def nanos(self, taxable_nanos: int) -> int:
        """Return the tax, rounded half up to the nano. `taxable_nanos` is not negative."""
        millionths = int(Decimal(self.percent) * 10_000)
        return (taxable_nanos * millionths + 500_000) // 1_000_000


ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._@/-]*\*?$", min_length=1, max_length=160)]


class PricePlan(BaseModel):
    """Defines a price plan. Every optional field defaults to "no effect".

    Plans published before a field existed therefore keep their meaning. Without `batch`, a batch costs what
    a direct request does. `models` are prices by name or by prefix (`acme/*`); the longest match wins, over
    all other prices. The plan cannot be assigned before `effective_from` (UTC). The tax is that of the
    version in force at the month's end. `proration` says whether minimum and included tokens are, too
    (`proration`), `tiers_over` which tokens of a month share the steps of a price (`counting`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern="^[a-z0-9][a-z0-9-]{0,62}$")
    currency: Annotated[str, AfterValidator(_currency)] = Field(DEFAULT_CURRENCY, pattern="^[A-Z]{3}$")
    base: AnyRates
    adapter: AnyRates
    batch: BatchRates | None = None
    models: dict[ModelName, ModelRates] = Field(default_factory=dict, max_length=MODELS_MAX)
    effective_from: Annotated[date, BeforeValidator(_day)] | None = None
    training_nanos_per_mtok: Nanos = 0
    adapter_hour_nanos: Nanos = 0
    minimum_nanos: Nanos = 0
    included: Included = Included()
    proration: Proration = "none"
    tiers_over: TiersOver = "model"
    tax: Tax | None = None

    def month_rates(self, *, model: str = "", adapter: bool, batch: bool = False) -> Rates | TieredRates:
        """Return the rates that apply to the month's sums."""
        if (own := self._model_rates(model)) is not None:
            return own.batch if batch and own.batch is not None else own.direct
        prices = self.batch if batch and self.batch is not None else self
        return prices.adapter if adapter else prices.base

    def rates(self, *, model: str = "", adapter: bool, batch: bool = False) -> Rates:
        """Return the list rates of a request. Apart from packages, the month's rating never exceeds them."""
        month_rates = self.month_rates(model=model, adapter=adapter, batch=batch)
        return month_rates.at_list if isinstance(month_rates, TieredRates) else month_rates

    def _model_rates(self, model: str) -> ModelRates | None:
        if model in self.models:
            return self.models[model]
        matching = [name for name in self.models if name.endswith("*") and model.startswith(name[:-1])]
        return self.models[max(matching, key=len)] if matching and model else None

    def document(self) -> str:
        """Return the canonical text. Defaults are left out, so a new optional field does not change it."""
        fields = self.model_dump(mode="json", exclude_defaults=True) | {"currency": self.currency}
        return json.dumps(fields, sort_keys=True)


@dataclass(frozen=True, slots=True)
class PriceVersion:
    """Holds one immutable version of a plan, as stored."""

    id: int
    version: int
    plan: PricePlan

    def rates(self, *, model: str = "", adapter: bool, batch: bool = False) -> Rates:
        return self.plan.rates(model=model, adapter=adapter, batch=batch)

    @property
    def label(self) -> str:
        return f"{self.plan.name} v{self.version}"


def read_plan(path: Path) -> PricePlan:
    """Read a plan's file. Raises pydantic.ValidationError that lists all its errors, or ValueError."""
    if path.stat().st_size > PLAN_BYTES_MAX:
        raise ValueError(f"larger than {PLAN_BYTES_MAX} bytes")
    return PricePlan.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


class Prices:
    """Manages the plans of one store and the tenants' subscriptions. Methods block."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def publish(self, plan: PricePlan, *, at: datetime, actor: str = SYSTEM) -> PriceVersion:
        """Store `plan` as a new version. Publishing the same text again returns the same version."""
        document = plan.document()
        sha256 = hashlib.sha256(document.encode()).hexdigest()
        by_name = plans_table.c.name == plan.name
        with self._store.write() as connection:
            existing = connection.execute(
                sa.select(plans_table).where(by_name, plans_table.c.sha256 == sha256)
            ).first()
            if existing is not None:
                return _version(existing)
            newest = connection.execute(sa.select(sa.func.max(plans_table.c.version)).where(by_name)).scalar()
            version = (newest or 0) + 1
            row = {"name": plan.name, "version": version, "sha256": sha256, "document": document}
            inserted = connection.execute(plans_table.insert().values(**row, created_at=at))
            assert inserted.inserted_primary_key is not None
            price_version = PriceVersion(inserted.inserted_primary_key[0], version, plan)
            record(connection, "price.publish", price_version.label, json.loads(document), actor=actor, at=at)
            return price_version

    def subscribe(self, tenant: str, plan: str, *, at: datetime, actor: str = SYSTEM) -> PriceVersion:
        """Subscribe `tenant` from `at` to the plan's newest version that is effective by then.

        Raises UnknownRecord for an unknown tenant or plan. Raises Conflict if no version is effective, or if
        the tenant is already billed in another currency.
        """
        newest = sa.select(plans_table).where(plans_table.c.name == plan).order_by(sa.desc("version"))
        try:
            with self._store.write() as connection:
                versions = [_version(row) for row in connection.execute(newest)]
                if not versions:
                    raise UnknownRecord(f"There is no price plan '{plan}'.")
                version_due = next((version for version in versions if _begins(version) <= at), None)
                if version_due is None:
                    first = min(map(_begins, versions))
                    raise Conflict(f"Nobody pays '{plan}' before {first:%Y-%m-%d}.")
                self._require_currency(connection, tenant, version_due)
                values = {"tenant_id": tenant, "plan_id": version_due.id, "effective_at": at}
                connection.execute(subscriptions_table.insert().values(values))
                revision.count_change(connection)
                audit_details = {"effective_at": at}
                record(
                    connection, "price.assign", version_due.label, audit_details, actor=actor, tenant=tenant
                )
                return version_due
        except sa.exc.IntegrityError as error:
            raise UnknownRecord(f"There is no tenant '{tenant}'.") from error

    def end(self, tenant: str, *, at: datetime, actor: str = SYSTEM) -> PriceVersion:
        """End the tenant's subscription at `at`: it has no plan, and may not buy, until it gets one again.

        Returns the version that ends. Raises UnknownRecord if none is in force then.
        """
        with self._store.write() as connection:
            if (version := self.at(connection, tenant, at)) is None:
                raise UnknownRecord(f"There is no plan that '{tenant[:100]}' pays then.")
            connection.execute(subscriptions_table.insert().values(tenant_id=tenant, effective_at=at))
            revision.count_change(connection)
            audit_details = {"effective_at": at}
            record(connection, "price.end", version.label, audit_details, actor=actor, tenant=tenant)
            return version

    def _require_currency(self, connection: sa.Connection, tenant: str, version: PriceVersion) -> None:
        """Raise Conflict if the tenant is billed in another currency: an account has one currency."""
        query = sa.select(plans_table).join(
            subscriptions_table, subscriptions_table.c.plan_id == plans_table.c.id
        )
        for row in connection.execute(query.where(subscriptions_table.c.tenant_id == tenant).distinct()):
            if (currency := _version(row).plan.currency) != version.plan.currency:
                raise Conflict(f"'{tenant}' is billed in {currency}, not in {version.plan.currency}.")

    def at(self, connection: sa.Connection, tenant: str, at: datetime) -> PriceVersion | None:
        """Return the version in force for `tenant` at `at`; None before a subscription and after its end."""
        row = connection.execute(
            sa.select(plans_table)
            .select_from(subscriptions_table)
            .outerjoin(plans_table, subscriptions_table.c.plan_id == plans_table.c.id)
            .where(subscriptions_table.c.tenant_id == tenant, subscriptions_table.c.effective_at <= at)
            .order_by(subscriptions_table.c.effective_at.desc(), subscriptions_table.c.id.desc())
            .limit(1)
        ).first()
        return None if row is None or row.id is None else _version(row)

    def next_change(self, connection: sa.Connection, tenant: str, at: datetime) -> datetime | None:
        """Return when the version in force at `at` is replaced, if that is already scheduled."""
        c = subscriptions_table.c
        query = sa.select(sa.func.min(c.effective_at)).where(c.tenant_id == tenant, c.effective_at > at)
        return connection.execute(query).scalar()

    def by_id(self, connection: sa.Connection) -> dict[int, PriceVersion]:
        return {row.id: _version(row) for row in connection.execute(sa.select(plans_table))}

    def versions(self) -> list[PriceVersion]:
        with self._store.read() as connection:
            rows = connection.execute(sa.select(plans_table).order_by("name", "version"))
            return [_version(row) for row in rows]


def _begins(version: PriceVersion) -> datetime:
    return datetime.combine(version.plan.effective_from or date.min, time.min, UTC)


def _version(row: "sa.Row[tuple[object, ...]]") -> PriceVersion:
    return PriceVersion(row.id, row.version, _plan(str(row.document)))


@lru_cache(maxsize=1024)
def _plan(document: str) -> PricePlan:
    """Parse a plan. Cached, because every request needs its plan and a version never changes."""
    return PricePlan.model_validate_json(document, context=STORED)
