"""`bespoke invoice seller` and `profile`: the names and addresses on invoices."""

from pathlib import Path
from typing import Annotated

import typer
import yaml
from pydantic import ValidationError

from serve.billing.invoicing.billing_details import SELLER, BillingDetails, read_party
from serve.commands.common import HomeOption, console, open_store, settings_of
from serve.errors import OperatorError
from serve.tenants.audit import command_actor

FileArgument = Annotated[Path, typer.Argument(exists=True, dir_okay=False)]


def seller(file: FileArgument, home: HomeOption = None) -> None:
    """Set the seller's details: a YAML with name, address, tax_id, email, payment (configs/seller.yaml)."""
    _put(SELLER, file, home)


def profile(tenant: str, file: FileArgument, home: HomeOption = None) -> None:
    """Set a tenant's details on its invoices: a YAML with name, address, tax_id, email."""
    _put(tenant, file, home)


def _put(party: str, file: Path, home: Path | None) -> None:
    try:
        details = read_party(file)
    except (ValidationError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise OperatorError(f"{file}: {error}") from None
    BillingDetails(open_store(settings_of(home))).put(party, details, actor=command_actor())
    console.print(f"new invoices are in the name of {details.name}", markup=False)
