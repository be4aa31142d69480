"""Keeps the registry: which models exist, who owns them, and which version a name means now.

    smollm2-135m            a base, open to every tenant
    acme/support            an alias of tenant acme: its promoted version
    acme/support@3f9c1a…    an immutable version, named by its content

An adapter is registered only with a card that agrees with its bytes and whose gate passed, and with files
that fit its base. It is served once an engine has shown that it takes effect.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from finetune.card import AdapterCard, validate_name, verify
from finetune.errors import FinetuneError
from quantize.card import read_card
from quantize.errors import QuantizeError
from serve.billing.credits.charges import charge_training
from serve.errors import ModelNotFound, RegistryError, UnknownRecord
from serve.registry.validation import inspect
from serve.registry.versions import (
    REASON_CHARS_MAX,
    AdapterVersion,
    Alias,
    DesiredVersion,
    Model,
    VersionInfo,
    VersionState,
    adapters_table,
    promotions_table,
)
from serve.storage import revision
from serve.storage.database import Store
from serve.tenants.audit import SYSTEM, record

VERSION_PATTERN = re.compile(r"^[0-9a-f]{16}$")

_SERVABLE = sa.and_(adapters_table.c.state != VersionState.REJECTED, adapters_table.c.retired_at.is_(None))
_SERVED = sa.and_(adapters_table.c.state == VersionState.READY, adapters_table.c.retired_at.is_(None))


class AdapterRegistry:
    """Registers, promotes and resolves the adapters of one store. Methods block.

    imported_at: when a base was imported, where that is known; clients see it.
    """

    def __init__(
        self, store: Store, bases: list[str], *, imported_at: Mapping[str, datetime] | None = None
    ) -> None:
        self._store = store
        self._bases = bases
        self._imported_at = imported_at or {}

    def register(
        self, directory: Path, *, at: datetime, base_dir: Path, max_rank: int, actor: str = SYSTEM
    ) -> AdapterVersion:
        """Registers the published adapter in `directory` (`…/<tenant>/<name>/<version>`) as pending.

        Idempotent. Its training is billed if the plan has a price.

        Raises RegistryError if the card and the bytes disagree, the place or the base contradicts the card,
        its gate did not pass or its files do not fit the base; UnknownRecord for an unknown tenant.
        """
        card = _verified(directory)
        if base_dir.name != card.base:
            raise RegistryError(f"{directory.name}: its base is '{card.base}', not '{base_dir.name}'")
        _require_text(base_dir)
        files = inspect(directory, base_dir, max_rank=max_rank)
        row = {"tenant_id": card.tenant, "name": card.adapter, "version": card.version, "base": card.base}
        facts = {"registered_at": at, "rank": files.rank, "bytes": files.bytes}
        try:
            with self._change() as connection:
                existing = connection.execute(_select(card.tenant, card.adapter, card.version)).first()
                if existing is not None:
                    return _ref(existing)
                inserted = connection.execute(adapters_table.insert().values(row | facts))
                assert inserted.inserted_primary_key is not None
                adapter = AdapterVersion(
                    inserted.inserted_primary_key[0], card.tenant, card.adapter, card.version
                )
                revision.count_change(connection)
                _record(connection, "register", adapter, actor, at)
                charge_training(
                    self._store,
                    connection,
                    tenant=card.tenant,
                    adapter_id=adapter.id,
                    subject=adapter.model,
                    tokens=card.data.trained_tokens,
                    at=at,
                )
        except sa.exc.IntegrityError as error:
            raise UnknownRecord(f"There is no tenant '{card.tenant}'.") from error
        return adapter

    def promote(self, adapter: AdapterVersion, *, at: datetime, actor: str = SYSTEM) -> None:
        """Lets the alias `tenant/name` mean `adapter` from now on. Requests in flight keep their version.

        A version that is pending takes over when it becomes ready; until then the alias means what it did.

        Raises RegistryError if the version is rejected or retired, UnknownRecord for an unknown one.
        """
        with self._change() as connection:
            _require_servable(_row(connection, adapter), adapter)
            connection.execute(promotions_table.insert().values(adapter_id=adapter.id, promoted_at=at))
            revision.count_change(connection)
            _record(connection, "promote", adapter, actor, at)

    def mark_ready(self, adapter: AdapterVersion, at: datetime) -> bool:
        """Marks `adapter` ready: an engine saw it take effect. False if its state was decided before."""
        return self._decide(adapter, state=VersionState.READY, probed_at=at)

    def reject(self, adapter: AdapterVersion, reason: str, at: datetime) -> bool:
        """Rejects `adapter`, which an engine found unfit. False if its state was decided before."""
        return self._decide(
            adapter, state=VersionState.REJECTED, reason=reason[:REASON_CHARS_MAX], probed_at=at
        )

    def _decide(self, adapter: AdapterVersion, **values: Any) -> bool:
        c = adapters_table.c
        pending = adapters_table.update().where(c.id == adapter.id, c.state == VersionState.PENDING)
        with self._change() as connection:
            decided = connection.execute(pending.values(values)).rowcount == 1
            if decided:
                revision.count_change(connection)
        return decided

    def pin(self, adapter: AdapterVersion, pinned: bool, *, actor: str = SYSTEM) -> None:
        """Lets every replica keep `adapter` loaded, or no longer. Idempotent.

        Raises RegistryError for pinning a rejected or retired version, UnknownRecord for an unknown one.
        """
        with self._change() as connection:
            row = _row(connection, adapter)
            if pinned:
                _require_servable(row, adapter)
            if row.pinned != pinned:
                _update(connection, adapter, pinned=pinned)
                _record(connection, "pin" if pinned else "unpin", adapter, actor)

    def retire(self, adapter: AdapterVersion, at: datetime, *, actor: str = SYSTEM) -> None:
        """Retires `adapter`: it is not served any more, for good. Idempotent.

        Raises RegistryError if its alias means it, or will once its probe has passed; UnknownRecord.
        """
        c = adapters_table.c
        with self._change() as connection:
            if _row(connection, adapter).retired_at is not None:
                return
            if adapter.id in _aliases(connection, c.tenant_id == adapter.tenant, c.name == adapter.name):
                alias = f"{adapter.tenant}/{adapter.name}"
                raise RegistryError(
                    f"The alias '{alias}' points to {adapter.model}: promote another version first."
                )
            _update(connection, adapter, retired_at=at)
            _record(connection, "retire", adapter, actor, at)

    def find(self, tenant: str, name: str, version: str) -> AdapterVersion:
        """Returns the registered version, whatever its state. Raises UnknownRecord."""
        with self._store.read() as connection:
            row = connection.execute(_select(tenant, name, version)).first()
        if row is None:
            raise UnknownRecord(f"There is no registered version '{tenant}/{name}@{version}'.")
        return _ref(row)

    def state(self, adapter: AdapterVersion) -> VersionState:
        """Returns the version's state. Raises UnknownRecord."""
        with self._store.read() as connection:
            return VersionState(_row(connection, adapter).state)

    def entry(self, adapter: AdapterVersion) -> VersionInfo:
        """Returns everything stored of the version. Raises UnknownRecord."""
        for entry in self.entries(adapter.tenant):
            if entry.ref == adapter:
                return entry
        raise _unknown(adapter)

    def entries(self, tenant: str | None = None) -> list[VersionInfo]:
        """Returns every version ever registered, of one tenant or of all, by tenant, name and age."""
        c = adapters_table.c
        owned = sa.true() if tenant is None else c.tenant_id == tenant
        query = sa.select(adapters_table).where(owned).order_by(c.tenant_id, c.name, c.id)
        with self._store.read() as connection:
            rows = connection.execute(query).all()
            aliases = _aliases(connection, owned)
        return [_entry(row, aliases.get(row.id)) for row in rows]

    def desired(self, base: str) -> list[DesiredVersion]:
        """Returns the versions that the engines of `base` should have, in the order of registration."""
        c = adapters_table.c
        query = sa.select(adapters_table).where(c.base == base, _SERVABLE).order_by(c.id)
        with self._store.read() as connection:
            rows = connection.execute(query).all()
        return [DesiredVersion(_ref(row), VersionState(row.state), row.pinned) for row in rows]

    def revision(self) -> int:
        """Returns a number that grows with every change of the registry, visible together with the change."""
        with self._store.read() as connection:
            return revision.current(connection)

    @contextlib.contextmanager
    def _change(self) -> Iterator[sa.Connection]:
        """Writes without overlap with other changes of the registry, so that revisions commit in order."""
        with self._store.write() as connection:
            revision.lock(connection)
            yield connection

    def resolve(self, connection: sa.Connection, tenant: str, name: str) -> Model:
        """Returns what `name` means for `tenant` now, among versions that are ready and not retired.

        Raises ModelNotFound, the same for a name that does not exist and for one that another tenant has.
        """
        if name in self._bases:
            return self._base(name)
        owner, _, rest = name.partition("/")
        adapter, _, version = rest.partition("@")
        if owner != tenant or (version and not VERSION_PATTERN.match(version)):
            raise ModelNotFound(name)
        query = sa.select(adapters_table).where(
            adapters_table.c.tenant_id == tenant, adapters_table.c.name == adapter, _SERVED
        )
        if version or "@" in rest:
            query = query.where(adapters_table.c.version == version)
        else:
            query = query.join(promotions_table).order_by(promotions_table.c.id.desc()).limit(1)
        row = connection.execute(query).first()
        if row is None or row.base not in self._bases:
            raise ModelNotFound(name)
        return Model(name, row.base, _ref(row), row.registered_at)

    def models(self, tenant: str) -> list[Model]:
        """Returns the bases, then the tenant's own aliases and versions."""
        c = adapters_table.c
        query = sa.select(adapters_table).where(c.tenant_id == tenant, c.base.in_(self._bases), _SERVED)
        promoted = sa.select(c.name).join(promotions_table).where(c.tenant_id == tenant).distinct()
        aliases = []
        with self._store.read() as connection:
            rows = connection.execute(query.order_by(c.name, c.id)).all()
            for name in sorted(connection.execute(promoted).scalars()):
                with contextlib.suppress(ModelNotFound):  # none of its versions is served here
                    aliases.append(self.resolve(connection, tenant, f"{tenant}/{name}"))
        versions = [Model(_ref(row).model, row.base, _ref(row), row.registered_at) for row in rows]
        return [*map(self._base, self._bases), *aliases, *versions]

    def _base(self, name: str) -> Model:
        return Model(name, name, None, self._imported_at.get(name))


