"""Tests that every change is in the audit log, permanently and without secrets."""

import inspect
import re
from collections.abc import Callable
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from serve.billing.ledger.ledger import Ledger
from serve.billing.pricing.plans import PricePlan, Prices
from serve.cli import app
from serve.errors import InvalidRequest
from serve.registry.registry import AdapterRegistry
from serve.registry.versions import AdapterVersion
from serve.storage.database import Store
from serve.tenants import Keys, PlatformKeys, Projects, Tenants
from serve.tenants.audit import Audit, audit_table, command_actor, record
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON, PLAN, RATES, TINY
from tests.support.databases import on_sqlite
from tests.support.lora_samples import publish_base, publish_sample

WHO = "platform:pkey_1"


class Office:
    """Provides a shop with a project, a registered adapter and a platform key, to try every action on."""

    def __init__(self, shop: BillingFixture, home: Path) -> None:
        self.home = home
        self.published: dict[int, Path] = {}
        self.tenants, self.ledger, self.prices = shop.tenants, shop.ledger, Prices(shop.store)
        self.key = shop.principal.key_id
        self.project = shop.tenants.projects.create("acme", "web", at=NOON).id
        self.platform_key = shop.tenants.platform_keys.create("ops", at=NOON)[0].id
        self.registry = AdapterRegistry(shop.store, [TINY])
        publish_base(home, TINY)
        self.adapter = self.register(1)

    def register(self, alpha: int, actor: str = "system") -> AdapterVersion:
        directory = self.published.get(alpha) or publish_sample(self.home, "acme", "support", alpha=alpha)
        self.published[alpha] = directory
        base = self.home / "bases" / TINY
        return self.registry.register(directory, at=NOON, base_dir=base, max_rank=16, actor=actor)


@pytest.fixture
def office(shop: BillingFixture, tmp_path: Path) -> Office:
    return Office(shop, tmp_path)


def dearer() -> PricePlan:
    return PLAN.model_copy(update={"base": RATES.model_copy(update={"prompt_nanos_per_mtok": 1})})


# (the method, the action that it writes down, what to do)
MUTATIONS: list[tuple[Callable[..., object], str, Callable[[Office], object]]] = [
    (Tenants.create, "tenant.create", lambda o: o.tenants.create("new", at=NOON, actor=WHO)),
    (Tenants.suspend, "tenant.suspend", lambda o: o.tenants.suspend("acme", True, at=NOON, actor=WHO)),
    (
        Tenants.change,
        "tenant.limits",
        lambda o: o.tenants.change("acme", at=NOON, limits={"tokens_per_min": 5}, actor=WHO),
    ),
    (
        Tenants.change,
        "tenant.scopes",
        lambda o: o.tenants.change("acme", at=NOON, scopes=frozenset({"files"}), actor=WHO),
    ),
    (
        Projects.create,
        "project.create",
        lambda o: o.tenants.projects.create("acme", "app", at=NOON, actor=WHO),
    ),
    (
        Projects.archive,
        "project.archive",
        lambda o: o.tenants.projects.archive("acme", o.project, at=NOON, actor=WHO),
    ),
    (Keys.create, "key.create", lambda o: o.tenants.keys.create("acme", at=NOON, actor=WHO)),
    (
        Keys.change,
        "key.rename",
        lambda o: o.tenants.keys.change("acme", o.key, at=NOON, name="crm", actor=WHO),
    ),
    (
        Keys.change,
        "key.limits",
        lambda o: o.tenants.keys.change("acme", o.key, at=NOON, limits={"context_tokens": 9}, actor=WHO),
    ),
    (
        Keys.rotate,
        "key.rotate",
        lambda o: o.tenants.keys.rotate(o.key, overlap=timedelta(hours=1), at=NOON, actor=WHO),
    ),
    (Keys.revoke, "key.revoke", lambda o: o.tenants.keys.revoke(o.key, at=NOON, actor=WHO)),
    (
        PlatformKeys.create,
        "platform_key.create",
        lambda o: o.tenants.platform_keys.create("ci", at=NOON, actor=WHO),
    ),
    (
        PlatformKeys.revoke,
        "platform_key.revoke",
        lambda o: o.tenants.platform_keys.revoke(o.platform_key, at=NOON, actor=WHO),
    ),
    (Prices.publish, "price.publish", lambda o: o.prices.publish(dearer(), at=NOON, actor=WHO)),
    (Prices.subscribe, "price.assign", lambda o: o.prices.subscribe("acme", PLAN.name, at=NOON, actor=WHO)),
    (Prices.end, "price.end", lambda o: o.prices.end("acme", at=NOON, actor=WHO)),
    (Ledger.open_account, "tenant.credit", lambda o: o.ledger.open_account("acme", 5, actor=WHO)),
    (AdapterRegistry.register, "adapter.register", lambda o: o.register(2, actor=WHO)),
    (
        AdapterRegistry.promote,
        "adapter.promote",
        lambda o: o.registry.promote(o.adapter, at=NOON, actor=WHO),
    ),
    (AdapterRegistry.pin, "adapter.pin", lambda o: o.registry.pin(o.adapter, True, actor=WHO)),
    (AdapterRegistry.retire, "adapter.retire", lambda o: o.registry.retire(o.adapter, NOON, actor=WHO)),
]

