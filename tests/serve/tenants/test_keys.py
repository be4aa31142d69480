"""Tests which keys authenticate, for how long, and how fast a revoked key is refused."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from serve.errors import (
    Conflict,
    InvalidRequest,
    StoreUnavailable,
    TenantSuspended,
    Unauthenticated,
    UnknownRecord,
)
from serve.rate_limits.limits import Limits
from serve.tenants import Principal, Tenants, key_cache, keys_table, server_secret
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON

HOUR = timedelta(hours=1)


class Clock:
    """Moves both of a gateway's clocks by hand."""

    def __init__(self) -> None:
        self.s = 0.0

    def now(self) -> datetime:
        return NOON + timedelta(seconds=self.s)


class Gateway:
    """Provides one gateway's tenants with their own key caches."""

    def __init__(self, shop: BillingFixture, home: Path) -> None:
        self.clock = Clock()
        self.tenants = Tenants(
            shop.store, server_secret(home), clock_s=lambda: self.clock.s, now=self.clock.now
        )

    def ask(self, key: str) -> Principal:
        return self.tenants.key_cache.cached(key) or self.tenants.key_cache.authenticate(key)


@pytest.fixture
def gateway(shop: BillingFixture, tmp_path: Path) -> Gateway:
    return Gateway(shop, tmp_path)


def test_a_key_authenticates_its_tenant(shop: BillingFixture) -> None:
    assert shop.tenants.key_cache.authenticate(shop.secret) == shop.principal


def test_the_store_holds_no_key_only_a_keyed_hash(shop: BillingFixture) -> None:
    with shop.store.read() as connection:
        row = connection.execute(sa.select(keys_table)).mappings().one()
    assert len(row["digest"]) == 64
    assert shop.secret not in str(dict(row))
    assert shop.secret[len("bsk-") : 12] not in str(dict(row))


@pytest.mark.parametrize("key", ["", "bsk-", "bsk-wrong", "sk-" + "a" * 43, "bsk-" + "a" * 5000, "bsk-é\x00"])
def test_anything_but_a_live_key_is_refused(gateway: Gateway, key: str) -> None:
    with pytest.raises(Unauthenticated):
        gateway.ask(key)


@pytest.mark.parametrize("verb", ["revoke", "suspend", "archive"])
def test_a_door_shuts_on_every_gateway_within_two_seconds(
    shop: BillingFixture, tmp_path: Path, verb: str
) -> None:
    gateways = [Gateway(shop, tmp_path) for _ in range(2)]
    project = shop.tenants.projects.create("acme", "web", at=NOON)
    key, secret = shop.tenants.keys.create("acme", at=NOON, project=project.id)
    for gateway in gateways:
        gateway.ask(secret)
    if verb == "revoke":
        shop.tenants.revoke_key(key.id, at=NOON)
    elif verb == "suspend":
        shop.tenants.suspend("acme", True, at=NOON)
    else:
        shop.tenants.projects.archive("acme", project.id, at=NOON)
    for gateway in gateways:
        gateway.clock.s += 2
        with pytest.raises(TenantSuspended if verb == "suspend" else Unauthenticated):
            gateway.ask(secret)


def test_changed_limits_are_seen_within_two_seconds(shop: BillingFixture, gateway: Gateway) -> None:
    assert gateway.ask(shop.secret).may_use("tiny")
    shop.tenants.keys.change("acme", shop.principal.key_id, at=NOON, limits={"models": ("acme/*",)})
    shop.tenants.change("acme", at=NOON, limits={"tokens_per_min": 7})
    gateway.clock.s += 2
    who = gateway.ask(shop.secret)
    assert [(subject.kind, subject.id) for subject in who.subjects] == [
        ("tenant", "acme"),
        ("key", shop.principal.key_id),
    ]
    assert who.tenant_limits == Limits(tokens_per_min=7)
    assert who.may_use("acme/support")
    assert not who.may_use("tiny")


def test_a_model_must_be_allowed_to_the_tenant_and_to_the_key() -> None:
    who = Principal("acme", "key_1", frozenset(), None, Limits(models=("a", "b")), Limits(models=("b", "c")))
    assert [name for name in "abc" if who.may_use(name)] == ["b"]


