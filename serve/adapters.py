"""The catalogue: which models there are, whose they are, and which version a name means now.

    smollm2-135m            a base, open to every tenant
    acme/support            an alias of tenant acme: its promoted version
    acme/support@3f9c1a…    an immutable version, named by its content

An adapter enters the catalogue only with a card that agrees with its bytes and whose gate passed.
"""

import contextlib
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import sqlalchemy as sa

from finetune.card import AdapterCard, validate_name, verify
from finetune.errors import FinetuneError
from serve.db import Store, UtcDateTime, metadata
from serve.errors import CatalogueError, ModelNotFound, UnknownRecord

VERSION_PATTERN = re.compile(r"^[0-9a-f]{16}$")

adapters_table = sa.Table(
    "adapters",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("version", sa.String(16), nullable=False),
    sa.Column("base", sa.String(63), nullable=False),
    sa.Column("registered_at", UtcDateTime, nullable=False),
    sa.UniqueConstraint("tenant_id", "name", "version"),
)

promotions_table = sa.Table(
    "promotions",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("adapter_id", sa.ForeignKey("adapters.id"), nullable=False, index=True),
    sa.Column("promoted_at", UtcDateTime, nullable=False),
)


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One immutable adapter version; `id` is unique in the catalogue for ever, so in every engine."""

    id: int
    tenant: str
    name: str
    version: str

    @property
    def model(self) -> str:
        return f"{self.tenant}/{self.name}@{self.version}"

    def path(self, adapters_dir: Path) -> Path:
        """Where its files lie. The parts were validated when it was registered."""
        return adapters_dir / self.tenant / self.name / self.version


@dataclass(frozen=True, slots=True)
class Model:
    """What a model name means for one tenant at one moment."""

    name: str
    base: str
    adapter: AdapterRef | None
    created_at: datetime | None = None


class Catalogue:
    """The adapters of one store. Methods block."""

    def __init__(self, store: Store, bases: list[str]) -> None:
        self._store = store
        self._bases = bases

    def register(self, directory: Path, *, at: datetime) -> AdapterRef:
        """Enter the published adapter in `directory` (`…/<tenant>/<name>/<version>`). Idempotent.

        Raises CatalogueError if the card and the bytes disagree, the place contradicts the card or
        its gate did not pass; UnknownRecord for an unknown tenant.
        """
        card = _verified(directory)
        row = {"tenant_id": card.tenant, "name": card.adapter, "version": card.version, "base": card.base}
        c = adapters_table.c
        same = (c.tenant_id == card.tenant, c.name == card.adapter, c.version == card.version)
        try:
            with self._store.write() as connection:
                known = connection.execute(sa.select(c.id).where(*same)).scalar()
                if known is None:
                    inserted = connection.execute(adapters_table.insert().values(**row, registered_at=at))
                    assert inserted.inserted_primary_key is not None
                    known = inserted.inserted_primary_key[0]
        except sa.exc.IntegrityError as error:
            raise UnknownRecord(f"There is no tenant '{card.tenant}'.") from error
        return AdapterRef(known, card.tenant, card.adapter, card.version)

    def promote(self, adapter: AdapterRef, *, at: datetime) -> None:
        """Let the alias `tenant/name` mean `adapter` from now on; requests in flight keep theirs."""
        with self._store.write() as connection:
            connection.execute(promotions_table.insert().values(adapter_id=adapter.id, promoted_at=at))

    def resolve(self, connection: sa.Connection, tenant: str, name: str) -> Model:
        """What `name` means for `tenant` now.

        Raises ModelNotFound, the same for a name nobody has and for one another tenant has.
        """
        if name in self._bases:
            return Model(name, name, None)
        owner, _, rest = name.partition("/")
        adapter, _, version = rest.partition("@")
        if owner != tenant or (version and not VERSION_PATTERN.match(version)):
            raise ModelNotFound(name)
        query = sa.select(adapters_table).where(
            adapters_table.c.tenant_id == tenant, adapters_table.c.name == adapter
        )
        if version or "@" in rest:
            query = query.where(adapters_table.c.version == version)
        else:
            query = query.join(promotions_table).order_by(promotions_table.c.id.desc()).limit(1)
        row = connection.execute(query).first()
        if row is None or row.base not in self._bases:
            raise ModelNotFound(name)
        return Model(
            name, row.base, AdapterRef(row.id, row.tenant_id, row.name, row.version), row.registered_at
        )

    def models(self, tenant: str) -> list[Model]:
        """The bases, then the tenant's own aliases and versions."""
        c = adapters_table.c
        query = sa.select(adapters_table).where(c.tenant_id == tenant, c.base.in_(self._bases))
        promoted = sa.select(c.name).join(promotions_table).where(c.tenant_id == tenant).distinct()
        aliases = []
        with self._store.read() as connection:
            rows = connection.execute(query.order_by(c.name, c.id)).all()
            for name in sorted(connection.execute(promoted).scalars()):
                with contextlib.suppress(ModelNotFound):  # its promoted version is of a base not served here
                    aliases.append(self.resolve(connection, tenant, f"{tenant}/{name}"))
        versions = [AdapterRef(row.id, row.tenant_id, row.name, row.version) for row in rows]
        return [
            *(Model(base, base, None) for base in self._bases),
            *aliases,
            *(
                Model(ref.model, row.base, ref, row.registered_at)
                for ref, row in zip(versions, rows, strict=True)
            ),
        ]


def newest_published(adapters_dir: Path, tenant: str, name: str) -> Path:
    """The directory of the most recently published version of `tenant/name`.

    Raises InvalidName for a bad name, UnknownRecord if nothing is published under it.
    """
    folder = adapters_dir / validate_name(tenant) / validate_name(name)
    versions = [path for path in folder.glob("*") if VERSION_PATTERN.match(path.name)]
    if not versions:
        raise UnknownRecord(f"No version of '{tenant}/{name}' is published.")
    return max(versions, key=lambda path: _verified(path).created_at)


def _verified(directory: Path) -> AdapterCard:
    try:
        card = verify(directory)
    except (FinetuneError, OSError) as error:
        raise CatalogueError(f"{directory.name}: {error}") from error
    if not card.gate.passed:
        raise CatalogueError(f"{directory.name}: its gate did not pass: {card.gate.reason}")
    if directory.resolve().parts[-3:] != (card.tenant, card.adapter, card.version):
        raise CatalogueError(f"{directory.name}: its place contradicts its card")
    return card
