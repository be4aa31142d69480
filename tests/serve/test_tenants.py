import stat
from pathlib import Path

import pytest
import sqlalchemy as sa

from finetune.errors import InvalidName
from serve.errors import AlreadyExists, Unauthenticated, UnknownRecord
from serve.tenants import keys_table, server_secret
from tests.serve.conftest import NOON, Shop


def test_a_key_authenticates_its_tenant(shop: Shop) -> None:
    assert shop.tenants.authenticate(shop.secret) == shop.principal


def test_the_store_holds_no_key_only_a_keyed_hash(shop: Shop) -> None:
    with shop.store.read() as connection:
        row = connection.execute(sa.select(keys_table)).mappings().one()
    assert len(row["digest"]) == 64
    assert shop.secret not in str(dict(row))
    assert shop.secret[len("bsk-") : 12] not in str(dict(row))


@pytest.mark.parametrize("key", ["", "bsk-", "bsk-wrong", "sk-" + "a" * 43, "bsk-" + "a" * 5000, "bsk-é\x00"])
def test_anything_but_a_live_key_is_refused(shop: Shop, key: str) -> None:
    with pytest.raises(Unauthenticated):
        shop.tenants.authenticate(key)


def test_a_revoked_key_is_refused_at_once(shop: Shop) -> None:
    shop.tenants.revoke_key(shop.principal.key_id, at=NOON)
    with pytest.raises(Unauthenticated):
        shop.tenants.authenticate(shop.secret)


def test_names_that_could_be_paths_are_refused(shop: Shop) -> None:
    for name in ("../up", "a/b", "", "A", "a@b", ".hidden", "a" * 64):
        with pytest.raises(InvalidName):
            shop.tenants.create(name, at=NOON)


def test_what_exists_or_does_not_is_said(shop: Shop) -> None:
    with pytest.raises(AlreadyExists):
        shop.tenants.create("acme", at=NOON)
    with pytest.raises(UnknownRecord):
        shop.tenants.create_key("nobody", at=NOON)
    with pytest.raises(UnknownRecord):
        shop.tenants.revoke_key("key_0", at=NOON)
    with pytest.raises(ValueError, match="root"):
        shop.tenants.create_key("acme", at=NOON, scopes=frozenset({"root"}))


def test_the_server_secret_is_made_once_and_is_private(tmp_path: Path) -> None:
    first = server_secret(tmp_path)
    assert len(first) == 64
    assert server_secret(tmp_path) == first
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
