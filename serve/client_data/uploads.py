"""Takes a file in parts: `Uploads` keeps the parts until they are put together, cancelled or too old.

A part's bytes lie beside the tenant's files, under the part's id, and count as the tenant's. Parts are
written as files are (`files.Draft`): a row always has its bytes, and bytes without a row are swept.
"""

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from serve.client_data.files import Draft, File, Files, lock_tenant
from serve.client_data.upload_tables import (
    CANCELLED,
    COMPLETED,
    PART_PREFIX,
    PENDING,
    parts_table,
    uploads_table,
)
from serve.errors import InvalidRequest, NotFound, StoreUnavailable
from serve.storage.database import Store

LIFETIME = timedelta(hours=1)
PENDING_MAX = 20  # of one tenant
PARTS_MAX = 1000  # of one upload
# A part whose answer was lost is sent again, so that parts may hold more than the file will.
STORED_PER_BYTE_MAX = 2
_COPY_BYTES = 1 << 20
_STEP = 100  # uploads per step of a sweep


@dataclass(frozen=True, slots=True)
class Upload:
    """Holds one upload. bytes: those of the whole file, as announced. file: the result, once completed."""

    id: str
    tenant: str
    purpose: str
    filename: str
    bytes: int
    status: str
    created_at: datetime
    expires_at: datetime
    file_expires_after_s: int | None = None
    file: File | None = None


@dataclass(frozen=True, slots=True)
class Part:
    id: str
    upload_id: str
    created_at: datetime