# These write, and are not somebody's doing: what gateways and engines find out, and short forms of the above.
MACHINERY = {
    *(Keys.note_used, PlatformKeys.note_used, Tenants.create_key, Tenants.revoke_key),
    *(AdapterRegistry.mark_ready, AdapterRegistry.reject),
}


def test_no_method_that_writes_has_been_forgotten() -> None:
    audited = {method for method, _, _ in MUTATIONS}
    for cls in (Tenants, Projects, Keys, PlatformKeys, Prices, AdapterRegistry):
        for name, method in inspect.getmembers(cls, inspect.isfunction):
            source = inspect.getsource(method)
            writes = any(mark in source for mark in ("_store.write()", "self._change()", "self._decide("))
            takes_actor = "actor" in inspect.signature(method).parameters
            if not name.startswith("_") and (writes or takes_actor) and method not in MACHINERY:
                assert method in audited, f"{cls.__name__}.{name}"


@pytest.mark.parametrize(("action", "act"), [(action, act) for _, action, act in MUTATIONS])
def test_every_change_is_written_down_once_with_who_did_it(
    shop: BillingFixture, office: Office, action: str, act: Callable[[Office], object]
) -> None:
    audit = Audit(shop.store)
    before = audit.entries(limit=100)
    act(office)
    (entry,) = audit.entries(limit=100)[: -len(before)]
    assert (entry.action, entry.actor) == (action, WHO)
    assert entry.subject
    concerns_all = action.startswith(("platform_key.", "price.publish"))
    assert (entry.tenant is None) == concerns_all


@on_sqlite  # one way to break the log is enough: that a transaction is one is tested on both
@pytest.mark.parametrize("act", [act for _, _, act in MUTATIONS])
def test_what_is_not_written_down_is_not_done(
    shop: BillingFixture, office: Office, act: Callable[[Office], object]
) -> None:
    def state() -> dict[str, list[object]]:
        with shop.store.read() as connection:
            names = sa.inspect(connection).get_table_names()
            return {name: list(connection.exec_driver_sql(f"SELECT * FROM {name}")) for name in names}

    with shop.store.write() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER broken BEFORE INSERT ON audit_log BEGIN SELECT RAISE(FAIL, 'no audit'); END"
        )
    before = state()
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it is, nothing may remain
        act(office)
    assert state() == before


def test_what_changes_nothing_is_not_written_down(shop: BillingFixture, office: Office) -> None:
    before = Audit(shop.store).entries(limit=100)
    office.tenants.change("acme", at=NOON, suspended=False)
    office.prices.publish(PLAN, at=NOON)
    office.registry.pin(office.adapter, False)
    office.register(1)
    assert Audit(shop.store).entries(limit=100) == before


def test_no_secret_is_in_the_log(shop: BillingFixture) -> None:
    _, first = shop.tenants.keys.create("acme", at=NOON, name="crm", limits={"models": ("acme/*",)})
    key_id = shop.tenants.key_cache.authenticate(first).key_id
    _, second = shop.tenants.keys.rotate(key_id, overlap=timedelta(hours=1), at=NOON)
    _, third = shop.tenants.platform_keys.create("ops", at=NOON)
    with shop.store.read() as connection:
        written = str(connection.execute(sa.select(audit_table)).all())
    for secret in (first, second, third):
        assert secret[4:16] not in written
    assert "digest" not in written


