"""Budgets over HTTP: for the operator, and for two tenants' own admins."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from serve.billing.ledger.holds import Hold
from tests.serve.api.admin.test_admin import ADMIN, AdminClient
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON
from tests.support.databases import on_sqlite

PATH = "/tenants/acme/budgets"


@pytest.fixture
def admin_client(shop: BillingFixture, tmp_path: Path) -> AdminClient:
    return AdminClient(shop, tmp_path)


def as_admin(
    admin_client: AdminClient, method: str, path: str, body: Any = None, tenant: str = "acme"
) -> tuple[int, Any]:
    answer = admin_client.ask(method, "/admin/v1" + path, admin_client.admins[tenant], json=body)
    return answer.status_code, answer.json()


@on_sqlite
def test_a_budget_from_its_making_to_its_end(admin_client: AdminClient) -> None:
    body = {"limit_nanos": 1000, "period": "total", "webhook_url": "https://example.com/hook"}
    created = admin_client.say("POST", PATH, body, 201)
    assert created["id"].startswith("bud_")
    assert (created["level"], created["subject"], created["current_period"]) == ("tenant", "acme", "total")
    assert (created["hard"], created["notify_pcts"], created["left_nanos"]) == (True, [50, 80, 100], 1000)
    hold = Hold("r1", "acme", 300, terms=json.dumps({"key_id": "k", "project": None}))
    admin_client.shop.ledger.hold(hold, at=datetime.now(UTC), lease=timedelta(minutes=1))
    one = f"{PATH}/{created['id']}"
    shown = admin_client.say("GET", one)
    assert (shown["spent_nanos"], shown["held_nanos"], shown["left_nanos"]) == (0, 300, 700)
    changed = admin_client.say(
        "PATCH", one, {"limit_nanos": 200, "hard": False, "notify_pcts": [90, 10], "webhook_url": None}
    )
    assert (changed["limit_nanos"], changed["hard"], changed["notify_pcts"]) == (200, False, [10, 90])
    assert (changed["webhook_url"], changed["left_nanos"]) == (None, 0)
    assert admin_client.say("PATCH", one, {"limit_nanos": None})["limit_nanos"] == 200
    retired = admin_client.say("DELETE", one)
    assert retired["retired_at"]
    assert admin_client.say("DELETE", one) == retired
    admin_client.say("PATCH", one, {"limit_nanos": 5}, 409)


@on_sqlite
def test_a_budget_starts_with_what_is_held_already(admin_client: AdminClient) -> None:
    key = admin_client.names["acme"]["key"]
    hold = Hold("r1", "acme", 300, None, key, terms=json.dumps({"key_id": key, "project": None}))
    admin_client.shop.ledger.hold(hold, at=datetime.now(UTC), lease=timedelta(minutes=1))
    created = admin_client.say("POST", PATH, {"key": key, "limit_nanos": 1000, "period": "day"}, 201)
    assert (created["level"], created["subject"], created["held_nanos"]) == ("key", key, 300)


def test_lists_come_page_by_page(admin_client: AdminClient) -> None:
    for period in ("day", "total"):
        admin_client.say("POST", PATH, {"limit_nanos": 1, "period": period}, 201)
    whole = admin_client.say("GET", PATH)["data"]
    assert len(whole) == 3
    first = admin_client.say("GET", PATH + "?limit=2")
    assert first["has_more"]
    rest = admin_client.say("GET", f"{PATH}?after={first['last_id']}")
    assert first["data"] + rest["data"] == whole
    admin_client.say("GET", f"{PATH}?after={admin_client.names['rival']['budget']}", status=400)
    admin_client.say("GET", "/tenants/nobody/budgets", status=404)


@on_sqlite
def test_a_tenants_admin_manages_its_projects_and_keys_budgets(admin_client: AdminClient) -> None:
    body = {"project": admin_client.names["acme"]["project"], "limit_nanos": 5, "period": "day"}
    status, created = as_admin(admin_client, "POST", PATH, body)
    assert (status, created["level"]) == (201, "project")
    assert (
        as_admin(admin_client, "PATCH", f"{PATH}/{created['id']}", {"limit_nanos": 6})[1]["limit_nanos"] == 6
    )
    assert as_admin(admin_client, "DELETE", f"{PATH}/{created['id']}")[1]["retired_at"]


@on_sqlite
def test_what_binds_the_whole_tenant_is_the_platforms(admin_client: AdminClient) -> None:
    created = admin_client.say("POST", PATH, {"limit_nanos": 5, "period": "month"}, 201)
    one = f"{PATH}/{created['id']}"
    for method, path, body in (
        ("POST", PATH, {"limit_nanos": 5, "period": "day"}),
        ("PATCH", one, {"limit_nanos": 500}),
        ("DELETE", one, None),
    ):
        status, answer = as_admin(admin_client, method, path, body)
        assert (status, answer["error"]["code"]) == (403, "insufficient_permissions")
    assert as_admin(admin_client, "GET", one) == (200, created)


@on_sqlite
def test_anothers_budget_is_like_one_that_does_not_exist(admin_client: AdminClient) -> None:
    theirs = admin_client.names["rival"]["budget"]
    for method, body in (("GET", None), ("PATCH", {"limit_nanos": 6}), ("DELETE", None)):
        answers = []
        for one in (theirs, "bud_0"):
            status, answer = as_admin(admin_client, method, f"{PATH}/{one}", body)
            answers.append((status, json.dumps(answer).replace(one, "…")))
        assert answers[0] == answers[1]
        assert answers[0][0] == 404
    for what in ("project", "key"):
        body = {what: admin_client.names["rival"][what], "limit_nanos": 5, "period": "day"}
        missing = body | {what: admin_client.names["rival"][what][:-1] + "_"}
        answers = [as_admin(admin_client, "POST", PATH, one) for one in (body, missing)]
        assert [status for status, _ in answers] == [404, 404]


@on_sqlite
def test_a_webhook_to_the_server_itself_is_the_platforms(admin_client: AdminClient) -> None:
    body = {"key": admin_client.names["acme"]["key"], "limit_nanos": 5, "period": "day"}
    for url in ("http://localhost:9000/x", "http://127.0.0.1:80/", "http://[::1]/"):
        status, answer = as_admin(admin_client, "POST", PATH, body | {"webhook_url": url})
        assert (status, answer["error"]["param"]) == (400, "webhook_url")
    created = admin_client.say("POST", PATH, body | {"webhook_url": "http://localhost:9000/x"}, 201)
    assert as_admin(admin_client, "PATCH", f"{PATH}/{created['id']}", {"webhook_url": None})[0] == 200


WRONG = [
    ({"limit_nanos": -1}, "limit_nanos"),
    ({"limit_nanos": 10**18 + 1}, "limit_nanos"),
    ({"limit_nanos": 1.5}, "limit_nanos"),
    ({"limit_nanos": "5"}, "limit_nanos"),
    ({"period": "week"}, "period"),
    ({"notify_pcts": [0]}, "notify_pcts.0"),
    ({"notify_pcts": [201]}, "notify_pcts.0"),
    ({"notify_pcts": list(range(1, 10))}, "notify_pcts"),
    ({"project": "Web!"}, "project"),
    ({"project": "p", "key": "k"}, "key"),
    ({"webhook_url": "http://example.com"}, "webhook_url"),
    ({"webhook_url": "https://a:b@example.com"}, "webhook_url"),
    ({"webhook_url": "https://169.254.169.254/"}, "webhook_url"),
    ({"webhook_url": "https://example.com/" + "x" * 512}, "webhook_url"),
    ({"colour": "red"}, "colour"),
]


@on_sqlite
def test_what_is_wrong_is_named(admin_client: AdminClient) -> None:
    good = {"limit_nanos": 5, "period": "day"}
    for wrong, param in WRONG:
        error = admin_client.say("POST", PATH, good | wrong, status=400)["error"]
        assert (error["param"], error["code"]) == (param, "invalid_value"), wrong
    path = f"{PATH}/{admin_client.names['acme']['budget']}"
    for wrong in ({"limit_nanos": -1}, {"notify_pcts": [0]}, {"period": "day"}, {"webhook_url": "x"}):
        admin_client.say("PATCH", path, wrong, status=400)
    same = {"project": admin_client.names["acme"]["project"], "limit_nanos": 5, "period": "month"}
    assert admin_client.say("POST", PATH, same, 409)["error"]["code"] == "already_exists"


@on_sqlite
def test_a_projects_key_is_no_admin_of_its_budgets(admin_client: AdminClient) -> None:
    plain = admin_client.ask("GET", "/admin/v1" + PATH, admin_client.shop.secret)
    assert plain.status_code == 403
    _, both = admin_client.shop.tenants.create_key("acme", at=NOON, scopes=ADMIN | {"inference"})
    assert admin_client.ask("GET", "/admin/v1" + PATH, both).status_code == 200