class Uploads:
    """The uploads of one store. Methods block and raise StoreUnavailable.

    Each sees only its tenant's uploads: NotFound has the same message for another tenant's. An upload that is
    completed, cancelled or expired takes no parts: InvalidRequest.
    """

    def __init__(self, store: Store, files: Files) -> None:
        self._store = store
        self._files = files

    def create(
        self,
        tenant: str,
        *,
        purpose: str,
        filename: str,
        size: int,
        file_expires_after_s: int | None = None,
        at: datetime,
    ) -> Upload:
        """Raises InvalidRequest if the file is too large, or the tenant has too many uploads or files."""
        most = self._files.bounds.file_bytes
        if size > most:
            raise InvalidRequest(f"'bytes' allows at most {most}.", "bytes", "file_too_large")
        upload_id, expires_at = f"upload_{secrets.token_hex(16)}", at + LIFETIME
        upload = Upload(
            upload_id, tenant, purpose, filename, size, PENDING, at, expires_at, file_expires_after_s
        )
        c = uploads_table.c
        pending = sa.select(sa.func.count()).where(
            c.tenant_id == tenant, c.status == PENDING, c.expires_at > at
        )
        with self._store.write() as connection:
            lock_tenant(connection, tenant)
            if connection.execute(pending).scalar_one() >= PENDING_MAX:
                raise InvalidRequest(
                    f"You may have {PENDING_MAX} pending uploads. Complete or cancel some.",
                    None,
                    "upload_limit_exceeded",
                )
            self._files.require_quota(connection, tenant, at, files=1, size=size)
            connection.execute(
                uploads_table.insert().values(
                    id=upload.id,
                    tenant_id=tenant,
                    purpose=purpose,
                    filename=filename,
                    bytes=size,
                    status=PENDING,
                    created_at=at,
                    expires_at=expires_at,
                    file_expires_after_s=file_expires_after_s,
                )
            )
        return upload

    def draft_part(self, tenant: str, upload_id: str, *, at: datetime) -> Draft:
        """A draft for the bytes of a part, which may be as large as the file at most."""
        with self._store.read() as connection:
            upload = self._pending(connection, tenant, upload_id, at)
        return self._files.draft(tenant, bytes_max=upload.bytes, prefix=PART_PREFIX)

    def add_part(self, tenant: str, upload_id: str, draft: Draft, *, at: datetime) -> Part:
        """Store a part. Raises InvalidRequest beyond the bounds, and then stores nothing."""
        draft.publish()
        try:
            with self._store.write() as connection:
                lock_tenant(connection, tenant)
                upload = self._pending(connection, tenant, upload_id, at)
                sizes = self._sizes(connection, upload_id)
                if len(sizes) >= PARTS_MAX:
                    text = f"An upload may have {PARTS_MAX} parts."
                    raise InvalidRequest(text, "data", "upload_limit_exceeded")
                if sum(sizes.values()) + draft.bytes > STORED_PER_BYTE_MAX * upload.bytes:
                    text = f"The parts hold more than the {upload.bytes} bytes that were announced."
                    raise InvalidRequest(text, "data", "upload_limit_exceeded")
                self._files.require_quota(connection, tenant, at, size=draft.bytes)
                row = {"id": draft.id, "upload_id": upload_id, "bytes": draft.bytes, "created_at": at}
                connection.execute(parts_table.insert().values(**row))
        except (InvalidRequest, NotFound):
            draft.discard()  # after another error the row may exist; the sweep decides
            raise
        return Part(draft.id, upload_id, at)

    def complete(
        self, tenant: str, upload_id: str, part_ids: Sequence[str], *, md5: str | None, at: datetime
    ) -> Upload:
        """Put the parts together, in this order. A completed upload stays as it is: the call may be a retry.

        Raises InvalidRequest if a part is not the upload's or named twice, if they are not of the announced
        size, or do not have this MD5 sum. The upload is then as before.
        """
        with self._store.read() as connection:
            upload = self._find(connection, tenant, upload_id, at)
            if upload.status == COMPLETED:
                return upload
            self._pending(connection, tenant, upload_id, at)
            sizes = self._sizes(connection, upload_id)
        self._check_parts(upload, part_ids, sizes)
        draft = self._files.draft(tenant, bytes_max=upload.bytes)
        try:
            self._join(draft, tenant, part_ids, md5)
            draft.publish()
            self._publish(upload, draft, at)
        except (InvalidRequest, NotFound):
            draft.discard()
            raise
        self._remove(tenant, sizes)
        with self._store.read() as connection:
            return self._find(connection, tenant, upload_id, at)

    def cancel(self, tenant: str, upload_id: str, *, at: datetime) -> Upload:
        """Cancel the upload and delete its parts. A cancelled one stays as it is."""
        with self._store.write() as connection:
            lock_tenant(connection, tenant)
            upload = self._find(connection, tenant, upload_id, at)
            if upload.status != CANCELLED:
                self._pending(connection, tenant, upload_id, at)
            sizes = self._sizes(connection, upload_id)
            connection.execute(parts_table.delete().where(parts_table.c.upload_id == upload_id))
            connection.execute(
                uploads_table.update().where(uploads_table.c.id == upload_id).values(status=CANCELLED)
            )
            upload = self._find(connection, tenant, upload_id, at)
        self._remove(tenant, sizes)
        return upload

    def sweep(self, *, at: datetime) -> int:
        """Forget uploads that are too old, with their parts. Returns their number; any process may call it.

        The parts' bytes are removed here, or with those of nobody by `Files.sweep`.
        """
        c = uploads_table.c
        count = 0
        while True:
            with self._store.write() as connection:
                expired = sa.select(c.id, c.tenant_id).where(c.expires_at <= at).limit(_STEP)
                owners = {row.id: row.tenant_id for row in connection.execute(expired)}
                of_them = parts_table.c.upload_id.in_(owners)
                rows = connection.execute(
                    sa.select(parts_table.c.id, parts_table.c.upload_id).where(of_them)
                ).all()
                connection.execute(parts_table.delete().where(of_them))
                connection.execute(uploads_table.delete().where(c.id.in_(owners)))
            for row in rows:
                self._remove(owners[row.upload_id], [row.id])
            count += len(owners)
            if len(owners) < _STEP:
                return count

    def _check_parts(self, upload: Upload, part_ids: Sequence[str], sizes: dict[str, int]) -> None:
        if len(set(part_ids)) < len(part_ids):
            raise InvalidRequest("A part is named twice.", "part_ids", "invalid_value")
        for part_id in part_ids:
            if part_id not in sizes:
                text = f"The upload has no part {part_id[:64]!r}."
                raise InvalidRequest(text, "part_ids", "invalid_value")
        total = sum(sizes[part_id] for part_id in part_ids)
        if total != upload.bytes:
            text = f"The parts have {total} bytes, and {upload.bytes} were announced."
            raise InvalidRequest(text, "part_ids", "invalid_value")

    def _join(self, draft: Draft, tenant: str, part_ids: Sequence[str], md5: str | None) -> None:
        digest = hashlib.md5(usedforsecurity=False)
        try:
            for part_id in part_ids:
                with self._files.path_of(tenant, part_id).open("rb") as part:
                    while piece := part.read(_COPY_BYTES):
                        draft.write(piece)
                        digest.update(piece)
        except (OSError, StoreUnavailable) as error:
            draft.discard()
            raise StoreUnavailable() from error
        if md5 is not None and md5.lower() != digest.hexdigest():
            raise InvalidRequest("The bytes do not have this MD5 sum.", "md5", "checksum_mismatch")

    def _publish(self, upload: Upload, draft: Draft, at: datetime) -> None:
        """Make the draft the upload's file, unless another call has completed the upload meanwhile."""
        after_s = upload.file_expires_after_s
        with self._store.write() as connection:
            lock_tenant(connection, upload.tenant)
            if self._find(connection, upload.tenant, upload.id, at).status == COMPLETED:
                draft.discard()
                return
            self._pending(connection, upload.tenant, upload.id, at)
            file = self._files.insert_draft(
                connection,
                draft,
                upload.tenant,
                purpose=upload.purpose,
                filename=upload.filename,
                at=at,
                expires_at=None if after_s is None else at + timedelta(seconds=after_s),
            )
            # The parts' bytes become the file's, which were counted already.
            connection.execute(parts_table.delete().where(parts_table.c.upload_id == upload.id))
            of_upload = uploads_table.c.id == upload.id
            changes = {"status": COMPLETED, "file_id": file.id}
            connection.execute(uploads_table.update().where(of_upload).values(**changes))

    def _pending(self, connection: sa.Connection, tenant: str, upload_id: str, at: datetime) -> Upload:
        upload = self._find(connection, tenant, upload_id, at)
        if upload.status != PENDING:
            raise InvalidRequest(f"This upload is {upload.status}.", "upload_id", "upload_not_pending")
        return upload

    def _find(self, connection: sa.Connection, tenant: str, upload_id: str, at: datetime) -> Upload:
        c = uploads_table.c
        query = sa.select(uploads_table).where(c.id == upload_id, c.tenant_id == tenant)
        row = connection.execute(query).first() if upload_id.isprintable() else None
        if row is None or (row.status != PENDING and row.expires_at <= at):
            raise NotFound(f"No such upload: {upload_id[:64]}.")
        file = (
            None if row.file_id is None else self._files.find_or_none(connection, tenant, row.file_id, at=at)
        )
        return _upload(row, file, at)

    def _sizes(self, connection: sa.Connection, upload_id: str) -> dict[str, int]:
        """The bytes of each of the upload's parts."""
        c = parts_table.c
        rows = connection.execute(sa.select(c.id, c.bytes).where(c.upload_id == upload_id))
        return {row.id: row.bytes for row in rows}

    def _remove(self, tenant: str, part_ids: Iterable[str]) -> None:
        for part_id in part_ids:
            self._files.remove_bytes(tenant, part_id)


def _upload(row: "sa.Row[Any]", file: File | None, at: datetime) -> Upload:
    expired = row.status == PENDING and row.expires_at <= at
    return Upload(
        row.id,
        row.tenant_id,
        row.purpose,
        row.filename,
        row.bytes,
        "expired" if expired else row.status,
        row.created_at,
        row.expires_at,
        row.file_expires_after_s,
        file,
    )