UPDATE = "UPDATE audit_log SET actor = 'nobody'"
REPLACE = (
    "INSERT OR REPLACE INTO audit_log SELECT id, at, 'nobody', action, tenant_id, subject, details "
    "FROM audit_log"
)


@pytest.mark.parametrize(
    ("new_database", "statement"),
    [
        *product(
            ("sqlite", "postgresql"), ("UPDATE audit_log SET actor = 'nobody'", "DELETE FROM audit_log")
        ),
        ("sqlite", REPLACE),
        ("postgresql", "TRUNCATE audit_log"),
    ],
    indirect=["new_database"],
)
def test_the_store_itself_refuses_to_change_the_log(shop: BillingFixture, statement: str) -> None:
    before = Audit(shop.store).entries()
    assert before
    with (
        pytest.raises(sa.exc.IntegrityError, match="append-only"),
        shop.store.write() as connection,
    ):
        connection.exec_driver_sql(statement)
    assert Audit(shop.store).entries() == before


def test_the_log_is_read_newest_first_page_by_page_and_by_tenant_and_action(shop: BillingFixture) -> None:
    audit = Audit(shop.store)
    shop.tenants.create("rival", at=NOON)
    for _ in range(3):
        shop.tenants.create_key("rival", at=NOON)
    made = audit.entries(tenant="rival")
    assert [entry.action for entry in made] == ["key.create"] * 3 + ["tenant.create"]
    assert audit.entries(tenant="rival", before=made[1].id, limit=1) == [made[2]]
    assert [entry.tenant for entry in audit.entries(action="tenant.create")] == ["rival", "acme"]


def test_a_failed_change_leaves_no_row(shop: BillingFixture) -> None:
    before = Audit(shop.store).entries(limit=100)
    with pytest.raises(InvalidRequest):
        shop.tenants.change("acme", at=NOON, suspended=True, limits={"tokens_per_min": -1})
    assert Audit(shop.store).entries(limit=100) == before


def test_what_json_cannot_say_is_a_mistake_of_ours(shop: BillingFixture) -> None:
    with shop.store.write() as connection, pytest.raises(TypeError, match="no place in the audit log"):
        record(connection, "a.b", "c", {"x": object()}, actor="system")


def test_a_command_is_its_users_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "ada")
    assert command_actor() == "command:ada"


def test_what_is_typed_is_written_down_as_its_users_doing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BESPOKE_HOME", str(tmp_path))
    monkeypatch.setenv("LOGNAME", "ada")

    def say(*arguments: str) -> str:
        done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    say("tenant", "create", "acme")
    (project,) = re.findall(r"proj_\w+", say("project", "create", "acme", "web"))
    made = say("key", "create", "acme", "--project", project, "--expires", "90d", "--scope", "files")
    (key,) = re.findall(r"key_[0-9a-f]+", made)
    assert "12" in say("key", "limits", key, "--requests-per-min", "12")
    say("key", "rotate", key, "--overlap", "1h")
    say("key", "revoke", key)
    say("tenant", "limits", "acme", "--tokens-per-min", "5", "--unlimited", "models")
    say("tenant", "scopes", "acme", "--scope", "inference")
    say("tenant", "suspend", "acme")
    say("tenant", "resume", "acme")
    say("project", "archive", "acme", project)
    (platform_key,) = re.findall(r"pkey_\w+", say("platform", "key", "create", "ops"))
    say("platform", "key", "revoke", platform_key)
    assert "command:ada" in say("audit", "--tenant", "acme", "--action", "key.create")
    store = Store(f"sqlite:///{tmp_path / 'ledger.db'}")
    entries = Audit(store).entries(limit=100)
    store.close()
    assert {entry.actor for entry in entries} == {"command:ada"}
    assert [entry.action for entry in reversed(entries)] == [
        *("tenant.create", "tenant.credit", "project.create", "key.create", "key.limits", "key.rotate"),
        *("key.revoke", "tenant.limits", "tenant.scopes", "tenant.suspend", "tenant.resume"),
        *("project.archive", "platform_key.create", "platform_key.revoke"),
    ]