def newest_published(adapters_dir: Path, tenant: str, name: str) -> Path:
    """Returns the directory of the most recently published version of `tenant/name`.

    Raises InvalidName for a bad name, UnknownRecord if nothing is published under it.
    """
    folder = adapters_dir / validate_name(tenant) / validate_name(name)
    versions = [path for path in folder.glob("*") if VERSION_PATTERN.match(path.name)]
    if not versions:
        raise UnknownRecord(f"No version of '{tenant}/{name}' is published.")
    return max(versions, key=lambda path: _verified(path).created_at)


def _require_text(base_dir: Path) -> None:
    """Raises RegistryError for a base that makes embeddings. A base without a card is judged by its files."""
    with contextlib.suppress(QuantizeError):
        if read_card(base_dir).embedding is not None:
            raise RegistryError(f"the base '{base_dir.name}' makes embeddings: it takes no adapters")


def _verified(directory: Path) -> AdapterCard:
    try:
        card = verify(directory)
    except (FinetuneError, OSError) as error:
        raise RegistryError(f"{directory.name}: {error}") from error
    if not card.gate.passed:
        raise RegistryError(f"{directory.name}: its gate did not pass: {card.gate.reason}")
    if directory.resolve().parts[-3:] != (card.tenant, card.adapter, card.version):
        raise RegistryError(f"{directory.name}: its place contradicts its card")
    return card


