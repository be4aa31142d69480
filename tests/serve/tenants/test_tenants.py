"""Tests tenants, their projects, and the secret that hashes their keys."""

import stat
from datetime import timedelta
from pathlib import Path

import pytest

from finetune.errors import InvalidName
from serve.errors import (
    AlreadyExists,
    Conflict,
    InvalidRequest,
    TenantSuspended,
    Unauthenticated,
    UnknownRecord,
)
from serve.rate_limits.limits import Limits
from serve.tenants import server_secret
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON


def test_names_that_could_be_paths_are_refused(shop: BillingFixture) -> None:
    for name in ("../up", "a/b", "", "A", "a@b", ".hidden", "a" * 64):
        with pytest.raises(InvalidName):
            shop.tenants.create(name, at=NOON)
        with pytest.raises(InvalidName):
            shop.tenants.projects.create("acme", name, at=NOON)


def test_what_exists_or_does_not_is_said(shop: BillingFixture) -> None:
    with pytest.raises(AlreadyExists):
        shop.tenants.create("acme", at=NOON)
    with pytest.raises(UnknownRecord):
        shop.tenants.get("nobody")
    with pytest.raises(UnknownRecord):
        shop.tenants.change("nobody", at=NOON, suspended=True)
    with pytest.raises(UnknownRecord):
        shop.tenants.projects.create("nobody", "web", at=NOON)
    with pytest.raises(UnknownRecord):
        shop.tenants.projects.archive("acme", "proj_0", at=NOON)


def test_a_suspended_tenant_is_told_so_and_may_return(shop: BillingFixture) -> None:
    assert shop.tenants.change("acme", at=NOON, suspended=True).suspended_at == NOON
    with pytest.raises(TenantSuspended):
        shop.tenants.key_cache.authenticate(shop.secret)
    assert shop.tenants.change("acme", at=NOON, suspended=False).suspended_at is None
    assert shop.tenants.key_cache.authenticate(shop.secret) == shop.principal


def test_suspending_twice_keeps_the_first_time(shop: BillingFixture) -> None:
    shop.tenants.change("acme", at=NOON, suspended=True)
    again = shop.tenants.change("acme", at=NOON + timedelta(hours=1), suspended=True)
    assert again.suspended_at == NOON


def test_limits_that_are_not_named_stay(shop: BillingFixture) -> None:
    shop.tenants.change("acme", at=NOON, limits={"requests_per_min": 60, "models": ("tiny",)})
    changed = shop.tenants.change("acme", at=NOON, limits={"requests_per_min": None, "tokens_per_min": 5})
    assert changed.limits == Limits(tokens_per_min=5, models=("tiny",))


def test_a_change_is_made_as_a_whole_or_not_at_all(shop: BillingFixture) -> None:
    with pytest.raises(InvalidRequest):
        shop.tenants.change("acme", at=NOON, suspended=True, limits={"tokens_per_min": 0})
    assert shop.tenants.get("acme").suspended_at is None


def test_a_key_can_do_no_more_than_its_tenant_may(shop: BillingFixture) -> None:
    both = frozenset({"inference", "files"})
    _, secret = shop.tenants.create_key("acme", at=NOON, scopes=both)
    shop.tenants.change("acme", at=NOON, scopes=frozenset({"inference", "billing-read"}))
    assert shop.tenants.key_cache.authenticate(secret).scopes == {"inference"}
    with pytest.raises(InvalidRequest, match="files"):
        shop.tenants.create_key("acme", at=NOON, scopes=both)
    with pytest.raises(ValueError, match="root"):
        shop.tenants.change("acme", at=NOON, scopes=frozenset({"root"}))


def test_archiving_a_project_ends_its_keys_and_no_others(shop: BillingFixture) -> None:
    project = shop.tenants.projects.create("acme", "web", at=NOON)
    _, secret = shop.tenants.keys.create("acme", at=NOON, project=project.id)
    assert shop.tenants.key_cache.authenticate(secret).project == project.id
    assert shop.tenants.projects.archive("acme", project.id, at=NOON).archived_at == NOON
    with pytest.raises(Unauthenticated):
        shop.tenants.key_cache.authenticate(secret)
    assert shop.tenants.key_cache.authenticate(shop.secret).project is None
    with pytest.raises(Conflict, match="archived"):
        shop.tenants.keys.create("acme", at=NOON, project=project.id)


def test_a_project_is_its_tenants_alone(shop: BillingFixture) -> None:
    shop.tenants.create("rival", at=NOON)
    project = shop.tenants.projects.create("acme", "web", at=NOON)
    with pytest.raises(UnknownRecord):
        shop.tenants.keys.create("rival", at=NOON, project=project.id)
    with pytest.raises(UnknownRecord):
        shop.tenants.projects.archive("rival", project.id, at=NOON)
    with pytest.raises(AlreadyExists):
        shop.tenants.projects.create("acme", "web", at=NOON)
    shop.tenants.projects.create("rival", "web", at=NOON)
    assert [one.name for one in shop.tenants.projects.page("acme").items] == ["web"]


def test_pages_follow_each_other_without_gap_or_repetition(shop: BillingFixture) -> None:
    for number in range(5):
        shop.tenants.create(f"t{number}", at=NOON + timedelta(seconds=number // 2))
    seen: list[str] = []
    while True:
        page = shop.tenants.page(after=seen[-1] if seen else None, limit=2)
        seen += [tenant.id for tenant in page.items]
        if not page.has_more:
            break
    assert seen == ["acme", "t0", "t1", "t2", "t3", "t4"]
    with pytest.raises(InvalidRequest, match="after"):
        shop.tenants.page(after="nobody", limit=2)


def test_the_server_secret_is_made_once_and_is_private(tmp_path: Path) -> None:
    first = server_secret(tmp_path)
    assert len(first) == 64
    assert server_secret(tmp_path) == first
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