def test_a_known_key_needs_no_store_for_a_second_and_then_does(
    shop: BillingFixture, gateway: Gateway
) -> None:
    gateway.ask(shop.secret)
    gateway.clock.s += 0.99
    assert gateway.tenants.key_cache.cached(shop.secret) == shop.principal
    gateway.clock.s += 0.01
    assert gateway.tenants.key_cache.cached(shop.secret) is None


def test_a_refusal_is_not_remembered(shop: BillingFixture, gateway: Gateway) -> None:
    shop.tenants.suspend("acme", True, at=NOON)
    with pytest.raises(TenantSuspended):
        gateway.ask(shop.secret)
    shop.tenants.suspend("acme", False, at=NOON)
    assert gateway.ask(shop.secret) == shop.principal


def test_a_look_up_that_took_long_is_as_old_as_its_question(shop: BillingFixture, gateway: Gateway) -> None:
    class Slow:
        digest = staticmethod(gateway.tenants.keys.digest)

        def find(self, digest: str, at: datetime) -> Principal:
            gateway.clock.s += 5
            return gateway.tenants.keys.find(digest, at)

        def note_used(self, used: Mapping[str, datetime]) -> None: ...

    slow = key_cache.KeyCache(Slow(), clock_s=lambda: gateway.clock.s)
    slow.authenticate(shop.secret)
    assert slow.cached(shop.secret) is None


def test_a_door_remembers_a_bounded_number_of_keys(
    shop: BillingFixture, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_cache, "CACHED_KEYS_MAX", 3)
    secrets = [shop.tenants.create_key("acme", at=NOON)[1] for _ in range(5)]
    for secret in secrets:
        gateway.ask(secret)
    assert [gateway.tenants.key_cache.cached(secret) is not None for secret in secrets] == [False] * 2 + [
        True
    ] * 3


def test_a_store_that_is_away_is_said_to_be_never_that_the_key_is_wrong(
    tmp_path: Path, shop: BillingFixture
) -> None:
    away = Tenants(type(shop.store)(f"sqlite:///{tmp_path}/no/such/ledger.db"), server_secret(tmp_path))
    with pytest.raises(StoreUnavailable):
        away.key_cache.authenticate(shop.secret)


def test_a_key_works_until_it_expires(shop: BillingFixture, gateway: Gateway) -> None:
    _, secret = shop.tenants.keys.create("acme", at=NOON, expires_at=NOON + HOUR)
    gateway.clock.s = 3599
    gateway.ask(secret)
    gateway.clock.s = 3600
    with pytest.raises(Unauthenticated):
        gateway.ask(secret)
    with pytest.raises(InvalidRequest, match="future"):
        shop.tenants.keys.create("acme", at=NOON, expires_at=NOON)


def test_a_rotated_key_and_its_successor_overlap(shop: BillingFixture, gateway: Gateway) -> None:
    project = shop.tenants.projects.create("acme", "web", at=NOON)
    old, old_secret = shop.tenants.keys.create(
        "acme",
        at=NOON,
        name="crm",
        scopes=frozenset({"files"}),
        project=project.id,
        limits={"tokens_per_min": 9},
    )
    new, new_secret = shop.tenants.keys.rotate(old.id, overlap=HOUR, at=NOON)
    assert (new.name, new.scopes, new.project, new.limits) == (old.name, old.scopes, old.project, old.limits)
    assert shop.tenants.keys.get(new.id).limits == Limits(tokens_per_min=9)
    rotated = shop.tenants.keys.get(old.id)
    assert (rotated.expires_at, rotated.successor) == (NOON + HOUR, new.id)
    gateway.clock.s = 3599
    assert {gateway.ask(secret).key_id for secret in (old_secret, new_secret)} == {old.id, new.id}
    gateway.clock.s = 3601
    gateway.ask(new_secret)
    with pytest.raises(Unauthenticated):
        gateway.ask(old_secret)


