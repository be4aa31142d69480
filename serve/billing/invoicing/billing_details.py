"""Billing details describe the seller and the buyers on invoices.

They are optional: an invoice without them says what is missing.
"""

from pathlib import Path

import sqlalchemy as sa
import yaml

from serve.billing.invoicing.document import Party
from serve.billing.invoicing.printable import require_printable_input
from serve.errors import UnknownRecord
from serve.storage.database import Store, insert, metadata
from serve.tenants.audit import SYSTEM, record

SELLER = "@seller"  # no tenant can have this name

parties_table = sa.Table(
    "billing_details",
    metadata,
    sa.Column("id", sa.String(63), primary_key=True),
    sa.Column("document", sa.Text, nullable=False),
)


class BillingDetails:
    """Reads and writes the details of the seller and the buyers of one store. Methods block."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def get(self, party: str) -> Party | None:
        """Return the details of a tenant or of SELLER."""
        with self._store.read() as connection:
            return party_of(connection, party)

    def put(self, party: str, details: Party, *, actor: str = SYSTEM) -> None:
        """Set details, from the next document on; final invoices keep theirs.

        Raises InvalidRequest for letters that no font has, UnknownRecord.
        """
        require_printable_input(details)
        tenant = None if party == SELLER else party
        with self._store.write() as connection:
            tenants = metadata.tables["tenants"]
            query = sa.select(tenants.c.id).where(tenants.c.id == party)
            if tenant is not None and connection.execute(query).first() is None:
                raise UnknownRecord(f"There is no tenant '{tenant}'.")
            upsert = insert(connection, parties_table).values(id=party, document=details.model_dump_json())
            upsert = upsert.on_conflict_do_update(
                index_elements=[parties_table.c.id], set_={"document": upsert.excluded.document}
            )
            connection.execute(upsert)
            record(connection, "invoice.party", party, details.model_dump(), actor=actor, tenant=tenant)


def party_of(connection: sa.Connection, party: str) -> Party | None:
    query = sa.select(parties_table.c.document).where(parties_table.c.id == party)
    document = connection.execute(query).scalar()
    return None if document is None else Party.model_validate_json(document)


def read_party(path: Path) -> Party:
    """Read a party's file. Raises pydantic.ValidationError that lists all its errors."""
    return Party.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
