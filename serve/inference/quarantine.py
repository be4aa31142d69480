"""Quarantines requests that were in a replica when it died, for all gateways, through the store.

A request is known by a keyed hash of its content, without its tenant. One with a grammar or tools is refused
after one death, any other after two. A new entry counts as a change of the revision, so the next hold of each
gateway finds its cache stale and loads the entries anew (`ModelCache`): no request asks the store for them.
"""

import hashlib
from dataclasses import replace
from datetime import datetime, timedelta

import sqlalchemy as sa

from serve.errors import RequestQuarantined
from serve.inference.request import InferenceRequest
from serve.registry.versions import Model
from serve.storage import revision
from serve.storage.database import Store, UtcDateTime, insert, metadata

TERM = timedelta(minutes=10)
DEATHS_MAX = 2
ENTRIES_MAX = 4096

quarantine_table = sa.Table(
    "quarantined_requests",
    metadata,
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("deaths", sa.SmallInteger, nullable=False),
    sa.Column("boot", sa.String(32)),  # of the engine that died last; null if it had not accepted the request
    sa.Column("expires_at", UtcDateTime, nullable=False, index=True),
)


def is_suspect(request: InferenceRequest) -> bool:
    """True for a request with a grammar or tools: it is not sent to a second replica."""
    sampling = request.sampling
    return any(part is not None for part in (request.toolbox, sampling.format, sampling.text_format))


class Quarantine:
    """Holds one gateway's copy of the entries. `check` never blocks; the other methods read or write."""

    def __init__(self, store: Store, secret: bytes) -> None:
        self._store = store
        self._secret = hashlib.sha256(secret).digest()
        self._entries: dict[str, datetime] = {}  # digest → end; replaced as a whole

    def check(self, request: InferenceRequest, model: Model, at: datetime) -> None:
        """Raises RequestQuarantined. Without entries, as nearly always, nothing is hashed."""
        entries = self._entries
        if entries and (until := entries.get(self.digest(request, model))) and at < until:
            raise RequestQuarantined()

    def load(self, connection: sa.Connection, at: datetime) -> None:
        c = quarantine_table.c
        query = sa.select(c.digest, c.expires_at).where(c.deaths >= DEATHS_MAX, c.expires_at > at)
        rows = connection.execute(query.order_by(c.expires_at.desc()).limit(ENTRIES_MAX))
        self._entries = {row.digest: row.expires_at for row in rows}

    def record_death(
        self, request: InferenceRequest, model: Model, at: datetime, boot: str | None = None
    ) -> bool:
        """Note that a replica died with the request. Returns True if it is in quarantine from now on.

        Many may have sent the same request: the death of one engine, named by its boot, counts once. Raises
        StoreUnavailable.
        """
        deaths, digest = DEATHS_MAX if is_suspect(request) else 1, self.digest(request, model)
        c = quarantine_table.c
        with self._store.write() as connection:
            connection.execute(quarantine_table.delete().where(c.expires_at <= at))
            statement = insert(connection, quarantine_table).values(
                digest=digest, deaths=deaths, boot=boot, expires_at=at + TERM
            )
            total = sa.case(
                (sa.false() if boot is None else c.boot == boot, c.deaths),
                (c.deaths < DEATHS_MAX, c.deaths + deaths),
                else_=DEATHS_MAX,
            )
            statement = statement.on_conflict_do_update(
                index_elements=[c.digest], set_={"deaths": total, "boot": boot, "expires_at": at + TERM}
            )
            connection.execute(statement)
            newest = sa.select(c.digest).order_by(c.expires_at.desc()).limit(ENTRIES_MAX)
            connection.execute(quarantine_table.delete().where(c.digest.not_in(newest)))
            found = connection.execute(sa.select(c.deaths).where(c.digest == digest)).scalar()
            if quarantined := (found or 0) >= DEATHS_MAX:
                revision.count_change(connection)
        return quarantined

    def forgive(self, request: InferenceRequest, model: Model) -> None:
        """Forget a request's first death: its second replica lived. Raises StoreUnavailable."""
        c = quarantine_table.c
        of_request = c.digest == self.digest(request, model)
        with self._store.write() as connection:
            connection.execute(quarantine_table.delete().where(of_request, c.deaths < DEATHS_MAX))

    def digest(self, request: InferenceRequest, model: Model) -> str:
        """A keyed hash of what an engine would be asked: nobody can tell from it what a client wrote."""
        content = replace(
            request,
            request_id="",
            model=model.base,
            collect=False,
            commit_hook=None,
            survives_disconnect=False,
            tier="",
            completion_tokens_asked=None,
            base64=False,
        )
        adapter = model.adapter.id if model.adapter else None
        text = f"{adapter} {content!r}".encode(errors="surrogatepass")
        return hashlib.blake2b(text, key=self._secret, digest_size=32).hexdigest()