def test_a_rotation_does_not_lengthen_a_keys_life_and_happens_once(shop: BillingFixture) -> None:
    old, _ = shop.tenants.keys.create("acme", at=NOON, expires_at=NOON + HOUR)
    later = NOON + HOUR / 2
    new, _ = shop.tenants.keys.rotate(old.id, overlap=24 * HOUR, at=later)
    assert shop.tenants.keys.get(old.id).expires_at == NOON + HOUR
    assert new.expires_at == later + HOUR
    with pytest.raises(Conflict, match="rotated already"):
        shop.tenants.keys.rotate(old.id, overlap=HOUR, at=later)
    shop.tenants.revoke_key(new.id, at=later)
    with pytest.raises(Conflict, match="no longer"):
        shop.tenants.keys.rotate(new.id, overlap=HOUR, at=later)
    for overlap in (-HOUR, timedelta(days=31)):
        with pytest.raises(InvalidRequest, match="overlap"):
            shop.tenants.keys.rotate(shop.principal.key_id, overlap=overlap, at=NOON)


def test_last_use_is_written_in_batches_and_only_forward(shop: BillingFixture, gateway: Gateway) -> None:
    key, secret = shop.tenants.create_key("acme", at=NOON)
    gateway.ask(shop.secret)
    gateway.ask(secret)
    gateway.clock.s = 0.5
    gateway.ask(secret)  # from memory, and yet a use
    assert shop.tenants.keys.get(key.id).last_used_at is None
    gateway.tenants.key_cache.flush()
    assert shop.tenants.keys.get(key.id).last_used_at == NOON + timedelta(seconds=0.5)
    assert shop.tenants.keys.get(shop.principal.key_id).last_used_at == NOON
    shop.tenants.keys.note_used({key.id: NOON - HOUR})
    assert shop.tenants.keys.get(key.id).last_used_at == NOON + timedelta(seconds=0.5)


def test_last_use_survives_a_store_that_is_away(
    shop: BillingFixture, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.ask(shop.secret)
    with monkeypatch.context() as broken:

        def away(used: object) -> None:
            raise StoreUnavailable()

        broken.setattr(gateway.tenants.keys, "note_used", away)
        with pytest.raises(StoreUnavailable):
            gateway.tenants.key_cache.flush()
    gateway.tenants.key_cache.flush()
    assert shop.tenants.keys.get(shop.principal.key_id).last_used_at == NOON


def test_what_does_not_exist_is_said(shop: BillingFixture) -> None:
    with pytest.raises(UnknownRecord):
        shop.tenants.create_key("nobody", at=NOON)
    for tenant in (None, "acme", "rival"):
        with pytest.raises(UnknownRecord, match="no key 'key_0'"):
            shop.tenants.keys.revoke("key_0", at=NOON, tenant=tenant)
    with pytest.raises(ValueError, match="root"):
        shop.tenants.create_key("acme", at=NOON, scopes=frozenset({"root"}))
    with pytest.raises(InvalidRequest, match="admin"):
        shop.tenants.keys.create("acme", at=NOON, scopes=frozenset({"admin"}), project="proj_1")


def test_platform_keys_and_tenant_keys_open_their_own_doors_only(shop: BillingFixture) -> None:
    key, secret = shop.tenants.platform_keys.create("ops", at=NOON)
    assert secret.startswith("bsp-")
    assert shop.tenants.platform_key_cache.authenticate(secret).key_id == key.id
    with pytest.raises(Unauthenticated):
        shop.tenants.key_cache.authenticate(secret)
    with pytest.raises(Unauthenticated):
        shop.tenants.platform_key_cache.authenticate(shop.secret)
    shop.tenants.platform_key_cache.flush()
    (shown,) = shop.tenants.platform_keys.page().items
    assert shown.last_used_at is not None
    shop.tenants.platform_keys.revoke(key.id, at=NOON)
    with pytest.raises(Unauthenticated):
        shop.tenants.platform_key_cache.authenticate(secret)


def test_no_secret_is_in_what_a_key_looks_like(shop: BillingFixture) -> None:
    key, secret = shop.tenants.create_key("acme", at=NOON)
    operator_key, operator_secret = shop.tenants.platform_keys.create("ops", at=NOON)
    for shown, hidden in ((key, secret), (operator_key, operator_secret)):
        assert hidden not in repr(shown)
        assert shown.hint == hidden[-4:]
