"""Stores tenants' files: their uploads, and the output of their batches.

The bytes are at <folder>/<tenant>/<file-id>. They are written to a part file, synced and renamed before the
row is inserted, so a row always has its bytes. A deletion starts with the row. If a process dies in
between, bytes without a live row are left on disk; the sweep removes them.
"""

import contextlib
import hashlib
import os
import secrets
import time
import unicodedata
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import sqlalchemy as sa

from serve.client_data.upload_tables import PART_PREFIX, PENDING, parts_table, uploads_table
from serve.errors import BodyTooLarge, Conflict, InvalidRequest, NotFound, StoreUnavailable
from serve.storage.database import Store, UtcDateTime, metadata
from serve.storage.pagination import Page, page
from serve.tenants import tenants_table

PURPOSES = ("batch", "fine-tune")
OUTPUT = "batch_output"
FILENAME_CHARS_MAX = 255
# A file is on disk before its row exists, for as long as writing it takes; the sweep must not remove it.
ORPHAN_AGE_S = 3600.0

files_table = sa.Table(
    "files",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("purpose", sa.String(16), nullable=False),
    sa.Column("filename", sa.String(FILENAME_CHARS_MAX), nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("expires_at", UtcDateTime),
    sa.Column("deleted_at", UtcDateTime),
    sa.CheckConstraint("bytes >= 0", name="bytes_not_negative"),
    sa.Index("ix_files_tenant_id_created_at", "tenant_id", "created_at"),
)


@dataclass(frozen=True, slots=True)
class FileBounds:
    """Holds the most bytes of one upload, and the most files and bytes of one tenant."""

    file_bytes: int
    files_per_tenant: int
    bytes_per_tenant: int


@dataclass(frozen=True, slots=True)
class File:
    id: str
    tenant: str
    purpose: str
    filename: str
    bytes: int
    sha256: str
    created_at: datetime
    expires_at: datetime | None = None


class Draft:
    """Writes a new file. `publish` makes it durable; `discard` removes it after a failure. Methods block."""

    def __init__(self, folder: Path, bytes_max: int | None, prefix: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.id = f"{prefix}{secrets.token_hex(16)}"
        self.bytes = 0
        self._path = folder / self.id
        self._part_path = folder / f".{self.id}.part"
        self._bytes_max = bytes_max
        self._digest = hashlib.sha256()
        self._part_file: BinaryIO = self._part_path.open("xb")

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, piece: bytes) -> None:
        """Raises BodyTooLarge beyond the bound, StoreUnavailable if the disk does not take it."""
        self.bytes += len(piece)
        if self._bytes_max is not None and self.bytes > self._bytes_max:
            raise BodyTooLarge(self._bytes_max)
        self._digest.update(piece)
        try:
            self._part_file.write(piece)
        except OSError as error:
            raise StoreUnavailable() from error

    def publish(self) -> None:
        """Make the file durable under its own name. Raises StoreUnavailable."""
        try:
            self._part_file.flush()
            os.fsync(self._part_file.fileno())
            self._part_file.close()
            self._part_path.rename(self._path)
            sync_folder(self._path.parent)
        except OSError as error:
            raise StoreUnavailable() from error

    def discard(self) -> None:
        self._part_file.close()
        self._part_path.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)


