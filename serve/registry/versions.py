"""Defines adapter versions: their tables, and the types that the registry returns."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Literal

import sqlalchemy as sa

from serve.storage.database import UtcDateTime, metadata

REASON_CHARS_MAX = 1000


class VersionState(StrEnum):
    """Names the state of a version, which leaves PENDING once, for good."""

    PENDING = "pending"  # its files fit its base; no engine has probed it yet
    READY = "ready"  # an engine saw it change the logits, and the base's come back without it
    REJECTED = "rejected"  # an engine saw that it does not


adapters_table = sa.Table(
    "adapters",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("version", sa.String(16), nullable=False),
    sa.Column("base", sa.String(63), nullable=False),
    sa.Column("registered_at", UtcDateTime, nullable=False),
    sa.Column("state", sa.String(8), nullable=False, server_default=VersionState.PENDING),
    sa.Column("reason", sa.String(REASON_CHARS_MAX)),
    sa.Column("probed_at", UtcDateTime),
    sa.Column("pinned", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("retired_at", UtcDateTime),
    sa.Column("rank", sa.Integer),
    sa.Column("bytes", sa.BigInteger),
    sa.UniqueConstraint("tenant_id", "name", "version"),
    sa.CheckConstraint("state IN ('pending', 'ready', 'rejected')", name="state_known"),
)

promotions_table = sa.Table(
    "promotions",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("adapter_id", sa.ForeignKey("adapters.id"), nullable=False, index=True),
    sa.Column("promoted_at", UtcDateTime, nullable=False),
)

Alias = Literal["now", "next"]


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """Identifies one immutable adapter version. `id` is never used again, so it is unique in every engine."""

    id: int
    tenant: str
    name: str
    version: str

    @property
    def model(self) -> str:
        return f"{self.tenant}/{self.name}@{self.version}"

    def path(self, adapters_dir: Path) -> Path:
        """Returns the directory of its files. The parts were validated when it was registered."""
        return adapters_dir / self.tenant / self.name / self.version


@dataclass(frozen=True, slots=True)
class Model:
    """Holds what a model name means for one tenant at one moment."""

    name: str
    base: str
    adapter: AdapterVersion | None
    created_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class DesiredVersion:
    """Names a version that the engines of its base should have: to probe, to keep loaded, or to serve."""

    ref: AdapterVersion
    state: VersionState
    pinned: bool


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """Holds all that the registry knows of a version.

    `alias` is "now" if the alias means this version, "next" if it will once its probe has passed.
    """

    ref: AdapterVersion
    base: str
    state: VersionState
    reason: str | None
    pinned: bool
    alias: Alias | None
    rank: int | None
    bytes: int | None
    registered_at: datetime
    probed_at: datetime | None
    retired_at: datetime | None
