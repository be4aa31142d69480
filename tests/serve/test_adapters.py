"""Invariants 1, 5 and 9: immutable versions, nobody else's, nothing that has not passed its gate."""

import json
import shutil
from datetime import timedelta
from pathlib import Path

import pytest

from serve.adapters import AdapterRef, Catalogue, newest_published
from serve.db import Store
from serve.errors import CatalogueError, ModelNotFound, UnknownRecord
from serve.tenants import Tenants
from tests.serve.conftest import NOON, TENANTS, TINY

LUMEN, TIDEWATER = TENANTS


@pytest.fixture
def catalogue(store: Store) -> Catalogue:
    tenants = Tenants(store, b"secret")
    for tenant in TENANTS:
        tenants.create(tenant, at=NOON)
    return Catalogue(store, [TINY])


@pytest.fixture
def published(home: Path, tmp_path: Path) -> Path:
    """A copy of lumen's adapter that a test may damage."""
    source = newest_published(home / "adapters", LUMEN, "support")
    target = tmp_path / "adapters" / LUMEN / "support" / source.name
    shutil.copytree(source, target)
    return target


def resolve(catalogue: Catalogue, store: Store, tenant: str, name: str) -> AdapterRef | None:
    with store.read() as connection:
        return catalogue.resolve(connection, tenant, name).adapter


def test_an_alias_means_its_promoted_version(catalogue: Catalogue, store: Store, published: Path) -> None:
    adapter = catalogue.register(published, at=NOON)
    with pytest.raises(ModelNotFound):
        resolve(catalogue, store, LUMEN, f"{LUMEN}/support")
    catalogue.promote(adapter, at=NOON)
    assert resolve(catalogue, store, LUMEN, f"{LUMEN}/support") == adapter
    assert resolve(catalogue, store, LUMEN, adapter.model) == adapter
    assert resolve(catalogue, store, LUMEN, TINY) is None


def test_registering_again_is_the_same_adapter(catalogue: Catalogue, published: Path) -> None:
    assert catalogue.register(published, at=NOON) == catalogue.register(
        published, at=NOON + timedelta(days=1)
    )


def test_a_name_of_another_tenant_does_not_exist(catalogue: Catalogue, store: Store, published: Path) -> None:
    adapter = catalogue.register(published, at=NOON)
    catalogue.promote(adapter, at=NOON)
    for name in (f"{LUMEN}/support", adapter.model):
        with pytest.raises(ModelNotFound):
            resolve(catalogue, store, TIDEWATER, name)
    assert [model.name for model in catalogue.models(TIDEWATER)] == [TINY]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "@",
        f"{LUMEN}/",
        f"{LUMEN}/support@",
        f"{LUMEN}/support@../../x",
        f"{LUMEN}/../{TIDEWATER}/support",
        f"{LUMEN}/support@{'0' * 16}",
        "TINY",
        f"{TINY}@1",
        "a" * 200,
    ],
)
def test_a_malformed_or_unknown_name_does_not_exist(
    catalogue: Catalogue, store: Store, published: Path, name: str
) -> None:
    catalogue.promote(catalogue.register(published, at=NOON), at=NOON)
    with pytest.raises(ModelNotFound):
        resolve(catalogue, store, LUMEN, name)


def test_an_adapter_of_a_base_that_is_not_served_does_not_exist(store: Store, published: Path) -> None:
    Tenants(store, b"secret").create(LUMEN, at=NOON)
    other = Catalogue(store, ["other"])
    adapter = other.register(published, at=NOON)
    other.promote(adapter, at=NOON)
    with pytest.raises(ModelNotFound):
        resolve(other, store, LUMEN, f"{LUMEN}/support")
    assert [model.name for model in other.models(LUMEN)] == ["other"]


def test_a_flipped_bit_in_the_weights_keeps_an_adapter_out(catalogue: Catalogue, published: Path) -> None:
    weights = published / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CatalogueError):
        catalogue.register(published, at=NOON)


def test_an_adapter_whose_gate_did_not_pass_is_kept_out(catalogue: Catalogue, published: Path) -> None:
    card = json.loads((published / "card.json").read_text())
    card["gate"]["passed"] = False
    (published / "card.json").write_text(json.dumps(card))
    with pytest.raises(CatalogueError, match="gate"):
        catalogue.register(published, at=NOON)


def test_a_pickle_beside_the_weights_keeps_an_adapter_out(catalogue: Catalogue, published: Path) -> None:
    (published / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CatalogueError):
        catalogue.register(published, at=NOON)


def test_an_adapter_in_another_tenants_folder_is_kept_out(catalogue: Catalogue, published: Path) -> None:
    stolen = published.parents[2] / TIDEWATER / "support" / published.name
    shutil.copytree(published, stolen)
    with pytest.raises(CatalogueError, match="place"):
        catalogue.register(stolen, at=NOON)


def test_an_adapter_of_an_unknown_tenant_is_kept_out(store: Store, published: Path) -> None:
    with pytest.raises(UnknownRecord):
        Catalogue(store, [TINY]).register(published, at=NOON)
    with pytest.raises(UnknownRecord):
        newest_published(published.parents[2], LUMEN, "nothing")