class Files:
    """The files of one store, whose bytes are in `folder`. Methods block and raise StoreUnavailable.

    A method with a `tenant` sees only that tenant's files that are neither deleted nor expired.
    """

    def __init__(self, store: Store, folder: Path, bounds: FileBounds) -> None:
        self._store = store
        self._folder = folder
        self.bounds = bounds

    def draft(self, tenant: str, *, bytes_max: int | None = None, prefix: str = "file-") -> Draft:
        try:
            return Draft(self._folder / tenant, bytes_max, prefix)
        except OSError as error:
            raise StoreUnavailable() from error

    def check_quota(self, tenant: str, *, at: datetime) -> None:
        """Raises InvalidRequest if the tenant cannot have another file, however small."""
        with self._store.read() as connection:
            self.require_quota(connection, tenant, at, files=1, size=1)

    def add(
        self,
        draft: Draft,
        tenant: str,
        *,
        purpose: str,
        filename: str,
        at: datetime,
        expires_at: datetime | None = None,
    ) -> File:
        """Store an upload. Raises InvalidRequest beyond the tenant's bounds, and then stores nothing."""
        draft.publish()
        try:
            with self._store.write() as connection:
                # Uploads of one tenant are inserted one after the other, so that the sum covers all of them.
                lock_tenant(connection, tenant)
                self.require_quota(connection, tenant, at, files=1, size=draft.bytes)
                return self.insert_draft(
                    connection,
                    draft,
                    tenant,
                    purpose=purpose,
                    filename=filename,
                    at=at,
                    expires_at=expires_at,
                )
        except InvalidRequest:
            draft.discard()  # after another error the row may exist; the sweep decides
            raise

    def insert_draft(
        self,
        connection: sa.Connection,
        draft: Draft,
        tenant: str,
        *,
        purpose: str,
        filename: str,
        at: datetime,
        expires_at: datetime | None,
    ) -> File:
        """Insert the row of a published draft, in the caller's transaction."""
        file = File(draft.id, tenant, purpose, safe_name(filename), draft.bytes, draft.sha256, at, expires_at)
        self.insert(connection, file)
        return file

    def insert(self, connection: sa.Connection, file: File) -> None:
        """Insert the row of a published file, in the caller's transaction."""
        connection.execute(
            files_table.insert().values(
                id=file.id,
                tenant_id=file.tenant,
                purpose=file.purpose,
                filename=file.filename,
                bytes=file.bytes,
                sha256=file.sha256,
                created_at=file.created_at,
                expires_at=file.expires_at,
            )
        )

    def get(self, tenant: str, file_id: str, *, at: datetime) -> File:
        """Raises NotFound, with the same message for another tenant's file."""
        with self._store.read() as connection:
            return self.find(connection, tenant, file_id, at=at)

    def find(self, connection: sa.Connection, tenant: str, file_id: str, *, at: datetime) -> File:
        """`get`, in the caller's transaction."""
        file = self.find_or_none(connection, tenant, file_id, at=at)
        if file is None:
            raise NotFound(f"No such file: {file_id[:64]}.")
        return file

    def find_or_none(
        self, connection: sa.Connection, tenant: str, file_id: str, *, at: datetime
    ) -> File | None:
        c = files_table.c
        query = sa.select(files_table).where(c.id == file_id, *_live(tenant, at))
        row = connection.execute(query).first() if file_id.isprintable() else None
        return None if row is None else _file(row)

    def page(
        self,
        tenant: str,
        *,
        at: datetime,
        purpose: str | None = None,
        after: str | None = None,
        limit: int,
        newest_first: bool = True,
    ) -> Page[File]:
        """Raises InvalidRequest if `after` is not a file of the tenant."""
        where = list(_live(tenant, at))
        if purpose is not None:
            where.append(files_table.c.purpose == purpose)
        with self._store.read() as connection:
            rows = page(connection, files_table, *where, after=after, limit=limit, newest_first=newest_first)
        return Page([_file(row) for row in rows.items], rows.has_more)

    def path_of(self, tenant: str, file_id: str) -> Path:
        """The path of a stored file's bytes. Raises StoreUnavailable if they are missing."""
        path = self._folder / tenant / file_id
        if not path.is_file():
            raise StoreUnavailable()
        return path

    def delete(
        self, tenant: str, file_id: str, *, at: datetime, in_use: "sa.Select[Any] | None" = None
    ) -> None:
        """Delete the file. Raises NotFound, Conflict if `in_use` selects a row."""
        with self._store.write() as connection:
            # A transaction that wants to use the file meanwhile waits, then sees that it is deleted.
            lock_tenant(connection, tenant)
            file = self.find(connection, tenant, file_id, at=at)
            if in_use is not None and connection.execute(in_use.limit(1)).first() is not None:
                raise Conflict("A batch that has not ended yet reads this file.")
            connection.execute(files_table.update().where(files_table.c.id == file_id).values(deleted_at=at))
        self.remove_bytes(tenant, file.id)

    def remove_bytes(self, tenant: str, file_id: str) -> None:
        """Remove the bytes of a file or a part whose row is gone."""
        (self._folder / tenant / file_id).unlink(missing_ok=True)

    def sweep(self, *, at: datetime) -> int:
        """Remove bytes without a live row. Returns the number of files; any process may call it."""
        count = 0
        for path in self._folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # another process sweeps, too
                if time.time() - path.stat().st_mtime > ORPHAN_AGE_S and not self._is_live(path.name, at):
                    path.unlink()
                    count += 1
        return count

    def _is_live(self, file_id: str, at: datetime) -> bool:
        c = files_table.c
        query = sa.select(c.id).where(c.id == file_id, c.deleted_at.is_(None), _not_expired(at))
        if file_id.startswith(PART_PREFIX):
            query = sa.select(parts_table.c.id).where(parts_table.c.id == file_id)
        with self._store.read() as connection:
            return connection.execute(query).first() is not None

    def require_quota(
        self, connection: sa.Connection, tenant: str, at: datetime, *, files: int = 0, size: int
    ) -> None:
        """Raises InvalidRequest if the tenant cannot have `files` more files, or `size` more bytes.

        A pending upload counts as a file, and its parts' bytes count.
        """
        stored_files, stored_bytes = connection.execute(_totals(files_table).where(*_live(tenant, at))).one()
        u = uploads_table.c
        pending = (u.tenant_id == tenant, u.status == PENDING, u.expires_at > at)
        uploads = connection.execute(sa.select(sa.func.count()).where(*pending)).scalar_one()
        parts = _totals(parts_table).join(uploads_table, u.id == parts_table.c.upload_id)
        _, part_bytes = connection.execute(parts.where(u.tenant_id == tenant)).one()
        bounds = self.bounds
        if (
            stored_files + uploads + files > bounds.files_per_tenant
            or stored_bytes + part_bytes + size > bounds.bytes_per_tenant
        ):
            raise InvalidRequest(
                f"You may have {bounds.files_per_tenant} files of {bounds.bytes_per_tenant} bytes in all. "
                "Delete files that you no longer need.",
                "file",
                "storage_limit_exceeded",
            )


