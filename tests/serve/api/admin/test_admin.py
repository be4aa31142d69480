"""The admin API, over HTTP and without an engine: for the operator, and for two tenants' own admins."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from serve.api import admin, errors, models
from serve.api.dependencies import Context
from serve.api.middleware import RequestMiddleware
from serve.billing.budgets.service import BudgetService
from serve.billing.credits.charges import Charge, post_charge
from serve.billing.invoicing.invoices import Invoices
from serve.billing.pricing.plans import Prices
from serve.errors import StoreUnavailable
from serve.observability.metrics import Metrics
from serve.registry.registry import AdapterRegistry
from serve.tenants.audit import Audit
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON, PLAN, TINY
from tests.support.databases import on_sqlite
from tests.support.lora_samples import publish_base, publish_sample

Json = dict[str, Any]
LONG_AGO = datetime(2025, 2, 1, tzinfo=UTC)
ADMIN = frozenset({"admin"})


def old_invoice(shop: BillingFixture, tenant: str) -> str:
    """The number of an invoice that is final, of a month long ago."""
    at = LONG_AGO - timedelta(days=1)
    with shop.store.write() as connection:
        post_charge(
            connection, Charge(f"old:{tenant}", tenant, "training", "x", 1, shop.price.id, 10_000_000, at)
        )
    invoices = Invoices(shop.store)
    draft = invoices.create(tenant, "2025-01", at=LONG_AGO)
    invoices.review(draft.number, at=LONG_AGO)
    return invoices.finalize(draft.number, at=LONG_AGO).number


class AdminClient:
    """Serves the admin API for two tenants, and knows the names of their resources."""

    def __init__(self, shop: BillingFixture, home: Path) -> None:
        self.shop, tenants = shop, shop.tenants
        self.registry = AdapterRegistry(shop.store, [TINY])
        self.app = FastAPI()
        self.app.state.context = Context(
            tenants=tenants,
            registry=self.registry,
            engines={},
            store=shop.store,
            metrics=Metrics(adapters_max=1),
            **cast(Any, dict.fromkeys(Context.__dataclass_fields__.keys() - self._given)),
        )
        self.app.include_router(admin.router)
        self.app.include_router(models.router)
        errors.install(self.app)
        key, self.platform = tenants.platform_keys.create("ops", at=NOON)
        self.platform_id = key.id
        tenants.create("rival", at=NOON)
        self.admins, self.names = {}, {}
        publish_base(home, TINY)
        for tenant in ("acme", "rival"):
            _, self.admins[tenant] = tenants.create_key(tenant, at=NOON, scopes=ADMIN)
            key_id = tenants.create_key(tenant, at=NOON)[0].id
            project = tenants.projects.create(tenant, "web", at=NOON).id
            directory = publish_sample(home, tenant, "support")
            adapter = self.registry.register(directory, at=NOON, base_dir=home / "bases" / TINY, max_rank=16)
            self.registry.promote(adapter, at=NOON)
            other = self.registry.register(
                publish_sample(home, tenant, "support", alpha=3),
                at=NOON,
                base_dir=home / "bases" / TINY,
                max_rank=16,
            )
            self.names[tenant] = {
                "tenant": tenant,
                "key": key_id,
                "project": project,
                "budget": BudgetService(shop.store)
                .create(tenant, "project", project, "month", 9, at=NOON)
                .budget.id,
                "name": "support",
                "version": other.version,
                "invoice": old_invoice(shop, tenant),
            }

    _given = frozenset({"tenants", "registry", "engines", "store", "metrics"})

    def ask(self, method: str, path: str, key: str | None = None, **request: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://admin_client") as client:
                return await client.request(method, path, **request)

        headers = {"authorization": f"Bearer {key or self.platform}"} | request.pop("headers", {})
        request["headers"] = headers
        return asyncio.run(send())

    def say(self, method: str, path: str, body: Json | None = None, status: int = 200) -> Json:
        answer = self.ask(method, "/admin/v1" + path, json=body)
        assert answer.status_code == status, answer.text
        response: Json = answer.json()
        return response

    def call(self, route: tuple[str, str], tenant: str, bearer: str, **more: str) -> httpx.Response:
        method, path = route
        names = self.names.get(tenant, self.names["acme"] | {"tenant": tenant}) | more
        body = {
            name: value.format(**names) if isinstance(value, str) else value
            for name, value in BODIES.get(route, {}).items()
        }
        return self.ask(method, path.format(**names), bearer, json=body if route in BODIES else None)


@pytest.fixture
def admin_client(shop: BillingFixture, tmp_path: Path) -> AdminClient:
    return AdminClient(shop, tmp_path)


A, T = "/admin/v1", "/admin/v1/tenants/{tenant}"
V = T + "/adapters/{name}/versions/{version}"
BODIES: dict[tuple[str, str], Json] = {
    ("POST", A + "/tenants"): {"name": "new", "credit_nanos": 5},
    ("PATCH", T): {"limits": {"tokens_per_min": 5}},
    ("PUT", T + "/credit"): {"credit_nanos": 7},
    ("POST", T + "/projects"): {"name": "app"},
    ("POST", T + "/projects/{project}/archive"): {},
    ("POST", T + "/keys"): {"name": "crm"},
    ("PATCH", T + "/keys/{key}"): {"name": "crm"},
    ("POST", T + "/keys/{key}/rotate"): {"overlap_s": 60},
    ("DELETE", T + "/keys/{key}"): {},
    ("POST", T + "/budgets"): {"project": "{project}", "period": "day", "limit_nanos": 5},
    ("PATCH", T + "/budgets/{budget}"): {"limit_nanos": 6},
    ("DELETE", T + "/budgets/{budget}"): {},
    ("POST", A + "/prices"): PLAN.model_copy(update={"name": "gold"}).model_dump(),
    ("PUT", T + "/subscription"): {"plan": "standard"},
    ("POST", T + "/grants"): {"amount_nanos": 5},
    ("PUT", T + "/billing-details"): {"name": "Acme Ltd"},
    ("PUT", A + "/seller"): {"name": "Bespoke Ltd"},
    ("POST", A + "/invoices"): {"tenant": "acme", "period": "2026-11"},
    ("POST", A + "/invoices/{invoice}/transition"): {"state": "paid"},
    ("POST", A + "/invoices/{invoice}/credit-notes"): {
        "reason": "slow",
        "lines": [{"amount_nanos": 10_000_000}],
    },
    ("POST", V + "/promote"): {},
    ("POST", V + "/pin"): {},
    ("POST", V + "/unpin"): {},
    ("POST", V + "/retire"): {},
    ("POST", A + "/platform-keys"): {"name": "ci"},
    ("DELETE", A + "/platform-keys/{key}"): {},
}
ROUTES = sorted(
    (method, route.path)
    for route in admin.router.routes
    if isinstance(route, APIRoute)
    for method in route.methods
)
OWN = [route for route in ROUTES if any(part in route[1] for part in ("/projects", "/keys", "/budgets"))]


def test_every_route_that_changes_something_is_tried_here() -> None:
    assert {route for route in ROUTES if route[0] != "GET"} == BODIES.keys()


@pytest.mark.parametrize("route", BODIES)
def test_the_operator_may_do_all_and_it_is_written_down(
    admin_client: AdminClient, route: tuple[str, str]
) -> None:
    other, _ = admin_client.shop.tenants.platform_keys.create("other", at=NOON)
    names = {"key": other.id} if "platform" in route[1] else {}
    if route[1].endswith("/unpin"):
        admin_client.call((route[0], route[1].replace("/unpin", "/pin")), "acme", admin_client.platform)
    seen = {entry.id for entry in Audit(admin_client.shop.store).entries(limit=100)}
    answer = admin_client.call(route, "acme", admin_client.platform, **names)
    assert answer.status_code in (200, 201), answer.text
    new = [entry for entry in Audit(admin_client.shop.store).entries(limit=100) if entry.id not in seen]
    assert new
    assert {entry.actor for entry in new} == {f"platform:{admin_client.platform_id}"}


@on_sqlite
def test_to_a_tenants_admin_others_and_what_is_missing_look_the_same(admin_client: AdminClient) -> None:
    before = Audit(admin_client.shop.store).entries(limit=1)
    for tenant, other in (("acme", "rival"), ("rival", "acme")):
        for route in ROUTES:
            foreign = admin_client.call(route, other, admin_client.admins[tenant])
            missing = admin_client.call(route, "nobody", admin_client.admins[tenant])
            assert (foreign.status_code, foreign.content) == (missing.status_code, missing.content), route
            assert foreign.status_code == 404, route
    assert Audit(admin_client.shop.store).entries(limit=1) == before


@on_sqlite
@pytest.mark.parametrize("route", OWN)
def test_a_tenants_admin_rules_its_own_projects_and_keys(
    admin_client: AdminClient, route: tuple[str, str]
) -> None:
    answer = admin_client.call(route, "acme", admin_client.admins["acme"])
    assert answer.status_code in (200, 201), answer.text


@on_sqlite
def test_and_nothing_else(admin_client: AdminClient) -> None:
    missing = admin_client.call(("GET", T), "nobody", admin_client.admins["acme"])
    for route in set(ROUTES) - set(OWN):
        answer = admin_client.call(route, "acme", admin_client.admins["acme"])
        assert (answer.status_code, answer.content) == (404, missing.content), route


@on_sqlite
@pytest.mark.parametrize("route", [route for route in OWN if "{key}" in route[1] or "{project}" in route[1]])
def test_anothers_key_under_ones_own_name_is_like_one_that_does_not_exist(
    admin_client: AdminClient, route: tuple[str, str]
) -> None:
    what = "key" if "{key}" in route[1] else "project"
    theirs = admin_client.names["rival"][what]
    missing = theirs[:-1] + ("0" if theirs[-1] != "0" else "1")
    answers = [
        admin_client.call(route, "acme", admin_client.admins["acme"], **{what: one})
        for one in (theirs, missing)
    ]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert answers[0].text.replace(theirs, "…") == answers[1].text.replace(missing, "…")


@on_sqlite
@pytest.mark.parametrize(
    ("key", "status", "code"),
    [
        ("bsk-wrong", 401, "invalid_api_key"),
        ("bsp-wrong", 401, "invalid_api_key"),
        ("plain", 403, "insufficient_permissions"),
    ],
)
def test_nobody_else_gets_in(admin_client: AdminClient, key: str, status: int, code: str) -> None:
    for route in ROUTES:
        answer = admin_client.call(route, "acme", admin_client.shop.secret if key == "plain" else key)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), route


@on_sqlite
def test_a_body_is_not_looked_at_before_the_key(admin_client: AdminClient) -> None:
    broken = {"content": b"{", "headers": {"content-type": "application/json"}}
    assert admin_client.ask("POST", "/admin/v1/tenants", "bsp-wrong", **broken).status_code == 401
    answer = admin_client.ask(
        "POST", "/admin/v1/tenants", content=b"{", headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "The body is not valid JSON."


WRONG: list[tuple[str, Json | None, str | None]] = [
    ("/tenants", {"name": "../x"}, "name"),
    ("/tenants", {"name": "x\n"}, "name"),
    ("/tenants", {"name": "x", "color": "red"}, "color"),
    ("/tenants", {"name": "x", "credit_nanos": -1}, "credit_nanos"),
    ("/tenants", {}, "name"),
    ("/tenants", None, None),
    ("/tenants/acme/keys", {"scopes": ["root"]}, "scopes.0"),
    ("/tenants/acme/keys", {"scopes": []}, "scopes"),
    ("/tenants/acme/keys", {"expires_at": 1}, "expires_at"),
    ("/tenants/acme/keys", {"name": "a\x00b"}, "name"),
    ("/tenants/acme/keys", {"limits": {"tokens_per_min": 0}}, "limits.tokens_per_min"),
    ("/tenants/acme/keys", {"limits": {"models": ["a*b"]}}, "models"),
    ("/prices", {"name": "x"}, "base"),
]


@on_sqlite
def test_what_is_wrong_is_named(admin_client: AdminClient) -> None:
    for path, body, param in WRONG:
        error = admin_client.say("POST", path, body, status=400)["error"]
        assert (error["param"], error["type"]) == (param, "invalid_request_error"), (path, body)
        assert error["code"] == "invalid_value", (path, body)


@on_sqlite
def test_a_body_that_is_too_large_is_413(admin_client: AdminClient) -> None:
    admin_client.app.add_middleware(RequestMiddleware, metrics=Metrics(adapters_max=1), body_bytes_max=10_000)

    async def chunks() -> Any:
        yield b'{"name": "' + b"x" * 20_000

    headers = {"content-type": "application/json"}
    assert admin_client.ask("POST", "/admin/v1/tenants", content=chunks(), headers=headers).status_code == 413


REFUSED: list[tuple[str, str, Json | None, int, str]] = [
    ("POST", "/tenants", {"name": "acme"}, 409, "already_exists"),
    ("POST", "/tenants/acme/projects", {"name": "web"}, 409, "already_exists"),
    ("GET", "/tenants/nobody", None, 404, "not_found"),
    ("GET", "/tenants/nobody/keys", None, 404, "not_found"),
    ("GET", "/tenants/%00/keys", None, 404, "not_found"),
    ("PUT", "/tenants/acme/subscription", {"plan": "gold"}, 404, "not_found"),
    ("PUT", "/tenants/nobody/credit", {"credit_nanos": 1}, 404, "not_found"),
    ("POST", "/tenants/acme/keys", {"project": "proj_0"}, 404, "not_found"),
    ("GET", "/tenants?limit=101", None, 400, "invalid_value"),
    ("GET", "/tenants?after=nobody", None, 400, "invalid_value"),
    ("GET", "/audit?after=1", None, 400, "invalid_value"),
    ("GET", "/nothing", None, 404, "not_found"),
]


@on_sqlite
def test_errors_are_openai_shaped(admin_client: AdminClient) -> None:
    for method, path, body, status, code in REFUSED:
        error = admin_client.say(method, path, body, status)["error"]
        assert set(error) == {"message", "type", "param", "code"}, path
        assert error["code"] == code, path


@on_sqlite
def test_the_alias_keeps_its_version_from_being_retired(admin_client: AdminClient) -> None:
    path = "/tenants/acme/adapters/support/versions/" + admin_client.names["acme"]["version"]
    assert admin_client.say("POST", path + "/promote")["alias"] == "next"
    assert admin_client.say("POST", path + "/pin")["pinned"] is True
    error = admin_client.say("POST", path + "/retire", status=409)["error"]
    assert "promote another version first" in error["message"]


@on_sqlite
def test_a_store_that_is_away_is_503_never_401(
    admin_client: AdminClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise StoreUnavailable()

    monkeypatch.setattr(admin_client.shop.tenants.platform_keys, "find", away)
    answer = admin_client.ask("GET", "/admin/v1/tenants")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


@on_sqlite
def test_a_key_from_its_making_to_its_end(admin_client: AdminClient) -> None:
    created = admin_client.say(
        "POST", "/tenants/acme/keys", {"name": "crm", "limits": {"models": ["acme/*"]}}, 201
    )
    assert admin_client.ask("GET", "/v1/models", created["secret"]).status_code == 200
    without = {"headers": {"x-api-key": created["secret"], "authorization": ""}}
    assert (
        admin_client.ask("GET", "/v1/models", **without).status_code == 401
    )  # Authorization is there, and empty
    listed = admin_client.say("GET", "/tenants/acme/keys?limit=100")
    (shown,) = [key for key in listed["data"] if key["id"] == created["id"]]
    assert shown == {name: value for name, value in created.items() if name != "secret"}
    assert created["secret"] not in str(listed)
    path = f"/tenants/acme/keys/{created['id']}"
    changed = admin_client.say(
        "PATCH", path, {"name": "shop", "limits": {"models": None, "requests_per_min": 3}}
    )
    assert (changed["name"], changed["limits"]["models"]) == ("shop", None)
    assert changed["limits"]["requests_per_min"] == 3
    new = admin_client.say("POST", path + "/rotate", {"overlap_s": 60}, 201)
    assert (new["name"], new["limits"]) == ("shop", changed["limits"])
    admin_client.say("POST", path + "/rotate", {}, 409)
    assert admin_client.say("DELETE", path)["revoked_at"]
    assert admin_client.ask("GET", "/v1/models", new["secret"]).status_code == 200


@on_sqlite
def test_anthropics_header_is_taken_where_openais_is_missing(admin_client: AdminClient) -> None:
    async def send(headers: dict[str, str]) -> int:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(admin_client.app), base_url="http://admin_client"
        ) as client:
            return (await client.get("/v1/models", headers=headers)).status_code

    secret = admin_client.shop.secret
    assert asyncio.run(send({"x-api-key": secret})) == 200
    assert asyncio.run(send({"x-api-key": secret, "authorization": "Bearer bsk-no"})) == 401
    assert asyncio.run(send({})) == 401


@on_sqlite
def test_a_suspended_tenant_is_told_so(admin_client: AdminClient) -> None:
    assert admin_client.say("PATCH", "/tenants/acme", {"suspended": True})["suspended_at"]
    for path in ("/v1/models", "/admin/v1/tenants/acme/keys"):
        answer = admin_client.ask("GET", path, admin_client.admins["acme"])
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "tenant_suspended")
    assert admin_client.say("PATCH", "/tenants/acme", {"suspended": False})["suspended_at"] is None


@on_sqlite
def test_an_admin_key_grants_no_more_than_its_tenant_may(admin_client: AdminClient) -> None:
    admin_client.say("PATCH", "/tenants/acme", {"scopes": ["inference", "admin"]})
    answer = admin_client.ask(
        "POST", "/admin/v1/tenants/acme/keys", admin_client.admins["acme"], json={"scopes": ["files"]}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "scope_not_allowed")


def test_lists_come_page_by_page(admin_client: AdminClient) -> None:
    Prices(admin_client.shop.store).publish(PLAN.model_copy(update={"name": "gold"}), at=NOON)
    for path in ("/tenants", "/tenants/acme/keys", "/tenants/acme/adapters", "/prices", "/audit"):
        whole = admin_client.say("GET", path + "?limit=100")
        assert whole["object"] == "list"
        assert not whole["has_more"]
        ids = [item["id"] for item in whole["data"]]
        assert (whole["first_id"], whole["last_id"]) == (ids[0], ids[-1])
        first = admin_client.say("GET", path + "?limit=1")
        assert [item["id"] for item in first["data"]] == ids[:1]
        assert first["has_more"]
        rest = admin_client.say("GET", f"{path}?limit=100&after={first['last_id']}")
        assert [item["id"] for item in rest["data"]] == ids[1:]
    empty = admin_client.say("GET", "/audit?tenant=nobody")
    assert (empty["data"], empty["first_id"], empty["last_id"]) == ([], None, None)


@on_sqlite
def test_the_document_says_what_is_true(admin_client: AdminClient) -> None:
    document = admin_client.app.openapi()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path.startswith("/admin/"):
                assert "422" not in operation["responses"]
                assert operation["security"] == [{"key": []}]
                for status in ("400", "401", "403", "404", "409", "429", "503", "default"):
                    schema = operation["responses"][status]["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorBody"}
    assert document["components"]["schemas"]["NewTenant"]["additionalProperties"] is False
