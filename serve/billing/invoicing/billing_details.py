"""Who sells, and who buys: what an invoice says about them. Optional; an invoice says what is missing."""

from pathlib import Path

import sqlalchemy as sa
import yaml

from serve.billing.invoicing.document import Party
from serve.errors import UnknownRecord
from serve.storage.database import Store, insert, metadata
from serve.tenants.audit import SYSTEM, record

SELLER = "@seller"  # no tenant is called so

parties_table = sa.Table(
    "billing_details",
    metadata,
    sa.Column("id", sa.String(63), primary_key=True),
    sa.Column("document", sa.Text, nullable=False),
)


class BillingDetails:
    """The seller and the buyers of one store. Methods block."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def get(self, party: str) -> Party | None:
        """The tenant's details, or the SELLER's."""
        with self._store.read() as connection:
            return party_of(connection, party)

    def put(self, party: str, details: Party, *, actor: str = SYSTEM) -> None:
        """From the next document on; what is final keeps its own. Raises UnknownRecord."""
        tenant = None if party == SELLER else party
        with self._store.write() as connection:
            tenants = metadata.tables["tenants"]
            known = sa.select(tenants.c.id).where(tenants.c.id == party)
            if tenant is not None and connection.execute(known).first() is None:
                raise UnknownRecord(f"There is no tenant '{tenant}'.")
            adding = insert(connection, parties_table).values(id=party, document=details.model_dump_json())
            adding = adding.on_conflict_do_update(
                index_elements=[parties_table.c.id], set_={"document": adding.excluded.document}
            )
            connection.execute(adding)
            record(connection, "invoice.party", party, details.model_dump(), actor=actor, tenant=tenant)


def party_of(connection: sa.Connection, party: str) -> Party | None:
    query = sa.select(parties_table.c.document).where(parties_table.c.id == party)
    document = connection.execute(query).scalar()
    return None if document is None else Party.model_validate_json(document)


def read_party(path: Path) -> Party:
    """Raises pydantic.ValidationError listing everything that is wrong with the file."""
    return Party.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