def lock_tenant(connection: sa.Connection, tenant: str) -> None:
    """Keep other transactions from adding, using or deleting the tenant's files until this one ends."""
    connection.execute(sa.select(tenants_table.c.id).where(tenants_table.c.id == tenant).with_for_update())


def safe_name(filename: str) -> str:
    """A name to show: no folders, no control or formatting characters, not empty. Never used as a path."""
    base = filename.replace("\\", "/").rsplit("/", 1)[-1]
    printable = "".join(char for char in base if unicodedata.category(char)[0] != "C")
    return printable.strip().lstrip(".")[:FILENAME_CHARS_MAX] or "file"


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _totals(table: sa.Table) -> "sa.Select[tuple[int, int]]":
    """Selects the number of rows and the sum of their bytes."""
    return sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(table.c.bytes), 0)).select_from(table)


def _live(tenant: str, at: datetime) -> tuple[sa.ColumnElement[bool], ...]:
    c = files_table.c
    return c.tenant_id == tenant, c.deleted_at.is_(None), _not_expired(at)


def _not_expired(at: datetime) -> sa.ColumnElement[bool]:
    expires_at = files_table.c.expires_at
    return sa.or_(expires_at.is_(None), expires_at > at)


def _file(row: "sa.Row[Any]") -> File:
    return File(
        row.id,
        row.tenant_id,
        row.purpose,
        row.filename,
        row.bytes,
        row.sha256,
        row.created_at,
        row.expires_at,
    )