def _select(tenant: str, name: str, version: str) -> sa.Select[Any]:
    c = adapters_table.c
    return sa.select(adapters_table).where(c.tenant_id == tenant, c.name == name, c.version == version)


def _row(connection: sa.Connection, adapter: AdapterVersion) -> sa.Row[Any]:
    row = connection.execute(sa.select(adapters_table).where(adapters_table.c.id == adapter.id)).first()
    if row is None:
        raise _unknown(adapter)
    return row


def _unknown(adapter: AdapterVersion) -> UnknownRecord:
    return UnknownRecord(f"There is no registered version '{adapter.model}'.")


def _update(connection: sa.Connection, adapter: AdapterVersion, **values: Any) -> None:
    connection.execute(adapters_table.update().where(adapters_table.c.id == adapter.id).values(values))
    revision.count_change(connection)


def _record(
    connection: sa.Connection, verb: str, adapter: AdapterVersion, actor: str, at: datetime | None = None
) -> None:
    record(connection, f"adapter.{verb}", adapter.model, actor=actor, tenant=adapter.tenant, at=at)


def _require_servable(row: sa.Row[Any], adapter: AdapterVersion) -> None:
    if row.retired_at is not None:
        raise RegistryError(f"{adapter.model} is retired.")
    if row.state == VersionState.REJECTED:
        raise RegistryError(f"{adapter.model} was rejected: {row.reason}")


def _aliases(connection: sa.Connection, *where: sa.ColumnElement[bool]) -> dict[int, Alias]:
    """Returns by id the versions that aliases mean now, and will mean once a probe has passed."""
    c = adapters_table.c
    key = (c.id, c.tenant_id, c.name, c.state)
    query = sa.select(*key).join(promotions_table).where(_SERVABLE, *where).group_by(*key)
    now: dict[tuple[str, str], int] = {}
    coming: dict[tuple[str, str], int] = {}
    for row in connection.execute(query.order_by(sa.func.max(promotions_table.c.id).desc())):
        alias = (row.tenant_id, row.name)
        if row.state == VersionState.READY:
            now.setdefault(alias, row.id)
        elif alias not in now:
            coming.setdefault(alias, row.id)
    return {**dict.fromkeys(now.values(), "now"), **dict.fromkeys(coming.values(), "next")}


def _ref(row: sa.Row[Any]) -> AdapterVersion:
    return AdapterVersion(row.id, row.tenant_id, row.name, row.version)


def _entry(row: sa.Row[Any], alias: Alias | None) -> VersionInfo:
    return VersionInfo(
        ref=_ref(row),
        base=row.base,
        state=VersionState(row.state),
        reason=row.reason,
        pinned=row.pinned,
        alias=alias,
        rank=row.rank,
        bytes=row.bytes,
        registered_at=row.registered_at,
        probed_at=row.probed_at,
        retired_at=row.retired_at,
    )
